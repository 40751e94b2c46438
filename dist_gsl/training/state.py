"""The state of a run, and the one way to make it: start, resume and a change of widths all go through `build`.

Imports torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_gsl import removal
from dist_gsl.models import create_model
from dist_gsl.neurons import Neurons
from dist_gsl.penalty import PenaltyConfig, SparseGroupLasso, make_penalty, starting_betas
from dist_gsl.proximal import ProximalSGD
from dist_gsl.tracing import find_neurons
from dist_gsl.training import checkpoint
from dist_gsl.training.config import TrainConfig


@dataclass
class Position:
    """Where a run stands: `epoch` whole epochs and `step` steps of the next are done."""

    epoch: int = 0
    step: int = 0


@dataclass
class RunState:
    """Everything that the next step reads, besides the data."""

    network: dict[str, Any]
    """Keyword arguments of `create_model`."""
    model: nn.Module
    """The network itself, not wrapped."""
    ddp: DistributedDataParallel
    """The same, wrapped: what a training step calls."""
    neurons: Neurons
    penalty: SparseGroupLasso
    betas: dict[str, float]
    """beta by layer in absolute units, fixed at the start."""
    optimizer: ProximalSGD
    average: AveragedModel | None
    """Moving average of the parameters, where one is asked for."""
    position: Position
    history: list[dict[str, Any]]
    """One record an epoch."""
    data_memory: int | None = None
    """Bytes of a node's memory for the training file, by which its order is chosen; None: it fits."""

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated, kept and compacted."""
        return self.model if self.average is None else self.average.module

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts alone, so that `torch.load` reads it with `weights_only`.

        The random state needs no place of its own: every epoch seeds its generators from (seed, epoch, rank).
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
        }


def build_network(
    network: Mapping[str, Any], *, image_shape: tuple[int, int, int], state: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Neurons]:
    """A network by name with its neurons; with a checkpoint's state: cut to its widths, its parameters loaded."""
    model = create_model(**network)
    neurons = find_neurons(model, torch.zeros(2, *image_shape))
    if state is not None:
        saved = state["optimizer"]["neurons"]
        if set(saved) != {layer.name for layer in neurons}:
            raise ValueError("checkpoint: its layers are not those of the network; was it made by another version?")
        model, neurons = removal.set_widths(model, neurons, {name: s["indices"] for name, s in saved.items()})
        neurons.load_state_dict(saved)
        model.load_state_dict(state["model"])
    return model, neurons


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
    model, neurons = build_network(network, image_shape=image_shape, state=state)
    if state is None and train.init is not None:
        initialise(model, train.init)

    def learning_rate(step: int) -> float:
        return train.learning_rate_at(step, steps_per_epoch=steps_per_epoch)

    betas = (
        dict(state["betas"])
        if state is not None
        else starting_betas(penalty, neurons, steps_per_epoch=steps_per_epoch, learning_rate=learning_rate)
    )
    regulariser = make_penalty(penalty, neurons, betas=betas, steps_per_epoch=steps_per_epoch)
    memory_format = torch.channels_last if train.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    neurons = neurons.bound_to(model)
    ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = ProximalSGD(
        model.parameters(), neurons, regulariser, lr=learning_rate(0), momentum=train.momentum, nesterov=train.nesterov,
        weight_decay=train.weight_decay, every=penalty.interval, revive=penalty.revive, min_alive=penalty.min_alive, depth=penalty.depth, groups=penalty.groups,
    )  # fmt: skip
    average = None
    if train.ema is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(train.ema), use_buffers=True)
        averaged = average.module
        neurons.register_copy(lambda: [{**dict(averaged.named_parameters()), **dict(averaged.named_buffers())}], is_model=True)
    position, history = Position(), []
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.module.load_state_dict(state["average"])
            average.n_averaged.fill_(1)  # or the first update would overwrite the average
        position = Position(**state["position"])
        history = list(state["history"])
    optimizer.attach(ddp, max_grad_norm=train.max_grad_norm)
    return RunState(
        network=dict(network), model=model, ddp=ddp, neurons=neurons, penalty=regulariser, betas=betas,
        optimizer=optimizer, average=average, position=position, history=history,
    )  # fmt: skip


def initialise(model: nn.Module, path: str) -> None:
    """Takes a checkpoint's parameters. `ValueError` where it is of another network or other widths."""
    source: dict[str, Tensor] = checkpoint.load(path)["model"]
    wanted = model.state_dict()
    odd = [name for name in wanted if name not in source or source[name].shape != wanted[name].shape]
    if odd:
        raise ValueError(
            f"train.init: {path} does not fit: {odd[0]!r} is missing or of another shape; "
            "name a checkpoint of the same network and widths"
        )
    model.load_state_dict(source)
