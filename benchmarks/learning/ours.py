"""This project's own trainings: the default, the paper's way, the ablations, budgets."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from benchmarks.learning.setting import Batches, Outcome, Setting, Split
from dist_gsl import compact, find_neurons
from dist_gsl.config import RunConfig
from dist_gsl.measures import measure
from dist_gsl.models import create_model
from dist_gsl.penalty import PenaltyConfig, PerLayer
from dist_gsl.training import loop
from dist_gsl.training.state import build

NUM_CLASSES = 36


def network(config: RunConfig) -> dict[str, object]:
    return {"name": config.network.name, "num_classes": NUM_CLASSES, "width": config.network.width, "batch_norm": config.network.batch_norm}


def trained(setting: Setting, seed: int, penalty: PenaltyConfig, *, target: str | None = None) -> Outcome:
    """By the training loop, with removal at each epoch's end where the dead stay dead, and a last removal with its proof."""
    config = setting.config(seed)
    train = replace(config.train, target=target)
    batches = Batches(setting, seed)
    state = build(
        network(config), image_shape=(1, 32, 32), train=train, penalty=penalty, steps_per_epoch=len(batches), device=torch.device("cpu")
    )
    loop.train(
        state, config=train, penalty=penalty, training_data=batches, validation_data=Split(setting, "val"), on_epoch=lambda state, record: None
    )
    state.optimizer.detach()
    measures = measure(state.model, state.neurons)
    alive = {layer.name: int(layer.mask.sum()) for layer in state.neurons}
    result = compact(state.model, state.neurons)
    steering = state.steering
    extra = {} if steering is None else {"budget": steering.budget, "met": steering.is_met}
    return Outcome(
        result.model, measures.neurons, sum(p.numel() for p in result.model.parameters()), measures.total_param, alive,
        {"difference": result.max_abs_difference, **extra},
    )  # fmt: skip


# --- penalties, each from a strength in epochs: smaller is stronger


def default(setting: Setting, strength: float) -> PenaltyConfig:
    return replace(setting.config(0).penalty, beta=PerLayer(rest=strength))


def sgl(setting: Setting, strength: float) -> PenaltyConfig:
    return replace(default(setting, strength), alpha=PerLayer(rest=0.5))


def paper_gs(setting: Setting, strength: float) -> PenaltyConfig:
    """At the end of each epoch, from the first to the last; what is zero may come back until then."""
    penalty = default(setting, strength)
    return replace(penalty, every="epoch", revive=True, beta_schedule=replace(penalty.beta_schedule, start=0.0, end=None))


def paper_sgl(setting: Setting, strength: float) -> PenaltyConfig:
    return replace(paper_gs(setting, strength), alpha=PerLayer(rest=0.5))


def may_come_back(setting: Setting, strength: float) -> PenaltyConfig:
    return replace(default(setting, strength), revive=True)


def to_the_end(setting: Setting, strength: float) -> PenaltyConfig:
    penalty = default(setting, strength)
    return replace(penalty, beta_schedule=replace(penalty.beta_schedule, end=None))


def each_epoch(setting: Setting, strength: float) -> PenaltyConfig:
    return replace(default(setting, strength), every="epoch")


def without_root(setting: Setting, strength: float) -> PenaltyConfig:
    """beta_l without the root of P_l: as strong as the default in the layer that fixes the unit."""
    config = setting.config(0)
    neurons = find_neurons(create_model(**network(config)), torch.zeros(2, 1, 32, 32))  # type: ignore[arg-type]
    sizes = {layer.name: layer.group_size for layer in neurons}
    last = list(sizes.values())[-1]
    return replace(default(setting, strength), beta=PerLayer(by_layer={name: strength * math.sqrt(size / last) for name, size in sizes.items()}))


def first_weaker(setting: Setting, strength: float) -> PenaltyConfig:
    """The paper's ratio for its characters: half as strong in the first layer."""
    return replace(default(setting, strength), beta=PerLayer(rest=strength, first=2 * strength, num_first=1))
