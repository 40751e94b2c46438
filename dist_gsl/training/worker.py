"""What a Ray Train worker runs."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, TextIO

import ray.train
import ray.train.torch
import ray.util
import torch
import torch.distributed as dist

import dist_gsl
from dist_gsl import data, storage
from dist_gsl.config import RunConfig
from dist_gsl.storage import StorageAwayError
from dist_gsl.training import session
from dist_gsl.training.checkpoint import Checkpoints
from dist_gsl.training.loop import Progress
from dist_gsl.training.state import RunState
from dist_gsl.training.watch import DivergedError, Request, StoppedError


def train_worker(job: dict[str, Any]) -> None:
    """Trains from the run's last checkpoint, if it has one, and tells the driver of it.

    job: "config" (RunConfig as dict, its data.dir absolute), "folder" (the run's, a path or a URI), "checkpoints" (theirs), "stop", a
    queue that is empty until the driver asks the run to end, and "events", a queue to the driver that gets ("progress", Progress), ("epoch", record, norms, masks), ("note", text),
    ("warning", text) and ("failed", text) from rank 0.
    """
    config = RunConfig.from_dict(job["config"])
    context = ray.train.get_context()
    is_first = context.get_world_rank() == 0
    events = job["events"]
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if is_first:
        _send_warnings(events)
    if (problem := _first_problem(_unseen(job["folder"], config.data, rank=context.get_world_rank()))) is not None:
        if is_first:
            events.put_nowait(("failed", problem))
        return

    def on_progress(progress: Progress) -> None:
        events.put_nowait(("progress", progress))

    def on_epoch(run_state: RunState, record: dict[str, Any]) -> None:
        # Told before it is kept: an epoch told twice does no harm, one never told is lost.
        if is_first:
            norms = {name: values.numpy() for name, values in session.neuron_norms(run_state.neurons).items()}
            masks = {layer.name: layer.in_starting_network(layer.mask).numpy() for layer in run_state.neurons}
            events.put_nowait(("epoch", record, norms, masks))

    def request() -> Request:
        if is_first and not job["stop"].empty():
            return Request.STOP
        return Request.SAVE if preemption.is_new() else Request.NONE

    preemption = _Preemption()
    try:
        session.run(
            config, data_dir=data.prepare(config.data), device=device, checkpoints=Checkpoints(job["checkpoints"]),
            on_epoch=on_epoch, on_progress=on_progress, on_note=lambda text: events.put_nowait(("note", text)), request=request,
        )  # fmt: skip
    except StoppedError:  # as the driver asked
        return
    except (DivergedError, ValueError, StorageAwayError) as error:  # trying again would end the same way
        if is_first:
            events.put_nowait(("failed", str(error)))


class _Preemption:
    """Whether Ray says that a machine of this run will be taken away, told once. Ray starts the run anew when it is gone."""

    def __init__(self) -> None:
        self._was_told = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0"  # nobody watches

    def is_new(self) -> bool:
        """All processes call it equally often."""
        if self._was_told or ray.train.get_preemption_info() is None:
            return False
        self._was_told = True
        return True


def _unseen(folder: str, data_config: data.DataConfig, *, rank: int) -> str | None:
    """What this worker's node does not see of what every worker needs, any of which may be the first after a failure.

    Without this a run would fail at its first checkpoint, an epoch late.
    """
    node = ray.util.get_node_ip_address()
    if storage.is_uri(folder):
        try:
            if storage.read(storage.join(folder, "config.yaml")) is None:
                return f"node {node} does not see the run's folder {folder}: do its credentials name the same storage?"
            storage.check_writable(folder, f".probe-{rank}")
        except (storage.StorageError, storage.StorageAwayError) as error:
            return f"node {node}: {error}"
    elif (problem := _unseen_path(Path(folder), node)) is not None:
        return problem
    try:
        data.prepare(data_config)  # copies them to this node where they have a URI
    except (ValueError, OSError) as error:
        return f"node {node}: {error}; give --data.dir a path that all nodes share, or a URI"
    return None


def _unseen_path(folder: Path, node: str) -> str | None:
    if not (folder / "config.yaml").is_file():
        return (
            f"node {node} does not see the run's folder {folder}: give --runs a path that all nodes share, such as one "
            "on NFS, or a URI such as s3://BUCKET/runs, and set it as DIST_GSL_RUNS for the cluster"
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"node {node} cannot write to the run's folder {folder} ({error.strerror}): give its user the right to"
    return None


def _first_problem(mine: str | None) -> str | None:
    """The problem of the lowest rank that has one, the same on all ranks, so that all end and none waits."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, mine)
    return next((problem for problem in problems if problem is not None), None)


def _send_warnings(events: Any) -> None:
    """Hands this package's warnings to the driver: what a worker prints, nobody sees."""
    package = str(Path(dist_gsl.__file__).parent)
    show = warnings.showwarning

    def send(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
        line: str | None = None,
    ) -> None:  # fmt: skip
        if filename.startswith(package):
            events.put_nowait(("warning", str(message)))
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = send
