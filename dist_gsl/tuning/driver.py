"""A search from space to front: Ray Tune runs the trials, the files of the search are the truth, MLflow is told.

Everything is written by this one process; trials send it what they learn.
"""

from __future__ import annotations

import math
import shlex
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from dist_gsl import launch, storage, tracking
from dist_gsl.config import RunConfig
from dist_gsl.display import SearchDisplay, Steps
from dist_gsl.runs import NEURON_LOG, check_plain_name
from dist_gsl.tracking import Tracker
from dist_gsl.training.checkpoint import PATIENCE_S, patiently
from dist_gsl.tuning import paths, results, stopping
from dist_gsl.tuning import space as spaces
from dist_gsl.tuning.records import SearchFolder, SearchSettings, Status, TrialRecord, described, known_points
from dist_gsl.tuning.searchers import suggest
from dist_gsl.tuning.space import Space
from dist_gsl.tuning.stopping import Moment
from dist_gsl.tuning.trial import TOLD, quiet, run_trial

RETRIES = 2
"""Times a trial whose own process was lost is begun again, each time going on from its last checkpoint."""


def search(
    settings: SearchSettings,
    space: Space,
    *,
    name: str,
    runs_dir: Path,
    console: Console,
    command: Sequence[str] = (),
    resume: bool = False,
    track: bool = True,
    max_concurrent: int | None = None,
) -> SearchFolder:
    """Runs trials until `settings.num_trials` are done; finished ones of an earlier start are kept.

    `ValueError` for what the user gave, before anything is started or written.
    """
    check_plain_name(name)
    if (uri := storage.remote_of(runs_dir.absolute())) is not None:
        raise ValueError(
            f"tune: the records of a search need a folder that all nodes share, and {uri} is a URI: give --runs a path, such "
            "as one on NFS"
        )
    folder = SearchFolder(runs_dir.absolute() / name)
    spaces.check(space, settings.base)
    if max_concurrent is not None and max_concurrent < 1:
        raise ValueError(f"--max-concurrent is {max_concurrent}, must be at least 1")
    if settings.searcher == "grid":
        in_all = len(spaces.grid(space)) + settings.baseline
        settings = replace(settings, num_trials=min(settings.num_trials, in_all))
    given = settings.base
    base = launch.settled(given)
    settings = replace(settings, base=base, space=described(space))
    points = [] if settings.path is None else paths.values(settings, space)
    _check_folder(folder, settings, resume=resume)
    with launch.connected(base.workers):
        with Steps(console) as steps:
            neurons = launch.prepare(given, progress=steps)
        paths.check_strengths(settings, points, neurons)
        widths = {layer.name: layer.num_neurons for layer in neurons}
        spaces.check(space, base, layers=list(widths), num_draws=0)
        with folder.locked(), launch.ray_cluster(base.workers, dashboard=True) as resources:
            if track:
                tracking.check_owner(runs_dir, may_move=launch.is_job() and resources.num_nodes > 1)
            conductor = Conductor(folder, settings, space, widths, runs_dir, command, console, track)
            conductor.begin()
            status = tracking.Status.FAILED
            try:
                if settings.path is not None:
                    paths.follow(conductor, resources, points)
                elif conductor.remaining:
                    concurrent = min(resources.num_concurrent, max_concurrent or resources.num_concurrent)
                    if settings.objective == "latency":  # run time is not measured beside other trainings
                        concurrent = 1
                    _run_tune(conductor, gpu=resources.gpu, max_concurrent=concurrent)
                status = tracking.Status.FINISHED
            except KeyboardInterrupt:
                status = tracking.Status.KILLED
                raise
            finally:
                conductor.end(status)
    return folder


FREE = ("workers.", "train.checkpoint_", "train.on_divergence", "train.shrink")
"""Fields that may change when a search is gone on with: no number that training computes depends on them, but by rounding."""


def _check_folder(folder: SearchFolder, settings: SearchSettings, *, resume: bool) -> None:
    if not folder.settings_file.exists():
        if folder.path.exists() and any(path.name != ".lock" for path in folder.path.iterdir()):
            raise ValueError(f"{folder.path} exists and is no search; choose another --name")
        if resume:
            raise ValueError(
                f"--resume: there is no search {folder.name!r} in {folder.path.parent}; leave --resume out"
            )
        return
    if not resume:
        raise ValueError(f"search {folder.name!r} exists: choose another --name, or go on with it by --resume")
    before, now = folder.settings(), settings
    pairs = [
        *((f"the space's {key}", before.space.get(key), now.space.get(key)) for key in {**before.space, **now.space}),
        *(
            (f"--{key}", getattr(before, key), getattr(now, key))
            for key in ("searcher", "objective", "seed", "baseline", "path", *(["num_trials"] if now.path is not None else []))
        ),
        ("early stopping", before.stopping, now.stopping),
        *((key, before.base.flat().get(key), value) for key, value in now.base.flat().items() if not key.startswith(FREE)),
    ]
    for what, old, new in pairs:
        if old != new:
            raise ValueError(
                f"--resume: {what} is {new}, but search {folder.name!r} was begun with {old}; "
                "leave it as it was, or start a new --name"
            )


class Conductor:
    """Decides what is tried next and what is stopped, and writes down what comes of it."""

    def __init__(
        self, folder: SearchFolder, settings: SearchSettings, space: Space, widths: dict[str, int],
        runs_dir: Path, command: Sequence[str], console: Console, track: bool,
    ) -> None:  # fmt: skip
        self.folder, self.settings, self.space = folder, settings, space
        self.runs_dir, self.command, self.track = runs_dir, list(command), track
        self.widths = widths
        self.records = folder.records()
        # Trials of an earlier start with more of them are not left half done.
        self.numbers = range(max([settings.num_trials, *(number + 1 for number in self.records)]))
        num, epochs, what = len(self.numbers), float(settings.base.train.epochs), ""
        if settings.path is not None:
            in_all = settings.path.num_epochs(settings.base.train, num - 1)
            epochs, what = in_all / num, f"a path of {num} networks, {in_all} epochs in all"
        self.display = SearchDisplay(console, title=folder.name, num_trials=num, num_epochs=epochs, what=what)
        self.parent = self._tracker()
        self.trackers: dict[int, Tracker] = {}
        self.unsaved: set[int] = set()
        """Trials whose records found no room on the disk."""
        self._saving = threading.Lock()

    # --- begin and end

    @property
    def remaining(self) -> list[int]:
        """Numbers of the trials to run: those that were interrupted first, then new ones."""
        left = [number for number in self.numbers if number not in self.records or not self.records[number].is_done]
        return sorted(left, key=lambda number: (number not in self.records, number))

    def begin(self) -> None:
        params = {"searcher": self.settings.searcher, "objective": self.settings.objective, "seed": self.settings.seed,
                  "trials": len(self.numbers), **{f"space.{key}": text for key, text in self.settings.space.items()}}  # fmt: skip
        tags = {"kind": "search", "space": self.settings.space_file}
        before = self.folder.mlflow_run_id()
        self.folder.save_settings(self.settings, before)
        self.parent.start(self.folder.name, params, tags, run_id=before)
        self.folder.save_settings(self.settings, self.parent.run_id or before)
        for record in self.records.values():
            if record.is_done and record.mlflow_run_id is not None and self.parent.is_running(record.mlflow_run_id):
                self._close(record)
        self.queue = self.remaining
        num_done = sum(record.is_done for record in self.records.values())
        self.display.begin(num_done=num_done, num_interrupted=len(self.records) - num_done)

    def end(self, status: tracking.Status) -> None:
        self.display.close()
        for number in sorted(self.unsaved):
            record, patience_s = self.records[number], PATIENCE_S if status is tracking.Status.FINISHED else 0.0
            try:
                patiently(partial(self.folder.save, record), partial(self.display.warning, record), patience_s=patience_s)
            except OSError as error:
                self.display.warning(record, f"{error}; its record lacks the last epochs, `--resume` tells them again")
        for tracker in list(self.trackers.values()):  # those still running
            tracker.end(tracking.Status.KILLED)
        self.trackers.clear()
        if any(record.is_done for record in self.records.values()):
            front = results.write(self.folder, self.settings, self.records)
            self.parent.summary(front.numbers())
            self.parent.artifacts([*front.files, self.folder.settings_file])
            self.parent.table("trials", front.rows())
        self.parent.end(status)
        if self.parent.run_id is not None:  # the store may not have been there at the beginning
            self.folder.save_settings(self.settings, self.parent.run_id)

    def _tracker(self) -> Tracker:
        return tracking.MlflowTracker(self.runs_dir) if self.track else tracking.NullTracker()

    # --- trials

    def next_job(self) -> dict[str, Any] | None:
        """The next trial, written down as begun; None when there is no more."""
        while self.queue:
            number = self.queue[0]
            record = self.records.get(number) or self._new(number)
            if record is None:  # a grid's end
                return None
            self.queue.pop(0)
            config = self.start(record)
            if config is None:
                continue
            return {"number": number, "config": config.to_dict(), "folder": str(self.folder.trial(number).path),
                    "latency": self.settings.objective == "latency",
                    "command": shlex.join(self.command)}  # fmt: skip
        return None

    def start(self, record: TrialRecord) -> RunConfig | None:
        """Writes a trial down as begun, or as gone on with; None where its config cannot be and it has failed."""
        self.records[record.number] = record
        record.num_starts += 1
        self._save(record)
        run_folder = self.folder.trial(record.number)
        tracker = self.trackers[record.number] = self._tracker()
        tags = {"kind": "trial", "trial": str(record.number)}
        if self.parent.run_id is not None:
            tags["mlflow.parentRunId"] = self.parent.run_id
        try:
            config = self.config_of(record)
        except ValueError as error:  # a combination that no check of the space came upon
            tracker.start(f"{self.folder.name}/{run_folder.name}", record.params, tags, run_id=record.mlflow_run_id)
            self.finish(record, Status.FAILED, str(error))
            return None

        def save() -> None:
            run_folder.path.mkdir(parents=True, exist_ok=True)
            config.save(run_folder.config_file)

        patiently(save, lambda text: self.display.warning(record, text))
        params = config.flat() | config.effective()
        tracker.start(f"{self.folder.name}/{run_folder.name}", params, tags, run_id=record.mlflow_run_id)
        self._save(record)
        self.display.started(record)
        return config

    def _new(self, number: int) -> TrialRecord | None:
        if self.settings.baseline and number == 0:
            return TrialRecord(number, {}, is_baseline=True)
        params = suggest(
            self.space, searcher=self.settings.searcher, seed=self.settings.seed, number=number - self.settings.baseline,
            known=known_points(self.records, objective=self.settings.objective),
        )  # fmt: skip
        return None if params is None else TrialRecord(number, params)

    def _save(self, record: TrialRecord) -> None:
        """With the store's name for the run, which it may get late. What finds no room on the disk is written with the next."""
        tracker = self.trackers.get(record.number)
        if tracker is not None and tracker.run_id is not None:
            record.mlflow_run_id = tracker.run_id
        with self._saving:  # a path's reports come from a thread of their own
            for number in sorted({record.number, *self.unsaved}):
                try:
                    self.folder.save(self.records[number])
                    self.unsaved.discard(number)
                except OSError as error:
                    if not storage.may_pass(error):
                        raise
                    if number not in self.unsaved:
                        self.display.warning(record, f"{error}; it is written again after the next epoch")
                    self.unsaved.add(number)

    def config_of(self, record: TrialRecord) -> RunConfig:
        if self.settings.path is not None:
            return paths.config_of(self.settings, record)
        if record.is_baseline:
            return self.settings.base.without_penalty()
        return launch.settled(spaces.applied(self.settings.base, record.params))

    def result(self, number: int, kind: str, content: Any) -> bool:
        """Takes what a trial tells (see `run_trial`); whether it is to be stopped."""
        record = self.records[number]
        if record.is_done:
            return False
        if kind == "failed":
            self.finish(record, Status.FAILED, content)
        elif kind == "warning":
            self.display.warning(record, content)
        elif kind == "back":
            self.trackers[number].back(content)
        elif kind == "left":  # neither failed nor done: `--resume` goes on with it
            self.display.warning(record, content)
            self.queue = []
        elif kind == "epoch":
            return self._epoch(record, content)
        elif kind == "history":
            for epoch in content[len(record.curve) :]:
                self._take(record, epoch)
        else:
            record.summary, record.latency_ms = content["summary"], content["latency_ms"]
            self.finish(record, Status.FINISHED)
        return False

    def _epoch(self, record: TrialRecord, epoch: dict[str, Any]) -> bool:
        self._take(record, epoch)
        self.display.epoch(record, epoch, num_epochs=self.config_of(record).train.epochs)
        reason = self._hopeless(record, epoch)
        if reason is not None:
            self.finish(record, Status.STOPPED, reason)
        return reason is not None

    def _take(self, record: TrialRecord, epoch: dict[str, Any]) -> None:
        quality = epoch["val_top1"] if "val_top1" in epoch else -epoch["val_rmse"]
        moment = Moment(int(epoch["epoch"]), float(quality), 100.0 - float(epoch["all_neurons"]))
        # A trial that goes on from its checkpoint may tell an epoch twice.
        record.curve = [*(m for m in record.curve if m.epoch < moment.epoch), moment]
        self._save(record)  # first, as the store may take its time
        self.trackers[record.number].epoch(epoch)

    def _hopeless(self, record: TrialRecord, epoch: dict[str, Any]) -> str | None:
        rules, config = self.settings.stopping, self.config_of(record)
        if rules is None or record.is_baseline or epoch["epoch"] >= config.train.epochs:
            return None
        layer = stopping.collapsed(epoch["alive"], neurons=self.widths, min_alive=config.penalty.min_alive)
        if layer is not None:
            return f"layer {layer} collapsed: {epoch['alive'][layer]} of {self.widths[layer]} neurons are left"
        if self.settings.objective != "neurons":  # fewer neurons are not always faster
            return None
        end = config.penalty.beta_schedule.end
        finished = [other.curve for other in self.records.values() if other.status is Status.FINISHED and other.curve]
        is_over = end is not None and epoch["epoch"] >= end
        return stopping.hopeless(record.curve, finished, penalty_is_over=is_over, config=rules)

    def finish(self, record: TrialRecord, status: Status, reason: str | None = None) -> None:
        record.status, record.reason = status, reason
        self._save(record)
        self._tell_end(record, self.trackers.pop(record.number))
        self.display.ended(record)

    def _close(self, record: TrialRecord) -> None:
        """Of a trial that ended when the driver was killed before the store heard of it."""
        tracker = self._tracker()
        tracker.start(f"{self.folder.name}/{self.folder.trial(record.number).path.name}", {}, run_id=record.mlflow_run_id)
        self._tell_end(record, tracker)

    def _tell_end(self, record: TrialRecord, tracker: Tracker) -> None:
        folder = self.folder.trial(record.number)
        if record.curve and math.isfinite(record.curve[-1].quality):
            tracker.summary({"final_val_quality": record.quality, "final_alive_percent": record.alive, **record.summary,
                             "final_latency_ms": record.latency_ms})  # fmt: skip
        files = [folder.config_file, folder.path / "report.json", folder.path / "report.md", folder.path / NEURON_LOG]
        tracker.artifacts([file for file in files if file.exists()])
        tracker.end(tracking.Status.FAILED if record.status is Status.FAILED else tracking.Status.FINISHED)

    def lost(self, number: int, reason: str) -> None:
        """A trial's process died, and not for the first time."""
        record = self.records[number]
        if not record.is_done:
            self.finish(record, Status.FAILED, reason)


def _run_tune(conductor: Conductor, *, gpu: bool, max_concurrent: int) -> None:
    quiet()
    from ray import tune
    from ray.tune import Callback, TuneError
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher

    # Ray Tune copies these, and pickles them now and then to restore a search by; ours is restored from its own files.
    class One:
        def __deepcopy__(self, memo: Any) -> Any:
            return self

    class FromConductor(One, Searcher):
        def suggest(self, trial_id: str) -> Any:
            job = conductor.next_job()
            return Searcher.FINISHED if job is None else {"job": {**job, "gpu": gpu}}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            """What a trial comes to is told by its results."""

        def save(self, checkpoint_path: str) -> None:
            """Nothing is kept."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing was kept."""

        def __reduce__(self) -> Any:
            return Searcher, ()

    class ToConductor(One, FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
            if TOLD not in result:  # Tune's own last word on a trial
                return TrialScheduler.CONTINUE
            stop = conductor.result(trial.config["job"]["number"], *result[TOLD])
            return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

        def __reduce__(self) -> Any:
            return FIFOScheduler, ()

    class Losses(One, Callback):
        def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
            lines = [line.strip() for line in str(trial.get_error() or "").splitlines() if line.strip()]
            conductor.lost(
                trial.config["job"]["number"], f"its process was lost: {lines[-1] if lines else 'no reason given'}"
            )

        def __reduce__(self) -> Any:
            return Callback, ()

    storage = conductor.folder.path / ".tune"
    shutil.rmtree(storage, ignore_errors=True)
    tuner = tune.Tuner(
        # The workers reserve CPUs and GPUs; this process only waits for them. Tune takes no empty request.
        tune.with_resources(_trainable, {"CPU": 0, "memory": 2**20}),
        tune_config=tune.TuneConfig(
            search_alg=FromConductor(), scheduler=ToConductor(), num_samples=len(conductor.queue),
            max_concurrent_trials=max_concurrent, trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(storage), callbacks=[Losses()], verbose=0,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
        ),
    )  # fmt: skip
    try:
        tuner.fit()
    except TuneError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RuntimeError(f"Ray Tune failed: {lines[-1] if lines else type(error).__name__}") from error
    shutil.rmtree(storage, ignore_errors=True)


def _trainable(config: dict[str, Any]) -> None:
    run_trial(config["job"])
