"""A regularisation path: networks for one strength of the penalty after another, each warm-started from the last. Knows nothing of Ray.

The trunk is one training: without penalty first (the dense solution), then a few epochs with each strength, from weak to strong, at the full
learning rate; what died on the way is removed and stays dead. From the end of each a branch leads to that strength's network: a few epochs
without penalty while the learning rate falls to zero. This is how paths are computed for the lasso (Friedman, Hastie and Tibshirani,
"Regularization paths for generalized linear models via coordinate descent", J. Stat. Softw. 2010), for a problem that is not convex.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_gsl.config import RunConfig
from dist_gsl.penalty import PenaltyConfig, PerLayer, Schedule, starting_betas
from dist_gsl.storage import StorageAwayError
from dist_gsl.training.checkpoint import Checkpoints, name_of, patiently, snapshot
from dist_gsl.training.config import TrainConfig
from dist_gsl.training.session import (
    Place,
    Session,
    UnavailableError,
    last_state,
    network_arguments,
    raise_together,
    warn,
)
from dist_gsl.training.state import build_network, initialise


@dataclass(frozen=True)
class PathConfig:
    """How long each part of a path is, in epochs."""

    step_epochs: int = 3
    """With each strength of the penalty."""
    finish_epochs: int = 4
    """Without penalty, from each strength to its network; the dense network's too, so that it takes the config's epochs in all."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"path: {name} is {value}, must be at least 1")

    def check(self, train: TrainConfig, penalty: PenaltyConfig) -> None:
        """`ValueError` where nothing is left for the dense network, neurons could come back, or the strength is not a path's own."""
        if train.target is not None:
            raise ValueError(f"path: train.target {train.target} steers the strength, which a path goes through; leave one of them out")
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
        return replace(train, epochs=dense + number * self.step_epochs, schedule="constant")

    def num_epochs(self, train: TrainConfig, number: int) -> int:
        """Of a path with so many strengths, all parts together."""
        return train.epochs + number * (self.step_epochs + self.finish_epochs)

    def branch(self, train: TrainConfig, number: int) -> TrainConfig:
        """From there to its network: the learning rate falls along half a cosine."""
        begin = self.trunk(train, number).epochs
        return replace(train, epochs=begin + self.finish_epochs, schedule="cosine", warmup_epochs=float(begin))


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

    begun: Callable[[int, Sequence[dict[str, Any]]], None] = lambda number, history: None
    """A strength's part of the trunk begins, or is gone on with, or its branch; 0 is the dense network. With the records of all epochs that led
    there: who heard of them may have been killed."""
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
    name, state = last_state(trunk) or (None, None)
    session = Session(config, data_dir=data_dir, device=device, state=state)
    betas = _betas(config, values, session)
    plain = replace(config.penalty, beta=PerLayer(0.0))
    place = replace(place, checkpoints=trunk)
    for number in range(len(values) + 1):
        part, branch, kept = path.trunk(config.train, number), path.branch(config.train, number), branches(number)
        done = last_state(kept)
        if done is None and _position(state) > (part.epochs, 0):
            raise UnavailableError(f"{kept.folder} is gone, and the path is beyond it: start a new search")
        if done is None or _position(done[1]) < (branch.epochs, 0):
            report.begun(number, (done[1] if done is not None else state or {}).get("history", ()))
        if _position(state) < (part.epochs, 0):
            penalty = _on(at_strength(config.penalty, values[number - 1])) if number else plain
            state = _trained(session, part, penalty, place, (name, state), betas[number])
            name = name_of(**state["position"])
        if done is None:
            # What the branch goes on from, and goes back to where it diverges. Read again, as an optimizer goes on with the very tensors that
            # it is given.
            assert state is not None
            _keep(kept, state)
            done = last_state(kept)
            assert done is not None
        if _position(done[1]) < (branch.epochs, 0):
            _trained(session, branch, plain, replace(place, checkpoints=kept), done, dict.fromkeys(done[1]["betas"], 0.0))
        del done
        report.trained(number)


def _position(state: dict[str, Any] | None) -> tuple[int, int]:
    return (0, 0) if state is None else (state["position"]["epoch"], state["position"]["step"])


def _on(penalty: PenaltyConfig) -> PenaltyConfig:
    """From the first step to the last."""
    return replace(penalty, beta_schedule=Schedule(), alpha_schedule=Schedule())


def _keep(checkpoints: Checkpoints, state: dict[str, Any]) -> None:
    """Writes a state. `UnavailableError` in every process where that cannot be."""
    problem = None
    if dist.get_rank() == 0:
        try:
            patiently(lambda: checkpoints.write(state), warn)
        except StorageAwayError as error:
            problem = str(error)
    raise_together(problem)


def _trained(
    session: Session,
    train: TrainConfig,
    penalty: PenaltyConfig,
    place: Place,
    start: tuple[str | None, dict[str, Any] | None],
    betas: dict[str, float] | None,
) -> dict[str, Any]:
    """The state at the end; that at the start is emptied."""
    name, state = start
    run = session.train(train, penalty, place, None if name is None or state is None else (name, state), betas=betas)
    kept: dict[str, Any] = snapshot(run.state_dict())
    run.optimizer.detach()
    del run
    gc.collect()
    if session.device.type == "cuda":
        torch.cuda.empty_cache()
    return kept


def _betas(config: RunConfig, values: Sequence[float], session: Session) -> list[dict[str, float] | None]:
    """Of each strength in absolute units, those that a training of its own with the config's schedule would have; None for the dense one."""
    torch.manual_seed(config.train.seed)  # as `build` does
    model, neurons = build_network(network_arguments(config, session.shapes), image_shape=session.shapes.image)
    if config.train.init is not None:
        initialise(model, neurons, config.train.init)
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
