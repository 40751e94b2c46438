"""A regularisation path: networks for one strength of the penalty after another, each warm-started from the last. Knows nothing of Ray.

The trunk is one training: without penalty first (the dense solution), then a few epochs with each strength, from weak to strong, at the full
learning rate; what died on the way is removed and stays dead. From the end of each a branch leads to that strength's network: a few epochs
without penalty while the learning rate falls to zero. This is how paths are computed for the lasso (Friedman, Hastie and Tibshirani,
"Regularization paths for generalized linear models via coordinate descent", J. Stat. Softw. 2010), for a problem that is not convex.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dist_gsl.config import RunConfig
from dist_gsl.penalty import PenaltyConfig, PerLayer, Schedule, starting_betas
from dist_gsl.training.checkpoint import Checkpoints, name_of, snapshot
from dist_gsl.training.config import TrainConfig
from dist_gsl.training.session import Place, Session, UnreadableError, last_state, network_arguments
from dist_gsl.training.state import build_network


@dataclass(frozen=True)
class PathConfig:
    """How long each part of a path is, in epochs."""

    step_epochs: int = 2
    """With each strength of the penalty."""
    finish_epochs: int = 4
    """Without penalty, from each strength to its network; the dense network's too, so that it takes the config's epochs in all."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"path: {name} is {value}, must be at least 1")

    def check(self, train: TrainConfig, penalty: PenaltyConfig) -> None:
        """`ValueError` where nothing is left for the dense network, or neurons could come back."""
        if penalty.revive:
            raise ValueError("path: penalty.revive lets neurons come back, and a path removes them; leave it out")
        if train.epochs <= self.finish_epochs or train.epochs - self.finish_epochs <= train.warmup_epochs:
            raise ValueError(
                f"path: train.epochs is {train.epochs}, of which {self.finish_epochs} finish; more must be left than train.warmup_epochs "
                f"({train.warmup_epochs:g}): raise --train.epochs or lower --finish-epochs"
            )

    def trunk(self, train: TrainConfig, number: int) -> TrainConfig:
        """The trunk up to strength `number`, counted from 1; 0 is its dense part."""
        dense = train.epochs - self.finish_epochs
        return replace(train, epochs=dense + number * self.step_epochs, schedule="constant", shrink=_shrink(train))

    def num_epochs(self, train: TrainConfig, number: int) -> int:
        """Of a path with so many strengths, all parts together."""
        return train.epochs + number * (self.step_epochs + self.finish_epochs)

    def branch(self, train: TrainConfig, number: int) -> TrainConfig:
        """From there to its network: the learning rate falls along half a cosine."""
        begin = self.trunk(train, number).epochs
        return replace(train, epochs=begin + self.finish_epochs, schedule="cosine", warmup_epochs=float(begin), shrink=_shrink(train))


def _shrink(train: TrainConfig) -> str:
    return "epoch" if train.shrink == "never" else train.shrink


def at_strength(penalty: PenaltyConfig, value: float) -> PenaltyConfig:
    """With that value of beta.rest, and every other beta in proportion."""
    factor = value / penalty.beta.rest if penalty.beta.rest else 1.0
    first = None if penalty.beta.first is None else penalty.beta.first * factor
    by_layer = {layer: each * factor for layer, each in penalty.beta.by_layer.items()}
    return replace(penalty, beta=PerLayer(value, first, penalty.beta.num_first, by_layer))


def strengths(penalty: PenaltyConfig, low: float, high: float, number: int) -> list[float]:
    """So many values of penalty.beta.rest from weak to strong, each by the same factor from the last, both ends included."""
    weak, strong = (high, low) if penalty.unit == "epochs" else (low, high)
    if number == 1:
        return [strong]
    return [weak * (strong / weak) ** (i / (number - 1)) for i in range(number)]


@dataclass(frozen=True)
class Report:
    """What hears of a path."""

    begun: Callable[[int], None] = lambda number: None
    """A strength's part of the trunk begins, or is gone on with, or its branch; 0 is the dense network."""
    trained: Callable[[int], None] = lambda number: None
    """Its network is trained, and kept."""


def follow(
    config: RunConfig,
    path: PathConfig,
    values: Sequence[float],
    *,
    data_dir: Path,
    device: torch.device,
    trunk: Checkpoints,
    branches: Callable[[int], Checkpoints],
    place: Place,
    report: Report,
) -> None:
    """This process's share of a path, from where its checkpoints say that it stands.

    values: penalty.beta.rest of strengths 1, 2, ...; the other fields of the penalty are the config's, but for the schedule of beta.
    branches: where strength `number` keeps what leads to its network; 0 is the dense one.

    Errors as `Session.train`.
    """
    last = last_state(trunk)
    session = Session(config, data_dir=data_dir, device=device, state=None if last is None else last[1])
    betas = _betas(config, values, session)
    plain, name = replace(config.penalty, beta=PerLayer(0.0)), None if last is None else last[0]
    state = None if last is None else last[1]
    for number in range(len(values) + 1):
        part, branch = path.trunk(config.train, number), path.branch(config.train, number)
        penalty = replace(at_strength(config.penalty, values[number - 1]), beta_schedule=Schedule()) if number else plain
        done = last_state(branches(number))
        if done is not None and done[1]["position"]["epoch"] >= branch.epochs:
            report.trained(number)
            if not _is_beyond(state, part.epochs):  # the trunk's checkpoint of this part is damaged
                state = _trained(session, part, penalty, replace(place, checkpoints=trunk), _with(state, betas[number]), name)
            continue
        if state is not None and state["position"]["epoch"] > part.epochs:
            raise UnreadableError(f"{branches(number).folder} is gone, and the path is beyond it: start a new search")
        report.begun(number)
        state = _trained(session, part, penalty, replace(place, checkpoints=trunk), _with(state, betas[number]), name)
        name = name_of(**state["position"])
        end, its_name = (state, None) if done is None else (done[1], done[0])
        # A copy: the optimizer goes on with the very tensors that it is given.
        free = _with(snapshot(end), dict.fromkeys(end["betas"], 0.0))
        _trained(session, branch, plain, replace(place, checkpoints=branches(number)), free, its_name)
        report.trained(number)


def _is_beyond(state: dict[str, Any] | None, epochs: int) -> bool:
    return state is not None and state["position"]["epoch"] >= epochs


def _with(state: dict[str, Any] | None, betas: dict[str, float] | None) -> dict[str, Any] | None:
    return None if state is None else {**state, **({} if betas is None else {"betas": betas})}


def _trained(
    session: Session, train: TrainConfig, penalty: PenaltyConfig, place: Place, state: dict[str, Any] | None, name: str | None
) -> dict[str, Any]:
    run = session.train(train, penalty, place, None if state is None else (name or "", state))
    kept: dict[str, Any] = snapshot(run.state_dict())
    run.optimizer.detach()
    return kept


def _betas(config: RunConfig, values: Sequence[float], session: Session) -> list[dict[str, float] | None]:
    """Of each strength in absolute units, those that a training of its own with the config's schedule would have; None for the dense one."""
    torch.manual_seed(config.train.seed)  # as `build` does
    _, neurons = build_network(network_arguments(config, session.shapes), image_shape=session.shapes.image)
    steps = len(session.training_data)
    return [
        None,
        *(
            starting_betas(
                at_strength(config.penalty, value), neurons, steps_per_epoch=steps,
                learning_rate=lambda step: config.train.learning_rate_at(step, steps_per_epoch=steps),
            )
            for value in values
        ),
    ]  # fmt: skip
