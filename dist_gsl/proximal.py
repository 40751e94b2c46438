"""SGD with a proximal step: called by hand, or run by DDP as soon as a bucket of gradients is reduced.

One step is two phases. First every parameter takes its gradient step, and every neuron whose last part has arrived
takes its proximal step; buckets finish last layer first and on several threads, so nothing here may depend on their
order. Then, when all are done, neurons that reached zero are killed: momentum and readers are cleared, for good.
Imports torch alone.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_gsl import kernels
from dist_gsl.neurons import NeuronLayer, Neurons, Slice
from dist_gsl.penalty import Prox, SparseGroupLasso, row_norms
from dist_gsl.tracing import check_precision

GROUPS = ("neurons", "branches")


class ProximalSGD(torch.optim.Optimizer):
    """Minimises loss + r(Theta) by proximal SGD: theta <- prox_{t r}(theta - lr * direction).

    The direction is torch.optim.SGD's (momentum, Nesterov, weight decay), bit for bit. The operator runs every step,
    every N steps (`every=N`), or when `end_epoch()` is called (`every="epoch"`, as in the paper); its t is the sum of
    the learning rates since it last ran. With `revive=False` a neuron that reaches zero is dead: it is masked, its
    momentum and the weights that read it are cleared, and its gradient is exactly zero from then on. With `revive=True`
    it may come back, by its momentum or its gradient, as in the paper. Each layer keeps at least `min_alive` neurons; with
    `depth` those that a way around exists for (`layer.bypassed`, the inside of a residual branch) may lose all of them, so
    that the number of layers is learned too. With `groups="branches"` all neurons of such a layer are one group, which lives
    or dies as a whole.

    `ValueError` where a neuron's parameters are missing, lie in groups of different learning rates, or are not float32
    or float64. `NotCompiledError` where the compiled proximal step is missing.
    """

    def __init__(
        self,
        params: Iterable[Any],
        neurons: Neurons,
        penalty: SparseGroupLasso,
        *,
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        every: str | int = "step",
        revive: bool = False,
        min_alive: int = 1,
        depth: bool = True,
        groups: str = "neurons",
    ) -> None:
        if nesterov and momentum <= 0:
            raise ValueError("ProximalSGD: nesterov needs a momentum above 0")
        if every not in ("step", "epoch") and not (isinstance(every, int) and every >= 1):
            raise ValueError(f'ProximalSGD: every is {every!r}, must be "step", "epoch", or a number of steps')
        if groups not in GROUPS:
            raise ValueError(f'ProximalSGD: groups is {groups!r}, must be one of {", ".join(GROUPS)}')
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        check_precision(neurons.model)
        kernels.check(p for p in neurons.model.parameters())
        self.neurons, self.penalty = neurons, penalty
        self.every, self.revive, self.min_alive, self.depth, self.groups = every, revive, min_alive, depth, groups
        self.num_steps = 0
        self._since_prox = [0.0] * len(self.param_groups)  # sum of learning rates per parameter group
        self._group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        self._layer_groups = {layer.name: self._groups_of(layer) for layer in neurons}
        self._reading: dict[Tensor, list[tuple[NeuronLayer, Slice]]] = {}
        for layer in neurons:
            for piece in layer.readers:
                if piece.absorber is not None:
                    self._reading.setdefault(neurons.parameter(piece.tensor), []).append((layer, piece))
        self._proxes: dict[str, Prox] = {}
        self._warned: set[str] = set()
        self._backward: _InBackward | None = None
        self._opt_called = False  # read by torch's learning-rate schedulers
        neurons.register_copy(self._momentum)

    # --- by hand

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Gradient step, proximal step, deaths. `RuntimeError` once attached to DDP, where backward() steps itself."""
        if self._backward is not None and not self._backward.stepping:
            raise RuntimeError(
                "ProximalSGD is attached to DDP: backward() has already stepped; leave out optimizer.step()"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin_step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update_(p, p.grad, group)
        if self.prox_is_due:
            for layer in self.neurons:
                self.prox_(layer)
        self.finish_step()
        return loss

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Runs the proximal operator where `every` is "epoch"; call it at the end of each epoch. Else does nothing."""
        if self.every == "epoch":
            for layer in self.neurons:
                self.prox_(layer)
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
        self._backward = _InBackward(self, ddp, max_grad_norm=max_grad_norm, scaler=scaler)

    def detach(self) -> None:
        """Lets go of the DDP module that it was attached to, which cannot be trained with any more: the module's reducer holds the hook,
        which holds both, and no garbage collector sees that."""
        if self._backward is not None:
            self._backward.release()
            self._backward = None

    def set_num_samples(self, num_samples: int) -> None:
        """Says that the next backward's gradient is of a sum over this many local samples (over all its accumulated
        parts): it is divided by the number of samples of all workers, so that uneven batches weigh right."""
        if self._backward is None:
            raise RuntimeError(
                "ProximalSGD.set_num_samples divides in DDP's hook: call attach(ddp) first, or use a mean loss"
            )
        self._backward.count_samples(num_samples)

    # --- the pieces of a step; both ways above run these and nothing else

    def begin_step(self) -> None:
        self.num_steps += 1
        self._since_prox = [t + group["lr"] for t, group in zip(self._since_prox, self.param_groups, strict=True)]
        self._check_rates()

    @property
    def prox_is_due(self) -> bool:
        return self.every != "epoch" and self.num_steps % (1 if self.every == "step" else int(self.every)) == 0

    def update_(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """torch.optim.SGD's update of one parameter, in place."""
        self.mask_gradient_(p, grad)
        if group["weight_decay"]:
            grad = grad.add(p, alpha=group["weight_decay"])
        if group["momentum"]:
            buffer = self.state[p].get("momentum_buffer")
            if buffer is None:
                buffer = self.state[p]["momentum_buffer"] = grad.clone()
            else:
                buffer.mul_(group["momentum"]).add_(grad)
            grad = grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
        p.add_(grad, alpha=-group["lr"])

    def mask_gradient_(self, p: Tensor, grad: Tensor) -> None:
        """Clears the gradient of weights that read the dead, in place: it is zero by itself but where the dead give f(0) != 0. A step does
        it; who clips norms by hand before `step()` calls it first."""
        if not self.revive:
            for layer, piece in self._reading.get(p, ()):
                if not layer.mask.all():
                    piece.clear_(grad, (~layer.mask).nonzero().flatten())

    def prox_(self, layer: NeuronLayer) -> None:
        """The proximal step of one layer; who died is kept for `finish_step`."""
        if layer.num_neurons == 0:  # a branch that was removed
            return
        parts = self.neurons.parts(layer)
        min_alive = 0 if self.depth and layer.bypassed else self.min_alive
        t = self._since_prox[self._layer_groups[layer.name][0]]
        is_one_group = self.groups == "branches" and layer.bypassed and self.depth
        size = layer.group_size * layer.starting_neurons if is_one_group else layer.group_size
        groups = [part.unsqueeze(0) for part in parts] if is_one_group else parts
        prox = self.penalty.prox_(groups, layer=layer.name, step=self.num_steps - 1, t=t, group_size=size, min_alive=min_alive)
        if is_one_group and prox.dead is not None:
            prox = replace(prox, dead=prox.dead.expand(layer.num_neurons))
        self._proxes[layer.name] = prox
        for piece, rows in zip(layer.producers, parts, strict=True):
            piece.write_(self.neurons.parameter(piece.tensor), rows)

    def finish_step(self) -> None:
        """Second phase: kills what reached zero. Nothing of it may run before all layers have had their first phase,
        because it writes to the readers, which are other layers' parameters."""
        if self._proxes and self.every != "epoch":
            self._since_prox = [0.0] * len(self.param_groups)
        for name, prox in self._proxes.items():
            layer = self.neurons[name]
            if prox.kept_by_force and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"layer {name!r}: beta {prox.beta:.4g} would kill every neuron; the strongest "
                    f"stay, {self.min_alive} in all (min_alive). Lower beta for this layer or start it later",
                    stacklevel=2,
                )
            if self.revive:  # without penalty too: a neuron that was zero may have come back since
                layer.mask = (row_norms(self.neurons.parts(layer)) > 0).to(layer.mask.device)
            elif prox.dead is not None:
                dead = prox.dead.to(layer.mask.device) & layer.mask
                if bool(dead.any()):
                    self.neurons.zero_({name: dead.nonzero().flatten()})
        self._proxes = {}

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
        state = dict(state_dict)
        if "neurons" not in state:
            raise ValueError("ProximalSGD: the state has no neurons: it is another optimizer's, load a ProximalSGD's")
        self.neurons.load_state_dict(state.pop("neurons"))
        self.num_steps, self._since_prox = int(state.pop("num_steps")), [float(t) for t in state.pop("since_prox")]
        super().load_state_dict(state)

    def _momentum(self) -> list[dict[str, Tensor]]:
        buffers = {}
        for name, p in self.neurons.model.named_parameters():
            buffer = self.state[p].get("momentum_buffer") if p in self.state else None
            if buffer is not None:
                buffers[name] = buffer
        return [buffers]

    def _groups_of(self, layer: NeuronLayer) -> list[int]:
        groups = set()
        for piece in layer.producers:
            p = self.neurons.parameter(piece.tensor)
            if p not in self._group_of:
                raise ValueError(
                    f"ProximalSGD: {piece.tensor!r} belongs to neurons of {layer.name!r} but is not optimized; "
                    "pass all of the model's parameters"
                )
            if not p.requires_grad and p.numel() > 0:
                raise ValueError(
                    f"ProximalSGD: {piece.tensor!r} belongs to neurons of {layer.name!r} but is frozen: "
                    "they could never reach zero; unfreeze it"
                )
            groups.add(self._group_of[p])
        return sorted(groups)

    def _check_rates(self) -> None:
        for name, groups in self._layer_groups.items():
            rates = {self.param_groups[i]["lr"] for i in groups}
            if len(rates) > 1:
                raise ValueError(f"ProximalSGD: the neurons of {name!r} lie in parameter groups of learning rates "
                                 f"{sorted(rates)}; one neuron needs one rate, put its parameters into one group")


class _InBackward:
    """Runs an optimizer's step from DDP's communication hook."""

    def __init__(
        self, optimizer: ProximalSGD, ddp: DistributedDataParallel, *, max_grad_norm: float | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.optimizer, self.ddp, self.max_grad_norm, self.scaler = optimizer, ddp, max_grad_norm, scaler
        reasons = [
            text for text, given in (
                ("a GradScaler may skip the step", scaler is not None),
                ("the norm is clipped over all gradients", max_grad_norm is not None),
                ("DDP looks for unused parameters", ddp.find_unused_parameters),
            ) if given
        ]
        self.overlap = not reasons
        if reasons:
            warnings.warn(f"stepping after backward, not within it: {', '.join(reasons)}", stacklevel=3)
        self.stepping = False
        self._work: list[Any] = []  # the futures of this backward's buckets
        self._samples: tuple[Tensor, Any] | None = None
        self._lock = threading.Lock()
        self._layers_of: dict[Tensor, list[NeuronLayer]] = {}
        for layer in optimizer.neurons:
            for piece in layer.producers:
                p = optimizer.neurons.parameter(piece.tensor)
                if p.requires_grad:  # what has no entries any more takes no gradient
                    self._layers_of.setdefault(p, []).append(layer)
        self._num_pieces = Counter(layer.name for layers in self._layers_of.values() for layer in layers)
        self._pending: dict[str, int] = {}
        ddp.register_comm_hook(None, self._hook)

    def release(self) -> None:
        """Holds nothing any more."""
        del self.optimizer, self.ddp, self._layers_of

    def count_samples(self, num_samples: int) -> None:
        device = next(self.ddp.module.parameters()).device
        count = torch.tensor(float(num_samples), device=device)
        self._samples = count, dist.all_reduce(count, group=self.ddp.process_group, async_op=True)

    def _hook(self, _state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if not self._work:
            self._begin()
        buffer, parameters = bucket.buffer(), bucket.parameters()
        gradients = [  # bucket.gradients() reads channels_last parameters in the wrong order
            g.as_strided(p.shape, p.stride(), g.storage_offset())
            for p, g in zip(parameters, bucket.gradients(), strict=True)
        ]

        def reduced(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            flat = future.value()[0]
            with torch.no_grad():  # pool threads have gradients on
                flat.div_(self._divisor())
                if self.overlap:
                    self._step(parameters, gradients)
            return flat

        future = dist.all_reduce(buffer, group=self.ddp.process_group, async_op=True).get_future().then(reduced)
        self._work.append(future)
        return future

    def _begin(self) -> None:
        """Before the first bucket of a backward."""
        if self.overlap:
            self.optimizer.begin_step()
            self._pending = dict(self._num_pieces)
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _divisor(self) -> Tensor | int:
        if self._samples is None:
            return dist.get_world_size(self.ddp.process_group)
        count, work = self._samples
        work.wait()
        return count

    def _step(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        optimizer = self.optimizer
        for p, g in zip(parameters, gradients, strict=True):
            optimizer.update_(p, g, optimizer.param_groups[optimizer._group_of[p]])
        if not optimizer.prox_is_due:
            return
        complete: list[NeuronLayer] = []
        with self._lock:  # a neuron's filter, bias and BatchNorm pair can arrive on different threads
            for p in parameters:
                for layer in self._layers_of.get(p, []):
                    self._pending[layer.name] -= 1
                    if self._pending[layer.name] == 0:
                        complete.append(layer)
        for layer in complete:
            optimizer.prox_(layer)

    @torch.no_grad()
    def _end(self) -> None:
        """When backward ends: all buckets are waited for before the second phase."""
        for future in self._work:
            future.wait()
        self._work, self._samples = [], None
        if self.overlap:
            self.optimizer.finish_step()
            self.optimizer._opt_called = True  # or learning-rate schedulers warn that step() was never called
        else:
            # DDP queues its own last work, copying gradients of unused parameters, before this comes round again.
            torch.autograd.Variable._execution_engine.queue_callback(self._step_after_backward)

    def _step_after_backward(self) -> None:
        optimizer = self.optimizer
        self.stepping = True
        try:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            if self.max_grad_norm is not None:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                for p in parameters:
                    if p.grad is not None:
                        optimizer.mask_gradient_(p, p.grad)
                torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            if self.scaler is not None:
                self.scaler.step(optimizer)
                self.scaler.update()
            else:
                optimizer.step()
        finally:
            self.stepping = False
