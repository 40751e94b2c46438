"""`dist-gsl data`: from files to betons, a check, a sheet."""

from pathlib import Path

import pytest
from PIL import Image

from dist_gsl import data
from dist_gsl.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:.*figure layout.*")


def test_write_check_and_stats(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (image_folder / "train" / "cat" / "bad.jpg").write_bytes(b"")
    out = tmp_path / "out"
    write = ["data", "write", f"imagefolder:{image_folder}", str(out), "--max-side", "48", "--workers", "1"]
    assert main(write) == 2
    assert "bad.jpg is empty: repair it, take it out, or leave such images out by --on-bad skip" in capsys.readouterr().err
    assert not out.exists()
    assert main([*write, "--on-bad", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "24 samples" in printed
    assert "bad.jpg is empty" in printed
    assert main(["data", "check", str(out / "train.beton"), "--decode"]) == 0
    assert "24 samples, 3 channel(s), whole" in capsys.readouterr().out
    assert main(["data", "stats", str(out)]) == 0
    printed = capsys.readouterr().out
    info = data.dataset_info(out)
    assert f"channel 0: mean {info.mean[0]:.4f}" in printed
    with Image.open(out / "samples.png") as sheet:
        assert sheet.width > 900


@pytest.mark.parametrize("source", ["digits", "rotated-digits"])
def test_sheets_of_grey_images(source: str, tmp_path: Path) -> None:
    data.write(source, tmp_path, counts={"train": 60, "val": 20, "test": 20})
    assert main(["data", "stats", str(tmp_path), "--sheet", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 900


def test_files_as_they_are(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["data", "write", f"imagefolder:{image_folder}", str(out), "--as-is", "--workers", "1"]) == 0
    settings = data.dataset_info(out).settings
    assert (settings["max_side"], settings["jpeg_share"], settings["as_is"]) == (None, 1.0, True)


def test_check_names_a_damaged_jpeg(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["data", "write", f"imagefolder:{image_folder}", str(out), "--as-is", "--workers", "1"]) == 0
    path = out / "val.beton"
    content = bytearray(path.read_bytes())
    content[-2000] ^= 1
    path.write_bytes(content)
    assert main(["data", "check", str(path)]) == 2
    assert "damaged" in capsys.readouterr().err
