"""Checking betons before FFCV opens them, since it would wait for ever, or return wrong pixels, on a bad one."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from dist_gsl.data.info import DESCRIPTION, JPEG, SMALLEST_PAGE, BetonInfo, DataError, SplitInfo, dataset_info

_HASH_BYTES: Final = 1 << 22


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
    info = read_layout(path, num_bytes)
    described = _described(path)
    if described is not None and (described.num_samples, described.num_bytes) != (info.num_samples, num_bytes):
        raise DataError(
            f"{path} holds {info.num_samples} samples in {num_bytes} bytes, but {DESCRIPTION} beside it says "
            f"{described.num_samples} in {described.num_bytes}: write the data set again"
        )
    if not full:
        return info
    verify(path)
    digest = sha256_of(path)
    if described is not None and described.sha256 != digest:
        raise DataError(f"{path} is damaged: its sha256 is not that in {DESCRIPTION}; write the data set again")
    return BetonInfo(**{**vars(info), "sha256": digest})


def verify(path: Path) -> None:
    """Check every sample of a beton against its checksum. Raises DataError with the number of the first that is damaged."""
    from dist_gsl.data import _ffcv, native

    stored = _ffcv.Stored(_ffcv.Reader(str(path)))
    content = np.memmap(path, np.uint8, mode="r")
    bad, settings = np.zeros(1, np.uint64), native.settings(**stored.settings)
    status = native.library().dist_gsl_verify(
        content.ctypes.data, content.size, stored.rows.ctypes.data, stored.rows.strides[0], stored.image_sizes.ctypes.data, 0,
        len(stored.rows), stored.is_colour, settings.ctypes.data, bad.ctypes.data,
    )  # fmt: skip
    if status != 0:
        raise damaged(path, int(bad[0]), native.REASONS[status])


def decode_all(path: Path, *, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Decode every JPEG of a beton. Raises DataError with the number of the first that cannot be decoded."""
    from dist_gsl.data import _ffcv, native

    stored = _ffcv.Stored(_ffcv.Reader(str(path)))
    content = np.memmap(path, np.uint8, mode="r")
    for sample, size in enumerate(stored.image_sizes):
        row = stored.rows["f0"][sample]
        if stored.is_colour and row["mode"] == JPEG:
            start = int(row["data_ptr"])
            try:
                native.decode_jpeg(content[start : start + int(size)].tobytes())
            except ValueError as error:
                raise damaged(path, sample, str(error)) from error
        if sample % 256 == 255 or sample + 1 == len(stored.rows):
            progress(sample + 1, len(stored.rows))


def damaged(path: str | Path, sample: int, reason: str) -> DataError:
    return DataError(f"image {sample} of {path} is damaged, {reason}: write the data set again")


def read_layout(path: Path, num_bytes: int) -> BetonInfo:
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
    if num_fields == 0 or page_size < SMALLEST_PAGE or page_size & (page_size - 1):
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


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()
