"""Whether removal leaves a network as it was: outputs, gradients, running statistics, in float64, with and without training mode."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from dist_gsl.compaction import compact, in_float64
from dist_gsl.neurons import NeuronLayer, Neurons
from dist_gsl.removal import Removal


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 0) -> None:
    """Parameters and statistics with which every channel matters and outputs are of order one: fresh networks have biases of 0,
    neutral BatchNorms, layer scales of 1e-6 and outputs as small as 4e-15, where any deletion would pass."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        last = name.rpartition(".")[2]
        if not tensor.is_floating_point():
            continue
        if last == "running_var" or (last in ("weight", "gamma", "layer_scale") and (tensor.dim() == 1 or "layer_scale" in name)):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() > 1 and last.endswith("weight"):
            tensor.normal_(0, (1.5 / tensor[0].numel()) ** 0.5, generator=generator)
        elif last != "relative_coords_table" and last != "logit_scale":
            tensor.normal_(0, 0.2, generator=generator)


def without_randomness_(model: nn.Module) -> None:
    """Dropout and stochastic depth off, in training mode too."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | torchvision.ops.StochasticDepth):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        for name in ("dropout", "attention_dropout", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def kill_a_third_(neurons: Neurons, *, seed: int = 0, empty: float = 0.0) -> int:
    """Kills a random third of each layer's neurons, and with the probability `empty` all of a layer that may vanish; how many."""
    generator = torch.Generator().manual_seed(seed)
    for layer in neurons:
        if layer.bypassed and float(torch.rand((), generator=generator)) < empty:
            count = layer.num_neurons
        else:
            count = min(layer.num_neurons // 3, layer.num_neurons - 1)
        neurons.zero_({layer.name: torch.randperm(layer.num_neurons, generator=generator)[:count]})
    return sum(layer.num_dead for layer in neurons)


@dataclass
class Difference:
    """Largest difference relative to the largest value, of what two networks give."""

    outputs: float
    gradients: float
    statistics: float

    @property
    def worst(self) -> float:
        values = torch.tensor([self.outputs, self.gradients, self.statistics])
        return float(values.max())  # max keeps NaN


def differences(model: nn.Module, neurons: Neurons, small: nn.Module, x: Tensor, *, training: bool) -> Difference:
    """Of a network and its smaller form on a batch."""
    removal = Removal(neurons)
    full, cut = (_given(network, x, training=training) for network in (model, small))
    return Difference(
        _relative([(full[0]["output"], cut[0]["output"])]),
        *(_relative([(removal.tensor(name, a[name]), b[name]) for name in b]) for a, b in zip(full[1:], cut[1:], strict=True)),
    )


def _given(network: nn.Module, x: Tensor, *, training: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Output, gradients of a random combination of it, and buffers."""
    network = copy.deepcopy(network).double().train(training)
    out = network(x.double())
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"output": out.detach()}, gradients, {name: b for name, b in network.named_buffers() if b.is_floating_point()}


def _relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
    pairs = [(a, b) for a, b in pairs if a.numel()]
    if not pairs:
        return 0.0
    largest = torch.stack([a.abs().max() for a, _ in pairs]).max()
    return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max() / largest.clamp_min(1e-300))


def moved_by_one_live_neuron(model: nn.Module, neurons: Neurons, layer: NeuronLayer, x: Tensor) -> float:
    """How far, relative to the largest output, the outputs move where one live neuron is cut away: the most that one of the five strongest
    of the layer moves them, since some are silent on a few images."""
    rows = torch.cat([part.detach().reshape(layer.num_neurons, -1) for part in neurons.parts(layer)], dim=1)
    with torch.no_grad():
        full = in_float64(model).eval()(x.double())
        moved = 0.0
        for strongest in rows.norm(dim=1).topk(min(5, layer.num_neurons)).indices.tolist():
            keep = {each.name: torch.ones(each.num_neurons, dtype=torch.bool) for each in neurons}
            keep[layer.name][strongest] = False
            cut = Removal(neurons, keep).model(model).double().eval()(x.double())
            moved = max(moved, float((full - cut).abs().max() / full.abs().max()))
            if moved > 1e-6:
                break
    return moved


def check_exact(model: nn.Module, neurons: Neurons, x: Tensor, *, tolerance: float = 1e-9, training: bool = True) -> float:
    """Compacts, asserts that nothing moved, and gives the worst difference."""
    result = compact(model, neurons, example_inputs=x)
    worst = result.max_abs_difference / result.max_abs_output
    assert result.max_abs_output > 1e-3
    for mode in (False, True) if training else (False,):
        found = differences(model, neurons, result.model, x, training=mode)
        assert found.worst <= tolerance, f"training={mode}: {found}"  # NaN fails
        worst = max(worst, found.worst)
    return worst
