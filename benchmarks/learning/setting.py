"""What all methods of the comparison have in common: data, network, epochs, schedule, and how a result is measured.

The course is the demo's, scaled to the epochs of a setting: all have the same epochs and the same rates in them. A method that cuts and fine-tunes
cuts before the first drop of the rate, and has the rest of the same epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_gsl import data
from dist_gsl.config import RunConfig
from dist_gsl.recipes import find
from dist_gsl.training import session

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where all methods train."""


class Batch(NamedTuple):
    images: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Setting:
    """A size of the comparison."""

    name: str
    num_train: int
    width: float
    """Of Dec3, as a share of the paper's."""
    epochs: int
    num_evaluated: int = 5000
    """Images of the validation split, and of the test split."""
    batch_size: int = 64
    weight_decay: float = field(default=5e-4, compare=False)
    """Of which the images, that are kept for each setting, are independent."""

    @property
    def cut(self) -> float:
        """Epochs after which a method that cuts and fine-tunes cuts."""
        return 9.5 / 16 * self.epochs

    def config(self, seed: int) -> RunConfig:
        """The demo's, over the epochs of this setting, by one process."""
        demo = find("dec3-chars")
        scale = self.epochs / demo.train.epochs
        schedule = demo.penalty.beta_schedule
        return replace(
            demo, network=replace(demo.network, width=self.width),
            data=replace(demo.data, num_train=self.num_train, num_val=self.num_evaluated, num_test=self.num_evaluated),
            penalty=replace(demo.penalty, beta_schedule=replace(schedule, start=schedule.start * scale, end=None if schedule.end is None else schedule.end * scale)),
            train=replace(
                demo.train, epochs=self.epochs, batch_size=self.batch_size, weight_decay=self.weight_decay, seed=seed, drop_epochs=tuple(scale * each for each in demo.train.drop_epochs),
                warmup_epochs=demo.train.warmup_epochs * scale,
            ),
            workers=replace(demo.workers, num=1),
        )  # fmt: skip


SETTINGS = {
    each.name: each
    for each in (
        Setting("tiny", num_train=64, width=1 / 16, epochs=8, num_evaluated=100, batch_size=32),
        Setting("small", num_train=2000, width=0.125, epochs=16),
        Setting("large", num_train=185_639, width=1.0, epochs=45, batch_size=256),
    )
}
"""tiny says nothing but that all of it runs."""


class Images(NamedTuple):
    """A split in memory, as the loader gives it."""

    images: Tensor
    targets: Tensor


@cache
def images_of(setting: Setting, split: str) -> Images:
    """A split of the setting's data, written where it is not there yet."""
    config = setting.config(0)
    loader = session.make_loader(config, split, data.prepare(config.data).absolute(), train=False)
    batches = [(batch.images.clone(), batch.targets.clone()) for batch in loader]
    return Images(torch.cat([images for images, _ in batches]).to(DEVICE), torch.cat([targets for _, targets in batches]).to(DEVICE))


class Batches:
    """The training split in memory, in an order that follows from (seed, epoch); as the training loop takes it."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.images, self.targets = images_of(setting, "train")
        self.seed, self.size = seed, setting.config(seed).train.batch_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.order = torch.randperm(len(self.targets), generator=torch.Generator().manual_seed(1_000_003 * self.seed + epoch))
        self.start = start_step

    def __len__(self) -> int:
        return len(self.targets) // self.size

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.start, len(self)):
            which = self.order[step * self.size : (step + 1) * self.size].to(DEVICE)
            yield Batch(self.images[which].contiguous(memory_format=torch.channels_last), self.targets[which])


class Split:
    """Another split, for an evaluation; or its first images alone."""

    def __init__(self, setting: Setting, split: str, size: int = 250, *, most: int | None = None) -> None:
        images, targets = images_of(setting, split)
        self.found, self.size = Images(images[:most], targets[:most]), size

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        pass

    def __len__(self) -> int:
        return -(-len(self.found.targets) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        for images, targets in zip(self.found.images.split(self.size), self.found.targets.split(self.size), strict=True):
            yield Batch(images, targets)


@torch.no_grad()
def top1(model: nn.Module, setting: Setting, split: str, *, most: int | None = None) -> float:
    """Percent of a split, or of its first images, that a network answers right."""
    model.eval()
    images = Split(setting, split, most=most)
    right = sum(int((model(batch.images).argmax(1) == batch.targets).sum()) for batch in images)
    return 100 * right / len(images.found.targets)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.images), batch.targets)


@dataclass
class Outcome:
    """A network that a method came to."""

    model: nn.Module
    """That computes what is evaluated."""
    neurons: float
    """Percent of the convolution neurons of the network that it started from that are gone, as in the paper's first measure."""
    parameters: int
    """That are left once they are."""
    zero_parameters: float
    """Percent of the convolution parameters that are zero, wherever: the paper's count for L1."""
    widths: dict[str, int]
    """Neurons left in each layer."""
    extra: dict[str, Any]
