"""Every recipe: its config is sound, its shapes fit, and it trains two epochs on random pictures."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from dist_gsl import data, recipes
from dist_gsl.config import RunConfig
from dist_gsl.penalty import Schedule
from dist_gsl.training import session
from dist_gsl.training.state import RunState

PICTURES = "imagefolder"


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Betons of three classes of random pictures."""
    random = np.random.default_rng(0)
    tree = tmp_path_factory.mktemp("tree")
    for split, count in (("train", 4), ("val", 2)):
        for name in ("a", "b", "c"):
            folder = tree / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    directory = tmp_path_factory.mktemp("betons")
    data.write(f"{PICTURES}:{tree}", directory)
    return directory


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_survives_its_yaml(name: str, tmp_path: Path) -> None:
    config = recipes.find(name)
    config.save(tmp_path / "config.yaml")
    assert RunConfig.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", [n for n in recipes.RECIPES if not n.endswith("-sgl") and "places2" not in n])
def test_shapes_fit(name: str) -> None:
    recipe, config = recipes.RECIPES[name], recipes.find(name)
    narrow = replace(config, network=replace(config.network, width=config.network.width / 16))
    neurons = session.dry_build(narrow, session.Shapes(recipe.channels, recipe.size, recipe.num_outputs))
    assert len(neurons) >= 6
    outputs = "its neurons are the network's outputs"
    is_transformer = config.network.name == "vit-mini"
    if is_transformer:
        assert [layer.num_neurons for layer in neurons if ".mlp." in layer.name] == [16] * 4
    assert list(neurons.pinned.values())[-1 if is_transformer else 0 :] == [outputs]


def test_the_papers_ratio_between_the_layers() -> None:
    penalty = recipes.find("dec8-imagenet-sgl").penalty
    assert penalty.beta.first == pytest.approx(penalty.beta.rest * 2.5)  # epochs to die: 0.255 / 0.102
    assert penalty.beta.num_first == 3
    assert penalty.alpha.rest == 0.5


def test_unknown_recipes_name_the_closest() -> None:
    with pytest.raises(ValueError, match="did you mean dec3-chars"):
        recipes.find("dec3-char")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:layer .* would kill every neuron")  # so few steps, so strong a penalty
@pytest.mark.parametrize("name", [n for n in recipes.RECIPES if n != "rotated-digits"])
def test_two_epochs_on_random_pictures(name: str, miniature: Path, process_group: None) -> None:
    config = recipes.find(name)
    shift_is_for_grey = config.data.augment is data.Augment.SHIFT
    config = replace(
        config,
        network=replace(config.network, width=1 / 32),
        data=data.DataConfig(
            source=PICTURES, dir=str(miniature), size=32 if config.network.name == "dec3" else 64,
            augment=data.Augment.NONE if shift_is_for_grey else config.data.augment,
        ),
        penalty=replace(config.penalty, beta_schedule=Schedule(start=1, end=2)),  # within the two epochs
        train=replace(config.train, epochs=2, batch_size=6),
    )  # fmt: skip
    records: list[dict] = []

    def on_epoch(state: RunState, record: dict) -> None:
        records.append(record)

    state = session.run(config, data_dir=miniature, device=torch.device("cpu"), place=session.Place(on_epoch=on_epoch))
    assert [record["epoch"] for record in records] == [1, 2]
    assert all(np.isfinite(record["val_loss"]) for record in records)
    assert state.position.epoch == 2


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
