"""All methods of the comparison: what each is called, its strengths, and how it trains."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.learning import ours, rivals
from benchmarks.learning.setting import Outcome, Setting
from dist_gsl.penalty import PenaltyConfig, PerLayer

OWN, PART, RIVAL, CONTROL, USE = "the default", "one part of it other", "rival", "control", "use"
STRENGTHS = (3.0, 2.2, 1.7, 1.3, 1.15, 1.0)
"""Epochs of the demo (16) after which an unsupported neuron is gone; scaled to the setting's. Each method's were chosen on the validation split of
seed 0, so that they reach from few neurons gone to most."""
FOR_PARTS = (2.2, 1.7, 1.15)
"""Those of the default that are compared with it where one part is other."""
AT_EPOCHS = (4.0, 3.0, 2.6, 2.3, 2.15, 2.0)
"""Where the operator runs at the end of each epoch, from the first one: much goes at once there."""
BETWEEN = (5.0, 1.5, 0.9, 0.8, 0.7)
"""More of the default's, for a front that budgets are compared with."""
FROM_DENSE = (5.5, 4.8, 4.2)
"""At a fifth of the learning rate, at which the loss holds on to a neuron a fifth as much in an epoch."""
SHARES = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Of the neurons, that methods which are told how many cut: as many as the default has strengths, as a hypervolume grows with their number."""
TARGETS = (95, 90, 80, 70, 60, 50, 40, 30, 20, 10)
"""Percent of the neurons that may be left."""
PAIRS = 20
"""Pairs of beta over a factor of ten, as in the paper's measurement of its sensitivity."""
DEMO_STRENGTH = 1.5


class Method(NamedTuple):
    title: str
    kind: str
    strengths: Sequence[float]
    run: Callable[[Setting, int, float, Path], Outcome]
    """(setting, seed, strength, folder of the comparison)."""
    comes_later: bool = False
    """It goes on from what another method left in the folder."""
    one_seed: bool = False
    decays: Sequence[float] = ()
    """Weight decay at each strength, where it is not the setting's; of rivals the best of 0 to 3.2e-2 on the validation split of seed 0."""

    def trained(self, setting: Setting, seed: int, strength: float, folder: Path) -> Outcome:
        return self.run(self.setting(setting, strength), seed, strength, folder)

    def setting(self, setting: Setting, strength: float) -> Setting:
        return replace(setting, weight_decay=self.decays[self.strengths.index(strength)]) if self.decays else setting


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What is done: a dict for each training. `ValueError` for a line that is none, as of a comparison that was killed while it wrote."""
    file, rows = folder / "rows.jsonl", []
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(f"{file}, line {number} is not a whole training: delete it, and run the comparison again for what it lacks") from None
    return rows


def dense_weights(folder: Path, seed: int) -> Path:
    return folder / f"dense-{seed}.pt"


def in_epochs(setting: Setting, strength: float) -> float:
    return strength * setting.epochs / 16


def penalised(penalty: Callable[[Setting, float], PenaltyConfig], setting: Setting, seed: int, strength: float, folder: Path) -> Outcome:
    return ours.trained(setting, seed, penalty(setting, in_epochs(setting, strength)))


def rival(train: Callable[..., Outcome], weights: Mapping[float, float], setting: Setting, seed: int, strength: float, folder: Path) -> Outcome:
    """weights: of the rival's own penalty, by strength."""
    return train(setting, seed, strength, **({"weight": weights[strength]} if weights else {}))


def dense(setting: Setting, seed: int, strength: float, folder: Path) -> Outcome:
    outcome = rivals.no_penalty(setting, seed)
    torch.save(outcome.model.state_dict(), dense_weights(folder, seed))
    return outcome


def from_scratch(setting: Setting, seed: int, strength: float, folder: Path) -> Outcome:
    (row,) = (row for row in rows_of(folder) if (row["method"], row["seed"], row["strength"]) == ("default", seed, strength))
    if "error" in row:
        raise ValueError(f"no widths: the default failed at strength {strength:g} of seed {seed}")
    return rivals.from_scratch(setting, seed, row["widths"])


def from_dense(setting: Setting, seed: int, strength: float, folder: Path) -> Outcome:
    if not dense_weights(folder, seed).exists():
        raise ValueError(f"no dense weights: the training without penalty failed for seed {seed}")
    return ours.from_dense(setting, seed, ours.group_sparsity(setting, in_epochs(setting, strength)), dense=dense_weights(folder, seed))


def steered(setting: Setting, seed: int, strength: float, folder: Path) -> Outcome:
    return ours.trained(setting, seed, ours.default(setting, in_epochs(setting, DEMO_STRENGTH)), target=f"neurons={strength:g}%")


def drawn(setting: Setting, seed: int, strength: float, folder: Path) -> Outcome:
    """One of the pairs (first layer, rest), each drawn evenly in the logarithm over a factor of ten around the demo's."""
    draw = random.Random(int(strength))
    first, rest = (in_epochs(setting, DEMO_STRENGTH * 10 ** draw.uniform(-0.5, 0.5)) for _ in range(2))
    penalty = replace(ours.default(setting, rest), beta=PerLayer(rest=rest, first=first, num_first=1))
    outcome = ours.trained(setting, seed, penalty)
    outcome.extra.update(first=first, rest=rest)
    return outcome


def tuned_decay(setting: Setting, seed: int, strength: float, folder: Path) -> Outcome:
    return rivals.no_penalty(setting, seed)


def max_pool_2d(setting: Setting, seed: int, strength: float, folder: Path) -> Outcome:
    return rivals.max_pool_2d(setting, seed)


def _own(
    title: str, penalty: Callable[[Setting, float], PenaltyConfig], strengths: Sequence[float] = FOR_PARTS, *, kind: str = PART, decays: Sequence[float] = ()
) -> Method:  # fmt: skip
    return Method(title, kind, strengths, partial(penalised, penalty), decays=decays)


def _rival(
    title: str, strengths: Sequence[float], train: Callable[..., Outcome], *, decays: Sequence[float] = (), weights: Sequence[float] = ()
) -> Method:  # fmt: skip
    by_strength = dict(zip(strengths, weights, strict=True)) if weights else {}
    return Method(title, RIVAL, strengths, partial(rival, train, by_strength), decays=decays)


METHODS = {
    "none": Method("no penalty", CONTROL, (0.0,), dense),
    "tuned-decay": Method("no penalty, the weight decay that is best", CONTROL, (0.0,), tuned_decay, decays=(1.6e-2,)),
    "max-pool-2d": Method("Dec3's counterpart with 2D filters", CONTROL, (0.0,), max_pool_2d),
    "default": _own("this project's default", ours.default, STRENGTHS, kind=OWN),
    "default-decay": _own("this project's default, with more weight decay where that is better", ours.default, (3.0, 2.2), kind=OWN, decays=(4e-3, 4e-3)),
    "gs": _own("without: the L1 part; group sparsity, alpha 0", ours.group_sparsity),
    "revive": _own("without: dead is dead", ours.may_come_back),
    "free-at-the-end": _own("with: a last phase without penalty", ours.free_at_the_end),
    "each-epoch": _own("without: the operator in every step; at each epoch's end", ours.each_epoch, (2.8, 2.2, 1.75)),
    "no-root": _own("without: the root of P_l", ours.without_root),
    "first-weaker": _own("with: half the strength in the first layer", ours.first_weaker),
    "paper-gs": _own("the paper's group sparsity: at each epoch's end, to the last, revivable", ours.paper_gs, AT_EPOCHS, kind=RIVAL, decays=(4e-3, 4e-3, *(5e-4,) * 4)),
    "paper-sgl": _own("the paper's sparse group lasso", ours.paper_sgl, AT_EPOCHS, kind=RIVAL, decays=(4e-3, *(5e-4,) * 5)),
    "l2": _rival("weight decay and a threshold", (2e-2, 3e-2), rivals.l2, decays=(2e-2, 3e-2)),
    "l1": _rival("L1 and a threshold", (2e-3, 3e-3, 4e-3), rivals.l1),
    "gradient-gl": _rival(
        "group lasso by gradients, a threshold, fine-tuned", (8e-4, 1e-3, 1.2e-3, 1.4e-3, 1.7e-3, 2e-3), rivals.gradient_group_lasso, decays=(2e-3,) * 6
    ),
    "magnitude": _rival("filters of small magnitude cut, fine-tuned", SHARES, rivals.magnitude, decays=(1.6e-2,) * 6),
    "slimming": _rival(
        "small BatchNorm scales cut, fine-tuned", SHARES, rivals.slimming, decays=(*(1.6e-2,) * 5, 4e-3), weights=(*(1e-4,) * 5, 1e-3)
    ),
    "torch-pruning": _rival(
        "torch-pruning's GroupNormPruner, fine-tuned", SHARES, rivals.torch_pruning,
        decays=(*(1.6e-2,) * 3, 0.0, 0.0, 1e-4), weights=(*(1e-4,) * 3, *(5e-3,) * 3),
    ),
    "rmda": _rival("RMDA, group sparsity (alpha 0)", (3.5e-4, 6e-4, 1e-3), rivals.rmda, decays=(0.0,) * 3),
    "narrower": _rival("every layer cut alike, from the start", SHARES, rivals.narrower, decays=(*(1.6e-2,) * 3, *(8e-3,) * 3)),
    "scratch": Method("the default's widths, trained from scratch", CONTROL, (2.2, 1.7, 1.0), from_scratch, comes_later=True, decays=(1.6e-2, 1.6e-2, 8e-3)),
    "between": Method("the default at strengths in between", USE, BETWEEN, partial(penalised, ours.default)),
    "target": Method("the default steered to a budget", USE, TARGETS, steered, decays=(8e-3, *(4e-3,) * 4, *(5e-4,) * 5)),
    "init": Method("group sparsity from the dense network's weights", USE, FROM_DENSE, from_dense, comes_later=True),
    "sensitivity": Method("the default at random pairs of beta", USE, range(PAIRS), drawn, one_seed=True),
}
