"""The penalties of the method: value and proximal operator in closed form, strength per layer and over time.

Imports torch alone. Legend of shapes: N neurons of a layer, P entries of one neuron's group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dist_gsl.neurons import Neurons

Strength = float | Mapping[str, float] | Callable[[str, int], float]
"""A number for all layers, a number per layer name, or a schedule (layer name, step) -> number."""


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """S(x, b) = sign(x) max(|x| - b, 0), elementwise: argmin_z 1/2 (z - x)^2 + b |z|. Any shape, `threshold` >= 0."""
    return x.sign() * (x.abs() - threshold).clamp_min_(0)


def shrink_factors(norms: Tensor, threshold: float) -> Tensor:
    """max(0, 1 - threshold / norm), and 0 where the norm is 0: (N,) -> (N,).

    Exactly 0 as soon as norm <= threshold, which is what makes neurons vanish exactly: hence the difference first.
    """
    return (norms - threshold).clamp_min_(0) / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def row_norms(parts: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each neuron over all its parts, (N, ...) each -> (N,)."""
    norms = [torch.linalg.vector_norm(part.reshape(len(part), -1) if part.dim() == 1 else part,
                                      dim=tuple(range(1, max(part.dim(), 2)))) for part in parts]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)


NUM_ROOT_STEPS = 8
"""Newton steps to the norm of a neuron after its proximal step under a metric: six reach float64's precision with entries of the metric from 1
to 1e-8 in one neuron. A number that is fixed asks a device nothing."""


def norms_in_metric(weighted: Sequence[Tensor], metric: Sequence[Tensor], threshold: float) -> Tensor:
    """The norm nu of z = argmin_z 1/2 |z - s|_D^2 + threshold |z|_2 for each neuron, and 0 for those that are zero: (N, ...) each -> (N,).

    weighted: D s; metric: the diagonal of D, all above 0. z is 0 where |D s| <= threshold, and else D s / (D + threshold / nu), so that nu solves
    |D s / (D nu + threshold)| = 1. That has no closed form unless D is a multiple of the identity. The left side to the power of -1 is concave
    and rises with nu, as in the secular equation of a trust region (Moré and Sorensen 1983): so Newton's method on it never passes the root.
    It starts where the root is if all of D were its largest entry, below which the root never is.
    """
    norms = row_norms(weighted)
    if threshold == 0:
        return row_norms([a / d for a, d in zip(weighted, metric, strict=True)])
    tiny = torch.finfo(norms.dtype).tiny
    # What is 0 is not looked at: its metric may be anything, and the start would be far from the root. Parts of an emptied branch have no entries.
    largest = [torch.where(a != 0, d, 0).reshape(len(d), -1) for a, d in zip(weighted, metric, strict=True) if d.numel()]
    start = nu = (norms - threshold).clamp_min(0) / torch.stack([d.amax(1) for d in largest]).amax(0).clamp_min(tiny)
    for _ in range(NUM_ROOT_STEPS):
        square, slope = torch.zeros_like(nu), torch.zeros_like(nu)
        for a, d in zip(weighted, metric, strict=True):
            below = torch.addcmul(torch.full_like(d, threshold), d, _along(nu, d))
            terms = (a / below).square_()
            square += terms.flatten(1).sum(1) if terms.dim() > 1 else terms
            terms.mul_(d).div_(below)
            slope += terms.flatten(1).sum(1) if terms.dim() > 1 else terms
        nu = torch.maximum(nu + (square.sqrt() - 1) * square / slope.clamp_min(tiny), start)  # rounding may take it below
        nu = torch.where(norms <= threshold, 0, nu)
    return nu


def _in_metric(weighted: Tensor, metric: Tensor, norms: Tensor, threshold: float) -> Tensor:
    """z of `norms_in_metric` for one part of the neurons; what is not finite stays so."""
    nu = _along(norms, metric)
    return torch.where(nu == 0, 0, weighted * nu / (metric * nu + threshold))


def _along(values: Tensor, part: Tensor) -> Tensor:
    """(N,) -> (N, 1, ...), as a part of neurons."""
    return values.view(-1, *[1] * (part.dim() - 1))


def sparse_group_prox(
    rows: Tensor, *, t: float, beta: float, alpha: float = 0.0, group_size: int | None = None, metric: Tensor | None = None
) -> Tensor:
    """Proximal operator of the sparse group lasso for every row at once, (N, P) -> (N, P).

    Solves, for each row x,  argmin_z 1/2 |z - x|_2^2 + t beta [ (1 - alpha) sqrt(P) |z|_2 + alpha |z|_1 ]  by the
    closed form of the paper (section 3.2):  s = S(x, t alpha beta);
    z = max(0, 1 - t (1 - alpha) beta sqrt(P) / |s|) s,  exactly 0 where s is 0.
    `group_size` is P where it is not the row's length (P stays that of the starting network).

    metric: (N, P), above 0, the diagonal of D where the first term is 1/2 |z - x|_D^2 = 1/2 sum_i d_i (z_i - x_i)^2, as of a step of Adam:
    then there is no closed form, but one equation a row (`norms_in_metric`).
    """
    check_strength(beta, alpha)
    size = rows.shape[1] if group_size is None else group_size
    if metric is not None:
        if metric.shape != rows.shape or not bool((metric > 0).all()):
            raise ValueError(f"sparse_group_prox: metric must be above 0 and of the shape {tuple(rows.shape)} of the rows")
        weighted = soft_threshold(rows * metric, t * alpha * beta)
        threshold = t * (1 - alpha) * beta * math.sqrt(size)
        return _in_metric(weighted, metric, norms_in_metric([weighted], [metric], threshold), threshold)
    s = soft_threshold(rows, t * alpha * beta) if alpha > 0 else rows
    factors = shrink_factors(row_norms([s]), t * (1 - alpha) * beta * math.sqrt(size))
    return s * factors[:, None]


NUM_LETHAL_STEPS = 20
"""Newton steps to a lethal factor: eight reach float64's precision with entries over six orders of magnitude."""


def lethal_factors(
    parts: Sequence[Tensor], *, t: float, beta: float, alpha: float, group_size: int, metric: Sequence[Tensor] | None = None
) -> Tensor:
    """The smallest factor of beta at which a proximal step takes a neuron to zero: (N, ...) each -> (N,); 0 of zeros, inf where t beta is 0.

    It is the root k of |S(x, t alpha beta k)| = t (1 - alpha) beta sqrt(P) k, with D x in the place of x under a metric (`sparse_group_prox`). The
    difference of the two sides is convex in k and falls: so Newton's method, from 0, never passes the root.
    """
    scaled = parts if metric is None else [part * d for part, d in zip(parts, metric, strict=True)]
    rows = torch.cat([part.detach().reshape(len(part), -1) for part in scaled], dim=1).abs()
    rows = rows if rows.dtype == torch.float64 else rows.float()
    cut, threshold = t * alpha * beta, t * (1 - alpha) * beta * math.sqrt(group_size)
    largest = rows.amax(dim=1) if rows.shape[1] else rows.new_zeros(len(rows))
    if cut + threshold == 0:
        return torch.where(largest > 0, math.inf, 0.0)
    if threshold == 0:
        return largest / cut
    rows /= largest.clamp_min(torch.finfo(rows.dtype).tiny)[:, None]  # so that no square vanishes
    root = torch.zeros_like(largest)
    for _ in range(NUM_LETHAL_STEPS if cut > 0 else 1):
        left = (rows - cut * root[:, None]).clamp_min_(0)
        norms = torch.linalg.vector_norm(left, dim=1)
        slopes = cut * left.sum(dim=1) / norms.clamp_min(torch.finfo(rows.dtype).tiny) + threshold
        root += (norms - threshold * root).clamp_min_(0) / slopes
    return root * largest


def check_strength(beta: float, alpha: float) -> None:
    """`ValueError` unless beta >= 0 and 0 <= alpha <= 1."""
    if not beta >= 0 or math.isinf(beta):
        raise ValueError(f"penalty: beta is {beta}, must be a finite number >= 0; choose a beta such as 0.01")
    if not 0 <= alpha <= 1:
        raise ValueError(f"penalty: alpha is {alpha}, must lie in [0, 1]; 0 is group sparsity, 0.5 the paper's mixture")


class SparseGroupLasso:
    """r(Theta) = sum_l beta_l [ (1 - alpha_l) sqrt(P_l) sum_n |theta_l^n|_2 + alpha_l |theta_l|_1 ]  (eq. 2 and 4).

    `beta` and `alpha` are numbers, numbers by layer name, or schedules (layer name, step) -> number; alpha = 0 is the
    plain group penalty (GS). A layer that a mapping does not name has beta 0.
    """

    def __init__(self, *, beta: Strength, alpha: Strength = 0.0) -> None:
        self.beta, self.alpha = beta, alpha
        betas = beta.values() if isinstance(beta, Mapping) else [0.0] if callable(beta) else [beta]
        alphas = alpha.values() if isinstance(alpha, Mapping) else [0.0] if callable(alpha) else [alpha]
        for b in betas:
            for a in alphas:
                check_strength(b, a)

    def strength(self, layer: str, step: int) -> tuple[float, float]:
        """(beta, alpha) of a layer at a step, checked."""
        beta, alpha = _at(self.beta, layer, step), _at(self.alpha, layer, step)
        check_strength(beta, alpha)
        return beta, alpha

    def value(self, neurons: Neurons, *, step: int = 0) -> Tensor:
        """r(Theta) at the parameters' present values; a scalar, differentiable wherever no neuron is zero."""
        total = torch.zeros(())
        for layer in neurons:
            beta, alpha = self.strength(layer.name, step)
            parts = neurons.parts(layer)
            group = math.sqrt(layer.group_size) * row_norms(parts).sum()
            l1 = torch.stack([part.abs().sum() for part in parts]).sum()
            total = total.to(group) + beta * ((1 - alpha) * group + alpha * l1)
        return total

    def limits(self, layer: str, step: int, *, t: float, group_size: int) -> tuple[float, float, float]:
        """(cut, threshold, beta) of a layer's proximal step: s = S(x, cut), z = max(0, 1 - threshold / |s|) s."""
        beta, alpha = self.strength(layer, step)
        return t * alpha * beta, t * (1 - alpha) * beta * math.sqrt(group_size), beta

    def prox_(
        self, parts: Sequence[Tensor], *, layer: str, step: int, t: float, group_size: int, min_alive: int = 0,
        metric: Sequence[Tensor] | None = None,
    ) -> Prox:
        """Applies the proximal operator of t r to the neurons of one layer, in place, by torch's operations.

        parts: tensors (N, ...) that together hold the layer's neurons, one neuron a row. With `min_alive` at least that
        many neurons stay: the strongest of those that would be set to zero are left as they are.

        metric: of each part, above 0, the diagonal in which it is measured (`sparse_group_prox`); None: the identity.
        """
        cut, threshold, beta = self.limits(layer, step, t=t, group_size=group_size)
        if t * beta == 0:
            return Prox(dead=None, kept_by_force=False, beta=beta)
        if metric is None:
            shrunk = [soft_threshold(part, cut) for part in parts] if cut > 0 else list(parts)
            factors = shrink_factors(row_norms(shrunk), threshold)
            after = [s * _along(factors, s) for s in shrunk]
        else:
            weighted = [soft_threshold(part * d, cut) for part, d in zip(parts, metric, strict=True)]
            factors = norms_in_metric(weighted, metric, threshold)
            after = [_in_metric(a, d, factors, threshold) for a, d in zip(weighted, metric, strict=True)]
        dead, kept = dying(parts if metric is None else weighted, factors, min_alive=min_alive)
        for part, new in zip(parts, after, strict=True):
            saved = None if kept is None else part[kept].clone()
            part.copy_(new)
            if saved is not None:
                part[kept] = saved
        return Prox(dead=dead, kept_by_force=kept is not None, beta=beta)


def dying(parts: Sequence[Tensor], factors: Tensor, *, min_alive: int) -> tuple[Tensor, Tensor | None]:
    """Who is zero after a proximal step, bool (N,), and which of those that would be must stay for `min_alive`: the strongest, int64 (k,),
    or None where enough are left. parts: before the step; factors: (N,), what it multiplies with."""
    dead = factors == 0
    missing = min_alive - int((~dead).sum()) if min_alive else 0
    if missing <= 0:
        return dead, None
    norms = row_norms(parts).masked_fill_(~dead, -1)
    kept = norms.topk(min(missing, int(dead.sum()))).indices
    dead[kept] = norms[kept] == 0  # a neuron that was zero before stays dead
    return dead, kept


class Prox(NamedTuple):
    """What a proximal step did to a layer."""

    dead: Tensor | None
    """bool (N,): the neurons that are zero now; None where none is known to be."""
    kept_by_force: bool
    """Neurons would have died but for `min_alive`."""
    beta: float


def _at(strength: Strength, layer: str, step: int) -> float:
    if callable(strength):
        return strength(layer, step)
    return strength.get(layer, 0.0) if isinstance(strength, Mapping) else strength


@dataclass
class Schedule:
    """A factor over time, in epochs (fractions allowed): 0 before `start`, rising linearly over `ramp`, 1, then 0 from
    `end` on. start = 0, ramp = 0, end = None is constant."""

    start: float = 0.0
    """First epoch in which the value is not zero (a delayed start lets the layers find their directions first)."""
    ramp: float = 0.0
    """Epochs over which it rises linearly to its full value; 0 is at once."""
    end: float | None = None
    """Epoch from which it is zero again: a final phase without penalty. None: never."""

    def __post_init__(self) -> None:
        if self.start < 0 or self.ramp < 0 or (self.end is not None and self.end < self.start):
            raise ValueError(
                f"schedule: start {self.start}, ramp {self.ramp}, end {self.end}: "
                "needs start >= 0, ramp >= 0, end >= start"
            )

    def factor(self, epoch: float) -> float:
        if epoch < self.start or (self.end is not None and epoch >= self.end):
            return 0.0
        return 1.0 if self.ramp == 0 else min(1.0, (epoch - self.start) / self.ramp)


@dataclass
class PerLayer:
    """A value for the first layers, another for the rest, or by layer name."""

    rest: float = 0.0
    """The value of every layer that nothing else names."""
    first: float | None = None
    """The value of the first `num_first` layers in forward order; None: the same as the rest."""
    num_first: int = 1
    """How many layers are the first ones."""
    by_layer: dict[str, float] = field(default_factory=dict)
    """Values by layer name; they win over the other two."""

    def of(self, layers: Sequence[str]) -> dict[str, float]:
        unknown = sorted(set(self.by_layer) - set(layers))
        if unknown:
            raise ValueError(f"by_layer names {unknown[0]!r}, no layer with neurons; layers: {', '.join(layers)}")
        first = self.rest if self.first is None else self.first
        values = {name: first if i < self.num_first else self.rest for i, name in enumerate(layers)}
        return {**values, **self.by_layer}

    def values(self) -> list[float]:
        return [self.rest, *([] if self.first is None else [self.first]), *self.by_layer.values()]


@dataclass
class PenaltyConfig:
    """The penalty of a run. Off as long as every beta is 0."""

    beta: PerLayer = field(default_factory=PerLayer)
    """Strength; see `unit`."""
    beta_schedule: Schedule = field(default_factory=lambda: Schedule(start=1.0))
    """beta over time, in epochs."""
    alpha: PerLayer = field(default_factory=PerLayer)
    """Share of the L1 part, in [0, 1]: 0 is group sparsity (GS), 0.5 the paper's sparse group lasso (SGL)."""
    alpha_schedule: Schedule = field(default_factory=Schedule)
    """alpha over time, in epochs."""
    unit: str = "absolute"
    """"absolute": beta as in the objective. "epochs": beta is given as a number of epochs E and stands for the beta at
    which a neuron of the starting norm in `reference_layer`, never supported by the loss, dies after E epochs of the
    schedule, or as much less as E is longer than a schedule that has an end; a smaller E is a stronger penalty, 0 is no penalty."""
    reference_layer: str | None = None
    """The layer that fixes beta where the unit is epochs; None: the last layer with neurons."""
    every: str = "step"
    """When the proximal operator runs: "step", "epoch" (as in the paper), or a number N: every N steps."""
    revive: bool = False
    """True: the paper's plain behaviour, in which a zero neuron may come back. False: dead is dead."""
    min_alive: int = 1
    """Neurons that every layer keeps at least."""
    depth: bool = True
    """Layers that a shortcut leads around, as those inside a residual branch, may lose all of their neurons: what is left of the branch is
    a constant, and the number of layers is learned too. False: they keep `min_alive` as well."""
    groups: str = "neurons"
    """"neurons": each neuron is a group. "branches": the neurons of a layer that a shortcut leads around are one group together, so that
    branches go as a whole; other layers as before."""

    def __post_init__(self) -> None:
        if self.unit not in ("absolute", "epochs"):
            raise ValueError(f"penalty.unit is {self.unit!r}, must be absolute or epochs")
        if self.every not in ("step", "epoch") and not (self.every.isdigit() and int(self.every) > 0):
            raise ValueError(f"penalty.every is {self.every!r}, must be step, epoch, or a number of steps such as 10")
        if self.groups not in ("neurons", "branches"):
            raise ValueError(f"penalty.groups is {self.groups!r}, must be neurons or branches")
        if self.groups == "branches" and not self.depth:
            raise ValueError("penalty.groups is branches, but penalty.depth is false and no branch may go; set penalty.depth")
        if self.min_alive < 0:
            raise ValueError(f"penalty.min_alive is {self.min_alive}, must be >= 0")
        for beta in self.beta.values():
            check_strength(beta, 0.0)
        for alpha in self.alpha.values():
            check_strength(0.0, alpha)

    @property
    def enabled(self) -> bool:
        return any(beta > 0 for beta in self.beta.values())

    def without(self) -> PenaltyConfig:
        """The same run without penalty: what a baseline trains with."""
        return PenaltyConfig()

    @property
    def interval(self) -> str | int:
        return int(self.every) if self.every.isdigit() else self.every


def starting_betas(
    config: PenaltyConfig, neurons: Neurons, *, steps_per_epoch: int, learning_rate: Callable[[int], float]
) -> dict[str, float]:
    """beta of each layer in absolute units, {layer name: beta}, for the neurons of a network at its start.

    learning_rate: step -> learning rate; it gives t, and so what "dies after E epochs" means.
    """
    names = [layer.name for layer in neurons]
    betas = config.beta.of(names)
    if config.unit == "absolute" or not config.enabled:
        return betas
    reference = config.reference_layer or names[-1]
    if reference not in names:
        raise ValueError(f"penalty.reference_layer {reference!r} is no layer with neurons; layers: {', '.join(names)}")
    layer, alpha = neurons[reference], config.alpha.of(names)[reference]
    rows = torch.cat([part.detach().reshape(layer.num_neurons, -1) for part in neurons.parts(layer)], dim=1).double()[layer.mask]
    if not len(rows):
        raise ValueError(f"penalty.reference_layer {reference!r} has no neuron alive to say what an epoch is; name another layer")
    median = rows[rows.norm(dim=1).argsort()[len(rows) // 2]][None]
    beta_of = {0.0: 0.0}
    schedule = config.beta_schedule
    longest = math.inf if schedule.end is None or schedule.end == schedule.start else schedule.end - schedule.start
    for epochs in set(betas.values()) - {0.0}:
        within = min(epochs, longest)
        steps = _proximal_steps(config, alpha, within, steps_per_epoch=steps_per_epoch, learning_rate=learning_rate)
        beta_of[epochs] = _lethal_beta(median, steps, group_size=layer.group_size) * within / epochs
    return {name: beta_of[epochs] for name, epochs in betas.items()}


def make_penalty(
    config: PenaltyConfig, neurons: Neurons, *, betas: Mapping[str, float], steps_per_epoch: int, factor: Callable[[int], float] | None = None
) -> SparseGroupLasso:
    """The penalty that a config describes over time, with the `betas` that `starting_betas` gave. factor: of the betas at a step; None: the
    schedule's."""
    alphas = config.alpha.of([layer.name for layer in neurons])

    def beta(layer: str, step: int) -> float:
        return betas.get(layer, 0.0) * (config.beta_schedule.factor(step / steps_per_epoch) if factor is None else factor(step))

    def alpha(layer: str, step: int) -> float:
        return alphas.get(layer, 0.0) * config.alpha_schedule.factor(step / steps_per_epoch)

    return SparseGroupLasso(beta=beta, alpha=alpha)


def _proximal_steps(
    config: PenaltyConfig, alpha: float, epochs: float, *, steps_per_epoch: int, learning_rate: Callable[[int], float]
) -> list[tuple[float, float]]:
    """(t x factor of beta, alpha) of every proximal step in the first `epochs` epochs of the schedule of beta."""
    interval = steps_per_epoch if config.every == "epoch" else 1 if config.every == "step" else int(config.every)
    first = round(config.beta_schedule.start * steps_per_epoch)
    found = []
    for step in range(first, first + max(1, round(epochs * steps_per_epoch))):
        factor = config.beta_schedule.factor(step / steps_per_epoch)
        if (step + 1) % interval == 0 and factor > 0:
            t = math.fsum(learning_rate(s) for s in range(max(0, step + 1 - interval), step + 1))
            found.append((t * factor, alpha * config.alpha_schedule.factor(step / steps_per_epoch)))
    if not any(t > 0 for t, _ in found):
        raise ValueError(
            f"penalty: no step of the first {epochs:g} epochs after beta_schedule.start has a penalty; "
            "move beta_schedule.end, or run the operator more often (penalty.every)"
        )
    return found


def _lethal_beta(row: Tensor, steps: Sequence[tuple[float, float]], *, group_size: int) -> float:
    """The smallest beta at which the proximal steps (t, alpha) alone take a neuron, (1, P), to zero.

    A step takes from the norm at least t beta ((1 - alpha) sqrt(P) + alpha) and at most t beta sqrt(P); bisection
    between the two over the very steps, so that ramps, learning-rate drops and the L1 part count as they will.
    """
    norm, root = float(row.norm()), math.sqrt(group_size)

    def dies(beta: float) -> bool:
        theta = row
        for t, alpha in steps:
            theta = sparse_group_prox(theta, t=t, beta=beta, alpha=alpha, group_size=group_size)
        return not bool(theta.any())

    low = norm / math.fsum(t * root for t, _ in steps)
    high = norm / math.fsum(t * ((1 - alpha) * root + alpha) for t, alpha in steps)
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if dies(middle) else (middle, high)
    return high * (1 + 1e-6)  # or rounding may cost one more step
