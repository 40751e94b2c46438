"""Files under a root that is a path or a URI, read whole or in parts, also by processes that were forked."""

import bisect
import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from dist_gsl import storage
from dist_gsl.data.sources.base import Samples

IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
_MOST_OPEN: Final = 64
_READ_AHEAD: Final = 1 << 20


class Entry(NamedTuple):
    """A file: its name below the root, its size in bytes, and when it was changed, in nanoseconds."""

    name: str
    size: int
    changed: int

    @property
    def is_image(self) -> bool:
        return os.path.splitext(self.name)[1].lower() in IMAGE_SUFFIXES


class Files:
    """The files of a source.

    A path's are read by descriptors, which a forked process may use too. A URI's connection belongs to the process that made it.
    """

    def __init__(self, root: str) -> None:
        self._descriptors: dict[str, int] = {}
        self._system: tuple[int, Any, str] | None = None
        self.is_uri = storage.is_uri(root)
        self.root = root if self.is_uri else str(Path(root).expanduser().resolve())

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_descriptors": {}, "_system": None}

    def address(self, name: str = "") -> str:
        """For a message."""
        if not name:
            return self.root
        return storage.join(self.root, name) if self.is_uri else os.path.join(self.root, name)

    def is_file(self, name: str) -> bool:
        return self._kind(name) == "file"

    def is_folder(self, name: str = "") -> bool:
        return self._kind(name) == "folder"

    def _kind(self, name: str) -> str:
        if not self.is_uri:
            path = self.address(name)
            return "file" if os.path.isfile(path) else "folder" if os.path.isdir(path) else ""
        from pyarrow.fs import FileType

        system, path = self._opened(name)
        return {FileType.File: "file", FileType.Directory: "folder"}.get(system.get_file_info(path).type, "")

    def listing(self, below: str = "") -> list[Entry]:
        """All files below a folder, at any depth, in the order of their names; none whose name, or folder's, begins with a dot."""
        found = list(self._walk_uri(below) if self.is_uri else self._walk(below))
        return sorted(found)

    def folders(self, below: str = "") -> list[str]:
        """Names of the folders in a folder, in order."""
        prefix = f"{below}/" if below else ""
        if not self.is_uri:
            with os.scandir(self.address(below)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        return sorted({name[len(prefix) :].partition("/")[0] for name, _, _ in self.listing(below) if "/" in name[len(prefix) :]})

    def _walk(self, below: str) -> Iterator[Entry]:
        with os.scandir(self.address(below)) as entries:
            for entry in entries:
                name = f"{below}/{entry.name}" if below else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from self._walk(name)
                elif entry.is_file():
                    status = entry.stat()
                    yield Entry(name, status.st_size, status.st_mtime_ns)

    def _walk_uri(self, below: str) -> Iterator[Entry]:
        from pyarrow.fs import FileSelector, FileType

        system, path = self._opened(below)
        start = len(self._opened("")[1].rstrip("/")) + 1
        for info in system.get_file_info(FileSelector(path, recursive=True, allow_not_found=True)):
            name = info.path[start:]
            if info.type is FileType.File and not any(part.startswith(".") for part in name.split("/")):
                yield Entry(name, info.size, info.mtime_ns or 0)

    def read(self, name: str) -> bytes:
        if self.is_uri:
            system, path = self._opened(name)
            with system.open_input_file(path) as file:
                return bytes(file.read())
        return Path(self.address(name)).read_bytes()

    def read_at(self, name: str, offset: int, size: int) -> bytes:
        """A part of a file, which stays open for the next one."""
        if self.is_uri:
            system, path = self._opened(name)
            with system.open_input_file(path) as file:
                return bytes(file.read_at(size, offset))
        if name not in self._descriptors:
            while len(self._descriptors) >= _MOST_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[name] = os.open(self.address(name), os.O_RDONLY)
        return os.pread(self._descriptors[name], size, offset)

    def open(self, name: str) -> BinaryIO:
        """A file that can be sought in."""
        if not self.is_uri:
            return Path(self.address(name)).open("rb")
        system, path = self._opened(name)
        return io.BufferedReader(system.open_input_file(path), _READ_AHEAD)

    def _opened(self, name: str) -> tuple[Any, str]:
        if self._system is None or self._system[0] != os.getpid():
            self._system = (os.getpid(), *storage.opened(self.root))
        _, system, path = self._system
        return system, f"{path.rstrip('/')}/{name}" if name else path

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class Names(Sequence[str]):
    """Very many strings in two arrays: a third of the memory, and none of it is copied by the processes that only read it."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        start, end = self._ends[place % len(self) :][:2]
        return self._text[start:end].decode("utf-8", "surrogateescape")


class FileSamples(Samples):
    """Image files and their classes; a file is read each time it is asked for."""

    def __init__(self, files: Files, names: Sequence[str], labels: Sequence[int]) -> None:
        assert len(names) == len(labels)
        self.files, self.names, self.labels = files, Names(names), np.asarray(labels, np.int64)
        self.may_fork = not files.is_uri

    def __len__(self) -> int:
        return len(self.names)

    def read(self, position: int) -> tuple[bytes, int]:
        return self.files.read(self.names[position]), int(self.labels[position])

    def describe(self, position: int) -> str:
        return self.files.address(self.names[position])


class Member(NamedTuple):
    """A file in a tar archive, which is itself a file or lies in another archive."""

    name: str
    offset: int
    size: int


def members(files: Files, name: str) -> Iterator[Member]:
    """The files of a tar archive, of which only the headers are read; and those of archives in it, by ARCHIVE/NAME.

    `ValueError` where it is no such archive, or is compressed, so that nothing can be found in it by its place.
    """
    with files.open(name) as file:
        yield from _members(file, files.address(name), 0, "")


def _members(file: Any, address: str, start: int, prefix: str) -> Iterator[Member]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            archive: Any = opened
            for member in archive:
                archive.members = []  # which would grow with every one
                if not member.isfile():
                    continue
                place = start + member.offset_data
                if member.name.endswith(".tar"):
                    inner = archive.extractfile(member)
                    assert inner is not None
                    folder = f"{prefix}{os.path.splitext(os.path.basename(member.name))[0]}/"
                    yield from _members(inner, f"{address}/{member.name}", place, folder)
                else:
                    yield Member(prefix + member.name, place, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{address} is no tar archive that is not compressed ({error}): download it again") from error


class TarSamples(Samples):
    """Images in tar archives, found by their place."""

    def __init__(
        self, files: Files, archives: Sequence[str], counts: Sequence[int], found: Sequence[Member], labels: Sequence[int]
    ) -> None:
        """counts: how many of `found` each archive has, in order."""
        assert sum(counts) == len(found) == len(labels)
        self.files, self.archives = files, list(archives)
        self._ends = np.cumsum(counts).tolist()
        self._names = Names(member.name for member in found)
        self._offsets = np.array([member.offset for member in found], np.int64)
        self._sizes = np.array([member.size for member in found], np.int64)
        self.labels: NDArray[np.int64] = np.asarray(labels, np.int64)
        self.may_fork = not files.is_uri

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, position: int) -> tuple[bytes, int]:
        archive, size = self._archive(position), int(self._sizes[position])
        content = self.files.read_at(archive, int(self._offsets[position]), size)
        if len(content) < size:
            raise OSError(f"{self.files.address(archive)} is shorter than it says: download it again")
        return content, int(self.labels[position])

    def describe(self, position: int) -> str:
        return f"{self._names[position]} in {self.files.address(self._archive(position))}"

    def _archive(self, position: int) -> str:
        return self.archives[bisect.bisect_right(self._ends, position)]
