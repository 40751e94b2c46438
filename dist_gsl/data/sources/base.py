"""What a source is: for each split an indexable set of images and targets, and what they are about.

Shapes: an image is uint8, (H, W) where the source is grey and (H, W, 3) where it is in colour; a target is a class
number, or float32 of shape (K,) where the task is regression.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_gsl.data import images


class ImageKind(Enum):
    """How many channels an image has, and so how it is stored: grey without loss, colour as JPEG or raw."""

    GREY = "grey"
    COLOUR = "colour"

    @property
    def channels(self) -> int:
        return 1 if self is ImageKind.GREY else 3


class Task(Enum):
    """What a target is: the number of a class, or a vector of real numbers for the square loss."""

    CLASSIFICATION = "classification"
    REGRESSION = "regression"


class Sample(NamedTuple):
    """An image, uint8 (H, W) or (H, W, 3), and its target: a class number or float32 (K,)."""

    image: NDArray[np.uint8]
    target: int | NDArray[np.float32]


class Samples(ABC):
    """The samples of one split, by position."""

    block: int = 64
    """So many samples one after another are best read by one process."""
    may_fork: bool = True
    """May they be read in forked processes? Else threads do it: connections to storage do not survive a fork."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, position: int) -> tuple[NDArray[np.uint8] | bytes, int | NDArray[np.float32]]:
        """The image at `position`, as an array or as the bytes of its file, and its target. OSError where it cannot be read."""

    def __getitem__(self, position: int) -> Sample:
        """The sample at `position`, decoded. ValueError, with its name, where that cannot be done."""
        content, target = self.read(position)
        if not isinstance(content, bytes):
            return Sample(content, target)
        try:
            return Sample(images.decode(content).pixels, target)
        except images.BadImageError as error:
            raise ValueError(f"image {self.describe(position)} {error}: repair it or take it out of the folder") from error

    def shape(self) -> tuple[int, int]:
        """(height, width) of images in grey, all of which are as large."""
        height, width = self[0].image.shape[:2]
        return height, width

    def describe(self, position: int) -> str:
        """The sample's name in a message to the user."""
        return f"number {position}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set that can be written: its splits, and what its images and targets are."""

    spec: str
    kind: ImageKind
    task: Task
    classes: tuple[str, ...]
    """Names of the classes, by label; empty for regression."""
    num_targets: int
    """Number of real numbers K in a target; 0 for classification."""
    splits: Mapping[str, Samples]
    fingerprint: str
    """Changes whenever the samples of the same spec and seed do."""


def fingerprint(**settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_split_names(counts: Mapping[str, int], known: Sequence[str], *, spec: str) -> None:
    for split in counts:
        if split not in known:
            raise ValueError(f"data source {spec!r} has no split {split!r}: its splits are {', '.join(known)}")
