"""The network's part of a run's config: defaults, and errors that name the flag."""

from typing import Any

import pytest

from dist_gsl.models import NetworkConfig, create_model, model_names


def test_default_is_dec3_at_the_papers_width() -> None:
    config = NetworkConfig()
    assert (config.name, config.width, config.batch_norm, config.pretrained) == ("dec3", 1.0, None, False)


@pytest.mark.parametrize("name", [*model_names(), "resnet18"])
def test_every_network_is_accepted(name: str) -> None:
    assert NetworkConfig(name).name == name


def test_fields_are_arguments_of_create_model() -> None:
    config = NetworkConfig("dec3", width=1 / 16, batch_norm=True)
    create_model(
        config.name, num_classes=3, width=config.width, batch_norm=config.batch_norm, pretrained=config.pretrained
    )


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"name": "dec9"}, "--network.name"),
        ({"width": 0.0}, "--network.width"),
        ({"width": -0.5}, "--network.width"),
        ({"width": float("nan")}, "--network.width"),
        ({"name": "resnet18", "width": 0.5}, "--network.width"),
        ({"name": "resnet18", "batch_norm": False}, "--network.batch-norm"),
        ({"name": "dec3", "pretrained": True}, "--network.pretrained"),
    ],
)
def test_errors_name_the_flag(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag.replace(".", r"\.")):
        NetworkConfig(**options)
