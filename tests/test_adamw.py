"""ProximalAdamW: against torch's AdamW, against a plain loop over neurons; death; DDP's hook; saving; removal in training."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_gsl import ProximalAdamW, ProximalSGD, SparseGroupLasso, compact, find_neurons, sparse_group_prox
from dist_gsl.neurons import Neurons
from dist_gsl.proximal import ProximalOptimizer
from tests.networks import IMAGE, batches, chain, train_step
from tests.test_proximal import PRODUCERS, dead, num_dead, of_neuron

BETAS = (0.9, 0.99)
BETA = {0.0: 1.2e-2, 0.5: 1.8e-2}
"""By alpha: kills some neurons within twenty steps, and not all within a hundred."""


def optimizer_of(model: nn.Module, *, beta: Any, alpha: float = 0.0, lr: float = 0.003, **options: Any) -> tuple[ProximalAdamW, Neurons]:
    neurons = find_neurons(model, torch.randn(2, *IMAGE, dtype=next(model.parameters()).dtype))
    return ProximalAdamW(model.parameters(), neurons, SparseGroupLasso(beta=beta, alpha=alpha), lr=lr, betas=BETAS, **options), neurons


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_penalty_it_is_torchs_adamw_bit_for_bit(weight_decay: float) -> None:
    ours, theirs = chain(), chain()
    optimizer, _ = optimizer_of(ours, beta=0.0, lr=0.01, weight_decay=weight_decay)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=BETAS, weight_decay=weight_decay)
    for batch in batches(12):
        assert train_step(ours, optimizer.step, batch) == train_step(theirs, reference.step, batch)
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def reference_training(model: nn.Module, *, beta: float, alpha: float, every: int, rates: list[float]) -> dict[str, set[int]]:
    """Neuron by neuron: AdamW's step, the proximal step in its metric, death. {layer: dead}."""
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=0.05)
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
            for layer, owned in PRODUCERS.items():
                names = [name for name in owned if name in parameters]
                for n in range(len(parameters[names[0]])):
                    pieces = [parameters[name][n].reshape(-1) for name in names]
                    squares = [optimizer.state[parameters[name]]["exp_avg_sq"][n].reshape(-1) for name in names]
                    metric = (torch.cat(squares) / (1 - BETAS[1] ** step)).sqrt() + 1e-8
                    row = sparse_group_prox(torch.cat(pieces)[None], t=t, beta=beta, alpha=alpha, metric=metric[None])[0]
                    for name, piece in zip(names, row.split([len(p) for p in pieces]), strict=True):
                        parameters[name][n] = piece.view_as(parameters[name][n])
                    if not row.any():
                        died.append((layer, n))
            for layer, n in died:
                gone[layer].add(n)
                for key in ("exp_avg", "exp_avg_sq"):
                    for tensor in of_neuron({name: optimizer.state[p][key] for name, p in parameters.items()}, layer, n):
                        tensor.zero_()
                for tensor in of_neuron(parameters, layer, n):
                    tensor.zero_()
        t = 0.0
    return gone


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("every", "alpha"), [("step", 0.0), ("step", 0.5), (3, 0.0)])
def test_it_is_backward_then_adamw_then_the_proximal_step(batch_norm: bool, every: str | int, alpha: float) -> None:
    model, plain = (chain(batch_norm=batch_norm, dtype=torch.float64) for _ in range(2))
    rates = [0.003] * 17 + [0.002] * 13
    optimizer, neurons = optimizer_of(model, beta=BETA[alpha], alpha=alpha, every=every, min_alive=0, weight_decay=0.05)
    for rate, batch in zip(rates, batches(30, dtype=torch.float64), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        train_step(model, optimizer.step, batch)
    gone = reference_training(plain, beta=BETA[alpha], alpha=alpha, every=1 if every == "step" else int(every), rates=rates)
    assert {name: set(indices) for name, indices in dead(neurons).items()} == gone
    assert 0 < num_dead(neurons) < 21
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=name)


def test_dead_is_dead() -> None:
    model = chain(batch_norm=True)
    optimizer, neurons = optimizer_of(model, beta=BETA[0.0], weight_decay=0.05)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    before: dict[str, list[int]] = {layer.name: [] for layer in neurons}
    for batch in batches(60):
        train_step(model, optimizer.step, batch)
        now = dead(neurons)
        for layer, indices in now.items():
            assert set(before[layer]) <= set(indices)
            for n in indices:
                for tensors in (parameters, *optimizer.mirrors()):
                    assert not any(piece.any() for piece in of_neuron(tensors, layer, n))
        before = now
    assert 0 < num_dead(neurons) < 21


def test_what_has_not_moved_takes_no_proximal_step() -> None:
    model = chain()
    optimizer, neurons = optimizer_of(model, beta=1e3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.fc2.parameters():  # type: ignore[union-attr]
        p.grad = torch.ones_like(p)
    optimizer.step()
    for layer in neurons:
        assert layer.mask.all()
        for piece in layer.producers:
            assert torch.equal(model.get_parameter(piece.tensor), before[piece.tensor])


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("static_graph", [False, True])
def test_in_ddps_hook_it_is_the_step_by_hand_to_the_bit(static_graph: bool) -> None:
    model = chain(batch_norm=True)
    by_hand = copy.deepcopy(model)
    (optimizer, neurons), (other, _) = (optimizer_of(each, beta=BETA[0.5], alpha=0.5, weight_decay=0.05) for each in (model, by_hand))
    ddp = DistributedDataParallel(model, bucket_cap_mb=1e-4, static_graph=static_graph)
    optimizer.attach(ddp)
    for x, y in batches(30):
        optimizer.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        train_step(by_hand, other.step, (x, y))
    assert 0 < num_dead(neurons) < 21
    for (name, p), q in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_saved_and_loaded_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = chain(), chain()
    (optimizer, neurons), (again, its_neurons) = (optimizer_of(each, beta=BETA[0.0], every=3) for each in (whole, resumed))
    data = list(batches(40))
    for batch in data[:20]:
        train_step(whole, optimizer.step, batch)
    assert num_dead(neurons) > 0
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = [train_step(whole, optimizer.step, batch) for batch in data[20:]]
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    assert [train_step(resumed, again.step, batch) for batch in data[20:]] == expected
    for (name, p), q in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    assert dead(its_neurons) == dead(neurons)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_training_with_removal_is_training_without(alpha: float) -> None:
    model = chain(batch_norm=True, dtype=torch.float64)
    options: dict[str, Any] = {"beta": BETA[alpha], "alpha": alpha, "weight_decay": 0.05}
    optimizer, neurons = optimizer_of(model, **options)
    data = list(batches(110, dtype=torch.float64))
    while num_dead(neurons) < 3:
        train_step(model, optimizer.step, data.pop(0))
    removed = num_dead(neurons)
    result = compact(model, neurons, optimizer)
    assert result.optimizer_state is not None
    penalty = SparseGroupLasso(beta=BETA[alpha], alpha=alpha)
    small = ProximalAdamW(result.model.parameters(), result.neurons, penalty, lr=0.003, betas=BETAS, weight_decay=0.05)
    small.load_state_dict(copy.deepcopy(result.optimizer_state))
    for b in data[:50]:
        assert train_step(result.model, small.step, b) == pytest.approx(train_step(model, optimizer.step, b), rel=1e-9)
    assert num_dead(neurons) > removed
    for layer, same in zip(neurons, result.neurons, strict=True):
        assert same.indices[same.mask].tolist() == layer.mask.nonzero().flatten().tolist()


class Residual(nn.Module):
    """A branch all of whose neurons may go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.conv2(self.conv1(x).relu())).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:layer .* would kill every neuron")
@pytest.mark.parametrize("fresh", [False, True])
def test_a_branch_that_is_gone_leaves_the_others_to_the_penalty(fresh: bool) -> None:
    """What read it has no entries any more, no gradient and no moments."""
    torch.manual_seed(0)
    model = Residual().double()
    optimizer, neurons = optimizer_of(model, beta=1e-6)
    data = list(batches(40, dtype=torch.float64))
    train_step(model, optimizer.step, data[0])
    assert neurons["conv1"].bypassed
    neurons.zero_({"conv1": range(4)})
    result = compact(model, neurons, optimizer)
    assert result.widths["conv1"] == 0
    small = ProximalAdamW(result.model.parameters(), result.neurons, SparseGroupLasso(beta=1.0), lr=0.003)
    if not fresh:
        assert result.optimizer_state is not None
        small.load_state_dict(copy.deepcopy(result.optimizer_state))
    for batch in data[1:]:
        assert math.isfinite(train_step(result.model, small.step, batch))
    assert sum(int(layer.mask.sum()) for layer in result.neurons) == 1  # min_alive
    sizes = {layer.name: layer.num_neurons for layer in result.neurons}
    assert {layer.name: len(small.pull_weights(layer)) for layer in result.neurons} == sizes
    assert {layer.name: len(small.lethal_factors(layer, beta=1.0, alpha=0.5)) for layer in result.neurons} == sizes


@pytest.mark.filterwarnings("ignore:layer .* would kill every neuron")
@pytest.mark.parametrize("kind", [ProximalSGD, ProximalAdamW])
@pytest.mark.parametrize("groups", ["neurons", "branches"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("min_alive", [1, 3])
def test_the_operator_kills_as_lethal_factors_say(kind: type[ProximalSGD] | type[ProximalAdamW], groups: str, alpha: float, min_alive: int) -> None:
    """Layers of a chain and of a branch, of which some are dead."""
    beta, factor = 0.01, 1.0

    def begun() -> tuple[ProximalSGD | ProximalAdamW, Neurons]:
        torch.manual_seed(0)
        model = Residual().double()
        neurons = find_neurons(model, torch.zeros(2, 2, 5, 5, dtype=torch.float64))
        penalty = SparseGroupLasso(beta=lambda layer, step: beta * factor, alpha=alpha)
        optimizer = kind(model.parameters(), neurons, penalty, lr=0.1, every="epoch", groups=groups, min_alive=min_alive)
        for batch in list(batches(3, dtype=torch.float64))[:3]:
            train_step(model, optimizer.step, batch)
        neurons.zero_({"stem": [1]})
        return optimizer, neurons

    optimizer, neurons = begun()
    lethal = {layer.name: optimizer.lethal_factors(layer, beta=beta, alpha=alpha) for layer in neurons}
    assert lethal["stem"][1] == 0
    assert int(lethal["stem"].isinf().sum()) == min_alive
    assert not lethal["conv1"].isinf().any(), "a branch may go"
    if groups == "branches":
        assert len(lethal["conv1"].unique()) == 1
    for each in torch.cat(list(lethal.values())).unique().tolist():
        for factor in (each * (1 - 1e-6), each * (1 + 1e-6)):
            if math.isfinite(factor):
                optimizer, neurons = begun()
                optimizer.run_operator()
                assert {layer.name: int(layer.mask.sum()) for layer in neurons} == {name: int((its > factor).sum()) for name, its in lethal.items()}


def test_a_state_of_sgd_is_refused_and_changes_nothing() -> None:
    model = chain()
    optimizer, neurons = optimizer_of(model, beta=0.1)
    other = ProximalSGD(model.parameters(), find_neurons(model, torch.randn(2, *IMAGE)), SparseGroupLasso(beta=0.1), lr=0.1)
    other.neurons.zero_({"conv1": [0]})
    with pytest.raises(ValueError, match="ProximalAdamW: the state has no 'betas': it is another optimizer's"):
        optimizer.load_state_dict(other.state_dict())
    assert num_dead(neurons) == 0


def test_a_gradient_that_is_not_finite_is_not_hidden() -> None:
    model = chain()
    optimizer, _ = optimizer_of(model, beta=1e-3)
    for number, batch in enumerate(batches(3)):
        if number == 1:
            handle = model.get_parameter("conv1.weight").register_hook(lambda grad: grad * torch.nan)
            train_step(model, optimizer.step, batch)
            handle.remove()
        else:
            train_step(model, optimizer.step, batch)
    assert not model.get_parameter("conv1.weight").isfinite().all()


def test_the_neuron_that_min_alive_keeps_is_the_last_that_would_die() -> None:
    """By the norm that decides death, which weighs entries by how much the loss has to say about them."""
    rows, metric = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[1e-3, 1e-3], [1.0, 1.0]])
    prox = SparseGroupLasso(beta=10.0).prox_([rows], layer="", step=0, t=1.0, group_size=2, min_alive=1, metric=[metric])
    assert prox.dead is not None
    assert prox.dead.tolist() == [True, False]


@pytest.mark.parametrize(("options", "text"), [({"betas": (0.9, 1.0)}, "betas are"), ({"eps": 0.0}, "eps is 0.0, must be above 0")])
def test_wrong_numbers_are_refused(options: dict[str, Any], text: str) -> None:
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    with pytest.raises(ValueError, match=f"ProximalAdamW: {text}"):
        ProximalAdamW(model.parameters(), neurons, SparseGroupLasso(beta=0.1), lr=0.1, **options)


def test_it_comes_to_the_solution_of_a_convex_problem() -> None:
    """Multi-task regression with a sparse group lasso has one solution, which proximal gradient descent finds. So does AdamW in its metric; with a
    proximal step in the identity's it stays elsewhere."""

    def solved(optimizer: Callable[..., ProximalOptimizer], *, lr: float, decay: float, steps: int, in_its_metric: bool = True) -> tuple[Tensor, list[bool]]:
        torch.manual_seed(0)
        first, second = nn.Linear(5, 12).double(), nn.Linear(12, 12).double().requires_grad_(False)
        model = nn.Sequential(first, second)
        x = torch.randn(200, 5, dtype=torch.float64) * torch.tensor([1, 0.3, 2, 1, 0.1])
        second.weight.copy_(torch.eye(12) + 0.05 * torch.randn(12, 12))
        second.bias.zero_()
        y = second(x @ torch.randn(5, 12, dtype=torch.float64) * torch.linspace(0, 1, 12)) + 0.1 * torch.randn(200, 12)
        neurons = find_neurons(model, x[:2])
        made = optimizer(model.parameters(), neurons, SparseGroupLasso(beta=0.02, alpha=0.3), lr=lr, revive=True, min_alive=0)
        if not in_its_metric:
            made._operator.metric_of = None
        for step in range(steps):
            made.param_groups[0]["lr"] = lr * decay**step
            made.zero_grad()
            F.mse_loss(model(x), y).backward()
            made.step()
        return first.weight.detach(), neurons["0"].mask.tolist()

    weight, alive = solved(ProximalSGD, lr=1.0, decay=1.0, steps=3000)
    assert 0 < sum(alive) < 12
    for in_its_metric in (True, False):
        ours, living = solved(ProximalAdamW, lr=0.03, decay=0.998, steps=4000, in_its_metric=in_its_metric)
        assert (living == alive) is in_its_metric
        difference = float((ours - weight).abs().max())
        assert difference < 1e-6 if in_its_metric else difference > 0.1
