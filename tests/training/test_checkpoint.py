"""Checkpoints are there whole or not at all, damaged ones are known, and a storage that fails does not end a training."""

import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_gsl import storage
from dist_gsl.storage import StorageAwayError
from dist_gsl.training import checkpoint
from dist_gsl.training.checkpoint import (
    FORMAT,
    Checkpoints,
    DamagedError,
    Writer,
    name_of,
    patiently,
    position_of,
    snapshot,
)
from tests.object_store import KEYS, s3


def state_at(epoch: int, step: int = 0, value: float = 0.0) -> dict[str, Any]:
    return {"format": FORMAT, "position": {"epoch": epoch, "step": step}, "model": {"w": torch.full((3, 2), value)}}


def damage(file: Path, at: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(bytes(content))


@pytest.fixture(scope="module", params=["path", "file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("store")
    if request.param != "s3":
        yield str(folder) if request.param == "path" else folder.as_uri()
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        with s3() as uri:
            yield uri


@pytest.fixture
def place(root: str, request: pytest.FixtureRequest) -> str:
    name = request.node.originalname
    return storage.join(root, name) if storage.is_uri(root) else f"{root}/{name}"


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    state = state_at(1, 5, value=2.0)
    file = checkpoint.save(state, tmp_path / "kept")
    for path in (file, file.parent):
        loaded = checkpoint.load(path)
        assert torch.equal(loaded.pop("model")["w"], state["model"]["w"])
        assert loaded == {"format": FORMAT, "position": {"epoch": 1, "step": 5}}
    assert [each.name for each in tmp_path.iterdir()] == ["kept"]
    assert file.parent.stat().st_mode & 0o777 == tmp_path.joinpath("kept").stat().st_mode & 0o777 != 0o700


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = checkpoint.save(state_at(1), tmp_path / "kept")
    before = file.read_bytes()

    def full_disk(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")  # as torch says it

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="cannot be written"):
            checkpoint.save(state_at(2), tmp_path / "kept")
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["kept"]


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    """Any one of any file, 500 at random."""
    folder = checkpoint.save(state_at(1), tmp_path / "kept").parent
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["state.pt", "state.pt.sha256"]
    contents = [file.read_bytes() for file in files]
    rng = random.Random(0)
    for _ in range(500):
        at = rng.randrange(sum(map(len, contents)))
        number, at = (0, at) if at < len(contents[0]) else (1, at - len(contents[0]))
        changed = bytearray(contents[number])
        changed[at] ^= rng.randrange(1, 256)
        files[number].write_bytes(bytes(changed))
        with pytest.raises(DamagedError, match="its checksum is another"):
            checkpoint.load(folder)
        files[number].write_bytes(contents[number])
    checkpoint.load(folder)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        checkpoint.load(tmp_path / "elsewhere")
    file = checkpoint.save({"format": 99, "position": {}}, tmp_path / "future")
    with pytest.raises(ValueError, match="not a checkpoint of this version"):
        checkpoint.load(file)
    file.with_name("state.pt.sha256").unlink()
    with pytest.raises(DamagedError, match="copy both files"):
        checkpoint.load(file)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "run",))

    with pytest.raises(DamagedError, match="not readable"):
        checkpoint.load(checkpoint.save({"format": FORMAT, "model": Evil()}, tmp_path / "kept"))
    assert not (tmp_path / "run").exists()


def test_names_are_positions() -> None:
    positions = [(0, 7), (1, 0), (1, 12), (2, 0), (12345, 0), (12345, 10**7)]
    assert [position_of(name_of(*each)) for each in positions] == positions
    assert position_of("checkpoint_manager_snapshot.json") is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # botocore's own
def test_the_last_two_are_kept(place: str) -> None:
    checkpoints = Checkpoints(place)
    assert checkpoints.last() is None
    for epoch, step in ((0, 5), (1, 0), (1, 5)):
        assert checkpoints.write(state_at(epoch, step)) == name_of(epoch, step)
    assert checkpoints.names() == ["epoch-0001-step-000005", "epoch-0001"]
    checkpoints.write(state_at(1, 5, value=3.0))  # once more, after a return to an earlier one
    name, state = checkpoints.last() or ("", {})
    assert name == "epoch-0001-step-000005"
    assert float(state["model"]["w"][0, 0]) == 3.0


def test_a_damaged_one_is_passed_over_and_goes_with_the_next(tmp_path: Path) -> None:
    for epoch in (1, 2):
        Checkpoints(tmp_path).write(state_at(epoch))
    damage(tmp_path / "epoch-0002" / "state.pt")
    checkpoints, warned = Checkpoints(tmp_path), list[str]()
    name, state = checkpoints.last(warned.append) or ("", {})
    assert (name, state["position"]["epoch"]) == ("epoch-0001", 1)
    assert len(warned) == 1
    assert "epoch-0002: damaged" in warned[0]
    assert "passed over" in warned[0]
    checkpoints.write(state_at(1, 5))
    assert checkpoints.names() == ["epoch-0001-step-000005", "epoch-0001"]  # both good


def test_one_without_its_file_is_passed_over(tmp_path: Path) -> None:
    for epoch in (1, 2):
        Checkpoints(tmp_path).write(state_at(epoch))
    (tmp_path / "epoch-0002" / "state.pt").unlink()
    warned: list[str] = []
    assert (Checkpoints(tmp_path).last(warned.append) or ("",))[0] == "epoch-0001"
    assert "state.pt is not there" in warned[0]


def test_one_that_cannot_be_read_is_passed_over_when_patience_ends(tmp_path: Path) -> None:
    class Unreadable(Checkpoints):
        def read(self, name: str) -> Any:
            if name == "epoch-0002":
                raise StorageAwayError(f"{name}: Input/output error")
            return super().read(name)

    for epoch in (1, 2):
        Checkpoints(tmp_path).write(state_at(epoch))
    with pytest.raises(StorageAwayError):  # nobody waited: it may be there in a moment
        Unreadable(tmp_path).last()
    warned: list[str] = []
    assert (Unreadable(tmp_path).last(warned.append, patience_s=0.01) or ("",))[0] == "epoch-0001"
    assert "Input/output error; it is passed over" in warned[0]


def test_no_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Checkpoints(tmp_path).write(state_at(1))
    of_torch = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    for error in (MemoryError(), of_torch, OSError(5, "Input/output error")):
        with monkeypatch.context() as patch:

            def fails(*_: object, error: Exception = error, **__: object) -> None:
                raise error

            patch.setattr(torch, "load", fails)
            with pytest.raises((MemoryError, StorageAwayError)):
                Checkpoints(tmp_path).last()
    assert Checkpoints(tmp_path).last() is not None


def test_one_that_led_nowhere_is_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(state_at(1))
    assert not checkpoints.pass_over("epoch-0001")  # the only one
    checkpoints.write(state_at(2))
    assert checkpoints.pass_over("epoch-0002")
    assert (checkpoints.last() or ("",))[0] == "epoch-0001"
    checkpoints.write(state_at(1, 4))
    assert checkpoints.names() == ["epoch-0001-step-000004", "epoch-0001"]


def test_what_was_to_be_replaced_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two renames fails, or the process is killed between them."""
    file = checkpoint.save(state_at(1, value=1.0), tmp_path / "epoch-0001")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if Path(target) == file.parent and not self.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="Input/output"):
            checkpoint.save(state_at(1, value=2.0), file.parent)
    assert [each.name for each in tmp_path.iterdir()] == ["epoch-0001"]
    file.parent.rename(tmp_path / ".epoch-0001.0a1b2c3d.old")
    (tmp_path / ".epoch-0001.0a1b2c3d").mkdir()
    _, state = Checkpoints(tmp_path).last() or ("", {})
    assert float(state["model"]["w"][0, 0]) == 1.0


def test_nothing_but_damaged_ones_is_no_beginning(tmp_path: Path) -> None:
    Checkpoints(tmp_path).write(state_at(1))
    damage(tmp_path / "epoch-0001" / "state.pt")
    with pytest.raises(DamagedError, match="damaged"):
        Checkpoints(tmp_path).last()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_half_of_an_upload_is_passed_over(root: str, place: str) -> None:
    checkpoints = Checkpoints(place)
    checkpoints.write(state_at(1))
    if not storage.is_uri(place):
        shutil.copytree(Path(place) / "epoch-0001", Path(place) / "epoch-0002")
        (Path(place) / "epoch-0002" / "state.pt.sha256").unlink()
    else:
        file = Path(__file__)
        storage.upload(file, storage.join(place, "epoch-0002", "state.pt"))
    assert checkpoints.names()[0] == "epoch-0002"
    assert (checkpoints.last() or ("",))[0] == "epoch-0001"


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".epoch-0001.abc").mkdir()
    (tmp_path / ".epoch-0001.abc" / "state.pt").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last() is None
    checkpoints.write(state_at(1))
    assert [each.name for each in tmp_path.iterdir()] == ["epoch-0001"]


def test_a_snapshot_is_a_copy() -> None:
    tensor = torch.arange(3.0)
    state = {"a": [tensor, {"b": (tensor, "text", 1)}]}
    copy = snapshot(state)
    tensor.zero_()
    assert copy["a"][0].tolist() == [0, 1, 2]
    assert copy["a"][1]["b"][0].tolist() == [0, 1, 2]
    assert copy["a"][1]["b"][1:] == ("text", 1)


class Failing(Checkpoints):
    """A storage that is away until it is let go: a test double, as no disk can be filled here."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.is_away = True
        self.tried = threading.Semaphore(0)

    def write(self, state: Any) -> str:
        self.tried.release()
        if self.is_away:
            raise StorageAwayError(f"{self.folder}: No space left on device")
        return super().write(state)


def test_a_storage_that_fails_and_returns(tmp_path: Path) -> None:
    warned: list[str] = []
    checkpoints = Failing(tmp_path)
    writer = Writer(checkpoints, warned.append)
    writer.put(state_at(1))
    checkpoints.tried.acquire(timeout=10)
    with pytest.raises(StorageAwayError, match=r"the last checkpoint is not written .*No space left on device.*--resume"):
        writer.flush(0.1)
    writer.put(state_at(2))  # training has gone on
    checkpoints.is_away = False
    writer.close(30)
    assert checkpoints.names()[0] == "epoch-0002"
    assert len(warned) == 1
    assert "checkpoint epoch-0001 is not written" in warned[0]


def test_an_error_of_another_kind_does_not_end_the_writer(tmp_path: Path) -> None:
    class Broken(Checkpoints):
        tries = 0

        def write(self, state: Any) -> str:
            self.tries += 1
            if self.tries == 1:
                raise KeyError("region")
            return super().write(state)

    warned: list[str] = []
    writer = Writer(Broken(tmp_path), warned.append)
    writer.put(state_at(1))
    writer.close(30)
    assert Checkpoints(tmp_path).names() == ["epoch-0001"]
    assert "epoch-0001 is not written: KeyError: 'region'" in warned[0]


def test_what_waits_can_be_discarded(tmp_path: Path) -> None:
    checkpoints = Failing(tmp_path)
    writer = Writer(checkpoints, lambda text: None)
    writer.put(state_at(2))
    assert checkpoints.tried.acquire(timeout=10)
    writer.discard()
    checkpoints.is_away = False
    writer.flush(10)
    assert Checkpoints(tmp_path).names() == []
    writer.put(state_at(1))
    writer.close(30)
    assert Checkpoints(tmp_path).names() == ["epoch-0001"]


def test_a_training_does_not_wait_for_the_writer(tmp_path: Path) -> None:
    free, begun = threading.Event(), threading.Event()

    class Slow(Checkpoints):
        def write(self, state: Any) -> str:
            begun.set()
            assert free.wait(30)
            return super().write(state)

    writer = Writer(Slow(tmp_path), pytest.fail)
    writer.put(state_at(1))
    assert begun.wait(30)
    writer.put(state_at(2))
    writer.put(state_at(3))  # takes the place of the one that waits
    free.set()
    writer.close(30)
    assert Slow(tmp_path).names() == ["epoch-0003", "epoch-0001"]


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [StorageAwayError("away"), StorageAwayError("away"), "here"]
    warned: list[str] = []
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)

    def ask() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(ask, warned.append) == "here"
    assert warned == ["away; it is tried again for 10 minutes"]
    answers[:] = [StorageAwayError("away")]
    with pytest.raises(StorageAwayError):
        patiently(ask, warned.append, patience_s=0)
