"""What the paper's networks are made of: convolution units, the classifier's input, and the starting weights."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


def scaled(size: int, *, width: float) -> int:
    """Number of neurons of a hidden layer of `size` neurons after the width multiplier: rounded, at least 1."""
    return max(1, round(size * width))


def conv_unit(
    suffix: str,
    *,
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    batch_norm: bool,
) -> "OrderedDict[str, nn.Module]":
    """Convolution, BatchNorm if asked for, ReLU: modules `conv{suffix}`, `bn{suffix}`, `relu{suffix}`.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, H', W').

    The paper's neuron is [w, b], so a convolution has a bias. With BatchNorm it has none: BatchNorm subtracts the mean
    and a bias with it, and adds a shift of its own.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=not batch_norm)
    unit: OrderedDict[str, nn.Module] = OrderedDict()
    unit[f"conv{suffix}"] = conv
    if batch_norm:
        unit[f"bn{suffix}"] = nn.BatchNorm2d(out_channels)
    unit[f"relu{suffix}"] = nn.ReLU(inplace=True)
    return unit


def decomposed_pair(
    suffix: str,
    *,
    in_channels: int,
    out_channels: tuple[int, int],
    kernel_size: int,
    stride: int = 1,
    padding: int,
    batch_norm: bool,
) -> "OrderedDict[str, nn.Module]":
    """A vertical (k x 1) then a horizontal (1 x k) convolution, each with its own ReLU (paper section 4.1, Dec).

    Shapes: (N, in_channels, H, W) -> (N, out_channels[1], H', W'). The vertical one strides and pads over H, the
    horizontal one over W. The modules are `conv{suffix}v`, `relu{suffix}v`, `conv{suffix}h`, `relu{suffix}h`.
    """
    vertical, horizontal = out_channels
    pair = conv_unit(
        f"{suffix}v",
        in_channels=in_channels,
        out_channels=vertical,
        kernel_size=(kernel_size, 1),
        stride=(stride, 1),
        padding=(padding, 0),
        batch_norm=batch_norm,
    )
    pair.update(
        conv_unit(
            f"{suffix}h",
            in_channels=vertical,
            out_channels=horizontal,
            kernel_size=(1, kernel_size),
            stride=(1, stride),
            padding=(0, padding),
            batch_norm=batch_norm,
        )
    )
    return pair


def fully_connected(in_features: int, *, hidden: Sequence[int] = (), num_classes: int) -> nn.Sequential:
    """Flatten, then Linear, ReLU and Dropout(0.5) for each hidden width, then the Linear to the classes.

    Shapes: (N, C, H, W) with C * H * W = in_features -> (N, num_classes). Without hidden widths there is one layer,
    `fc`, and no dropout; with them the layers are `fc1`, `fc2`, ...
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, width in enumerate(hidden, start=1):
        parts[f"fc{index}"] = nn.Linear(in_features, width)
        parts[f"relu{index}"] = nn.ReLU(inplace=True)
        parts[f"dropout{index}"] = nn.Dropout(0.5)
        in_features = width
    parts[f"fc{len(hidden) + 1}" if hidden else "fc"] = nn.Linear(in_features, num_classes)
    return nn.Sequential(parts)


def assemble(features: "OrderedDict[str, nn.Module]", *, classifier: nn.Sequential) -> nn.Sequential:
    """The whole network, a chain of two named chains, with its starting weights.

    Shapes: (N, C, H, W) -> (N, num_classes).
    """
    network = nn.Sequential(OrderedDict(features=nn.Sequential(features), classifier=classifier))
    init_relu_network(network)
    return network


def init_relu_network(network: nn.Module) -> None:
    """Starting weights for a chain of ReLU layers, in place: Kaiming normal by fan-in, biases 0.

    Var(w) = 2 / fan_in keeps the second moment of the signal from layer to layer (He et al. 2015, eq. 10). That is
    what lets the 16 convolutions of Dec8 train without BatchNorm. Fan-in rather than fan-out because widths grow along
    the chain: by fan-out the signal would shrink by in/out at every growing layer. Each half of a decomposed pair has a
    ReLU of its own, so each is a layer to the rule: fan_in = in_channels * k, not in_channels * k * k. The last layer
    feeds the softmax and no ReLU: Var(w) = 1 / fan_in. The paper does not state its initialisation.
    """
    weighted = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for module in weighted:
        is_last = module is weighted[-1]
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear" if is_last else "relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
