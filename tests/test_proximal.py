"""ProximalSGD by hand: against torch's SGD, against a plain loop over neurons; death; saving; removal in training."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_gsl import ProximalSGD, SparseGroupLasso, compact, find_neurons, sparse_group_prox
from dist_gsl.neurons import Neurons
from tests.networks import IMAGE, batches, chain, train_step

# Layers of `chain()`: the tensors that own a neuron, and what reads it: tensor and positions a neuron.
PRODUCERS = {
    "conv1": ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"],
    "conv2": ["conv2.weight", "conv2.bias", "bn2.weight", "bn2.bias"],
    "fc1": ["fc1.weight", "fc1.bias"],
}
# (BatchNorm, alpha): a beta that kills some neurons within twenty steps, and not all within a hundred.
BETA = {(True, 0.0): 0.05, (True, 0.5): 0.08, (False, 0.0): 0.02, (False, 0.5): 0.025}
READERS = {"conv1": ("conv2.weight", 1), "conv2": ("fc1.weight", 4), "fc1": ("fc2.weight", 1)}


def optimizer_of(
    model: nn.Module, *, beta: Any = 0.02, alpha: float = 0.0, lr: float = 0.05, **options: Any
) -> tuple[ProximalSGD, Neurons]:
    neurons = find_neurons(model, torch.randn(2, *IMAGE, dtype=next(model.parameters()).dtype))
    penalty = SparseGroupLasso(beta=beta, alpha=alpha)
    return ProximalSGD(model.parameters(), neurons, penalty, lr=lr, **options), neurons


def dead(neurons: Neurons) -> dict[str, list[int]]:
    return {layer.name: (~layer.mask).nonzero().flatten().tolist() for layer in neurons}


def num_dead(neurons: Neurons) -> int:
    return sum(layer.num_dead for layer in neurons)


def of_neuron(tensors: Mapping[str, Tensor], layer: str, neuron: int) -> list[Tensor]:
    """Everything of one neuron, producers and readers, those that the network has."""
    reader, size = READERS[layer]
    owned = [tensors[name][neuron] for name in PRODUCERS[layer] if name in tensors]
    return [*owned, tensors[reader][:, size * neuron : size * (neuron + 1)]]


# --- the step


@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay"), [(0, False, 0), (0.9, False, 0), (0.9, True, 1e-2), (0, False, 1e-2)]
)
def test_without_penalty_it_is_torchs_sgd_bit_for_bit(momentum: float, nesterov: bool, weight_decay: float) -> None:
    ours, theirs = chain(), chain()
    options: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    optimizer, _ = optimizer_of(ours, beta=0.0, lr=0.1, **options)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, **options)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 4) for o in (optimizer, reference)]
    for batch in batches(12):
        assert train_step(ours, optimizer.step, batch) == train_step(theirs, reference.step, batch)
        for scheduler in schedulers:
            scheduler.step()
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def reference_training(
    model: nn.Module, *, beta: float, alpha: float, every: int, rates: list[float]
) -> dict[str, set[int]]:
    """The method as the paper writes it, neuron by neuron: gradient step, proximal step, death. {layer: dead}."""
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    gone: dict[str, set[int]] = {layer: set() for layer in PRODUCERS}
    t = 0.0
    for step, (rate, batch) in enumerate(zip(rates, batches(len(rates), dtype=torch.float64), strict=True), start=1):
        optimizer.param_groups[0]["lr"] = rate
        train_step(model, optimizer.step, batch)
        t += rate
        if step % every:
            continue
        died = []
        with torch.no_grad():
            for layer, names in PRODUCERS.items():
                for n in range(len(parameters[names[0]])):
                    pieces = [parameters[name][n].reshape(-1) for name in names if name in parameters]
                    row = sparse_group_prox(torch.cat(pieces)[None], t=t, beta=beta, alpha=alpha)[0]
                    for name, piece in zip(
                        [x for x in names if x in parameters], row.split([len(p) for p in pieces]), strict=True
                    ):
                        parameters[name][n] = piece.view_as(parameters[name][n])
                    if not row.any():
                        died.append((layer, n))
            for layer, n in died:
                gone[layer].add(n)
                momentum = {name: optimizer.state[p]["momentum_buffer"] for name, p in parameters.items()}
                for tensor in of_neuron(parameters, layer, n) + of_neuron(momentum, layer, n):
                    tensor.zero_()
        t = 0.0
    return gone


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("every", "alpha"), [("step", 0.0), ("step", 0.5), (3, 0.0), ("epoch", 0.5)])
def test_it_is_backward_then_sgd_then_the_proximal_step(batch_norm: bool, every: str | int, alpha: float) -> None:
    beta = BETA[batch_norm, alpha]
    model, plain = (chain(batch_norm=batch_norm, dtype=torch.float64) for _ in range(2))
    rates = [0.05] * 17 + [0.04] * 13  # the rate drops between two proximal steps
    optimizer, neurons = optimizer_of(model, beta=beta, alpha=alpha, momentum=0.9, every=every, min_alive=0)
    interval = {"step": 1, "epoch": 5}.get(str(every), 3)
    for step, (rate, batch) in enumerate(zip(rates, batches(30, dtype=torch.float64), strict=True), start=1):
        optimizer.param_groups[0]["lr"] = rate
        train_step(model, optimizer.step, batch)
        if step % 5 == 0:
            optimizer.end_epoch()
    gone = reference_training(plain, beta=beta, alpha=alpha, every=interval, rates=rates)
    assert {name: set(indices) for name, indices in dead(neurons).items()} == gone
    assert 0 < num_dead(neurons) < 21  # some died, some live, or this shows little
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=name)


def test_the_operators_t_is_the_sum_of_rates_since_it_last_ran() -> None:
    taken: list[tuple[int, float]] = []

    class Recorder(SparseGroupLasso):
        def limits(self, layer, step, *, t, group_size):
            taken.append((step, t))
            return super().limits(layer, step, t=t, group_size=group_size)

    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    optimizer = ProximalSGD(model.parameters(), neurons, Recorder(beta={"conv1": 1e-3}), lr=0.0, every=3)
    for step, batch in enumerate(batches(7)):
        optimizer.param_groups[0]["lr"] = 2.0**-step
        train_step(model, optimizer.step, batch)
        optimizer.end_epoch()  # does nothing unless every is "epoch"
    assert taken == [(2, 1 + 1 / 2 + 1 / 4)] * 3 + [(5, 1 / 8 + 1 / 16 + 1 / 32)] * 3


def test_a_closure_is_called_with_gradients() -> None:
    model = chain()
    optimizer, _ = optimizer_of(model)
    [(x, y)] = batches(1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return float(loss.detach())

    losses = [optimizer.step(closure) for _ in range(5)]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < losses[0]


# --- death


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_dead_is_dead(batch_norm: bool, nesterov: bool) -> None:
    model = chain(batch_norm=batch_norm)
    optimizer, neurons = optimizer_of(
        model, beta=BETA[batch_norm, 0.0], momentum=0.9, nesterov=nesterov, weight_decay=1e-3
    )
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    neurons.register_copy(lambda: [average])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    before: dict[str, list[int]] = {layer.name: [] for layer in neurons}
    steps_with_dead = 0
    for batch in batches(80):
        train_step(model, optimizer.step, batch)
        for name, p in parameters.items():
            average[name].lerp_(p, 0.1)
        now = dead(neurons)
        momentum = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
        for layer, indices in now.items():
            assert set(before[layer]) <= set(indices)
            for n in indices:
                for tensors in (parameters, momentum, average):
                    assert not any(piece.any() for piece in of_neuron(tensors, layer, n))
            for n in before[layer]:  # they get no gradient either
                gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                assert not any(piece.any() for piece in of_neuron(gradients, layer, n))
        before = now
        steps_with_dead += any(now.values())
    assert steps_with_dead >= 50
    assert 0 < num_dead(neurons) < 21


class TwoLayers(nn.Module):
    """tanh lets a gradient through at 0, where ReLU would not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.tanh, self.fc2 = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.tanh(self.fc1(x)))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("later", [0.0, 1e-6])
def test_a_neuron_may_come_back_if_revive_says_so(momentum: float, later: float) -> None:
    alive = {}
    for revive in (True, False):
        model = TwoLayers()
        neurons = find_neurons(model, torch.randn(2, 3))
        penalty = SparseGroupLasso(beta=lambda layer, step: 10.0 if step == 0 else later)
        optimizer = ProximalSGD(
            model.parameters(), neurons, penalty, lr=0.1, momentum=momentum, revive=revive, min_alive=0
        )
        x, y = torch.randn(8, 3), torch.randint(2, (8,))
        for step in range(3):
            train_step(model, optimizer.step, (x, y))
            if step == 0:
                assert not neurons["fc1"].alive().any()
        alive[revive] = int(neurons["fc1"].alive().sum())
        assert bool(model.fc1.weight.any()) is revive
        if revive:  # the mask tells the truth, so what it says can be removed
            assert compact(model, neurons).widths["fc1"] == alive[revive]
    assert alive == {True: 4, False: 0}


def test_min_alive_keeps_the_strongest_and_warns_once_with_layer_and_beta() -> None:
    model = chain()
    optimizer, neurons = optimizer_of(model, beta={"conv2": 1234.0}, min_alive=2)
    norms = torch.cat([part.detach().reshape(8, -1) for part in neurons.parts(neurons["conv2"])], dim=1).norm(dim=1)
    first, *others = batches(4)
    with pytest.warns(UserWarning, match=r"'conv2'.*1234.*strongest stay, 2 in all"):
        train_step(model, optimizer.step, first)
    for batch in others:  # a second warning would be an error
        train_step(model, optimizer.step, batch)
    assert neurons["conv2"].alive().nonzero().flatten().tolist() == sorted(norms.topk(2).indices.tolist())
    compact(model, neurons)


def test_min_alive_0_lets_a_layer_die() -> None:
    model = chain()
    optimizer, neurons = optimizer_of(model, beta={"conv2": 1234.0}, min_alive=0)
    train_step(model, optimizer.step, next(batches(1)))
    assert not neurons["conv2"].alive().any()


# --- refusals


def test_two_rates_in_one_neuron_are_refused() -> None:
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    bias = [p for n, p in model.named_parameters() if n == "conv2.bias"]
    rest = [p for n, p in model.named_parameters() if n != "conv2.bias"]
    groups = [{"params": rest}, {"params": bias, "lr": 0.01}]
    optimizer = ProximalSGD(groups, neurons, SparseGroupLasso(beta=0.01), lr=0.1)
    with pytest.raises(ValueError, match=r"neurons of 'conv2'.*0\.01, 0\.1"):
        train_step(model, optimizer.step, next(batches(1)))


def test_groups_of_one_rate_are_taken_and_layers_may_have_their_own() -> None:
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    named = list(model.named_parameters())
    first = [p for n, p in named if n.startswith(("conv1", "bn1"))]
    no_decay = [p for n, p in named if n.endswith("bias") and not n.startswith(("conv1", "bn1"))]
    rest = [p for n, p in named if not any(p is q for q in first + no_decay)]
    groups = [{"params": rest, "weight_decay": 1e-3}, {"params": no_decay}, {"params": first, "lr": 0.001}]
    optimizer = ProximalSGD(groups, neurons, SparseGroupLasso(beta=1.0), lr=0.1)
    weights = {n: neurons.parameter(n).detach().clone() for n in ("conv1.weight", "conv2.weight")}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    lost = {n: float((w - neurons.parameter(n).detach()).norm() / w.norm()) for n, w in weights.items()}
    assert lost["conv2.weight"] > 20 * lost["conv1.weight"] > 0  # t is each layer's own rate


def test_frozen_and_missing_parameters_are_refused() -> None:
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    some = [p for n, p in model.named_parameters() if n != "bn1.bias"]
    with pytest.raises(ValueError, match=r"'bn1.bias' .*'conv1' but is not optimized"):
        ProximalSGD(some, neurons, SparseGroupLasso(beta=0.1), lr=0.1)
    model.get_parameter("bn1.bias").requires_grad_(False)
    with pytest.raises(ValueError, match=r"'bn1.bias' .*'conv1' but is frozen"):
        ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=0.1), lr=0.1)


@pytest.mark.parametrize("every", ["never", 0, -1, 1.5])
def test_intervals_that_are_none_are_refused(every: object) -> None:
    with pytest.raises(ValueError, match="every is"):
        optimizer_of(chain(), every=every)


def test_nesterov_without_momentum_and_half_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        optimizer_of(chain(), nesterov=True)
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    with pytest.raises(ValueError, match="bfloat16"):
        ProximalSGD(model.to(torch.bfloat16).parameters(), neurons, SparseGroupLasso(beta=0.1), lr=0.1)


def test_set_num_samples_needs_attach() -> None:
    optimizer, _ = optimizer_of(chain())
    with pytest.raises(RuntimeError, match="attach"):
        optimizer.set_num_samples(8)


# --- saving, loading, removing


def made(**options: Any) -> tuple[nn.Module, ProximalSGD, Neurons]:
    model = chain()
    optimizer, neurons = optimizer_of(model, momentum=0.9, **options)
    return model, optimizer, neurons


@pytest.mark.parametrize("options", [{"every": 3, "beta": 0.05}, {"alpha": 0.5, "beta": 0.08, "nesterov": True}])
def test_saved_and_loaded_goes_on_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    whole, optimizer, neurons = made(**options)
    data = list(batches(40))
    for batch in data[:20]:
        train_step(whole, optimizer.step, batch)
    assert num_dead(neurons) > 0
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = [train_step(whole, optimizer.step, batch) for batch in data[20:]]

    resumed, again, its_neurons = made(**options)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    assert [train_step(resumed, again.step, batch) for batch in data[20:]] == expected
    for (name, p), q in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    assert dead(its_neurons) == dead(neurons)
    assert again.num_steps == 40


def test_a_state_without_neurons_is_refused() -> None:
    model, optimizer, _ = made()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="neurons"):
        optimizer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("every", "alpha"), [("step", 0.0), (4, 0.5)])
def test_training_with_removal_is_training_without(batch_norm: bool, every: str | int, alpha: float) -> None:
    model = chain(batch_norm=batch_norm, dtype=torch.float64)
    beta = BETA[batch_norm, alpha]
    options: dict[str, Any] = {"beta": beta, "alpha": alpha, "momentum": 0.9, "every": every, "weight_decay": 1e-3}
    optimizer, neurons = optimizer_of(model, **options)
    data = list(batches(110, dtype=torch.float64))
    while num_dead(neurons) < 3:
        train_step(model, optimizer.step, data.pop(0))
    assert len(data) >= 50
    removed = num_dead(neurons)
    result = compact(model, neurons, optimizer)
    penalty = SparseGroupLasso(beta=beta, alpha=alpha)
    small = ProximalSGD(
        result.model.parameters(), result.neurons, penalty, lr=0.05, momentum=0.9, every=every, weight_decay=1e-3
    )
    assert result.optimizer_state is not None
    small.load_state_dict(copy.deepcopy(result.optimizer_state))
    losses = [
        (train_step(model, optimizer.step, b), train_step(result.model, small.step, b)) for b in data[:50]
    ]
    for full_loss, small_loss in losses:
        assert small_loss == pytest.approx(full_loss, rel=1e-9)
    assert num_dead(neurons) > removed  # deaths went on after the removal
    for layer, same in zip(neurons, result.neurons, strict=True):
        assert same.num_dead == layer.num_dead
        assert same.indices[same.mask].tolist() == layer.mask.nonzero().flatten().tolist()
    final, final_small = compact(model, neurons).model, compact(result.model, result.neurons).model
    for p, q in zip(final.parameters(), final_small.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_a_penalty_that_a_mapping_does_not_name_is_off() -> None:
    model, optimizer, neurons = made(beta={"conv1": 5.0})
    with warnings.catch_warnings(action="ignore"):
        for batch in batches(3):
            train_step(model, optimizer.step, batch)
    assert [layer.num_dead for layer in neurons] == [5, 0, 0]
