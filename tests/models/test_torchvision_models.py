"""torchvision's classifiers behind create_model. No weights are downloaded: the download is replaced by random ones."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from dist_gsl.models import create_model, input_shape
from dist_gsl.models.torchvision_models import replace_first_conv, torchvision_names


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "mobilenet_v3_small"])
def test_forward_shape(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=7)
        assert input_shape(name) == (3, 224, 224)
        assert model(torch.empty(2, *input_shape(name))).shape == (2, 7)


def test_forward_on_real_numbers() -> None:
    model = create_model("resnet18", num_classes=4, in_channels=1, image_size=32)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_one_output_in_training_too(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=7).train()
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 7)


@pytest.mark.parametrize(("name", "image_size"), [("vit_b_16", 64), ("maxvit_t", 448), ("resnet18", 64)])
def test_image_size(name: str, image_size: int) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=7, image_size=image_size)
        assert model(torch.empty(2, 3, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "convnext_tiny", "squeezenet1_1", "swin_t", "inception_v3"])
def test_first_conv_for_other_channels(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=7, in_channels=5)
        assert model.eval()(torch.empty(2, 5, 224, 224)).shape == (2, 7)
        reference = create_model(name, num_classes=7)
    first, original = (next(m for m in net.modules() if isinstance(m, nn.Conv2d)) for net in (model, reference))
    first, original = (next(m for m in net.modules() if isinstance(m, nn.Conv2d)) for net in (model, reference))
    assert first.in_channels == 5
    for attribute in ("out_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(first, attribute) == getattr(original, attribute)
    assert (first.bias is None) == (original.bias is None)


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Conv2d(4, 2, 1), nn.Conv2d(3, 3, 1, groups=3)])
def test_no_first_conv_to_replace(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="odd has no first convolution that reads 3 channels, so in_channels=1"):
        replace_first_conv(nn.Sequential(model), name="odd", in_channels=1, keep_filters=False)


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """resnet18's "DEFAULT" weights become random ones of 1000 classes; returns them."""
    get_model = torchvision.models.get_model
    source = get_model("resnet18", num_classes=1000)

    def offline(name: str, *, weights: str | None = None, **options: Any) -> nn.Module:
        return source if weights == "DEFAULT" else get_model(name, **options)

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    return source.state_dict()


def test_pretrained_with_the_same_classes_loads_everything(no_download: dict[str, torch.Tensor]) -> None:
    model = create_model("resnet18", num_classes=1000, pretrained=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, no_download[key]), key


def test_pretrained_with_other_classes_loads_all_but_the_last_layer(no_download: dict[str, torch.Tensor]) -> None:
    model = create_model("resnet18", num_classes=5, pretrained=True)
    for key, value in model.state_dict().items():
        if key.startswith("fc."):
            assert value.shape[0] == 5
        else:
            assert torch.equal(value, no_download[key]), key


def test_pretrained_for_grey_images_answers_as_for_grey_rgb(no_download: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    grey = torch.randn(2, 1, 32, 32)
    rgb_model = create_model("resnet18", num_classes=1000, pretrained=True).eval()
    grey_model = create_model("resnet18", num_classes=1000, in_channels=1, pretrained=True).eval()
    torch.testing.assert_close(grey_model(grey), rgb_model(grey.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-3)


def test_pretrained_weights_of_another_shape_are_refused(no_download: dict[str, torch.Tensor]) -> None:
    no_download["layer1.0.conv1.weight"] = torch.zeros(1, 1, 1, 1)
    from dist_gsl.models.torchvision_models import load_but_last_layer

    model = create_model("resnet18", num_classes=5)
    with pytest.raises(ValueError, match=r"the weights of resnet18 do not fit at layer1\.0\.conv1\.weight"):
        load_but_last_layer(model, no_download, name="resnet18", num_classes=5)


def test_options_of_the_papers_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--network\.width.*bnet, bnet-c, dec8, dec8-640, dec8-768, dec3, vit-mini; resnet18"):
        create_model("resnet18", num_classes=2, width=0.5)
    with pytest.raises(ValueError, match=r"--network\.batch-norm.*dec3; vgg11_bn"):
        create_model("vgg11_bn", num_classes=2, batch_norm=True)


def test_close_matches_among_torchvision_names() -> None:
    with pytest.raises(ValueError, match=r"did you mean .*resnet18"):
        create_model("resnet_18", num_classes=2)


def test_names_are_classifiers_only() -> None:
    names = torchvision_names()
    assert {"resnet18", "vgg11_bn", "vit_b_16"} <= set(names)
    assert not any("rcnn" in name or "deeplab" in name or "quantized" in name for name in names)
