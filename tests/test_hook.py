"""A step inside backward, in one process."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_gsl import ProximalSGD, SparseGroupLasso, find_neurons
from dist_gsl.hook import is_dense
from tests.training.conftest import process_group  # noqa: F401  (all here is one process's)


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
