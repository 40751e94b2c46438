"""Shards of Parquet with an image's bytes and its label in each row, as ImageNet is handed around.

Shards are for train, val (or validation) and perhaps test, as in `shards.py`. One is read a few rows at a time.
"""

import bisect
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dist_gsl.data.sources.base import Samples, Source, check_split_names
from dist_gsl.data.sources.files import Files
from dist_gsl.data.sources.folders import chosen
from dist_gsl.data.sources.shards import find_shards, shard_source

_IMAGES: Final = ("image", "img", "jpg", "jpeg", "png", "bytes")
_LABELS: Final = ("label", "labels", "cls", "class", "target", "fine_label")
_ROWS: Final = 64


def open_parquet(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
    files = Files(argument)
    shards = find_shards(spec, files, ".parquet")
    opened = {split: ParquetSamples(files, [entry.name for entry in found]) for split, found in shards.items()}
    labels = {split: samples.all_labels() for split, samples in opened.items()}
    if "test" in labels and (labels["test"] < 0).any():  # released without its labels
        del opened["test"], labels["test"]
    check_split_names(counts, list(opened), spec=spec)
    classes = opened["train"].class_names()
    largest = max(int(each.max()) for each in labels.values())
    if classes is None:
        classes = [str(number) for number in range(largest + 1)]
    for split, each in labels.items():
        if int(each.min()) < 0 or int(each.max()) >= len(classes):
            raise ValueError(f"{files.address()}: {split} has label {int(each.min()) if int(each.min()) < 0 else int(each.max())}, there are {len(classes)} classes")
    splits: dict[str, Samples] = {}
    for number, (split, samples) in enumerate(opened.items()):
        kept = chosen(len(samples), counts.get(split), seed=seed, number=number, what=f"{split} of {files.address()} holds")
        splits[split] = samples if len(kept) == len(samples) else samples.only(kept)
    return shard_source(spec, shards, classes, splits)


@dataclass
class _Reading:
    """How far a row group was read."""

    group: int
    batches: Iterator[Any]
    at_hand: list[Any] = field(default_factory=list)
    first: int = 0
    """Row of the first at hand."""


class ParquetSamples(Samples):
    """The rows of shards, one after another."""

    def __init__(self, files: Files, shards: Sequence[str]) -> None:
        import pyarrow.parquet as pq

        self.files, self.shards = files, list(shards)
        self.may_fork = not files.is_uri
        self._kept: NDArray[np.int64] | None = None
        groups: list[tuple[int, int]] = []  # (shard, row group)
        rows = []
        for number, shard in enumerate(self.shards):
            with files.open(shard) as file:
                try:
                    metadata = pq.ParquetFile(file).metadata
                except Exception as error:  # pyarrow's own, of many kinds
                    raise ValueError(f"{files.address(shard)} is no Parquet file ({error}): download it again") from error
                for group in range(metadata.num_row_groups):
                    groups.append((number, group))
                    rows.append(metadata.row_group(group).num_rows)
        self._groups, self._ends = groups, np.cumsum(rows).tolist()
        # A group is decoded from its beginning: who reads a whole one decodes nothing twice.
        self.block = rows[0] if rows and 0 < rows[0] <= 1024 else 4 * _ROWS
        self._image, self._label = self._columns()
        self._reading: dict[tuple[int, int], _Reading] = {}  # by process and thread

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reading": {}}

    def __len__(self) -> int:
        return len(self._kept) if self._kept is not None else (self._ends[-1] if self._ends else 0)

    def only(self, kept: Sequence[int]) -> "ParquetSamples":
        """Some of the samples, by rising positions."""
        other = ParquetSamples.__new__(ParquetSamples)
        other.__dict__.update(self.__getstate__())
        other._kept = np.asarray(kept, np.int64)
        return other

    def read(self, position: int) -> tuple[bytes, int]:
        row = position if self._kept is None else int(self._kept[position])
        group = bisect.bisect_right(self._ends, row)
        wanted = row - (self._ends[group - 1] if group else 0)
        place = (os.getpid(), threading.get_ident())
        reading = self._reading.get(place)
        if reading is None or reading.group != group or reading.first > wanted:
            reading = self._reading[place] = _Reading(group, self._batches(group))
        while wanted >= reading.first + len(reading.at_hand):
            reading.first += len(reading.at_hand)
            reading.at_hand = next(reading.batches).to_pylist()
        sample = reading.at_hand[wanted - reading.first]
        content = sample[self._image]
        if isinstance(content, dict):
            content = content.get("bytes")
        return content or b"", int(sample[self._label])

    def describe(self, position: int) -> str:
        row = position if self._kept is None else int(self._kept[position])
        group = bisect.bisect_right(self._ends, row)
        shard, _ = self._groups[group]
        begin = next(number for number, (other, _) in enumerate(self._groups) if other == shard)
        return f"row {row - (self._ends[begin - 1] if begin else 0)} of {self.files.address(self.shards[shard])}"

    def _batches(self, group: int) -> Iterator[Any]:
        import pyarrow.parquet as pq

        shard, number = self._groups[group]
        with self.files.open(self.shards[shard]) as file:
            yield from pq.ParquetFile(file).iter_batches(
                batch_size=_ROWS, row_groups=[number], columns=[self._image, self._label], use_threads=False
            )

    def all_labels(self) -> NDArray[np.int64]:
        """Of every row, of which nothing else is read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        found = []
        for shard in self.shards:
            with self.files.open(shard) as file:
                column = pq.ParquetFile(file).schema_arrow
                if self._label not in column.names or not pa.types.is_integer(column.field(self._label).type):
                    raise ValueError(f"{self.files.address(shard)} needs a column {self._label!r} of whole numbers, the classes")
                labels = pq.ParquetFile(file).read(columns=[self._label])[self._label]
                if labels.null_count:
                    raise ValueError(f"{self.files.address(shard)} has {labels.null_count} rows without a class: take them out")
                found.append(labels.to_numpy().astype(np.int64))
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def class_names(self) -> list[str] | None:
        """As they stand beside the columns, where the `datasets` library has written the shards."""
        described = (self._schema().metadata or {}).get(b"huggingface")
        if described is None:
            return None
        feature = json.loads(described).get("info", {}).get("features", {}).get(self._label, {})
        return [str(name) for name in feature["names"]] if "names" in feature else None

    def _schema(self) -> Any:
        import pyarrow.parquet as pq

        with self.files.open(self.shards[0]) as file:
            return pq.ParquetFile(file).schema_arrow

    def _columns(self) -> tuple[str, str]:
        names = self._schema().names
        image = next((name for name in _IMAGES if name in names), None)
        label = next((name for name in _LABELS if name in names), None)
        if image is None or label is None:
            raise ValueError(
                f"{self.files.address(self.shards[0])} has columns {', '.join(names)}: one of {', '.join(_IMAGES)} and one of "
                f"{', '.join(_LABELS)} are needed"
            )
        return image, label
