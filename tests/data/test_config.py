"""The settings of the data, and what importing them costs."""

import subprocess
import sys

from dist_gsl.data import DataConfig


def test_folder_follows_from_the_settings_of_the_files() -> None:
    default = DataConfig().directory()
    assert default.parent.name == "data"
    assert default.name.startswith("chars-")
    assert DataConfig(num_threads=4, size=32).directory() == default
    assert DataConfig(seed=1).directory() != default
    assert DataConfig(num_train=100).directory() != default
    assert DataConfig(source="imagefolder:/data/birds").directory().name.startswith("imagefolder-")
    assert DataConfig(dir="/somewhere").directory().as_posix() == "/somewhere"


def test_counts_are_those_given() -> None:
    assert DataConfig().counts() == {}
    assert DataConfig(num_train=5, num_test=2).counts() == {"train": 5, "test": 2}


def test_sizes_grow_by_steps_that_networks_halve() -> None:
    config = DataConfig(start_size=128, full_size_epoch=6)
    assert [config.train_size(epoch, full=224) for epoch in range(8)] == [128, 128, 160, 160, 192, 192, 224, 224]
    assert DataConfig(start_size=100, full_size_epoch=2).train_size(1, full=112) == 100
    assert DataConfig().train_size(0, full=224) == 224


def test_importing_needs_no_ffcv() -> None:
    """The mathematics must be usable where ffcv, and what it brings, cannot be installed."""
    blocked = ("ffcv", "numba", "cv2", "sklearn", "matplotlib", "_dist_gsl_decode")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import dist_gsl.data; dist_gsl.data.DataConfig()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
