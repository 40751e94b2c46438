"""Writing a source as FFCV files (betons), with a description beside them.

A folder holds ``train.beton``, ``val.beton``, perhaps ``test.beton`` and ``test_fonts.beton``, and ``dataset.json``.
Every sample has three fields:

- ``image``: uint8 array (1, H, W) without loss where the source is grey; FFCV's RGB image, JPEG or raw, in colour;
- ``target``: an integer, the class; or a float32 array (K,) for regression;
- ``index``: an integer, the sample's position in its split, by which augmentation is seeded.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dist_gsl.data.checking import check, read_layout, sha256_of
from dist_gsl.data.info import DESCRIPTION, FORMAT_VERSION, DataError, DatasetInfo, SplitInfo, dataset_info
from dist_gsl.data.sources import ImageKind, Samples, Source, Task, open_source

_SMALLEST_PAGE: Final = 1 << 21
_LARGEST_PAGE: Final = 1 << 31
_SMALLEST_SIDE: Final = 8  # pixels; the decoder needs some to crop from
_LARGEST_SIDE: Final = 65_535  # FFCV stores sides as 16-bit numbers

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, samples done, samples in total)."""


def write(
    source: str,
    out_dir: str | Path,
    *,
    seed: int = 0,
    counts: Mapping[str, int] | None = None,
    max_side: int = 400,
    jpeg_quality: int = 90,
    jpeg_share: float = 0.5,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Write the splits of a source as betons, and ``dataset.json`` beside them.

    Every image is read once before anything is written: a file that cannot be decoded is found then, and mean and
    standard deviation are computed. Files appear under their names only when all of them are complete and checked, so
    an error or an interruption leaves a folder as it was. A folder that already holds the same data is left alone.

    Args:
        source: spec of a source, such as ``chars`` or ``imagefolder:/data/birds``.
        out_dir: folder to write to, made if missing.
        seed: seed of the source, >= 0.
        counts: number of samples of some splits, such as ``{"train": 2000}``.
        max_side: colour images are reduced until their longer side is at most this many pixels.
        jpeg_quality: quality of the images stored as JPEG, 1 to 100.
        jpeg_share: share of the colour images stored as JPEG, 0 to 1; the others are stored raw: larger, read faster.
        num_workers: processes that write, threads that read. With 1 the bytes of a file follow from the settings; with
            more only the samples do.
        progress: called now and then with (what is being done, samples done, samples in total).

    Returns:
        Path of the beton of each split, in the order of the source's splits.

    Raises:
        ValueError: unknown source, bad setting, or an image that cannot be decoded (named).
    """
    if not 1 <= jpeg_quality <= 100:
        raise ValueError(f"jpeg_quality must be from 1 to 100, not {jpeg_quality}")
    if not 0.0 <= jpeg_share <= 1.0:
        raise ValueError(f"jpeg_share must be from 0 to 1, not {jpeg_share}")
    if not _SMALLEST_SIDE <= max_side <= _LARGEST_SIDE:
        raise ValueError(f"max_side must be from {_SMALLEST_SIDE} to {_LARGEST_SIDE} pixels, not {max_side}")
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, not {num_workers}")
    opened = open_source(source, seed=seed, counts=counts)
    settings: dict[str, Any] = {
        "source": source,
        "seed": seed,
        "counts": {name: len(samples) for name, samples in opened.splits.items()},
        "fingerprint": opened.fingerprint,
    }
    if opened.kind is ImageKind.COLOUR:
        settings |= {"max_side": max_side, "jpeg_quality": jpeg_quality, "jpeg_share": jpeg_share}

    directory = Path(out_dir)
    paths = {name: directory / f"{name}.beton" for name in opened.splits}
    if _is_current(directory, settings):
        return paths
    made_directory = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    encoding = _Encoding(max_side=max_side, jpeg_quality=jpeg_quality, jpeg_share=jpeg_share, seed=seed)
    report = progress if progress is not None else _no_progress
    try:
        with locked(directory):
            # Whoever held the lock may have written the very same.
            if not _is_current(directory, settings):
                _write_splits(directory, opened, settings, encoding=encoding, num_workers=num_workers, progress=report)
    except BaseException:
        if made_directory:
            with contextlib.suppress(OSError):  # not empty: someone else writes there
                directory.rmdir()
        raise
    return paths


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the folder against other processes that write to it, and clear away what a killed one has left."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folder; files still appear whole
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for path in directory.glob(".*.part"):
                path.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def _write_splits(
    directory: Path,
    source: Source,
    settings: dict[str, Any],
    *,
    encoding: "_Encoding",
    num_workers: int,
    progress: Progress,
) -> None:
    surveys = {
        name: _survey(
            samples, source, max_side=encoding.max_side, num_threads=num_workers, progress=progress, name=name
        )
        for name, samples in source.splits.items()
    }
    temporary = {name: directory / f".{name}.beton.{os.getpid()}.part" for name in source.splits}
    try:
        splits = {}
        for name, samples in source.splits.items():
            path = temporary[name]
            _write_beton(
                path,
                samples,
                source,
                encoding=encoding,
                survey=surveys[name],
                num_workers=num_workers,
                progress=partial(progress, f"writing {name}"),
            )
            num_bytes = path.stat().st_size
            assert read_layout(path, num_bytes).num_samples == len(samples)
            splits[name] = SplitInfo(
                file=f"{name}.beton", num_samples=len(samples), num_bytes=num_bytes, sha256=sha256_of(path)
            )
        description = DatasetInfo(
            version=FORMAT_VERSION,
            source=source.spec,
            seed=encoding.seed,
            task=source.task,
            classes=source.classes,
            num_targets=source.num_targets,
            channels=source.kind.channels,
            size=_common_size(surveys.values()) if source.kind is ImageKind.GREY else None,
            mean=surveys["train"].mean,
            std=surveys["train"].std,
            splits=splits,
            settings=settings,
        )
        _publish(directory, temporary, description)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _is_current(directory: Path, settings: dict[str, Any]) -> bool:
    try:
        info = dataset_info(directory)
        if info.settings != settings:
            return False
        for split in info.splits.values():
            check(directory / split.file, full=True)
    except DataError:
        return False
    return True


def _publish(directory: Path, temporary: Mapping[str, Path], description: DatasetInfo) -> None:
    """Give the files their names. The description goes first and comes last, so it never stands beside other files."""
    stale: set[str] = set()
    with contextlib.suppress(DataError):
        stale = {split.file for split in dataset_info(directory).splits.values()}
    (directory / DESCRIPTION).unlink(missing_ok=True)
    for name, path in temporary.items():
        os.replace(path, directory / f"{name}.beton")
    for file in stale - {split.file for split in description.splits.values()}:
        (directory / file).unlink(missing_ok=True)
    part = directory / f".{DESCRIPTION}.{os.getpid()}.part"
    try:
        part.write_text(description.to_json(), encoding="utf-8")
        os.replace(part, directory / DESCRIPTION)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """What reading every image of a split once has told."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    largest_bytes: int
    sizes: frozenset[tuple[int, int]]
    """(height, width) of the images; more than two different ones are not kept."""


def _survey(
    samples: Samples, source: Source, *, max_side: int, num_threads: int, progress: Progress, name: str
) -> _Survey:
    """Read every sample: all of them can be decoded and written, or a ValueError says which cannot."""
    channels = source.kind.channels
    total = np.zeros(channels)
    squares = np.zeros(channels)
    num_pixels = 0
    largest = 0
    sizes: set[tuple[int, int]] = set()
    count = len(samples)
    for done, (shape, sums, sums_of_squares) in enumerate(
        _in_order(lambda i: _measure(samples[i], i, source, name=name, max_side=max_side), count, num_threads), start=1
    ):
        total += sums
        squares += sums_of_squares
        num_pixels += shape[0] * shape[1]
        largest = max(largest, shape[0] * shape[1] * channels)
        if len(sizes) <= 2:
            sizes.add(shape)
        if done % 100 == 0 or done == count:
            progress(f"reading {name}", done, count)
    mean = total / num_pixels / 255
    variance = np.maximum(squares / num_pixels / 255**2 - mean**2, 0.0)
    # A channel that never changes would be divided by zero.
    std = np.where(variance > 0, np.sqrt(variance), 1.0)
    return _Survey(mean=tuple(mean.tolist()), std=tuple(std.tolist()), largest_bytes=largest, sizes=frozenset(sizes))


_Measured = tuple[tuple[int, int], NDArray[np.float64], NDArray[np.float64]]


def _measure(sample: Any, position: int, source: Source, *, name: str, max_side: int) -> _Measured:
    image, target = sample
    dimensions = 2 if source.kind is ImageKind.GREY else 3
    assert image.dtype == np.uint8
    assert image.ndim == dimensions
    if source.task is Task.CLASSIFICATION:
        assert 0 <= target < len(source.classes)
    else:
        assert target.shape == (source.num_targets,)
        assert np.isfinite(target).all()
    height, width = image.shape[:2]
    smallest = min(height, width) * min(1.0, max_side / max(height, width))
    if smallest < _SMALLEST_SIDE:
        raise ValueError(
            f"image {source.splits[name].describe(position)} of {width} x {height} pixels is too small or too narrow: "
            f"its shorter side must have at least {_SMALLEST_SIDE} pixels when the longer one has at most {max_side}"
        )
    pixels = image.reshape(height * width, -1)
    # Sums of bytes are exact in integers, so they do not depend on the order of summation.
    return (height, width), pixels.sum(axis=0, dtype=np.int64).astype(float), _sum_of_squares(pixels)


def _sum_of_squares(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    levels = np.arange(256, dtype=np.int64) ** 2
    return np.array([np.bincount(channel, minlength=256) @ levels for channel in pixels.T], dtype=np.float64)


def _in_order(function: Callable[[int], _Measured], count: int, num_threads: int) -> Iterator[_Measured]:
    """Results of function(0), ..., function(count - 1), a bounded number of them computed ahead by threads."""
    if num_threads == 1:
        yield from map(function, range(count))
        return
    with ThreadPoolExecutor(num_threads) as pool:
        block = 64 * num_threads
        for first in range(0, count, block):
            yield from pool.map(function, range(first, min(first + block, count)))


def _common_size(surveys: Iterable[_Survey]) -> int | None:
    sizes = {size for survey in surveys for size in survey.sizes}
    if len(sizes) != 1:
        return None
    height, width = next(iter(sizes))
    return height if height == width else None


@dataclass(frozen=True, kw_only=True)
class _Encoding:
    max_side: int
    jpeg_quality: int
    jpeg_share: float
    seed: int


class _Rows:
    """The samples as FFCV's writer wants them: tuples in the order of the fields."""

    def __init__(self, samples: Samples, image_field: Any, *, encoding: _Encoding | None) -> None:
        self._samples, self._image_field, self._encoding = samples, image_field, encoding

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, position: int) -> tuple[Any, Any, int]:
        image, target = self._samples[position]
        if self._encoding is None:
            return image[None], target, position
        # FFCV's 'proportion' mode draws from numpy's global generator, alike in every worker; a draw by sample gives
        # the same file however many write it.
        draw = np.random.default_rng([self._encoding.seed, position]).random()
        self._image_field.write_mode = "jpg" if draw < self._encoding.jpeg_share else "raw"
        return image, target, position


def _write_beton(
    path: Path,
    samples: Samples,
    source: Source,
    *,
    encoding: _Encoding,
    survey: _Survey,
    num_workers: int,
    progress: Callable[[int, int], None],
) -> None:
    from dist_gsl.data import _ffcv

    image_field: Any
    if source.kind is ImageKind.GREY:
        if len(survey.sizes) != 1:
            raise ValueError(f"the grey images of {source.spec!r} differ in size: resize them to one size")
        image_field = _ffcv.NDArrayField(np.dtype(np.uint8), (1, *next(iter(survey.sizes))))
        largest = survey.largest_bytes
    else:
        image_field = _ffcv.RGBImageField(
            write_mode="raw", max_resolution=encoding.max_side, jpeg_quality=encoding.jpeg_quality
        )
        # A JPEG of noise at full quality is larger than the pixels themselves.
        largest = 2 * min(survey.largest_bytes, 3 * encoding.max_side**2) + 4096
    target_field: Any = (
        _ffcv.IntField()
        if source.task is Task.CLASSIFICATION
        else _ffcv.NDArrayField(np.dtype(np.float32), (source.num_targets,))
    )
    page_size = _SMALLEST_PAGE
    while page_size < largest + 4 * source.num_targets:
        page_size *= 2
    if page_size > _LARGEST_PAGE:
        raise ValueError(f"images of up to {largest} bytes are too large for a beton: choose a smaller max_side")
    writer = _ffcv.Writer(
        str(path),
        {"image": image_field, "target": target_field, "index": _ffcv.IntField()},
        page_size=page_size,
        num_workers=num_workers,
    )
    rows = _Rows(samples, image_field, encoding=encoding if source.kind is ImageKind.COLOUR else None)
    writer.write(rows, progress=lambda done: progress(done, len(samples)))


def _no_progress(what: str, done: int, total: int) -> None:
    """Where nobody listens."""
