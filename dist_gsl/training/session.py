"""One process's part of a training: its loaders, its state, the loop. Needs a process group, knows nothing of Ray."""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_gsl import data, heap
from dist_gsl.config import RunConfig
from dist_gsl.data import order
from dist_gsl.data.loader import DEFAULT_SIZE
from dist_gsl.neurons import Neurons
from dist_gsl.penalty import PenaltyConfig, row_norms, starting_betas
from dist_gsl.storage import StorageAwayError
from dist_gsl.training import loop
from dist_gsl.training.checkpoint import PATIENCE_S, Checkpoints, NotWrittenError, Writer, patiently
from dist_gsl.training.config import TrainConfig
from dist_gsl.training.loop import Progress
from dist_gsl.training.state import MicroBatch, Position, RunState, build, build_network, initialise
from dist_gsl.training.watch import CommonError, DivergedError, Outside, Request


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


@dataclass(frozen=True)
class Place:
    """Where a training is kept, and what hears of it. Each may be left as it is."""

    checkpoints: Checkpoints | None = None
    on_epoch: Callable[[RunState, dict[str, Any]], None] = lambda state, record: None
    on_progress: Callable[[Progress], None] = lambda progress: None
    on_back: Callable[[int], None] = lambda epoch: None
    """Hears after which epoch a training goes on that went back to a checkpoint: what was told of later ones holds no more."""
    on_note: Callable[[str], None] = lambda text: None
    """Hears how it goes on from a checkpoint, and with how many processes where that may change."""
    request: Callable[[], Request] = lambda: Request.NONE
    """What the process hears from outside, asked about once a second."""


class Session:
    """What one process trains with, whatever the phase: its loaders and its share of every step."""

    def __init__(self, config: RunConfig, *, data_dir: Path, device: torch.device, state: Mapping[str, Any] | None) -> None:
        """state: what the run goes on from; it keeps the order of its samples and the cut of its steps."""
        heap.keep_freed()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.config, self.device = config, device
        self.shapes = shapes_of(config, data.dataset_info(data_dir))
        self.memory = data_memory(config, data_dir / "train.beton", state)
        self.parts = num_micro_batches(config, state)
        self.training_data = make_loader(
            config, "train", data_dir, device=device, train=True, rank=rank, world_size=world_size, parts=self.parts, memory=self.memory
        )
        self.validation_data = make_loader(
            config, "val", data_dir, device=device, batch_size=max(config.train.batch_size, 256), rank=rank, world_size=world_size
        )
        self.micro_batches = micro_batches(config.train.batch_size, self.parts)
        gc.collect()
        gc.freeze()  # what is here stays: no removal of neurons needs to look through it, which took a third of a second

    def train(
        self,
        train: TrainConfig,
        penalty: PenaltyConfig,
        place: Place,
        start: tuple[str, dict[str, Any]] | None,
        *,
        betas: Mapping[str, float] | None = None,
    ) -> RunState:
        """Trains to the last epoch of `train`, and keeps checkpoints on the way.

        start: (name of the checkpoint, state) to go on from; None: the beginning. The state is emptied, or it would stay in memory.
        betas: of a part of a training, in the place of those in any state that is gone on from; a part does not go back before its start.

        In every process at the same step: `DivergedError`; `UnavailableError` where there are checkpoints and none can be read, or
        the last one cannot be written; `StoppedError`, the state being kept.
        """
        is_first, checkpoints = dist.get_rank() == 0, place.checkpoints
        writer = Writer(checkpoints, warn) if is_first and checkpoints is not None else None

        def save(kept: dict[str, Any], at_once: bool) -> None:
            if writer is None:
                return
            writer.put(kept)
            if at_once:
                try:
                    writer.flush(AT_ONCE_S)
                except NotWrittenError as error:
                    warn(str(error))

        begun_from, state = (None, None) if start is None else start
        returned_to = start = None
        factor = None
        try:
            while True:
                if state is not None and betas is not None:
                    state["betas"] = dict(betas)
                run_state = build(
                    network_arguments(self.config, self.shapes), image_shape=self.shapes.image, train=train, penalty=penalty,
                    steps_per_epoch=len(self.training_data), device=self.device, state=state,
                )  # fmt: skip
                if state is not None:
                    state.clear()
                run_state.data_memory, run_state.num_micro_batches = self.memory, self.parts
                run_state.micro_batches = self.micro_batches
                if factor is not None:
                    run_state.rate_factor = factor
                try:
                    loop.train(
                        run_state, config=train, penalty=penalty, training_data=self.training_data, validation_data=self.validation_data,
                        on_epoch=place.on_epoch, on_progress=place.on_progress, outside=Outside(place.request, save),
                    )  # fmt: skip
                    break
                except DivergedError as error:
                    if train.on_divergence == "stop":
                        raise
                    problem, factor = str(error).partition(";")[0], run_state.rate_factor / 2
                    if factor < 0.5**MAX_RETURNS:
                        raise DivergedError(
                            f"{problem}, with {run_state.rate_factor:g} of the learning rate too; set a lower train.learning_rate or a "
                            "train.max_grad_norm in a new run"
                        ) from error
                run_state.optimizer.detach()
                del run_state
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                if writer is not None:
                    writer.discard()  # the one before will do
                is_start = betas is not None and returned_to == begun_from
                last = last_state(checkpoints, not_again=None if is_start else returned_to)
                returned_to, state = (None, None) if last is None else last
                if is_first:
                    at = Position() if state is None else Position(**state["position"])
                    place.on_back(at.epoch)
                    warn(f"{problem}; back to epoch {at.epoch}, step {at.step}, with {factor:g} of the learning rate")
        except BaseException:
            if writer is not None:
                try:
                    writer.close(AT_ONCE_S)
                except NotWrittenError as error:  # what happened first is what is raised
                    warn(str(error))
            raise
        _close(writer)
        return run_state


def _close(writer: Writer | None) -> None:
    problem = None
    if writer is not None:
        try:
            writer.close(PATIENCE_S)
        except NotWrittenError as error:
            problem = str(error)
    raise_together(problem)


def raise_together(problem: str | None) -> None:
    """What the first process has to say is an `UnavailableError` in all; None: nothing."""
    found = [problem]
    dist.broadcast_object_list(found, 0)
    if found[0] is not None:
        raise UnavailableError(found[0])


def run(config: RunConfig, *, data_dir: Path, device: torch.device, place: Place) -> RunState:
    """Trains this process's share of a run to its end, from its last good checkpoint if it has one. Errors as `Session.train`."""
    last = last_state(place.checkpoints)
    session = Session(config, data_dir=data_dir, device=device, state=None if last is None else last[1])
    if dist.get_rank() == 0 and (last is not None or config.workers.min is not None):
        place.on_note(_how_it_goes_on(None if last is None else last[1], dist.get_world_size(), session.micro_batches))
    return session.train(config.train, config.penalty, place, last)


class UnavailableError(CommonError):
    """There are checkpoints, and none can be read; or the last one cannot be written."""


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
        warn(
            f"the run was begun with {begun} micro-batches a step and goes on with {world_size}, one for each worker: BatchNorm sees fewer "
            f"samples at once; --workers.num {begun} keeps them"
        )
    return max(begun or config.workers.num, world_size)


def micro_batches(batch_size: int, parts: int) -> list[MicroBatch]:
    """Those of this process."""
    mine = order.parts_of(rank=dist.get_rank(), world_size=dist.get_world_size(), parts=parts)
    shares = {number: order.share(batch_size, rank=number, world_size=parts) for number in mine}
    return [MicroBatch(number, share.stop - share.start) for number, share in shares.items()]


def last_state(checkpoints: Checkpoints | None, *, not_again: str | None = None) -> tuple[str, dict[str, Any]] | None:
    """(name, state) of a run's last good checkpoint, the same one in every process; None in all where there is none.

    not_again: the one gone on from last time. Where it is still the last, training from it came to nothing: the one before is taken, if
    there is one.

    `UnavailableError`.
    """
    if checkpoints is None:
        return None
    found: list[str | None] = [None]
    state, problem = None, None
    try:
        if dist.get_rank() == 0:
            last = checkpoints.last(warn, patience_s=PATIENCE_S)
            if last is not None and last[0] == not_again and checkpoints.pass_over(last[0]):
                last = checkpoints.last(warn, patience_s=PATIENCE_S)
            if last is not None:
                found[0], state = last
    except (ValueError, StorageAwayError) as error:
        problem = str(error)
    dist.broadcast_object_list(found, 0)
    name = found[0]
    try:
        if name is not None and state is None:
            state = patiently(lambda: checkpoints.read(name), warn)
    except (ValueError, StorageAwayError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for each in problems:
        if each is not None:
            raise UnavailableError(each)
    return None if name is None or state is None else (name, state)


def _how_it_goes_on(state: Mapping[str, Any] | None, world_size: int, mine: list[MicroBatch]) -> str:
    at = Position() if state is None else Position(**state["position"])
    place = f"epoch {at.epoch + 1}" + (f", step {at.step}" if at.step else "")
    workers = "one worker" if world_size == 1 else f"{world_size} workers"
    each = f"{len(mine)} micro-batch{'es' if len(mine) > 1 else ''} of {mine[0].size}"
    return f"{'begins with' if state is None else 'goes on with'} {workers} at {place}; a step is {each} on the first"


def warn(text: str) -> None:
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
        at_random = initialise(model, neurons, config.train.init)
        if at_random:
            warnings.warn(f"train.init: {config.train.init} has another number of outputs: {', '.join(at_random)} start at random", stacklevel=2)
    starting_betas(
        config.penalty,
        neurons,
        steps_per_epoch=100,
        learning_rate=lambda s: config.train.learning_rate_at(s, steps_per_epoch=100),
    )
    config.penalty.alpha.of([layer.name for layer in neurons])
    return neurons
