"""What a Ray Train worker runs."""

from __future__ import annotations

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
from dist_gsl.training import checkpoint, session
from dist_gsl.training.loop import DivergedError, Progress
from dist_gsl.training.state import RunState


def train_worker(job: dict[str, Any]) -> None:
    """Trains, reports every epoch with a checkpoint, and goes on from Ray Train's last checkpoint if there is one.

    job: "config" (RunConfig as dict, its data.dir absolute), "folder" (the run's, a path or a URI), and "events", a queue to the driver that gets
    ("progress", Progress), ("epoch", record, norms, masks), ("warning", text) and ("failed", text) from rank 0.
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
    previous = ray.train.get_checkpoint()
    state = None
    if previous is not None:
        with previous.as_directory() as directory:
            state = checkpoint.load(directory)

    def on_progress(progress: Progress) -> None:
        events.put_nowait(("progress", progress))

    def on_epoch(run_state: RunState, record: dict[str, Any]) -> None:
        # A barrier over all workers: once an epoch, never in a step.
        score = record["val_top1"] if "val_top1" in record else -record["val_rmse"]
        metrics = {"epoch": record["epoch"], "score": score}
        if not is_first:
            ray.train.report(metrics)
            return
        norms = {name: values.numpy() for name, values in session.neuron_norms(run_state.neurons).items()}
        masks = {layer.name: layer.in_starting_network(layer.mask).numpy() for layer in run_state.neurons}
        # Before the checkpoint: an epoch told twice does no harm, one never told is lost.
        events.put_nowait(("epoch", record, norms, masks))
        with tempfile.TemporaryDirectory() as directory:
            checkpoint.save(run_state.state_dict(), directory)
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(directory),
                checkpoint_dir_name=f"epoch-{record['epoch']:04d}",
            )

    try:
        session.run(
            config, data_dir=data.prepare(config.data), device=device, state=state,
            on_epoch=on_epoch, on_progress=on_progress,
        )  # fmt: skip
    except DivergedError as error:  # all workers alike; Ray would only try it again
        if is_first:
            events.put_nowait(("failed", str(error)))


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
