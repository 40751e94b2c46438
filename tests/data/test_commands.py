"""`dist-gsl data`: from files to betons, a check, a sheet."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_gsl import data
from dist_gsl.cli import main
from dist_gsl.data.sources import in_grey, open_source

pytestmark = [pytest.mark.filterwarnings("ignore:.*figure layout.*"), pytest.mark.timeout(120)]


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


@pytest.mark.parametrize(("given", "side"), [([], 400), (["--max-side", "none"], None), (["--max-side", "64"], 64)])
def test_the_longest_side(image_folder: Path, tmp_path: Path, given: list[str], side: int | None) -> None:
    assert main(["data", "write", f"imagefolder:{image_folder}", str(tmp_path / "out"), "--workers", "1", *given]) == 0
    assert data.dataset_info(tmp_path / "out").settings["max_side"] == side


def test_grey_squares(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["data", "write", f"imagefolder:{image_folder}", str(out), "--grey", "16"]) == 0
    info = data.dataset_info(out)
    assert (info.channels, info.size) == (1, 16)
    source = in_grey(open_source(f"imagefolder:{image_folder}"), 16).splits["train"]
    levels = [batch.images[:, 0].numpy() for batch in data.Loader(out / "train.beton", batch_size=24, train=False).levels()]
    np.testing.assert_array_equal(np.concatenate(levels), [source[i].image for i in range(24)])
    assert main(["data", "check", str(out / "train.beton"), "--decode"]) == 0
    assert main(["data", "stats", str(out)]) == 0
    (image_folder / "val" / "dog" / "bad.png").write_bytes(b"\x89PNG")
    capsys.readouterr()
    assert main(["data", "write", f"imagefolder:{image_folder}", str(tmp_path / "bad"), "--grey", "16"]) == 2
    assert "bad.png cannot be decoded" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
    assert main(["data", "write", "digits", str(tmp_path / "digits"), "--grey", "16"]) == 2
    assert "in grey already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-side", "3x"], "is a number of pixels or none, not '3x'"),
        (["--max-side", "3"], "max_side must be from 8"),
        (["--grey", "4"], "grey must be from 8"),
        (["--jpeg-share", "2"], "jpeg_share must be from 0 to 1"),
        (["--jpeg-quality", "0"], "jpeg_quality must be from 1 to 100"),
        (["--workers", "0"], "num_workers must be at least 1"),
    ],
)
def test_wrong_options_are_one_line(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    try:
        status: Any = main(["data", "write", f"imagefolder:{image_folder}", str(tmp_path / "out"), *options])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_check_names_a_damaged_jpeg(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["data", "write", f"imagefolder:{image_folder}", str(out), "--as-is", "--workers", "1"]) == 0
    path = out / "val.beton"
    content = bytearray(path.read_bytes())
    content[-2000] ^= 1
    path.write_bytes(content)
    assert main(["data", "check", str(path)]) == 2
    assert "damaged" in capsys.readouterr().err
