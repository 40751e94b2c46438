"""Run time, memory and multiply-adds."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dist_gsl
from dist_gsl import timing
from tests.networks import IMAGE, chain


def test_size_is_counted_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),  # 6 x 8 x 8
        nn.ReLU(inplace=True),  # nothing of its own
        nn.MaxPool2d(2),  # 6 x 4 x 4
        nn.ReLU(),  # 6 x 4 x 4
        nn.Flatten(),  # a view
        nn.Linear(96, 5),
    )
    size = timing.size(network, example=torch.randn(3, 2, 8, 8))
    assert size.parameters == 6 * 2 * 9 + 6 + 96 * 5 + 5
    assert size.parameter_bytes == 4 * size.parameters
    assert size.feature_bytes == 4 * (6 * 64 + 96 + 96 + 5)
    assert size.multiply_adds == 6 * 64 * 2 * 9 + 96 * 5


def test_multiply_adds_of_groups_strides_and_positions() -> None:
    grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
    assert timing.size(grouped, example=torch.randn(1, 4, 8, 8)).multiply_adds == 8 * 16 * 2 * 9
    assert timing.size(nn.Linear(3, 5), example=torch.randn(1, 7, 3)).multiply_adds == 7 * 5 * 3


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_multiply_adds_of_attention() -> None:
    projections, products = 4 * 5 * 8 * 8, 2 * 2 * 5 * 5 * 4  # queries, keys, values and outputs; heads, weights and sums of values
    fused = torch.backends.mha.get_fastpath_enabled()
    assert timing.size(Attends(), example=torch.randn(3, 5, 8)).multiply_adds == projections + products
    assert torch.backends.mha.get_fastpath_enabled() == fused
    neurons = dist_gsl.find_neurons(Attends(), torch.randn(3, 5, 8))
    neurons.zero_({"attention.query_key": [0, 4]})  # a query and a key of each head, a term of all weights
    uneven = dist_gsl.compact(neurons.model, neurons).model
    assert timing.size(uneven, example=torch.randn(3, 5, 8)).multiply_adds == projections + products - 4 * 5 * 8 - 2 * 5 * 5


def test_size_leaves_the_network_as_it_is() -> None:
    network = chain()
    network[0].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    timing.size(network, example=torch.randn(2, *IMAGE))
    assert network.training
    assert not network[0].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_comparison_of_a_compact_network() -> None:
    network = chain()
    example = torch.randn(2, *IMAGE)
    neurons = dist_gsl.find_neurons(network, example)
    neurons.zero_({"conv1": range(3), "conv2": range(4)})
    compact = dist_gsl.compact(network, neurons).model
    threads = torch.get_num_threads()
    comparison = timing.compare(network, compact, example=example, batch_sizes=(1, 4), repeats=3, threads=1)
    assert torch.get_num_threads() == threads
    assert network.training
    assert list(comparison.speedup_percent) == ["1", "4"]
    assert [t.num_repeats for t in comparison.timings] == [3, 3]
    assert all(t.full_ms > 0 and t.compact_ms > 0 for t in comparison.timings)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (network, compact))
    assert (comparison.full.parameters, comparison.compact.parameters) == (before, after)
    assert comparison.memory_saved_percent["params"] == pytest.approx(100 * (1 - after / before))
    assert 0 < comparison.memory_saved_percent["features"] < 60
    assert comparison.device == "CPU, 1 thread"


class Sleep(nn.Module):
    """Takes a known time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x


def test_percent_of_run_time_saved() -> None:
    comparison = timing.compare(Sleep(0.04), Sleep(0.01), example=torch.zeros(1, 1), batch_sizes=(1,), repeats=5)
    assert comparison.speedup_percent["1"] == pytest.approx(75, abs=10)
    assert comparison.timings[0].full_ms == pytest.approx(40, rel=0.3)


def test_a_slower_network_saves_less_than_nothing() -> None:
    comparison = timing.compare(Sleep(0.01), Sleep(0.02), example=torch.zeros(1, 1), batch_sizes=(1,), repeats=3)
    assert comparison.speedup_percent["1"] < -50


def test_time_is_bounded() -> None:
    began = time.perf_counter()
    comparison = timing.compare(
        Sleep(0.01), Sleep(0.01), example=torch.zeros(1, 1), batch_sizes=(1, 2), repeats=10_000, seconds=0.4
    )
    assert time.perf_counter() - began < 2
    assert all(t.num_repeats >= 3 for t in comparison.timings)


def test_inputs_are_of_the_batch_size() -> None:
    seen: list[int] = []

    class Look(Sleep):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return x

    timing.compare(Look(0), Look(0), example=torch.zeros(2, 1), batch_sizes=(1, 2, 8), repeats=3)
    assert set(seen) == {1, 2, 8}


def test_nothing_to_save() -> None:
    assert timing.saved_percent(0, 0) == 0
    assert timing.saved_percent(200, 50) == 75


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"repeats": 0},
        lambda: {"seconds": 0.0},
        lambda: {"batch_sizes": ()},
        lambda: {"batch_sizes": (1, 0)},
        lambda: {"threads": 0},
    ],
)
def test_arguments_out_of_range(change: Callable[[], dict[str, object]]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        timing.compare(Sleep(0), Sleep(0), example=torch.zeros(1, 1), **change())  # type: ignore[arg-type]


def test_networks_on_two_devices() -> None:
    with pytest.raises(ValueError, match="move them to one device"):
        timing.compare(Sleep(0), Sleep(0).to("meta"), example=torch.zeros(1, 1))


def test_an_empty_branch_costs_nothing() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.last(x + self.b(self.a(x).relu()))

    model, example = Block(), torch.randn(1, 3, 8, 8)
    neurons = dist_gsl.find_neurons(model, example)
    neurons.zero_({"a": range(6)})
    small = dist_gsl.compact(model, neurons).model
    assert timing.size(model, example=example).multiply_adds == 64 * (4 * 3 + 6 * 36 + 4 * 6 + 2 * 4)
    assert timing.size(small, example=example).multiply_adds == 64 * (4 * 3 + 2 * 4)
