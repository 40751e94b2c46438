"""The proximal operator four ways (by hand, brute force, degenerate cases, another library), value, units."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize
from skglm.penalties import WeightedL1GroupL2
from skglm.utils.prox_funcs import BST, ST_vec
from torch import Tensor

from dist_gsl import SparseGroupLasso, find_neurons, sparse_group_prox
from dist_gsl.neurons import Neurons, Slice
from dist_gsl.penalty import (
    PenaltyConfig,
    PerLayer,
    Schedule,
    lethal_factors,
    make_penalty,
    soft_threshold,
    starting_betas,
)
from tests.networks import IMAGE, chain

ALPHAS = [0.0, 0.3, 0.5, 1.0]


def random_rows(num: int, size: int, *, seed: int = 0) -> Tensor:
    return torch.randn(num, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(z: np.ndarray, x: np.ndarray, t_beta: float, alpha: float) -> float:
    norms = (1 - alpha) * math.sqrt(len(x)) * float(np.linalg.norm(z)) + alpha * float(np.abs(z).sum())
    return 0.5 * float(((z - x) ** 2).sum()) + t_beta * norms


# --- the operator


def test_prox_group_by_hand() -> None:
    # |(3, 4)| = 5 and sqrt(2) beta = 1: the row keeps 4/5 of itself; |(0.3, 0.4)| = 0.5 < 1 is gone.
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[2.4, 3.2], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(sparse_group_prox(rows, t=0.5, beta=2 / math.sqrt(2)), expected)


def test_prox_mixture_by_hand() -> None:
    # t alpha beta = 1: s = (3, -4, 0), |s| = 5; t (1 - alpha) beta sqrt(3) = sqrt(3).
    rows = torch.tensor([[4.0, -5.0, 0.5]], dtype=torch.float64)
    factor = 1 - math.sqrt(3) / 5
    expected = torch.tensor([[3 * factor, -4 * factor, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(sparse_group_prox(rows, t=0.1, beta=20.0, alpha=0.5), expected)


def test_prox_counts_the_starting_group_size() -> None:
    rows = torch.tensor([[3.0, 4.0]], dtype=torch.float64)  # sqrt(9) = 3 of a norm of 5 go
    torch.testing.assert_close(sparse_group_prox(rows, t=1.0, beta=1.0, group_size=9), rows * (1 - 3 / 5))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_prox_minimises_its_objective(alpha: float, size: int) -> None:
    for x in random_rows(15, size, seed=size).numpy():
        t_beta = 0.4
        z = sparse_group_prox(torch.from_numpy(x)[None], t=0.8, beta=0.5, alpha=alpha)[0].numpy()
        starts = [x, 0.5 * x, np.zeros(size)]
        options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000}
        found = min(
            (minimize(objective, s, args=(x, t_beta, alpha), method="Nelder-Mead", options=options) for s in starts),
            key=lambda result: result.fun,
        )
        assert objective(z, x, t_beta, alpha) <= found.fun + 1e-12
        np.testing.assert_allclose(z, found.x, atol=2e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_prox_beats_every_point_of_a_grid(alpha: float) -> None:
    axis = np.linspace(-2, 2, 41)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    norms = (1 - alpha) * math.sqrt(2) * np.linalg.norm(grid, axis=1) + alpha * np.abs(grid).sum(axis=1)
    for x in random_rows(40, 2, seed=5).numpy():
        z = sparse_group_prox(torch.from_numpy(x)[None], t=1.0, beta=0.6, alpha=alpha)[0].numpy()
        values = 0.5 * ((grid - x) ** 2).sum(axis=1) + 0.6 * norms
        assert objective(z, x, 0.6, alpha) <= values.min() + 1e-12


@pytest.mark.parametrize("alpha", ALPHAS)
def test_prox_satisfies_the_optimality_condition(alpha: float) -> None:
    """z = prox(x) iff (x - z) / t lies in the subdifferential of r at z."""
    t, beta, size = 0.7, 1.0, 4
    x = torch.cat([random_rows(60, size, seed=2), 0.1 * random_rows(5, size)])
    z = sparse_group_prox(x, t=t, beta=beta, alpha=alpha)
    gradient = (x - z) / t
    live = z.norm(dim=1) > 0
    assert live.any()
    assert not live.all()
    group = (1 - alpha) * beta * math.sqrt(size)
    for u, row, is_live in zip(gradient, z, live, strict=True):
        l1 = u - group * row / row.norm() if is_live else u
        nonzero = row != 0
        torch.testing.assert_close(l1[nonzero], alpha * beta * row[nonzero].sign())
        if is_live:
            assert bool((l1[~nonzero].abs() <= alpha * beta + 1e-12).all())
        else:  # 0 lies in the sum of the box and the ball
            assert float(soft_threshold(l1, alpha * beta).norm()) <= group + 1e-12


def test_alpha_0_is_the_block_soft_threshold() -> None:
    x = random_rows(50, 5)
    expected = torch.stack([row * max(0.0, 1 - 0.9 * math.sqrt(5) / float(row.norm())) for row in x])
    torch.testing.assert_close(sparse_group_prox(x, t=0.9, beta=1.0), expected)


def test_alpha_1_is_the_soft_threshold() -> None:
    x = random_rows(50, 5)
    expected = x.sign() * (x.abs() - 0.6).clamp(min=0)
    assert torch.equal(sparse_group_prox(x, t=0.3, beta=2.0, alpha=1.0), expected)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_groups_of_one_entry_are_soft_thresholded_whatever_alpha(alpha: float) -> None:
    x = random_rows(50, 1)
    torch.testing.assert_close(sparse_group_prox(x, t=0.5, beta=1.0, alpha=alpha), soft_threshold(x, 0.5))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("t", "beta"), [(0.0, 3.0), (3.0, 0.0)])
def test_no_step_or_no_penalty_changes_nothing(alpha: float, t: float, beta: float) -> None:
    x = torch.cat([random_rows(5, 3), torch.zeros(2, 3, dtype=torch.float64)])
    assert torch.equal(sparse_group_prox(x, t=t, beta=beta, alpha=alpha), x)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_dies_is_exactly_zero_and_finite(alpha: float, dtype: torch.dtype) -> None:
    x = torch.cat([random_rows(40, 6).to(dtype) * 0.1, torch.zeros(3, 6, dtype=dtype)])
    z = sparse_group_prox(x, t=1.0, beta=1.0, alpha=alpha)
    assert int((z != 0).sum()) == 0
    assert bool(z.isfinite().all())


def test_a_row_at_the_threshold_is_exactly_zero() -> None:
    x = random_rows(100, 1).float()  # a group of one entry, so that its norm is exact
    for row in x:
        assert not sparse_group_prox(row[None], t=1.0, beta=float(row.abs())).any()


def test_prox_agrees_with_skglm(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (ST_vec, BST):  # as plain Python: compiling them takes seconds
        monkeypatch.setattr(f"skglm.penalties.block_separable.{function.__name__}", function.py_func)
    x, t, beta = random_rows(30, 4, seed=3), 0.6, 0.7
    pointers, indices = np.array([0, 4], dtype=np.int32), np.arange(4, dtype=np.int32)
    for alpha in ALPHAS:
        weights = np.array([(1 - alpha) * math.sqrt(4)]), np.full(1, alpha)
        other = WeightedL1GroupL2(beta, *weights, pointers, indices)
        expected = np.stack([other.prox_1group(row, t, 0) for row in x.numpy()])
        np.testing.assert_allclose(sparse_group_prox(x, t=t, beta=beta, alpha=alpha).numpy(), expected, atol=1e-14)


matrices = arrays(np.float64, (4, 3), elements=st.floats(-10, 10, allow_subnormal=False))
strengths = st.floats(0, 3, allow_subnormal=False)
mixtures = st.floats(0, 1, allow_subnormal=False)


@given(matrices, matrices, strengths, mixtures)
def test_prox_is_firmly_non_expansive(a: np.ndarray, b: np.ndarray, beta: float, alpha: float) -> None:
    """|p - q|^2 <= <p - q, a - b>, which is stronger than |p - q| <= |a - b|, and monotone at once."""
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    p, q = (sparse_group_prox(rows, t=1.0, beta=beta, alpha=alpha) for rows in (x, y))
    difference = p - q
    inner = (difference * (x - y)).sum(dim=1)
    assert bool((difference.square().sum(dim=1) <= inner + 1e-9).all())


@given(matrices, strengths, strengths, mixtures)
def test_a_stronger_penalty_shrinks_more(a: np.ndarray, beta: float, more: float, alpha: float) -> None:
    x = torch.from_numpy(a)
    weak = sparse_group_prox(x, t=1.0, beta=beta, alpha=alpha)
    strong = sparse_group_prox(x, t=1.0, beta=beta + more, alpha=alpha)
    assert bool((strong.abs() <= weak.abs() + 1e-12).all())
    assert bool((weak.abs() <= x.abs()).all())
    assert bool((weak * x >= 0).all())  # signs stay


positive = st.floats(1e-3, 1e3)
squarable = arrays(np.float64, (4, 3), elements=st.integers(-10_000, 10_000).map(lambda number: number / 1000))


@given(squarable, st.just(0.0) | st.floats(1e-3, 3), mixtures, st.none() | arrays(np.float64, (4, 3), elements=positive))
def test_a_neuron_is_gone_from_its_lethal_factor_on_and_not_below(x: np.ndarray, beta: float, alpha: float, metric: np.ndarray | None) -> None:
    rows = torch.from_numpy(x)
    d = None if metric is None else torch.from_numpy(metric)
    lethal = lethal_factors([rows], t=0.3, beta=beta, alpha=alpha, group_size=9, metric=None if d is None else [d])
    for row, factor in enumerate(lethal.tolist()):
        one, scale = rows[row : row + 1], None if d is None else d[row : row + 1]
        if not one.any() or beta == 0:
            assert factor == (0.0 if not one.any() else math.inf)
            continue

        def after(times: float, one: Tensor = one, scale: Tensor | None = scale, factor: float = factor) -> Tensor:
            return sparse_group_prox(one, t=0.3, beta=beta * factor * times, alpha=alpha, group_size=9, metric=scale)

        assert not after(1 + 1e-6).any()
        assert after(1 - 1e-6).any()


@given(matrices, strengths, mixtures, st.permutations([0, 1, 2]))
def test_rows_do_not_see_each_other_and_entries_have_no_order(
    a: np.ndarray, beta: float, alpha: float, order: list[int]
) -> None:
    x = torch.from_numpy(a)
    whole = sparse_group_prox(x, t=1.0, beta=beta, alpha=alpha)
    single = torch.cat([sparse_group_prox(row[None], t=1.0, beta=beta, alpha=alpha) for row in x])
    torch.testing.assert_close(whole, single)
    torch.testing.assert_close(whole[:, order], sparse_group_prox(x[:, order], t=1.0, beta=beta, alpha=alpha))


# --- on the parts of a layer


def parts_of(layout: str) -> tuple[list[Tensor], list[Slice], list[Tensor]]:
    """A layer's tensors, its slices and its parts: filter, bias, BatchNorm scale and shift of 5 neurons."""
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 2, 2)
    tensors = [weight, torch.randn(5), torch.randn(5), torch.randn(5)]
    slices = [Slice.block(name, 0, 5) for name in ("weight", "bias", "scale", "shift")]
    if layout == "channels_last":
        tensors[0] = weight.contiguous(memory_format=torch.channels_last)
    elif layout == "scattered":  # neurons in another order and not side by side; two entries a neuron in the shift
        tensors = [torch.randn(9, 3, 2, 2), torch.randn(9), torch.randn(5), torch.randn(10)]
        index = torch.tensor([[7], [0], [3], [8], [1]])
        pairs = torch.arange(10).view(2, 5).T.contiguous()
        slices = [Slice("weight", 0, index), Slice("bias", 0, index), slices[2], Slice("shift", 0, pairs)]
    elif layout == "transposed":
        tensors[0], slices[0] = torch.randn(3, 5, 2, 2), Slice.block("weight", 1, 5)
    return tensors, slices, [s.rows(t) for s, t in zip(slices, tensors, strict=True)]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "scattered", "transposed"])
def test_prox_on_parts_is_the_closed_form_on_joined_rows(layout: str, alpha: float) -> None:
    tensors, slices, parts = parts_of(layout)
    strides = [tensor.stride() for tensor in tensors]
    rows = torch.cat([part.reshape(5, -1) for part in parts], dim=1)
    rows[2] *= 0.05  # one that dies
    for part in parts:
        part[2] *= 0.05
    untouched = torch.randn(9)
    if layout == "scattered":
        for s, tensor, part in zip(slices, tensors, parts, strict=True):
            s.write_(tensor, part)
        untouched = tensors[1].clone()
    size = rows.shape[1]
    penalty = SparseGroupLasso(beta=0.5, alpha=alpha)
    prox = penalty.prox_(parts, layer="x", step=0, t=0.6, group_size=size)
    for s, tensor, part in zip(slices, tensors, parts, strict=True):
        s.write_(tensor, part)
    expected = sparse_group_prox(rows, t=0.6, beta=0.5, alpha=alpha)
    found = torch.cat([s.rows(t).reshape(5, -1) for s, t in zip(slices, tensors, strict=True)], dim=1)
    torch.testing.assert_close(found, expected)
    assert prox.dead is not None
    assert torch.equal(prox.dead, ~expected.any(dim=1))
    assert prox.dead[2]
    assert not found[2].any()
    assert [tensor.stride() for tensor in tensors] == strides
    if layout == "scattered":  # positions of no neuron stay
        assert torch.equal(tensors[1][[2, 4, 5, 6]], untouched[[2, 4, 5, 6]])


def test_min_alive_keeps_exactly_the_strongest_as_they_are() -> None:
    weight = torch.arange(1.0, 7.0)[:, None].repeat(1, 4)
    bias = torch.zeros(6)
    before = weight.clone()
    penalty = SparseGroupLasso(beta=100.0, alpha=0.5)
    prox = penalty.prox_([weight, bias], layer="x", step=0, t=1.0, group_size=5, min_alive=2)
    assert prox.kept_by_force
    assert prox.dead is not None
    assert prox.dead.tolist() == [True] * 4 + [False] * 2
    assert not weight[:4].any()
    assert torch.equal(weight[4:], before[4:])


def test_min_alive_does_nothing_while_enough_live() -> None:
    weight = torch.arange(1.0, 7.0)[:, None].repeat(1, 4)
    expected = sparse_group_prox(weight, t=1.0, beta=4.5)  # norms 2 to 12 less 9
    prox = SparseGroupLasso(beta=4.5).prox_([weight], layer="x", step=0, t=1.0, group_size=4, min_alive=2)
    assert not prox.kept_by_force
    torch.testing.assert_close(weight, expected)
    assert int((weight != 0).any(dim=1).sum()) == 2


def test_min_alive_brings_no_zero_neuron_to_life() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    prox = SparseGroupLasso(beta=9.0).prox_([weight], layer="x", step=0, t=1.0, group_size=2, min_alive=2)
    assert prox.dead is not None
    assert prox.dead.tolist() == [True, False, True]


def test_off_is_off() -> None:
    weight = torch.randn(3, 2)
    before = weight.clone()
    assert SparseGroupLasso(beta=0.0).prox_([weight], layer="x", step=0, t=1.0, group_size=2).dead is None
    assert torch.equal(weight, before)


# --- value


@pytest.fixture
def neurons() -> Neurons:
    return find_neurons(chain(), torch.randn(2, *IMAGE))


def test_value_is_the_closed_form(neurons: Neurons) -> None:
    beta, alpha = {"conv1": 0.3, "fc1": 0.7}, 0.25  # conv2 has no beta
    expected = 0.0
    for name, modules in (("conv1", ("conv1", "bn1")), ("fc1", ("fc1",))):
        tensors = [p.detach() for m in modules for p in neurons.model.get_submodule(m).parameters()]
        rows = torch.cat([p.reshape(len(p), -1) for p in tensors], dim=1).double().numpy()
        group = math.sqrt(rows.shape[1]) * np.linalg.norm(rows, axis=1).sum()
        expected += beta[name] * ((1 - alpha) * group + alpha * np.abs(rows).sum())
    value = SparseGroupLasso(beta=beta, alpha=alpha).value(neurons)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_value_and_prox_belong_together(neurons: Neurons) -> None:
    """prox_(x) minimises 1/2 |z - x|^2 + t value(z): no random move about it is better, on a whole network."""
    model = neurons.model.double()
    penalty, t = SparseGroupLasso(beta=0.1, alpha=0.4), 0.5
    start = {n: p.detach().clone() for n, p in model.named_parameters()}

    def total() -> float:
        near = sum(0.5 * float((p - start[n]).square().sum()) for n, p in model.named_parameters())
        return near + t * float(penalty.value(neurons))

    with torch.no_grad():
        for layer in neurons:
            penalty.prox_(neurons.parts(layer), layer=layer.name, step=0, t=t, group_size=layer.group_size)
        best = total()
        optimum = {n: p.clone() for n, p in model.named_parameters()}
        for size in (1e-1, 1e-3, 1e-5):
            for _ in range(20):
                for n, p in model.named_parameters():
                    p.copy_(optimum[n] + size * torch.randn_like(p) * (torch.rand_like(p) < 0.1))
                assert total() >= best


def test_value_is_differentiable(neurons: Neurons) -> None:
    penalty = SparseGroupLasso(beta=0.1, alpha=0.4)
    penalty.value(neurons.__class__(neurons.model.double(), neurons.all_layers)).backward()
    weight = neurons.parameter("fc1.weight")
    row = torch.cat([weight[0], neurons.parameter("fc1.bias")[:1]]).detach()
    expected = 0.1 * (0.6 * math.sqrt(33) * row / row.norm() + 0.4 * row.sign())
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0], expected[:-1])


# --- strength over layers and time


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_outside_0_1_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        SparseGroupLasso(beta=1.0, alpha=alpha)
    with pytest.raises(ValueError, match="alpha"):
        sparse_group_prox(torch.ones(1, 2), t=1.0, beta=1.0, alpha=alpha)
    with pytest.raises(ValueError, match="alpha"):
        SparseGroupLasso(beta=1.0, alpha=lambda layer, step: alpha).strength("x", 0)
    with pytest.raises(ValueError, match="alpha"):
        PenaltyConfig(alpha=PerLayer(rest=alpha))


@pytest.mark.parametrize("beta", [-1.0, math.nan, math.inf])
def test_a_beta_that_is_no_strength_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        SparseGroupLasso(beta={"conv1": beta})
    with pytest.raises(ValueError, match="beta"):
        PenaltyConfig(beta=PerLayer(by_layer={"conv1": beta}))


def test_beta_by_layer_and_step() -> None:
    penalty = SparseGroupLasso(beta=lambda layer, step: step * (2.0 if layer == "a" else 1.0), alpha={"a": 0.5})
    assert penalty.strength("a", 3) == (6.0, 0.5)
    assert penalty.strength("b", 3) == (3.0, 0.0)


def test_per_layer() -> None:
    values = PerLayer(rest=2.0, first=1.0, num_first=2, by_layer={"a": 7.0, "d": 9.0})
    assert values.of(["a", "b", "c", "d"]) == {"a": 7.0, "b": 1.0, "c": 2.0, "d": 9.0}
    assert PerLayer(rest=2.0).of(["a", "b"]) == {"a": 2.0, "b": 2.0}
    with pytest.raises(ValueError, match=r"'z'.*layers: a, b"):
        PerLayer(by_layer={"z": 1.0}).of(["a", "b"])


def test_schedule() -> None:
    schedule = Schedule(start=1.0, ramp=2.0, end=5.0)
    assert [schedule.factor(e) for e in (0, 0.99, 1, 1.5, 2, 3, 4.9, 5, 6)] == [0, 0, 0, 0.25, 0.5, 1, 1, 0, 0]
    assert [Schedule().factor(e) for e in (0, 100)] == [1, 1]
    for wrong in ({"start": -1.0}, {"ramp": -1.0}, {"start": 3.0, "end": 2.0}):
        with pytest.raises(ValueError, match="schedule"):
            Schedule(**wrong)


def test_config_errors_and_interval() -> None:
    assert [PenaltyConfig(every=e).interval for e in ("step", "epoch", "10")] == ["step", "epoch", 10]
    for wrong in ({"unit": "hours"}, {"every": "0"}, {"every": "often"}, {"min_alive": -1}):
        with pytest.raises(ValueError, match=f"penalty.{next(iter(wrong))}"):
            PenaltyConfig(**wrong)
    assert not PenaltyConfig().enabled
    assert PenaltyConfig(beta=PerLayer(first=1.0)).enabled


def penalty_of(
    config: PenaltyConfig, neurons: Neurons, *, steps_per_epoch: int, learning_rate: Callable[[int], float]
) -> SparseGroupLasso:
    betas = starting_betas(config, neurons, steps_per_epoch=steps_per_epoch, learning_rate=learning_rate)
    return make_penalty(config, neurons, betas=betas, steps_per_epoch=steps_per_epoch)


def test_make_penalty_follows_the_config(neurons: Neurons) -> None:
    config = PenaltyConfig(
        beta=PerLayer(rest=2.0, first=1.0), beta_schedule=Schedule(start=1.0, ramp=1.0, end=3.0),
        alpha=PerLayer(rest=0.5),
    )  # fmt: skip
    penalty = penalty_of(config, neurons, steps_per_epoch=10, learning_rate=lambda step: 0.1)
    assert penalty.strength("conv1", 9) == (0.0, 0.5)
    assert penalty.strength("conv1", 15) == (0.5, 0.5)
    assert penalty.strength("conv2", 25) == (2.0, 0.5)
    assert penalty.strength("conv2", 30) == (0.0, 0.5)
    assert penalty.strength("fc2", 25) == (0.0, 0.0)  # no layer with neurons


EPOCHS, STEPS_PER_EPOCH = 3, 20


def learning_rate(step: int) -> float:
    return 0.1 if step < 50 else 0.01  # drops in mid-epoch


@pytest.mark.parametrize("every", ["step", "epoch", "5"])
@pytest.mark.parametrize("ramp", [0.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_epochs_until_death_of_an_unsupported_neuron(neurons: Neurons, alpha: float, ramp: float, every: str) -> None:
    config = PenaltyConfig(
        beta=PerLayer(rest=EPOCHS), unit="epochs", alpha=PerLayer(rest=alpha), every=every, reference_layer="conv2",
        beta_schedule=Schedule(start=1.0, ramp=ramp),
    )  # fmt: skip
    penalty = penalty_of(config, neurons, steps_per_epoch=STEPS_PER_EPOCH, learning_rate=learning_rate)
    layer = neurons["conv2"]
    rows = torch.cat([part.detach().reshape(layer.num_neurons, -1) for part in neurons.parts(layer)], dim=1).double()
    neuron = rows[rows.norm(dim=1).argsort()[len(rows) // 2]][None].clone()

    interval = {"step": 1, "epoch": STEPS_PER_EPOCH, "5": 5}[every]
    deaths, t = [], 0.0
    for step in range(6 * STEPS_PER_EPOCH):
        t += learning_rate(step)
        if (step + 1) % interval == 0:
            penalty.prox_([neuron], layer="conv2", step=step, t=t, group_size=layer.group_size)
            t = 0.0
        if not neuron.any():
            deaths.append(step + 1)
    death = deaths[0]
    assert death == (1 + EPOCHS) * STEPS_PER_EPOCH


def test_fewer_epochs_are_a_stronger_penalty_and_0_is_none(neurons: Neurons) -> None:
    config = PenaltyConfig(beta=PerLayer(by_layer={"conv1": 2.0, "conv2": 4.0}), unit="epochs")
    penalty = penalty_of(config, neurons, steps_per_epoch=10, learning_rate=lambda step: 0.1)
    betas = {layer.name: penalty.strength(layer.name, 20)[0] for layer in neurons}
    assert betas["conv1"] == pytest.approx(2 * betas["conv2"])
    assert betas["fc1"] == 0


def test_more_epochs_than_the_schedule_has_are_as_much_weaker(neurons: Neurons) -> None:
    config = PenaltyConfig(beta=PerLayer(by_layer={"conv1": 2.0, "conv2": 3.0, "fc1": 6.0}), unit="epochs", beta_schedule=Schedule(start=1.0, end=4.0))
    betas = starting_betas(config, neurons, steps_per_epoch=10, learning_rate=lambda step: 0.1)
    assert betas["conv2"] == pytest.approx(2 * betas["fc1"])
    assert betas["conv1"] == pytest.approx(3 * betas["fc1"])


def test_epochs_without_a_penalised_step_are_refused(neurons: Neurons) -> None:
    config = PenaltyConfig(beta=PerLayer(rest=2.0), unit="epochs", beta_schedule=Schedule(start=1.0, end=1.0))
    with pytest.raises(ValueError, match=r"beta_schedule\.end"):
        penalty_of(config, neurons, steps_per_epoch=10, learning_rate=lambda step: 0.1)


def test_unknown_layers_are_refused(neurons: Neurons) -> None:
    for config in (
        PenaltyConfig(beta=PerLayer(rest=1.0, by_layer={"conv9": 1.0})),
        PenaltyConfig(beta=PerLayer(rest=1.0), unit="epochs", reference_layer="conv9"),
    ):
        with pytest.raises(ValueError, match=r"conv9.*layers: conv1, conv2, fc1"):
            penalty_of(config, neurons, steps_per_epoch=1, learning_rate=lambda step: 0.1)


def test_layers_of_the_same_number_of_epochs_share_one_search(neurons: Neurons) -> None:
    asked: list[int] = []

    def rate(step: int) -> float:
        asked.append(step)
        return 0.1

    config = PenaltyConfig(beta=PerLayer(rest=10.0), unit="epochs", alpha=PerLayer(rest=0.5))
    penalty_of(config, neurons, steps_per_epoch=10, learning_rate=rate)
    assert asked == list(range(10, 110))
