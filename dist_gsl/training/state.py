"""The state of a run, and the one way to make it: start, resume and a change of widths all go through `build`.

Imports torch alone.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_gsl import removal
from dist_gsl.attention import UnevenMultiheadAttention
from dist_gsl.compaction import GPU_WIDTHS, check_dead_are_zero, compact
from dist_gsl.models import create_model
from dist_gsl.neurons import Neurons
from dist_gsl.penalty import PenaltyConfig, SparseGroupLasso, make_penalty, row_norms, starting_betas
from dist_gsl.proximal import ProximalAdamW, ProximalOptimizer, ProximalSGD
from dist_gsl.removal import Removal
from dist_gsl.tracing import find_neurons
from dist_gsl.training import checkpoint, initial
from dist_gsl.training.budget import Cost, Target
from dist_gsl.training.config import TrainConfig
from dist_gsl.training.steering import Steering, make_steering


@dataclass
class Position:
    """Where a run stands: `epoch` whole epochs and `step` steps of the next are done."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """A part of a step's samples that is run through the network at once."""

    number: int
    """Counted over all processes, in the order of the samples."""
    size: int


class MovingAverage(AveragedModel):
    """torch's exponential moving average of parameters and buffers, by its function. torch takes the count of updates to the device in each of
    them, and the host waits for that."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.average_ = get_ema_multi_avg_fn(decay)
        super().__init__(model, multi_avg_fn=self.average_, use_buffers=True)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        pairs = zip((*self.module.parameters(), *self.module.buffers()), (*model.parameters(), *model.buffers()), strict=True)
        for averaged, tensor in pairs:
            its_averaged, its_tensors = by_type.setdefault(averaged.dtype, ([], []))
            its_averaged.append(averaged)
            its_tensors.append(tensor)
        for its_averaged, its_tensors in by_type.values():
            if self.n_averaged == 0:
                torch._foreach_copy_(its_averaged, its_tensors)
            else:
                self.average_(its_averaged, its_tensors, self.n_averaged)
        self.n_averaged += 1


@dataclass(frozen=True)
class Setup:
    """What a network is trained with, whatever its widths."""

    train: TrainConfig
    penalty: PenaltyConfig
    steps_per_epoch: int
    device: torch.device

    @property
    def multiple_of(self) -> int:
        """Of which widths stay multiples when the dead leave training."""
        return self.train.shrink_multiple_of or (GPU_WIDTHS if self.device.type == "cuda" else 1)

    def learning_rate(self, step: int) -> float:
        return self.train.learning_rate_at(step, steps_per_epoch=self.steps_per_epoch)

    def wrapped(
        self, model: nn.Module, neurons: Neurons, regulariser: SparseGroupLasso, *, every: str | int | None = None
    ) -> tuple[DistributedDataParallel, ProximalOptimizer]:
        """DDP and the optimizer of a network, attached to it. every: when it runs the operator, where that is not the penalty's `every`."""
        ddp = DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)
        ddp.broadcast_buffers = buffers_matter(model)  # at the start they are, whatever torch's version calls the argument
        train, penalty = self.train, self.penalty
        options: dict[str, Any] = {
            "lr": self.learning_rate(0), "weight_decay": train.weight_decay, "every": every or penalty.interval, "revive": penalty.revive,
            "min_alive": penalty.min_alive, "depth": penalty.depth, "groups": penalty.groups,
        }  # fmt: skip
        optimizer: ProximalOptimizer
        if train.optimizer == "adamw":
            betas = (train.adam_betas[0], train.adam_betas[1])
            optimizer = ProximalAdamW(model.parameters(), neurons, regulariser, betas=betas, eps=train.adam_eps, **options)
        else:
            optimizer = ProximalSGD(model.parameters(), neurons, regulariser, momentum=train.momentum, nesterov=train.nesterov, **options)
        optimizer.attach(ddp, max_grad_norm=train.max_grad_norm)
        return ddp, optimizer

    def average(self, model: nn.Module, neurons: Neurons, values: Mapping[str, Tensor] | None = None) -> MovingAverage | None:
        """The moving average of a network's parameters, where one is asked for, from `values` or from the parameters themselves."""
        if self.train.ema is None:
            return None
        average = MovingAverage(model, self.train.ema)
        averaged = average.module
        neurons.register_copy(lambda: [{**dict(averaged.named_parameters()), **dict(averaged.named_buffers())}], is_model=True)
        if values is not None:
            averaged.load_state_dict(values)
            average.n_averaged.fill_(1)  # or the first update would overwrite the average
        return average


@dataclass
class RunState:
    """Everything that the next step reads, besides the data."""

    network: dict[str, Any]
    """Keyword arguments of `create_model`."""
    setup: Setup
    model: nn.Module
    """The network itself, not wrapped."""
    ddp: DistributedDataParallel
    """The same, wrapped: what a training step calls."""
    neurons: Neurons
    penalty: SparseGroupLasso
    betas: dict[str, float]
    """beta by layer in absolute units, fixed at the start."""
    optimizer: ProximalOptimizer
    average: MovingAverage | None
    """Moving average of the parameters, where one is asked for."""
    position: Position
    history: list[dict[str, Any]]
    """One record an epoch."""
    data_memory: int | None = None
    """Bytes of a node's memory for the training file, by which its order is chosen; None: it fits."""
    totals: list[list[float]] | None = None
    """Loss, correct answers and samples of each process in the epoch so far, as they were last kept."""
    seconds: float = 0.0
    """What the epoch has taken so far."""
    first_loss: float | None = None
    """Mean loss of the run's first steps."""
    uninformed_loss: float | None = None
    """That of a network that has learned nothing: every class as likely as any other, or zeros."""
    micro_batches: list[MicroBatch] | None = None
    """Those of this process in each step; None: one."""
    num_micro_batches: int | None = None
    """Of a step over all processes; stays when their number changes."""
    steering: Steering | None = None
    """Where a target is given."""
    rate_factor: float = 1.0
    """Of the learning rate; halved by each return to a checkpoint after the training diverged."""
    stays_whole: bool = False
    """The dead could not be removed from training, and are not tried again."""

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated, kept and compacted."""
        return self.model if self.average is None else self.average.module

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def shrink(self) -> bool:
        """Removes the dead neurons from all that the next step reads, but for those that keep widths multiples; training goes on as it would
        have with them. Every process of the group calls it, with the same masks.

        Where the smaller network does not compute the same in one of them, all keep the dead for good, with a warning: False.
        """
        averaged, smaller, problem = None, None, ""
        try:
            if self.average is not None:
                check_dead_are_zero(self.average.module, self.neurons)
                averaged = Removal(self.neurons, multiple_of=self.setup.multiple_of).model(self.average.module).state_dict()
            smaller = compact(self.model, self.neurons, self.optimizer, multiple_of=self.setup.multiple_of)
        except RuntimeError as error:
            problem = " ".join(str(error).split())
        failed = torch.tensor(int(smaller is None), device=self.setup.device)
        dist.all_reduce(failed)
        if smaller is None or int(failed):
            self.stays_whole = True
            warnings.warn(f"the dead stay in training: {problem or 'another process could not remove them'}", stacklevel=2)
            return False
        assert smaller.optimizer_state is not None
        was_training = self.model.training
        model, neurons = smaller.model, smaller.neurons
        warned = self.optimizer.warned
        self.optimizer.detach()  # or both networks would stay in memory
        self.ddp = self.optimizer = self.average = None  # type: ignore[assignment]
        self.model, self.neurons = model.train(was_training), neurons
        gc.collect()
        self.ddp, self.optimizer = self.setup.wrapped(model, neurons, self.penalty, every=None if self.steering is None else self.steering.every)
        self.average = self.setup.average(model, neurons, averaged)
        self.optimizer.load_state_dict(smaller.optimizer_state)
        self.optimizer.warned.update(warned)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts alone, so that `torch.load` reads it with `weights_only`.

        The random state needs no place of its own: generators are seeded from (seed, epoch, step, number of the micro-batch).
        """
        return {
            "format": checkpoint.FORMAT,
            "network": dict(self.network),
            "widths": {layer.name: layer.num_neurons for layer in self.neurons},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),  # holds the neurons: mask, kept indices, starting P_l
            "average": None if self.average is None else self.average.module.state_dict(),
            "betas": dict(self.betas),
            "position": {"epoch": self.position.epoch, "step": self.position.step},
            "history": list(self.history),
            "data_memory": self.data_memory,
            "totals": self.totals,
            "num_micro_batches": self.num_micro_batches,
            "seconds": self.seconds,
            "first_loss": self.first_loss,
            "uninformed_loss": self.uninformed_loss,
            "rate_factor": self.rate_factor,
            "steering": None if self.steering is None else self.steering.state_dict(),
        }


def buffers_matter(model: nn.Module) -> bool:
    """Whether what one process computes may depend on buffers that a step of training changes, so that all must take those of the first before
    each. BatchNorm's running statistics are written in training and not read: those of the first, which are evaluated and kept, are the same
    either way, and a collective operation less is waited for."""
    # Not what is derived from them. Of the last two buffers say what was removed, the same in all.
    known = {*removal.BatchNorm, *removal.EMPTY_BATCH_NORM.values(), *removal.WHOLE_DROPOUT.values(), UnevenMultiheadAttention}
    return any(type(module) not in known and any(True for _ in module.buffers(recurse=False)) for module in model.modules())


def build_network(
    network: Mapping[str, Any], *, image_shape: tuple[int, int, int], state: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Neurons]:
    """A network by name with its neurons; with a checkpoint's state: cut to its widths, its parameters loaded."""
    model = create_model(**network)
    neurons = find_neurons(model, torch.zeros(2, *image_shape))
    if state is not None:
        saved = _saved_neurons(state, neurons)
        model, neurons = removal.set_widths(model, neurons, {name: s["indices"] for name, s in saved.items()})
        neurons.load_state_dict(saved)
        model.load_state_dict(state["model"])
    return model, neurons


def build_whole(
    network: Mapping[str, Any], *, image_shape: tuple[int, int, int], state: Mapping[str, Any], averaged: bool = False
) -> tuple[nn.Module, Neurons]:
    """The network of a checkpoint at its starting size, whatever was removed on the way: what is gone is there again, zero and masked.

    averaged: with the moving average of its parameters, where there is one.
    """
    model, neurons = build_network(network, image_shape=image_shape)
    saved = _saved_neurons(state, neurons)
    values = state["average"] if averaged and state["average"] is not None else state["model"]
    cut = removal.keeping(neurons, {name: s["indices"] for name, s in saved.items()})
    model.load_state_dict(_whole(model, cut, values))
    for name, kept in saved.items():
        neurons[name].mask[:] = False
        neurons[name].mask[kept["indices"]] = kept["mask"]
    return model, neurons


def _whole(model: nn.Module, cut: removal.Removal, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a network of any widths in those of its starting size."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: cut.whole(name, values[name].to(tensor.device), blank=torch.zeros_like(tensor) if name in parameters else tensor)
        for name, tensor in model.state_dict().items() if name in values
    }


def _saved_neurons(state: Mapping[str, Any], neurons: Neurons) -> dict[str, Any]:
    saved: dict[str, Any] = state["optimizer"]["neurons"]
    if set(saved) != {layer.name for layer in neurons}:
        raise ValueError("checkpoint: its layers are not those of the network; was it made by another version?")
    return saved


def build(
    network: Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int],
    train: TrainConfig,
    penalty: PenaltyConfig,
    steps_per_epoch: int,
    device: torch.device,
    state: Mapping[str, Any] | None = None,
) -> RunState:
    """Makes the network, sets its widths, loads, wraps it in DDP and makes the optimizer, attached.

    Needs an initialised process group. `state` is what `RunState.state_dict` gave; None is a start from scratch, or from
    the parameters of `train.init`.
    """
    torch.manual_seed(train.seed)
    setup = Setup(train, penalty, steps_per_epoch, device)
    model, neurons = build_network(network, image_shape=image_shape, state=state)
    if state is None and train.init is not None:
        initialise(model, neurons, train.init)
    betas = (
        dict(state["betas"])
        if state is not None
        else starting_betas(penalty, neurons, steps_per_epoch=steps_per_epoch, learning_rate=setup.learning_rate)
    )
    memory_format = torch.channels_last if train.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    neurons = neurons.bound_to(model)
    steering = None
    if train.target is not None:
        target = Target.parse(train.target)
        steering = make_steering(
            target, penalty, steps_per_epoch=steps_per_epoch, num_steps=train.epochs * steps_per_epoch, learning_rate=setup.learning_rate,
            cost=lambda known: Cost(target.kind, model, neurons, known), device=device, state=None if state is None else state.get("steering"),
        )  # fmt: skip
    regulariser = make_penalty(
        penalty, neurons, betas=betas, steps_per_epoch=steps_per_epoch, factor=None if steering is None else steering.at
    )
    ddp, optimizer = setup.wrapped(model, neurons, regulariser, every=None if steering is None else steering.every)
    average = setup.average(model, neurons, None if state is None else state["average"])
    position, history = Position(), []
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        position = Position(**state["position"])
        history = list(state["history"])
    kept = {} if state is None else {key: state[key] for key in ("totals", "seconds", "first_loss", "uninformed_loss", "rate_factor")}
    return RunState(
        network=dict(network), setup=setup, model=model, ddp=ddp, neurons=neurons, penalty=regulariser, betas=betas,
        optimizer=optimizer, average=average, position=position, history=history, steering=steering, **kept,
    )  # fmt: skip


def initialise(model: nn.Module, neurons: Neurons, path: str) -> list[str]:
    """Takes the weights that `train.init` names, all but the last layer's where that has another number of outputs: the names of its tensors, which
    stay at random. What they have no more, neurons all of whose weights are zero, is dead from the start. `ValueError` where they are of
    another network or other widths."""
    tensors, saved = initial.read(path)
    if saved is not None and {layer.name: layer.num_neurons for layer in neurons} == {name: s["starting_neurons"] for name, s in saved.items()}:
        cut = removal.keeping(neurons, {name: s["indices"] for name, s in saved.items()})
        small = {name: cut.tensor(name, own).shape for name, own in model.state_dict().items()}
        fitting = {name: value for name, value in tensors.items() if value.shape == small.get(name)}
        tensors = {**tensors, **_whole(model, cut, fitting)}
    at_random = initial.load(model, tensors, path=path)
    with torch.no_grad():
        dead = {layer.name: (row_norms(neurons.parts(layer)) == 0).nonzero().flatten() for layer in neurons if layer.num_neurons}
    for layer in neurons:
        if layer.num_neurons and len(dead[layer.name]) == layer.num_neurons and not layer.bypassed:
            raise ValueError(f"train.init: {path}: all neurons of {layer.name!r} are zero, so nothing can be learned from there; name other weights")
    neurons.zero_(dead)
    return at_random
