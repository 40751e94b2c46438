"""Small trainings on one process that several test files use."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_gsl.penalty import PenaltyConfig, PerLayer, Schedule
from dist_gsl.training import loop
from dist_gsl.training.config import TrainConfig
from dist_gsl.training.state import RunState, build
from tests.device import DEVICE

NETWORK: dict[str, Any] = {"name": "dec3", "num_classes": 5, "width": 1 / 16, "batch_norm": False}
TRAIN = TrainConfig(
    epochs=4, batch_size=8, learning_rate=0.02, schedule="cosine", warmup_epochs=0.5, channels_last=False, shrink_multiple_of=1,
)  # fmt: skip
PENALTY = PenaltyConfig(beta=PerLayer(rest=1.7), unit="epochs", beta_schedule=Schedule(start=1, end=3))


@dataclass
class Batch:
    images: Tensor
    targets: Tensor


class TensorBatches:
    """Batches from tensors in memory, shuffled by epoch."""

    def __init__(self, *, num_steps: int = 6, batch_size: int = 8, regression: bool = False, size: int = 32, channels: int = 1, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(num_steps * batch_size, channels, size, size, generator=generator)
        self.targets = torch.randint(0, 5, (num_steps * batch_size,), generator=generator)
        if regression:
            self.targets = torch.randn(num_steps * batch_size, 5, generator=generator)
        self.num_steps, self.batch_size, self.epoch, self.start = num_steps, batch_size, 0, 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start = epoch, start_step

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.epoch))
        for rows in itertools.islice(order.split(self.batch_size), self.start, None):
            yield Batch(self.images[rows].to(DEVICE), self.targets[rows].to(DEVICE))


def trained(
    config: TrainConfig = TRAIN,
    penalty: PenaltyConfig = PENALTY,
    *,
    state: dict | None = None,
    network: dict | None = None,
) -> tuple[RunState, list[dict]]:
    data = TensorBatches(regression=config.loss == "square")
    run_state = build(
        network or NETWORK, image_shape=(1, 32, 32), train=config, penalty=penalty, steps_per_epoch=len(data),
        device=DEVICE, state=state,
    )  # fmt: skip
    records: list[dict] = []
    loop.train(
        run_state, config=config, penalty=penalty, training_data=data,
        validation_data=TensorBatches(regression=config.loss == "square"), on_epoch=lambda _, record: records.append(record),
    )  # fmt: skip
    return run_state, records


def equal(a: RunState, b: RunState, *, tolerance: float = 0.0) -> bool:
    return all(
        x.shape == y.shape and torch.allclose(x, y, rtol=tolerance, atol=tolerance)
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )


def equal_tensors(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Course:
    """A training that keeps the loss of each step and the parameters that were left before it."""

    def __init__(
        self, shrink: str, *, network: dict[str, Any], epochs: float, num_steps: int, batch_size: int = 8, size: int = 32, seed: int = 0,
        unit: str = "epochs", **options: Any,
    ) -> None:
        config = replace(TRAIN, epochs=8, batch_size=batch_size * dist.get_world_size(), shrink=shrink, **options)
        penalty = PenaltyConfig(beta=PerLayer(rest=epochs), unit=unit, beta_schedule=Schedule(start=1, end=6))
        data = TensorBatches(num_steps=num_steps, batch_size=batch_size, size=size, channels=network.get("in_channels", 1), seed=seed)
        self.state = build(
            network, image_shape=data.image_shape, train=config, penalty=penalty, steps_per_epoch=num_steps,
            device=DEVICE,
        )  # fmt: skip
        self.losses: list[float] = []
        self.sizes: list[int] = []
        self.records: list[dict[str, Any]] = []
        step = loop.train_step

        def kept(state: RunState, config: Any, batch: Any) -> Tensor:
            self.sizes.append(state.num_parameters)
            totals = step(state, config, batch)
            self.losses.append(float(totals[0]))
            return totals

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "train_step", kept)
            loop.train(
                self.state, config=config, penalty=penalty, training_data=data, validation_data=data,
                on_epoch=lambda _, record: self.records.append(record),
            )  # fmt: skip

    @property
    def num_removals(self) -> int:
        return len(set(self.sizes)) - 1
