"""What one trial of a search runs in its Ray process: a whole distributed training, told to Ray Tune epoch by epoch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from ray.exceptions import RayError

from dist_gsl import artifact, data, heap, launch, report, runs, storage, timing
from dist_gsl.config import RunConfig
from dist_gsl.events import Listener
from dist_gsl.report import NeuronLog, Report
from dist_gsl.runs import NEURON_LOG, RunFolder, Trained
from dist_gsl.training import session
from dist_gsl.training.checkpoint import patiently

TOLD = "told"
"""The one key of a trial's results: [kind, content]. A list, as Tune takes dicts apart."""


class _ToTune(Listener):
    """Hands each epoch's record to Ray Tune, and keeps the neuron log."""

    def __init__(self, folder: RunFolder) -> None:
        self.log_file = folder.path / NEURON_LOG
        self.log = NeuronLog.read(self.log_file) if self.log_file.exists() else NeuronLog()

    def warning(self, text: str) -> None:
        _tell("warning", text)

    def epoch(self, record: dict[str, Any], norms: dict[str, Any], masks: dict[str, Any]) -> None:
        self.log.append(record["epoch"], norms, masks)
        try:
            self.log.write(self.log_file)
        except OSError as error:  # a full disk, a storage that is away: what is told here is kept until the next time
            self.warning(f"{error}; it is written again after the next epoch")
        _tell("epoch", record)

    def back(self, epoch: int) -> None:
        _tell("back", epoch)


def _tell(kind: str, content: Any) -> None:
    from ray import tune

    tune.report({TOLD: [kind, content]})


def run_trial(job: dict[str, Any]) -> None:
    """Ray Tune's trainable. Trains the trial of `job`, from its folder's last checkpoint if there is one, removes the
    dead neurons, and reports.

    job: "number", "config" (RunConfig as dict), "folder", "gpu", "latency" (measure it?). It tells "epoch" with the epoch's
    record, "history" with those of the checkpoint it goes on from, "back" with the epoch that it went back to, "warning" with its text, and
    at the end "finished" with {"summary", "latency_ms"}, "failed" with the reason, or "left" with it where machines are missing. `OSError` where a disk or storage fails for minutes.
    """
    folder, config = RunFolder(Path(job["folder"])), RunConfig.from_dict(job["config"])
    # Ray gives a process that reserves no CPU a single thread; removal and proof may use what a worker has.
    torch.set_num_threads(max(1, int(config.workers.cpus * config.workers.num)))
    heap.keep_freed()  # networks are timed
    resources = launch.Resources(config.workers.num, job["gpu"])
    try:
        state = folder.last_state()
        if state is not None:  # an epoch may be in the checkpoint that nobody was told of
            _tell("history", state["history"])
        if state is None or state["position"]["epoch"] < config.train.epochs:
            # Refused here, what the config alone is wrong about does not fail in the workers again and again.
            session.dry_build(config, session.shapes_of(config, data.dataset_info(data.prepare(config.data))))
            listener = _ToTune(folder)
            launch.train(config, folder, resources, listener=listener)
            patiently(lambda: listener.log.write(listener.log_file), listener.warning)  # the last epoch may not have found room

        def reported() -> Report:
            made, _ = runs.make_report(Trained.load(folder), baseline=None, run_time=False, command=job["command"])
            report.write(made, folder.path)
            return made

        made = patiently(reported, lambda text: _tell("warning", text))
        latency = measure_latency(folder) if job["latency"] else None
    except launch.ShortageError as error:
        _tell("left", str(error))
        return
    except Exception as error:  # whatever it is, it ends this trial and not the search; the driver shows it
        is_of_the_disk = isinstance(error, OSError) and storage.may_pass(error)
        if is_of_the_disk or isinstance(error.__cause__, RayError):  # not of the trial: Tune tries again
            raise
        _tell("failed", " ".join(f"{_kind(error)}{error}".split()))
        return
    _tell("finished", {"summary": runs.summary(made), "latency_ms": latency})


def measure_latency(folder: RunFolder, *, seconds: float = 3.0) -> float:
    """Median run time in milliseconds of the compact network for one image, on this machine."""
    model = artifact.load(folder.compact_dir).eval()
    return timing.latency_ms(model, example=torch.zeros(1, *Trained.load(folder).image_shape), seconds=seconds)


def _kind(error: Exception) -> str:
    return "" if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: "


def quiet() -> None:
    """Settings of Ray Tune's that are read from the environment; what the user has set stays."""
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our records are trial.json and MLflow
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: the search is gone on with by --resume
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the state of a search is in our files
        "RAY_AIR_NEW_OUTPUT": "0",
    }.items():
        os.environ.setdefault(name, value)
