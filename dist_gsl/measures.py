"""The paper's four measures of what was learned, in terms of the starting network. Imports torch alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from dist_gsl.neurons import OUTPUTS, NeuronLayer, Neurons, Slice


@dataclass(frozen=True)
class Measures:
    """Percent, as in the paper's tables; over convolution layers except where said. In a network whose convolutions have no neurons to
    lose, as a transformer or a perceptron, over its hidden layers instead."""

    neurons: float
    """Share of the convolution neurons that is zero."""
    group_param: float
    """Share of the convolution parameters that sit in zero neurons."""
    total_param: float
    """group_param plus the share of zero parameters in live neurons. A weight that only reads a zero neuron is not
    counted here, it is induced."""
    total_induced: float
    """Share of the parameters of the convolutions and the last linear layer that sit in zero neurons or only read
    zero neurons."""
    all_neurons: float
    """Share of all neurons, those of hidden linear layers included, that is zero."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure(model: nn.Module, neurons: Neurons) -> Measures:
    """The four measures of a network, before or after its dead neurons were removed.

    Totals are those of the starting network; layers whose neurons are pinned count as alive.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sizes = _Sizes(neurons, parameters)
    measured, hidden = measured_layers(neurons), _hidden(neurons)
    last = [layer for layer in neurons.all_layers if layer.kind == "linear"][-1:]
    owned = [piece.tensor for layer in measured for piece in layer.producers]
    conv_tensors = list({parameters[name]: name for name in owned}.values())  # a shared one counts once
    last_tensors = [piece.tensor for layer in last for piece in layer.producers]

    total = sum(sizes.starting(name) for name in conv_tensors)
    in_dead = sum(layer.num_dead * layer.group_size for layer in measured)
    zeros = sum(sizes.live_zeros(name) for name in conv_tensors)
    both = conv_tensors + last_tensors
    induced = sum(sizes.starting(name) - sizes.live(name) for name in both)
    return Measures(
        neurons=_percent(sum(c.num_dead for c in measured), sum(c.starting_neurons for c in measured)),
        group_param=_percent(in_dead, total),
        total_param=_percent(in_dead + zeros, total),
        total_induced=_percent(induced, sum(sizes.starting(name) for name in both)),
        all_neurons=_percent(sum(layer.num_dead for layer in hidden), sum(layer.starting_neurons for layer in hidden)),
    )


def measured_layers(neurons: Neurons) -> list[NeuronLayer]:
    """Those over which the measures are taken: the convolutions, or all hidden layers where no convolution has neurons to lose."""
    convolutions = [layer for layer in neurons.all_layers if layer.kind == "conv"]
    return _hidden(neurons) if all(layer.pinned is not None for layer in convolutions) else convolutions


def _hidden(neurons: Neurons) -> list[NeuronLayer]:
    return [layer for layer in neurons.all_layers if layer.pinned != OUTPUTS]  # outputs are no neurons


class _Sizes:
    """Entries of each tensor in the starting network, and of those the ones that no dead neuron owns or feeds."""

    def __init__(self, neurons: Neurons, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.pieces: dict[tuple[str, int], list[tuple[NeuronLayer, Slice]]] = {}
        for layer in neurons.all_layers:
            for piece in (*layer.producers, *layer.readers):
                pieces = self.pieces.setdefault((piece.tensor, piece.dim), [])
                pieces.append((layer, piece))

    def starting(self, name: str) -> int:
        return math.prod(
            size
            + sum(
                (layer.starting_neurons - layer.num_neurons) * piece.index.shape[1]
                for layer, piece in self.pieces.get((name, dim), [])
            )
            for dim, size in enumerate(self.parameters[name].shape)
        )

    def live(self, name: str) -> int:
        return math.prod(len(self.live_positions(name, dim)) for dim in range(len(self.parameters[name].shape)))

    def live_positions(self, name: str, dim: int) -> Tensor:
        live = torch.ones(self.parameters[name].shape[dim], dtype=torch.bool)
        for layer, piece in self.pieces.get((name, dim), []):
            live[piece.index[~layer.mask].flatten()] = False
        return live.nonzero().flatten()

    def live_zeros(self, name: str) -> int:
        """Entries that are 0 though no dead neuron owns or feeds them."""
        tensor = self.parameters[name].detach()
        for dim in range(tensor.dim()):
            tensor = tensor.index_select(dim, self.live_positions(name, dim).to(tensor.device))
        return int((tensor == 0).sum())


def _percent(part: float, whole: float) -> float:
    return 100.0 * part / whole if whole else 0.0
