"""Removing dead neurons: (state, dead neurons) -> smaller state, and the proof that the function is the same.

Tensors are cut by name, whatever they are: parameters, running statistics, momentum, moving averages. Imports torch
alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_gsl.neurons import NeuronLayer, Neurons, Slice
from dist_gsl.tracing import BatchNorm, Convolution

TOLERANCE = 1e-9
"""Largest difference that removal may make to an output in float64, relative to the largest output."""


@dataclass
class Compacted:
    """A network without its dead neurons."""

    model: nn.Module
    neurons: Neurons
    """The remaining neurons, with their numbers in the starting network."""
    optimizer_state: dict[str, Any] | None
    """State dict for a ProximalSGD over the new model's parameters; None if no optimizer was given."""
    widths: dict[str, int]
    """Neurons of each layer, pinned ones included."""
    max_abs_difference: float
    """Largest absolute difference of the outputs in float64, over random and given inputs."""
    max_abs_output: float
    """Largest absolute output seen in that comparison."""


class Removal:
    """Which positions of which tensors go when the dead neurons go."""

    def __init__(self, neurons: Neurons, keep: Mapping[str, Tensor] | None = None) -> None:
        """keep: {layer name: bool (num_neurons,)}; None: the masks. `ValueError` for a layer that would be empty."""
        masks = {layer.name: layer.mask for layer in neurons} if keep is None else dict(keep)
        for name, mask in masks.items():
            if not mask.any():
                raise ValueError(f"layer {name!r} has no neuron alive: the network's output would be constant; "
                                 "train with min_alive=1 or a smaller beta")
        self._gone: dict[tuple[str, int], list[Tensor]] = {}
        for name, mask in masks.items():
            layer = neurons[name]
            for piece in (*layer.producers, *layer.buffers, *layer.readers):
                self._gone.setdefault((piece.tensor, piece.dim), []).append(piece.index[~mask].flatten())
        self._masks = masks

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """A smaller copy; memory format kept. Other dimensions of the tensor may be cut too."""
        channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        for dim in range(tensor.dim()):
            if (name, dim) in self._gone:
                tensor = tensor.index_select(dim, self._kept(name, dim, tensor.shape[dim]).to(tensor.device))
        return tensor.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.tensor(name, tensor) for name, tensor in tensors.items()}

    def neurons(self, neurons: Neurons, model: nn.Module) -> Neurons:
        """The neurons that remain, bound to the smaller model."""
        sizes = neurons.model.state_dict(keep_vars=True)  # under all of their names, shared ones too

        def moved(piece: Slice, mask: Tensor) -> Slice:
            size = sizes[piece.tensor].shape[piece.dim]
            position = torch.full((size,), -1)
            kept = self._kept(piece.tensor, piece.dim, size)
            position[kept] = torch.arange(len(kept))
            return Slice(piece.tensor, piece.dim, position[piece.index[mask]])

        def smaller(layer: NeuronLayer) -> NeuronLayer:
            mask = self._masks.get(layer.name, torch.ones(layer.num_neurons, dtype=torch.bool))
            return replace(
                layer, mask=layer.mask[mask].clone(), indices=layer.indices[mask].clone(),
                producers=tuple(moved(piece, mask) for piece in layer.producers),
                buffers=tuple(moved(piece, mask) for piece in layer.buffers),
                readers=tuple(moved(piece, mask) for piece in layer.readers),
            )  # fmt: skip

        return Neurons(model, [smaller(layer) for layer in neurons.all_layers], input_shape=neurons.input_shape)

    def model(self, model: nn.Module) -> nn.Module:
        """A smaller copy of the model."""
        smaller = copy.deepcopy(model)
        for prefix, module in smaller.named_modules():
            cut = False
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    full_name = f"{prefix}.{name}" if prefix else name
                    if tensor is None or not any((full_name, dim) in self._gone for dim in range(tensor.dim())):
                        continue
                    data = self.tensor(full_name, tensor.detach())
                    is_parameter = isinstance(tensor, nn.Parameter)
                    store[name] = nn.Parameter(data, tensor.requires_grad) if is_parameter else data
                    cut = True
            if cut:
                _set_sizes(module)
        return smaller

    def _kept(self, name: str, dim: int, size: int) -> Tensor:
        kept = torch.ones(size, dtype=torch.bool)
        for gone in self._gone.get((name, dim), []):
            kept[gone] = False
        return kept.nonzero().flatten()


def compact(
    model: nn.Module,
    neurons: Neurons,
    optimizer: torch.optim.Optimizer | None = None,
    example_inputs: Tensor | None = None,
) -> Compacted:
    """Removes the dead neurons and every weight that read them, and proves that the function is the same.

    The proof: every parameter of a dead neuron is 0; and in float64, in evaluation mode, on random inputs and on
    `example_inputs`, no output differs by more than 1e-9 of the largest one. `RuntimeError` where that fails or an
    output is not finite; `ValueError` where a layer would be left empty. What is given is left as it is.
    """
    removal = Removal(neurons)
    check_dead_are_zero(model, neurons)
    smaller = removal.model(model)
    kept = removal.neurons(neurons, smaller)
    inputs = [] if example_inputs is None else [example_inputs]
    if neurons.input_shape:
        generator = torch.Generator().manual_seed(0)
        inputs.append(torch.randn((max(2, neurons.input_shape[0]), *neurons.input_shape[1:]), generator=generator))
    if not inputs:
        raise ValueError("compact: no inputs to prove equality on; pass example_inputs")
    difference, largest = max_difference(model, smaller, inputs)
    check_difference(difference, largest)
    state = None if optimizer is None else _cut_optimizer_state(model, optimizer, removal, kept)
    widths = {layer.name: layer.num_neurons for layer in kept.all_layers}
    return Compacted(smaller, kept, state, widths, difference, largest)


@torch.no_grad()
def max_difference(model: nn.Module, other: nn.Module, batches: Iterable[Tensor]) -> tuple[float, float]:
    """(largest absolute difference, largest absolute output) of two models in float64, evaluation mode, on copies."""
    device = next(model.parameters()).device
    a, b = (copy.deepcopy(m).double().eval() for m in (model, other))
    difference, largest = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for batch in batches:
        x = batch.to(device, torch.float64)
        out_a, out_b = a(x), b(x)
        difference = torch.maximum(difference, (out_a - out_b).abs().max().cpu())  # maximum keeps NaN
        largest = torch.maximum(largest, out_a.abs().max().cpu())
    return float(difference), float(largest)


def check_difference(difference: float, largest: float) -> None:
    """`RuntimeError` unless the difference is within 1e-9 of the largest output; what is not finite fails."""
    if not difference <= TOLERANCE * largest < math.inf:
        raise RuntimeError(
            f"compact: removing the dead neurons moves an output by {difference:.3g} where the largest is "
            f"{largest:.3g} (allowed {TOLERANCE:g} of it). No network was written"
        )


def check_dead_are_zero(model: nn.Module, neurons: Neurons) -> None:
    """`RuntimeError` if a parameter of a dead neuron is not 0: such a neuron may fire where no example shows it."""
    for layer in neurons:
        for piece in layer.producers:
            if bool(piece.rows(model.get_parameter(piece.tensor).detach())[~layer.mask].any()):
                raise RuntimeError(
                    f"compact: {piece.tensor!r} is not 0 for all dead neurons of {layer.name!r}: "
                    "the mask calls a neuron dead that is not. No network was written"
                )


def set_widths(model: nn.Module, neurons: Neurons, indices: Mapping[str, Tensor]) -> tuple[nn.Module, Neurons]:
    """A network cut to the given neurons of each layer, {layer name: int64 indices}: what a checkpoint loads into."""
    keep = {}
    for layer in neurons:
        keep[layer.name] = torch.zeros(layer.num_neurons, dtype=torch.bool)
        keep[layer.name][indices[layer.name]] = True
    removal = Removal(neurons, keep)
    smaller = removal.model(model)
    return smaller, removal.neurons(neurons, smaller)


def _set_sizes(module: nn.Module) -> None:
    """Makes a module's size attributes say what its tensors are."""
    if isinstance(module, Convolution):
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, BatchNorm):
        module.num_features = module.weight.shape[0]
    else:
        raise RuntimeError(f"compact: {type(module).__name__} was cut but its size attributes are not known")


def _cut_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, removal: Removal, kept: Neurons
) -> dict[str, Any]:
    state = optimizer.state_dict()
    names = {p: name for name, p in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]

    def cut(number: int, value: Any) -> Any:
        is_like_parameter = isinstance(value, Tensor) and value.dim() > 0
        return removal.tensor(order[number], value) if is_like_parameter else copy.deepcopy(value)

    state["state"] = {
        number: {key: cut(number, value) for key, value in entries.items()}
        for number, entries in state["state"].items()
    }
    if "neurons" in state:
        state["neurons"] = kept.state_dict()
    return state
