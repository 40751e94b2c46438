"""WebDataset: tar archives in which an image and its class lie side by side, under one name.

Archives are for train, val (or validation) and perhaps test, as in `shards.py`; in them lies ``NAME.jpg`` (or another image)
with ``NAME.cls``, a number; or ``NAME.json`` with a "label". ``classes.txt``, where it is there, has a class's name in each line.
"""

import json

import numpy as np

from dist_gsl.data.sources.base import Samples, Source, check_split_names
from dist_gsl.data.sources.files import IMAGE_SUFFIXES, Files, Member, TarSamples, members
from dist_gsl.data.sources.folders import chosen
from dist_gsl.data.sources.shards import find_shards, shard_source


def open_webdataset(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
    files = Files(argument)
    shards = find_shards(spec, files, ".tar")
    found = {split: [_samples(files, entry.name) for entry in entries] for split, entries in shards.items()}
    check_split_names(counts, list(found), spec=spec)
    largest = max(label for each in found.values() for shard in each for _, label in shard)
    if files.is_file("classes.txt"):
        classes = [line.strip() for line in files.read("classes.txt").decode("utf-8").splitlines() if line.strip()]
        if largest >= len(classes):
            raise ValueError(f"{files.address('classes.txt')} names {len(classes)} classes, there is a label {largest}")
    else:
        classes = [str(number) for number in range(largest + 1)]
    splits: dict[str, Samples] = {}
    for number, (split, by_shard) in enumerate(found.items()):
        everything = [(shard, member, label) for shard, samples in enumerate(by_shard) for member, label in samples]
        kept = chosen(len(everything), counts.get(split), seed=seed, number=number, what=f"{split} of {files.address()} holds")
        rows = [everything[i] for i in kept]
        per_shard = np.bincount([shard for shard, _, _ in rows], minlength=len(by_shard)).tolist()
        splits[split] = TarSamples(
            files, [entry.name for entry in shards[split]], per_shard, [member for _, member, _ in rows], [label for _, _, label in rows]
        )
    return shard_source(spec, shards, classes, splits)


def _samples(files: Files, shard: str) -> list[tuple[Member, int]]:
    """The images of a shard and their labels, in its order."""
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    for member in members(files, shard):
        folder, slash, file = member.name.rpartition("/")
        key, dot, kind = file.partition(".")
        key = folder + slash + key
        if f".{kind.lower()}" in IMAGE_SUFFIXES:
            images[key] = member
        elif dot and kind in ("cls", "json"):
            text = files.read_at(shard, member.offset, member.size)
            try:
                labels[key] = int(text) if kind == "cls" else int(json.loads(text)["label"])
            except (ValueError, KeyError, TypeError) as error:
                if kind == "cls":
                    raise ValueError(f"{member.name} in {files.address(shard)} is not the number of a class: {text[:40]!r}") from error
    for key, member in images.items():
        if labels.get(key, -1) < 0:
            raise ValueError(f"{member.name} in {files.address(shard)} has no class: {key}.cls or {key}.json with a label is needed beside it")
    if not images:
        raise ValueError(f"{files.address(shard)} holds no image with its class beside it")
    return [(member, labels[key]) for key, member in images.items()]
