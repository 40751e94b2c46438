"""Folders by URI: what is sent is what comes back, nothing is half there, and what cannot be is said in one line."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_gsl import data, storage
from dist_gsl.data.staging import staged_folder
from dist_gsl.storage import StorageAwayError, StorageError
from dist_gsl.tracking import check_owner
from tests.object_store import KEYS, s3

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # botocore's own


@pytest.fixture(scope="module")
def keys() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module", params=["file", "s3"])
def root(request: pytest.FixtureRequest, keys: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "file":
        yield tmp_path_factory.mktemp("store").as_uri()
    else:
        with s3() as uri:
            yield uri


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_GSL_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("DIST_GSL_STAGING", str(tmp_path / "staging"))


def test_addresses_are_joined_before_their_options() -> None:
    assert storage.join("s3://b/runs/?region=x", "a", "b") == "s3://b/runs/a/b?region=x"
    assert storage.join("file:///runs", "a") == "file:///runs/a"


@pytest.mark.parametrize("uri", ["nothing://x/y", "s3://"])
def test_what_no_file_system_takes_is_refused(uri: str) -> None:
    with pytest.raises(StorageError, match="cannot be opened"):
        storage.opened(uri)


def test_a_file_system_that_does_not_come_up_is_away() -> None:
    """As one without its library, or a name server without an answer: what waits for a storage waits for it too."""
    with pytest.raises(StorageAwayError, match="cannot be opened"):
        storage.opened("hdfs://nowhere:1/runs")


def test_keys_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(StorageError, match="leave keys out") as caught:
        storage.local_folder("s3://id:secret@bucket/runs")
    assert "secret" not in str(caught.value)


def test_archives_come_back_as_they_were(root: str, tmp_path: Path) -> None:
    """Where the name speaks of compression, nobody compresses again."""
    for name in ("kit.tar.gz", "kit.bz2", "kit.zst"):
        (tmp_path / name).write_bytes(b"content " * 100)
        storage.upload(tmp_path / name, storage.join(root, name))
        with storage.opened(root)[0].open_input_file(storage.opened(storage.join(root, name))[1]) as file:
            assert file.read() == b"content " * 100
        assert storage.read(storage.join(root, name)) == b"content " * 100
        storage.download(storage.join(root, name), tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b"content " * 100


def test_looking_leaves_nothing(root: str, tmp_path: Path) -> None:
    run = storage.local_run(storage.join(root, "looked-at", "x"))
    assert storage.remote_of(run) == storage.join(root, "looked-at", "x")
    assert not (tmp_path / "scratch").exists()


def test_an_address_too_long_for_a_name_is_refused() -> None:
    with pytest.raises(StorageError, match="is too long for an address"):
        storage.local_folder("file:///" + "x" * 300)


def test_a_copy_sends_what_changed_and_another_takes_it(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = storage.join(root, "runs")
    run = storage.local_folder(uri) / "first"
    (run / "plots").mkdir(parents=True)
    (run / "config.yaml").write_text("a: 1")
    (run / "plots" / "x.png").write_bytes(b"\x89PNG")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "state.pt").write_bytes(b"large")
    storage.push(run, without="checkpoints")
    assert {name for _, name in storage._remote_files(storage.join(uri, "first"))} == {"config.yaml", "plots/x.png"}

    monkeypatch.setenv("DIST_GSL_SCRATCH", str(tmp_path / "another machine"))
    other = storage.local_run(storage.join(uri, "first"))
    assert (other / "plots" / "x.png").read_bytes() == b"\x89PNG"
    assert not (other / "checkpoints").exists()
    (other / "config.yaml").write_text("a: 22")
    storage.push(other)

    monkeypatch.setenv("DIST_GSL_SCRATCH", str(tmp_path / "scratch"))
    storage.pull(run)
    assert (run / "config.yaml").read_text() == "a: 22"
    (run / "config.yaml").write_text("a: 333")  # newer here than there
    os.utime(run / "config.yaml", (2e9, 2e9))
    storage.pull(run)
    assert (run / "config.yaml").read_text() == "a: 333"
    storage.remove(storage.join(uri, "first"))
    assert list(storage._remote_files(storage.join(uri, "first"))) == []


def test_only_what_changed_is_sent(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = storage.local_folder(storage.join(root, "changes")) / "x"
    folder.mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "b").write_text("1")
    storage.push(folder)
    (folder / "b").write_text("22")
    sent: list[str] = []
    monkeypatch.setattr(storage, "upload", lambda source, uri: sent.append(source.name))
    storage.push(folder)
    assert sent == ["b"]


def test_what_was_deleted_there_goes_here_too(root: str) -> None:
    """But for what has not been sent yet."""
    uri = storage.join(root, "deleted")
    folder = storage.local_folder(uri) / "x"
    folder.mkdir(parents=True)
    (folder / "sent").write_text("1")
    storage.push(folder)
    (folder / "unsent").write_text("1")
    storage.remove(storage.join(uri, "x"))
    storage.pull(folder)
    assert {file.name for file in folder.iterdir()} == {"unsent", storage.SENT}


def test_what_was_taken_is_not_sent_back(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a look at a run would undo what its driver writes meanwhile."""
    uri = storage.join(root, "looking")
    driver = storage.local_folder(uri) / "x"
    driver.mkdir(parents=True)
    (driver / "log").write_text("1")
    storage.push(driver)
    monkeypatch.setenv("DIST_GSL_SCRATCH", str(tmp_path / "another machine"))
    look = storage.local_run(storage.join(uri, "x"))
    (driver / "log").write_text("1 2")
    storage.upload(driver / "log", storage.join(uri, "x", "log"))
    (look / "report").write_text("made")
    storage.push(look)
    assert storage.read(storage.join(uri, "x", "log")) == b"1 2"
    assert storage.read(storage.join(uri, "x", "report")) == b"made"


def test_a_file_of_the_same_name_is_fetched_again(root: str, tmp_path: Path) -> None:
    uri, here = storage.join(root, "again", "state.pt"), tmp_path / "here" / "state.pt"
    for content in ("first", "other"):  # of the same size
        (tmp_path / "state.pt").write_text(content)
        storage.upload(tmp_path / "state.pt", uri)
        assert storage.fetch(uri, here)
        assert here.read_text() == content
        time.sleep(1.1)  # as fine as an object store's clock
    storage.remove(storage.join(root, "again"))
    assert not storage.fetch(uri, here)
    assert not here.exists()


def test_a_folder_that_is_a_path_is_left_alone(tmp_path: Path) -> None:
    assert storage.local_folder("runs") == Path("runs")
    assert storage.remote_of(tmp_path) is None
    (tmp_path / "a").write_text("1")
    storage.push(tmp_path)
    storage.pull(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_file_with_another_checksum_does_not_appear(root: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("right")
    uri = storage.join(root, "sums", "a")
    storage.upload(tmp_path / "a", uri)
    with pytest.raises(StorageError, match="its checksum is not the one in its description"):
        storage.download(uri, tmp_path / "b", sha256="0" * 64)
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {"a"}


def test_a_database_is_not_kept_in_a_copy(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match=r"would lie in this machine's copy of .*: start a server"):
        check_owner(storage.local_folder(storage.join(root, "runs")), may_move=False)


# --- betons


@pytest.fixture(scope="module")
def betons(root: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("betons")
    data.write("digits", folder, counts={"train": 60, "val": 20, "test": 20})
    uri = storage.join(root, "data", "digits")
    for file in folder.iterdir():
        storage.upload(file, storage.join(uri, file.name))
    return uri


def test_a_node_copies_a_data_set_once(betons: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    folder = data.prepare(data.DataConfig(dir=betons), progress=lambda what, done, total: told.append(what))
    assert folder == staged_folder(betons)
    assert data.check(folder / "train.beton", full=True).num_samples == 60
    assert set(told) == {f"copying {split}.beton here, MiB" for split in ("train", "val", "test")}
    monkeypatch.setattr(storage, "download", None)
    assert data.prepare(data.DataConfig(dir=betons)) == folder


@pytest.mark.parametrize("loss", ["interrupted", "cut", "cleaned up"])
def test_what_is_missing_or_damaged_here_is_copied_again(loss: str, betons: str) -> None:
    folder = data.prepare(data.DataConfig(dir=betons))
    if loss == "cleaned up":
        (folder / "val.beton").unlink()
    else:
        (folder / "val.beton").write_bytes(b"cut")
    if loss == "interrupted":
        (folder / "dataset.json").unlink()
    data.check(data.prepare(data.DataConfig(dir=betons)) / "val.beton", full=True)


def test_a_damaged_file_there_is_refused(root: str, betons: str, tmp_path: Path) -> None:
    uri = storage.join(root, "data", "damaged")
    folder = data.prepare(data.DataConfig(dir=betons))
    for file in folder.glob("*.*"):
        storage.upload(file, storage.join(uri, file.name))
    (tmp_path / "val.beton").write_bytes((folder / "val.beton").read_bytes()[:-10])
    storage.upload(tmp_path / "val.beton", storage.join(uri, "val.beton"))
    with pytest.raises(data.DataError, match=r"val\.beton.*is damaged or another file"):
        data.prepare(data.DataConfig(dir=uri))
    assert not (staged_folder(uri) / "dataset.json").exists()


def test_an_address_without_a_data_set_is_named(root: str) -> None:
    with pytest.raises(data.DataError, match=r"holds no dataset\.json: copy the folder there"):
        data.prepare(data.DataConfig(dir=storage.join(root, "data", "nothing")))
