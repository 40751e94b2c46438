"""One process's part of a training: its loaders, its state, the loop. Needs a process group, knows nothing of Ray."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_gsl import data
from dist_gsl.config import RunConfig
from dist_gsl.data import order
from dist_gsl.data.loader import DEFAULT_SIZE
from dist_gsl.neurons import Neurons
from dist_gsl.penalty import row_norms, starting_betas
from dist_gsl.storage import StorageAwayError
from dist_gsl.training import loop
from dist_gsl.training.checkpoint import PATIENCE_S, Checkpoints, Writer, patiently
from dist_gsl.training.loop import Progress
from dist_gsl.training.state import MicroBatch, Position, RunState, build, build_network, initialise
from dist_gsl.training.watch import DivergedError, Outside, Request


@dataclass(frozen=True)
class Shapes:
    """What the data says about the network's ends."""

    channels: int
    size: int
    num_outputs: int

    @property
    def image(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size


def shapes_of(config: RunConfig, info: data.DatasetInfo) -> Shapes:
    """`ValueError` where loss and data do not fit each other."""
    regression = info.num_targets > 0
    if regression != (config.train.loss == "square"):
        need = "square" if regression else "cross-entropy"
        raise ValueError(
            f"train.loss is {config.train.loss!r}, but data {info.source!r} has "
            f"{'numbers' if regression else 'classes'} as targets: use --train.loss {need}"
        )
    size = config.data.size or info.size or DEFAULT_SIZE
    return Shapes(info.channels, size, info.num_targets if regression else len(info.classes))


def network_arguments(config: RunConfig, shapes: Shapes) -> dict[str, Any]:
    """Keyword arguments of `create_model`."""
    network = config.network
    return {
        "name": network.name, "num_classes": shapes.num_outputs, "in_channels": shapes.channels, "width": network.width,
        "batch_norm": network.batch_norm, "image_size": shapes.size, "pretrained": network.pretrained,
    }  # fmt: skip


def make_loader(
    config: RunConfig,
    split: str,
    directory: Path,
    *,
    device: torch.device | str = "cpu",
    train: bool = False,
    batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    parts: int | None = None,
    memory: int | None = None,
) -> data.Loader:
    full = config.data.size or DEFAULT_SIZE
    return data.Loader(
        directory / f"{split}.beton", batch_size=batch_size or config.train.batch_size, train=train, rank=rank,
        world_size=world_size, parts=parts, seed=config.train.seed, size=config.data.size, augment=config.data.augment,
        num_threads=config.data.num_threads, device=device, channels_last=config.train.channels_last, memory=memory,
        sizes=partial(config.data.train_size, full=full) if train and config.data.start_size is not None else None,
    )  # fmt: skip


def data_memory(config: RunConfig, file: Path, state: Mapping[str, Any] | None) -> int | None:
    """Bytes of a node's memory for the training file, alike in every process: what was set, or else half of it; None where nothing
    was set and the file fits.

    A run keeps what was found when it began: the order of its samples follows from it.
    """
    if config.data.memory_gb is not None:
        return int(config.data.memory_gb * 1e9)
    if state is not None:
        return state.get("data_memory")
    found: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(found, memory_of_node() // 2)
    num_bytes = file.stat().st_size
    if num_bytes <= min(found):
        return None
    warnings.warn(
        f"{file} has {num_bytes / 1e9:.1f} GB, more than half of a node's memory: it is read in quasi-random order, "
        f"{min(found) / 1e9:.1f} GB at a time; data.memory_gb sets another amount",
        stacklevel=2,
    )
    return min(found)


def memory_of_node() -> int:
    """Bytes that the processes of this node, or of this container, may use."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
            found.append(int(Path(limit).read_text()))
    return min(found)


def run(
    config: RunConfig,
    *,
    data_dir: Path,
    device: torch.device,
    on_epoch: Callable[[RunState, dict[str, Any]], None],
    checkpoints: Checkpoints | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_note: Callable[[str], None] = lambda text: None,
    request: Callable[[], Request] = lambda: Request.NONE,
) -> RunState:
    """Trains this process's share of a run to its end, from its last good checkpoint if it has one, and keeps checkpoints on the way.

    checkpoints: None: nothing is kept.
    on_note: hears how it goes on from a checkpoint, and with how many processes where that may change.
    request: what the process hears from outside, asked about once a second.

    In every process at the same step: `DivergedError`; `StoppedError`, the state being kept; `ValueError` and `StorageAwayError` where
    checkpoints cannot be read. In the first process alone: `StorageAwayError` where the last checkpoint cannot be written.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    state = last_state(checkpoints)
    shapes = shapes_of(config, data.dataset_info(data_dir))
    memory = data_memory(config, data_dir / "train.beton", state)
    parts = num_micro_batches(config, state)
    training_data = make_loader(
        config, "train", data_dir, device=device, train=True, rank=rank, world_size=world_size, parts=parts, memory=memory
    )
    validation_data = make_loader(
        config,
        "val",
        data_dir,
        device=device,
        batch_size=max(config.train.batch_size, 256),
        rank=rank,
        world_size=world_size,
    )
    gc.collect()
    gc.freeze()  # what is here stays: no removal of neurons needs to look through it, which took a third of a second
    writer = Writer(checkpoints, _warn) if rank == 0 and checkpoints is not None else None

    def save(kept: dict[str, Any], at_once: bool) -> None:
        if writer is None:
            return
        writer.put(kept)
        if at_once:
            try:
                writer.flush(AT_ONCE_S)
            except StorageAwayError as error:
                _warn(str(error))

    if rank == 0 and (state is not None or config.workers.min is not None):
        on_note(_how_it_goes_on(state, world_size, micro_batches(config.train.batch_size, parts)))
    factor = None
    try:
        while True:
            run_state = build(
                network_arguments(config, shapes), image_shape=shapes.image, train=config.train, penalty=config.penalty,
                steps_per_epoch=len(training_data), device=device, state=state,
            )  # fmt: skip
            run_state.data_memory, run_state.num_micro_batches = memory, parts
            run_state.micro_batches = micro_batches(config.train.batch_size, parts)
            if factor is not None:
                run_state.rate_factor = factor
            try:
                loop.train(
                    run_state, config=config.train, penalty=config.penalty, training_data=training_data,
                    validation_data=validation_data, on_epoch=on_epoch, on_progress=on_progress, outside=Outside(request, save),
                )  # fmt: skip
                break
            except DivergedError as error:
                factor = run_state.rate_factor / 2
                if config.train.on_divergence == "stop" or factor < 0.5**MAX_RETURNS:
                    raise
                problem = str(error).partition(";")[0]
            run_state.optimizer.detach()
            del run_state
            if writer is not None:
                with contextlib.suppress(StorageAwayError):  # the one before will do
                    writer.flush(AT_ONCE_S)
            state = last_state(checkpoints)
            if rank == 0:
                at = Position() if state is None else Position(**state["position"])
                _warn(f"{problem}; back to epoch {at.epoch}, step {at.step}, with {factor:g} of the learning rate")
    finally:
        if writer is not None:
            writer.close(PATIENCE_S if sys.exc_info()[0] is None else AT_ONCE_S)
    return run_state


MAX_RETURNS = 5
"""Times that a training which diverges goes back to a checkpoint."""
AT_ONCE_S = 60.0
"""How long a process that is about to end waits for its last checkpoint."""


def num_micro_batches(config: RunConfig, state: Mapping[str, Any] | None) -> int:
    """Into how many micro-batches a step is cut, so that BatchNorm sees as many samples however many processes there are: the most
    processes that may take part, or what a run was begun with."""
    begun = None if state is None else state["num_micro_batches"]
    world_size = dist.get_world_size()
    if begun is not None and begun < world_size and dist.get_rank() == 0:
        _warn(
            f"the run was begun with {begun} micro-batches a step and goes on with {world_size}, one for each worker: BatchNorm sees fewer "
            f"samples at once; --workers.num {begun} keeps them"
        )
    return max(begun or config.workers.num, world_size)


def micro_batches(batch_size: int, parts: int) -> list[MicroBatch]:
    """Those of this process."""
    mine = order.parts_of(rank=dist.get_rank(), world_size=dist.get_world_size(), parts=parts)
    shares = {number: order.share(batch_size, rank=number, world_size=parts) for number in mine}
    return [MicroBatch(number, share.stop - share.start) for number, share in shares.items()]


def last_state(checkpoints: Checkpoints | None) -> dict[str, Any] | None:
    """A run's last good checkpoint, the same one in every process; None in all where there is none."""
    if checkpoints is None:
        return None
    found: list[str | None] = [None]
    state, problem = None, None
    try:
        if dist.get_rank() == 0 and (last := patiently(lambda: checkpoints.last(_warn), _warn)) is not None:
            found[0], state = last
    except (ValueError, StorageAwayError) as error:
        problem = error
    dist.broadcast_object_list(found, 0)
    name = found[0]
    try:
        if name is not None and state is None:
            state = patiently(lambda: checkpoints.read(name), _warn)
    except (ValueError, StorageAwayError) as error:
        problem = error
    problems: list[ValueError | StorageAwayError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for each in problems:
        if each is not None:
            raise each
    return state


def _how_it_goes_on(state: Mapping[str, Any] | None, world_size: int, mine: list[MicroBatch]) -> str:
    at = Position() if state is None else Position(**state["position"])
    place = f"epoch {at.epoch + 1}" + (f", step {at.step}" if at.step else "")
    workers = "one worker" if world_size == 1 else f"{world_size} workers"
    each = f"{len(mine)} micro-batch{'es' if len(mine) > 1 else ''} of {mine[0].size}"
    return f"{'begins with' if state is None else 'goes on with'} {workers} at {place}; a step is {each} on the first"


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def neuron_norms(neurons: Neurons) -> dict[str, Tensor]:
    """Each neuron's norm, {layer name: float32 (starting_neurons,)} on the CPU; 0 for those that were removed."""
    with torch.no_grad():
        return {
            layer.name: layer.in_starting_network(row_norms(neurons.parts(layer)).float().cpu())
            if layer.num_neurons else torch.zeros(layer.starting_neurons) for layer in neurons
        }  # fmt: skip


def dry_build(config: RunConfig, shapes: Shapes) -> Neurons:
    """The starting network's neurons, and every `ValueError` that building the run would raise, without data."""
    network = {**network_arguments(config, shapes), "pretrained": False}
    model, neurons = build_network(network, image_shape=shapes.image)
    start = config.data.start_size
    if start is not None:
        if not start <= shapes.size:
            raise ValueError(f"data.start_size is {start}, must be at most the full size {shapes.size}")
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(2, shapes.channels, start, start))
        except Exception as error:  # torchvision's networks assert
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"data.start_size: {config.network.name} takes no images of {start} pixels ({reason}); leave it out") from error
    if config.train.init is not None:
        initialise(model, neurons, config.train.init)
    starting_betas(
        config.penalty,
        neurons,
        steps_per_epoch=100,
        learning_rate=lambda s: config.train.learning_rate_at(s, steps_per_epoch=100),
    )
    config.penalty.alpha.of([layer.name for layer in neurons])
    return neurons
