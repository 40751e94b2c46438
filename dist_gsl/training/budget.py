"""Budgets: what may be left of a network, and what it costs with any of its neurons. Imports torch alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_gsl.measures import measured_layers
from dist_gsl.neurons import Neurons
from dist_gsl.removal import Removal, copied
from dist_gsl.timing import latency_ms

KINDS = ("neurons", "params", "macs", "latency_ms")


@dataclass(frozen=True)
class Target:
    """What may be left of a network."""

    kind: str
    """neurons (of the convolutions, as in the paper's measure; of all hidden layers where there are none), params, macs (multiply-adds of an image),
    or latency_ms (an image alone, on the device that trains)."""
    value: float
    is_percent: bool
    """`value` is a percentage of the starting network."""

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}{'%' if self.is_percent else ''}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """ "neurons=50%", "params=100000", "macs=30%", "latency_ms=2.5". `ValueError` for another text."""
        matched = re.fullmatch(r"([a-z_]+) ?= ?([0-9]*\.?[0-9]+(?:e[0-9]+)?) ?(%?)", text)
        if matched is None or matched[1] not in KINDS:
            raise ValueError(f"train.target is {text!r}, must say what may be left, such as neurons=50%, params=100000, macs=30% or latency_ms=2.5")
        value, is_percent = float(matched[2]), matched[3] == "%"
        if value <= 0 or (is_percent and value >= 100):
            raise ValueError(f"train.target is {text!r}, must be above 0{' and below 100' if is_percent else ''}")
        return cls(matched[1], value, is_percent)


class Cost:
    """What a network costs in the unit of a target, with any of its neurons."""

    def __init__(self, kind: str, model: nn.Module, neurons: Neurons, known: list[tuple[float, float]] | None = None) -> None:
        """The model is on the device that trains; it is left as it is. known: (multiply-adds, milliseconds) of networks that were timed; those that
        are timed here are added."""
        self.kind, self._model, self._neurons = kind, model, neurons
        self._positions = positions_of_weights(model, neurons) if kind in ("macs", "latency_ms") else {}
        self._shapes = {name: model.get_parameter(name).shape for name in self._positions}
        self._known = [] if known is None else known

    def whole(self) -> float:
        """Of the starting network, before anything is removed."""
        if self.kind == "latency_ms":
            return self.now()
        return self.of({layer.name: torch.ones(layer.num_neurons, dtype=torch.bool) for layer in self._neurons})

    def least(self) -> float:
        """With one neuron a layer."""
        return self.measured({layer.name: torch.arange(layer.num_neurons) == 0 for layer in self._neurons})

    def of(self, keep: Mapping[str, Tensor]) -> float:
        """With the neurons of `keep`, {layer name: bool (num_neurons,)}, alone. Milliseconds are those of the nearest networks that were timed, by
        their multiply-adds."""
        if self.kind == "neurons":
            return sum(int(keep[layer.name].sum()) if layer.name in keep else layer.num_neurons for layer in measured_layers(self._neurons))
        if self.kind == "params":
            return Removal(self._neurons, keep).num_parameters()
        return self.macs(keep) if self.kind == "macs" else self._milliseconds(self.macs(keep))

    def now(self) -> float:
        """With those that live."""
        return self.measured({layer.name: layer.alive() for layer in self._neurons})

    def measured(self, keep: Mapping[str, Tensor]) -> float:
        """As `of`, but milliseconds are measured, and known from then on: so a network that was fast enough stays so."""
        if self.kind == "latency_ms":
            macs = self.macs(keep)
            if all(macs != known for known, _ in self._known):
                device = next(self._model.parameters()).device
                small = Removal(self._neurons, keep).model(self._model).eval()
                example = torch.zeros(1, *self._neurons.input_shape[1:], device=device)
                self._known.append((macs, latency_ms(small, example=example, repeats=30, seconds=0.5)))
        return self.of(keep)

    def macs(self, keep: Mapping[str, Tensor]) -> float:
        """Multiply-adds of an image with the neurons of `keep`, where the kind is macs or latency_ms."""
        removal = Removal(self._neurons, keep)
        return sum(positions * removal.num_kept(name, self._shapes[name]) for name, positions in self._positions.items())

    def _milliseconds(self, macs: float) -> float:
        if not self._known:
            return math.inf
        (near, ms), *_ = sorted(self._known, key=lambda each: abs(each[0] - macs))
        (far, other), *_ = sorted(self._known, key=lambda each: -abs(each[0] - near))
        slope = (other - ms) / (far - near) if abs(far - near) > 0.05 * near else ms / near
        return ms + max(slope, 0.0) * (macs - near)


def positions_of_weights(model: nn.Module, neurons: Neurons) -> dict[str, float]:
    """{name of a convolution's or linear layer's weight: multiply-adds of one image over the weight's entries}, by one forward pass."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, float] = {}
    copy = copied(model, lambda _, tensor: tensor.detach().clone()).eval()
    twins = dict(zip((id(p) for p in copy.parameters()), (names[id(p)] for p in model.parameters()), strict=True))

    def count(weight: Tensor | None, images: int, outputs: int) -> None:
        if weight is not None and weight.numel():
            name = twins[id(weight)]
            found[name] = found.get(name, 0.0) + outputs / images

    def of_module(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.MultiheadAttention):
            tokens = inputs[0].numel() // module.embed_dim
            for weight in (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight, module.out_proj.weight):
                count(weight, images, tokens)
        elif isinstance(module, nn.Linear):
            count(module.weight, images, output.numel() // max(1, module.out_features))
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            count(module.weight, images, inputs[0].numel() // max(1, module.in_channels))
        elif isinstance(module, nn.modules.conv._ConvNd):
            count(module.weight, images, output.numel() // max(1, module.out_channels))

    images = neurons.input_shape[0]
    hooks = [module.register_forward_hook(of_module) for module in copy.modules()]
    with torch.no_grad():
        copy(torch.zeros(neurons.input_shape, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return found
