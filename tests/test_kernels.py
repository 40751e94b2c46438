"""The compiled proximal step against torch's operations: types, layouts, threads, what is not finite."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dist_gsl import ProximalSGD, SparseGroupLasso, find_neurons, kernels
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


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype, layout: str, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = [LAYOUTS[layout](torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]
    return parts


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
    described = kernels.described(parts)
    assert described is not None
    factors = torch.empty(len(parts[0]), dtype=dtype)
    num_zero = kernels.shrink_(described, factors, cut=cut, threshold=threshold)
    assert torch.equal(factors == 0, expected_factors == 0)
    assert num_zero == int((factors == 0).sum())
    lives = factors != 0
    for part, old, new in zip(parts, before, expected, strict=True):
        torch.testing.assert_close(part[lives], new[lives])
        assert torch.equal(part[~lives], old[~lives])  # left for who decides that some stay


@given(size=st.integers(1, 300), neurons=st.integers(1, 9), share=st.floats(0.1, 2.0), cut=st.floats(0.0, 1.0))
def test_any_size_in_float64(size: int, neurons: int, share: float, cut: float) -> None:
    parts = drawn([(neurons, size), (neurons,)], torch.float64, "contiguous", seed=size)
    threshold = share * median_norm(parts, cut)
    expected, expected_factors = by_torch(parts, cut=cut, threshold=threshold)
    described, factors = kernels.described(parts), torch.empty(neurons, dtype=torch.float64)
    assert described is not None
    kernels.shrink_(described, factors, cut=cut, threshold=threshold)
    torch.testing.assert_close(factors, expected_factors, rtol=1e-11, atol=1e-13)
    for part, new in zip(parts, expected, strict=True):
        torch.testing.assert_close(part[factors != 0], new[factors != 0], rtol=1e-11, atol=1e-13)


def test_its_neighbours_stay() -> None:
    whole = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    before = whole.clone()
    described, factors = kernels.described([whole[10:20]]), torch.empty(10)
    assert described is not None
    kernels.shrink_(described, factors, cut=0.1, threshold=0.1)
    assert torch.equal(whole[:10], before[:10])
    assert torch.equal(whole[20:], before[20:])
    assert not torch.equal(whole[10:20], before[10:20])


def test_the_same_bits_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PER_THREAD", 1)
    found = []
    for num_threads in (1, 2, 3, 16, 40):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=num_threads: number)
        parts = drawn([(17, 500), (17,)], torch.float32, "contiguous")
        described, factors = kernels.described(parts), torch.empty(17)
        assert described is not None
        num_zero = kernels.shrink_(described, factors, cut=0.2, threshold=17.5)
        assert num_zero == int((factors == 0).sum()) > 0
        found.append(torch.cat([factors, parts[0].flatten(), parts[1]]))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_what_is_not_finite_is_not_taken_for_dead(value: float, alpha: float) -> None:
    parts = [torch.ones(4, 3), torch.ones(4)]
    parts[0][1, 2] = value
    prox = SparseGroupLasso(beta=0.1, alpha=alpha).prox_(parts, layer="a", step=0, t=1.0, group_size=4)
    assert prox.dead is None
    assert torch.cat([part.reshape(4, -1) for part in parts], dim=1).isnan().any(dim=1).tolist() == [False, True, False, False]


def test_what_it_cannot_describe_goes_by_torch() -> None:
    """Every other entry of rows of every other row: more than runs at one distance."""
    strided = torch.randn(6, 8, 8, 8, generator=torch.Generator().manual_seed(0))[:, ::2, ::2, ::2]
    half = torch.randn(6, 4).bfloat16()
    mixed = [torch.randn(6, 4), torch.randn(6).double()]
    assert kernels.described([strided]) is None
    assert kernels.described([half]) is None
    assert kernels.described(mixed) is None
    plain = [strided.clone()]
    penalty = SparseGroupLasso(beta=0.5, alpha=0.3)
    by_hand = penalty.prox_([strided], layer="a", step=0, t=1.0, group_size=80)
    compiled = penalty.prox_(plain, layer="a", step=0, t=1.0, group_size=80)
    assert by_hand.dead is not None
    assert not by_hand.dead.any()
    assert compiled.dead is None
    torch.testing.assert_close(strided, plain[0])


@pytest.mark.parametrize("layout", ["contiguous", "scattered"])
def test_the_strongest_of_the_dying_stay_as_they_are(layout: str) -> None:
    """Neuron 1 survives by itself; of the others 3 is the strongest."""
    rows = torch.tensor([[0.1, 0.0], [3.0, 4.0], [0.3, 0.0], [0.0, 0.8], [0.0, 0.0]])
    part = torch.zeros(5, 4, 4, 4)[:, ::2, ::2, ::2] if layout == "scattered" else torch.zeros(5, 1, 1, 2)
    assert (kernels.described([part]) is None) == (layout == "scattered")
    filled = part[:, 0, 0]
    filled.copy_(rows)
    prox = SparseGroupLasso(beta=1.0).prox_([part], layer="a", step=0, t=1.0, group_size=1, min_alive=2)
    assert prox.kept_by_force
    assert prox.dead is not None
    assert prox.dead.tolist() == [True, False, True, False, True]
    expected = torch.tensor([[0.0, 0.0], [2.4, 3.2], [0.0, 0.0], [0.0, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(filled, expected)


def test_a_missing_or_an_older_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.library.cache_clear()
    try:
        monkeypatch.setattr(kernels, "VERSION", kernels.VERSION + 1)
        with pytest.raises(ImportError, match=f"is of version {kernels.VERSION - 1}, this code needs {kernels.VERSION}: install the same dist_gsl"):
            kernels.library()
        monkeypatch.setattr(kernels, "MODULE", "_dist_gsl_nowhere")
        with pytest.raises(ImportError, match="_dist_gsl_nowhere is missing: install the same dist_gsl here and on every node"):
            kernels.library()
    finally:
        kernels.library.cache_clear()


def test_entries_that_share_memory_are_left_to_torch() -> None:
    """Here, each would be shrunk more than once."""
    for part in (torch.ones(1).expand(5), torch.arange(10.0).unfold(0, 3, 1), torch.arange(20.0).as_strided((2, 3, 3), (9, 1, 1))):
        assert kernels.described([part]) is None
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory location"):
        SparseGroupLasso(beta=0.1).prox_([torch.ones(1).expand(5)], layer="a", step=0, t=1.0, group_size=1)


def test_autograd_hears_of_it() -> None:
    weight = torch.ones(4, 3, requires_grad=True)
    penalty = SparseGroupLasso(beta=0.1)
    with pytest.raises(RuntimeError, match=r"call it under torch\.no_grad\(\)"):
        penalty.prox_([weight], layer="a", step=0, t=1.0, group_size=3)
    assert torch.equal(weight, torch.ones(4, 3))
    loss = weight.square().sum()
    with torch.no_grad():
        penalty.prox_([weight], layer="a", step=0, t=1.0, group_size=3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_optimizer_asks_for_the_library_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.library.cache_clear()
    monkeypatch.setattr(kernels, "MODULE", "_dist_gsl_nowhere")
    model = chain()
    neurons = find_neurons(model, torch.zeros(1, *IMAGE))
    try:
        with pytest.raises(ImportError, match="_dist_gsl_nowhere is missing"):
            ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=0.0), lr=0.1)
    finally:
        kernels.library.cache_clear()
