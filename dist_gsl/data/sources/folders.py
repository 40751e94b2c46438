"""Class folders: ROOT/SPLIT/CLASS/image."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from dist_gsl.data.sources.base import ImageKind, Samples, Source, Task, check_split_names

IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})


class FileSamples(Samples):
    """Image files and their classes; a file is read each time it is asked for."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        assert len(paths) == len(labels)
        self.paths, self.labels = list(paths), list(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, position: int) -> tuple[bytes, int]:
        return self.paths[position].read_bytes(), self.labels[position]

    def describe(self, position: int) -> str:
        return str(self.paths[position])


def _class_folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def open_class_folders(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
    """A tree ROOT/SPLIT/CLASS/image with splits train, val and perhaps test; classes are those of train, in order."""
    root = Path(argument).expanduser().resolve()
    for name in ("train", "val"):
        if not (root / name).is_dir():
            raise ValueError(
                f"folder {root / name} of data source {spec!r} is missing: images are expected at {root}/train/CLASS/ "
                f"and {root}/val/CLASS/"
            )
    names = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    check_split_names(counts, names, spec=spec)
    classes = [folder.name for folder in _class_folders(root / "train")]
    if len(classes) < 2:
        raise ValueError(f"folder {root / 'train'} must hold one folder for each of two or more classes")
    label_of = {name: label for label, name in enumerate(classes)}

    splits: dict[str, Samples] = {}
    listing = hashlib.sha256()
    for number, name in enumerate(names):
        paths: list[Path] = []
        labels: list[int] = []
        for folder in _class_folders(root / name):
            if folder.name not in label_of:
                raise ValueError(f"class {folder.name!r} of {root / name} is not among the classes of {root / 'train'}")
            files = _image_files(folder)
            if not files and name == "train":
                raise ValueError(f"class folder {folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
            paths += files
            labels += [label_of[folder.name]] * len(files)
        if not paths:
            raise ValueError(f"folder {root / name} holds no image in class folders")
        for path in paths:
            status = path.stat()
            listing.update(f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        count = counts.get(name, len(paths))
        if count > len(paths):
            raise ValueError(f"{root / name} holds {len(paths)} images, fewer than the {count} wanted")
        # Sorted, so that neighbours in the file stay neighbours of the folder, which reads faster from a disk.
        kept = np.sort(np.random.default_rng([seed, number]).permutation(len(paths))[:count])
        splits[name] = FileSamples([paths[i] for i in kept], [labels[i] for i in kept])
    return Source(
        spec=spec,
        kind=ImageKind.COLOUR,
        task=Task.CLASSIFICATION,
        classes=tuple(classes),
        num_targets=0,
        splits=splits,
        fingerprint=listing.hexdigest(),
    )
