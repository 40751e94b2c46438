"""A search whose trials are the points of one path: one training for all of them (see `training.path`), told to the search's files."""

from __future__ import annotations

import queue
import shlex
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dist_gsl import launch, report, runs
from dist_gsl.config import RunConfig
from dist_gsl.events import Listener
from dist_gsl.launch import Resources
from dist_gsl.neurons import Neurons
from dist_gsl.penalty import starting_betas
from dist_gsl.report import NeuronLog, Report
from dist_gsl.runs import NEURON_LOG, Trained
from dist_gsl.training.checkpoint import patiently
from dist_gsl.training.path import at_strength, strengths
from dist_gsl.tuning.records import SearchSettings, TrialRecord
from dist_gsl.tuning.space import Float, Space

if TYPE_CHECKING:
    from dist_gsl.tuning.driver import Conductor

FIELD = "penalty.beta.rest"
"""What rises along a path."""
LEAVE_S = 3.0
"""How long a search that ends waits for a report that is being made."""


def values(settings: SearchSettings, space: Space) -> list[float]:
    """FIELD at each point, from weak to strong. `ValueError` where the space or the settings make no path."""
    assert settings.path is not None
    domain = space.get(FIELD)
    if not isinstance(domain, Float) or domain.low <= 0:
        raise ValueError(f"--path: the space has no range of {FIELD} above 0 to go along; give it one, such as Float(0.4, 4.0)")
    if not settings.baseline or settings.num_trials < 2:
        raise ValueError("--path: it begins with the dense network, which is the baseline: leave out --no-baseline, and give --trials at least 2")
    if settings.objective != "neurons":
        raise ValueError("--path: run time is not measured beside a training; leave out --objective, and choose with --max-latency-ms afterwards")
    settings.path.check(settings.base.train, settings.base.penalty)
    return strengths(settings.base.penalty, domain.low, domain.high, settings.num_trials - 1)


def config_of(settings: SearchSettings, record: TrialRecord) -> RunConfig:
    """The config of a point: what a training of its own would have, for the epochs that led to it."""
    base = settings.base
    assert settings.path is not None
    if record.is_baseline:
        return base.without_penalty()
    epochs = settings.path.branch(base.train, record.number).epochs
    return replace(base, penalty=at_strength(base.penalty, record.params[FIELD]), train=replace(base.train, epochs=epochs))


def check_strengths(settings: SearchSettings, points: Sequence[float], neurons: Neurons) -> None:
    """`ValueError` where one has no beta in absolute units, as one that needs more epochs than there are."""
    train = settings.base.train
    for value in points:
        starting_betas(
            at_strength(settings.base.penalty, value), neurons, steps_per_epoch=100,
            learning_rate=lambda step: train.learning_rate_at(step, steps_per_epoch=100),
        )  # fmt: skip


def follow(conductor: Conductor, resources: Resources, points: Sequence[float]) -> None:
    """Trains every point that is not done. Their reports are made beside the training."""
    settings, folder = conductor.settings, conductor.folder
    assert settings.path is not None
    if not conductor.remaining:
        return
    reports = _Reports()
    try:
        launch.follow(
            settings.base, settings.path, points, folder=folder.path, file=folder.settings_file.name,
            branches=[folder.trial(number) for number in conductor.numbers], resources=resources, listener=_Points(conductor, points, reports),
        )  # fmt: skip
        reports.finish()
    finally:
        reports.leave()


class _Reports:
    """Makes reports beside the training. One that is being made when the search is to end is left: it is made when that goes on."""

    def __init__(self) -> None:
        self.is_left = False
        self._problem: BaseException | None = None
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        # Not of a pool, whose threads a program waits for when it ends.
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
        self._thread.start()

    def add(self, job: Callable[[], object]) -> None:
        self._jobs.put(job)

    def finish(self) -> None:
        """Waits for all. Raises what one of them raised."""
        self._jobs.put(None)
        while self._thread.is_alive():  # a wait without an end hears no Ctrl-C
            self._thread.join(0.5)
        if self._problem is not None:
            raise self._problem

    def leave(self) -> None:
        self.is_left = True
        self._jobs.put(None)
        self._thread.join(LEAVE_S)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self.is_left:
            try:
                job()
            except BaseException as error:
                if not self.is_left:  # then nobody is there to take it
                    self._problem = self._problem or error


class _Points(Listener):
    """Makes trials of what a path tells."""

    def __init__(self, conductor: Conductor, points: Sequence[float], reports: _Reports) -> None:
        self.conductor, self.points, self.reports = conductor, points, reports
        self.record: TrialRecord | None = None
        self.log = NeuronLog()
        self.trained: set[int] = set()

    def told(self, kind: str, number: int, history: Sequence[dict[str, Any]]) -> None:
        conductor = self.conductor
        record = conductor.records.get(number) or TrialRecord(
            number, {FIELD: self.points[number - 1]} if number else {}, is_baseline=number == 0
        )
        self.record = None
        if record.is_done or number in self.trained:  # told again by workers that were replaced
            return
        if number not in conductor.trackers:
            conductor.start(record)
            file = conductor.folder.trial(number).path / NEURON_LOG
            self.log = NeuronLog.read(file) if file.exists() else NeuronLog()
        if kind == "trained":
            self.trained.add(number)
            self.reports.add(partial(self._finish, record, self.log))  # here, a signal would not be heard until it is made
        else:
            self._tell_missing(record, history, partial(conductor.result, number))
            self.record = record

    def _finish(self, record: TrialRecord, log: NeuronLog) -> None:
        folder = self.conductor.folder.trial(record.number)

        def warn(text: str) -> None:
            self.conductor.display.warning(record, text)

        def tell(kind: str, content: Any) -> None:
            if not self.reports.is_left:
                self.conductor.result(record.number, kind, content)

        self._tell_missing(record, patiently(folder.state, warn)["history"], tell)

        def reported() -> Report:
            if log.records:  # what was trained before this start has its log
                log.write(folder.path / NEURON_LOG)
            made, _ = runs.make_report(Trained.load(folder), baseline=None, run_time=False, command=shlex.join(self.conductor.command))
            report.write(made, folder.path)
            return made

        try:
            made = patiently(reported, warn)
        except (RuntimeError, ValueError) as error:  # of this point alone; the path goes on
            tell("failed", " ".join(str(error).split()))
            return
        tell("finished", {"summary": runs.summary(made), "latency_ms": None})

    def _tell_missing(self, record: TrialRecord, history: Sequence[dict[str, Any]], tell: Callable[[str, Any], object]) -> None:
        """An interrupted search may have trained what it had no time to tell."""
        for epoch in history[self._first(record) :]:
            if not record.curve or epoch["epoch"] > record.curve[-1].epoch:
                tell("epoch", epoch)

    def _first(self, record: TrialRecord) -> int:
        """Epochs of the record's lineage that belong to points before it."""
        settings = self.conductor.settings
        assert settings.path is not None
        return settings.path.trunk(settings.base.train, record.number - 1).epochs if record.number else 0

    def epoch(self, record: dict[str, Any], norms: dict[str, Any], masks: dict[str, Any]) -> None:
        if self.record is None:
            return
        self.log.append(record["epoch"], norms, masks)
        try:
            self.log.write(self.conductor.folder.trial(self.record.number).path / NEURON_LOG)
        except OSError as error:  # what is told here is kept until the next time
            self.warning(f"{error}; it is written again after the next epoch")
        self.conductor.result(self.record.number, "epoch", record)

    def back(self, epoch: int) -> None:
        if self.record is not None:
            self.conductor.result(self.record.number, "back", epoch)

    def note(self, text: str) -> None:
        self.conductor.display.note(self.record, text)

    def warning(self, text: str) -> None:
        self.conductor.display.warning(self.record, text)
