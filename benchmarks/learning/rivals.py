"""What others do to the same network in the same epochs, each by its authors' rule; written plainly, on this project's neurons and removal.

Sources: threshold after L1 (Alvarez and Salzmann 2016, section 4.3); gradient group lasso (Wen et al. 2016); filters by magnitude (Li et al. 2017);
BatchNorm scales (Liu et al. 2017, "network slimming"); group norms by torch-pruning's own code (Fang et al. 2023); RMDA (Huang and Lee 2022); training the
learned widths from scratch (Liu et al. 2019, "Rethinking the value of network pruning").
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.learning.ours import network
from benchmarks.learning.setting import DEVICE, Batches, Outcome, Setting, loss_of
from dist_gsl import compact, create_model, find_neurons
from dist_gsl.measures import measure
from dist_gsl.models.layers import init_relu_network
from dist_gsl.neurons import NeuronLayer, Neurons
from dist_gsl.penalty import SparseGroupLasso, row_norms
from dist_gsl.removal import set_widths

Regulariser = Callable[[], None]
L1_THRESHOLD = 1e-4
"""Below which the paper counts a parameter of its L1 network as zero."""
NORM_THRESHOLD = 1e-2
"""Of its starting norm, below which the gradient group lasso counts a neuron as zero: it takes none to zero exactly."""


def started(setting: Setting, seed: int) -> tuple[nn.Module, Neurons]:
    """The network that every method starts from with this seed."""
    torch.manual_seed(seed)
    model = create_model(**network(setting.config(seed)))
    neurons = find_neurons(model, torch.zeros(2, 1, 32, 32))
    model = on_device(model)
    return model, neurons.bound_to(model)


def on_device(model: nn.Module) -> nn.Module:
    return model.to(DEVICE).to(memory_format=torch.channels_last)


def optimizer_of(model: nn.Module, setting: Setting, seed: int, **options: Any) -> torch.optim.Optimizer:
    train = setting.config(seed).train
    return torch.optim.SGD(
        model.parameters(), **{"lr": train.learning_rate, "momentum": train.momentum, "nesterov": train.nesterov, "weight_decay": train.weight_decay, **options}
    )


def fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting, seed: int, *, first: float = 0.0, last: float | None = None,
    regularise: Regulariser = lambda: None, after_step: Callable[[int], None] = lambda step: None, rate: Callable[[int], float] | None = None,
) -> None:  # fmt: skip
    """Trains from epoch `first` to `last`, fractions allowed, with the setting's rates."""
    train, batches = setting.config(seed).train, Batches(setting, seed)
    begin, end = (round((setting.epochs if each is None else each) * len(batches)) for each in (first, last))
    model.train()
    for epoch in range(begin // len(batches), -(-end // len(batches))):
        offset = epoch * len(batches)
        batches.set_epoch(epoch, max(0, begin - offset))
        for step, batch in enumerate(batches, start=max(begin, offset)):
            if step >= end:
                return
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate_at(step, steps_per_epoch=len(batches)) if rate is None else rate(step)
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            regularise()
            optimizer.step()
            after_step(step)


def outcome(model: nn.Module, neurons: Neurons, **extra: Any) -> Outcome:
    """Of a network whose dead are masked, removed and proved as ever."""
    measures = measure(model, neurons)
    alive = {layer.name: int(layer.mask.sum()) for layer in neurons}
    result = compact(model, neurons)
    return Outcome(result.model, measures.neurons, sum(p.numel() for p in result.model.parameters()), measures.total_param, alive, extra)


def no_penalty(setting: Setting, seed: int) -> Outcome:
    model, neurons = started(setting, seed)
    fit(model, optimizer_of(model, setting, seed), setting, seed)
    return outcome(model, neurons)


# --- penalties by gradients, and a threshold


@torch.no_grad()
def thresholded(model: nn.Module, neurons: Neurons) -> Outcome:
    """What is below the paper's threshold is zero; a neuron all of which is, is dead."""
    for layer in neurons:
        for piece in layer.producers:
            p = neurons.parameter(piece.tensor)
            p.masked_fill_(p.abs() < L1_THRESHOLD, 0)
    kill(neurons, norms_of(neurons), limit=0.0)
    return outcome(model, neurons)


def norms_of(neurons: Neurons) -> dict[str, Tensor]:
    return {layer.name: row_norms(neurons.parts(layer)).detach().clone() for layer in neurons}


def kill(neurons: Neurons, scores: Mapping[str, Tensor], *, limit: float) -> None:
    """Who is at or below the limit; of a layer at least the best stays."""
    for layer in neurons:
        values = scores[layer.name].cpu()
        which = values <= limit
        if bool(which.all()):
            which[values.argmax()] = False
        neurons.zero_({layer.name: which.nonzero().flatten()})


def l2(setting: Setting, seed: int, strength: float) -> Outcome:
    model, neurons = started(setting, seed)
    fit(model, optimizer_of(model, setting, seed, weight_decay=strength), setting, seed)
    return thresholded(model, neurons)


def l1(setting: Setting, seed: int, strength: float) -> Outcome:
    """To the end: what has no penalty grows above the threshold again."""
    model, neurons = started(setting, seed)
    owned = owned_by(neurons)

    def regularise() -> None:
        for p in owned:
            assert p.grad is not None
            p.grad.add_(p.detach().sign(), alpha=strength)

    fit(model, optimizer_of(model, setting, seed), setting, seed, regularise=regularise)
    return thresholded(model, neurons)


def owned_by(neurons: Neurons) -> list[nn.Parameter]:
    return list({id(p): p for layer in neurons for piece in layer.producers for p in [neurons.parameter(piece.tensor)]}.values())


def gradient_group_lasso(setting: Setting, seed: int, strength: float) -> Outcome:
    """beta sqrt(P) theta / |theta| added to the gradient until the cut; then who is below a share of the starting norm is cut, and the
    rest is fine-tuned."""
    model, neurons = started(setting, seed)
    norms = norms_of(neurons)
    optimizer, end = optimizer_of(model, setting, seed), setting.cut

    def regularise() -> None:
        for layer in neurons:
            factors = strength * math.sqrt(layer.group_size) / row_norms(neurons.parts(layer)).detach().clamp_min(1e-12)
            for piece in layer.producers:
                p = neurons.parameter(piece.tensor)
                assert p.grad is not None
                p.grad.add_(p.detach() * factors.view(-1, *[1] * (p.dim() - 1)))

    fit(model, optimizer, setting, seed, last=end, regularise=regularise)
    shares = {name: now / norms[name] for name, now in norms_of(neurons).items()}
    return tuned(setting, seed, model, neurons, optimizer, shares, limit=NORM_THRESHOLD, first=end)


# --- cut once, and fine-tune


def cut_and_tune(
    setting: Setting, seed: int, share: float, score: Callable[[Neurons, NeuronLayer], Tensor],
    regularise: Callable[[nn.Module], Regulariser] = lambda model: lambda: None,
) -> Outcome:  # fmt: skip
    """Trains to the cut, cuts the share of the neurons with the lowest scores in the whole network, and goes on."""
    model, neurons = started(setting, seed)
    optimizer, end = optimizer_of(model, setting, seed), setting.cut
    fit(model, optimizer, setting, seed, last=end, regularise=regularise(model))
    scores = {layer.name: score(neurons, layer).detach() for layer in neurons}
    limit = float(torch.cat(list(scores.values())).quantile(share))
    return tuned(setting, seed, model, neurons, optimizer, scores, limit=limit, first=end)


def tuned(
    setting: Setting, seed: int, model: nn.Module, neurons: Neurons, optimizer: torch.optim.Optimizer, scores: Mapping[str, Tensor], *, limit: float,
    first: float,
) -> Outcome:  # fmt: skip
    """Without those at or below the limit, momentum kept."""
    kill(neurons, scores, limit=limit)
    result = compact(model, neurons, optimizer)
    small = on_device(result.model)
    fresh = optimizer_of(small, setting, seed)
    assert result.optimizer_state is not None
    fresh.load_state_dict(result.optimizer_state)
    fit(small, fresh, setting, seed, first=first)
    return outcome(small, result.neurons.bound_to(small))


def magnitude(setting: Setting, seed: int, share: float) -> Outcome:
    """L1 norms of filters, each over the mean of its layer so that layers compare."""

    def score(neurons: Neurons, layer: NeuronLayer) -> Tensor:
        filters = neurons.parts(layer)[0].flatten(1).abs().sum(1)
        return filters / filters.mean()

    return cut_and_tune(setting, seed, share, score)


def slimming(setting: Setting, seed: int, share: float, *, weight: float, relative: bool = True) -> Outcome:
    """L1 on BatchNorm's scales while training; who has the smallest goes, or (relative) the smallest over the mean of its layer: absolute ones
    leave one neuron in some layers here."""

    def regularise(model: nn.Module) -> Regulariser:
        scales = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

        def add() -> None:
            for scale in scales:
                assert scale.grad is not None
                scale.grad.add_(scale.detach().sign(), alpha=weight)

        return add

    def score(neurons: Neurons, layer: NeuronLayer) -> Tensor:
        (scale,) = [neurons.parameter(piece.tensor) for piece in layer.producers if ".bn" in f".{piece.tensor}" and piece.tensor.endswith("weight")]
        return scale.abs() / scale.abs().mean() if relative else scale.abs()

    return cut_and_tune(setting, seed, share, score, regularise)


def torch_pruning(setting: Setting, seed: int, share: float, *, weight: float) -> Outcome:
    """GroupNormPruner as its authors run it: its own regularisation while training, of which their largest weight is 5e-4, its own cut, then fine-tuning."""
    import torch_pruning as tp

    model, neurons = started(setting, seed)
    whole, end = {layer.name: layer.num_neurons for layer in neurons}, setting.cut
    last = [module for module in model.modules() if isinstance(module, nn.Linear)]
    pruner = tp.pruner.GroupNormPruner(
        model, torch.zeros(2, 1, 32, 32, device=DEVICE), importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer="max"), reg=weight, pruning_ratio=share, global_pruning=True,
        ignored_layers=last,
    )  # fmt: skip
    pruner.update_regularizer()
    fit(model, optimizer_of(model, setting, seed), setting, seed, last=end, regularise=lambda: pruner.regularize(model))
    pruner.step()
    small = on_device(model)
    fit(small, optimizer_of(small, setting, seed), setting, seed, first=end)
    left = {name: small.get_submodule(name).out_channels for name in whole}
    gone = 100 * (1 - sum(left.values()) / sum(whole.values()))  # type: ignore[arg-type]
    return Outcome(small, gone, sum(p.numel() for p in small.parameters()), float("nan"), left, {})  # type: ignore[arg-type]


# --- RMDA


class RMDA(torch.optim.Optimizer):
    """Regularized modernized dual averaging (Huang and Lee, ICLR 2022, algorithm 1), with this project's groups and proximal operator.

    With rates s_k = lr sqrt(k), their sum a_k, and the sum V_k of s_k times the gradients since the last restart:
    w~ = prox_{a_k / sqrt(k) r}(w_0 - V_k / sqrt(k));  w <- (1 - c) w + c w~.
    """

    def __init__(self, model: nn.Module, neurons: Neurons, penalty: SparseGroupLasso, *, lr: float, c: float) -> None:
        super().__init__(model.parameters(), {"lr": lr})
        self.neurons, self.penalty, self.c = neurons, penalty, c
        self.shadow = copy.deepcopy(model)
        """Where w~ is computed."""
        self.its_neurons = neurons.bound_to(self.shadow)
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        self.num_steps, self.sum_of_rates = 0, 0.0
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["start"], self.state[p]["sum"] = p.detach().clone(), torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        self.num_steps += 1
        root = math.sqrt(self.num_steps)
        self.sum_of_rates += group["lr"] * root
        for p, twin in zip(group["params"], self.shadow.parameters(), strict=True):
            state = self.state[p]
            state["sum"].add_(p.grad, alpha=group["lr"] * root)
            twin.copy_(state["start"]).sub_(state["sum"], alpha=1 / root)
        for layer in self.its_neurons:
            parts = self.its_neurons.parts(layer)
            self.penalty.prox_(parts, layer=layer.name, step=0, t=self.sum_of_rates / root, group_size=layer.group_size, min_alive=1)
        for p, twin in zip(group["params"], self.shadow.parameters(), strict=True):
            p.lerp_(twin, self.c)


def rmda(setting: Setting, seed: int, strength: float, *, lr: float = 3.0, c: float = 0.1) -> Outcome:
    """As its authors schedule it: at each drop of the rate c rises as much, and averaging starts anew."""
    model, neurons = started(setting, seed)
    train, steps = setting.config(seed).train, len(Batches(setting, seed))
    optimizer = RMDA(model, neurons, SparseGroupLasso(beta=strength), lr=lr, c=c)
    drops = [round(epoch * steps) for epoch in train.drop_epochs]

    def after_step(step: int) -> None:
        if step + 1 in drops:
            optimizer.c = min(1.0, optimizer.c / train.drop_factor)
            optimizer.restart()

    fit(
        model, optimizer, setting, seed, after_step=after_step,
        rate=lambda step: lr * train.drop_factor ** sum(step >= drop for drop in drops),
    )  # fmt: skip
    kill(neurons, norms_of(neurons), limit=0.0)
    return outcome(model, neurons)


# --- controls


def narrower(setting: Setting, seed: int, share: float) -> Outcome:
    """Every layer cut alike, from the start."""
    return of_widths(setting, seed, lambda layer: max(1, round((1 - share) * layer.num_neurons)))


def of_widths(setting: Setting, seed: int, width_of: Callable[[NeuronLayer], int]) -> Outcome:
    """A network of other widths, started anew and trained as it comes."""
    whole, neurons = started(setting, seed)
    widths = {layer.name: width_of(layer) for layer in neurons}
    model, _ = set_widths(whole, neurons, {name: torch.arange(width) for name, width in widths.items()})
    begin_anew(model, seed)
    model = on_device(model)
    fit(model, optimizer_of(model, setting, seed), setting, seed)
    gone = 100 * (1 - sum(widths.values()) / sum(layer.num_neurons for layer in neurons))
    return Outcome(model, gone, sum(p.numel() for p in model.parameters()), float("nan"), widths, {})


def begin_anew(model: nn.Module, seed: int) -> None:
    """As `create_model` begins a network, but not with a part of the same numbers."""
    torch.manual_seed(1_000_000 + seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    init_relu_network(model)


def from_scratch(setting: Setting, seed: int, widths: Mapping[str, int]) -> Outcome:
    """The widths that another training learned."""
    return of_widths(setting, seed, lambda layer: widths[layer.name])


def max_pool_2d(setting: Setting, seed: int) -> Outcome:
    """Dec3's counterpart of as many neurons: each pair of one-dimensional filters is one layer of two-dimensional ones, as wide as both."""
    sizes = [layer.num_neurons for layer in started(setting, seed)[1]]
    parts: list[nn.Module] = []
    channels = 1
    for number, (kernel, padding) in enumerate(((9, 4), (9, 4), (8, 0))):
        width = sizes[2 * number] + sizes[2 * number + 1]
        parts += [nn.Conv2d(channels, width, kernel, padding=padding, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        parts += [nn.MaxPool2d(2)] if padding else []
        channels = width
    model = on_device(nn.Sequential(*parts, nn.Flatten(), nn.Linear(channels, 36)))
    begin_anew(model, seed)
    fit(model, optimizer_of(model, setting, seed), setting, seed)
    return Outcome(model, 0.0, sum(p.numel() for p in model.parameters()), float("nan"), {}, {"num_neurons": sum(sizes)})
