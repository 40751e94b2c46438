"""Storage by URI (S3, GCS, HDFS, whatever pyarrow opens) for what all nodes of a cluster need.

A folder on such storage is worked on in a copy on this machine's disk: `local_folder` names the copy, `pull` brings it up to
date, `push` sends what has changed. For a folder that is a path to begin with, both do nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

BLOCK = 1 << 22
OBJECT_STORES = ("s3", "gcs", "abfs")
"""Where a file appears whole or not at all, without a temporary name."""


class StorageError(ValueError):
    """The address or what lies there is not what it should be. One line: what, and what to do."""


class StorageAwayError(OSError):
    """The storage does not do what it was asked for, now: it may well do it later. One line."""


PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.EBUSY}


def may_pass(error: OSError) -> bool:
    """Is it a storage that is away, a full disk, one that may not be written to now? Not a file that is not there."""
    return isinstance(error, StorageAwayError) or error.errno in PASSING


def is_uri(text: str) -> bool:
    return "://" in text


def opened(uri: str) -> tuple[FileSystem, str]:
    """(file system, path in it). `StorageError` for an address that no file system takes, or one that holds keys; `StorageAwayError` where
    the system itself does not answer."""
    from pyarrow.fs import FileSystem

    check_address(uri)
    try:
        system, path = FileSystem.from_uri(uri)
        if not path.strip("/"):
            raise ValueError("it names no folder")
        return system, path
    except OSError as error:
        raise StorageAwayError(f"{uri} cannot be opened: {_first_line(error)}") from error
    except (ValueError, TypeError) as error:  # pyarrow's own are of these kinds
        raise StorageError(f"{uri} cannot be opened: {_first_line(error)}") from error


def check_address(uri: str) -> None:
    """`StorageError` for an address that holds keys."""
    parts = urlsplit(uri)
    if parts.username or parts.password:
        raise StorageError(
            f"{parts.scheme}://...: leave keys out of the address, which is written into configs and logs; they come from the "
            "environment of the nodes (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, a role)"
        )


def join(uri: str, *names: str) -> str:
    """The address of what lies under another; options after the question mark stay where they are."""
    head, mark, options = uri.partition("?")
    return "/".join([head.rstrip("/"), *names]) + mark + options


def read(uri: str) -> bytes | None:
    """A small file's content; None where there is none. `StorageAwayError` where that cannot be known."""
    from pyarrow.fs import FileType

    system, path = opened(uri)
    try:
        if system.get_file_info(path).type is not FileType.File:
            return None
        with system.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())
    except OSError as error:
        raise StorageAwayError(f"{uri} cannot be read: {_first_line(error)}") from error


def download(uri: str, target: Path, *, sha256: str | None = None, progress: Callable[[int], None] = lambda done: None) -> None:
    """Copies a file here, under a temporary name until it is whole.

    `StorageAwayError` where it cannot be read; `StorageError` where, given a checksum, it is not the file that it should be.
    """
    system, path = opened(uri)
    temporary, digest, done = target.with_name(f".{target.name}.part"), hashlib.sha256(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with system.open_input_stream(path, compression=None) as stream, temporary.open("wb") as file:
            while block := stream.read(BLOCK):
                digest.update(block)
                file.write(block)
                done += len(block)
                progress(done)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise StorageError(f"{uri} is damaged or another file: its checksum is not the one in its description; copy it there again")
        os.replace(temporary, target)
    except OSError as error:
        raise StorageAwayError(f"{uri} cannot be copied to {target}: {_first_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def upload(source: Path, uri: str) -> None:
    """Copies a file there, so that it appears whole or not at all. `StorageAwayError` where that fails."""
    system, path = opened(uri)
    direct = system.type_name in OBJECT_STORES
    temporary = path if direct else str(PurePosixPath(path).with_name(f".{PurePosixPath(path).name}.part"))
    try:
        if not direct:
            system.create_dir(str(PurePosixPath(path).parent))
        with source.open("rb") as file, system.open_output_stream(temporary, compression=None) as stream:
            while block := file.read(BLOCK):
                stream.write(block)
        if not direct:
            system.move(temporary, path)
    except OSError as error:
        raise StorageAwayError(f"{uri} cannot be written: {_first_line(error)}") from error


def remove(uri: str) -> None:
    """Deletes a folder and what is in it, if it is there. `StorageAwayError` where that fails."""
    from pyarrow.fs import FileType

    system, path = opened(uri)
    try:
        if system.get_file_info(path).type is FileType.Directory:
            system.delete_dir(path)
    except OSError as error:
        raise StorageAwayError(f"{uri} cannot be deleted: {_first_line(error)}") from error


def subfolders(uri: str) -> list[str]:
    """Names of the folders in a folder; none where it is not there. `StorageAwayError` where that cannot be known."""
    from pyarrow.fs import FileSelector, FileType

    system, path = opened(uri)
    try:
        infos = system.get_file_info(FileSelector(path, allow_not_found=True))
    except OSError as error:
        raise StorageAwayError(f"{uri} cannot be listed: {_first_line(error)}") from error
    return [PurePosixPath(info.path).name for info in infos if info.type is FileType.Directory]


def check_writable(uri: str, name: str) -> None:
    """`StorageAwayError` unless a file of that name can be written under the address, and deleted again."""
    system, path = opened(join(uri, name))
    try:
        with system.open_output_stream(path, compression=None) as stream:
            stream.write(b"")
        system.delete_file(path)
    except OSError as error:
        raise StorageAwayError(f"{uri} cannot be written to: {_first_line(error)}") from error


# --- folders with a copy here


def local_folder(text: str) -> Path:
    """The folder itself for a path; for a URI the folder of its copy, whether it exists or not: the address is its name.

    `StorageError` for an address that cannot be opened, or is too long for a name.
    """
    if not is_uri(text):
        return Path(text)
    opened(text)
    name = quote(text.rstrip("/"), safe="")
    if len(name) > LONGEST_NAME:
        raise StorageError(f"{text} is too long for an address ({len(name)} characters in a folder's name, at most {LONGEST_NAME})")
    return _copies() / name


LONGEST_NAME = 240
"""Of a folder, on the file systems that people have."""


def _copies() -> Path:
    """The folder of all copies: DIST_GSL_SCRATCH, or else ~/.cache/dist_gsl."""
    return Path(os.environ.get("DIST_GSL_SCRATCH") or Path.home() / ".cache" / "dist_gsl").absolute()


def local_run(text: str) -> Path:
    """A run's folder by path or URI, brought up to date."""
    if not is_uri(text):
        return Path(text)
    head, mark, options = text.partition("?")
    parent, _, name = head.rstrip("/").rpartition("/")
    folder = local_folder(parent + mark + options) / name
    pull(folder)
    return folder


def remote_of(folder: Path) -> str | None:
    """The URI of which a folder is a copy, or a part of one; None for a folder that is nobody's copy."""
    if not folder.absolute().is_relative_to(_copies()):
        return None
    name, *below = folder.absolute().relative_to(_copies()).parts or ("",)
    return join(unquote(name), *below) if is_uri(unquote(name)) else None


def pull(folder: Path, *, without: str | None = None) -> None:
    """Brings a copy up to date, but for the subfolder `without`. What has not been sent yet stays as it is."""
    uri = remote_of(folder)
    if uri is None:
        return
    known = _known(folder)
    there: dict[str, FileInfo] = {}
    for info, name in _remote_files(uri):
        if without is None or not name.startswith(f"{without}/"):
            there[name] = info
    for name, info in there.items():
        target = folder / name
        is_unsent = target.exists() and known.get(name) != _state(target)
        if is_unsent and target.stat().st_mtime > info.mtime.timestamp():
            continue
        _fetch(info, join(uri, name), target)
        known[name] = _state(target)
    for name in set(known) - set(there):  # somebody deleted it there
        (folder / name).unlink(missing_ok=True)
        del known[name]
    if folder.is_dir():
        _write_known(folder, known)


def push(folder: Path, *, without: str | None = None) -> None:
    """Sends the files of a copy that are not there yet as they are here, but for the subfolder `without`."""
    uri = remote_of(folder)
    if uri is None:
        return
    known = _known(folder)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file() or file.name.startswith(".") or (without is not None and name.startswith(f"{without}/")):
            continue
        state = _state(file)
        if known.get(name) != state:
            upload(file, join(uri, name))
            known[name] = state
            _write_known(folder, known)


def fetch(uri: str, target: Path) -> bool:
    """Makes a file here the one that is there; False, and none here, where there is none."""
    from pyarrow.fs import FileType

    system, path = opened(uri)
    try:
        info = system.get_file_info(path)
    except OSError as error:
        raise StorageAwayError(f"{uri} cannot be read: {_first_line(error)}") from error
    if info.type is not FileType.File:
        target.unlink(missing_ok=True)
        return False
    _fetch(info, uri, target)
    return True


def _fetch(info: FileInfo, uri: str, target: Path) -> None:
    """A download, unless the file here was made by one of the same file."""
    time_ns = int(info.mtime.timestamp() * 1e9)
    if not target.exists() or _state(target) != [time_ns, info.size]:
        download(uri, target)
        os.utime(target, ns=(time_ns, time_ns))


def _state(file: Path) -> list[int]:
    return [file.stat().st_mtime_ns, file.stat().st_size]


SENT = ".sent.json"
"""File in a copy: name -> (time of its last change in ns, size) of each file as it is there too."""


def _known(folder: Path) -> dict[str, list[int]]:
    file = folder / SENT
    found: dict[str, list[int]] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _write_known(folder: Path, known: dict[str, list[int]]) -> None:
    temporary = folder / f"{SENT}.tmp"
    temporary.write_text(json.dumps(known))
    os.replace(temporary, folder / SENT)


def _remote_files(uri: str) -> Iterator[tuple[FileInfo, str]]:
    """(info, path below the address) of every file there; none where there is no such folder."""
    from pyarrow.fs import FileSelector, FileType

    system, path = opened(uri)
    try:
        infos = system.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
    except OSError as error:
        raise StorageAwayError(f"{uri} cannot be listed: {_first_line(error)}") from error
    for info in infos:
        if info.type is FileType.File:
            name = PurePosixPath(info.path).relative_to(path).as_posix()
            if not PurePosixPath(name).name.startswith("."):
                yield info, name


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
