"""Which data a run uses, and how it reads them."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from dist_gsl.storage import is_uri

SIZE_STEP: Final = 32
"""Pixels: as most networks halve an image five times, others would be cut off at the border."""


class Augment(Enum):
    """What is done at random to an image of the training split."""

    NONE = "none"
    """Nothing: as in evaluation."""
    CROP_FLIP = "crop-flip"
    """The paper's for ImageNet: of the central square, a square of 224/256 of its side from a random place, mirrored or not."""
    RANDOM_RESIZED = "random-resized"
    """From 8 to 100 % of the image's area, of a shape from 3:4 to 4:3, from a random place, mirrored or not."""
    SHIFT = "shift"
    """For characters: shifted by up to 2 pixels each way, the border repeated."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run."""

    source: str = "chars"
    """Where the images come from: chars, digits, rotated-digits, or KIND:PATH with imagefolder, imagenet, places2, icdar, parquet or webdataset."""
    dir: str | None = None
    """Folder with the written .beton files, or its URI (s3://...), from which each node copies them once. None: written on first use to SOURCE-HASH in DIST_GSL_DATA, or else in ./data."""
    seed: int = 0
    """Seed of the data set itself, for sources that render or draw it."""
    num_train: int | None = None
    """Number of training samples. None: as many as the source has by default."""
    num_val: int | None = None
    """Number of validation samples. None: as many as the source has by default."""
    num_test: int | None = None
    """Number of test samples. None: as many as the source has by default."""
    size: int | None = None
    """Side in pixels of the images that the network sees. None: that of grey images, 224 for colour."""
    start_size: int | None = None
    """Progressive resizing: side of colour training images in the first epoch, growing evenly by multiples of 32 pixels. None: `size` in all."""
    full_size_epoch: int = 0
    """With `start_size`: the first epoch, counted from 0, whose training images are of full size."""
    memory_gb: float | None = None
    """Memory of each node for the training file. A larger file is read in quasi-random order, whole pages at random and samples at random among those that fit. None: half of what the node has as the run begins."""
    augment: Augment = Augment.NONE
    """What is done at random to training images."""
    num_threads: int = 1
    """Threads that decode images, for each process."""

    def __post_init__(self) -> None:
        checks = [
            ("start_size", self.start_size is None or self.start_size >= 8, "at least 8 pixels"),
            ("full_size_epoch", (self.full_size_epoch > 0) == (self.start_size is not None), "at least 1 with data.start_size, and 0 without"),
            ("memory_gb", self.memory_gb is None or self.memory_gb > 0, "above 0, or left out"),
        ]
        for name, is_good, wanted in checks:
            if not is_good:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}, must be {wanted}")

    def train_size(self, epoch: int, *, full: int) -> int:
        """Side in pixels of the training images of an epoch, `full` from `full_size_epoch` on."""
        if self.start_size is None or epoch >= self.full_size_epoch:
            return full
        grown = self.start_size + (full - self.start_size) * epoch // self.full_size_epoch
        return max(self.start_size, grown // SIZE_STEP * SIZE_STEP)

    def counts(self) -> dict[str, int]:
        """The number of samples of those splits for which one was given."""
        given = {"train": self.num_train, "val": self.num_val, "test": self.num_test}
        return {split: count for split, count in given.items() if count is not None}

    def directory(self) -> Path:
        """The folder of the files: `dir`, or one whose name follows from the settings that the files follow from.

        `ValueError` where `dir` is a URI, whose copy on this machine `prepare` makes.
        """
        if self.dir is not None and is_uri(self.dir):
            raise ValueError(f"data.dir {self.dir} is a URI and no folder")
        if self.dir is not None:
            return Path(self.dir)
        return Path(os.environ.get("DIST_GSL_DATA", "data")) / folder_name(self.source, seed=self.seed, counts=self.counts())


def folder_name(source: str, *, seed: int, counts: Mapping[str, int]) -> str:
    """A name for the folder of a data set, such as ``chars-3f9a01c2``: equal settings, equal name."""
    settings = json.dumps([source, seed, sorted(counts.items())])
    return f"{source.partition(':')[0]}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
