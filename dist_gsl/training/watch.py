"""What all processes of a training must decide together: that it ends early, that it diverged, that its state is kept. Imports torch alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from dist_gsl.training.config import TrainConfig
    from dist_gsl.training.state import Position, RunState

LOOK_S = 1.0
"""Seconds between two looks, about: at each all processes come together for a moment."""
EXPLODED = 10.0
"""A loss so many times that of the run's first steps is one that will not come back."""


class DivergedError(RuntimeError):
    """The loss is not finite, or many times what it was at first. Every process raises it at the same step."""

    @classmethod
    def at(cls, position: Position, what: str) -> DivergedError:
        place = f"epoch {position.epoch + 1}, step {position.step}" if position.step else f"epoch {position.epoch}"
        return cls(
            f"{what} in {place}; lower train.learning_rate, set train.max_grad_norm, or go on by --resume --train.on-divergence back, which "
            "returns to the last checkpoint and halves the learning rate"
        )


class StoppedError(Exception):
    """Somebody asked the training to end. Its state is kept; every process raises it at the same step."""


class Request(IntEnum):
    """What a process hears from outside. The strongest of all processes counts."""

    NONE = 0
    SAVE = 1
    """Keep the state at once: this machine may be taken away."""
    STOP = 2
    """Keep the state and end."""


@dataclass
class Outside:
    """Who a training talks to; each field may be left as it is."""

    request: Callable[[], Request] = lambda: Request.NONE
    """Asked about once a second, in every process."""
    save: Callable[[dict[str, Any], bool], None] | None = None
    """Takes the state that is to be kept; True: wait until it is. Called in the first process alone."""


class Watch:
    """Called by every process after every step of an epoch and at its end.

    Steps are few in a slow training and many in a fast one; how many lie between two looks is what the first process measures.
    """

    def __init__(self, config: TrainConfig, outside: Outside) -> None:
        self._config, self._outside = config, outside
        self._is_first = dist.get_rank() == 0
        self._saved_at = self._looked_at = time.monotonic()
        self._next, self._looked_step = 1, 0
        self._before = torch.zeros(3, dtype=torch.float64)

    def begin_epoch(self, totals: Tensor) -> None:
        """`totals`: loss, correct answers and samples of this process so far."""
        self._next, self._looked_step = 1, 0
        self._looked_at, self._before = time.monotonic(), totals.cpu().clone()

    def after_step(self, state: RunState, totals: Tensor, *, steps_done: int, step: int, is_last: bool) -> None:
        """steps_done: since the epoch began or was gone on with; step: over the whole run. `DivergedError`, `StoppedError`."""
        request, is_due = Request.NONE, False
        if steps_done >= self._next and not is_last:
            request, is_due = self._look(state, totals, steps_done)
        every = self._config.checkpoint_steps
        if not is_last and (request or is_due or (every is not None and step % every == 0)):
            self.save(state, totals, at_once=request > Request.NONE)
        if request is Request.STOP:
            raise StoppedError

    def end_epoch(self, state: RunState) -> None:
        """After the epoch's evaluation: its state is always kept."""
        request = Request(int(self._largest([int(self._outside.request())], state)[0]))
        self.save(state, None, at_once=request > Request.NONE)
        if request is Request.STOP:
            raise StoppedError

    def save(self, state: RunState, totals: Tensor | None, *, at_once: bool = False) -> None:
        """`DivergedError` where a parameter is not finite: such a state is none to go back to."""
        mine = torch.zeros(4, dtype=torch.float64, device=next(state.model.parameters()).device)
        mine[0] = float(not is_finite(state.model))
        if totals is not None:
            mine[1:] = totals
        of_all = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(of_all, mine)
        if any(bool(each[0]) for each in of_all):
            raise DivergedError.at(state.position, "a parameter is not finite")
        state.totals = None if totals is None else [each[1:].tolist() for each in of_all]
        self._saved_at = time.monotonic()
        if self._is_first and self._outside.save is not None:
            self._outside.save(state.state_dict(), at_once)

    def _look(self, state: RunState, totals: Tensor, steps_done: int) -> tuple[Request, bool]:
        now, sums = time.monotonic(), totals.cpu()
        loss, _, samples = (sums - self._before).tolist()
        mean = loss / max(samples, 1.0)
        first = state.first_loss
        seconds_a_step = (now - self._looked_at) / max(1, steps_done - self._looked_step)
        minutes = self._config.checkpoint_minutes
        is_due = minutes is not None and now - self._saved_at >= 60 * minutes
        request, has_diverged, highest, due, pause = self._largest(
            [
                int(self._outside.request()),
                float(not math.isfinite(mean) or (first is not None and mean > EXPLODED * first)),
                mean if math.isfinite(mean) else 0.0,
                float(self._is_first and is_due),
                min(1000.0, max(1.0, LOOK_S // max(seconds_a_step, 1e-6))) if self._is_first else 0.0,
            ],
            state,
        )
        if has_diverged:
            why = "not finite" if first is None or not highest > EXPLODED * first else f"more than {EXPLODED:g} times that of the first steps"
            raise DivergedError.at(state.position, f"the loss is {why}")
        if first is None:
            state.first_loss = highest
        self._looked_at, self._looked_step, self._before = now, steps_done, sums.clone()
        self._next = steps_done + int(pause)
        return Request(int(request)), bool(due)

    @staticmethod
    def _largest(values: list[float], state: RunState) -> list[float]:
        """Of all processes' values."""
        device = next(state.model.parameters()).device
        found = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [float(value) for value in found]


def is_finite(model: nn.Module) -> bool:
    """Are all parameters?"""
    norms = torch._foreach_norm([p.detach() for p in model.parameters() if p.numel()], math.inf)
    return bool(torch.isfinite(torch.stack(norms)).all())
