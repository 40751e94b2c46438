"""The proximal operator under a diagonal metric: brute force, optimality, the closed form where there is one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq, minimize
from torch import Tensor

from dist_gsl import SparseGroupLasso, sparse_group_prox
from dist_gsl.penalty import soft_threshold

ALPHAS = [0.0, 0.3, 0.5, 1.0]


def random_rows(num: int, size: int, *, decades: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows and a metric whose entries lie so many decades apart."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num, size, generator=generator, dtype=torch.float64)
    return rows, 10 ** (-decades * torch.rand(num, size, generator=generator, dtype=torch.float64))


def objective(z: np.ndarray, x: np.ndarray, d: np.ndarray, t_beta: float, alpha: float) -> float:
    norms = (1 - alpha) * math.sqrt(len(x)) * float(np.linalg.norm(z)) + alpha * float(np.abs(z).sum())
    return 0.5 * float((d * (z - x) ** 2).sum()) + t_beta * norms


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_it_minimises_its_objective(alpha: float, size: int) -> None:
    rows, metric = random_rows(15, size, decades=1, seed=size)
    zeros = 0
    for x, d in zip(rows.numpy(), metric.numpy(), strict=True):
        z = sparse_group_prox(torch.from_numpy(x)[None], t=0.5, beta=0.4, alpha=alpha, metric=torch.from_numpy(d)[None])[0].numpy()
        zeros += not z.any()
        options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000}
        found = min(
            (minimize(objective, s, args=(x, d, 0.2, alpha), method="Nelder-Mead", options=options) for s in (x, 0.5 * x, np.zeros(size))),
            key=lambda result: float(result.fun),
        )
        assert objective(z, x, d, 0.2, alpha) <= found.fun + 1e-12
        np.testing.assert_allclose(z, found.x, atol=5e-5)
    assert 0 < zeros < 15


@pytest.mark.parametrize("alpha", ALPHAS)
def test_it_beats_every_point_of_a_grid(alpha: float) -> None:
    axis = np.linspace(-2, 2, 41)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    norms = (1 - alpha) * math.sqrt(2) * np.linalg.norm(grid, axis=1) + alpha * np.abs(grid).sum(axis=1)
    rows, metric = random_rows(40, 2, decades=1.5, seed=5)
    for x, d in zip(rows.numpy(), metric.numpy(), strict=True):
        z = sparse_group_prox(torch.from_numpy(x)[None], t=1.0, beta=0.2, alpha=alpha, metric=torch.from_numpy(d)[None])[0].numpy()
        assert objective(z, x, d, 0.2, alpha) <= (0.5 * (d * (grid - x) ** 2).sum(axis=1) + 0.2 * norms).min()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [1e-6, 0.5, 3.0])
def test_a_multiple_of_the_identity_has_the_closed_form(alpha: float, scale: float) -> None:
    rows, _ = random_rows(50, 7, decades=0)
    expected = sparse_group_prox(rows, t=0.6 / scale, beta=0.7 * scale, alpha=alpha)
    found = sparse_group_prox(rows, t=0.6, beta=0.7 * scale, alpha=alpha, metric=torch.full_like(rows, scale))
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("decades", [0, 1, 4, 8])
@pytest.mark.parametrize("strength", [0.999, 0.9, 0.3, 1e-3, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_root_is_exact(decades: float, strength: float, dtype: torch.dtype) -> None:
    """Against bracketing, at strengths from what kills a neuron to nearly nothing. alpha = 0, so that |D x| > threshold is what survives."""
    rows, metric = (each.to(dtype) for each in random_rows(30, 50, decades=decades, seed=3))
    for x, d in zip(rows, metric, strict=True):
        threshold = strength * float((d * x).double().norm())
        z = sparse_group_prox(x[None], t=1.0, beta=threshold / math.sqrt(50), metric=d[None])[0]
        a, wide = (d * x).double(), d.double()
        nu = brentq(lambda n: float((a / (wide * n + threshold)).norm()) - 1, 0, 2 * float(x.double().norm()), xtol=1e-300, rtol=1e-14)  # noqa: B023
        expected = a * nu / (wide * nu + threshold)
        bound = 1e-11 if dtype == torch.float64 else 3e-4 / (1 - strength) ** 0.5 if strength > 0.9 else 1e-5
        torch.testing.assert_close(z.double(), expected, rtol=bound, atol=0)


@pytest.mark.parametrize("decades", [0, 1, 4, 8])
def test_just_above_the_threshold_nothing_is_zero_that_is_not_dead(decades: float) -> None:
    """In float32, where rounding is of the size of what is left."""
    rows, metric = (each.float() for each in random_rows(2000, 3, decades=decades, seed=4))
    weighted = rows * metric
    for row, d, a in zip(rows, metric, weighted, strict=True):
        threshold = float(torch.nextafter(a.norm(), torch.tensor(0.0)))
        part = row[None].clone()
        prox = SparseGroupLasso(beta=1.0).prox_([part], layer="", step=0, t=threshold / math.sqrt(3), group_size=3, metric=[d[None]])
        assert prox.dead is not None
        assert bool(prox.dead) is not bool(part.any())
        assert bool((part * row >= 0).all())


@pytest.mark.parametrize(("largest", "smallest", "dtype"), [(1e5, 1e-8, torch.float32), (1e4, 1e-10, torch.float32), (1e8, 1e-12, torch.float64)])
def test_the_metric_of_what_is_zero_does_not_matter(largest: float, smallest: float, dtype: torch.dtype) -> None:
    rows, metric = torch.tensor([[0.0, 0.1]], dtype=dtype), torch.tensor([[largest, smallest]], dtype=dtype)
    z = sparse_group_prox(rows, t=1.0, beta=1e-13 * 0.1 * smallest, metric=metric)
    torch.testing.assert_close(z, rows)


def test_what_is_not_finite_stays_so() -> None:
    """Or a training that has diverged would look like one with zeros."""
    for value in (math.nan, math.inf, -math.inf):
        rows, metric = torch.ones(3, 4), torch.ones(3, 4)
        rows[1, 2] = value
        found = sparse_group_prox(rows, t=1.0, beta=0.1, metric=metric)
        assert not found[1].isfinite().all()
        assert found[[0, 2]].isfinite().all()
        part, d = torch.ones(3, 4), torch.ones(3, 4)
        d[1, 2] = value
        SparseGroupLasso(beta=0.1).prox_([part], layer="", step=0, t=1.0, group_size=4, metric=[d])
        assert not part[1].isfinite().all()


def test_parts_without_entries_say_nothing() -> None:
    rows, metric = random_rows(4, 6, decades=2)
    parts, empty = [rows[:, :3].clone(), rows[:, 3].clone(), torch.zeros(4, 0, 2, 2), rows[:, 4:].clone()], torch.zeros(4, 0, 2, 2)
    SparseGroupLasso(beta=0.05, alpha=0.3).prox_(
        parts, layer="", step=0, t=1.0, group_size=6, metric=[metric[:, :3], metric[:, 3], empty, metric[:, 4:]]
    )
    expected = sparse_group_prox(rows, t=1.0, beta=0.05, alpha=0.3, metric=metric)
    torch.testing.assert_close(torch.cat([parts[0], parts[1][:, None], parts[3]], 1), expected)


def test_it_is_zero_from_the_threshold_on() -> None:
    rows, metric = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    lethal = math.sqrt(3.0**2 + 2.0**2) / math.sqrt(2)
    assert not sparse_group_prox(rows, t=1.0, beta=lethal * (1 + 1e-12), metric=metric).any()
    assert sparse_group_prox(rows, t=1.0, beta=lethal * (1 - 1e-9), metric=metric).all()
    assert not sparse_group_prox(torch.zeros(1, 2), t=1.0, beta=0.0, metric=torch.ones(1, 2)).any()


def test_without_penalty_nothing_moves() -> None:
    rows, metric = random_rows(5, 4, decades=3)
    torch.testing.assert_close(sparse_group_prox(rows, t=1.0, beta=0.0, metric=metric), rows, rtol=1e-15, atol=0)


matrices = arrays(np.float64, (4, 3), elements=st.floats(-10, 10, allow_subnormal=False))
metrics = arrays(np.float64, (4, 3), elements=st.floats(1e-6, 10))
strengths = st.floats(0, 3, allow_subnormal=False)
mixtures = st.floats(0, 1, allow_subnormal=False)


@given(matrices, metrics, strengths, mixtures)
def test_its_result_is_stationary(a: np.ndarray, d: np.ndarray, beta: float, alpha: float) -> None:
    """0 lies in D (z - x) + subdifferential, row by row."""
    x, metric = torch.from_numpy(a), torch.from_numpy(d)
    z = sparse_group_prox(x, t=1.0, beta=beta, alpha=alpha, metric=metric)
    for row, its, found in zip(x, metric, z, strict=True):
        pull = its * (row - found)  # what the penalty has to answer with
        cut, threshold = alpha * beta, (1 - alpha) * beta * math.sqrt(3)
        if not found.any():
            assert float(soft_threshold(pull, cut).norm()) <= threshold + 1e-9
            continue
        direction = found / found.norm()
        left = pull - threshold * direction  # of the L1 part: cut times the sign, or within it where an entry is 0
        alive = found != 0
        scale = 1e-7 * max(1.0, float(pull.abs().max()), threshold)
        assert bool(((left - cut * found.sign())[alive].abs() <= scale).all())
        assert bool((left[~alive].abs() <= cut + scale).all())


@given(matrices, matrices, metrics, strengths, mixtures)
def test_it_is_firmly_non_expansive_in_its_metric(a: np.ndarray, b: np.ndarray, d: np.ndarray, beta: float, alpha: float) -> None:
    x, y, metric = torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(d)
    p, q = (sparse_group_prox(rows, t=1.0, beta=beta, alpha=alpha, metric=metric) for rows in (x, y))
    inner = (metric * (p - q) * (x - y)).sum(dim=1)
    assert bool(((metric * (p - q).square()).sum(dim=1) <= inner + 1e-7).all())


def test_other_metrics_are_refused() -> None:
    for metric in (torch.zeros(2, 3), torch.ones(2, 2), -torch.ones(2, 3), torch.full((2, 3), torch.nan)):
        with pytest.raises(ValueError, match=r"metric must be above 0 and of the shape \(2, 3\)"):
            sparse_group_prox(torch.ones(2, 3), t=1.0, beta=1.0, metric=metric)
