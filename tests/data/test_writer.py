"""Writing that is disturbed: what is left, and how the next call goes on."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from dist_gsl import data
from dist_gsl.data import beton, sources, writer
from dist_gsl.data.sources import open_source

pytestmark = pytest.mark.timeout(120)  # nothing here may hang


class _Fails(sources.Samples):
    """Readable up to a place: a disk that goes away."""

    block = 4

    def __init__(self, inner: sources.Samples, error: type[BaseException], *, at: int) -> None:
        self.inner, self.error, self.at = inner, error, at

    def __len__(self) -> int:
        return len(self.inner)

    def read(self, position: int) -> tuple[Any, Any]:
        if position >= self.at:
            raise self.error("the disk went away")
        return self.inner.read(position)


def patched(monkeypatch: pytest.MonkeyPatch, split: str, change: Callable[[sources.Samples], sources.Samples]) -> None:
    def open_changed(*args: Any, **kwargs: Any) -> sources.Source:
        source = open_source(*args, **kwargs)
        return sources.Source(**{**vars(source), "splits": {**source.splits, split: change(source.splits[split])}})

    monkeypatch.setattr(beton, "open_source", open_changed)


DIGITS = {"train": 20, "val": 18, "test": 5}


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_data_set_and_the_next_call_goes_on(
    chars_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, error: type[BaseException]
) -> None:
    directory, whole = tmp_path / "copy", tmp_path / "whole"
    shutil.copytree(chars_dir, directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    patched(monkeypatch, "val", lambda samples: _Fails(samples, error, at=10))
    with pytest.raises(error):
        data.write("digits", directory, counts=DIGITS, num_workers=num_workers)
    assert {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith(".")} == before

    calls: list[tuple[str, int, int]] = []
    patched(monkeypatch, "val", lambda samples: _Fails(samples, error, at=99))
    data.write("digits", directory, counts=DIGITS, num_workers=num_workers, progress=lambda *call: calls.append(call))
    assert calls[0] == ("writing val", 8, 18)
    data.write("digits", whole, counts=DIGITS)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


@pytest.mark.parametrize("damage", ["journal", "sizes", "part"])
def test_what_was_left_is_not_trusted_blindly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """A machine whose power went may have lost the end of any of the files."""
    directory, whole = tmp_path / "out", tmp_path / "whole"
    patched(monkeypatch, "train", lambda samples: _Fails(samples, OSError, at=13))
    with pytest.raises(OSError, match="went away"):
        data.write("digits", directory, counts=DIGITS)
    part, sizes, journal = writer.parts(directory / "train.beton")
    patched(monkeypatch, "train", lambda samples: _Fails(samples, OSError, at=99))
    data.write("digits", whole, counts=DIGITS)
    if damage == "journal":
        journal.write_bytes(journal.read_bytes()[:-10])
    elif damage == "sizes":
        sizes.write_bytes(sizes.read_bytes()[:-10])
    else:
        content = bytearray(part.read_bytes())
        content[-1000:] = bytes(1000)
        part.write_bytes(content)
    if damage == "part":
        with pytest.raises(data.DataError, match="did not come to the disk as it was written"):
            data.write("digits", directory, counts=DIGITS)
    data.write("digits", directory, counts=DIGITS)
    for name in ("train.beton", "dataset.json"):
        assert (directory / name).read_bytes() == (whole / name).read_bytes()


def test_a_killed_process_ends_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kills(_Fails):
        def read(self, position: int) -> tuple[Any, Any]:
            if position == 13:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.inner.read(position)

    patched(monkeypatch, "train", lambda samples: Kills(samples, OSError, at=99))
    with pytest.raises(RuntimeError, match="ended early"):
        data.write("digits", tmp_path, counts=DIGITS, num_workers=2)
    monkeypatch.setattr(beton, "open_source", open_source)
    data.write("digits", tmp_path, counts=DIGITS)
    assert {path.name for path in tmp_path.iterdir()} == {"train.beton", "val.beton", "test.beton", "dataset.json"}


def test_a_process_that_is_killed_while_it_sends_ends_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block that is larger than a pipe, half is there when its process dies."""
    send = Connection.send

    def killed(self: Connection, obj: Any) -> None:
        if isinstance(obj, writer.Block) and os.getpid() != parent:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
            obj.contents.append(bytes(10_000_000))
        if isinstance(obj, tuple) and os.getpid() == parent and obj[0] > 0:
            time.sleep(1.5)  # nobody reads meanwhile
        send(self, obj)

    parent = os.getpid()
    monkeypatch.setattr(Connection, "send", killed)
    patched(monkeypatch, "train", lambda samples: _Fails(samples, OSError, at=99))
    with pytest.raises(RuntimeError, match="ended early"):
        data.write("digits", tmp_path, counts=DIGITS, num_workers=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_program_stops(image_folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    code = f"""
import sys, time
from dist_gsl.cli import main
from dist_gsl.data.sources.files import FileSamples

read, FileSamples.block = FileSamples.read, 6

def slowly(self, position):
    print("reading", flush=True)
    time.sleep(0.5)
    return read(self, position)

FileSamples.read = slowly
sys.exit(main(["data", "write", "imagefolder:{image_folder}", {str(out)!r}, "--workers", "2"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as program:  # fmt: skip
        assert program.stdout is not None
        assert program.stderr is not None
        while program.stdout.readline() != "reading\n":
            pass
        time.sleep(0.3)
        os.killpg(program.pid, number)
        assert program.wait(timeout=30) != 0
        printed = program.stderr.read()
    said = "terminated" if number == signal.SIGTERM else "interrupted"
    assert printed.strip().splitlines()[-1] == f"dist-gsl: {said}; the same command goes on where it was"
    assert "Traceback" not in printed
    assert not list(out.glob("*.beton"))


def test_grey_images_that_are_bad_are_skipped_from_the_first_on(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "train" / "cat" / "00.jpg").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"00\.jpg cannot be decoded.*--on-bad skip"):
        data.write(f"imagefolder:{image_folder}", tmp_path / "out", grey=16)
    data.write(f"imagefolder:{image_folder}", tmp_path / "out", grey=16, on_bad="skip")
    [skipped] = data.dataset_info(tmp_path / "out").splits["train"].skipped
    assert skipped.name.endswith("00.jpg")


def test_another_versions_beginning_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, "train", lambda samples: _Fails(samples, OSError, at=13))
    with pytest.raises(OSError, match="went away"):
        data.write("digits", tmp_path, counts=DIGITS)
    patched(monkeypatch, "train", lambda samples: _Fails(samples, OSError, at=99))
    monkeypatch.setattr(writer, "VERSION", writer.VERSION + 1)
    calls: list[tuple[str, int, int]] = []
    data.write("digits", tmp_path, counts=DIGITS, progress=lambda *call: calls.append(call))
    assert calls[0] == ("writing train", 0, 20)


def test_a_full_disk_is_said_and_the_rest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system of a few MiB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("file systems may not be mounted here")
    try:
        with pytest.raises(OSError, match="No space left"):
            data.write("chars", disk, counts={"train": 2500, "val": 10, "test": 10, "test_fonts": 10})
        assert not list(disk.glob("*.beton"))
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        data.write("chars", disk, counts={"train": 2500, "val": 10, "test": 10, "test_fonts": 10})
        assert data.check(disk / "train.beton", full=True).num_samples == 2500
    finally:
        subprocess.run(["umount", disk], check=True)


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".train.beton.123.part").write_bytes(b"half")
    data.write("digits", tmp_path, counts={"train": 20, "val": 10, "test": 5})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"train.beton", "val.beton", "test.beton", "dataset.json"}


def test_an_interrupted_program_can_be_gone_on_with(image_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C on a real terminal reaches the writer's processes too."""
    out = tmp_path / "out"
    code = f"""
import os, time
from dist_gsl import data
from dist_gsl.data import images

parent, decode = os.getpid(), images.decode

def decode_slowly(content):
    if os.getpid() != parent:
        os.write(1, b"writing\\n")
        time.sleep(60)
    return decode(content)

images.decode = decode_slowly
from dist_gsl.data.sources.files import FileSamples
FileSamples.block = 6
data.write("imagefolder:{image_folder}", {str(out)!r}, num_workers=2)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
    ) as program:  # fmt: skip
        assert program.stdout is not None
        assert program.stderr is not None
        for _ in range(2):
            assert program.stdout.readline() == "writing\n"
        time.sleep(0.3)  # the program may still be inside fork, where Python drops the signal
        os.killpg(program.pid, signal.SIGINT)
        assert program.wait(timeout=30) != 0
        assert "KeyboardInterrupt" in program.stderr.read()
    assert not list(out.glob("*.beton"))
    data.write(f"imagefolder:{image_folder}", out)
    assert {path.name for path in out.iterdir()} == {"train.beton", "val.beton", "dataset.json"}


def test_a_killed_program_leaves_no_process_and_can_be_gone_on_with(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"""
import time
from dist_gsl import data
from dist_gsl.data.sources.files import FileSamples

read, FileSamples.block = FileSamples.read, 6

def read_or_wait(self, position):
    if position >= 12:
        time.sleep(60)
    return read(self, position)

FileSamples.read = read_or_wait
data.write("imagefolder:{image_folder}", {str(out)!r}, num_workers=2, progress=lambda what, done, total: print(done, flush=True))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        while program.stdout.readline() != "12\n":
            pass
        workers = [int(pid) for pid in Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()]
        assert len(workers) == 2
        program.kill()
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/exe").exists() for pid in workers):
        assert time.monotonic() < until, "they are still there"
        time.sleep(0.05)
    assert not list(out.glob("*.beton"))
    calls: list[tuple[str, int, int]] = []
    data.write(f"imagefolder:{image_folder}", out, progress=lambda *call: calls.append(call))
    assert calls[0] == ("writing train", 12, 24)
    data.write(f"imagefolder:{image_folder}", tmp_path / "whole")
    for name in ("train.beton", "val.beton"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list(out.iterdir())) == 3
