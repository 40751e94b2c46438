"""Which point of a space to try next: a pure function of the seed and of what is known so far.

Nothing is kept between two calls, so that a search that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_gsl.tuning.space import Choice, Float, Int, Space, active, draw, grid

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SEARCHERS = ("optuna", "random", "grid")


@dataclass(frozen=True)
class Known:
    """A point that was tried, or is being tried."""

    params: dict[str, Any]
    objectives: tuple[float, float] | None
    """(quality, cost); None while it runs."""


def suggest(
    space: Space, *, searcher: str, seed: int, number: int, known: Sequence[Known]
) -> dict[str, Any] | None:
    """The parameters of trial `number`, counted from 0; None where a grid has no such point.

    "random": independent draws. "grid": every point, in order. "optuna": its tree-structured Parzen estimator for two
    objectives, quality up and cost down (Ozaki et al., "Multiobjective tree-structured Parzen estimator", JAIR 2022),
    after a few random points; points that still run count as bad ones, so that it does not try them twice, and so do
    points with less than half of the best accuracy: a network without neurons is never dominated, and never wanted.
    """
    if searcher == "grid":
        points = grid(space)
        return points[number] if number < len(points) else None
    if searcher == "random":
        return draw(space, random.Random(f"{seed}/{number}"))
    return _ask_optuna(space, seed=seed, number=number, known=known)


def num_random_first(num_fields: int) -> int:
    """Random points before a model of the space is worth anything: about one for each field, 4 to 10."""
    return min(10, max(4, num_fields))


def useful_quality(known: Sequence[Known]) -> float:
    """Half of the best accuracy; for other qualities, which are negative errors, no bound."""
    best = max((entry.objectives[0] for entry in known if entry.objectives is not None), default=0.0)
    return best / 2 if best > 0 else -1e300


def _ask_optuna(space: Space, *, seed: int, number: int, known: Sequence[Known]) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    num_done = sum(entry.objectives is not None for entry in known)
    if num_done < num_random_first(len(space)):
        return draw(space, random.Random(f"{seed}/{number}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=random.Random(f"{seed}/{number}").getrandbits(32), n_startup_trials=0, multivariate=True, group=True,
            constant_liar=True,
        )  # fmt: skip
    floor = useful_quality(known)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for entry in known:
        domains = {field: _distribution(domain) for field, domain in active(space, entry.params)}
        state = optuna.trial.TrialState.RUNNING if entry.objectives is None else optuna.trial.TrialState.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                state=state, params={field: entry.params[field] for field in domains}, distributions=domains,
                values=entry.objectives,
                constraints=None if entry.objectives is None else {"useful": floor - entry.objectives[0]},
            )
        )  # fmt: skip
    trial = study.ask()
    params: dict[str, Any] = {}
    for field, domain in active(space, params):
        if isinstance(domain, Choice):
            params[field] = trial.suggest_categorical(field, domain.options)
        elif isinstance(domain, Int):
            params[field] = trial.suggest_int(field, domain.low, domain.high, log=domain.log, step=domain.step or 1)
        else:
            params[field] = trial.suggest_float(field, domain.low, domain.high, log=domain.log, step=domain.step)
    return params


def _distribution(domain: Float | Int | Choice) -> BaseDistribution:
    import optuna.distributions as kinds

    if isinstance(domain, Choice):
        return kinds.CategoricalDistribution(domain.options)
    if isinstance(domain, Int):
        return kinds.IntDistribution(domain.low, domain.high, log=domain.log, step=domain.step or 1)
    return kinds.FloatDistribution(domain.low, domain.high, log=domain.log, step=domain.step)
