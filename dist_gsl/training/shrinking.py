"""When dead neurons are removed while training goes on, and that all processes remove the same. Imports torch alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dist_gsl.penalty import row_norms
from dist_gsl.removal import Removal, padded
from dist_gsl.training.watch import CommonError, DivergedError, is_finite

if TYPE_CHECKING:
    from dist_gsl.neurons import NeuronLayer, Neurons
    from dist_gsl.training.state import RunState

LOOK_EVERY = 10
"""Steps between two looks at the share of dead parameters, at each of which all processes wait for the first."""
TOLERANCE = 1e-5
"""Difference of two processes' norms of a neuron, relative to the largest of its layer, that is still rounding in float32."""


@dataclass(frozen=True)
class Rule:
    """When to remove what died: at the end of each epoch, and besides every `steps` steps or as soon as `percent` % of the parameters that
    are left can go."""

    epoch: bool = True
    steps: int | None = None
    percent: float | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """ "never", "epoch", a number of steps such as "200", or a share of the parameters such as "5%". `ValueError` for another text."""
        if text in ("never", "epoch"):
            return cls(epoch=text == "epoch")
        matched = re.fullmatch(r"([0-9]+)|([0-9]*\.?[0-9]+) ?%", text)
        if matched is not None:
            if matched[1] and int(matched[1]) > 0:
                return cls(steps=int(matched[1]))
            if matched[2] and 0 < float(matched[2]) < 100:
                return cls(percent=float(matched[2]))
        raise ValueError(f"train.shrink is {text!r}, must be never, epoch, a number of steps such as 200, or a share of the parameters such as 5%")

    def is_asked(self, step: int, *, epoch_ends: bool) -> bool:
        """Whether all processes come together after this step, counted from 1 over the whole run."""
        every = LOOK_EVERY if self.percent is not None else self.steps
        return (epoch_ends and self.epoch) or (not epoch_ends and every is not None and step % every == 0)

    def is_due(self, neurons: Neurons, *, multiple_of: int = 1, epoch_ends: bool) -> bool:
        """Whether enough died. The same in all processes once they agree on who did. Not where a layer has none left that no way leads around:
        the output is constant then, and no smaller network would have it.

        multiple_of: of which widths stay multiples.
        """
        if any(not layer.bypassed and not bool(layer.mask.any()) for layer in neurons):
            return False
        if all(bool(padded(layer.mask, multiple_of).all()) for layer in neurons):
            return False
        return epoch_ends or self.percent is None or removable_percent(neurons, multiple_of=multiple_of) >= self.percent


def removable_percent(neurons: Neurons, *, multiple_of: int = 1) -> float:
    """Share of the network's present parameters that would go with the dead neurons, but for those that keep widths multiples."""
    now = sum(p.numel() for p in neurons.model.parameters())
    return 100 * (1 - Removal(neurons, multiple_of=multiple_of).num_parameters() / now)


def shrink(state: RunState, rule: Rule, step: int, *, epoch_ends: bool = False) -> bool:
    """Removes what died if the rule says so; whether it did. Every process calls it after every step and at the end of every epoch."""
    if state.stays_whole or len(state.neurons) == 0 or not rule.is_asked(step, epoch_ends=epoch_ends):
        return False
    agree(state)
    if not rule.is_due(state.neurons, multiple_of=state.setup.multiple_of, epoch_ends=epoch_ends):
        return False
    return state.shrink()


@torch.no_grad()
def agree(state: RunState) -> None:
    """Makes the dead neurons of all processes those of the first.

    Gradients are reduced to the same bits everywhere, but what follows is each process's own arithmetic, and processors differ. Where a
    neuron died in one process alone and is within rounding of it in the others, all take the first process's state; a larger difference is
    a `CommonError` in all of them that names the layer. `DivergedError` where a parameter is not finite.
    """
    neurons = state.neurons
    layers = list(neurons)
    mine = torch.cat([_norms(neurons, layer) for layer in layers])
    first = mine.clone()
    dist.broadcast(first, 0)
    found = torch.zeros(3, dtype=torch.int64, device=mine.device)  # number of a layer beyond rounding, do masks differ, is a parameter not finite
    found[2] = int(not is_finite(state.model))
    sizes = [layer.num_neurons for layer in layers]
    for number, (a, b) in enumerate(zip(mine.split(sizes), first.split(sizes), strict=True)):
        if len(a):
            differ = bool(((a == 0) != (b == 0)).any())
            found[1] |= int(differ)
            if differ and not float((a - b).abs().max()) <= TOLERANCE * float(b.max()):
                found[0] = max(int(found[0]), len(layers) - number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    beyond, differs, not_finite = found.tolist()
    if not_finite:
        raise DivergedError.at(state.position, "a parameter is not finite")
    if beyond:
        raise CommonError(
            f"layer {layers[len(layers) - beyond].name!r}: processes differ in which neurons are dead, by more than rounding; "
            "do all nodes run the same versions, from the same parameters?"
        )
    if differs:
        _take_first(state, first)


def _norms(neurons: Neurons, layer: NeuronLayer) -> Tensor:
    """Of each neuron, (num_neurons,); 0 for the dead alone."""
    parts = neurons.parts(layer)
    norms = row_norms(parts).double() if layer.num_neurons else parts[0].new_zeros(0, dtype=torch.float64)
    # A neuron that is zero and not dead is another thing than a dead one.
    return torch.where(layer.mask.to(norms.device), norms.clamp_min(math.ulp(0.0)), 0.0)


def _take_first(state: RunState, norms: Tensor) -> None:
    """The first process's parameters, buffers, moments and moving average, and its dead."""
    moments = [tensor for mirror in state.optimizer.mirrors() for tensor in mirror.values()]
    averaged = [] if state.average is None else list(state.average.module.state_dict().values())
    for tensor in (*state.model.state_dict().values(), *moments, *averaged):
        if tensor.numel():
            dist.broadcast(tensor, 0)
    for layer, values in zip(state.neurons, norms.split([layer.num_neurons for layer in state.neurons]), strict=True):
        layer.mask = (values > 0).to(layer.mask.device)
