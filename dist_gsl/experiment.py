"""One run from config to report: its baseline, training, removal, tracking. What `dist-gsl train` does."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dist_gsl import launch, plots, report, runs, storage, tracking
from dist_gsl.config import RunConfig
from dist_gsl.display import Display, Steps
from dist_gsl.events import Listener
from dist_gsl.report import NeuronLog, Report
from dist_gsl.runs import NEURON_LOG, RunFolder, Trained
from dist_gsl.tracking import Tracker

BASELINE = "-baseline"


class _Recorder(Listener):
    """Writes what comes from training to the run's folder and to the tracking store, and shows it."""

    def __init__(self, display: Display, tracker: Tracker, folder: RunFolder) -> None:
        self.display, self.tracker, self.folder = display, tracker, folder
        self.log_file = folder.path / NEURON_LOG
        self.log = NeuronLog()

    def progress(self, epoch: int, step: int, num_steps: int, loss: float, images_per_second: float) -> None:
        self.display.progress(epoch, step, num_steps, loss, images_per_second)

    def note(self, text: str) -> None:
        self.display.note(text)

    def warning(self, text: str) -> None:
        self.display.warning(text)

    def epoch(self, record: dict[str, Any], norms: dict[str, Any], masks: dict[str, Any]) -> None:
        self.display.epoch(record, norms, masks)
        self.tracker.epoch(record)
        self.log.append(record["epoch"], norms, masks)
        try:
            self.write()
        except OSError as error:  # a full disk, a storage that is away: what is told here is kept until the next time
            self.display.warning(f"{error}; it is written again after the next epoch")

    def back(self, epoch: int) -> None:
        self.tracker.back(epoch)

    def write(self) -> None:
        self.folder.save_mlflow_run_id(self.tracker.run_id)  # the store may not have been there at the beginning
        self.log.write(self.log_file)
        self.folder.push()


def is_begun(runs_dir: Path, name: str) -> bool:
    """Is there something that `resume` could go on with?"""
    for each in (name, f"{name}{BASELINE}"):
        RunFolder(runs_dir / each).pull()
    return any(RunFolder(runs_dir / each).config_file.exists() for each in (name, f"{name}{BASELINE}"))


def check_name(runs_dir: Path, name: str, *, resume: bool, config: RunConfig) -> RunFolder:
    """The run's folder. `ValueError` for a name in use without `resume`, or a resume with another config (more epochs are
    fine unless the schedule is cosine or a budget is to be met by the training's end)."""
    runs.check_plain_name(name)
    folder = RunFolder(runs_dir.absolute() / name)
    folder.pull()
    if folder.config_file.exists():
        if not resume:
            raise ValueError(f"run {name!r} exists in {runs_dir}: choose another --name, or go on with it by --resume")
        before, now = folder.config.flat(), config.flat()
        # A cosine schedule depends on where it ends, and so does what a budget without an end of its own leaves on the way; others may be gone on with.
        depends_on_end = config.train.schedule == "cosine" or (config.train.target is not None and config.penalty.beta_schedule.end is None)
        longer = not depends_on_end and now["train.epochs"] > before["train.epochs"]
        # What changes no number that training computes, but by rounding.
        free = ("workers.", "train.checkpoint_", "train.on_divergence", "train.shrink", *(["train.epochs"] if longer else []))
        changed = [key for key in now if before.get(key) != now[key] and not key.startswith(free)]
        if changed:
            key = changed[0]
            raise ValueError(
                f"--resume: {key} is {now[key]!r}, but run {name!r} was started with {before.get(key)!r}; "
                "leave it as it was, or start a new --name"
            )
    elif resume:
        raise ValueError(f"--resume: there is no run {name!r} in {runs_dir}; leave --resume out to start it")
    return folder


def check_baseline(baseline: RunFolder, config: RunConfig) -> None:
    """`ValueError` unless the run is finished, without penalty, and of the same network and data."""
    other = baseline.config
    if not baseline.is_finished:
        raise ValueError(f"--baseline-run {baseline.name!r} is not trained to its end; go on with it by --resume first")
    if other.penalty.enabled:
        raise ValueError(
            f"--baseline-run {baseline.name!r} was trained with a penalty; name a run without, or give --baseline"
        )
    if (other.network, other.data.dir) != (config.network, config.data.dir):
        raise ValueError(
            f"--baseline-run {baseline.name!r} is of another network or other data; give --baseline instead"
        )


def run(
    config: RunConfig,
    *,
    name: str,
    runs_dir: Path,
    recipe: str,
    command: Sequence[str],
    console: Console,
    resume: bool = False,
    with_baseline: bool = False,
    baseline_name: str | None = None,
    track: bool = True,
    continued: RunFolder | None = None,
) -> Report:
    """Trains a run (and, if asked, the same without penalty first), removes its dead neurons, and reports on validation.

    continued: a run of the same config, a trial of a search say, whose training goes on in this one.

    `ValueError` for what the user gave, before anything is written.
    """
    settled = launch.settled(config)
    plain = settled.without_penalty()
    # What can be refused without work is refused before any; an error in a worker comes late and far away.
    is_begun(runs_dir, name)  # brings the copies of a URI up to date
    baseline_exists = RunFolder(runs_dir / f"{name}{BASELINE}").config_file.exists()
    with_baseline = baseline_name is None and (with_baseline or (resume and baseline_exists))
    # Interrupted while the baseline trained, a run goes on although it has no folder of its own yet.
    begun = RunFolder(runs_dir / name).config_file.exists() or not (with_baseline and baseline_exists)
    folder = check_name(runs_dir, name, resume=resume and begun, config=settled)
    baseline = None
    if baseline_name is not None:
        baseline = RunFolder.existing(runs_dir / baseline_name)
        check_baseline(baseline, settled)
    elif with_baseline:
        baseline = check_name(runs_dir, f"{name}{BASELINE}", resume=resume and baseline_exists, config=plain)
    trained = [folder, *([baseline] if baseline is not None and baseline_name is None else [])]
    going_on = all(each.checkpoints.names() for each in trained)
    # Whoever has a checkpoint needs the weights no more that it started from; they may be gone.
    needed = replace(config, train=replace(config.train, init=None)) if going_on else config
    with launch.connected(config.workers):
        with Steps(console) as steps:
            launch.prepare(needed, progress=steps)
        with launch.ray_cluster(config.workers) as resources:
            if track:
                tracking.check_owner(runs_dir, may_move=launch.is_job() and resources.num_nodes > 1)
            if baseline is not None and baseline_name is None:
                _train_and_report(
                    plain, baseline, resources, recipe=recipe, command=command, console=console, baseline=None,
                    track=track, runs_dir=runs_dir,
                )  # fmt: skip
            if continued is not None and not folder.path.exists():
                _take_over(continued, folder)
            return _train_and_report(
                settled, folder, resources, recipe=recipe, command=command, console=console, baseline=baseline,
                track=track, runs_dir=runs_dir,
            )  # fmt: skip


def _take_over(source: RunFolder, folder: RunFolder) -> None:
    """Copies what a training has come to into a new run's folder, whole or not at all."""
    temporary = folder.path.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if source.checkpoints.names():
        shutil.copytree(source.path / runs.CHECKPOINTS, temporary / runs.CHECKPOINTS)
    if (source.path / NEURON_LOG).exists():
        shutil.copy(source.path / NEURON_LOG, temporary / NEURON_LOG)
    temporary.rename(folder.path)
    storage.push(folder.path)


def _train_and_report(
    config: RunConfig,
    folder: RunFolder,
    resources: launch.Resources,
    *,
    recipe: str,
    command: Sequence[str],
    console: Console,
    baseline: RunFolder | None,
    track: bool,
    runs_dir: Path,
) -> Report:
    is_new = not folder.path.exists()
    folder.path.mkdir(parents=True, exist_ok=True)
    config.save(folder.config_file)
    tracker: Tracker = tracking.MlflowTracker(runs_dir) if track else tracking.NullTracker()
    state = folder.last_state()
    tracker.start(
        folder.name, config.flat() | config.effective(), {"recipe": recipe}, run_id=folder.mlflow_run_id()
    )
    folder.save_mlflow_run_id(tracker.run_id)
    folder.push()
    status = tracking.Status.FAILED
    for record in [] if state is None else state["history"]:  # whoever trained it may not have come to tell
        tracker.epoch(record)
    try:
        if state is None or state["position"]["epoch"] < config.train.epochs:
            with Display(console, title=folder.name, num_epochs=config.train.epochs) as display:
                recorder = _Recorder(display, tracker, folder)
                if recorder.log_file.exists():
                    recorder.log = NeuronLog.read(recorder.log_file)
                launch.train(config, folder, resources, listener=recorder)
                recorder.write()  # the last epoch may not have found room
            if not folder.is_finished:
                raise RuntimeError(f"run {folder.name!r}: the workers ended before its last epoch; `--resume` goes on from the last checkpoint")
        made = report_run(folder, baseline=baseline, recipe=recipe, command=command, console=console, tracker=tracker)
        status = tracking.Status.FINISHED
        return made
    except KeyboardInterrupt:
        status = tracking.Status.KILLED
        raise
    except BaseException:
        if is_new and _is_empty(folder):  # leave the name free
            shutil.rmtree(folder.path, ignore_errors=True)
            if folder.remote is not None:
                with contextlib.suppress(OSError):  # what ended the run is what is raised
                    storage.remove(folder.remote)
        raise
    finally:
        tracker.end(status)


def _is_empty(folder: RunFolder) -> bool:
    """Was nothing learned?"""
    try:
        return not folder.checkpoints.names() and not (folder.path / NEURON_LOG).exists()
    except OSError:  # nobody knows
        return False


def report_run(
    folder: RunFolder,
    *,
    console: Console,
    baseline: RunFolder | None = None,
    recipe: str = "",
    command: Sequence[str] = (),
    final: bool = False,
    tracker: Tracker | None = None,
) -> Report:
    """Removes the dead neurons, measures, writes report and plots. `final` reads the test split, else validation."""

    def say(text: str) -> None:
        console.print(f"{folder.name}: {text}", highlight=False)

    trained = Trained.load(folder)
    made, compacted = runs.make_report(
        trained, baseline=None if baseline is None else Trained.load(baseline), recipe=recipe,
        command=shlex.join(command), final=final, say=say,
    )  # fmt: skip
    report.write(made, folder.path)
    history = trained.state["history"]
    baseline_history = None if baseline is None else baseline.state()["history"]
    files = plots.write_plots(folder.path, history=history, report=made, baseline_history=baseline_history)
    folder.push()
    if tracker is not None:
        tracker.summary(runs.summary(made))
        tracker.artifacts(
            [
                *files,
                folder.path / "report.json",
                folder.path / "report.md",
                folder.config_file,
                folder.path / NEURON_LOG,
            ]
        )
        tracker.table("layers", made.layers)
        example = np.zeros((2, *trained.image_shape), dtype=np.float32)
        tracker.model(compacted.model, example, pip_requirements=runs.model_requirements())
    return made


def report_again(path: Path, *, final: bool, console: Console, baseline_name: str | None = None) -> Report:
    """The report of a finished run once more, against the baseline it had; `final` reads the test split."""
    folder = RunFolder.existing(path)
    before = report.load(folder.path) if (folder.path / "report.json").exists() else None
    if before is not None and before.split == "test" and not final:
        raise ValueError(f"run {folder.name!r} is reported on the test split already; --final repeats that")
    had = baseline_name or (None if before is None else before.baseline)
    baseline = None if had is None else RunFolder.existing(folder.path.parent / had)
    if baseline is not None:
        check_baseline(baseline, folder.config)
    return report_run(
        folder, console=console, baseline=baseline, recipe="" if before is None else before.recipe,
        command=[] if before is None else shlex.split(before.command), final=final,
    )  # fmt: skip
