"""What all processes of a training must decide together: that it ends early, that it diverged, that its state is kept. Imports torch alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
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
"""A loss so many times that of a network that has learned nothing is one that may not come back."""
LOOKS = 3
"""Looks in a row after which it will not: a large step at the beginning makes peaks that pass."""


class CommonError(RuntimeError):
    """Raised by every process of a training, at the same step. Trying again would end the same way."""


class DivergedError(CommonError):
    """The loss is not finite, or stays many times that of a network that has learned nothing."""

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
        self._num_high = 0
        """Looks in a row at which the loss was too high; the same in all processes."""

    def begin_epoch(self, totals: Tensor) -> None:
        """`totals`: loss, correct answers and samples of this process so far."""
        self._next, self._looked_step = 1, 0
        self._looked_at, self._before = time.monotonic(), totals.cpu().clone()

    def after_step(self, state: RunState, totals: Tensor, *, steps_done: int, step: int, is_last: bool) -> None:
        """steps_done: since the epoch began or was gone on with; step: over the whole run. `DivergedError`, `StoppedError`."""
        every = self._config.checkpoint_steps
        is_asked = every is not None and step % every == 0
        if not is_last and steps_done < self._next and not is_asked:
            return
        request, is_due = self._look(state, totals, steps_done)
        if request or ((is_due or is_asked) and not is_last):  # at the epoch's end the state is kept anyway, when it is evaluated
            self.save(state, totals, at_once=request > Request.NONE)
        if request is Request.STOP:
            raise StoppedError

    def end_epoch(self, state: RunState) -> None:
        """After the epoch's evaluation: its state is kept, whatever the intervals. `DivergedError`, `StoppedError`."""
        state.totals = None  # the epoch's are over, kept or not
        if self._num_high and state.position.epoch >= self._config.epochs:
            raise DivergedError.at(state.position, HIGH)
        request = Request(int(self._together([self._outside.request()], state)[0]))
        self.save(state, None, at_once=request > Request.NONE)
        if request is Request.STOP:
            raise StoppedError

    def save(self, state: RunState, totals: Tensor | None, *, at_once: bool = False) -> None:
        """`DivergedError` where a parameter is not finite. Neither such a state nor one of a loss that is too high is one to go back to."""
        if self._num_high:
            return
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
        seconds_a_step = (now - self._looked_at) / max(1, steps_done - self._looked_step)
        minutes = self._config.checkpoint_minutes
        is_due = minutes is not None and now - self._saved_at >= 60 * minutes
        request, due, pause, loss, samples = self._together(
            [
                int(self._outside.request()),
                float(self._is_first and is_due),
                min(1000.0, max(1.0, LOOK_S // max(seconds_a_step, 1e-6))) if self._is_first else 0.0,
            ],
            state,
            [loss, samples],
        )
        mean = loss / max(samples, 1.0)
        if not math.isfinite(mean):
            raise DivergedError.at(state.position, "the loss is not finite")
        if state.first_loss is None:
            state.first_loss = mean
        is_high = mean > EXPLODED * max(state.first_loss, state.uninformed_loss or 0.0)
        self._num_high = self._num_high + 1 if is_high else 0
        if self._num_high >= LOOKS:
            raise DivergedError.at(state.position, HIGH)
        self._looked_at, self._looked_step, self._before = now, steps_done, sums.clone()
        self._next = steps_done + (1 if is_high else int(pause))
        return Request(int(request)), bool(due)

    @staticmethod
    def _together(largest: list[float], state: RunState, added: Sequence[float] = ()) -> list[float]:
        """The largest of all processes' values, then sums over all of them."""
        device = next(state.model.parameters()).device
        mine = torch.tensor([*largest, *added], dtype=torch.float64, device=device)
        of_all = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(of_all, mine)
        found, n = torch.stack(of_all), len(largest)
        return [*found[:, :n].amax(0).tolist(), *found[:, n:].sum(0).tolist()]


HIGH = f"the loss stays more than {EXPLODED:g} times that of a network that has learned nothing"


def is_finite(model: nn.Module) -> bool:
    """Are all parameters?"""
    norms = torch._foreach_norm([p.detach() for p in model.parameters() if p.numel()], math.inf)
    return bool(torch.isfinite(torch.stack(norms)).all())
