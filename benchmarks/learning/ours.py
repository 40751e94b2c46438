"""This project's own trainings: the default, the paper's way, the ablations, budgets."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.setting import DEVICE, Batches, Outcome, Setting, Split, top1
from dist_gsl import compact, find_neurons
from dist_gsl.config import RunConfig
from dist_gsl.measures import measure
from dist_gsl.models import create_model
from dist_gsl.penalty import PenaltyConfig, PerLayer, Schedule, starting_betas
from dist_gsl.training import loop
from dist_gsl.training.config import TrainConfig
from dist_gsl.training.state import build

NUM_CLASSES = 36
WATCHED = 1000
"""Validation images that are looked at after each epoch of a start from dense weights."""
AVERAGE = 0.98
"""Decay a step of the moving average of a start from dense weights."""


def network(config: RunConfig) -> dict[str, Any]:
    return {"name": config.network.name, "num_classes": NUM_CLASSES, "width": config.network.width, "batch_norm": config.network.batch_norm}


def trained(
    setting: Setting, seed: int, penalty: PenaltyConfig, *, train: TrainConfig | None = None, target: str | None = None, watched: int = 50
) -> Outcome:
    """By the training loop, with removal at each epoch's end where the dead stay dead, and a last removal with its proof.

    train: other than the setting's. watched: validation images that are looked at after each epoch.
    """
    config = setting.config(seed)
    train = replace(config.train if train is None else train, target=target)
    batches, records = Batches(setting, seed), []
    if penalty.every == "epoch":
        penalty = in_absolute_units(setting, seed, penalty, steps_per_epoch=len(batches))
    state = build(
        network(config), image_shape=(1, 32, 32), train=train, penalty=penalty, steps_per_epoch=len(batches), device=DEVICE
    )
    loop.train(
        state, config=train, penalty=penalty, training_data=batches, validation_data=Split(setting, "val", most=watched),
        on_epoch=lambda state, record: records.append(record),
    )  # fmt: skip
    state.optimizer.detach()
    measures = measure(state.evaluated, state.neurons)
    alive = {layer.name: int(layer.mask.sum()) for layer in state.neurons}
    result = compact(state.evaluated, state.neurons.bound_to(state.evaluated))
    steering = state.steering
    extra = {} if steering is None else {"budget": steering.budget, "met": steering.is_met}
    return Outcome(
        result.model, measures.neurons, sum(p.numel() for p in result.model.parameters()), measures.total_param, alive,
        {"difference": result.max_abs_difference, "course": [round(record["val_top1"], 2) for record in records],
         "alive": [round(100 - record["neurons"], 1) for record in records], **extra},
    )  # fmt: skip


def from_dense(setting: Setting, seed: int, penalty: PenaltyConfig, *, dense: Path) -> Outcome:
    """`--init`: from the weights of the dense network, which had as many epochs, with a fifth of its learning rate, the penalty on from the start to the
    end, and a moving average: while norms shrink, normalised layers take larger steps, whose noise the average does not have."""
    config = setting.config(seed)
    outcome = trained(
        setting, seed, replace(penalty, beta_schedule=Schedule()),
        train=replace(config.train, init=str(dense), learning_rate=config.train.learning_rate / 5, ema=AVERAGE), watched=WATCHED,
    )  # fmt: skip
    outcome.extra["start"] = of_dense(setting, dense)
    return outcome


def of_dense(setting: Setting, dense: Path) -> float:
    """Accuracy of the dense weights on the images that are watched."""
    model = create_model(**network(setting.config(0))).to(DEVICE)
    model.load_state_dict(torch.load(dense, weights_only=True))
    return top1(model, setting, "val", most=WATCHED)


def in_absolute_units(setting: Setting, seed: int, penalty: PenaltyConfig, *, steps_per_epoch: int) -> PenaltyConfig:
    """With the betas that the same strengths are where the operator runs in every step. In epochs they would be whole numbers where it runs once in each."""
    config = setting.config(seed)
    torch.manual_seed(seed)  # as `build` does
    neurons = find_neurons(create_model(**network(config)), torch.zeros(2, 1, 32, 32))
    betas = starting_betas(
        replace(penalty, every="step"), neurons, steps_per_epoch=steps_per_epoch,
        learning_rate=lambda step: config.train.learning_rate_at(step, steps_per_epoch=steps_per_epoch),
    )  # fmt: skip
    return replace(penalty, unit="absolute", beta=PerLayer(by_layer=betas))


# --- penalties, each from a strength in epochs: smaller is stronger


def default(setting: Setting, strength: float) -> PenaltyConfig:
    return replace(setting.config(0).penalty, beta=PerLayer(rest=strength))


def group_sparsity(setting: Setting, strength: float) -> PenaltyConfig:
    return replace(default(setting, strength), alpha=PerLayer())


def paper_gs(setting: Setting, strength: float) -> PenaltyConfig:
    """At the end of each epoch, from the first to the last; what is zero may come back until then."""
    return replace(group_sparsity(setting, strength), every="epoch", revive=True, beta_schedule=Schedule())


def paper_sgl(setting: Setting, strength: float) -> PenaltyConfig:
    return replace(paper_gs(setting, strength), alpha=PerLayer(rest=0.5))


def may_come_back(setting: Setting, strength: float) -> PenaltyConfig:
    return replace(default(setting, strength), revive=True)


def free_at_the_end(setting: Setting, strength: float) -> PenaltyConfig:
    """From where others cut."""
    penalty = default(setting, strength)
    return replace(penalty, beta_schedule=replace(penalty.beta_schedule, end=setting.cut))


def each_epoch(setting: Setting, strength: float) -> PenaltyConfig:
    return replace(default(setting, strength), every="epoch")


def without_root(setting: Setting, strength: float) -> PenaltyConfig:
    """beta_l without the root of P_l: as strong as the default in the layer that fixes the unit."""
    config = setting.config(0)
    neurons = find_neurons(create_model(**network(config)), torch.zeros(2, 1, 32, 32))
    sizes = {layer.name: layer.group_size for layer in neurons}
    last = list(sizes.values())[-1]
    return replace(default(setting, strength), beta=PerLayer(by_layer={name: strength * math.sqrt(size / last) for name, size in sizes.items()}))


def first_weaker(setting: Setting, strength: float) -> PenaltyConfig:
    """The paper's ratio for its characters: half as strong in the first layer."""
    return replace(default(setting, strength), beta=PerLayer(rest=strength, first=2 * strength, num_first=1))
