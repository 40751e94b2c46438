"""Data sets in shards, files of many samples each: ROOT, or ROOT/data, holds ``SPLIT-*.SUFFIX`` or ``SPLIT/*.SUFFIX``."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Final

from dist_gsl.data.sources.base import ImageKind, Samples, Source, Task
from dist_gsl.data.sources.files import Entry, Files

SPLITS: Final = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}
"""What a split may be called."""


def find_shards(spec: str, files: Files, suffix: str) -> dict[str, list[Entry]]:
    """The shards of each split that has some. `ValueError` where there are none for training or validation."""
    if not files.is_folder():
        raise ValueError(f"folder {files.address()} of data source {spec!r} is missing: it should hold train-*{suffix} and val-*{suffix}")
    entries = [entry for entry in files.listing() if entry.name.endswith(suffix)]
    found = {split: [entry for entry in entries if _is_of(entry.name, names)] for split, names in SPLITS.items()}
    for split in ("train", "val"):
        if not found[split]:
            raise ValueError(
                f"{files.address()} of data source {spec!r} has no {split} shards: {split}-*{suffix} or {split}/*{suffix} are expected"
            )
    return {split: shards for split, shards in found.items() if shards}


def _is_of(name: str, names: Sequence[str]) -> bool:
    folder, _, file = name.removeprefix("data/").rpartition("/")
    return any(folder == each or (not folder and file.startswith(f"{each}-")) for each in names)


def shard_source(spec: str, shards: Mapping[str, list[Entry]], classes: Sequence[str], splits: Mapping[str, Samples]) -> Source:
    listing = json.dumps([entry for entries in shards.values() for entry in entries])
    return Source(
        spec=spec, kind=ImageKind.COLOUR, task=Task.CLASSIFICATION, classes=tuple(classes), num_targets=0, splits=splits,
        fingerprint=hashlib.sha256(listing.encode()).hexdigest(),
    )  # fmt: skip
