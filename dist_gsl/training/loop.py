"""The training loop: epochs of steps, an evaluation after each. Imports torch alone; loaders and reports are passed in."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dist_gsl.measures import measure
from dist_gsl.penalty import PenaltyConfig
from dist_gsl.training.config import TrainConfig
from dist_gsl.training.shrinking import Rule, shrink
from dist_gsl.training.state import MicroBatch, Position, RunState
from dist_gsl.training.statistics import NUM_STEPS, estimate_statistics
from dist_gsl.training.steering import shortfall, steer
from dist_gsl.training.watch import Outside, Watch


class Batch(Protocol):
    images: Tensor
    targets: Tensor


class Batches(Protocol):
    """What a loader offers."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int, start_step: int = 0) -> None: ...


@dataclass
class Progress:
    """Where a training stands within an epoch."""

    epoch: int
    step: int
    num_steps: int
    loss: float
    images_per_second: float


def train(
    state: RunState,
    *,
    config: TrainConfig,
    penalty: PenaltyConfig,
    training_data: Batches,
    validation_data: Batches,
    on_epoch: Callable[[RunState, dict[str, Any]], None],
    on_progress: Callable[[Progress], None] = lambda progress: None,
    outside: Outside | None = None,
) -> None:
    """Trains from the state's position to the last epoch; `on_epoch` gets a record after each, before its state is kept.

    The loss is a sum over samples; the optimizer's hook divides by the samples of all workers. Every micro-batch starts its
    random generators from (seed, epoch, step, its number), so that a position is all there is to resume from.

    `DivergedError` and `StoppedError` in every process at the same step.
    """
    device = next(state.model.parameters()).device
    steps_per_epoch = len(training_data)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rule = Rule.parse("never" if penalty.revive else config.shrink)
    watch = Watch(config, outside or Outside())
    for epoch in range(state.position.epoch, config.epochs):
        start = state.position.step
        training_data.set_epoch(epoch, start)
        state.ddp.train()
        # On the device until the epoch's end: reading a number would wait for the step.
        totals = _totals_before(state).to(device)  # loss, correct, samples
        samples_before, seconds_before = float(totals[2]), state.seconds
        watch.begin_epoch(totals)
        began = time.perf_counter()
        # A state that was kept before the epoch's evaluation has no step left.
        for step, batch in enumerate(training_data if start < steps_per_epoch else (), start=start):
            learning_rate = config.learning_rate_at(epoch * steps_per_epoch + step, steps_per_epoch=steps_per_epoch)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate * state.rate_factor
            if step == start:
                _check_batch_size(config, batch)
            if state.uninformed_loss is None:
                state.uninformed_loss = _uninformed_loss(state, config, batch.targets)
            totals += train_step(state, config, batch)
            state.position = Position(epoch, step + 1)
            steer(state, epoch * steps_per_epoch + step + 1)
            shrink(state, rule, epoch * steps_per_epoch + step + 1)
            seconds = time.perf_counter() - began
            state.seconds = seconds_before + seconds
            is_last = step + 1 == steps_per_epoch
            if rank == 0 and (step % 10 == 9 or is_last):
                speed = (float(totals[2]) - samples_before) * world_size / seconds
                on_progress(Progress(epoch, step + 1, steps_per_epoch, float(totals[0] / totals[2]), speed))
            watch.after_step(state, totals, steps_done=step + 1 - start, step=epoch * steps_per_epoch + step + 1, is_last=is_last)
        if state.steering is None:  # or that runs the operator
            state.optimizer.end_epoch()
        shrink(state, rule, (epoch + 1) * steps_per_epoch, epoch_ends=True)
        seconds = seconds_before + time.perf_counter() - began
        state.position, state.seconds = Position(epoch + 1, 0), 0.0
        dist.all_reduce(totals)
        if state.average is not None and rank == 0:
            training_data.set_epoch(epoch, max(0, steps_per_epoch - NUM_STEPS))
            estimate_statistics(state.average.module, (part for batch in training_data for part in _first_parts(state, config, batch)))
        for buffer in state.evaluated.buffers():  # running statistics are each worker's own
            dist.broadcast(buffer, 0)
        kept = None
        if state.average is None and state.steering is not None and state.steering.has_just_shrunk((epoch + 1) * steps_per_epoch):
            # Running statistics are of filters that have shrunk since, all at once: with them the network would be at chance.
            kept = [buffer.clone() for buffer in state.evaluated.buffers()]
            if rank == 0:
                training_data.set_epoch(epoch, max(0, steps_per_epoch - NUM_STEPS))
                estimate_statistics(state.evaluated, (part for batch in training_data for part in _first_parts(state, config, batch)))
            for buffer in state.evaluated.buffers():
                dist.broadcast(buffer, 0)
        validation = evaluate(state.evaluated, validation_data, config, device=device)
        if kept is not None and epoch + 1 < config.epochs:  # training goes on with its own
            for buffer, value in zip(state.evaluated.buffers(), kept, strict=True):
                buffer.copy_(value)
        record = {
            "epoch": epoch + 1,
            "train_loss": float(totals[0] / totals[2]),
            "train_top1": 100 * float(totals[1] / totals[2]),
            **{f"val_{key}": value for key, value in validation.items()},
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            "beta_factor": _beta_factor(state, penalty, epoch, steps_per_epoch),
            **measure(state.evaluated, state.neurons).as_dict(),
            "parameters": state.num_parameters,
            "workers": world_size,
            "images_per_second": float(totals[2]) / seconds,
            "seconds": seconds,
            "alive": {layer.name: int(layer.mask.sum()) for layer in state.neurons},
        }
        if config.loss == "square":
            del record["train_top1"]
        state.history.append(record)
        on_epoch(state, record)
        watch.end_epoch(state)
    if rank == 0 and (missing := shortfall(state)) is not None:
        warnings.warn(missing, stacklevel=2)


def _beta_factor(state: RunState, penalty: PenaltyConfig, epoch: int, steps_per_epoch: int) -> float:
    if not penalty.enabled:
        return 0.0
    return penalty.beta_schedule.factor(epoch) if state.steering is None else state.steering.at((epoch + 1) * steps_per_epoch - 1)


def _uninformed_loss(state: RunState, config: TrainConfig, targets: Tensor) -> float:
    """The loss of one that answers all classes alike, or zeros."""
    if config.loss == "cross-entropy":
        return math.log(max(2, state.network["num_classes"]))
    mine = torch.stack([targets.double().square().sum(), torch.tensor(float(len(targets)), dtype=torch.float64, device=targets.device)])
    dist.all_reduce(mine)
    return float(mine[0] / mine[1].clamp_min(1))


def _check_batch_size(config: TrainConfig, batch: Batch) -> None:
    """Gradients are divided by it. `ValueError` in every process where they do not have as many samples between them."""
    count = torch.tensor(len(batch.targets), device=batch.targets.device)
    dist.all_reduce(count)
    if int(count) != config.batch_size:
        raise ValueError(f"training data: a step has {int(count)} samples over all processes, train.batch_size is {config.batch_size}")


def _seed(seed: int, epoch: int, step: int, number: int) -> int:
    return (((seed * 1_000_003 + epoch) * 1_000_003 + step) * 1_000_003 + number) % 2**63


def _totals_before(state: RunState) -> Tensor:
    """What this process has summed in the epoch up to the state's position, float64 (3,).

    With another number of processes than before, the first one has it all.
    """
    rank, kept = dist.get_rank(), state.totals or []
    if len(kept) == dist.get_world_size():
        return torch.tensor(kept[rank], dtype=torch.float64)
    return torch.tensor(kept, dtype=torch.float64).reshape(-1, 3).sum(0) if rank == 0 else torch.zeros(3, dtype=torch.float64)


def train_step(state: RunState, config: TrainConfig, batch: Batch) -> Tensor:
    """One step; (loss sum, correct answers, samples) of this worker, float64 (3,).

    What a micro-batch computes does not depend on which process computes it: BatchNorm sees its samples alone, random numbers follow from
    its number, and buffers such as running statistics are those that the first one leaves, as all processes take them from the first in the end.
    """
    state.optimizer.zero_grad()
    state.optimizer.set_num_samples(len(batch.targets), total=config.batch_size)
    micro_batches = _micro_batches(state, batch)
    sizes = [each.size for each in micro_batches]
    buffers = [b for b in state.model.buffers() if b.numel()] if len(sizes) > 1 else []
    first_buffers: list[Tensor] = []
    totals = torch.zeros(3, dtype=torch.float64, device=batch.images.device)
    for micro_batch, images, targets in zip(micro_batches, batch.images.split(sizes), batch.targets.split(sizes), strict=True):
        torch.manual_seed(_seed(config.seed, state.position.epoch, state.position.step, micro_batch.number))
        totals += _forward_and_backward(state, config, images, targets, is_last=micro_batch is micro_batches[-1])
        if buffers and not first_buffers:
            first_buffers = [b.clone() for b in buffers]
    if buffers:
        with torch.no_grad():
            torch._foreach_copy_(buffers, first_buffers)
    if state.average is not None:
        state.average.update_parameters(state.model)
    return totals


def _micro_batches(state: RunState, batch: Batch) -> list[MicroBatch]:
    """Of this worker's part of a step."""
    return state.micro_batches or [MicroBatch(dist.get_rank(), len(batch.targets))]


def _first_parts(state: RunState, config: TrainConfig, batch: Batch) -> tuple[Tensor, ...]:
    """The images of the forward passes whose running statistics a step leaves, by the first process."""
    images = batch.images[: _micro_batches(state, batch)[0].size]
    return images.tensor_split(max(1, min(config.accumulate, len(images))))


def _forward_and_backward(state: RunState, config: TrainConfig, images: Tensor, targets: Tensor, *, is_last: bool) -> Tensor:
    parts = max(1, min(config.accumulate, len(targets)))
    totals = torch.zeros(3, dtype=torch.float64, device=images.device)
    for i, (some, theirs) in enumerate(zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)):
        # Gradients of all but the last part stay on this worker.
        with contextlib.nullcontext() if is_last and i + 1 == parts else state.ddp.no_sync():
            with torch.autocast(some.device.type, torch.bfloat16, enabled=config.autocast):
                outputs = state.ddp(some)
            loss = sum_loss(_precise(outputs), theirs, config)
            loss.backward()
        totals += torch.stack(
            [
                loss.detach().double(),
                _correct(outputs, theirs, 1),
                torch.full((), len(theirs), dtype=torch.float64, device=loss.device),  # a number that is copied makes the host wait for the device
            ]
        )
    return totals


def _precise(outputs: Tensor) -> Tensor:
    """A loss takes more than the bits of bfloat16, and no fewer than the network has."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def sum_loss(outputs: Tensor, targets: Tensor, config: TrainConfig) -> Tensor:
    """The loss summed over samples: cross-entropy of outputs (B, classes), or square loss of outputs (B, K)."""
    if config.loss == "square":
        return F.mse_loss(outputs, targets, reduction="sum")
    return F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=config.label_smoothing)


@torch.no_grad()
def evaluate(model: nn.Module, data: Iterable[Any], config: TrainConfig, *, device: torch.device) -> dict[str, float]:
    """Loss and percentages over a whole split, every sample once, over all workers.

    "loss", "top1" and "top5" for classes; "loss" and "rmse" (in units of the target) for regression.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top 1, top 5, samples
    for batch in data:
        outputs = _precise(model(batch.images.to(device)))
        targets = batch.targets.to(device)
        loss = (
            F.mse_loss(outputs, targets, reduction="sum")
            if config.loss == "square"
            else F.cross_entropy(outputs, targets, reduction="sum")
        )
        count = torch.full((), len(targets), dtype=torch.float64, device=device)
        totals += torch.stack([loss.double(), _correct(outputs, targets, 1), _correct(outputs, targets, 5), count])
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(totals)
    loss, top1, top5, count = totals.tolist()
    if config.loss == "square":
        return {"loss": loss / count, "rmse": (loss / count) ** 0.5}
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


def _correct(outputs: Tensor, targets: Tensor, k: int) -> Tensor:
    if targets.is_floating_point():
        return torch.zeros((), dtype=torch.float64, device=outputs.device)
    best = outputs.topk(min(k, outputs.shape[1]), dim=1).indices
    return (best == targets[:, None]).any(dim=1).sum().double()
