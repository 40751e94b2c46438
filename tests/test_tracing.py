"""Which neurons are found, in the zoo, in torchvision's networks and in small ones made to be difficult."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dist_gsl import ModuleRule, compact, find_neurons
from dist_gsl.models import model_names
from dist_gsl.neurons import Neurons, Slice
from tests.networks import IMAGE, chain, tiny

BNET_CONVS = [f"conv{i}" for i in range(1, 11)]
DEC8_CONVS = [f"conv{i}{side}" for i in range(1, 9) for side in "vh"]
CONVS = {
    "bnet": BNET_CONVS, "bnet-c": BNET_CONVS, "dec8": DEC8_CONVS, "dec8-640": DEC8_CONVS, "dec8-768": DEC8_CONVS,
    "dec3": DEC8_CONVS[:6],
}  # fmt: skip


def positions(piece: Slice) -> tuple[str, int, list[list[int]]]:
    return piece.tensor, piece.dim, piece.index.tolist()


# --- the zoo


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", model_names())
def test_every_hidden_neuron_of_the_zoo_is_found(name: str, batch_norm: bool) -> None:
    model, x = tiny(name, batch_norm=batch_norm)
    neurons = find_neurons(model, x)
    hidden = ["classifier.fc1", "classifier.fc2"] if name == "bnet" else []
    assert [layer.name for layer in neurons] == [f"features.{conv}" for conv in CONVS[name]] + hidden
    assert neurons.pinned == {"classifier.fc3" if hidden else "classifier.fc": "its neurons are the network's outputs"}
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, module, reader in zip(neurons, weighted, weighted[1:], strict=False):
        weight = module.weight
        assert layer.num_neurons == len(weight)
        # filter and bias, or filter and the BatchNorm pair; hidden linear layers have a bias and no BatchNorm
        extra = 2 if batch_norm and layer.kind == "conv" else 1
        assert layer.group_size == weight[0].numel() + extra
        assert len(layer.producers) == 1 + extra
        [piece] = layer.readers
        assert neurons.parameter(piece.tensor) is reader.weight
        assert piece.index.numel() == reader.weight.shape[1]  # together they read the whole of it
        assert piece.index.flatten().tolist() == list(range(reader.weight.shape[1]))


def test_producers_buffers_and_readers_of_a_layer() -> None:
    layer = find_neurons(chain(), torch.randn(1, *IMAGE))["conv1"]
    block = [[i] for i in range(6)]
    names = ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"]
    assert [positions(p) for p in layer.producers] == [(name, 0, block) for name in names]
    assert [positions(p) for p in layer.buffers] == [(n, 0, block) for n in ("bn1.running_mean", "bn1.running_var")]
    assert [positions(p) for p in layer.readers] == [("conv2.weight", 1, block)]


def test_a_flattened_map_is_read_by_all_of_its_positions() -> None:
    layer = find_neurons(chain(), torch.randn(1, *IMAGE))["conv2"]
    assert [positions(p) for p in layer.readers] == [
        ("fc1.weight", 1, [[4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3] for n in range(8)])
    ]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_is(training: bool) -> None:
    model = chain()
    model.train(training)
    model.get_submodule("bn2").train(not training)  # part of it frozen by its user
    flags = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    find_neurons(model, torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())


# --- torchvision


def torchvision_neurons(name: str, **options: object) -> Neurons:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=5, **options)
    return find_neurons(model.to_empty(device="cpu"), torch.zeros(1, 3, 224, 224))


def test_resnet18_has_one_layer_for_each_stream_and_one_inside_each_block() -> None:
    neurons = torchvision_neurons("resnet18")
    inner = [f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)]
    streams = {"conv1": 64, "layer2.0.conv2": 128, "layer3.0.conv2": 256, "layer4.0.conv2": 512}
    assert {layer.name for layer in neurons} == {*inner, *streams}
    assert list(neurons.pinned) == ["fc"]
    assert {name: neurons[name].num_neurons for name in streams} == streams
    tied = {piece.tensor for piece in neurons["layer2.0.conv2"].producers}
    assert tied == {f"layer2.{m}" for m in ("0.conv2.weight", "1.conv2.weight", "0.downsample.0.weight", "0.bn2.weight", "0.bn2.bias",
                                             "1.bn2.weight", "1.bn2.bias", "0.downsample.1.weight", "0.downsample.1.bias")}  # fmt: skip
    assert neurons["layer2.0.conv2"].group_size == 2 * 128 * 9 + 64 + 6
    assert [layer.name for layer in neurons if layer.bypassed] == inner  # a block may vanish, a stream may not


@pytest.mark.parametrize(("name", "num_convs"), [("vgg11_bn", 8), ("alexnet", 5)])
def test_vgg_and_alexnet_are_whole_chains(name: str, num_convs: int) -> None:
    neurons = torchvision_neurons(name)
    kinds = [layer.kind for layer in neurons]
    assert kinds == ["conv"] * num_convs + ["linear"] * 2
    assert list(neurons.pinned) == ["classifier.6"]
    last_conv = list(neurons)[num_convs - 1]
    size = 7 * 7 if name == "vgg11_bn" else 6 * 6
    assert last_conv.readers[0].index.shape == (last_conv.num_neurons, size)


def test_mobilenet_v2_ties_each_depthwise_convolution_to_the_one_before() -> None:
    neurons = torchvision_neurons("mobilenet_v2")
    assert list(neurons.pinned) == ["classifier.1"]
    assert len(neurons) == 25  # 17 inside of blocks (the first is the stem), 7 streams, the last convolution
    inner = neurons["features.3.conv.0.0"]
    assert {piece.tensor for piece in inner.producers} == {
        f"features.3.conv.{m}" for m in ("0.0.weight", "0.1.weight", "0.1.bias", "1.0.weight", "1.1.weight", "1.1.bias")
    }
    assert inner.group_size == 24 + 9 + 4
    # Inside a residual branch: blocks 3, 5, 6, 8 to 10, 12, 13, 15 and 16 add their input.
    assert [layer.name for layer in neurons if layer.bypassed] == [f"features.{i}.conv.0.0" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]


# --- small networks, each with one thing in the way


class Net(nn.Module):
    """conv1 -> `between` -> conv2 -> mean over positions -> fc: (N, 2, 8, 8) -> (N, 3)."""

    def __init__(self, between: Callable[[Tensor], Tensor], *, conv2: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1) if conv2 is None else conv2
        self.fc = nn.Linear(4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.between(self.conv1(x))).mean((2, 3)))


def pinned(model: nn.Module, *, shape: tuple[int, ...] = (2, *IMAGE)) -> dict[str, str]:
    found = find_neurons(model, torch.randn(shape)).pinned
    return {name: reason for name, reason in found.items() if reason != "its neurons are the network's outputs"}


ZERO_STAYS_ZERO: list[nn.Module | Callable[[Tensor], Tensor]] = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.ELU(), nn.CELU(), nn.SELU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(),
    nn.Mish(), nn.Tanh(), nn.Softsign(), nn.Hardswish(), nn.Hardtanh(), nn.Identity(), nn.Dropout(), nn.Dropout2d(),
    nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3), nn.BatchNorm2d(4),
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softsign, F.hardswish, F.tanh,
    F.dropout, F.dropout2d, torch.relu, torch.tanh, torch.selu,
    lambda x: F.max_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2), lambda x: F.adaptive_avg_pool2d(x, 3),
    lambda x: F.adaptive_max_pool2d(x, 3), lambda x: torch.max_pool2d(x, 2), lambda x: x.relu(),
    lambda x: x.tanh(), lambda x: x.contiguous(), lambda x: F.relu(x, inplace=True),
]  # fmt: skip


def label(operation: object) -> str:
    return type(operation).__name__ if isinstance(operation, nn.Module) else getattr(operation, "__name__", "?")


@pytest.mark.parametrize("operation", ZERO_STAYS_ZERO, ids=label)
def test_what_keeps_zeros_lets_channels_through(operation: Callable[[Tensor], Tensor]) -> None:
    model = Net(operation).eval()
    assert pinned(model) == {}
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    neurons.zero_({"conv1": [1]})
    # And it does keep them: after the operation the dead channel is zero everywhere.
    assert not operation(model.conv1(torch.randn(2, *IMAGE)))[:, 1].any()


PADDED = ", and then by 'conv2', with zeros around it"
PINNING: dict[str, tuple[Callable[[], Net], dict[str, str]]] = {
    "sigmoid": (lambda: Net(nn.Sigmoid()), {"conv1": "read by Sigmoid 'between', which makes a zero 0.5" + PADDED}),
    "softplus": (lambda: Net(F.softplus), {"conv1": "read by softplus (softplus), which makes a zero 0.6931" + PADDED}),
    "sigmoid method": (lambda: Net(lambda x: x.sigmoid()), {"conv1": "read by .sigmoid() (sigmoid), which makes a zero 0.5" + PADDED}),
    "one more": (lambda: Net(lambda x: x + 1), {"conv1": "read by add (add), which makes a zero 1" + PADDED}),
    "in place": (lambda: Net(lambda x: x.add_(1)), {"conv1": "read by .add_() (add_), which makes a zero 1" + PADDED}),
    "hardtanh above 0": (lambda: Net(nn.Hardtanh(0.5, 1.0)), {"conv1": "read by Hardtanh 'between', which makes a zero 0.5" + PADDED}),
    "layer norm": (lambda: Net(nn.GroupNorm(2, 4)), {"conv1": "read by GroupNorm 'between' at test_tracing.py:LINE"}),
    "plain BatchNorm": (
        lambda: Net(nn.BatchNorm2d(4, affine=False)),
        {"conv1": "BatchNorm 'between' has no scale and shift: it makes a zero channel non-zero"},
    ),
    "parametrized": (
        lambda: Net(nn.ReLU(), conv2=parametrizations.weight_norm(nn.Conv2d(4, 4, 3))),
        {"conv1": "read by 'conv2', whose weight is parametrized", "conv2": "its weight is parametrized"},
    ),
    "pool over channels": (
        lambda: Net(nn.MaxPool3d(3, 1, 1)), {"conv1": "pooled over its own dimension (between)"},
    ),
    "function pool over channels": (
        lambda: Net(lambda x: F.avg_pool3d(x, 3, 1, 1)), {"conv1": "pooled over its own dimension (avg_pool3d)"},
    ),
    "mean over channels": (
        lambda: Net(lambda x: x * x.mean(1, keepdim=True)), {"conv1": "read by .mean() (mean) over other dimensions at test_tracing.py:LINE"},
    ),
    "view": (lambda: Net(lambda x: x.view(2, 4, 8, 8)), {"conv1": "read by .view() (view), which fixes their number to 4"}),
    "a number of channels hidden in a closure": (
        lambda: Net(lambda x: x * torch.ones(4, 1, 1)), {"conv1": "read by mul (mul) with other values"},
    ),
    "softmax": (lambda: Net(lambda x: x.softmax(1)), {"conv1": "read by .softmax() (softmax) at test_tracing.py:LINE"}),
}  # fmt: skip


@pytest.mark.parametrize("case", PINNING)
def test_what_else_touches_a_channel_pins_it_with_the_reason(case: str) -> None:
    build, reasons = PINNING[case]
    found = {name: re.sub(r"(test_tracing.py):\d+", r"\1:LINE", reason) for name, reason in pinned(build()).items()}
    assert found == reasons


def test_a_flatten_that_takes_the_batch_along_pins() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(0, 1), nn.Flatten(1), nn.Linear(64, 3))
    assert pinned(model) == {"0": "flattened together with what comes before it (_1)"}


def test_grouped_convolutions_tie_the_same_position_of_every_group() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.Flatten(), nn.Linear(32, 2))
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    assert [positions(neurons["0"].producers[0]), positions(neurons["2"].producers[0])] == [
        ("0.weight", 0, [[0, 2], [1, 3]]), ("2.weight", 0, [[0, 3], [1, 4], [2, 5]])
    ]  # fmt: skip
    assert [positions(piece) for piece in neurons["0"].readers] == [("2.weight", 1, [[0], [1]])]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.conv3, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        x = x + self.conv3(self.conv2(x).relu())
        return self.fc(x.mean((2, 3)))


def test_a_residual_sum_ties_its_two_sides() -> None:
    neurons = find_neurons(Residual(), torch.randn(2, *IMAGE))
    assert [layer.name for layer in neurons] == ["conv1", "conv2"]
    assert {piece.tensor for piece in neurons["conv1"].producers} == {"conv1.weight", "conv1.bias", "conv3.weight", "conv3.bias"}
    assert {piece.tensor for piece in neurons["conv1"].readers} == {"conv2.weight", "fc.weight"}
    assert (neurons["conv1"].bypassed, neurons["conv2"].bypassed) == (False, True)


class Tied(nn.Module):
    """fc2 runs twice, or shares its weight with fc3, or its weight is used by hand."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Linear(i, 4) for i in (128, 4, 4, 4))
        self.how = how
        if how == "parameter":
            self.fc3.weight = self.fc2.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(self.fc1(x.flatten(1)).relu()).relu()
        if self.how == "module":
            x = self.fc2(x).relu()
        if self.how == "by hand":
            x = F.linear(x, self.fc2.weight.t()).relu()
        return self.fc4(self.fc3(x))


@pytest.mark.parametrize(("how", "layers"), [("module", ["fc1", "fc3"]), ("parameter", ["fc1"])])
def test_shared_weights_tie_what_they_read_to_what_they_make(how: str, layers: list[str]) -> None:
    neurons = find_neurons(Tied(how), torch.randn(2, *IMAGE))
    assert [layer.name for layer in neurons] == layers
    owned = {piece.tensor for piece in neurons["fc1"].producers}
    assert {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"} <= owned
    assert ("fc2.weight", 1) in {(piece.tensor, piece.dim) for piece in neurons["fc1"].readers}


def test_a_weight_that_is_used_by_hand_too_is_pinned() -> None:
    reasons = pinned(Tied("by hand"))
    assert reasons["fc1"] == "'fc2.weight' is used by hand too (t)"
    assert reasons["fc2"].startswith("read by linear (linear) at test_tracing.py:")


def test_two_readers_of_one_layer_are_both_found() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.a, self.b = nn.Conv2d(2, 4, 3), nn.Linear(4 * 36, 3), nn.Conv2d(4, 3, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.conv1(x).relu()
            return self.a(x.flatten(1)), self.b(x)

    layer = find_neurons(Fork(), torch.randn(2, *IMAGE))["conv1"]
    assert [(piece.tensor, piece.index.shape[1]) for piece in layer.readers] == [("a.weight", 36), ("b.weight", 1)]


def test_a_layer_that_nothing_reads_is_pinned() -> None:
    class Loose(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            self.conv2(x)
            return self.fc(self.conv3(x).mean((2, 3)))

    assert pinned(Loose()) == {"conv2": "nothing reads it"}


def test_batch_norm_after_flatten_goes_with_its_channel() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.BatchNorm1d(3 * 36), nn.ReLU(), nn.Linear(108, 2))
    layer = find_neurons(model, torch.randn(2, *IMAGE))["0"]
    assert [(p.tensor, p.index.shape[1]) for p in layer.producers] == [
        ("0.weight", 1), ("0.bias", 1), ("2.weight", 36), ("2.bias", 36)
    ]  # fmt: skip
    assert layer.group_size == 2 * 9 + 1 + 2 * 36


def test_pooling_over_linear_neurons_pins_them() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 8), nn.MaxPool1d(2), nn.Linear(4, 3))  # maxout
    assert pinned(model) == {"1": "pooled over its own dimension (_2)"}


# --- modules of one's own


class Twice(nn.Module):
    """Its control flow depends on values: tracing cannot see through it. Scales channels; 0 stays 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.num_channels = nn.Parameter(torch.ones(channels, 1, 1)), channels

    def forward(self, x: Tensor) -> Tensor:
        if len(self.scale) != self.num_channels:
            raise ValueError("scale has lost a channel")
        return x * self.scale if x.sum() > 0 else x * self.scale * 2


class Mixing(nn.Module):
    """A 1 x 1 convolution by hand, its weight (in, out)."""

    def __init__(self, channels: int, num_out: int) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.randn(channels, num_out)), nn.Parameter(torch.randn(num_out))

    def forward(self, x: Tensor) -> Tensor:
        assert x.sum() != 0
        return torch.einsum("nchw,cd->ndhw", x, self.matrix) + self.shift.view(-1, 1, 1)


def fit(module: nn.Module) -> None:
    assert isinstance(module, Twice)
    module.num_channels = len(module.scale)


RULES = {
    Twice: ModuleRule(carries={"scale": 0}, resize=fit),
    Mixing: ModuleRule(reads={"matrix": 0}, produces={"matrix": 1, "shift": 0}),
}


def test_a_rule_tells_what_tracing_cannot_see() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Twice(4), nn.ReLU(), Mixing(4, 5), nn.ReLU(), nn.Conv2d(5, 3, 3), nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(2, *IMAGE)
    with pytest.raises(ValueError, match=r"Sequential cannot be traced.*, test_tracing.py:\d+: if len\(self.scale\) != "):
        find_neurons(model, x)
    neurons = find_neurons(model, x, rules=RULES)
    assert [layer.name for layer in neurons] == ["0", "3", "5"]
    assert {piece.tensor for piece in neurons["0"].producers} == {"0.weight", "0.bias", "1.scale"}
    assert {(piece.tensor, piece.dim) for piece in neurons["3"].producers} == {("3.matrix", 1), ("3.shift", 0)}
    neurons.zero_({"0": [1, 2], "3": [0]})
    result = compact(model, neurons)
    assert result.max_abs_difference <= 1e-9 * result.max_abs_output
    assert result.model.get_submodule("1").num_channels == 2
    assert result.model.get_parameter("3.matrix").shape == (2, 4)
    again = find_neurons(result.model, x, rules=RULES)
    assert [layer.num_neurons for layer in again] == [2, 4, 3]


def test_a_rule_that_names_no_parameter_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Twice(4), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(ValueError, match="the rule for Twice names parameter 'gain'"):
        find_neurons(model, torch.randn(2, *IMAGE), rules={Twice: ModuleRule(carries={"gain": 0})})


def test_a_network_that_does_not_run_without_a_neuron_keeps_it() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Twice(4), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 2))
    neurons = find_neurons(model, torch.randn(2, *IMAGE), rules={Twice: ModuleRule(carries={"scale": 0})})  # nothing resizes it
    assert [layer.name for layer in neurons] == ["2"]
    reason = neurons.pinned["0"]
    assert reason.startswith("the network does not run without one of them: scale has lost a channel, test_tracing.py:")


def test_explain_prints_layers_ties_and_reasons() -> None:
    model = Residual()
    model.conv2.register_parameter("extra", None)
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    neurons.zero_({"conv2": [0]})
    assert neurons.explain().splitlines() == [
        "layer  neurons  alive  entries  tied",
        "conv1        4      4       56  conv3",
        "conv2        4      3       37         may vanish, there is a way around it",
        "fc           3      3        5         stays: its neurons are the network's outputs",
        "8 of 8 hidden neurons can be removed, in 2 layers",
    ]


# --- errors


def test_half_precision_parameters_are_refused() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=r"'conv1.weight' is .*float16.*float32"):
            find_neurons(chain().to(dtype), torch.randn(2, *IMAGE, dtype=dtype))


def test_control_flow_on_values_is_refused_by_name() -> None:
    class Depends(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="Depends cannot be traced"):
        find_neurons(Depends(), torch.randn(2, *IMAGE))


def test_a_forward_that_asks_for_a_value_is_given_one() -> None:
    model = Net(lambda x: x * float(torch.linspace(1, 2, 3)[1]))
    assert pinned(model) == {}


def test_inputs_that_the_model_does_not_take_are_refused() -> None:
    model = chain()
    model.train()
    with pytest.raises(ValueError, match=r"Sequential does not take.*\(2, 5, 8, 8\)"):
        find_neurons(model, torch.randn(2, 5, 8, 8))
    assert all(m.training for m in model.modules())
