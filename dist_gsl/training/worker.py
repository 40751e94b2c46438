"""What a Ray Train worker runs."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import ray.train
import ray.train.torch
import ray.util
import torch
import torch.distributed as dist

import dist_gsl
from dist_gsl import data, kernels, storage
from dist_gsl.compiled import NotCompiledError
from dist_gsl.config import RunConfig
from dist_gsl.data import native
from dist_gsl.storage import StorageAwayError
from dist_gsl.training import path, session
from dist_gsl.training.checkpoint import PATIENCE_S, Checkpoints, patiently
from dist_gsl.training.loop import Progress
from dist_gsl.training.session import Place
from dist_gsl.training.state import RunState
from dist_gsl.training.watch import CommonError, Request, StoppedError

_store: dist.TCPStore | None = None
"""The first worker's, by which they find each other."""


def listen() -> tuple[str, int]:
    """This worker's address, and of the first the port at which the others find it, 0 of others."""
    global _store
    address = ray.util.get_node_ip_address()
    if ray.train.get_context().get_world_rank() == 0:
        _store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    return address, _store.port if _store is not None else 0


def join(backend: str, address: str, port: int, timeout_s: float) -> None:
    """Makes the default process group, together with the others."""
    context, timeout = ray.train.get_context(), timedelta(seconds=timeout_s)
    rank, world_size = context.get_world_rank(), context.get_world_size()
    os.environ |= {  # as torchrun's workers have them, for libraries that look there
        "MASTER_ADDR": address, "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world_size), "NODE_RANK": str(context.get_node_rank()),
        "LOCAL_RANK": str(context.get_local_rank()), "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }  # fmt: skip
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout) if _store is None else _store
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def train_worker(job: dict[str, Any]) -> None:
    """Trains from the run's last checkpoint, if it has one. job: as `_work`."""

    def work(config: RunConfig, device: torch.device, place: Place) -> None:
        session.run(config, data_dir=data.prepare(config.data), device=device, place=place)

    _work(job, work)


def path_worker(job: dict[str, Any]) -> None:
    """Follows a path from where it stands. job: as `_work`, and "path" (PathConfig as dict), "values" (penalty.beta.rest, from weak to
    strong), "branches" (the checkpoints of each strength's network). It tells ("told", "begun" or "trained", number of the strength) too."""

    def tell(kind: str, number: int, history: Sequence[dict[str, Any]] = ()) -> None:
        if dist.get_rank() == 0:
            ray.get(job["control"].tell.remote("told", kind, number, list(history)))

    def work(config: RunConfig, device: torch.device, place: Place) -> None:
        trunk = place.checkpoints
        assert trunk is not None
        path.follow(
            config, path.PathConfig(**job["path"]), job["values"], data_dir=data.prepare(config.data), device=device, trunk=trunk,
            branches=lambda number: Checkpoints(job["branches"][number]), place=place,
            report=path.Report(begun=lambda number, history: tell("begun", number, history), trained=lambda number: tell("trained", number)),
        )  # fmt: skip

    _work(job, work)


def _work(job: dict[str, Any], work: Callable[[RunConfig, torch.device, Place], None]) -> None:
    """One worker's part in what has a folder and checkpoints, and what the driver hears of it.

    job: "config" (RunConfig as dict, its data.dir absolute), "folder" (a path or a URI), "file" (one in it), "checkpoints" (their folder),
    "control" (the driver's `events.Control`, which rank 0 tells how it goes).
    """
    config = RunConfig.from_dict(job["config"])
    rank = ray.train.get_context().get_world_rank()
    is_first, driver = rank == 0, _Driver(job["control"])
    tell = driver.tell
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if is_first:
        _send_warnings(tell)
        tell("begun")
    is_restart = _begun_before(job["control"])
    patience_s = PATIENCE_S if is_restart else 0.0  # at the start a mistake in an address is likelier than a storage that is away
    if (problem := _first_problem(_unseen(job["folder"], job["file"], config.data, rank=rank, patience_s=patience_s))) is not None:
        if is_first:
            tell("failed", problem)
        return

    def on_progress(progress: Progress) -> None:
        driver.mention("progress", progress.epoch, progress.step, progress.num_steps, progress.loss, progress.images_per_second)

    def on_epoch(run_state: RunState, record: dict[str, Any]) -> None:
        # Told before it is kept: an epoch told twice does no harm, one never told is lost.
        if is_first:
            norms = {name: values.numpy() for name, values in session.neuron_norms(run_state.neurons).items()}
            masks = {layer.name: layer.in_starting_network(layer.mask).numpy() for layer in run_state.neurons}
            tell("epoch", record, norms, masks)

    def request() -> Request:
        is_leaving = preemption.is_new()  # asked in every process, whatever else there is: they come together for it
        if is_leaving and is_first:
            tell("note", "a machine of this run will be taken away, says Ray: its state is kept at once")
        if is_first and ray.get(job["control"].is_stopped.remote()):
            return Request.STOP
        return Request.SAVE if is_leaving else Request.NONE

    preemption = _Preemption()
    place = Place(
        Checkpoints(job["checkpoints"]), on_epoch, on_progress, on_back=lambda epoch: tell("back", epoch),
        on_note=lambda text: tell("note", text), request=request,
    )  # fmt: skip
    try:
        work(config, device, place)
    except StoppedError:  # as the driver asked
        return
    except CommonError as error:  # what one process alone fails of is Ray's to hear, or the others would wait for it
        if is_first:
            tell("failed", str(error))


class _Driver:
    """Who started the training, as it is told of what happens, in order."""

    def __init__(self, control: Any) -> None:
        self._control, self._mentioned = control, None

    def tell(self, *event: Any) -> None:
        """It is with `Control` when this returns; the driver, which waits there, may have been killed."""
        if self._mentioned is not None:
            ray.get(self._mentioned)  # Ray does not keep the order of calls
        self._mentioned = None
        ray.get(self._control.tell.remote(*event))

    def mention(self, *event: Any) -> None:
        """Between two steps: nobody waits until it has come."""
        self._mentioned = self._control.tell.remote(*event)


def _begun_before(control: Any) -> bool:
    """Whether other workers had this training before, the same in all of these."""
    found = [ray.get(control.begin.remote()) > 1 if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, 0)
    return bool(found[0])


class _Preemption:
    """Whether Ray says that a machine of this run will be taken away, told once. Ray starts the workers anew when it is gone."""

    def __init__(self) -> None:
        self._was_told = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0"  # nobody watches

    def is_new(self) -> bool:
        """All processes call it equally often."""
        if self._was_told or ray.train.get_preemption_info() is None:
            return False
        self._was_told = True
        return True


def _unseen(folder: str, file: str, data_config: data.DataConfig, *, rank: int, patience_s: float) -> str | None:
    """What this worker's node does not see of what every worker needs, any of which may be the first after a failure.

    Without this a run would fail at its first checkpoint, an epoch late.
    """
    node = ray.util.get_node_ip_address()
    try:
        kernels.cpu.library()
        native.library()
    except NotCompiledError as error:
        return f"node {node}: {error}"
    try:
        patiently(lambda: _check_seen(folder, file, node, rank), lambda text: warnings.warn(text, stacklevel=2), patience_s=patience_s)
    except StorageAwayError as error:
        return str(error)
    except storage.StorageError as error:
        return f"node {node}: {error}"
    try:
        data.prepare(data_config)  # copies them to this node where they have a URI
    except (ValueError, OSError) as error:
        return f"node {node}: {error}; give --data.dir a path that all nodes share, or a URI"
    return None


def _check_seen(folder: str, file: str, node: str, rank: int) -> None:
    """`StorageAwayError` unless this worker reads and writes the run's folder."""
    if not storage.is_uri(folder):
        if (problem := _unseen_path(Path(folder), file, node)) is not None:
            raise StorageAwayError(problem)
        return
    try:
        is_seen = storage.read(storage.join(folder, file)) is not None
        storage.check_writable(folder, f".probe-{rank}")
    except StorageAwayError as error:
        raise StorageAwayError(f"node {node}: {error}") from error
    if not is_seen:
        raise StorageAwayError(f"node {node} does not see the run's folder {folder}: do its credentials name the same storage?")


def _unseen_path(folder: Path, file: str, node: str) -> str | None:
    if not (folder / file).is_file():
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


def _send_warnings(tell: Callable[..., None]) -> None:
    """Hands this package's warnings to the driver: what a worker prints, nobody sees."""
    package = str(Path(dist_gsl.__file__).parent)
    show = warnings.showwarning

    def send(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
        line: str | None = None,
    ) -> None:  # fmt: skip
        if filename.startswith(package):
            tell("warning", str(message))
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = send
