"""vit-mini: shapes, options, and which of its neurons can go."""

import pytest
import torch

from dist_gsl import compact, create_model, find_neurons
from dist_gsl.models import NetworkConfig, input_shape


@pytest.mark.parametrize(("channels", "size", "width"), [(1, 32, 1.0), (3, 32, 0.25), (1, 16, 0.5)])
def test_shapes(channels: int, size: int, width: float) -> None:
    model = create_model("vit-mini", num_classes=7, in_channels=channels, image_size=size, width=width)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)
    assert model.encoder.layers[0].mlp[0].out_features == 256 * width  # type: ignore[index,union-attr]


def test_it_is_small() -> None:
    assert input_shape("vit-mini") == (1, 32, 32)
    assert 2e5 < sum(p.numel() for p in create_model("vit-mini", num_classes=36).parameters()) < 2.5e5


def test_neurons_of_mlps_and_attention_can_go_and_those_that_are_normalised_over_cannot() -> None:
    torch.manual_seed(0)
    model = create_model("vit-mini", num_classes=5, width=0.25)
    neurons = find_neurons(model, torch.randn(2, 1, 32, 32))
    assert [layer.num_neurons for layer in neurons if ".mlp." in layer.name] == [64] * 4
    assert not any("ln" in layer.name or layer.name.endswith("mlp.3") for layer in neurons)
    neurons.zero_({layer.name: range(0, layer.num_neurons, 2) for layer in neurons})
    result = compact(model, neurons)
    assert result.model.encoder.layers[0].mlp[0].out_features == 32  # type: ignore[index,union-attr]


def test_it_can_learn_from_the_first_step() -> None:
    """torchvision's own head starts at zero, and all behind it without a gradient."""
    model = create_model("vit-mini", num_classes=5, width=0.25)
    model(torch.randn(2, 1, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize(
    ("options", "text"), [({"image_size": 30}, "image_size of vit-mini must be a multiple of 4, got 30"), ({"pretrained": True}, "--network.pretrained"),
                          ({"batch_norm": True}, r"--network\.batch-norm.*vit-mini normalises over channels")],
)  # fmt: skip
def test_what_it_does_not_take(options: dict[str, bool | int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        create_model("vit-mini", num_classes=5, **options)  # type: ignore[arg-type]


def test_the_config_takes_it() -> None:
    assert NetworkConfig("vit-mini", width=0.5).name == "vit-mini"
