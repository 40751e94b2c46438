"""Writing and checking betons: all or nothing, and one clear line for a bad file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gsl import data
from dist_gsl.data import beton, sources
from dist_gsl.data.sources import open_source

from .conftest import COUNTS


def test_written_files_hold_what_the_source_has(chars_dir: Path) -> None:
    info = data.dataset_info(chars_dir)
    assert {name: split.num_samples for name, split in info.splits.items()} == COUNTS
    assert info.num_outputs == 36
    assert (info.channels, info.size) == (1, 32)
    for name, count in COUNTS.items():
        read = data.check(chars_dir / f"{name}.beton", full=True)
        assert read.num_samples == count
        assert (read.channels, read.height, read.width, read.target_size) == (1, 32, 32, 0)
        assert read.sha256 == info.splits[name].sha256
    samples = open_source("chars", seed=3, counts=COUNTS).splits["train"]
    pixels = np.stack([samples[i].image for i in range(len(samples))]) / 255
    np.testing.assert_allclose(info.mean, pixels.mean(), rtol=1e-12)
    np.testing.assert_allclose(info.std, pixels.std(), rtol=1e-9)


def test_equal_settings_are_not_written_again(chars_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(chars_dir, directory)
    before = (directory / "train.beton").stat().st_mtime_ns
    paths = data.write("chars", directory, seed=3, counts=COUNTS)
    assert list(paths) == ["train", "val", "test", "test_fonts"]
    assert paths["train"].stat().st_mtime_ns == before

    (directory / "val.beton").write_bytes(b"damaged")
    data.write("chars", directory, seed=3, counts=COUNTS)
    assert data.check(directory / "val.beton", full=True).num_samples == COUNTS["val"]
    assert (directory / "train.beton").read_bytes() == (chars_dir / "train.beton").read_bytes()


def test_other_settings_replace_the_files(chars_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(chars_dir, directory)
    data.write("digits", directory, counts={"train": 30, "val": 20, "test": 10})
    names = {path.name for path in directory.iterdir()}
    assert names == {"train.beton", "val.beton", "test.beton", "dataset.json"}
    assert data.dataset_info(directory).source == "digits"
    assert data.check(directory / "train.beton", full=True).num_samples == 30


def test_processes_write_the_same_samples(image_folder: Path, tmp_path: Path) -> None:
    found = []
    for num_workers in (1, 2):
        directory = tmp_path / str(num_workers)
        data.write(f"imagefolder:{image_folder}", directory, max_side=48, num_workers=num_workers)
        loader = data.Loader(directory / "train.beton", batch_size=24, train=False, size=32)
        (batch,) = list(loader)
        found.append(batch)
        assert data.check(directory / "train.beton").width == 48
    assert (found[0].images == found[1].images).all()
    assert (found[0].targets == found[1].targets).all()
    assert len(found[0].targets.unique()) == 2


def test_bad_image_is_named_and_nothing_is_left(image_folder: Path, tmp_path: Path) -> None:
    bad = image_folder / "val" / "dog" / "03.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"val/dog/03\.jpg"):
        data.write(f"imagefolder:{image_folder}", out)
    assert not out.exists()


def test_too_narrow_image_is_named(image_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (900, 20)).save(image_folder / "train" / "cat" / "strip.png")
    with pytest.raises(ValueError, match=r"strip\.png of 900 x 20"):
        data.write(f"imagefolder:{image_folder}", tmp_path / "out", max_side=100)


class _FailsLater(sources.Samples):
    """Readable while it is surveyed, then not: a disk that goes away."""

    def __init__(self, inner: sources.Samples, error: type[BaseException]) -> None:
        self.inner, self.error, self.reads = inner, error, 0

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, position: int) -> sources.Sample:
        self.reads += 1
        if self.reads > len(self.inner) + 5:
            raise self.error("the disk went away")
        return self.inner[position]


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failure_while_writing_leaves_the_folder_as_it_was(
    chars_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    error: type[BaseException],
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(chars_dir, directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def open_failing(*args: Any, **kwargs: Any) -> sources.Source:
        source = open_source(*args, **kwargs)
        splits = {**source.splits, "val": _FailsLater(source.splits["val"], error)}
        return sources.Source(**{**vars(source), "splits": splits})

    monkeypatch.setattr(beton, "open_source", open_failing)
    # Where a process of its own fails, that it did is what the parent can tell.
    wanted = error if num_workers == 1 else RuntimeError
    with pytest.raises(wanted):
        data.write("digits", directory, counts={"train": 20, "val": 20, "test": 5}, num_workers=num_workers)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1_000], "cut short"),
        (lambda content: content[: len(content) // 2], "cut short"),
        (lambda content: content[:40], "cut short"),
        (lambda content: content[:10], "not a beton"),
        (lambda content: b"", "not a beton"),
        (lambda content: b"\x89PNG" + bytes(5_000), "not a beton of version 2"),
        (lambda content: b"\x03" + content[1:], "say 3"),
        (lambda content: content + b"more", "4 bytes too many"),
        (lambda content: content[:16] + bytes(8) + content[24:], "never finished"),
        (lambda content: content[:24] + b"\x63" + content[25:], "fields cannot be read"),
        (lambda content: content[:-8] + b"\xff" * 6 + bytes(2), "points outside"),
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_damaged_or_foreign_file_is_refused(
    chars_dir: Path, tmp_path: Path, damage: Any, message: str, full: bool
) -> None:
    path = tmp_path / "train.beton"
    path.write_bytes(damage((chars_dir / "train.beton").read_bytes()))
    with pytest.raises(data.DataError, match=message) as error:
        data.check(path, full=full)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"train\.beton is missing"):
        data.check(tmp_path / "train.beton")
    with pytest.raises(data.DataError, match="is not a file"):
        data.check(tmp_path)


def test_hash_finds_a_changed_pixel(chars_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(chars_dir, directory)
    path = directory / "train.beton"
    content = bytearray(path.read_bytes())
    content[2**21 + 500] ^= 1
    path.write_bytes(content)
    data.check(path)
    with pytest.raises(data.DataError, match="sha256"):
        data.check(path, full=True)


def test_file_of_another_data_set_is_refused(chars_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(chars_dir, directory)
    shutil.copy(directory / "val.beton", directory / "train.beton")
    with pytest.raises(data.DataError, match="holds 61 samples"):
        data.check(directory / "train.beton")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}', "\x00"])
def test_unreadable_description_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(data.DataError, match=r"dataset\.json is not a description"):
        data.dataset_info(tmp_path)


def test_missing_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"dataset\.json is missing"):
        data.dataset_info(tmp_path)


def test_description_survives_json(chars_dir: Path) -> None:
    info = data.dataset_info(chars_dir)
    assert data.DatasetInfo.from_json(info.to_json()) == info
    assert json.loads(info.to_json())["task"] == "classification"


@pytest.mark.parametrize(
    "setting", [{"jpeg_quality": 0}, {"jpeg_share": 1.5}, {"max_side": 4}, {"num_workers": 0}], ids=str
)
def test_bad_settings_are_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        data.write("digits", tmp_path, **setting)


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    data.write(
        "digits",
        tmp_path,
        counts={"train": 150, "val": 10, "test": 5},
        progress=lambda what, done, total: calls.append((what, done, total)),
    )
    assert ("reading train", 150, 150) in calls
    assert ("writing train", 100, 150) in calls
    assert ("writing test", 5, 5) in calls


def test_prepare_writes_once_where_no_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = data.DataConfig(source="digits", num_train=20, num_val=10, num_test=5)
    directory = data.prepare(config)
    assert directory == config.directory()
    assert data.dataset_info(directory).splits["train"].num_samples == 20
    before = (directory / "train.beton").stat().st_mtime_ns
    assert data.prepare(config) == directory
    assert (directory / "train.beton").stat().st_mtime_ns == before


def test_prepare_does_not_write_to_a_named_folder(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="data write"):
        data.prepare(data.DataConfig(source="digits", dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".train.beton.123.part").write_bytes(b"half")
    data.write("digits", tmp_path, counts={"train": 20, "val": 10, "test": 5})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"train.beton", "val.beton", "test.beton", "dataset.json"}


def test_interrupted_program_leaves_nothing(image_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C on a real terminal reaches the writer's processes too."""
    out = tmp_path / "out"
    code = f"""
import os, time
from dist_gsl import data
from dist_gsl.data import sources

parent, read = os.getpid(), sources.read_rgb

def read_slowly(path):
    if os.getpid() != parent:
        print("writing", flush=True)
        time.sleep(60)
    return read(path)

sources.read_rgb = read_slowly
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
    assert not out.exists()
