"""A step inside backward, in one process."""

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dist_gsl import ProximalSGD, SparseGroupLasso, find_neurons, hook
from dist_gsl.hook import is_dense


@pytest.fixture(autouse=True, scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(4, 3, 2, 2), True), (torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last), True), (torch.zeros(3, 4).t(), True),
        (torch.zeros(1, 5, 1)[:, :, 0], True), (torch.zeros(()), True), (torch.zeros(6, 8)[:, :4], False), (torch.zeros(6)[::2], False),
        (torch.zeros(1).expand(3), False),
    ],
)  # fmt: skip
def test_what_fills_its_memory(tensor: torch.Tensor, expected: bool) -> None:
    assert is_dense(tensor) is expected


def test_a_parameter_with_gaps_takes_its_own_gradient() -> None:
    """DDP lays its gradient out as if it had none."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 4), torch.randint(3, (5,))

    def network() -> nn.Sequential:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        model[0].weight = nn.Parameter(torch.randn(6, 8)[:, :4])
        return model

    model, plain = network(), network()
    optimizer = ProximalSGD(model.parameters(), find_neurons(model, x), SparseGroupLasso(beta=0.0), lr=0.5)
    ddp = DistributedDataParallel(model)
    optimizer.attach(ddp)
    reference = torch.optim.SGD(plain.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        reference.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        reference.step()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_a_step_that_was_cut_off_is_forgotten_when_a_state_is_loaded() -> None:
    """As when backward fails between the buckets: its deaths are not those of what is loaded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    neurons = find_neurons(model, torch.randn(5, 4))
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=0.3), lr=1.0)
    parameters, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        optimizer.begin_step()
        optimizer.prox_(neurons)
    assert not neurons.parameter("0.weight").any(dim=1).all()
    model.load_state_dict(parameters)
    optimizer.load_state_dict(state)
    optimizer.finish_step()
    assert neurons["0"].mask.all()
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("way", ["one by one", "at once", "in callbacks"])
def test_steps_of_several_buckets_are_the_step_by_hand(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """To the bit, before and after DDP makes its buckets anew: as on a CPU and as on a GPU, where no other thread has a part in it, and as with a
    static graph."""
    monkeypatch.setattr(hook, "is_one_by_one", lambda device: way == "one by one")
    threads = set()
    update_ = ProximalSGD.update_

    def watched(self: ProximalSGD, parameters: list[torch.Tensor], gradients: list[torch.Tensor], group: dict[str, Any]) -> None:
        threads.add(threading.get_ident())
        updates.append(len(parameters))
        update_(self, parameters, gradients, group)

    monkeypatch.setattr(ProximalSGD, "update_", watched)
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 5, 5).to(memory_format=torch.channels_last), torch.randint(3, (6,))
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 8), nn.ReLU(), nn.Linear(8, 3))
    model = model.to(memory_format=torch.channels_last)
    by_hand = copy.deepcopy(model)
    both = [
        ProximalSGD(each.parameters(), find_neurons(each, x), SparseGroupLasso(beta=0.12, alpha=0.3), lr=0.2, momentum=0.9, weight_decay=0.01)
        for each in (model, by_hand)
    ]
    ddp = DistributedDataParallel(model, bucket_cap_mb=1e-4, static_graph=way == "in callbacks")
    both[0].attach(ddp)
    for number in range(5):
        updates: list[int] = []
        both[0].zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        assert (len(updates) > 1) is (number >= {"one by one": 1, "in callbacks": 2, "at once": 5}[way])
        assert sum(updates) == len(list(model.parameters()))
        both[1].zero_grad()
        F.cross_entropy(by_hand(x), y).backward()
        both[1].step()
    assert not all(layer.mask.all() for layer in both[0].neurons)
    for (name, p), q in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert way == "in callbacks" or threads == {threading.get_ident()}


@pytest.mark.parametrize("at_once", [False, True])
def test_nothing_is_kept_of_the_buckets_of_the_first_backward(monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    """DDP makes them anew then, and what is kept of the old ones would keep their memory."""
    monkeypatch.setattr(hook, "is_one_by_one", lambda device: not at_once)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(5, 4)
    optimizer = ProximalSGD(model.parameters(), find_neurons(model, x), SparseGroupLasso(beta=0.0), lr=0.1)
    ddp = DistributedDataParallel(model)
    optimizer.attach(ddp)
    assert optimizer._backward is not None
    for expected in (0, 1, 1):
        ddp(x).sum().backward()
        assert len(optimizer._backward._buckets) == expected
        assert (optimizer._backward._all is not None) is (at_once and expected == 1)


class Recomputed(nn.Module):
    """Some of a chain's modules run again in backward, which is a backward of its own then."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.first, self.last = first, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self.chain(x)
        x = checkpoint(self.chain[self.first : self.last], self.chain[: self.first](x), use_reentrant=True)
        return self.chain[self.last :](x)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("first", "last"), [(0, 4), (1, 5)], ids=["head outside", "stem outside"])
def test_a_backward_within_backward_is_one_step(first: int, last: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(5, 6, requires_grad=True), torch.randint(3, (5,))
    model = Recomputed(first, last)
    by_hand = copy.deepcopy(model)
    both = [
        ProximalSGD(each.parameters(), find_neurons(each.eval(), x.detach()), SparseGroupLasso(beta=0.01), lr=0.2, momentum=0.9)
        for each in (model, by_hand)
    ]
    model.train()
    ddp = DistributedDataParallel(model, bucket_cap_mb=1e-4)
    both[0].attach(ddp)
    for number in range(1, 5):
        both[0].zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        assert both[0].num_steps == number
        both[1].zero_grad()
        F.cross_entropy(by_hand(x), y).backward()
        both[1].step()
    for (name, p), q in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.timeout(60)
def test_a_graph_that_is_said_to_be_static_later() -> None:
    x = torch.randn(5, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = ProximalSGD(model.parameters(), find_neurons(model, x), SparseGroupLasso(beta=0.0), lr=0.1)
    ddp = DistributedDataParallel(model)
    optimizer.attach(ddp)
    ddp._set_static_graph()
    for number in range(1, 4):
        ddp(x).sum().backward()
        assert optimizer.num_steps == number


def test_what_ddp_does_not_tell_is_refused() -> None:
    x = torch.randn(5, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    ddp = DistributedDataParallel(model, find_unused_parameters=True, skip_all_reduce_unused_params=True)
    optimizer = ProximalSGD(model.parameters(), find_neurons(model, x), SparseGroupLasso(beta=0.0), lr=0.1)
    with pytest.raises(ValueError, match="build DDP without it"):
        optimizer.attach(ddp)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu().double())

    mixed = Mixed()
    optimizer = ProximalSGD(mixed.parameters(), find_neurons(mixed, x), SparseGroupLasso(beta=0.0), lr=0.1)
    with pytest.raises(ValueError, match="give all parameters one type"):
        optimizer.attach(DistributedDataParallel(mixed, static_graph=True))
    optimizer.attach(DistributedDataParallel(mixed))


def test_samples_that_are_summed_divide_buckets_that_are_stepped_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "is_one_by_one", lambda device: False)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    by_hand = copy.deepcopy(model)
    both = [ProximalSGD(each.parameters(), find_neurons(each, x), SparseGroupLasso(beta=0.01), lr=0.2) for each in (model, by_hand)]
    ddp = DistributedDataParallel(model, bucket_cap_mb=1e-4)
    both[0].attach(ddp)
    for _ in range(4):
        for optimizer in both:
            optimizer.zero_grad()
        both[0].set_num_samples(6)
        F.cross_entropy(ddp(x), y, reduction="sum").backward()
        F.cross_entropy(by_hand(x), y).backward()
        both[1].step()
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.timeout(60)
def test_a_parameter_that_is_not_optimized() -> None:
    """No neuron owns the last layer's bias; where the step comes after backward it may be left out."""
    x = torch.randn(5, 4)
    last = nn.Linear(6, 3)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), last)
    before = last.bias.detach().clone()
    optimizer = ProximalSGD([p for p in model.parameters() if p is not last.bias], find_neurons(model, x), SparseGroupLasso(beta=0.0), lr=0.1)
    ddp = DistributedDataParallel(model)
    with pytest.warns(UserWarning, match="after backward"):
        optimizer.attach(ddp, max_grad_norm=1.0)
    ddp(x).sum().backward()
    assert optimizer.num_steps == 1
    assert torch.equal(last.bias, before)
