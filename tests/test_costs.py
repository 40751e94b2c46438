"""What a training step costs, in numbers that no machine's mood changes: operations, collectives and their bytes, allocations."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dist_gsl import ProximalSGD, SparseGroupLasso, create_model, find_neurons, hook
from dist_gsl.kernels import Layout, gpu
from dist_gsl.penalty import PenaltyConfig, PerLayer
from dist_gsl.training import loop
from dist_gsl.training.config import TrainConfig
from dist_gsl.training.state import RunState, build
from tests.networks import tiny
from tests.training.conftest import process_group  # noqa: F401  (all here is one process's)
from tests.training.trainings import NETWORK, TensorBatches

RECIPE: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}


class Operations(TorchDispatchMode):
    """How often torch was asked for what."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def stepping(name: str, *, alpha: float = 0.5) -> tuple[nn.Module, ProximalSGD]:
    """A network and its optimizer after two steps, with gradients."""
    model, example = tiny(name)
    neurons = find_neurons(model, example)
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=1e-6, alpha=alpha), **RECIPE)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", ["bnet", "dec3", "dec8"])
def test_the_operations_of_a_step_do_not_grow_with_the_network(name: str) -> None:
    """SGD is four operations on lists of tensors, and the proximal step one call for all layers."""
    _, optimizer = stepping(name)
    with Operations() as operations:
        optimizer.step()
    asked = {key.partition("::")[2]: count for key, count in operations.counts.items() if key.startswith("aten::")}
    on_lists = {"_foreach_add.List": 1, "_foreach_mul_.Scalar": 1, "_foreach_add_.List": 2}
    assert asked == {**on_lists, "empty.memory_format": 1, "split_with_sizes": 1}  # what each neuron is multiplied with


def test_a_step_allocates_no_more_than_sgd() -> None:
    """Weight decay's sum, as torch's SGD; the proximal step works in place and takes a number a neuron."""
    model, optimizer = stepping("dec8")
    entries = sum(p.numel() for p in model.parameters())
    num_neurons = sum(layer.num_neurons for layer in optimizer.neurons)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    allocated = sum(event.cpu_memory_usage for event in profiler.events() if event.name != "[memory]" and event.cpu_memory_usage > 0)
    largest = max(event.cpu_memory_usage for event in profiler.events())
    assert largest <= 4 * entries * 1.05 + 4096
    assert allocated <= 2 * (4 * entries * 1.02 + 4 * num_neurons + 4096)  # the operation's event and the one within it count both


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each all-reduce of the hook."""
    found: list[int] = []
    for module in (hook, dist):  # of gradients, and of all else

        def counted(tensor: Tensor, *args: Any, all_reduce: Any = module.all_reduce, **kwargs: Any) -> Any:
            found.append(tensor.numel() * tensor.element_size())
            return all_reduce(tensor, *args, **kwargs)

        monkeypatch.setattr(module, "all_reduce", counted)
    return found


def run_state(config: TrainConfig, data: TensorBatches) -> RunState:
    penalty = PenaltyConfig(beta=PerLayer(rest=1e-6))
    return build(NETWORK, image_shape=data.image_shape, train=config, penalty=penalty, steps_per_epoch=len(data), device=torch.device("cpu"))


def test_a_step_reduces_the_gradients_and_nothing_else(collectives: list[int]) -> None:
    data, config = TensorBatches(), TrainConfig(batch_size=8, channels_last=False)
    state = run_state(config, data)
    batch = next(iter(data))
    for _ in range(3):
        collectives.clear()
        loop.train_step(state, config, batch)
        assert sum(collectives) == 4 * state.num_parameters


def test_a_smaller_network_reduces_less(collectives: list[int]) -> None:
    data, config = TensorBatches(), TrainConfig(batch_size=8, channels_last=False)
    state = run_state(config, data)
    batch = next(iter(data))
    before = state.num_parameters
    for layer in state.neurons:
        state.neurons.zero_({layer.name: range(layer.num_neurons // 2)})
    assert state.shrink()
    assert state.num_parameters < 0.4 * before
    loop.train_step(state, config, batch)
    collectives.clear()
    loop.train_step(state, config, batch)
    assert sum(collectives) == 4 * state.num_parameters


@pytest.mark.parametrize(("name", "read_once"), [("dec8-768", 1.0), ("resnet50", 0.84), ("vit_b_16", 1.0), ("bnet-c", 0.66)])
def test_what_a_gpu_reads(name: str, read_once: float) -> None:
    """The share of entries that a program reads once, into registers, and how well these fill its tiles; all of them four at a time, but for the
    first layer's."""
    neurons = find_neurons(create_model(name, num_classes=10), torch.zeros(1, 3, 224, 224))
    at_once = entries = lanes = alone = 0
    for layer in neurons:
        layout = Layout([piece.of(neurons.parameter(piece.tensor)) for piece in layer.producers], layer.num_neurons)
        reading = gpu._Reading.of(layout, torch.float32)
        assert not reading.parts  # runs and single entries alone
        sizes = [size for *_, size in reading.pieces]
        at_once += layer.num_neurons * sum(sizes[: gpu.PIECES])
        entries += layer.num_neurons * sum(sizes)
        alone += layer.num_neurons * sum(sizes) * (1 - reading.kind % 2)
        lanes += -(-layer.num_neurons // reading.num_rows) * reading.num_rows * gpu.SHAPES[reading.kind // 2][1] * len(sizes)
    assert at_once / entries >= read_once
    assert entries / lanes >= 0.9
    assert alone / entries < 0.01
