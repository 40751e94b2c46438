"""The compiled proximal step against torch's operations: types, layouts, threads, what is not finite."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_gsl import ProximalSGD, SparseGroupLasso, find_neurons, kernels
from dist_gsl.kernels import Kind, Layout, Rows
from dist_gsl.penalty import row_norms, shrink_factors, soft_threshold
from tests.networks import IMAGE, chain

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda part: part,
    "channels_last": lambda part: part.to(memory_format=torch.channels_last) if part.dim() == 4 else part,
    "columns": lambda part: part.transpose(0, 1).contiguous().transpose(0, 1) if part.dim() > 1 else part,
    "block of a larger one": lambda part: torch.cat([part, part, part])[len(part) : 2 * len(part)],
    "every other neuron": lambda part: part.repeat_interleave(2, dim=0)[::2],
}
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "filter, bias, BatchNorm": [(12, 3, 3, 3), (12,), (12,), (12,)],
    "long rows": [(3, 9001)],
    "one entry": [(7,)],
    "one neuron": [(1, 5, 2), (1,)],
}


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype, layout: str, *, seed: int = 0, device: torch.device | str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [LAYOUTS[layout](torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)) for shape in shapes]


def layout_of(parts: list[Tensor]) -> Layout:
    return Layout([Rows(part, 0, torch.arange(len(part))[:, None], is_block=True) for part in parts], len(parts[0]))


def shrink_(parts: list[Tensor], *, cut: float, threshold: float, min_alive: int = 0) -> tuple[Tensor, int]:
    """(factors, how many are 0)."""
    ((factors, num_zero),) = kernels.cpu.shrink_([layout_of(parts)], cuts=[cut], thresholds=[threshold], min_alive=[min_alive])
    return factors, num_zero


def by_torch(parts: list[Tensor], *, cut: float, threshold: float) -> tuple[list[Tensor], Tensor]:
    shrunk = [soft_threshold(part, cut) for part in parts]
    factors = shrink_factors(row_norms(shrunk), threshold)
    return [s * factors.view(-1, *[1] * (s.dim() - 1)) for s in shrunk], factors


def median_norm(parts: list[Tensor], cut: float) -> float:
    return float(row_norms([soft_threshold(part, cut) for part in parts]).median())


@pytest.mark.parametrize("cut", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("shapes", list(SHAPES))
def test_it_is_the_operator(shapes: str, layout: str, dtype: torch.dtype, cut: float) -> None:
    parts = drawn(SHAPES[shapes], dtype, layout)
    before = [part.clone() for part in parts]
    threshold = 0.999 * median_norm(parts, cut)  # about half of them die
    expected, expected_factors = by_torch(parts, cut=cut, threshold=threshold)
    for min_alive in (len(parts[0]) + 1, 0):
        factors, num_zero = shrink_(parts, cut=cut, threshold=threshold, min_alive=min_alive)
        assert torch.equal(factors == 0, expected_factors == 0)
        assert num_zero == int((factors == 0).sum())
        lives = factors != 0
        for part, old, new in zip(parts, before, expected, strict=True):
            torch.testing.assert_close(part[lives], new[lives])
            assert torch.equal(part[~lives], old[~lives] if min_alive else torch.zeros_like(old[~lives]))  # left for who decides that some stay
            part.copy_(old)


@given(size=st.integers(1, 300), neurons=st.integers(1, 9), share=st.floats(0.1, 2.0), cut=st.floats(0.0, 1.0))
def test_any_size_in_float64(size: int, neurons: int, share: float, cut: float) -> None:
    parts = drawn([(neurons, size), (neurons,)], torch.float64, "contiguous", seed=size)
    threshold = share * median_norm(parts, cut)
    expected, expected_factors = by_torch(parts, cut=cut, threshold=threshold)
    factors, _ = shrink_(parts, cut=cut, threshold=threshold)
    torch.testing.assert_close(factors, expected_factors, rtol=1e-11, atol=1e-13)
    for part, new in zip(parts, expected, strict=True):
        torch.testing.assert_close(part, new, rtol=1e-11, atol=1e-13)


def test_its_neighbours_stay() -> None:
    whole = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    before = whole.clone()
    shrink_([whole[10:20]], cut=0.1, threshold=0.1)
    assert torch.equal(whole[:10], before[:10])
    assert torch.equal(whole[20:], before[20:])
    assert not torch.equal(whole[10:20], before[10:20])


def test_the_same_bits_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.cpu, "PER_THREAD", 1)
    monkeypatch.setattr(kernels.cpu, "PER_TASK", 1200)  # two neurons
    found = []
    for num_threads in (1, 2, 3, 16, 40):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=num_threads: number)
        parts = drawn([(17, 500), (17,)], torch.float32, "contiguous")
        factors, num_zero = shrink_(parts, cut=0.2, threshold=17.5)
        assert num_zero == int((factors == 0).sum()) > 0
        found.append(torch.cat([factors, parts[0].flatten(), parts[1]]))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("cut", [0.0, 0.05])
def test_what_is_not_finite_is_not_taken_for_dead(value: float, cut: float) -> None:
    parts = [torch.ones(4, 3), torch.ones(4)]
    parts[0][1, 2] = value
    assert shrink_(parts, cut=cut, threshold=0.1)[1] == 0
    assert torch.cat([part.reshape(4, -1) for part in parts], dim=1).isnan().any(dim=1).tolist() == [False, True, False, False]


def test_what_it_cannot_describe() -> None:
    """Every other entry of rows of every other row is more than runs at one distance; entries that share memory would be shrunk more than once."""
    strided = torch.randn(6, 8, 8, 8)[:, ::2, ::2, ::2]
    for parts in (
        [strided], [torch.randn(6, 4).bfloat16()], [torch.randn(6, 4), torch.randn(6).double()], [torch.ones(1).expand(5)],
        [torch.arange(10.0).unfold(0, 3, 1)], [torch.arange(20.0).as_strided((2, 3, 3), (9, 1, 1))],
    ):  # fmt: skip
        assert layout_of(parts).parts is None
        assert kernels.kind_of(layout_of(parts)) is Kind.TORCH
    assert kernels.kind_of(layout_of([strided.contiguous()])) is Kind.CPU


@pytest.mark.parametrize("dim", [0, 1])
def test_neurons_at_any_places(dim: int) -> None:
    """As attention's queries and keys are, which no stride describes: neuron 0 has the positions 7 and 2."""
    index = torch.tensor([[7, 2], [0, 1], [3, 9]])
    whole = torch.randn(10, 10, 3, generator=torch.Generator().manual_seed(0))
    before = whole.clone()
    rows = before.movedim(dim, 0)[index.flatten()].reshape(3, -1)
    layout = Layout([Rows(whole, dim, index, is_block=False)], 3)
    threshold = float(rows.norm(dim=1).median())
    kernels.cpu.shrink_([layout], cuts=[0.0], thresholds=[threshold], min_alive=[0])
    after = whole.movedim(dim, 0)
    expected = rows * shrink_factors(rows.norm(dim=1), threshold)[:, None]
    torch.testing.assert_close(after[index.flatten()].reshape(3, -1), expected)
    others = torch.tensor([4, 5, 6, 8])
    assert torch.equal(after[others], before.movedim(dim, 0)[others])


def test_a_layout_knows_when_it_holds_no_more() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 2, 2))
    layout = layout_of([weight])
    assert layout.is_current()
    weight.data = weight.data.to(memory_format=torch.channels_last)
    assert not layout.is_current()


@pytest.mark.parametrize("change", ["order", "type"])
def test_nor_does_it_where_another_tensor_lies_at_the_same_address(change: str) -> None:
    """As may come of a way to another type or device and back."""
    weight = nn.Parameter(torch.randn(4, 3, 2, 2))
    storage = weight.data
    layout = layout_of([weight])
    weight.data = storage.as_strided((4, 3, 2, 2), (12, 1, 6, 3)) if change == "order" else storage.view(torch.int32).view(torch.float32)
    assert weight.data_ptr() == storage.data_ptr()
    assert layout.is_current() is (change == "type")
    if change == "type":
        whole = torch.zeros(96)
        weight.data = whole.view(torch.float64)[:48].view(4, 3, 2, 2)
        layout, other = layout_of([weight]), whole[:48].view(4, 3, 2, 2)
        weight.data = other
        assert not layout.is_current()


def test_a_network_that_moves_in_memory_is_shrunk_where_it_is() -> None:
    model = chain()
    neurons = find_neurons(model, torch.zeros(1, *IMAGE))
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=0.01), lr=1.0)
    moved = copy.deepcopy(model.state_dict())
    optimizer.step()
    model.to(memory_format=torch.channels_last)
    model.load_state_dict(moved)
    optimizer.step()
    once = chain()
    other = ProximalSGD(once.parameters(), find_neurons(once, torch.zeros(1, *IMAGE)), SparseGroupLasso(beta=0.01), lr=1.0)
    other.step()
    for (name, p), q in zip(model.named_parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_a_missing_or_an_older_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.cpu.library.cache_clear()
    try:
        monkeypatch.setattr(kernels.cpu, "VERSION", kernels.cpu.VERSION + 1)
        with pytest.raises(ImportError, match=f"is of version {kernels.cpu.VERSION - 1}, this code needs {kernels.cpu.VERSION}: install the same dist_gsl"):
            kernels.cpu.library()
        monkeypatch.setattr(kernels.cpu, "MODULE", "_dist_gsl_nowhere")
        with pytest.raises(ImportError, match="_dist_gsl_nowhere is missing: install the same dist_gsl here and on every node"):
            kernels.cpu.library()
    finally:
        kernels.cpu.library.cache_clear()


def test_autograd_hears_of_it() -> None:
    model = chain()
    neurons = find_neurons(model, torch.zeros(1, *IMAGE))
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=0.1), lr=0.1)
    loss = neurons.parameter("conv1.weight").square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_optimizer_asks_for_the_library_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.cpu.library.cache_clear()
    monkeypatch.setattr(kernels.cpu, "MODULE", "_dist_gsl_nowhere")
    model = chain()
    neurons = find_neurons(model, torch.zeros(1, *IMAGE))
    try:
        with pytest.raises(ImportError, match="_dist_gsl_nowhere is missing"):
            ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=0.0), lr=0.1)
    finally:
        kernels.cpu.library.cache_clear()
