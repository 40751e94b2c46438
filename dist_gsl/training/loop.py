"""The training loop: epochs of steps, an evaluation after each. Imports torch alone; loaders and reports are passed in."""

from __future__ import annotations

import contextlib
import time
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
from dist_gsl.training.state import Position, RunState


class DivergedError(RuntimeError):
    """The loss is not finite. Every worker raises it in the same epoch, and trying again would end the same way."""


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
) -> None:
    """Trains from the state's position to the last epoch; `on_epoch` gets a record after each.

    The loss is a sum over samples; the optimizer's hook divides by the samples of all workers. Every epoch starts its
    random generators from (seed, epoch, rank), so that a position is all there is to resume from.
    """
    device = next(state.model.parameters()).device
    steps_per_epoch = len(training_data)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rule = Rule.parse("never" if penalty.revive else config.shrink)
    for epoch in range(state.position.epoch, config.epochs):
        start = state.position.step
        torch.manual_seed(((config.seed * 1_000_003 + epoch) * 1_000_003 + rank) % 2**63)
        training_data.set_epoch(epoch, start)
        state.ddp.train()
        # On the device until the epoch's end: reading a number would wait for the step.
        totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, samples
        began = time.perf_counter()
        for step, batch in enumerate(training_data, start=start):
            learning_rate = config.learning_rate_at(epoch * steps_per_epoch + step, steps_per_epoch=steps_per_epoch)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate
            totals += train_step(state, config, batch)
            state.position = Position(epoch, step + 1)
            shrink(state, rule, epoch * steps_per_epoch + step + 1)
            if rank == 0 and (step % 10 == 9 or step + 1 == steps_per_epoch):
                seconds = time.perf_counter() - began
                on_progress(
                    Progress(
                        epoch,
                        step + 1,
                        steps_per_epoch,
                        float(totals[0] / totals[2]),
                        float(totals[2]) * world_size / seconds,
                    )
                )
        state.optimizer.end_epoch()
        shrink(state, rule, (epoch + 1) * steps_per_epoch, epoch_ends=True)
        seconds = time.perf_counter() - began
        state.position = Position(epoch + 1, 0)
        dist.all_reduce(totals)
        if not bool(torch.isfinite(totals[0])):
            raise DivergedError(
                f"the loss is not finite in epoch {epoch + 1}; lower train.learning_rate or set train.max_grad_norm"
            )
        for buffer in state.evaluated.buffers():  # running statistics are each worker's own until the next forward
            dist.broadcast(buffer, 0)
        validation = evaluate(state.evaluated, validation_data, config, device=device)
        record = {
            "epoch": epoch + 1,
            "train_loss": float(totals[0] / totals[2]),
            "train_top1": 100 * float(totals[1] / totals[2]),
            **{f"val_{key}": value for key, value in validation.items()},
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            "beta_factor": penalty.beta_schedule.factor(epoch) if penalty.enabled else 0.0,
            **measure(state.evaluated, state.neurons).as_dict(),
            "parameters": state.num_parameters,
            "images_per_second": float(totals[2]) / seconds,
            "seconds": seconds,
            "alive": {layer.name: int(layer.mask.sum()) for layer in state.neurons},
        }
        if config.loss == "square":
            del record["train_top1"]
        state.history.append(record)
        on_epoch(state, record)


def train_step(state: RunState, config: TrainConfig, batch: Batch) -> Tensor:
    """One step; (loss sum, correct answers, samples) of this worker, float64 (3,)."""
    state.optimizer.zero_grad()
    num_samples = len(batch.targets)
    state.optimizer.set_num_samples(num_samples)
    parts = max(1, min(config.accumulate, num_samples))
    totals = torch.zeros(3, dtype=torch.float64, device=batch.images.device)
    for i, (images, targets) in enumerate(
        zip(batch.images.tensor_split(parts), batch.targets.tensor_split(parts), strict=True)
    ):
        # Gradients of all but the last part stay on this worker.
        with state.ddp.no_sync() if i + 1 < parts else contextlib.nullcontext():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=config.autocast):
                outputs = state.ddp(images)
            loss = sum_loss(outputs.float(), targets, config)
            loss.backward()
        totals += torch.stack(
            [
                loss.detach().double(),
                _correct(outputs, targets, 1),
                torch.tensor(float(len(targets)), dtype=torch.float64, device=loss.device),
            ]
        )
    if state.average is not None:
        state.average.update_parameters(state.model)
    return totals


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
        outputs = model(batch.images.to(device)).float()
        targets = batch.targets.to(device)
        loss = (
            F.mse_loss(outputs, targets, reduction="sum")
            if config.loss == "square"
            else F.cross_entropy(outputs, targets, reduction="sum")
        )
        count = torch.tensor(float(len(targets)), dtype=torch.float64, device=device)
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
