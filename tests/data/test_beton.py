"""Writing and checking betons: all or nothing, and one clear line for a bad file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gsl import data
from dist_gsl.data import checking, writer
from dist_gsl.data.sources import open_source

from .conftest import COUNTS

pytestmark = pytest.mark.timeout(120)  # nothing here may hang


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


@pytest.mark.parametrize("source", ["imagefolder", "digits", "rotated-digits"])
def test_processes_write_the_same_bytes(source: str, image_folder: Path, tmp_path: Path) -> None:
    for num_workers in (1, 3):
        spec = f"imagefolder:{image_folder}" if source == "imagefolder" else source
        counts = None if source == "imagefolder" else {"train": 150, "val": 70, "test": 10}
        data.write(spec, tmp_path / str(num_workers), counts=counts, max_side=48, num_workers=num_workers)
    for name in ("train.beton", "val.beton", "dataset.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    if source == "imagefolder":
        assert data.check(tmp_path / "1" / "train.beton").width == 48
        assert data.dataset_info(tmp_path / "1").splits["train"].class_counts == (12, 12)


@pytest.mark.parametrize("page", [1 << 21, 1 << 13])
def test_ffcv_reads_the_files(image_folder: Path, tmp_path: Path, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own loader and decoders, which know nothing of ours; also where samples fill many pages. In a process of its own:
    numba raises now and then when compiled code is collected."""
    monkeypatch.setattr(writer, "SMALLEST_PAGE", page)
    monkeypatch.setattr(checking, "SMALLEST_PAGE", page)
    out = tmp_path / "out"
    data.write(f"imagefolder:{image_folder}", out, max_side=32, jpeg_share=0.5)
    code = f"""
import numpy as np
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption

pipelines = {{"image": [CenterCropRGBImageDecoder((16, 16), 1.0)], "target": [IntDecoder()], "index": [IntDecoder()], "checksum": None}}
loader = Loader({str(out / "train.beton")!r}, batch_size=24, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=False, pipelines=pipelines)
((images, targets, indices),) = list(loader)
np.savez({str(tmp_path / "read.npz")!r}, images=images, targets=targets[:, 0], indices=indices[:, 0])
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    read = np.load(tmp_path / "read.npz")
    samples = open_source(f"imagefolder:{image_folder}").splits["train"]
    assert read["indices"].tolist() == list(range(24))
    assert read["targets"].tolist() == [samples[i].target for i in range(24)]
    for position in range(24):
        image = samples[position].image
        assert np.abs(read["images"][position].mean(axis=(0, 1)) - image.mean(axis=(0, 1))).max() < 25


def test_jpegs_stay_as_they_are(image_folder: Path, tmp_path: Path) -> None:
    from dist_gsl.data import _ffcv

    out = tmp_path / "out"
    data.write(f"imagefolder:{image_folder}", out, max_side=None, jpeg_share=1.0, as_is=True)
    content = (out / "train.beton").read_bytes()
    stored = _ffcv.Stored(_ffcv.Reader(str(out / "train.beton")))
    samples = open_source(f"imagefolder:{image_folder}").splits["train"]
    kept = 0
    for position, (row, size) in enumerate(zip(stored.rows["f0"], stored.image_sizes, strict=True)):
        start = int(row["data_ptr"])
        kept += content[start : start + int(size)] == samples.read(position)[0]
    assert kept == 16  # of 24; a third are CMYK


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


def test_bad_images_are_skipped_and_listed(image_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    folder = image_folder / "train" / "cat"
    (folder / "00.jpg").write_bytes(b"")
    content = (folder / "05.jpg").read_bytes()
    (folder / "05.jpg").write_bytes(content[:-40])
    Image.new("RGB", (900, 5)).save(folder / "strip.png")
    out = tmp_path / "out"
    data.write(f"imagefolder:{image_folder}", out, on_bad="skip", num_workers=2)
    split = data.dataset_info(out).splits["train"]
    assert [Path(each.name).name for each in split.skipped] == ["00.jpg", "05.jpg", "strip.png"]
    assert [each.reason.partition(" (")[0].partition(":")[0] for each in split.skipped] == [
        "is empty", "cannot be decoded", "of 900 x 5 pixels is too small or too narrow",
    ]  # fmt: skip
    assert split.class_counts == (10, 12)
    assert data.check(out / "train.beton", full=True).num_samples == 22
    (batch,) = list(data.Loader(out / "train.beton", batch_size=22, train=False, size=16))
    assert batch.indices.tolist() == list(range(22))
    assert batch.targets.bincount().tolist() == [10, 12]


def test_nothing_but_bad_images_is_an_error(image_folder: Path, tmp_path: Path) -> None:
    for file in (image_folder / "val").rglob("*.jpg"):
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match="no image of val can be used"):
        data.write(f"imagefolder:{image_folder}", tmp_path / "out", on_bad="skip")
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(data.DataError, match=r"image 0 of .* is damaged, its checksum"):
        data.check(path, full=True)
    with pytest.raises(data.DataError, match=r"image 0 of .* is damaged, its checksum"):
        list(data.Loader(path, batch_size=50, train=True))


def test_hash_finds_what_no_checksum_covers(chars_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(chars_dir, directory)
    path = directory / "train.beton"
    content = bytearray(path.read_bytes())
    content[2**21 - 100] ^= 1  # between the rows and the first page
    path.write_bytes(content)
    with pytest.raises(data.DataError, match="sha256"):
        data.check(path, full=True)


def test_a_changed_label_is_found(tmp_path: Path) -> None:
    for spec in ("digits", "rotated-digits"):
        directory = tmp_path / spec
        data.write(spec, directory, counts={"train": 20, "val": 18, "test": 5})
        path = directory / "train.beton"
        rows = data_rows(path)
        content = bytearray(path.read_bytes())
        where = int(rows["f1"][3]) if spec == "rotated-digits" else content.find(rows[3:4].tobytes()) + rows.dtype.fields["f1"][1]
        content[where] ^= 1
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=r"image 3 of .* is damaged, its checksum"):
            list(data.Loader(path, batch_size=20, train=True))


def data_rows(path: Path) -> Any:
    from dist_gsl.data import _ffcv

    return _ffcv.Reader(str(path)).metadata


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
    assert ("writing train", 0, 150) in calls
    assert ("writing train", 128, 150) in calls
    assert ("writing train", 150, 150) in calls
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
