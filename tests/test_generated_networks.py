"""Networks put together at random from everything that ties, moves or keeps channels: what is removed is never noticed."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_gsl import compact, find_neurons
from tests.exactness import check_exact, kill_a_third_, randomise_
from tests.networks import IMAGE

ACTIVATIONS = ["relu", "gelu", "silu", "sigmoid", "softplus", "tanh", "hardswish"]


class Piece(nn.Module):
    """One construct: (N, channels, H, W) -> (N, self.channels, H, W)."""

    def __init__(self, kind: str, channels: int, width: int, activation: str) -> None:
        super().__init__()
        self.kind, self.activation, self.channels = kind, activation, channels
        self.a: nn.Module
        self.norm: nn.Module
        if kind in ("conv", "valid conv", "conv without bias"):
            padding = 0 if kind == "valid conv" else 1
            self.a = nn.Conv2d(channels, width, 1 if padding == 0 else 3, padding=padding, bias=kind != "conv without bias")
            self.channels = width
        elif kind == "norm":
            self.norm = nn.BatchNorm2d(channels)
        elif kind == "depthwise":
            self.a = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        elif kind == "widening depthwise":
            self.a, self.channels = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels), 2 * channels
        elif kind == "grouped":
            self.a, self.channels = nn.Conv2d(channels, 2 * width, 3, padding=1, groups=2 if channels % 2 == 0 else 1), 2 * width
        elif kind == "residual":
            self.a, self.norm, self.b = nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.Conv2d(width, channels, 1)
        elif kind == "concat":
            self.a, self.b, self.channels = nn.Conv2d(channels, width, 1), nn.Conv2d(channels, 3, 3, padding=1), width + 3 + channels
        elif kind == "gate":
            self.a, self.channels = nn.Conv2d(channels, 2 * width, 1), width
        elif kind == "squeeze":
            self.a, self.b = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)
        elif kind == "shared":
            self.a = nn.Conv2d(channels, channels, 3, padding=1)
        elif kind == "layer norm":
            self.norm = nn.GroupNorm(1, channels)
        elif kind == "transposed":
            self.a, self.channels = nn.ConvTranspose2d(channels, width, 3, padding=1), width
        elif kind == "prelu":
            self.a = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        f = getattr(F, self.activation)
        match self.kind:
            case "activation":
                return f(x)
            case "norm" | "layer norm":
                return self.norm(x)
            case "residual":
                return x + self.b(f(self.norm(self.a(x))))
            case "concat":
                return torch.cat([self.a(x), f(self.b(x)), x], 1)
            case "gate":
                values, gates = self.a(x).chunk(2, 1)
                return values * f(gates)
            case "squeeze":
                return x * torch.sigmoid(self.b(f(self.a(x.mean((2, 3), keepdim=True)))))
            case "shared":
                return self.a(f(self.a(x)))
            case "shuffle":
                if self.channels % 2:
                    return x
                n, c, h, w = x.shape
                return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            case "pool":
                return F.avg_pool2d(x, 3, 1, 1)
            case "max pool":
                return F.max_pool2d(x, 3, 1, 1)
            case "dropout":
                return F.dropout(x, 0.5, training=False)
            case "halves":
                if self.channels % 2:
                    return x
                first, second = x.chunk(2, 1)
                return torch.cat([second, f(first)], 1)
            case "split":
                first, rest = x[:, :1], x[:, 1:]
                return torch.cat([rest, f(first)], 1)
            case _:
                return self.a(x)


KINDS = [
    "activation", "norm", "conv", "valid conv", "conv without bias", "depthwise", "widening depthwise", "grouped", "residual", "concat",
    "gate", "squeeze", "shared", "shuffle", "pool", "max pool", "dropout", "split", "halves", "layer norm", "transposed", "prelu",
]  # fmt: skip


class Generated(nn.Module):
    def __init__(self, pieces: list[tuple[str, int, str]], ending: str) -> None:
        super().__init__()
        self.pieces, channels = nn.ModuleList(), 4
        self.stem = nn.Conv2d(IMAGE[0], channels, 3, padding=1)
        for kind, width, activation in pieces:
            piece = Piece(kind, channels, width, activation)
            self.pieces.append(piece)
            channels = piece.channels
        self.ending = ending
        self.fc1 = nn.Linear(channels * (1 if ending == "mean" else 64), 5)
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for piece in self.pieces:
            x = piece(x)
        x = x.mean((2, 3)) if self.ending == "mean" else x.flatten(1)
        return self.fc2(torch.sigmoid(self.fc1(x)))


PIECES = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(2, 6), st.sampled_from(ACTIVATIONS)), min_size=3, max_size=8)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(pieces=PIECES, ending=st.sampled_from(["mean", "flatten"]), seed=st.integers(0, 1000))
def test_no_removal_is_noticed(pieces: list[tuple[str, int, str]], ending: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = Generated(pieces, ending).double()
    randomise_(model, seed)
    x = torch.randn(3, *IMAGE, dtype=torch.float64)
    neurons = find_neurons(model, x)
    assert "fc1" in [layer.name for layer in neurons]
    kill_a_third_(neurons, seed=seed, empty=0.3)
    check_exact(model, neurons, x)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(pieces=PIECES, seed=st.integers(0, 1000))
def test_the_parameters_that_disappear_are_those_that_were_counted(pieces: list[tuple[str, int, str]], seed: int) -> None:
    """One neuron of each layer goes: its group, and what reads it, counted one by one in the full network."""
    model = Generated(pieces, "mean")
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    gone = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for layer in neurons:
        if layer.num_neurons > 1:
            which = torch.tensor([seed % layer.num_neurons])
            owned = 0
            for piece in layer.producers:
                marked = torch.zeros_like(gone[piece.tensor])
                piece.clear_(marked.logical_not_(), which)
                owned += int((~marked).sum())
                gone[piece.tensor] |= ~marked
            assert owned == layer.group_size  # sqrt(P_l) of the penalty
            for piece in layer.readers:
                marked = torch.ones_like(gone[piece.tensor])
                piece.clear_(marked, which)
                gone[piece.tensor] |= ~marked
            neurons.zero_({layer.name: which})
    small = compact(model, neurons).model
    assert {name: p.numel() for name, p in small.named_parameters()} == {name: int((~mask).sum()) for name, mask in gone.items()}


# --- made by hand to be nasty


def test_a_channel_that_is_zero_in_one_branch_only_stays() -> None:
    model = Generated([("residual", 4, "relu")], "mean").double()
    randomise_(model)
    x = torch.randn(3, *IMAGE, dtype=torch.float64)
    neurons = find_neurons(model, x)
    with torch.no_grad():
        for name in ("stem.weight", "stem.bias"):
            model.get_parameter(name)[1] = 0
    stem = neurons["stem"]
    rows = torch.cat([part.reshape(4, -1) for part in neurons.parts(stem)], dim=1)
    assert not (rows == 0).all(1).any()  # its branch still writes to it
    stem.mask[1] = False
    with pytest.raises(RuntimeError, match="is not 0 for all dead neurons of 'stem'"):
        compact(model, neurons)


def test_zeros_in_a_grouped_convolution_stay_where_they_are() -> None:
    model = Generated([("grouped", 4, "relu"), ("grouped", 3, "relu")], "mean").double()
    randomise_(model)
    with torch.no_grad():  # arbitrary zeros, whole filters among them, in one group alone
        weight = model.get_parameter("pieces.1.a.weight")
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.6] = 0
        weight[1] = 0
    x = torch.randn(3, *IMAGE, dtype=torch.float64)
    neurons = find_neurons(model, x)
    layer = neurons["pieces.0.a"]
    assert (layer.num_neurons, layer.producers[0].index.shape[1]) == (4, 2)  # the same position of both groups is one neuron
    neurons.zero_({"pieces.0.a": [2]})
    check_exact(model, neurons, x)


def test_a_layer_that_is_fully_dead_is_refused_where_nothing_leads_around_it() -> None:
    model = Generated([("conv", 4, "relu")], "mean")
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    neurons.zero_({"stem": range(4)})
    with pytest.raises(ValueError, match="'stem' has no neuron alive"):
        compact(model, neurons)
