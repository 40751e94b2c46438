"""Recipes: the runs that come with the package, by name. A recipe is a function that returns a config."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dist_gsl.config import RunConfig
from dist_gsl.data.config import Augment, DataConfig
from dist_gsl.models.config import NetworkConfig
from dist_gsl.penalty import PenaltyConfig, PerLayer, Schedule
from dist_gsl.training.config import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """A config with what one wants to know before choosing it."""

    make: Callable[[], RunConfig]
    summary: str
    num_outputs: int
    """Classes, or numbers to predict; the data decides in the end."""
    channels: int
    size: int
    """Side in pixels of what the network sees."""


def dec3_chars() -> RunConfig:
    """The demo: Dec3 at a quarter of its width on rendered characters."""
    return RunConfig(
        network=NetworkConfig("dec3", width=0.25, batch_norm=True),
        data=DataConfig(source="chars"),
        penalty=PenaltyConfig(
            beta=PerLayer(rest=1.5), alpha=PerLayer(rest=0.5), beta_schedule=Schedule(start=1.5), unit="epochs",
        ),
        train=TrainConfig(
            epochs=16, batch_size=64, learning_rate=0.1, schedule="step", drop_epochs=(11.0, 14.0), warmup_epochs=1.0,
            nesterov=True, weight_decay=5e-4,
        ),
    )  # fmt: skip


def dec3_chars_full() -> RunConfig:
    """Dec3 as the paper has it, on as many rendered characters as the ICDAR set has."""
    config = dec3_chars()
    return replace(
        config, network=replace(config.network, width=1.0), data=replace(config.data, num_train=185_639),
        train=replace(config.train, batch_size=256),
    )  # fmt: skip


def digits() -> RunConfig:
    """Real handwriting, in a minute."""
    return RunConfig(
        network=NetworkConfig("dec3", width=0.125, batch_norm=True),
        data=DataConfig(source="digits", augment=Augment.SHIFT),
        penalty=PenaltyConfig(beta=PerLayer(rest=2.5), beta_schedule=Schedule(start=2.0, end=20.0), unit="epochs"),
        train=TrainConfig(epochs=30, batch_size=64, learning_rate=0.05, warmup_epochs=1.0, nesterov=True),
    )


def vit_digits() -> RunConfig:
    """A transformer, by AdamW."""
    return RunConfig(
        network=NetworkConfig("vit-mini"),
        data=DataConfig(source="digits", augment=Augment.SHIFT),
        penalty=PenaltyConfig(beta=PerLayer(rest=0.002), beta_schedule=Schedule(start=1.5, end=21.0)),
        train=TrainConfig(epochs=30, batch_size=64, learning_rate=0.002, warmup_epochs=1.0, optimizer="adamw", weight_decay=0.05),
    )


def rotated_digits() -> RunConfig:
    """Regression with the square loss: by which angle was a digit turned?"""
    config = digits()
    return replace(
        config, data=DataConfig(source="rotated-digits"),
        train=replace(config.train, loss="square", learning_rate=0.02, max_grad_norm=None),
    )  # fmt: skip


def paper_penalty(
    regulariser: str, *, epochs: float, num_first: int, ratio: float
) -> PenaltyConfig:
    """GS or SGL with the paper's ratio between the first layers' beta and the rest's, as a ratio of epochs.

    The paper's absolute numbers belong to a step size t that it does not state; here the strength is the number of
    epochs after which a neuron that the loss never supports is gone. Where the rate drops within them the betas are nearer
    to each other than their epochs: the later ones take little.
    """
    return PenaltyConfig(
        beta=PerLayer(rest=epochs, first=epochs / ratio, num_first=num_first), unit="epochs",
        beta_schedule=Schedule(start=1.0), alpha=PerLayer(rest=0.5 if regulariser == "sgl" else 0.0),
    )  # fmt: skip


def imagenet_like(data: str, network: str, regulariser: str) -> RunConfig:
    """The paper's setup for ImageNet and Places2. The epochs of the drops are not stated there; 30 and 45 are ours, and
    so is the first epoch without penalty."""
    return RunConfig(
        network=NetworkConfig(network),
        data=DataConfig(source=data, augment=Augment.CROP_FLIP, num_threads=8),
        penalty=paper_penalty(regulariser, epochs=20.0, num_first=3, ratio=0.102 / 0.255),
        train=TrainConfig(
            epochs=55, batch_size=180 if network.startswith("dec8") else 48, learning_rate=0.01, schedule="step",
            drop_epochs=(30.0, 45.0),
        ),
    )  # fmt: skip


def icdar(regulariser: str) -> RunConfig:
    """The paper's setup for the ICDAR characters."""
    return RunConfig(
        network=NetworkConfig("dec3"),
        data=DataConfig(source="icdar", num_threads=4),
        penalty=paper_penalty(regulariser, epochs=6.0, num_first=1, ratio=5.1 / 10.2),
        train=TrainConfig(epochs=45, batch_size=256, learning_rate=0.1, schedule="step", drop_epochs=(2.0, 7.0, 15.0)),
    )


def _all() -> dict[str, Recipe]:
    recipes = {
        "dec3-chars": Recipe(
            dec3_chars, "the demo: rendered characters, Dec3 at quarter width, minutes on two cores", 36, 1, 32
        ),
        "dec3-chars-full": Recipe(
            dec3_chars_full, "185,639 rendered characters, Dec3 as in the paper, for a GPU", 36, 1, 32
        ),
        "digits": Recipe(digits, "real handwritten digits, a minute on two cores", 10, 1, 32),
        "vit-digits": Recipe(vit_digits, "a small vision transformer on the digits, by proximal AdamW, two minutes on two cores", 10, 1, 32),
        "rotated-digits": Recipe(rotated_digits, "regression: the angle of a turned digit, square loss", 1, 1, 32),
    }
    names = {"gs": "group sparsity", "sgl": "sparse group lasso"}
    for data, title, classes in (("imagenet", "ImageNet", 1000), ("places2", "Places2-401", 401)):
        for network in ("bnet", "bnet-c", "dec8", "dec8-640", "dec8-768"):
            for regulariser, words in names.items():
                recipes[f"{network}-{data}-{regulariser}"] = Recipe(
                    partial(imagenet_like, data, network, regulariser),
                    f"the paper's {network} on {title}, {words}",
                    classes,
                    3,
                    224,
                )
    for regulariser, words in names.items():
        recipes[f"dec3-icdar-{regulariser}"] = Recipe(
            partial(icdar, regulariser), f"the paper's dec3 on the ICDAR characters, {words}", 36, 1, 32
        )
    return recipes


RECIPES = _all()


def find(name: str) -> RunConfig:
    """The config of a recipe, or of a config.yaml. `ValueError` for an unknown one, naming the closest."""
    if name in RECIPES:
        return RECIPES[name].make()
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return RunConfig.load(Path(name))
    close = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean {close[0]}?" if close else "`dist-gsl train --help` lists them"
    raise ValueError(f"no recipe is called {name!r}; {hint}")
