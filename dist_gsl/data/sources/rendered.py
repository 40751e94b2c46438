"""Sources that need no files: rendered characters, and the digits of scikit-learn."""

from dataclasses import asdict
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_gsl.data.sources.base import ImageKind, Samples, Source, Task, check_split_names, fingerprint

MAX_ROTATION_DEGREES: Final = 45.0

_DIGITS_SIZE = 32
_DIGITS_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


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


def open_chars(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
    from dist_gsl.data import chars

    check_split_names(counts, list(chars.SPLITS), spec=spec)
    return Source(
        spec=spec,
        kind=ImageKind.GREY,
        task=Task.CLASSIFICATION,
        classes=chars.CLASSES,
        num_targets=0,
        splits={name: RenderedCharacters(name, seed=seed, count=counts.get(name)) for name in chars.SPLITS},
        fingerprint=fingerprint(renderer=chars.RENDERER_VERSION, difficulty=asdict(chars.DIFFICULTY)),
    )


class _Digits(NamedTuple):
    images: NDArray[np.uint8]  # (N, 32, 32)
    labels: NDArray[np.int64]
    parts: dict[str, NDArray[np.int64]]  # positions of each split


def _load_digits(spec: str, seed: int, counts: dict[str, int]) -> _Digits:
    """The 1,797 handwritten digits of scikit-learn (UCI), enlarged, with every class shared out between the splits."""
    import cv2
    from sklearn.datasets import load_digits

    check_split_names(counts, list(_DIGITS_SHARES), spec=spec)
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


def open_digits(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
    digits = _load_digits(spec, seed, counts)
    return Source(
        spec=spec,
        kind=ImageKind.GREY,
        task=Task.CLASSIFICATION,
        classes=tuple("0123456789"),
        num_targets=0,
        splits={name: ArraySamples(digits.images[p], digits.labels[p]) for name, p in digits.parts.items()},
        fingerprint=fingerprint(version=1),
    )


def open_rotated_digits(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
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
        fingerprint=fingerprint(version=1, degrees=MAX_ROTATION_DEGREES),
    )
