"""Optimizers with a proximal step: called by hand, or run by DDP as soon as a bucket of gradients is reduced (`hook`).

One step is two phases. First every parameter takes its gradient step, and every layer whose parts have all arrived its
proximal step. Then, when all are done, neurons that reached zero are killed: momentum and readers are cleared, for good.
Imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw

from dist_gsl import kernels
from dist_gsl.hook import InBackward
from dist_gsl.neurons import NeuronLayer, Neurons, Slice
from dist_gsl.operator import ProximalOperator
from dist_gsl.penalty import SparseGroupLasso
from dist_gsl.tracing import check_precision

GROUPS = ("neurons", "branches")


class ProximalOptimizer(torch.optim.Optimizer):
    """Minimises loss + r(Theta): a gradient step on the loss of the kind that a subclass takes, then a proximal step on the penalty.

    The operator runs every step,
    every N steps (`every=N`), or when `end_epoch()` or `run_operator()` is called (`every="epoch"`, as in the paper); its t is the sum of
    the learning rates since it last ran. With `revive=False` a neuron that reaches zero is dead: it is masked, its
    momentum and the weights that read it are cleared, and its gradient is exactly zero from then on. With `revive=True`
    it may come back, by its momentum or its gradient, as in the paper. Each layer keeps at least `min_alive` neurons; with
    `depth` those that a way around exists for (`layer.bypassed`, the inside of a residual branch) may lose all of them, so
    that the number of layers is learned too. With `groups="branches"` all neurons of such a layer are one group, which lives
    or dies as a whole.

    On a GPU the host hears of deaths when a mask is read, and a step makes it wait for nothing. Gradients are to be made anew for every step then
    (`zero_grad()`): what is left of a dead neuron's in them is cleared only when it is heard of.

    `ValueError` where a neuron's parameters are missing, lie in groups of different learning rates, or are not float32
    or float64. `NotCompiledError` where the compiled proximal step is missing.
    """

    MIRRORS: tuple[str, ...] = ()
    """Entries of a parameter's state that have its shape: a death clears them, and removal cuts them."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        neurons: Neurons,
        penalty: SparseGroupLasso,
        *,
        every: str | int = "step",
        revive: bool = False,
        min_alive: int = 1,
        depth: bool = True,
        groups: str = "neurons",
        metric_of: Callable[[NeuronLayer], list[Tensor]] | None = None,
    ) -> None:
        """metric_of: the diagonal of the metric in which the proximal step measures a layer's parts, (N, ...) each, or nothing where they have
        not moved yet and take none; None: the identity."""
        name = type(self).__name__
        if every not in ("step", "epoch") and not (isinstance(every, int) and every >= 1):
            raise ValueError(f'{name}: every is {every!r}, must be "step", "epoch", or a number of steps')
        if groups not in GROUPS:
            raise ValueError(f'{name}: groups is {groups!r}, must be one of {", ".join(GROUPS)}')
        super().__init__(params, defaults)
        check_precision(neurons.model)
        kernels.check(p for p in neurons.model.parameters())
        self.neurons, self.penalty = neurons, penalty
        self.every, self.revive, self.min_alive, self.depth, self.groups = every, revive, min_alive, depth, groups
        self.num_steps = 0
        self._since_prox = [0.0] * len(self.param_groups)  # sum of learning rates per parameter group
        self._group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        self._layer_groups = {layer.name: self._groups_of(layer) for layer in neurons}
        self._in_several_groups = {name: groups for name, groups in self._layer_groups.items() if len(groups) > 1}
        self._reading: dict[Tensor, list[tuple[NeuronLayer, Slice]]] = {}
        for layer in neurons:
            for piece in layer.readers:
                if piece.absorber is not None:
                    self._reading.setdefault(neurons.parameter(piece.tensor), []).append((layer, piece))
        self._operator = ProximalOperator(
            neurons, penalty, revive=revive, min_alive=min_alive, depth=depth, branches_are_groups=groups == "branches", metric_of=metric_of
        )
        self._backward: InBackward | None = None
        self._opt_called = False  # read by torch's learning-rate schedulers
        neurons.register_copy(self.mirrors)

    # --- by hand

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Gradient step, proximal step, deaths. `RuntimeError` once attached to DDP, where backward() steps itself."""
        if self._backward is not None and not self._backward.stepping:
            raise RuntimeError(
                f"{type(self).__name__} is attached to DDP: backward() has already stepped; leave out optimizer.step()"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin_step()
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            self.update_(given, [p.grad for p in given], group)
        if self.prox_is_due:
            self.prox_(self.neurons)
        self.finish_step()
        return loss

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Runs the proximal operator where `every` is "epoch"; call it at the end of each epoch. Else does nothing."""
        if self.every == "epoch":
            self.run_operator()

    @torch.no_grad()
    def run_operator(self) -> None:
        """Runs the proximal operator now, with the t of all steps since it ran last."""
        self.prox_(self.neurons)
        self._since_prox = [0.0] * len(self.param_groups)
        self.finish_step()

    # --- in DDP's communication hook

    def attach(
        self,
        ddp: DistributedDataParallel,
        *,
        max_grad_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Steps inside backward: each bucket's gradients are reduced, divided, stepped and shrunk while backward still
        works on earlier layers. Call zero_grad() as usual and leave out step().

        Gradients are averaged over workers as DDP does, or, after `set_num_samples`, over samples. Where overlap cannot
        be right (a GradScaler, clipping of the global norm, DDP's find_unused_parameters) the step is taken when
        backward has ended, and a warning says so.
        """
        self._backward = InBackward(self, ddp, max_grad_norm=max_grad_norm, scaler=scaler)

    def detach(self) -> None:
        """Lets go of the DDP module that it was attached to, which cannot be trained with any more: the module's reducer holds the hook,
        which holds both, and no garbage collector sees that."""
        if self._backward is not None:
            self._backward.release()
            self._backward = None

    def set_num_samples(self, num_samples: int, *, total: int | None = None) -> None:
        """Says that the next backward's gradient is of a sum over this many local samples (over all its accumulated
        parts): it is divided by the number of samples of all workers, so that uneven batches weigh right. That number is summed over
        the workers, or `total` where the caller knows it."""
        if self._backward is None:
            raise RuntimeError(
                f"{type(self).__name__}.set_num_samples divides in DDP's hook: call attach(ddp) first, or use a mean loss"
            )
        self._backward.count_samples(num_samples, total)

    # --- the pieces of a step; both ways above run these and nothing else

    def begin_step(self) -> None:
        self.num_steps += 1
        self._since_prox = [t + group["lr"] for t, group in zip(self._since_prox, self.param_groups, strict=True)]
        self._check_rates()

    @property
    def warned(self) -> set[str]:
        """Layers of which it was told that `min_alive` alone keeps neurons in them."""
        return self._operator.warned

    @property
    def prox_is_due(self) -> bool:
        return self.every != "epoch" and self.num_steps % (1 if self.every == "step" else int(self.every)) == 0

    def update_(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """The gradient step of parameters of one group, in place, all at once."""
        if not parameters:
            return
        if self._reading:
            for p, gradient in zip(parameters, gradients, strict=True):
                self.mask_gradient_(p, gradient)
        self._update_(parameters, gradients, group)

    def _update_(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError

    def lethal_factors(self, layer: NeuronLayer, *, beta: float, alpha: float) -> Tensor:
        """By what beta would have to be multiplied at least for the operator, if it ran now, to take each neuron to zero, (num_neurons,) float64 on
        the CPU: 0 of the dead, inf of those that nothing kills, as of the strongest, as many as `min_alive` keeps."""
        return self._operator.lethal_factors(layer, beta=beta, alpha=alpha, t=self._since_prox[self._layer_groups[layer.name][0]])

    def pull_weights(self, layer: NeuronLayer) -> Tensor:
        """By how much more than in the identity's metric a proximal step takes from each neuron's norm, (num_neurons,) float64 on the CPU: the mean
        of 1 / d over the neuron's entries, weighed by their squares."""
        metric = None if self._operator.metric_of is None else self._operator.metric_of(layer)
        if not metric or layer.num_neurons == 0:  # a branch that was emptied
            return torch.ones(layer.num_neurons, dtype=torch.float64)
        parts = self.neurons.parts(layer)
        squares, weighed = torch.zeros(layer.num_neurons, dtype=torch.float64), torch.zeros(layer.num_neurons, dtype=torch.float64)
        for part, d in zip(parts, metric, strict=True):
            entries = part.detach().double().square()
            squares += entries.reshape(layer.num_neurons, -1).sum(1).cpu()
            weighed += (entries / d).reshape(layer.num_neurons, -1).sum(1).cpu()
        return weighed / squares.clamp_min(torch.finfo(torch.float64).tiny)

    def mask_gradient_(self, p: Tensor, grad: Tensor) -> None:
        """Clears the gradient of weights that read the dead, in place: it is zero by itself but where the dead give f(0) != 0. A step does
        it; who clips norms by hand before `step()` calls it first."""
        if not self.revive:
            for layer, piece in self._reading.get(p, ()):
                if not layer.mask.all():
                    piece.clear_(grad, (~layer.mask).nonzero().flatten())

    def prox_(self, layers: Iterable[NeuronLayer]) -> None:
        """The proximal step of layers; who died is kept for `finish_step`."""
        rates = self._since_prox
        self._operator.shrink_(layers, step=self.num_steps - 1, t_of=lambda layer: rates[self._layer_groups[layer.name][0]])

    def finish_step(self) -> None:
        """Second phase: kills what reached zero. Nothing of it may run before all layers have had their first phase,
        because it writes to the readers, which are other layers' parameters."""
        if self._operator.has_shrunk and self.every != "epoch":
            self._since_prox = [0.0] * len(self.param_groups)
        self._operator.bury_()

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """torch's state, the count of steps, the running t, and the neurons' masks: all that the next step reads."""
        return {
            **super().state_dict(),
            "num_steps": self.num_steps,
            "since_prox": list(self._since_prox),
            "neurons": self.neurons.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, masks included. `ValueError` if it is of another network."""
        state, name = dict(state_dict), type(self).__name__
        if "neurons" not in state:
            raise ValueError(f"{name}: the state has no neurons: it is another optimizer's, load a {name}'s")
        lacking = [key for group in state["param_groups"] for key in self.defaults if key not in group]
        if lacking:
            raise ValueError(f"{name}: the state has no {lacking[0]!r}: it is another optimizer's, load a {name}'s")
        self.neurons.load_state_dict(state.pop("neurons"))
        self._operator.forget()
        self.num_steps, self._since_prox = int(state.pop("num_steps")), [float(t) for t in state.pop("since_prox")]
        super().load_state_dict(state)
        self._operator.forget_copies()

    def mirrors(self) -> list[dict[str, Tensor]]:
        """What of the state has the shape of parameters, {name of the parameter: tensor} each."""
        names = {p: name for name, p in self.neurons.model.named_parameters() if self.state.get(p)}
        return [{name: self.state[p][key] for p, name in names.items() if self.state[p].get(key) is not None} for key in self.MIRRORS]

    def _groups_of(self, layer: NeuronLayer) -> list[int]:
        groups = set()
        for piece in layer.producers:
            p = self.neurons.parameter(piece.tensor)
            if p not in self._group_of:
                raise ValueError(
                    f"{type(self).__name__}: {piece.tensor!r} belongs to neurons of {layer.name!r} but is not optimized; "
                    "pass all of the model's parameters"
                )
            if not p.requires_grad and p.numel() > 0:
                raise ValueError(
                    f"{type(self).__name__}: {piece.tensor!r} belongs to neurons of {layer.name!r} but is frozen: "
                    "they could never reach zero; unfreeze it"
                )
            groups.add(self._group_of[p])
        return sorted(groups)

    def _check_rates(self) -> None:
        for name, groups in self._in_several_groups.items():
            rates = {self.param_groups[i]["lr"] for i in groups}
            if len(rates) > 1:
                raise ValueError(f"{type(self).__name__}: the neurons of {name!r} lie in parameter groups of learning rates "
                                 f"{sorted(rates)}; one neuron needs one rate, put its parameters into one group")


class ProximalSGD(ProximalOptimizer):
    """Proximal SGD: theta <- prox_{t r}(theta - lr * direction), the direction being torch.optim.SGD's (momentum, Nesterov, weight decay), bit for
    bit. The rest is `ProximalOptimizer`'s."""

    MIRRORS = ("momentum_buffer",)

    def __init__(
        self, params: Iterable[Any], neurons: Neurons, penalty: SparseGroupLasso, *, lr: float, momentum: float = 0.0, nesterov: bool = False,
        weight_decay: float = 0.0, every: str | int = "step", revive: bool = False, min_alive: int = 1, depth: bool = True,
        groups: str = "neurons",
    ) -> None:  # fmt: skip
        if nesterov and momentum <= 0:
            raise ValueError("ProximalSGD: nesterov needs a momentum above 0")
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, defaults, neurons, penalty, every=every, revive=revive, min_alive=min_alive, depth=depth, groups=groups)

    def _update_(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        directions: Any = gradients
        if group["weight_decay"]:
            directions = torch._foreach_add(directions, parameters, alpha=group["weight_decay"])
        if group["momentum"]:
            buffers = self._moved(parameters, directions, group["momentum"])
            directions = torch._foreach_add(directions, buffers, alpha=group["momentum"]) if group["nesterov"] else buffers
        torch._foreach_add_(parameters, directions, alpha=-group["lr"])

    def _moved(self, parameters: list[Tensor], directions: Sequence[Tensor], momentum: float) -> list[Tensor]:
        """The parameters' momentum after another direction."""
        moving = [(self.state[p]["momentum_buffer"], d) for p, d in zip(parameters, directions, strict=True) if self.state.get(p)]
        if len(moving) < len(parameters):  # first gradients
            for p, direction in zip(parameters, directions, strict=True):
                if not self.state.get(p):
                    self.state[p]["momentum_buffer"] = direction.clone()
            self._operator.forget_copies()
        if moving:
            torch._foreach_mul_([buffer for buffer, _ in moving], momentum)
            torch._foreach_add_([buffer for buffer, _ in moving], [direction for _, direction in moving])
        return [self.state[p]["momentum_buffer"] for p in parameters]


class ProximalAdamW(ProximalOptimizer):
    """Proximal AdamW: torch.optim.AdamW's step, bit for bit, then the proximal step in the metric in which Adam takes its own:
    z = argmin 1/(2 t) |z - theta|_D^2 + r(z), with D = sqrt(v / (1 - beta2^k)) + eps after k steps.

    In the identity's metric, as if it were SGD's, the result would not be a stationary point of loss + r: each weight has a step size of its own,
    and the penalty has to share it. Under D the operator has no closed form for groups; the one equation that each neuron leaves is solved
    to rounding (`penalty.norms_in_metric`). Weight decay is decoupled, as in AdamW. With `every` above a step, D is the last step's. On a GPU too it
    goes by torch's operations, and the host hears of deaths at once.

    The rest is `ProximalOptimizer`'s.
    """

    MIRRORS = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, params: Iterable[Any], neurons: Neurons, penalty: SparseGroupLasso, *, lr: float, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0, every: str | int = "step", revive: bool = False, min_alive: int = 1, depth: bool = True,
        groups: str = "neurons",
    ) -> None:  # fmt: skip
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"ProximalAdamW: betas are {betas}, must lie in [0, 1)")
        if eps <= 0:
            raise ValueError(f"ProximalAdamW: eps is {eps}, must be above 0")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, neurons, penalty, every=every, revive=revive, min_alive=min_alive, depth=depth, groups=groups, metric_of=self._metric_of)

    def _update_(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        new = [p for p in parameters if not self.state.get(p)]
        for p in new:
            zeros = {key: torch.zeros_like(p, memory_format=torch.preserve_format) for key in self.MIRRORS}
            self.state[p].update({"step": torch.tensor(0.0), **zeros})
        if new:
            self._operator.forget_copies()
        steps, moments, squares = ([self.state[p][key] for p in parameters] for key in ("step", *self.MIRRORS))
        beta1, beta2 = group["betas"]
        adamw(
            parameters, gradients, moments, squares, [], steps, foreach=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip

    def _metric_of(self, layer: NeuronLayer) -> list[Tensor]:
        metric = []
        for piece in layer.producers:
            p = self.neurons.parameter(piece.tensor)
            group, state = self.param_groups[self._group_of[p]], self.state.get(p)
            if p.numel() == 0:  # all that it read was a branch that is gone
                metric.append(piece.rows(p.detach()))
                continue
            if not state:
                return []
            bias = 1 - group["betas"][1] ** float(state["step"])
            metric.append((piece.rows(state["exp_avg_sq"]) / bias).sqrt_().add_(group["eps"]))
        return metric
