"""Which data a run uses, and how it reads them."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from dist_gsl.storage import is_uri


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
    """Where the images come from: chars, digits, rotated-digits, or KIND:PATH with imagefolder, imagenet, places2, parquet or webdataset."""
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
    augment: Augment = Augment.NONE
    """What is done at random to training images."""
    num_threads: int = 1
    """Threads that decode images, for each process."""

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
