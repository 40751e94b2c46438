"""Class folders: ROOT/SPLIT/CLASS/image, at any depth below the class."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from dist_gsl.data.sources.base import ImageKind, Samples, Source, Task, check_split_names
from dist_gsl.data.sources.files import IMAGE_SUFFIXES, Entry, Files, FileSamples


def open_class_folders(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
    """Splits train, val and perhaps test; classes are the folders of train, in order."""
    return class_folders(spec, Files(argument), seed, counts)


def class_folders(spec: str, files: Files, seed: int, counts: Mapping[str, int], *, names: Mapping[str, str] | None = None) -> Source:
    """names: what the classes are called, by their folders; none: as their folders."""
    for name in ("train", "val"):
        if not files.is_folder(name):
            raise ValueError(
                f"folder {files.address(name)} of data source {spec!r} is missing: images are expected at "
                f"{files.address('train/CLASS/')} and {files.address('val/CLASS/')}"
            )
    splits = [name for name in ("train", "val", "test") if files.is_folder(name)]
    check_split_names(counts, splits, spec=spec)
    classes = files.folders("train")
    if len(classes) < 2:
        raise ValueError(f"folder {files.address('train')} must hold one folder for each of two or more classes")
    label_of = {name: label for label, name in enumerate(classes)}
    found: dict[str, tuple[list[Entry], list[int]]] = {}
    for split in splits:
        entries, labels = [], []
        for entry in files.listing(split):
            _, _, rest = entry.name.partition("/")
            folder, slash, _ = rest.partition("/")
            if not slash or not entry.is_image:
                continue
            if folder not in label_of:
                raise ValueError(f"class {folder!r} of {files.address(split)} is not among the classes of {files.address('train')}")
            entries.append(entry)
            labels.append(label_of[folder])
        empty = set(range(len(classes))) - set(labels)
        if split == "train" and empty:
            folder = files.address(f"train/{classes[min(empty)]}")
            raise ValueError(f"class folder {folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        if not entries:
            raise ValueError(f"folder {files.address(split)} holds no image in class folders")
        found[split] = entries, labels
    return file_source(spec, files, found, [(names or {}).get(name, name) for name in classes], seed=seed, counts=counts)


def file_source(
    spec: str, files: Files, found: Mapping[str, tuple[Sequence[Entry], Sequence[int]]], classes: Sequence[str], *, seed: int,
    counts: Mapping[str, int],
) -> Source:  # fmt: skip
    """A source of image files: for each split the files and their labels, of which `counts` may leave some."""
    splits: dict[str, Samples] = {}
    listing = hashlib.sha256()
    for number, (split, (entries, labels)) in enumerate(found.items()):
        for entry in entries:
            listing.update(f"{entry.name}\0{entry.size}\0{entry.changed}\n".encode())
        kept = chosen(len(entries), counts.get(split), seed=seed, number=number, what=f"{files.address(split)} holds")
        splits[split] = FileSamples(files, [entries[i].name for i in kept], [labels[i] for i in kept])
    return Source(
        spec=spec, kind=ImageKind.COLOUR, task=Task.CLASSIFICATION, classes=tuple(classes), num_targets=0, splits=splits,
        fingerprint=listing.hexdigest(),
    )  # fmt: skip


def chosen(available: int, wanted: int | None, *, seed: int, number: int, what: str) -> Sequence[int]:
    """Positions of the samples that a split keeps. Sorted, so that neighbours stay neighbours, which disks read faster."""
    if wanted is None:
        return range(available)
    if wanted > available:
        raise ValueError(f"{what} {available} images, fewer than the {wanted} wanted")
    return np.sort(np.random.default_rng([seed, number]).permutation(available)[:wanted]).tolist()
