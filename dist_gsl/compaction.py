"""Removing dead neurons: (state, dead neurons) -> smaller state, and the proof that the function is the same.

Tensors are cut by name, whatever they are: parameters, running statistics, momentum, moving averages. Imports torch
alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dist_gsl.neurons import Neurons
from dist_gsl.removal import Removal, copied

TOLERANCE = 1e-9
"""Largest difference that removal may make to an output in float64, relative to the largest output."""

GPU_WIDTHS = 32
"""Multiples in which a GPU's matrix units take widths: at odd ones an H100 is slower than at the full ones, at these it is not
(benchmarks/README.md)."""


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


def compact(
    model: nn.Module,
    neurons: Neurons,
    optimizer: torch.optim.Optimizer | None = None,
    example_inputs: Tensor | None = None,
    *,
    multiple_of: int = 1,
) -> Compacted:
    """Removes the dead neurons and every weight that read them, and proves that the function is the same.

    The proof: every parameter of a dead neuron is 0; and in float64, in evaluation mode, on random inputs and on
    `example_inputs`, no output differs by more than 1e-9 of the largest one. `RuntimeError` where that fails or an
    output is not finite; `ValueError` where a layer would be left empty. What is given is left as it is.

    multiple_of: keeps so many dead neurons, all zero, that widths are multiples of it, as tensor cores like them (`GPU_WIDTHS`
    for an H100); they stay masked, count as dead and never come back.
    """
    if multiple_of < 1:
        raise ValueError(f"compact: multiple_of is {multiple_of}, must be 1 or more")
    removal = Removal(neurons, multiple_of=multiple_of)
    check_dead_are_zero(model, neurons)
    leaves_constants = any(piece.absorber is not None and not layer.mask.all() for layer in neurons for piece in layer.readers)
    smaller = removal.model(_folded(model, neurons) if leaves_constants else model)
    kept = removal.neurons(neurons, smaller)
    inputs = [] if example_inputs is None else [example_inputs]
    if neurons.input_shape:
        generator = torch.Generator().manual_seed(0)
        inputs.append(torch.randn((max(2, neurons.input_shape[0]), *neurons.input_shape[1:]), generator=generator))
    if not inputs:
        raise ValueError("compact: no inputs to prove equality on; pass example_inputs")
    # What is folded now, not at death, is proved before it is rounded to the parameters' type.
    proved = removal.model(_folded(in_float64(model), neurons)) if leaves_constants else smaller
    difference, largest = max_difference(model, proved, inputs)
    if not is_same(difference, largest):
        raise RuntimeError(
            f"compact: removing the dead neurons of {_at_fault(model, neurons, inputs)} moves an output by {difference:.3g} where the "
            f"largest is {largest:.3g} (allowed {TOLERANCE:g} of it). No network was written"
        )
    state = None if optimizer is None else _cut_optimizer_state(model, optimizer, removal, kept)
    widths = {layer.name: layer.num_neurons for layer in kept.all_layers}
    return Compacted(smaller, kept, state, widths, difference, largest)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy with its floating-point tensors in float64."""
    return copied(model, lambda _, t: t.detach().to(torch.float64, copy=True) if t.is_floating_point() else t.detach().clone())


def _folded(model: nn.Module, neurons: Neurons) -> nn.Module:
    """A copy with f(0) of the dead neurons in their readers' biases. It is there already unless neurons were masked while they may come
    back, and folding what reads with weights of 0 changes nothing."""
    model = copy.deepcopy(model)
    neurons.bound_to(model).settle_()
    return model


def _at_fault(model: nn.Module, neurons: Neurons, inputs: list[Tensor]) -> str:
    """The first layer whose removal alone moves an output; for an error's message."""
    for layer in neurons:
        if layer.mask.all():
            continue
        alone = neurons.bound_to(in_float64(model))
        for other in alone:
            if other.name != layer.name:
                other.mask = torch.ones_like(other.mask)
        alone.settle_()
        if not is_same(*max_difference(model, Removal(alone).model(alone.model), inputs)):
            return f"layer {layer.name!r}"
    return "several layers together"


@torch.no_grad()
def max_difference(model: nn.Module, other: nn.Module, batches: Iterable[Tensor]) -> tuple[float, float]:
    """(largest absolute difference, largest absolute output) of two models in float64, evaluation mode, on copies."""
    device = next(model.parameters()).device
    a, b = (in_float64(m).eval() for m in (model, other))
    difference, largest = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for batch in batches:
        x = batch.to(device, torch.float64) if batch.is_floating_point() else batch.to(device)
        for out_a, out_b in zip(tree_leaves(a(x)), tree_leaves(b(x)), strict=True):
            if isinstance(out_a, Tensor):
                difference = torch.maximum(difference, (out_a - out_b).abs().max().cpu())  # maximum keeps NaN
                largest = torch.maximum(largest, out_a.abs().max().cpu())
    return float(difference), float(largest)


def check_difference(difference: float, largest: float) -> None:
    """`RuntimeError` unless `is_same`."""
    if not is_same(difference, largest):
        raise RuntimeError(
            f"compact: removing the dead neurons moves an output by {difference:.3g} where the largest is "
            f"{largest:.3g} (allowed {TOLERANCE:g} of it). No network was written"
        )


def is_same(difference: float, largest: float) -> bool:
    """Whether the difference is within 1e-9 of the largest output; what is not finite is not."""
    return difference <= TOLERANCE * largest < math.inf


def check_dead_are_zero(model: nn.Module, neurons: Neurons) -> None:
    """`RuntimeError` if a parameter of a dead neuron is not 0: such a neuron may fire where no example shows it."""
    for layer in neurons:
        for piece in layer.producers:
            if bool(piece.rows(model.get_parameter(piece.tensor).detach())[~layer.mask].any()):
                raise RuntimeError(
                    f"compact: {piece.tensor!r} is not 0 for all dead neurons of {layer.name!r}: "
                    "the mask calls a neuron dead that is not. No network was written"
                )


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
