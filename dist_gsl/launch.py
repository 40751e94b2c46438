"""From a run's config to a trained run: checks, Ray, Ray Train, and the events of its first worker."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dist_gsl import data, events, heap, kernels, storage
from dist_gsl.config import RunConfig
from dist_gsl.events import Control, Listener
from dist_gsl.neurons import Neurons
from dist_gsl.runs import CHECKPOINTS, RunFolder
from dist_gsl.training import session
from dist_gsl.training.config import WorkersConfig
from dist_gsl.training.path import PathConfig


@dataclass(frozen=True)
class Resources:
    """What the workers will use."""

    num_workers: int
    gpu: bool
    num_concurrent: int = 1
    """How many such runs fit the cluster at once."""
    num_nodes: int = 1
    """Machines of the cluster, those counted in that an autoscaler could start."""


def settled(config: RunConfig) -> RunConfig:
    """The config with absolute paths: workers run in another directory."""
    init = config.train.init
    if init is not None and storage.is_uri(init):
        raise ValueError(f"train.init: {init} is a URI; copy it to a path that all nodes of the cluster see, and name that")
    init = init and str(Path(init).absolute())
    given = config.data.dir
    directory = given if given is not None and storage.is_uri(given) else str(config.data.directory().absolute())
    return replace(config, train=replace(config.train, init=init), data=replace(config.data, dir=directory))


def prepare(config: RunConfig, *, progress: Callable[[str, int, int], None] | None = None) -> Neurons:
    """Writes a config's betons where no folder of them is named, and refuses here what would fail in every worker, late
    and far away: the starting network's neurons."""
    check_machine(config.workers)
    kernels.cpu.library()
    directory = data.prepare(config.data, progress=progress).absolute()
    for split in ("train", "val"):
        data.check(directory / f"{split}.beton")
    neurons = session.dry_build(config, session.shapes_of(config, data.dataset_info(directory)))
    for split in ("train", "val"):
        session.make_loader(config, split, directory, train=split == "train", world_size=config.workers.num)
    return neurons


@contextmanager
def ray_cluster(workers: WorkersConfig, *, dashboard: bool = False) -> Iterator[Resources]:
    """A connection to the cluster, or a Ray of our own on this machine for as long as the context lasts.

    `ValueError` at once, with the numbers, where the cluster cannot hold the workers: Ray itself would wait for ever.
    A Ray of our own has no `dashboard` unless asked for; without it Ray does not free what a stopped run reserved.
    """
    import ray

    check_machine(workers)
    address = cluster_address(workers)
    started = not ray.is_initialized()
    with _environment(**(LOCAL_RAY | ({} if dashboard else UNSEEN) if started and address is None else {})):
        if started:
            _start(address, dashboard=dashboard)
        try:
            yield _resources(workers)
        finally:
            if started:
                ray.shutdown()


def _start(address: str | None, *, dashboard: bool) -> None:
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address or "local",  # None would join whatever Ray runs on this machine
            include_dashboard=dashboard if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
        )
    except ConnectionError as error:
        raise ValueError(
            f"workers.address {address!r}: no Ray cluster answers there; start one with `ray start --head`, "
            "or leave the address out to use this machine"
        ) from error
    except Exception as error:  # Ray raises bare ones where its processes do not come up
        raise RuntimeError(f"Ray did not start: {str(error).strip().splitlines()[0]}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's would exit without a word to the tracking store


LOCAL_RAY = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away, and the watcher is a process more
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # asking few workers often costs little
    **heap.LOCAL,
}
"""Of a Ray of our own, unless the user says otherwise."""

UNSEEN = {
    "RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0", "RAY_event_stats": "0", "RAY_TRAIN_METRICS_ENABLED": "0",
}  # fmt: skip
"""What Ray's processes count and tell each other for the dashboard: 2.4 % of a core (`benchmarks/README.md`)."""


@contextmanager
def connected(workers: WorkersConfig) -> Iterator[None]:
    """What a cluster cannot hold is refused before data are written; a Ray of our own is started after that."""
    if cluster_address(workers) is None:
        yield
        return
    with ray_cluster(workers):
        yield


def _resources(workers: WorkersConfig, nodes: Sequence[Mapping[str, float]] | None = None) -> Resources:
    """`ValueError` where the nodes, those of the cluster and of its autoscaler if none are given, do not hold the workers."""
    nodes = _nodes() if nodes is None else nodes
    slots = sum(int(node.get("CPU", 0) // workers.cpus) for node in nodes)  # a worker lies on one node
    if slots < workers.fewest:
        available = sum(node.get("CPU", 0) for node in nodes)
        raise ValueError(_too_many(workers, "CPU", workers.fewest * workers.cpus, available, "the cluster"))
    gpu_slots = sum(min(int(node.get("CPU", 0) // workers.cpus), int(node.get("GPU", 0))) for node in nodes)
    gpu = gpu_slots >= workers.fewest if workers.gpu is None else workers.gpu
    if gpu and gpu_slots < workers.fewest:
        available = sum(node.get("GPU", 0) for node in nodes)
        raise ValueError(_too_many(workers, "GPU", workers.fewest, available, "the cluster"))
    places = gpu_slots if gpu else slots
    return Resources(min(workers.num, places), gpu, max(1, places // workers.num), len(nodes))


def _nodes() -> list[Mapping[str, float]]:
    """What each node has, and each that an autoscaler could start."""
    nodes = _alive_nodes()
    return nodes + autoscaled(nodes, os.environ.get("DIST_GSL_AUTOSCALES", ""))


def _alive_nodes() -> list[Mapping[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def autoscaled(nodes: Sequence[Mapping[str, float]], text: str) -> list[Mapping[str, float]]:
    """Nodes that could be started besides those that run. Ray tells nobody what its autoscaler may start, so whoever sets the
    cluster up says it: "4xCPU:8,GPU:1;2xCPU:96,GPU:8" is up to four nodes of one kind and two of another.

    `ValueError` for another text.
    """
    possible: list[Mapping[str, float]] = []
    for group in filter(None, (each.strip() for each in text.split(";"))):
        matched = re.fullmatch(r"(\d+)x(\w+:[\d.]+(?:,\w+:[\d.]+)*)", group)
        if matched is None:
            raise ValueError(f"DIST_GSL_AUTOSCALES: {group!r} must look like 4xCPU:8,GPU:1")
        resources = {name: float(value) for name, value in (pair.split(":") for pair in matched[2].split(","))}
        running = sum(all(node.get(key, 0) >= value for key, value in resources.items()) for node in nodes)
        possible += [resources] * max(0, int(matched[1]) - running)
    return possible


STAGING_TIMEOUT_S = 4 * 3600
"""Time in which every node must have copied the data, where they have a URI."""


def cluster_address(workers: WorkersConfig) -> str | None:
    """The Ray cluster to connect to; None: a Ray of our own."""
    return workers.address or os.environ.get("RAY_ADDRESS") or None


def is_job() -> bool:
    """Was this process started by a cluster's job server?"""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_machine(workers: WorkersConfig) -> None:
    """`ValueError` where no cluster is named and this machine has too few CPUs."""
    available = os.cpu_count() or 1
    if cluster_address(workers) is None and workers.fewest * workers.cpus > available:
        raise ValueError(_too_many(workers, "CPU", workers.fewest * workers.cpus, available, "this machine"))


def _too_many(workers: WorkersConfig, kind: str, need: float, available: float, where: str) -> str:
    field = "num" if workers.min is None else "min"
    return f"workers: {workers.fewest} workers need {need:g} {kind}s, {where} has {available:g}; lower --workers.{field}" + (
        " or --workers.cpus" if kind == "CPU" else " or set --workers.gpu False"
    )


def train(
    config: RunConfig,
    folder: RunFolder,
    resources: Resources,
    *,
    listener: Listener,
) -> None:
    """Trains a settled config to its last epoch on a connected cluster, from the folder's last checkpoint if it has one.

    `RuntimeError` with the worker's own message where training failed.
    """
    from dist_gsl.training.worker import train_worker

    job = {"folder": folder.remote or str(folder.path), "file": folder.config_file.name, "checkpoints": folder.checkpoints.folder}
    _launch(train_worker, job, config, resources, listener)


def follow(
    config: RunConfig,
    path: PathConfig,
    values: Sequence[float],
    *,
    folder: Path,
    file: str,
    branches: Sequence[RunFolder],
    resources: Resources,
    listener: Listener,
) -> None:
    """Follows a path of rising strengths (see `training.path`), from where the checkpoints in `folder` say that it stands.

    file: one that is in the folder. branches: the runs' folders of the networks, the dense one first.

    `RuntimeError` as `train`.
    """
    from dist_gsl.training.worker import path_worker

    job = {
        "folder": str(folder), "file": file, "checkpoints": str(folder / TRUNK), "path": asdict(path), "values": list(values),
        "branches": [branch.checkpoints.folder for branch in branches],
    }  # fmt: skip
    _launch(path_worker, job, config, resources, listener)


TRUNK = "path"
"""A path's folder of checkpoints, in that of its search."""


def _launch(worker: Callable[[dict[str, Any]], None], job: dict[str, Any], config: RunConfig, resources: Resources, listener: Listener) -> None:
    """Ray Train around a worker function, and its events to the listener."""
    import ray.exceptions
    import ray.train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from dist_gsl import process_group

    # What Ray's own processes have to know of this package is sent to them: by name they would import it, and so torch.
    for module in (events, process_group):
        ray.cloudpickle.register_pickle_by_value(module)

    # Ray's own minute is too short for machines that are being started. One that uses what is there looks again soon: the places that it
    # goes for may be those of a machine which is gone.
    is_elastic = config.workers.min is not None
    wait_s = min(config.workers.start_timeout, max(10.0, config.workers.resize_interval)) if is_elastic else config.workers.start_timeout
    ray_train: Any = ray.train  # type checkers read the interface of its first version
    # Who has the data waits for who still copies them.
    backend = process_group.ProcessGroupConfig(timeout_s=STAGING_TIMEOUT_S if storage.is_uri(config.data.dir or "") else 1800)

    # On this process's node: what takes it away takes this process too.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    control: Any = ray.remote(Control).options(num_cpus=0, scheduling_strategy=here).remote()
    folder = job["folder"]
    file_system, place = storage.opened(folder) if storage.is_uri(folder) else (None, folder)
    trainer = DataParallelTrainer(
        worker,
        train_loop_config={**job, "config": config.to_dict(), "control": control},
        backend_config=backend,
        scaling_config=ray_train.ScalingConfig(
            num_workers=resources.num_workers if config.workers.min is None else (config.workers.min, config.workers.num),
            elastic_resize_monitor_interval_s=config.workers.resize_interval, use_gpu=resources.gpu,
            resources_per_worker={"CPU": config.workers.cpus, **({"GPU": 1} if resources.gpu else {})},
        ),
        run_config=ray_train.RunConfig(
            # Our checkpoints are not Ray's, which sees here that all nodes see the folder.
            name=CHECKPOINTS, storage_path=place, storage_filesystem=file_system,
            failure_config=ray_train.FailureConfig(
                max_failures=config.workers.max_failures,
                controller_failure_limit=math.ceil(config.workers.start_timeout / wait_s) if is_elastic else 0,
            ),
        ),
    )  # fmt: skip
    look = partial(_Shortage(replace(config.workers, gpu=resources.gpu)).look, listener) if is_elastic else (lambda: None)
    try:
        with _environment(RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=str(wait_s)):
            failure = events.fit(
                trainer, lambda timeout: ray.get(control.take.remote(timeout)), listener, stop=lambda: ray.get(control.stop.remote()), idle=look
            )
    except TrainingFailedError as error:
        raise RuntimeError(_reason(error)) from error
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray failed: {str(error).strip().splitlines()[0]}") from error
    finally:
        ray.kill(control)
    if failure is not None:
        raise RuntimeError(failure)


class ShortageError(RuntimeError):
    """Machines that a run needs did not come. It may go on when they do."""


class _Shortage:
    """Too few machines for a run that uses what is there: Ray waits for them for ever, and says nothing."""

    def __init__(self, workers: WorkersConfig) -> None:
        self.workers = workers
        self._since: float | None = None
        self._looked_at = 0.0

    def look(self, listener: Listener) -> None:
        """Called often. The listener hears of it once each time; `ShortageError` after workers.start_timeout."""
        now = time.monotonic()
        if now - self._looked_at < SHORTAGE_EVERY_S:
            return
        self._looked_at = now
        try:
            _resources(self.workers, _alive_nodes())
        except ValueError as error:
            if self._since is None:
                self._since = now
                listener.warning(f"{error}; it waits for machines, {self.workers.start_timeout:g} s at most")
            if now - self._since > self.workers.start_timeout:
                raise ShortageError(f"{error}; no machine came within {self.workers.start_timeout:g} s. `--resume` goes on") from error
        else:
            self._since = None


SHORTAGE_EVERY_S = 10.0


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets those that are not set; what the user has set stays."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _reason(error: BaseException) -> str:
    """The message of the first worker that failed, rather than Ray's story about it."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        cause = getattr(error, "controller_failure", error)
        lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()] or [type(cause).__name__]
        if "ray::" in lines[0]:  # a traceback: the error itself is its last line
            return f"training failed: {lines[-1]}"
        return f"training failed: {lines[0]}" + (f" {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else "")
    messages = []
    for rank, cause in sorted(failures.items()):
        lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
        messages.append(f"training failed on worker {rank}: {lines[-1] if lines else type(cause).__name__}")
    # A worker that lost its peer says so; the peer says why.
    return next((text for text in messages if not re.search("gloo|nccl|connection", text, re.IGNORECASE)), messages[0])
