"""Where images come from: a source gives, for each split, an indexable set of (image, target), and what it is about.

A source is named by a spec string: ``chars``, or ``imagefolder:PATH``. `SOURCES` lists them.

Shapes: an image is uint8, (H, W) where the source is grey and (H, W, 3) where it is in colour; a target is a class
number, or float32 of shape (K,) where the task is regression.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_gsl.data import images

IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
MAX_ROTATION_DEGREES: Final = 45.0

_DIGITS_SIZE = 32
_DIGITS_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


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

    def describe(self, position: int) -> str:
        """The sample's name in a message to the user."""
        return f"number {position}"


class ArraySamples(Samples):
    """Samples held in memory: images uint8 (N, H, W), targets int64 (N,) or float32 (N, K)."""

    def __init__(self, images: NDArray[np.uint8], targets: NDArray[np.int64] | NDArray[np.float32]) -> None:
        assert len(images) == len(targets)
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def read(self, position: int) -> tuple[NDArray[np.uint8], int | NDArray[np.float32]]:
        target = self.targets[position]
        return self.images[position], int(target) if target.ndim == 0 else target


class RenderedCharacters(Samples):
    """A split of the rendered characters, rendered in blocks as they are first asked for."""

    block = 500

    def __init__(self, name: str, *, seed: int, count: int | None) -> None:
        from dist_gsl.data import chars

        self._split, self._seed = chars.SPLITS[name], seed
        self._count = self._split.count if count is None else count
        self._blocks: dict[int, ArraySamples] = {}

    def __len__(self) -> int:
        return self._count

    def read(self, position: int) -> tuple[NDArray[np.uint8], int | NDArray[np.float32]]:
        from dist_gsl.data import chars

        number, offset = divmod(position, self.block)
        if number not in self._blocks:
            first = number * self.block
            indices = range(first, min(first + self.block, self._count))
            rendered = chars.render(indices, seed=self._seed, stream=self._split.stream, fonts=self._split.fonts)
            self._blocks = {number: ArraySamples(rendered.images, rendered.labels)}  # they are read in order
        return self._blocks[number].read(offset)


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


def open_source(spec: str, *, seed: int = 0, counts: Mapping[str, int] | None = None) -> Source:
    """Open the source named by `spec`.

    Args:
        spec: one of `SOURCES`, such as ``chars`` or ``imagefolder:/data/birds``.
        seed: seed of what the source renders, and of what it draws from larger sets.
        counts: number of samples of some splits; the others keep the source's own number.

    Raises:
        ValueError: unknown source, unknown split, a count that cannot be had, a folder that is not as it should be.
    """
    name, colon, argument = spec.partition(":")
    if name not in _OPENERS:
        raise ValueError(f"unknown data source {spec!r}: choose one of {', '.join(SOURCES)}")
    wants_path = SOURCES_BY_NAME[name].endswith(":PATH")
    if wants_path and not argument:
        raise ValueError(f"data source {name!r} needs a folder: write {SOURCES_BY_NAME[name]}")
    if colon and not wants_path:
        raise ValueError(f"data source {name!r} takes no argument: write {name!r} instead of {spec!r}")
    if seed < 0:
        raise ValueError(f"the seed of a data source must be >= 0, not {seed}")
    for split, count in (counts or {}).items():
        if count < 1:
            raise ValueError(f"the number of {split} samples must be at least 1, not {count}")
    return _OPENERS[name](spec, argument, seed, dict(counts or {}))


def _fingerprint(**settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _check_split_names(counts: Mapping[str, int], known: Sequence[str], *, spec: str) -> None:
    for split in counts:
        if split not in known:
            raise ValueError(f"data source {spec!r} has no split {split!r}: its splits are {', '.join(known)}")


def _open_chars(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
    from dist_gsl.data import chars

    _check_split_names(counts, list(chars.SPLITS), spec=spec)
    return Source(
        spec=spec,
        kind=ImageKind.GREY,
        task=Task.CLASSIFICATION,
        classes=chars.CLASSES,
        num_targets=0,
        splits={name: RenderedCharacters(name, seed=seed, count=counts.get(name)) for name in chars.SPLITS},
        fingerprint=_fingerprint(renderer=chars.RENDERER_VERSION, difficulty=asdict(chars.DIFFICULTY)),
    )


class _Digits(NamedTuple):
    images: NDArray[np.uint8]  # (N, 32, 32)
    labels: NDArray[np.int64]
    parts: dict[str, NDArray[np.int64]]  # positions of each split


def _load_digits(spec: str, seed: int, counts: dict[str, int]) -> _Digits:
    """The 1,797 handwritten digits of scikit-learn (UCI), enlarged, with every class shared out between the splits."""
    import cv2
    from sklearn.datasets import load_digits

    _check_split_names(counts, list(_DIGITS_SHARES), spec=spec)
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    images = np.stack(
        [
            np.clip(
                np.rint(cv2.resize(image / 16 * 255, (_DIGITS_SIZE, _DIGITS_SIZE), interpolation=cv2.INTER_CUBIC)),
                0,
                255,
            ).astype(np.uint8)
            for image in digits.images
        ]
    )
    rng = np.random.default_rng([seed, 0])
    chosen: dict[str, list[NDArray[np.int64]]] = {name: [] for name in _DIGITS_SHARES}
    bounds = np.cumsum(list(_DIGITS_SHARES.values()))[:-1]
    for label in range(10):
        positions = rng.permutation(np.flatnonzero(labels == label))
        pieces = np.split(positions, np.rint(bounds * len(positions)).astype(int))
        for name, piece in zip(_DIGITS_SHARES, pieces, strict=True):
            chosen[name].append(piece)
    parts = {}
    for name, by_class in chosen.items():
        positions = rng.permutation(np.concatenate(by_class))
        count = counts.get(name, len(positions))
        if count > len(positions):
            raise ValueError(f"data source {spec!r} has {len(positions)} {name} samples, fewer than the {count} wanted")
        parts[name] = positions[:count]
    return _Digits(images, labels, parts)


def _open_digits(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
    digits = _load_digits(spec, seed, counts)
    return Source(
        spec=spec,
        kind=ImageKind.GREY,
        task=Task.CLASSIFICATION,
        classes=tuple("0123456789"),
        num_targets=0,
        splits={name: ArraySamples(digits.images[p], digits.labels[p]) for name, p in digits.parts.items()},
        fingerprint=_fingerprint(version=1),
    )


def _open_rotated_digits(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
    """Regression: a digit turned counter-clockwise by a uniform angle; the target is angle / 45 degrees, shape (1,)."""
    import cv2

    digits = _load_digits(spec, seed, counts)
    splits: dict[str, Samples] = {}
    for number, (name, positions) in enumerate(digits.parts.items()):
        rng = np.random.default_rng([seed, 1, number])
        targets = rng.uniform(-1.0, 1.0, size=(len(positions), 1)).astype(np.float32)
        centre = ((_DIGITS_SIZE - 1) / 2, (_DIGITS_SIZE - 1) / 2)
        images = np.empty((len(positions), _DIGITS_SIZE, _DIGITS_SIZE), np.uint8)
        for row, (position, target) in enumerate(zip(positions, targets, strict=True)):
            # Four fifths of the size, so that the corners of a turned digit stay inside.
            turn = cv2.getRotationMatrix2D(centre, float(target[0]) * MAX_ROTATION_DEGREES, 0.8)
            images[row] = cv2.warpAffine(digits.images[position], turn, (_DIGITS_SIZE, _DIGITS_SIZE))
        splits[name] = ArraySamples(images, targets)
    return Source(
        spec=spec,
        kind=ImageKind.GREY,
        task=Task.REGRESSION,
        classes=(),
        num_targets=1,
        splits=splits,
        fingerprint=_fingerprint(version=1, degrees=MAX_ROTATION_DEGREES),
    )


def _class_folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _open_class_folders(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
    """A tree ROOT/SPLIT/CLASS/image with splits train, val and perhaps test; classes are those of train, in order."""
    root = Path(argument).expanduser().resolve()
    for name in ("train", "val"):
        if not (root / name).is_dir():
            raise ValueError(
                f"folder {root / name} of data source {spec!r} is missing: images are expected at {root}/train/CLASS/ "
                f"and {root}/val/CLASS/"
            )
    names = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    _check_split_names(counts, names, spec=spec)
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


_Opener = Callable[[str, str, int, dict[str, int]], Source]

_OPENERS: Final[dict[str, _Opener]] = {
    "chars": _open_chars,
    "digits": _open_digits,
    "rotated-digits": _open_rotated_digits,
    "imagefolder": _open_class_folders,
    "imagenet": _open_class_folders,
    "places2": _open_class_folders,
    "icdar": _open_class_folders,
}

SOURCES: Final[dict[str, str]] = {
    "chars": "36 classes of rendered scene-text characters, 32x32 grey",
    "digits": "the 10 classes of real handwritten digits of scikit-learn, 32x32 grey",
    "rotated-digits": "regression: the angle by which a real handwritten digit was turned",
    "imagefolder:PATH": "a folder PATH/train/CLASS/*.jpg, PATH/val/CLASS/*.jpg and perhaps PATH/test, in colour",
    "imagenet:PATH": "ImageNet as class folders, like imagefolder",
    "places2:PATH": "Places2 as class folders, like imagefolder",
    "icdar:PATH": "ICDAR characters as class folders, like imagefolder",
}
"""How each source is written, and what it is."""

SOURCES_BY_NAME: Final = {spec.partition(":")[0]: spec for spec in SOURCES}
