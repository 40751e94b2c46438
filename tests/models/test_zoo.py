"""The paper's networks: shapes, hand-computed sizes, names of the parts, options, starting weights."""

import difflib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dist_gsl.models import create_model, input_shape, model_names
from dist_gsl.models.bnet import BNET_BATCH_NORM, BNET_C_BATCH_NORM
from dist_gsl.models.dec import DEC3_BATCH_NORM, DEC8_BATCH_NORM

NAMES = ["bnet", "bnet-c", "dec8", "dec8-640", "dec8-768", "dec3"]
ANY_SIZE = ["dec8", "dec8-640", "dec8-768"]

BNET_WIDTHS = [64, 64, 128, 128, 256, 256, 512, 512, 512, 512]
CONV_WIDTHS = {
    "bnet": BNET_WIDTHS,
    "bnet-c": BNET_WIDTHS,
    "dec8": [32, 64, 128, 256, 384, 384, 512, 512] + [512] * 8,
    "dec8-640": [32, 64, 128, 256, 384, 384, 512, 512] + [640] * 8,
    "dec8-768": [32, 64, 128, 256, 384, 384, 512, 512] + [768] * 8,
    "dec3": [48, 96, 160, 256, 512, 512],
}

# Weights and biases of the convolutions, without BatchNorm: sum of (inputs * kernel + 1) * outputs.
BNET_CONV_PARAMETERS = (
    (3 * 9 + 1) * 64  # 1,792
    + (64 * 9 + 1) * 64  # 36,928
    + (64 * 9 + 1) * 128  # 73,856
    + (128 * 9 + 1) * 128  # 147,584
    + (128 * 9 + 1) * 256  # 295,168
    + (256 * 9 + 1) * 256  # 590,080
    + (256 * 9 + 1) * 512  # 1,180,160
    + 3 * (512 * 9 + 1) * 512  # 7,079,424
)
DEC8_FIRST_FOUR_PAIRS = (
    (3 * 11 + 1) * 32  # 1,088
    + (32 * 11 + 1) * 64  # 22,592
    + (64 * 7 + 1) * 128  # 57,472
    + (128 * 7 + 1) * 256  # 229,632
    + (256 * 3 + 1) * 384  # 295,296
    + (384 * 3 + 1) * 384  # 442,752
    + (384 * 3 + 1) * 512  # 590,336
    + (512 * 3 + 1) * 512  # 786,944
)
CONV_PARAMETERS = {
    "bnet": BNET_CONV_PARAMETERS,
    "bnet-c": BNET_CONV_PARAMETERS,
    "dec8": DEC8_FIRST_FOUR_PAIRS + 8 * (512 * 3 + 1) * 512,
    "dec8-640": DEC8_FIRST_FOUR_PAIRS + (512 * 3 + 1) * 640 + 7 * (640 * 3 + 1) * 640,
    "dec8-768": DEC8_FIRST_FOUR_PAIRS + (512 * 3 + 1) * 768 + 7 * (768 * 3 + 1) * 768,
    "dec3": (
        (1 * 9 + 1) * 48  # 480
        + (48 * 9 + 1) * 96  # 41,568
        + (96 * 9 + 1) * 160  # 138,400
        + (160 * 9 + 1) * 256  # 368,896
        + (256 * 8 + 1) * 512  # 1,049,088
        + (512 * 8 + 1) * 512  # 2,097,664
    ),
}
FC_PARAMETERS = {
    "bnet": (7 * 7 * 512 + 1) * 4096 + (4096 + 1) * 4096 + (4096 + 1) * 1000,
    "bnet-c": (25088 + 1) * 1000,
    "dec8": (512 + 1) * 1000,
    "dec8-640": (640 + 1) * 1000,
    "dec8-768": (768 + 1) * 1000,
    "dec3": (512 + 1) * 36,
}
BATCH_NORM_DEFAULTS = {
    "bnet": BNET_BATCH_NORM,
    "bnet-c": BNET_C_BATCH_NORM,
    "dec8": DEC8_BATCH_NORM,
    "dec8-640": DEC8_BATCH_NORM,
    "dec8-768": DEC8_BATCH_NORM,
    "dec3": DEC3_BATCH_NORM,
}

every_network = pytest.mark.parametrize("name", NAMES)


def full_size(name: str, **options: bool | float) -> nn.Module:
    """The paper's network, without memory for its weights."""
    num_classes = 36 if name == "dec3" else 1000
    with torch.device("meta"):
        return create_model(name, num_classes=num_classes, **options)  # type: ignore[arg-type]


def tiny(name: str, *, batch_norm: bool | None = None) -> nn.Module:
    """A network of 1/32 of the widths for 5 classes and images of 32 x 32."""
    return create_model(name, num_classes=5, width=1 / 32, image_size=32, batch_norm=batch_norm)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_every_network_of_the_registry_is_tested() -> None:
    assert model_names() == NAMES


@every_network
@pytest.mark.parametrize("batch_norm", [False, True])
def test_forward_shape_at_tiny_width(name: str, batch_norm: bool) -> None:
    channels = input_shape(name)[0]
    logits = tiny(name, batch_norm=batch_norm)(torch.randn(2, channels, 32, 32))
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()


@every_network
def test_forward_shape_at_the_papers_size(name: str) -> None:
    model = full_size(name)
    images = torch.empty(2, *input_shape(name), device="meta")
    assert model(images).shape == (2, 36 if name == "dec3" else 1000)
    features = model.get_submodule("features")(images)
    assert features.shape[2:] == ((7, 7) if name.startswith("bnet") else (1, 1))


@every_network
def test_widths_are_the_papers(name: str) -> None:
    assert [conv.out_channels for conv in convolutions(full_size(name))] == CONV_WIDTHS[name]


@every_network
def test_parameter_counts_by_hand(name: str) -> None:
    model = full_size(name, batch_norm=False)
    assert num_parameters(*convolutions(model)) == CONV_PARAMETERS[name]
    assert num_parameters(model) == CONV_PARAMETERS[name] + FC_PARAMETERS[name]


@every_network
def test_parameter_counts_by_hand_with_batch_norm(name: str) -> None:
    # Each convolution neuron loses its bias and gains a scale and a shift.
    without = CONV_PARAMETERS[name] + FC_PARAMETERS[name]
    assert num_parameters(full_size(name, batch_norm=True)) == without + sum(CONV_WIDTHS[name])


def test_bnet_is_vgg_b() -> None:
    # "133 million" of Simonyan and Zisserman 2014, table 2.
    assert num_parameters(full_size("bnet", batch_norm=False)) == 133_047_848


@pytest.mark.parametrize(
    ("name", "num_neurons", "num_dead", "percent"),
    [  # the shares of zero neurons in the paper's tables are whole numbers of these networks' neurons
        ("bnet-c", 2944, 374, 12.70),
        ("dec8", 6368, 216, 3.39),
        ("dec8-640", 7392, 918, 12.42),
        ("dec8-640", 7392, 745, 10.08),
        ("dec8-768", 8416, 2258, 26.83),
        ("dec3", 1584, 612, 38.64),
        ("dec3", 1584, 873, 55.11),
    ],
)
def test_neuron_counts_give_the_papers_percentages(name: str, num_neurons: int, num_dead: int, percent: float) -> None:
    assert sum(conv.out_channels for conv in convolutions(full_size(name))) == num_neurons
    assert round(100 * num_dead / num_neurons, 2) == percent


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("dec")])
def test_dec_alternates_vertical_and_horizontal_kernels(name: str) -> None:
    kernels = [conv.kernel_size for conv in convolutions(full_size(name))]
    sizes = [9, 9, 8] if name == "dec3" else [11, 7, 3, 3, 3, 3, 3, 3]
    assert kernels == [kernel for k in sizes for kernel in ((k, 1), (1, k))]


@every_network
def test_traceable_by_fx_with_the_same_output(name: str) -> None:
    model = tiny(name).eval()
    images = torch.randn(2, input_shape(name)[0], 32, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images), rtol=0, atol=0)


@every_network
@pytest.mark.parametrize("batch_norm", [False, True])
def test_chain_of_conv_batch_norm_relu(name: str, batch_norm: bool) -> None:
    chain = list(tiny(name, batch_norm=batch_norm).get_submodule("features").named_children())
    after = {"conv": "bn" if batch_norm else "relu", "bn": "relu"}
    for (label, module), (next_label, _) in zip(chain, [*chain[1:], ("", nn.Identity())], strict=True):
        kind = label.rstrip("0123456789vh")
        number = label.removeprefix(kind)
        if kind in after:
            assert next_label == after[kind] + number
        if isinstance(module, nn.Conv2d):
            assert (module.bias is None) == batch_norm
    num_batch_norms = sum(isinstance(module, nn.BatchNorm2d) for _, module in chain)
    assert num_batch_norms == (len(CONV_WIDTHS[name]) if batch_norm else 0)


@every_network
def test_batch_norm_default_is_the_constant_of_the_networks_file(name: str) -> None:
    has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in full_size(name).modules())
    assert has_batch_norm == BATCH_NORM_DEFAULTS[name]


@every_network
@settings(max_examples=8, deadline=None)
@given(width=st.floats(min_value=1e-6, max_value=2.0))
def test_width_multiplies_every_hidden_width(name: str, width: float) -> None:
    model = full_size(name, width=width)
    assert [c.out_channels for c in convolutions(model)] == [max(1, round(n * width)) for n in CONV_WIDTHS[name]]
    fcs = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [fc.out_features for fc in fcs[:-1]] == ([max(1, round(4096 * width))] * 2 if name == "bnet" else [])
    assert fcs[-1].out_features == (36 if name == "dec3" else 1000)


def test_bnet_has_vggs_dropout_and_bnet_c_none() -> None:
    labels = [label for label, _ in tiny("bnet").get_submodule("classifier").named_children()]
    assert labels == ["flatten", "fc1", "relu1", "dropout1", "fc2", "relu2", "dropout2", "fc3"]
    assert [module.p for module in tiny("bnet").modules() if isinstance(module, nn.Dropout)] == [0.5, 0.5]
    assert not any(isinstance(module, nn.Dropout) for module in tiny("bnet-c").modules())


@pytest.mark.parametrize("name", ["bnet", "bnet-c"])
@pytest.mark.parametrize("image_size", [32, 64, 96])
def test_bnet_fc_follows_the_image_size(name: str, image_size: int) -> None:
    model = create_model(name, num_classes=3, width=1 / 64, image_size=image_size)
    assert model(torch.randn(1, 3, image_size, image_size)).shape == (1, 3)
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    assert first.in_features == 8 * (image_size // 32) ** 2


@pytest.mark.parametrize("name", ANY_SIZE)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 100)])
def test_dec8_takes_any_image_from_32(name: str, size: tuple[int, int]) -> None:
    assert tiny(name)(torch.randn(2, 3, *size)).shape == (2, 5)


@every_network
def test_in_channels(name: str) -> None:
    model = create_model(name, num_classes=2, width=1 / 32, image_size=32, in_channels=2)
    assert model(torch.randn(2, 2, 32, 32)).shape == (2, 2)


@pytest.mark.parametrize(("name", "shape"), [(n, (3, 224, 224)) for n in NAMES[:-1]] + [("dec3", (1, 32, 32))])
def test_input_shape(name: str, shape: tuple[int, int, int]) -> None:
    assert input_shape(name) == shape


@every_network
def test_signal_keeps_its_size_through_the_depth_without_batch_norm(name: str) -> None:
    torch.manual_seed(0)
    image_size = 32 if name == "dec3" else 64
    model = create_model(name, num_classes=10, width=1 / 8, batch_norm=False, image_size=image_size)
    signal = torch.randn(8, input_shape(name)[0], image_size, image_size)
    for label, module in model.get_submodule("features").named_children():
        signal = module(signal)
        if label.startswith("relu"):
            root_mean_square = signal.square().mean().sqrt()
            assert 0.25 < root_mean_square < 4, label  # max-pooling raises it, the zeros of the padding lower it
    model(torch.randn(8, input_shape(name)[0], image_size, image_size)).square().sum().backward()
    weights = [conv.weight for conv in convolutions(model)]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    assert len(gradients) == len(CONV_WIDTHS[name])
    relative = [(g.norm() / w.detach().norm()).item() for g, w in zip(gradients, weights, strict=True)]
    assert max(relative) < 20 * min(relative)


@every_network
def test_weights_follow_the_seed(name: str) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([parameter.detach().flatten() for parameter in tiny(name).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(("wrong", "meant"), [("dec-8", "dec8"), ("DEC3", "dec3"), ("bnetc", "bnet-c")])
def test_unknown_name_offers_close_matches(wrong: str, meant: str) -> None:
    assert difflib.get_close_matches(wrong.lower(), NAMES)
    with pytest.raises(ValueError, match=rf"no network is called '{wrong}'.*did you mean .*{meant}.*Known are bnet"):
        create_model(wrong, num_classes=2)
    with pytest.raises(ValueError, match="no network is called"):
        input_shape(wrong)


def test_unknown_name_without_a_close_match() -> None:
    with pytest.raises(ValueError, match=r"no network is called 'qqqq'.*: Known are bnet"):
        create_model("qqqq", num_classes=2)


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("bnet", 100, r"multiple of 32, got 100; resize the images to 96"),
        ("bnet-c", 16, r"multiple of 32, got 16; resize the images to 32"),
        ("dec8", 31, r"at least 32, got 31"),
        ("dec3", 64, r"32 x 32 only, got image_size 64"),
        ("dec3", 0, r"image_size of dec3 must be at least 1"),
    ],
)
def test_image_sizes_that_do_not_fit(name: str, image_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, num_classes=2, image_size=image_size)


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf")])
def test_width_must_be_a_number_above_zero(width: float) -> None:
    with pytest.raises(ValueError, match=r"--network\.width"):
        create_model("dec3", num_classes=2, width=width)


def test_counts_must_be_positive() -> None:
    with pytest.raises(ValueError, match="num_classes of dec3 must be at least 1"):
        create_model("dec3", num_classes=0)
    with pytest.raises(ValueError, match="in_channels of dec3 must be at least 1"):
        create_model("dec3", num_classes=2, in_channels=0)


@every_network
def test_no_pretrained_weights(name: str) -> None:
    with pytest.raises(ValueError, match=r"--network\.pretrained"):
        create_model(name, num_classes=2, pretrained=True)
