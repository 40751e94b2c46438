"""Checkpoints: a run's whole state on storage, there whole or not at all, known by its checksum, loaded without running anything in it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dist_gsl import storage
from dist_gsl.storage import StorageAwayError

FORMAT = 2
"""Version of the layout of a checkpoint."""
FILE = "state.pt"
CHECKSUM = f"{FILE}.sha256"
"""File beside it, as `sha256sum` writes and checks it."""
KEPT = 2
"""Checkpoints that a run keeps."""
OLD = ".old"
"""End of the name of what is about to be replaced."""
PATIENCE_S = 600.0
"""How long a run waits at its end, or to begin, for a storage that does not answer."""
State = dict[str, Any]
T = TypeVar("T")


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


class NotWrittenError(StorageAwayError):
    """The last checkpoint is not on storage when it should be."""


# --- one checkpoint in a folder


def save(state: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes a state as `folder`/state.pt with its checksum beside it: in a temporary folder, which is then renamed. The file.

    `OSError` where that fails; what was there before is then still there.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")  # as `mkdtemp`, which would make it its maker's alone
    old = temporary.with_name(f"{temporary.name}{OLD}")
    try:
        temporary.mkdir()
        _write(state, temporary)
        is_there = folder.exists()
        if is_there:
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if is_there:
                old.rename(folder)
            raise
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if is_there:
        shutil.rmtree(old, ignore_errors=True)
    return folder / FILE


def _write(state: Mapping[str, Any], folder: Path) -> None:
    try:
        with (folder / FILE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch's own, where a write fails
        raise OSError(f"{folder / FILE} cannot be written: {str(error).splitlines()[0]}") from error
    with (folder / CHECKSUM).open("w", encoding="ascii") as file:
        file.write(_checksum(folder / FILE))
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def load(path: str | Path) -> State:
    """The state in a checkpoint's file or folder, on the CPU.

    `DamagedError`, a `ValueError`, where it is not the one that was written; `ValueError` where there is none or it is of another version;
    `OSError` where it cannot be read.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if path.is_dir() and position_of(path.name) is not None and not file.is_file():
        raise DamagedError(f"checkpoint {path}: {FILE} is not there; take an older one or copy it again")
    if not file.is_file():
        raise ValueError(f"checkpoint {path}: no such file; name a run's checkpoints/*/{FILE}")
    checksum = file.with_name(f"{file.name}.sha256")
    if not checksum.is_file():
        raise DamagedError(f"checkpoint {path}: {checksum.name} is not beside it, so that nobody knows whether it is whole; copy both files")
    if checksum.read_bytes() != _checksum(file).encode():
        raise DamagedError(f"checkpoint {path}: damaged, its checksum is another; take an older one or copy it again")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise  # of this machine, not of the file
    except Exception as error:  # whatever a foreign file makes torch raise
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # torch's own allocator says it so
            raise MemoryError(str(error).splitlines()[0]) from error
        raise DamagedError(f"checkpoint {path}: not readable ({type(error).__name__}); it is another kind of file") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path}: not a checkpoint of this version (format {FORMAT}); train again or use the version that wrote it"
        )
    return state


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {file.name}\n"


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some mounts do not do it for folders
            raise
    finally:
        os.close(handle)


# --- those of a run


def name_of(epoch: int, step: int) -> str:
    """The folder of the state after `epoch` whole epochs and `step` steps of the next."""
    return f"epoch-{epoch:04d}" + (f"-step-{step:06d}" if step else "")


def position_of(name: str) -> tuple[int, int] | None:
    """The inverse of `name_of`; None for another name."""
    matched = re.fullmatch(r"epoch-(\d{4,})(?:-step-(\d{6,}))?", name)
    return None if matched is None else (int(matched[1]), int(matched[2] or 0))


class Checkpoints:
    """A run's checkpoints in a folder, by path or URI: the last two good ones."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self._passed_over: set[str] = set()
        self._is_clean = False
        self._lock = threading.RLock()  # one thread writes, another may look for the last one

    def names(self) -> list[str]:
        """The last one first. `StorageAwayError` where they cannot be listed."""
        return sorted((name for name in self._listed() if position_of(name) is not None), key=lambda n: position_of(n) or (0, 0), reverse=True)

    def write(self, state: Mapping[str, Any]) -> str:
        """Writes a state and deletes what it makes superfluous: all but the last two, and those that were found damaged. Its name."""
        name = name_of(**state["position"])
        with self._lock, _oserror_as_away(self.folder):
            if not self._is_clean:
                self._remove_unfinished()
                self._is_clean = True
            if storage.is_uri(self.folder):
                with tempfile.TemporaryDirectory() as temporary:
                    file = save(state, Path(temporary) / name)
                    storage.remove(self._at(name))  # or a file of one could lie beside the checksum of another
                    storage.upload(file, self._at(name, FILE))
                    storage.upload(file.with_name(CHECKSUM), self._at(name, CHECKSUM))
            else:
                save(state, Path(self.folder) / name)
            self._passed_over.discard(name)
            good = [each for each in self.names() if each not in self._passed_over]
            for each in (*self._passed_over, *good[KEPT:]):
                self._remove(each)
            self._passed_over.clear()
        return name

    def read(self, name: str) -> State:
        """`DamagedError` where it is not what was written, `StorageAwayError` where that cannot be known now."""
        if not storage.is_uri(self.folder):
            with _oserror_as_away(self.folder):
                return load(Path(self.folder) / name)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name
            for file in (FILE, CHECKSUM):
                if not storage.fetch(self._at(name, file), folder / file):
                    raise DamagedError(f"checkpoint {self._at(name)}: {file} is not there")
            return load(folder)

    def last(self, warn: Callable[[str], None] = lambda text: None, *, patience_s: float = 0.0) -> tuple[str, State] | None:
        """(name, state) of the last good one; None where there is none. `warn` hears of those that are damaged and passed over.

        patience_s: for how long a storage that is away is asked again. After that one that cannot be read is passed over too.

        `DamagedError` or `StorageAwayError` where all are passed over: to begin anew would be another thing than to go on.
        """
        problem: DamagedError | StorageAwayError | None = None
        with self._lock:
            patiently(self._restore, warn, patience_s=patience_s)
            for name in patiently(self.names, warn, patience_s=patience_s):
                if name in self._passed_over:
                    continue
                try:
                    return name, patiently(partial(self.read, name), warn, patience_s=patience_s)
                except (DamagedError, StorageAwayError) as error:
                    if isinstance(error, StorageAwayError) and not patience_s:
                        raise
                    problem = error
                    self._passed_over.add(name)
                    warn(f"{error}; it is passed over")
            if problem is not None:
                self._passed_over.clear()
                raise problem
        return None

    def pass_over(self, name: str) -> bool:
        """Makes the one before it the last one, if there is one; whether there is."""
        with self._lock:
            others = [each for each in self.names() if each not in self._passed_over and each != name]
            if others:
                self._passed_over.add(name)
            return bool(others)

    def _at(self, *names: str) -> str:
        return storage.join(self.folder, *names)

    def _listed(self) -> list[str]:
        if storage.is_uri(self.folder):
            return storage.subfolders(self.folder)
        folder = Path(self.folder)
        with _oserror_as_away(self.folder):
            return [each.name for each in folder.iterdir() if each.is_dir()] if folder.is_dir() else []

    def _remove(self, name: str) -> None:
        if storage.is_uri(self.folder):
            storage.remove(self._at(name))
            return
        # Renamed first: while it is deleted it is no checkpoint any more.
        gone = Path(self.folder) / f".{name}.deleted"
        with suppress(FileNotFoundError):
            (Path(self.folder) / name).rename(gone)
            shutil.rmtree(gone)

    def _remove_unfinished(self) -> None:
        """What a process left that was killed while it wrote."""
        if storage.is_uri(self.folder):
            return
        self._restore()
        for name in self._listed():
            if name.startswith(".epoch-"):
                shutil.rmtree(Path(self.folder) / name, ignore_errors=True)

    def _restore(self) -> None:
        """What a process was about to replace when it was killed."""
        if storage.is_uri(self.folder):
            return
        for name in self._listed():
            whose = re.fullmatch(rf"\.(epoch-[\d\w-]+)\.[0-9a-f]+{re.escape(OLD)}", name)
            if whose is not None and not (Path(self.folder) / whose[1]).exists():
                with _oserror_as_away(self.folder):
                    (Path(self.folder) / name).rename(Path(self.folder) / whose[1])


@contextmanager
def _oserror_as_away(folder: str) -> Iterator[None]:
    try:
        yield
    except StorageAwayError:
        raise
    except OSError as error:
        raise StorageAwayError(f"{folder}: {error.strerror or str(error).splitlines()[0]}") from error


def patiently(do: Callable[[], T], warn: Callable[[str], None], *, patience_s: float = PATIENCE_S) -> T:
    """What `do` gives, tried again while the storage is away, or a disk full (see `storage.may_pass`). That `OSError` when patience ends."""
    end, pause_s = time.monotonic() + patience_s, 1.0
    while True:
        try:
            return do()
        except OSError as error:
            if not storage.may_pass(error) or time.monotonic() + pause_s > end:
                raise
            if pause_s == 1.0:
                warn(f"{error}; it is tried again for {patience_s / 60:g} minutes")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 30.0)


# --- written beside the training


def snapshot(value: Any) -> Any:
    """A copy on the CPU that training does not change any more."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: snapshot(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(each) for each in value)
    return value


class Writer:
    """Writes states in a thread of its own, so that training waits for a copy in memory alone.

    A state that comes while another is being written waits; the next one takes its place. Where writing fails, for whatever reason, `warn`
    says so once and the last state is tried again until it succeeds, a later one comes, it is discarded or `close` gives up.
    """

    def __init__(self, checkpoints: Checkpoints, warn: Callable[[str], None]) -> None:
        self._checkpoints, self._warn = checkpoints, warn
        self._changed = threading.Condition()
        self._waiting: State | None = None
        self._is_writing = False
        self._is_closing = False
        self._is_urgent = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def put(self, state: State) -> None:
        with self._changed:
            self._waiting = None  # or three would be in memory
        copy = snapshot(state)
        with self._changed:
            self._waiting, self._is_urgent = copy, True
            self._changed.notify_all()

    def flush(self, patience_s: float) -> None:
        """Waits until everything is written. `NotWrittenError` where it is not within the time given."""
        with self._changed:
            self._is_urgent = True  # it may be waiting to try again
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._waiting is None and not self._is_writing, timeout=patience_s):
                reason = f"{self._checkpoints.folder}: not written after {patience_s:g} s" if self._error is None else _in_a_line(self._error)
                raise NotWrittenError(f"the last checkpoint is not written ({reason}); make room or wait for the storage, then go on by --resume")

    def discard(self) -> None:
        """Forgets what waits to be written, and waits for what is being written."""
        with self._changed:
            self._waiting = None
            self._changed.wait_for(lambda: not self._is_writing)
            self._waiting = None

    def close(self, patience_s: float) -> None:
        """The same, and ends the thread."""
        try:
            self.flush(patience_s)
        finally:
            with self._changed:
                self._is_closing = True
                self._changed.notify_all()

    def _run(self) -> None:
        pause_s = 1.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._is_closing)
                if self._is_closing:
                    return
                state, self._waiting, self._is_writing = self._waiting, None, True
            assert state is not None
            error: Exception | None = None
            try:
                self._checkpoints.write(state)
                pause_s = 1.0
            except Exception as failure:  # or the thread would end, and nobody would notice
                error = failure
            with self._changed:
                is_new, self._error = error is not None and self._error is None, error
                self._is_writing = False
                if error is not None and self._waiting is None:
                    self._waiting = state
                self._is_urgent = False
                self._changed.notify_all()
            if error is not None:
                if is_new:
                    place = name_of(**state["position"])
                    self._warn(f"checkpoint {place} is not written: {_in_a_line(error)}; training goes on, and it is tried again")
                with self._changed:
                    woken = self._changed.wait_for(lambda: self._is_closing or self._is_urgent, timeout=pause_s)
                pause_s = 1.0 if woken else min(2 * pause_s, 30.0)
            state = None  # in memory no longer than needed


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, StorageAwayError) else f"{type(error).__name__}: {text}"
