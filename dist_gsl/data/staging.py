"""Betons from a URI to a node's own disk, once, with their checksums."""

import getpass
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dist_gsl import storage
from dist_gsl.data.beton import Progress, clear_parts, locked
from dist_gsl.data.checking import sha256_of
from dist_gsl.data.info import DESCRIPTION, DataError, DatasetInfo
from dist_gsl.storage import StorageError

MEBIBYTE = 1 << 20


def staged_folder(uri: str) -> Path:
    """Where a node keeps its copy: in DIST_GSL_STAGING, or else in a folder of this user's among the temporary ones."""
    root = os.environ.get("DIST_GSL_STAGING") or f"{tempfile.gettempdir()}/dist-gsl-{getpass.getuser()}"
    name = uri.partition("?")[0].rstrip("/").rpartition("/")[2]
    return Path(root) / f"{name}-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"


def stage(uri: str, *, progress: Progress | None = None) -> Path:
    """The folder with this node's copy of a data set, made if it is not there or no longer what the URI holds.

    Processes of one node wait for the first of them. Files appear under their names when they are whole and have the
    checksums of the description.

    Raises:
        DataError: no data set there, a damaged file, or too little room here.
    """
    directory = staged_folder(uri)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise DataError(f"{directory} belongs to another user: set DIST_GSL_STAGING to a folder of your own")
    text = _description(uri)
    info = DatasetInfo.from_json(text)
    with locked(directory):
        clear_parts(directory)
        described = directory / DESCRIPTION
        if described.exists() and described.read_text(encoding="utf-8") == text and _are_here(directory, info):
            return directory  # written last, after every checksum
        described.unlink(missing_ok=True)
        missing = [split for split in info.splits.values() if not _is_here(directory / split.file, split.sha256)]
        needed, free = sum(split.num_bytes for split in missing), shutil.disk_usage(directory).free
        if needed > free:
            raise DataError(
                f"{directory} has {free / 1e9:.1f} GB free, {uri} needs {needed / 1e9:.1f}: set DIST_GSL_STAGING to a larger disk"
            )
        for split in missing:
            report = _in_mebibytes(progress, f"copying {split.file} here, MiB", split.num_bytes)
            try:
                storage.download(storage.join(uri, split.file), directory / split.file, sha256=split.sha256, progress=report)
            except StorageError as error:
                raise DataError(str(error)) from error
        part = directory / f".{DESCRIPTION}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, described)
    return directory


def _description(uri: str) -> str:
    try:
        content = storage.read(storage.join(uri, DESCRIPTION))
    except StorageError as error:
        raise DataError(str(error)) from error
    if content is None:
        raise DataError(f"{uri} holds no {DESCRIPTION}: copy the folder there that `dist-gsl data write` made")
    try:
        text = content.decode("utf-8")
        DatasetInfo.from_json(text)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{uri}/{DESCRIPTION} is not a description of a data set ({error}): copy it there again") from error
    return text


def _are_here(directory: Path, info: DatasetInfo) -> bool:
    """Is every file there, by its size? Whoever cleans temporary files up may have taken some."""
    files = [(directory / split.file, split.num_bytes) for split in info.splits.values()]
    return all(file.is_file() and file.stat().st_size == size for file, size in files)


def _is_here(file: Path, sha256: str) -> bool:
    return file.is_file() and sha256_of(file) == sha256


def _in_mebibytes(progress: Progress | None, what: str, num_bytes: int) -> Callable[[int], None]:
    return partial(_tell, progress, what, max(1, num_bytes // MEBIBYTE))


def _tell(progress: Progress | None, what: str, total: int, done: int) -> None:
    if progress is not None:
        progress(what, done // MEBIBYTE, total)
