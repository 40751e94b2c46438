"""A search whose trials are the points of one path: one training for all of them (see `training.path`), told to the search's files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dist_gsl import launch, report, runs
from dist_gsl.config import RunConfig
from dist_gsl.launch import Listener, Resources
from dist_gsl.neurons import Neurons
from dist_gsl.penalty import starting_betas
from dist_gsl.report import NeuronLog
from dist_gsl.runs import NEURON_LOG, Trained
from dist_gsl.training.path import at_strength, strengths
from dist_gsl.tuning.records import SearchSettings, TrialRecord
from dist_gsl.tuning.space import Float, Space

if TYPE_CHECKING:
    from dist_gsl.tuning.driver import Conductor

FIELD = "penalty.beta.rest"
"""What rises along a path."""


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
        return replace(base, penalty=base.penalty.without())
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
    with ThreadPoolExecutor(1, "reports") as reports:
        told = _Points(conductor, points, reports)
        try:
            launch.follow(
                settings.base, settings.path, points, folder=folder.path, file=folder.settings_file.name,
                branches=[folder.trial(number) for number in conductor.numbers], resources=resources, listener=told,
            )  # fmt: skip
        except KeyboardInterrupt:
            reports.shutdown(cancel_futures=True)
            raise
    for made in told.made:
        made.result()


class _Points(Listener):
    """Makes trials of what a path tells."""

    def __init__(self, conductor: Conductor, points: Sequence[float], reports: Executor) -> None:
        self.conductor, self.points, self.reports = conductor, points, reports
        self.record: TrialRecord | None = None
        self.log = NeuronLog()
        self.made: list[Future[None]] = []
        self.trained: set[int] = set()

    def told(self, kind: str, number: int) -> None:
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
            self.made.append(self.reports.submit(self._finish, record))  # here, a signal would not be heard until it is made
        else:
            self.record = record

    def _finish(self, record: TrialRecord) -> None:
        folder = self.conductor.folder.trial(record.number)
        history = folder.state()["history"]
        # An interrupted search may have trained what it had no time to tell.
        for epoch in history[self._first(record) :]:
            if not record.curve or epoch["epoch"] > record.curve[-1].epoch:
                self.conductor.result(record.number, "epoch", epoch)
        try:
            made, _ = runs.make_report(Trained.load(folder), baseline=None, run_time=False, command=shlex.join(self.conductor.command))
        except (RuntimeError, ValueError) as error:  # of this point alone; the path goes on
            self.conductor.result(record.number, "failed", " ".join(str(error).split()))
            return
        report.write(made, folder.path)
        self.conductor.result(record.number, "finished", {"summary": runs.summary(made), "latency_ms": None})

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

    def note(self, text: str) -> None:
        if self.record is not None:
            self.conductor.display.note(self.record, text)

    def warning(self, text: str) -> None:
        if self.record is not None:
            self.conductor.display.warning(self.record, text)
