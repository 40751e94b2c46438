"""Writing a source as FFCV files (betons), with a description beside them, and checking such files.

A folder holds ``train.beton``, ``val.beton``, perhaps ``test.beton`` and ``test_fonts.beton``, and ``dataset.json``.
Every sample has three fields:

- ``image``: uint8 array (1, H, W) without loss where the source is grey; FFCV's RGB image, JPEG or raw, in colour;
- ``target``: an integer, the class; or a float32 array (K,) for regression;
- ``index``: an integer, the sample's position in its split, by which augmentation is seeded.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dist_gsl.data.sources import ImageKind, Samples, Source, Task, open_source

DESCRIPTION: Final = "dataset.json"
FORMAT_VERSION: Final = 1

_SMALLEST_PAGE: Final = 1 << 21
_LARGEST_PAGE: Final = 1 << 31
_SMALLEST_SIDE: Final = 8  # pixels; the decoder needs some to crop from
_LARGEST_SIDE: Final = 65_535  # FFCV stores sides as 16-bit numbers
_HASH_BYTES: Final = 1 << 22

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, samples done, samples in total)."""


class DataError(ValueError):
    """A data file is missing, foreign, damaged, or not what its description says. One line: what, and what to do."""


@dataclass(frozen=True, kw_only=True)
class BetonInfo:
    """What a beton holds, by its own header."""

    path: Path
    num_samples: int
    fields: dict[str, str]
    """Name of each field and its FFCV type, such as ``RGBImageField``, in the file's order."""
    channels: int
    """Channels of the field ``image``; 0 where there is no such field."""
    height: int
    """Largest height of an image, in pixels."""
    width: int
    """Largest width of an image, in pixels."""
    target_size: int
    """Number of real numbers in a target; 0 where the target is a class."""
    num_bytes: int
    sha256: str | None
    """Hash of the file, where it was computed (``full=True``)."""


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One file of a data set."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The description of a data set, kept as ``dataset.json`` beside its betons."""

    version: int
    source: str
    seed: int
    task: Task
    classes: tuple[str, ...]
    """Class names by label; empty for regression."""
    num_targets: int
    """Number of real numbers in a target; 0 for classification."""
    channels: int
    size: int | None
    """Side of the images where all are squares of one size, else None."""
    mean: tuple[float, ...]
    """Mean of each channel over train, levels in 0..1."""
    std: tuple[float, ...]
    """Standard deviation of each channel over the pixels of train, levels in 0..1."""
    splits: dict[str, SplitInfo]
    settings: dict[str, Any] = field(repr=False)
    """All that the files follow from; equal settings mean equal samples."""

    @property
    def num_outputs(self) -> int:
        """Outputs of a network for this data: one a class, or one a number of the target."""
        return len(self.classes) if self.task is Task.CLASSIFICATION else self.num_targets

    def to_json(self) -> str:
        content = {
            "version": self.version,
            "source": self.source,
            "seed": self.seed,
            "task": self.task.value,
            "classes": self.classes,
            "num_targets": self.num_targets,
            "channels": self.channels,
            "size": self.size,
            "mean": self.mean,
            "std": self.std,
            "splits": {name: vars(split) for name, split in self.splits.items()},
            "settings": self.settings,
        }
        return json.dumps(content, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> "DatasetInfo":
        """Raises KeyError, TypeError or ValueError where `text` is not such a description."""
        content = json.loads(text)
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"version {content['version']} instead of {FORMAT_VERSION}")
        return DatasetInfo(
            **{
                **content,
                "task": Task(content["task"]),
                "classes": tuple(content["classes"]),
                "mean": tuple(content["mean"]),
                "std": tuple(content["std"]),
                "splits": {name: SplitInfo(**split) for name, split in content["splits"].items()},
            }
        )


def dataset_info(directory: str | Path) -> DatasetInfo:
    """Read ``dataset.json`` of a folder that `write` made. Raises DataError where it is missing or not readable."""
    path = Path(directory) / DESCRIPTION
    try:
        return DatasetInfo.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: write it with `dist-gsl data write SOURCE {directory}`") from None
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} is not a description of a data set ({error}): write the data set again") from error


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
    if _is_current(directory, settings):
        return {name: directory / f"{name}.beton" for name in opened.splits}
    report = progress if progress is not None else _no_progress
    surveys = {
        name: _survey(samples, opened, max_side=max_side, num_threads=num_workers, progress=report, name=name)
        for name, samples in opened.splits.items()
    }

    made_directory = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    temporary = {name: directory / f".{name}.beton.{os.getpid()}.part" for name in opened.splits}
    try:
        splits = {}
        for name, samples in opened.splits.items():
            encoding = _Encoding(max_side=max_side, jpeg_quality=jpeg_quality, jpeg_share=jpeg_share, seed=seed)
            _write_beton(
                temporary[name],
                samples,
                opened,
                encoding=encoding,
                survey=surveys[name],
                num_workers=num_workers,
                progress=partial(report, f"writing {name}"),
            )
            num_bytes = temporary[name].stat().st_size
            assert _read_layout(temporary[name], num_bytes).num_samples == len(samples)
            splits[name] = SplitInfo(
                file=f"{name}.beton",
                num_samples=len(samples),
                num_bytes=num_bytes,
                sha256=_sha256(temporary[name]),
            )
        train = surveys["train"]
        description = DatasetInfo(
            version=FORMAT_VERSION,
            source=source,
            seed=seed,
            task=opened.task,
            classes=opened.classes,
            num_targets=opened.num_targets,
            channels=opened.kind.channels,
            size=_common_size(surveys.values()) if opened.kind is ImageKind.GREY else None,
            mean=train.mean,
            std=train.std,
            splits=splits,
            settings=settings,
        )
        _publish(directory, temporary, description)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        if made_directory:
            with contextlib.suppress(OSError):  # not empty: someone else writes there
                directory.rmdir()
        raise
    return {name: directory / f"{name}.beton" for name in opened.splits}


def check(path: str | Path, *, full: bool = False) -> BetonInfo:
    """Check that a file is a complete beton, and say what it holds.

    The header, the fields, and the table of what is stored where are checked against the size of the file. Where a
    ``dataset.json`` beside the file lists it, number of samples and size must agree with it, and with ``full=True`` the
    sha256 of the whole file too.

    Raises:
        DataError: the file is missing, not a beton, of another version, cut short, or not the one described.
    """
    path = Path(path)
    try:
        num_bytes = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing: write it with `dist-gsl data write SOURCE {path.parent}`") from None
    if not path.is_file():
        raise DataError(f"{path} is not a file: name a .beton file")
    info = _read_layout(path, num_bytes)
    described = _described(path)
    if described is not None and (described.num_samples, described.num_bytes) != (info.num_samples, num_bytes):
        raise DataError(
            f"{path} holds {info.num_samples} samples in {num_bytes} bytes, but {DESCRIPTION} beside it says "
            f"{described.num_samples} in {described.num_bytes}: write the data set again"
        )
    if not full:
        return info
    digest = _sha256(path)
    if described is not None and described.sha256 != digest:
        raise DataError(f"{path} is damaged: its sha256 is not that in {DESCRIPTION}; write the data set again")
    return BetonInfo(**{**vars(info), "sha256": digest})


def _read_layout(path: Path, num_bytes: int) -> BetonInfo:
    from dist_gsl.data import _ffcv

    def broken(why: str) -> DataError:
        return DataError(f"{path} {why}: write the data set again")

    header_bytes = _ffcv.HeaderType.itemsize
    if num_bytes < header_bytes:
        raise broken(f"is not a beton, it has {num_bytes} bytes")
    header = np.fromfile(path, dtype=_ffcv.HeaderType, count=1)[0]
    version, num_fields, page_size = int(header["version"]), int(header["num_fields"]), int(header["page_size"])
    if version != _ffcv.CURRENT_VERSION:
        raise broken(f"is not a beton of version {_ffcv.CURRENT_VERSION} (its first bytes say {version})")
    if num_fields == 0 or page_size < _SMALLEST_PAGE or page_size & (page_size - 1):
        raise broken("is not a beton, its header makes no sense")
    num_samples, table_start = int(header["num_samples"]), int(header["alloc_table_ptr"])
    fields_end = header_bytes + num_fields * _ffcv.FieldDescType.itemsize
    if num_bytes < fields_end:
        raise broken("is cut short")
    if table_start == 0:
        raise broken("was never finished")
    if num_samples == 0:
        raise broken("holds no sample")
    try:
        reader_fields = _read_fields(path, num_fields)
        row_bytes = np.dtype([("", handler.metadata_type) for handler in reader_fields.values()], align=True).itemsize
    except (KeyError, TypeError, ValueError, AttributeError, UnicodeDecodeError, IndexError) as error:
        raise broken("is not a beton, its fields cannot be read") from error
    stored = [name for name, handler in reader_fields.items() if not isinstance(handler, _ffcv.SCALAR_FIELDS)]
    table_bytes = num_samples * len(stored) * _ffcv.ALLOC_TABLE_TYPE.itemsize
    if fields_end + num_samples * row_bytes > table_start or num_bytes < table_start + table_bytes:
        raise broken(f"is cut short: {num_bytes} bytes instead of {table_start + table_bytes}")
    if num_bytes > table_start + table_bytes:
        raise broken(f"has {num_bytes - table_start - table_bytes} bytes too many at its end")
    table = np.fromfile(path, dtype=_ffcv.ALLOC_TABLE_TYPE, offset=table_start)
    if table.size and (
        int(table["sample_id"].max()) >= num_samples
        or int((table["ptr"] + table["size"]).max()) > table_start
        or int(table["ptr"].min()) < fields_end
    ):
        raise broken("is damaged, its table points outside of it")

    channels = height = width = target_size = 0
    image = reader_fields.get("image")
    if isinstance(image, _ffcv.NDArrayField):
        channels, height, width = (int(n) for n in image.shape) if len(image.shape) == 3 else (0, 0, 0)
    elif isinstance(image, _ffcv.RGBImageField):
        rows = _ffcv.Reader(str(path)).metadata[f"f{list(reader_fields).index('image')}"]
        channels, height, width = 3, int(rows["height"].max()), int(rows["width"].max())
    target = reader_fields.get("target")
    if isinstance(target, _ffcv.NDArrayField):
        target_size = math.prod(int(n) for n in target.shape)
    return BetonInfo(
        path=path,
        num_samples=num_samples,
        fields={name: type(handler).__name__ for name, handler in reader_fields.items()},
        channels=channels,
        height=height,
        width=width,
        target_size=target_size,
        num_bytes=num_bytes,
        sha256=None,
    )


def _read_fields(path: Path, num_fields: int) -> dict[str, Any]:
    from dist_gsl.data import _ffcv

    described = np.fromfile(path, dtype=_ffcv.FieldDescType, count=num_fields, offset=_ffcv.HeaderType.itemsize)
    fields = {}
    for row in described:
        handler = _ffcv.TYPE_ID_HANDLER[int(row["type_id"])]
        if handler is None:
            raise TypeError("a field of a type that is not FFCV's")
        fields[row["name"].tobytes().decode("ascii").split("\x00")[0]] = handler.from_binary(row["arguments"])
    return fields


def _described(path: Path) -> SplitInfo | None:
    """What ``dataset.json`` beside the file says of it, if anything."""
    if not (path.parent / DESCRIPTION).exists():
        return None
    splits = dataset_info(path.parent).splits.values()
    return next((split for split in splits if split.file == path.name), None)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


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
