"""Progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dist_gsl.events import Listener

if TYPE_CHECKING:
    from dist_gsl.tuning.records import TrialRecord


LINE_EVERY_S = 30.0
"""Where there is no bar, a job's log say, work that takes longer than this tells of its steps."""


class Display(Listener):
    """Shows a training: one line an epoch everywhere, and for its steps a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console, *, title: str, num_epochs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.title, self.num_epochs, self.clock = console, title, num_epochs, clock
        self._told_at = clock()
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[detail]}"),
                TimeRemainingColumn(), console=console, transient=True,
            )  # fmt: skip

    def __enter__(self) -> Display:
        if self._bars is not None:
            self._bars.start()
            self._task = self._bars.add_task(self.title, total=None, detail="starting workers")
        else:
            self.console.print(f"{self.title}: starting workers", highlight=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def progress(self, epoch: int, step: int, num_steps: int, loss: float, images_per_second: float) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(
                self._task,
                total=num_steps * self.num_epochs,
                completed=epoch * num_steps + step,
                detail=f"epoch {epoch + 1}  loss {loss:.3f}  {images_per_second:,.0f} images/s",
            )
        elif self.clock() - self._told_at >= LINE_EVERY_S:
            self._told_at = self.clock()
            self.console.print(
                f"{self.title}: epoch {epoch + 1:>2}/{self.num_epochs}  step {step:,}/{num_steps:,}  loss {loss:.3f}"
                f"  {images_per_second:,.0f} images/s", highlight=False,
            )  # fmt: skip

    def epoch(self, record: dict[str, Any], norms: dict[str, Any], masks: dict[str, Any]) -> None:
        self._told_at = self.clock()
        self.console.print(
            f"{self.title}: epoch {record['epoch']:>2}/{self.num_epochs}  loss {record['train_loss']:.3f}  validation {_quality(record)}"
            f"  neurons removed {record['all_neurons']:.1f} %  {record['images_per_second']:,.0f} images/s",
            highlight=False,
        )

    def note(self, text: str) -> None:
        self.console.print(f"{self.title}: {text}", highlight=False)

    def warning(self, text: str) -> None:
        self.console.print(f"{self.title}: warning: {text}", highlight=False)


class SearchDisplay:
    """Shows a search: a bar over all epochs of all trials on a terminal, a line for whatever happens everywhere."""

    def __init__(self, console: Console, *, title: str, num_trials: int, num_epochs: float, what: str = "") -> None:
        """num_epochs: of a trial, their mean where they differ; what: they are, where that is not so many trials of so many epochs."""
        self.console, self.title, self.num_trials, self.num_epochs = console, title, num_trials, num_epochs
        self.what = what or f"{num_trials} trials of {num_epochs:g} epochs"
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._num_done = 0
        self._epochs: dict[int, int] = {}
        """Epochs done of the trials that run."""

    def begin(self, *, num_done: int, num_interrupted: int) -> None:
        self._num_done = num_done
        before = f", {num_done} done before, {num_interrupted} to go on with" if num_done or num_interrupted else ""
        self._say(f"{self.what}{before}")
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
                TimeRemainingColumn(), console=self.console, transient=True,
            )  # fmt: skip
            self._bars.start()
            self._task = self._bars.add_task(self.title, total=self.num_trials * self.num_epochs)
        self._move()

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def started(self, trial: TrialRecord) -> None:
        chosen = ", ".join(f"{name}={_brief(value)}" for name, value in trial.params.items())
        again = f", goes on after epoch {trial.curve[-1].epoch}" if trial.curve else ""
        self._say(f"trial {trial.number}: {'without penalty' if trial.is_baseline else chosen}{again}")

    def epoch(self, trial: TrialRecord, record: dict[str, Any], *, num_epochs: int) -> None:
        self._epochs[trial.number] = len(trial.curve)
        self._say(
            f"trial {trial.number}: epoch {record['epoch']:>2}/{num_epochs}  {_quality(record)}"
            f"  neurons removed {record['all_neurons']:.1f} %"
        )
        self._move()

    def ended(self, trial: TrialRecord) -> None:
        self._epochs.pop(trial.number, None)
        self._num_done += 1
        self._say(f"trial {trial.number}: {trial.status.value}" + (f": {trial.reason}" if trial.reason else ""))
        self._move()

    def note(self, trial: TrialRecord | None, text: str) -> None:
        """None: of no trial alone."""
        self._say(text if trial is None else f"trial {trial.number}: {text}")

    def warning(self, trial: TrialRecord | None, text: str) -> None:
        self.note(trial, f"warning: {text}")

    def _say(self, text: str) -> None:
        self.console.print(f"{self.title}: {text}", highlight=False)

    def _move(self) -> None:
        if self._bars is not None and self._task is not None:
            done = self._num_done * self.num_epochs + sum(self._epochs.values())
            self._bars.update(self._task, completed=done)


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _quality(record: dict[str, Any]) -> str:
    return f"top-1 {record['val_top1']:.2f} %" if "val_top1" in record else f"rmse {record['val_rmse']:.4f}"


class _Rate(ProgressColumn):
    """So many a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s", style="progress.data.speed")


@dataclass
class _Lines:
    """What was told of some work: when it began, how much was done then, and when the last line came."""

    began_at: float
    first: int
    told_at: float


class Steps:
    """Progress of work that counts: `with Steps(console) as steps: steps(what, done, total)`; a bar on a terminal, a
    line at the start and one now and then elsewhere."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, _Lines] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self.console.is_terminal:
            now = self.clock()
            if what not in self._lines:
                self._lines[what] = _Lines(now, done, now)
                self.console.print(f"{what}: {total:,}", highlight=False)
            lines = self._lines[what]
            if now - lines.told_at >= LINE_EVERY_S and done > lines.first:
                lines.told_at = now
                rate = (done - lines.first) / (now - lines.began_at)
                left = timedelta(seconds=round((total - done) / rate))
                self.console.print(f"{what}: {done:,} of {total:,}, {rate:,.0f}/s, {left} left", highlight=False)
            return
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
