"""Small data sets shared by the tests of this folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_gsl import data

COUNTS = {"train": 203, "val": 61, "test": 30, "test_fonts": 20}


@pytest.fixture(scope="session")
def chars_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written characters; not to be changed."""
    directory = tmp_path_factory.mktemp("chars")
    data.write("chars", directory, seed=3, counts=COUNTS)
    return directory


def make_image_folder(root: Path, *, seed: int = 0) -> Path:
    """A tree of small images of different sizes and modes: 2 classes, 12 for training and 6 for validation each."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 12), ("val", 6)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(40, 90, size=2)
                # A smooth image survives JPEG, so that pixels can be compared.
                ramp = np.linspace(0, 200, width)[None, :, None] + np.zeros((height, 1, 3))
                pixels = (ramp + np.array([10 * label, 20, 30])).clip(0, 255).astype(np.uint8)
                image = Image.fromarray(pixels)
                mode = ("RGB", "L", "CMYK")[number % 3]
                image.convert(mode).save(folder / f"{number:02d}.jpg", quality=95)
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "images")


@pytest.fixture(scope="session")
def colour_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written colour images, half of them JPEG; not to be changed."""
    root = make_image_folder(tmp_path_factory.mktemp("tree") / "images")
    directory = tmp_path_factory.mktemp("colour")
    data.write(f"imagefolder:{root}", directory, max_side=64)
    return directory
