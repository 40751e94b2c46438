"""The proximal step on a GPU. Where there is none, Triton interprets the programs, and a GPU's compiler sees them in a process of its own."""

import copy
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from dist_gsl import ProximalSGD, SparseGroupLasso, find_neurons, hook, kernels
from dist_gsl.kernels import Kind, Layout, Rows, gpu
from dist_gsl.neurons import Neurons
from dist_gsl.penalty import dying, shrink_factors
from tests.device import BACKEND, DEVICE, waits_are_errors
from tests.networks import IMAGE, batches, chain, tiny, train_step
from tests.test_kernels import LAYOUTS, SHAPES, by_torch, drawn, layout_of, median_norm


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would go to C++ goes the way of a GPU, on tensors of the CPU where there is no other device."""
    if DEVICE.type == "cuda":
        return
    kind_of = kernels.kind_of
    monkeypatch.setattr(hook, "is_one_by_one", lambda device: False)
    monkeypatch.setattr(kernels, "kind_of", lambda layout: Kind.GPU if kind_of(layout) is Kind.CPU else kind_of(layout))
    launch, one_at_a_time = gpu.Shrink.__call__, threading.Lock()

    def alone(self: gpu.Shrink, **limits: Any) -> None:
        with one_at_a_time:  # the interpreter cannot do with several threads, which buckets come on
            launch(self, **limits)

    monkeypatch.setattr(gpu.Shrink, "__call__", alone)


class Step:
    """Both launches, for layers that are whole."""

    def __init__(self, layouts: list[Layout], *, min_alive: int = 0) -> None:
        self.shrink_ = gpu.Shrink(layouts)
        alive = [torch.ones(layout.num_neurons, dtype=torch.uint8, device=layout.device) for layout in layouts]
        nothing: list[list[Layout]] = [[] for _ in layouts]
        self._clear = gpu.Clear([self.shrink_], also=nothing, min_alive=[min_alive] * len(layouts), alive=alive, for_good=True)

    def clear_(self) -> None:
        self._clear()

    @property
    def masks(self) -> list[Tensor]:
        return [mask for mask, _ in self._clear.heard()]

    @property
    def kept_by_force(self) -> list[bool]:
        return [is_forced for _, is_forced in self._clear.heard()]


MORE_SHAPES: dict[str, list[tuple[int, ...]]] = {
    **{f"{num_neurons} of {size}": [(num_neurons, size), (num_neurons,)]
       for num_neurons, size in ((3, 4608), (3, 4601), (5, 2304), (5, 2301), (9, 1152), (9, 1151), (17, 288), (17, 287), (33, 72), (33, 71), (130, 16), (130, 15))},
    "longer than any tile, aligned": [(3, 9216), (3,)],
    "several runs, many single entries": [(12, 64, 3, 3), (12,), (12,), (12, 64), (12,), (12,), (12, 129)],
    "several, aligned": [(5, 128, 3, 3), (5, 64), (5,), (5, 2048)],
}  # fmt: skip
"""Every tile of a GPU, read by one and by four entries, full and not; and what takes more than one."""


@pytest.mark.parametrize("cut", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_it_is_the_operator(layout: str, dtype: torch.dtype, cut: float) -> None:
    """All shapes in one launch."""
    layers = [drawn(shapes, dtype, layout, device=DEVICE) for shapes in (SHAPES | (MORE_SHAPES if layout == "contiguous" or DEVICE.type == "cuda" else {})).values()]
    thresholds = [0.999 * median_norm(parts, cut) for parts in layers]  # about half of each layer's die
    expected = [by_torch(parts, cut=cut, threshold=threshold) for parts, threshold in zip(layers, thresholds, strict=True)]
    before = [[part.clone() for part in parts] for parts in layers]
    step = Step([layout_of(parts) for parts in layers])
    step.shrink_(cuts=[cut] * len(layers), thresholds=thresholds)
    for parts, old, (new, factors) in zip(layers, before, expected, strict=True):
        for part, was, will in zip(parts, old, new, strict=True):
            torch.testing.assert_close(part[factors != 0], will[factors != 0])
            assert torch.equal(part[factors == 0], was[factors == 0])  # until all layers are done
    step.clear_()
    for parts, (new, factors), alive in zip(layers, expected, step.masks, strict=True):
        assert torch.equal(alive, (factors != 0).cpu())
        for part, will in zip(parts, new, strict=True):
            torch.testing.assert_close(part, will)


@settings(max_examples=40, deadline=None)
@given(
    norms=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]), min_size=1, max_size=70), min_alive=st.integers(0, 5), threshold=st.sampled_from([0.7, 3.0, 9.0])
)
def test_the_strongest_of_the_dying_stay(norms: list[float], min_alive: int, threshold: float) -> None:
    part = torch.tensor(norms, device=DEVICE)[:, None] * torch.tensor([0.6, 0.8], device=DEVICE)
    before = part.clone()
    factors = shrink_factors(before.norm(dim=1), threshold)
    dead, kept = dying([before], factors, min_alive=min_alive)
    step = Step([layout_of([part])], min_alive=min_alive)
    step.shrink_(cuts=[0.0], thresholds=[threshold])
    step.clear_()
    expected = torch.where((factors > 0)[:, None], before * factors[:, None], before) * ~dead[:, None]
    # Of equals either may stay.
    torch.testing.assert_close(part.norm(dim=1).sort().values, expected.norm(dim=1).sort().values)
    assert int(step.masks[0].sum()) == int((~dead).sum())
    assert step.kept_by_force == [kept is not None and bool((before.norm(dim=1)[kept] > 0).any())]


def test_neurons_at_any_places() -> None:
    index = torch.tensor([[7, 2], [0, 1], [3, 9]])
    by_cpu = torch.randn(10, 10, 3, generator=torch.Generator().manual_seed(0))
    whole = by_cpu.clone().to(DEVICE)
    threshold = float(by_cpu[:, index.flatten()].movedim(1, 0).reshape(3, -1).norm(dim=1).median())
    step = Step([Layout([Rows(whole, 1, index, is_block=False)], 3)])
    step.shrink_(cuts=[0.1], thresholds=[threshold])
    step.clear_()
    kernels.cpu.shrink_([Layout([Rows(by_cpu, 1, index, is_block=False)], 3)], cuts=[0.1], thresholds=[threshold], min_alive=[0])
    torch.testing.assert_close(whole.cpu(), by_cpu)
    assert int(step.masks[0].sum()) in (1, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("cut", [0.0, 0.05])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_not_taken_for_dead(value: float, cut: float) -> None:
    parts = [torch.ones(4, 3, device=DEVICE), torch.ones(4, device=DEVICE)]
    parts[0][1, 2] = value
    step = Step([layout_of(parts)])
    step.shrink_(cuts=[cut], thresholds=[0.1])
    step.clear_()
    assert step.masks[0].all()
    assert torch.cat([part.reshape(4, -1) for part in parts], dim=1).isnan().any(dim=1).tolist() == [False, True, False, False]


def moved(batch: tuple[Tensor, Tensor], device: torch.device = DEVICE) -> tuple[Tensor, Tensor]:
    return batch[0].to(device), batch[1].to(device)


def course(*, num_steps: int = 20, device: torch.device = DEVICE, **options: Any) -> tuple[nn.Module, nn.Module, Neurons, ProximalSGD, list[float]]:
    """A network after some steps, with its moving average."""
    model = chain(dtype=torch.float64)
    neurons = find_neurons(model, torch.zeros(1, *IMAGE, dtype=torch.float64))
    model.to(device)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    neurons.register_copy(lambda: [dict(averaged.module.named_parameters())], is_model=True)
    strength = {"beta": 0.08, "alpha": 0.3, **{key: options.pop(key) for key in ("beta", "alpha") if key in options}}
    penalty = SparseGroupLasso(**strength)
    optimizer = ProximalSGD(model.parameters(), neurons, penalty, lr=0.05, momentum=0.9, **options)
    losses = []
    for batch in batches(num_steps, dtype=torch.float64):
        losses.append(train_step(model, optimizer.step, moved(batch, device)))
        averaged.update_parameters(model)
    return model, averaged.module, neurons, optimizer, losses


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 1e-2, "nesterov": True}, {"every": 3}, {"revive": True}, {"revive": True, "every": 2}, {"beta": {"conv1": 2.0, "fc1": 0.05}, "min_alive": 3}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:layer .* would kill every neuron")
def test_a_training_is_what_it_is_on_a_cpu(options: dict[str, Any], on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, averaged, neurons, optimizer, losses = course(**options)
    died = {layer.name: layer.mask.tolist() for layer in neurons}
    monkeypatch.undo()
    plain, plain_average, plain_neurons, plain_optimizer, plain_losses = course(device=torch.device("cpu"), **options)
    assert losses == pytest.approx(plain_losses, abs=1e-10)
    assert died == {layer.name: layer.mask.tolist() for layer in plain_neurons}
    assert 0 < sum(layer.num_dead for layer in neurons) < sum(layer.num_neurons for layer in neurons)
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q[1], rtol=0, atol=1e-10, msg=name)
        momentum = [each.state[x]["momentum_buffer"].cpu() for each, x in ((optimizer, p), (plain_optimizer, q[1]))]
        torch.testing.assert_close(*momentum, rtol=0, atol=1e-10, msg=name)
    for mine, other in zip(averaged.parameters(), plain_average.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("error:layer .* would kill every neuron")
def test_who_asks_is_told_of_force(on_gpu: None) -> None:
    _, _, neurons, optimizer, _ = course(beta={"conv1": 5.0}, num_steps=3)
    assert optimizer.warned == set()  # nobody has asked
    with pytest.raises(UserWarning, match="layer 'conv1': beta 5 would kill every neuron"):
        neurons["conv1"].alive()
    assert optimizer.warned == {"conv1"}


class Watched(TorchDispatchMode):
    """Names of what torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::item", "aten::is_nonzero", "aten::masked_select", "aten::_to_copy"}
"""What the host waits for a device in."""


def launches_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the launches from now on."""
    found: list[str] = []
    for name in ("_shrink", "_clear"):
        kernel = getattr(gpu, name)

        class Counted:
            def __getitem__(self, grid: Any, name: str = name, kernel: Any = kernel) -> Any:
                found.append(name)
                return kernel[grid]

        monkeypatch.setattr(gpu, name, Counted())
    return found


def test_a_step_asks_the_device_nothing_and_takes_two_launches(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, neurons, optimizer, _ = course(beta=0.05, num_steps=3)  # tables and momentum are there
    launches = launches_of(monkeypatch)
    with Watched() as watched, monkeypatch.context() as patch, waits_are_errors():
        patch.setattr(gpu.Clear, "heard", lambda self: pytest.fail("the host waits for the device"))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(8):
            optimizer.step()
    assert set(watched.names) & WAITS == set()
    assert launches == ["_shrink", "_clear"] * 8
    assert sum(layer.num_dead for layer in neurons) > 0


def test_masks_may_be_read_between_forward_and_backward(on_gpu: None) -> None:
    model, _, neurons, optimizer, _ = course(num_steps=12)
    assert neurons["conv1"].__dict__["_ask"] is not None
    x, y = moved(next(batches(1, dtype=torch.float64)))
    loss = F.cross_entropy(model(x), y)
    assert sum(layer.num_dead for layer in neurons) > 0
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_so_they_may_where_a_branch_has_vanished(mode: str, on_gpu: None) -> None:
    """What it leaves without readers gives its f(0) to a BatchNorm's running mean, which backward reads."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(2, 3, 3, padding=1)
            self.branch = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(),
                                        nn.Conv2d(3, 3, 3, padding=1))  # fmt: skip
            self.out = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x).relu()
            return self.out((y + self.branch(y)).relu().mean(dim=(2, 3)))

    torch.manual_seed(0)
    model = Residual().double()
    x = torch.randn(4, *IMAGE, dtype=torch.float64)
    neurons = find_neurons(model, x[:1])
    model, x = model.to(DEVICE), x.to(DEVICE)
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta={"branch.2": 100.0, "branch.0": 1e-9}), lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    getattr(model, mode)()
    loss = model(x).sum()
    assert not neurons["branch.2"].mask.any()
    assert not neurons["branch.0"].mask.any()
    loss.backward()


def test_a_neuron_that_something_moved_after_its_death_is_cleared_again(on_gpu: None) -> None:
    model, _, neurons, optimizer, _ = course(beta={"fc1": 0.15}, num_steps=12)
    (gone, *_) = (~neurons["fc1"].mask).nonzero().flatten().tolist()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    gradient = neurons.parameter("fc1.bias").grad
    assert gradient is not None
    gradient[gone] = 100.0
    optimizer.step()
    assert not neurons.parameter("fc1.bias")[gone]
    assert not optimizer.state[neurons.parameter("fc1.bias")]["momentum_buffer"][gone]


def test_what_died_unheard_does_not_die_in_a_state_that_is_loaded(on_gpu: None) -> None:
    model = chain(dtype=torch.float64)
    neurons = find_neurons(model, torch.zeros(1, *IMAGE, dtype=torch.float64))
    model.to(DEVICE)
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=0.08), lr=0.05, momentum=0.9)
    parameters, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for batch in batches(12, dtype=torch.float64):
        train_step(model, optimizer.step, moved(batch))
    model.load_state_dict(parameters)
    optimizer.load_state_dict(state)
    assert all(layer.mask.all() for layer in neurons)
    for name, p in model.named_parameters():
        assert torch.equal(p, parameters[name]), name


def test_a_mask_that_is_assigned_reaches_the_device(on_gpu: None) -> None:
    """As when processes agree on the dead of the first: a neuron that is alive again may die again."""
    model, _, neurons, optimizer, _ = course(beta={"fc1": 0.15}, num_steps=12)
    layer, weight, bias = neurons["fc1"], neurons.parameter("fc1.weight"), neurons.parameter("fc1.bias")
    (gone, *_) = (~layer.mask).nonzero().flatten().tolist()
    layer.mask = torch.ones_like(layer.mask)
    weight.data[gone] = 5.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert layer.mask[gone]
    for tensor in (weight.data, bias.data, optimizer.state[weight]["momentum_buffer"], optimizer.state[bias]["momentum_buffer"]):
        tensor[gone] = 0.0
    optimizer.step()
    assert not layer.mask[gone]


def test_copies_know_what_the_device_knew(on_gpu: None) -> None:
    _, _, neurons, _, _ = course(num_steps=12)
    other = copy.deepcopy(neurons)
    assert sum(layer.num_dead for layer in other) == sum(layer.num_dead for layer in neurons) > 0
    before = [p.detach().clone() for p in neurons.model.parameters()]
    other.zero_({layer.name: range(layer.num_neurons) for layer in other})
    assert not other.model.get_parameter("conv1.weight").any()
    assert all(torch.equal(p, was) for p, was in zip(neurons.model.parameters(), before, strict=True))


def test_within_backward_it_is_what_it_is_by_hand(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several buckets, built anew after the first step, deaths from the first step on; a layer whose parts lie in two buckets."""
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    try:
        attached, plain = chain(dtype=torch.float64), chain(dtype=torch.float64)
        found = []
        for model in (attached, plain):
            neurons = find_neurons(model, torch.zeros(1, *IMAGE, dtype=torch.float64))
            model.to(DEVICE)
            penalty = SparseGroupLasso(beta=0.08, alpha=0.3)
            found.append((neurons, ProximalSGD(model.parameters(), neurons, penalty, lr=0.05, momentum=0.9)))
        (neurons, optimizer), (plain_neurons, plain_optimizer) = found
        ddp = DistributedDataParallel(attached, bucket_cap_mb=0.001)
        optimizer.attach(ddp)
        launches = launches_of(monkeypatch)
        for number, batch in enumerate(map(moved, batches(12, dtype=torch.float64))):
            del launches[:]
            train_step(ddp, lambda: None, batch)
            assert launches == ["_shrink", "_clear"], number
            train_step(plain, plain_optimizer.step, batch)
        for (name, p), q in zip(attached.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q), name
        assert [layer.mask.tolist() for layer in neurons] == [layer.mask.tolist() for layer in plain_neurons]
        assert sum(layer.num_dead for layer in neurons) > 0
    finally:
        dist.destroy_process_group()


def network(name: str) -> tuple[nn.Module, Tensor]:
    if name != "vit":
        return tiny(name)
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5
    )
    return model, torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("name", ["bnet", "dec8", "dec3", "vit"])
def test_shapes_as_they_occur(name: str, on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys of attention, filters that are rows, what reads a flattened map."""
    model, example = network(name)
    other = copy.deepcopy(model)
    kinds: list[Kind] = []
    neurons = find_neurons(model, example)
    model.to(DEVICE)
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=2e-2, alpha=0.2), lr=1.0)
    optimizer._operator._kind_of, kind_of = lambda due: kinds.append(kind_of(due)) or kinds[-1], optimizer._operator._kind_of  # type: ignore[method-assign, func-returns-value]
    optimizer.step()
    masks = [layer.mask for layer in neurons]
    assert set(kinds) == {Kind.GPU}
    monkeypatch.undo()
    theirs = find_neurons(other, example)
    ProximalSGD(other.parameters(), theirs, SparseGroupLasso(beta=2e-2, alpha=0.2), lr=1.0).step()
    for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, msg=key)
    assert all(torch.equal(mask, layer.mask) for mask, layer in zip(masks, theirs, strict=True))


@pytest.mark.filterwarnings("ignore:layer .* would kill every neuron")
def test_neurons_that_give_something_when_they_are_zero_go_by_torch(on_gpu: None) -> None:
    """The gradients of what reads them are masked before every step, so the host must hear of their deaths at once."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    neurons = find_neurons(model, torch.zeros(1, *IMAGE))
    model.to(DEVICE)
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=0.5), lr=0.5)
    optimizer.step()
    assert [layer.__dict__.get("_ask") is not None for layer in neurons] == [False, True]
    assert neurons["0"].num_dead > 0


COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dist_gsl.kernels import gpu
for capability in (70, 80, 90):
    for name, type_of in (("fp32", torch.float32), ("fp64", torch.float64)):
        dtype, shapes = gpu._TYPES[type_of], gpu.shapes_of(type_of)
        tables = {"programs": "*i32", "layers": "*i64", "pieces": "*i64", "parts": "*i64"}
        for kernel, more, constants, options in (
            (
                gpu._shrink, {"limits": f"*{name}", "num_layers": "i32"},
                {"dtype": dtype, "shapes": shapes, "any_rows": gpu.ANY[0], "any_columns": gpu.ANY[1]}, {"num_warps": gpu.WARPS, "maxnreg": gpu.REGISTERS},
            ),
            (gpu._clear, {"for_good": "i32"}, {"dtype": dtype, "num_looked_at": gpu.NEURONS, "num_columns": gpu.ENTRIES}, {}),
        ):
            types = {**tables, **more, **dict.fromkeys(constants, "constexpr")}
            in_order = {key: types[key] for key in kernel.arg_names}
            triton.compile(ASTSource(kernel, in_order, constants), target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]
print("compiled")
"""


@pytest.mark.slow
def test_gpus_of_three_generations_can_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton needs no GPU to compile for one."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "compiled\n", done.stderr[-2000:]
