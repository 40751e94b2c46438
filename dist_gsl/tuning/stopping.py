"""When a trial has no hope left: its layer collapsed, or wherever it may still get to is dominated by far.

Standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """A trial after an epoch."""

    epoch: int
    quality: float
    """Validation accuracy in percent (for a regression minus its root mean square error)."""
    alive: float
    """Alive neurons, percent of the starting network."""


@dataclass(frozen=True)
class StoppingConfig:
    """How sure one must be."""

    min_finished: int = 3
    """Finished trials to compare with; before, none is stopped for being dominated."""
    min_epochs: int = 2
    """Epochs that every trial gets."""
    margin_quality: float = 0.02
    """How much better the other must be, as a share of the spread of quality among finished trials."""
    margin_alive: float = 2.0
    """How many fewer neurons, in percent of the starting network, the other must have alive."""


def collapsed(alive: Mapping[str, int], *, neurons: Mapping[str, int], min_alive: int) -> str | None:
    """The first layer that has no more neurons than `min_alive` forces it to keep, of several; None if there is none."""
    return next(
        (name for name, left in alive.items() if left <= min_alive and neurons[name] > max(min_alive, 1) + 1), None
    )


def hopeless(
    curve: Sequence[Moment], finished: Sequence[Sequence[Moment]], *, penalty_is_over: bool, config: StoppingConfig
) -> str | None:
    """Why a trial may be stopped, in words; None while it may still be worth its time.

    What it may still get to is bounded by what the finished trials made of the same epoch: it may gain as much quality
    as the one that gained most from there to its end, and lose as many neurons as the one that lost most (none any
    more once its penalty is over, as the dead stay dead). Only if a finished trial dominates that best case by the
    margins, in quality and in neurons, is there no hope.
    """
    if len(finished) < config.min_finished or not curve or curve[-1].epoch < config.min_epochs:
        return None
    now = curve[-1]
    gains, losses = [0.0], [0.0]
    for other in finished:
        at = next((moment for moment in other if moment.epoch == now.epoch), None)
        if at is not None:
            gains.append(other[-1].quality - at.quality)
            losses.append(at.alive - other[-1].alive)
    best_quality = now.quality + max(gains)
    fewest_alive = now.alive - (0.0 if penalty_is_over else max(losses))
    ends = [other[-1] for other in finished]
    spread = max(end.quality for end in ends) - min(end.quality for end in ends)
    for end in ends:
        if (
            end.quality >= best_quality + config.margin_quality * spread
            and end.quality > best_quality
            and end.alive <= fewest_alive - config.margin_alive
        ):
            return (
                f"dominated: at best {best_quality:.2f} with {fewest_alive:.1f} % of the neurons alive; "
                f"another trial has {end.quality:.2f} with {end.alive:.1f} %"
            )
    return None
