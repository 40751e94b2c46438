"""What a run finds out before it trains: how its data are read."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from dist_gsl import recipes
from dist_gsl.config import RunConfig
from dist_gsl.data import DataConfig
from dist_gsl.models import NetworkConfig
from dist_gsl.training import session


def config(**data: object) -> RunConfig:
    return replace(recipes.find("dec3-chars"), data=DataConfig(**data))  # type: ignore[arg-type]


def test_the_memory_for_the_training_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train.beton"
    file.write_bytes(bytes(1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert session.data_memory(config(), file, None) is None  # it fits
        assert session.data_memory(config(memory_gb=1e-6), file, None) == 1000
        monkeypatch.setattr(session, "memory_of_node", lambda: 1998)
        # A run goes on as it began, on whatever node.
        assert session.data_memory(config(), file, {"data_memory": None}) is None
        assert session.data_memory(config(), file, {"data_memory": 500}) == 500
    with pytest.warns(UserWarning, match=r"train\.beton has .* GB, more than half of a node's memory.* data\.memory_gb"):
        assert session.data_memory(config(), file, None) == 999


def test_the_memory_of_this_node() -> None:
    total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert 0 < session.memory_of_node() <= total * 1024


@pytest.mark.parametrize(
    ("network", "start_size", "message"),
    [
        (NetworkConfig("resnet18"), 64, None),
        (NetworkConfig("resnet18"), 256, "data.start_size is 256, must be at most the full size 224"),
        (NetworkConfig("dec8", width=0.0625), 16, "data.start_size: dec8 takes no images of 16 pixels"),
    ],
)
def test_networks_that_take_growing_images(network: NetworkConfig, start_size: int, message: str | None) -> None:
    wanted = replace(config(start_size=start_size, full_size_epoch=2), network=network)
    shapes = session.Shapes(3, 224, 10)
    if message is None:
        session.dry_build(wanted, shapes)
        return
    with pytest.raises(ValueError, match=message):
        session.dry_build(wanted, shapes)
