"""Steering the penalty so that a training ends with what a budget allows. Imports torch alone.

The strength of the penalty is a number whose meaning nobody knows before the training; how large a network may be is often known. So one
factor of all betas is set anew several times an epoch. At each look every neuron tells, by how its norm moved since the last one, how much
the loss supports it, and so at which factor it would just be gone by a given time: its lethal factor. What may be left falls from the whole network to the
budget as it does under a constant penalty, in the time that norms know, the sum of the learning rates: after the last drop of a rate there is
hardly time to kill, and none to recover. Where few neurons may be left they are to be so few a while before the end. The least factor at which what is
left is allowed at several times to come is the one to go on with. (Aiming at the end alone kills too late: those that live are supported the more, the
fewer they are.) When the budget is met the penalty ends.

Nothing else changes: a neuron dies of the proximal step alone, and what is dead stays dead.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_gsl.neurons import NeuronLayer, Neurons
from dist_gsl.penalty import PenaltyConfig, row_norms
from dist_gsl.training.budget import Cost, Target

if TYPE_CHECKING:
    from dist_gsl.training.state import RunState

LOOKS_PER_EPOCH = 16
"""Looks at the neurons in an epoch of the penalty; more where the budget is near."""
FASTEST = 2.0
"""Times by which a look changes the factor at most."""
EARLINESS, MOST_EARLINESS = 0.6, 4.0
"""What is still to go is the share of the way that is left to a power (Zhu and Gupta 2017 have the cube, for shares): this over the share of the widths
that may be left, at most that. So a constant penalty does by itself: the fewer it leaves, the more of them it takes early."""
EARLY, EARLIEST = 0.3, 0.2
"""Shares of the widths. Those that may have less than the first are to be there before the end, by `MET_BY` of the way for the second and less: so few
neurons have to learn again what the others did, and do it when they are to stay."""
MET_BY = 0.8
DEADLINES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the way that is left, at whose ends what is left must be allowed."""
LARGEST = 1e4
"""Times the given beta that the factor is at most."""


class Steering:
    """The factor of all betas over a training, one for all processes.

    `after_step` is called in every process after every step; `look` where `is_due` says so, in every process too: the first process
    decides, and `decided` takes its decision over.
    """

    def __init__(self, target: Target, config: PenaltyConfig, *, steps_per_epoch: int, num_steps: int, learning_rate: Callable[[int], float]) -> None:
        """num_steps: of the whole training; learning_rate: of a step."""
        self.target = target
        self.factor = 1.0
        """Of the betas that were given; 0 once the budget is met."""
        self.budget: float | None = None
        """What may be left, in the target's unit; known once the network is."""
        self.whole = math.nan
        """Of the starting network."""
        self._schedule, self._steps_per_epoch, self._num_steps = config.beta_schedule, steps_per_epoch, num_steps
        self._way = list(itertools.accumulate((learning_rate(step) for step in range(num_steps)), initial=0.0))
        """Sum of the learning rates before each step: how far a norm can have come."""
        self._next_look = 0
        self._norms: dict[str, Tensor] = {}
        """At the last look, (starting_neurons,) each."""
        self._pulled: dict[str, float] = {}
        """By layer, what the penalty has taken from the norm of each of its neurons since then."""
        self._moved = 0.0
        """Sum of the learning rates since then."""
        self.known: list[tuple[float, float]] = []
        """(multiply-adds, milliseconds) of networks that were timed."""

    def begin(self, cost: Cost) -> None:
        """Of a training that starts: takes what a percentage is of."""
        self.whole = cost.whole()
        self.budget = self.target.value if not self.target.is_percent else self.whole * self.target.value / 100

    @property
    def is_met(self) -> bool:
        return self.factor == 0

    def at(self, step: int) -> float:
        """Factor of the given betas at a step: the schedule's start and ramp, then as steered until the budget is met."""
        epoch = step / self._steps_per_epoch
        start, ramp = self._schedule.start, self._schedule.ramp
        if epoch < start:
            return 0.0
        return self.factor * (1.0 if ramp == 0 else min(1.0, (epoch - start) / ramp))

    @property
    def has_no_end(self) -> bool:
        """Of its own, before the training's."""
        return self._schedule.end is None

    @property
    def _end(self) -> int:
        """The step by which the budget is to be met."""
        end = self._schedule.end
        return self._num_steps if end is None else min(self._num_steps, round(end * self._steps_per_epoch))

    @property
    def _start(self) -> int:
        """The first step with a penalty."""
        return min(self._num_steps, math.ceil(self._schedule.start * self._steps_per_epoch))

    def _until(self, step: int) -> int:
        """The step by which the budget is to be met, seen from another. Where the schedule has ended without it, half an epoch later, and so on: a time
        that comes, as one that moves on with the steps would be aimed at for ever."""
        late = max(1, self._steps_per_epoch // 2)
        return min(self._num_steps, self._end + late * max(0, -(-(step + 1 - self._end) // late)))

    def allowed(self, step: int) -> float:
        """What may be left by a step, in the target's unit."""
        assert self.budget is not None
        share = min(1.0, self.budget / self.whole)
        width = share if self.target.kind == "neurons" else math.sqrt(share)  # weights go with the product of two widths
        begin, now, end = (self._way[min(each, self._end)] for each in (self._start, step, self._end))
        end -= (1 - MET_BY) * (end - begin) * min(1.0, max(0.0, (EARLY - width) / (EARLY - EARLIEST)))
        rest = min(1.0, (end - now) / (end - begin)) if now < end else 0.0
        to_go = rest ** min(MOST_EARLINESS, EARLINESS / width)
        if self.target.kind != "neurons":
            to_go *= (2 * width + (1 - width) * to_go) / (1 + width)  # of the square, where that is to go of the widths
        return self.budget + max(0.0, self.whole - self.budget) * to_go

    def after_step(self, pulls: Mapping[str, float], learning_rate: float) -> None:
        """pulls: {layer name: what the step's penalty took from a norm}."""
        self._moved += learning_rate
        for name, pull in pulls.items():
            self._pulled[name] = self._pulled.get(name, 0.0) + pull

    def is_due(self, step: int) -> bool:
        """After a step, counted from 1."""
        return not self.is_met and step >= self._next_look and self.at(step) > 0

    def look(
        self, neurons: Neurons, cost: Cost, *, step: int, pull_of: Callable[[NeuronLayer], float], weights_of: Callable[[NeuronLayer], Tensor],
        learning_rate: Callable[[int], float], min_alive: Callable[[NeuronLayer], int],
    ) -> tuple[float, int]:
        """(factor, step of the next look), by the first process.

        pull_of: what the penalty takes from a norm of a layer's neurons per unit of learning rate at a factor of 1, in the identity's metric;
        weights_of: times it in the optimizer's, (num_neurons,). learning_rate: of a step.
        """
        assert self.budget is not None
        interval = max(1, self._steps_per_epoch // LOOKS_PER_EPOCH)
        left = cost.now()
        if left <= self.budget:
            return 0.0, step
        norms = {layer.name: layer.in_starting_network(torch.where(layer.mask, _norms(neurons, layer), 0.0)) for layer in neurons}
        before, self._norms = self._norms, norms
        moved, self._moved = self._moved, 0.0
        pulled, self._pulled = self._pulled, {}
        if not before or moved == 0:
            return self.factor, step + interval
        until = self._until(step)
        rates = [learning_rate(each) for each in range(step, until)]
        if math.fsum(rates) == 0:
            return self.factor, step + interval

        def lethal_by(steps: int) -> dict[str, Tensor]:
            """The lethal factor of each neuron that is to be gone in so many steps."""
            ahead, lethal = math.fsum(rates[:steps]), {}
            for layer in neurons:
                norm, last = (each[layer.name][layer.indices] for each in (norms, before))
                weights = weights_of(layer)
                support = (pulled.get(layer.name, 0.0) * weights - (last - norm)) / moved
                pull = pull_of(layer) * weights
                factors = torch.where(pull > 0, (norm / ahead + support) / pull, math.inf).clamp_min(0).nan_to_num(nan=math.inf, posinf=math.inf)
                factors[~layer.mask] = 0.0
                fewest = min(min_alive(layer), int(layer.mask.sum()))
                if fewest:
                    factors[factors.topk(fewest).indices] = math.inf
                lethal[layer.name] = factors
            return lethal

        wanted = 0.0
        way = list(itertools.accumulate(rates))
        for steps in sorted({bisect.bisect_left(way, share * way[-1] * (1 - 1e-12)) + 1 for share in DEADLINES}):
            allowed = self.allowed(step + steps)
            if left > allowed and any(rates[:steps]):
                wanted = max(wanted, self._least(lethal_by(steps), cost, allowed))
        factor = min(max(wanted, self.factor / FASTEST), self.factor * FASTEST, LARGEST)
        return factor, step + self._steps_to_next(lethal_by(len(rates)), cost, left=left, factor=factor, ahead=len(rates), interval=interval)

    def _least(self, lethal: Mapping[str, Tensor], cost: Cost, allowed: float) -> float:
        """The smallest factor that leaves no more than is allowed."""
        candidates = torch.cat([factors[factors.isfinite()] for factors in lethal.values()]).unique()
        low, high = 0, len(candidates)  # of candidates[: high] dying no more is left than allowed, or none are left
        while low < high:
            middle = (low + high) // 2
            at = float(candidates[middle])
            if cost.of({name: factors > at for name, factors in lethal.items()}) <= allowed:
                high = middle
            else:
                low = middle + 1
        return float(candidates[min(low, len(candidates) - 1)]) if len(candidates) else self.factor

    def _steps_to_next(self, lethal: Mapping[str, Tensor], cost: Cost, *, left: float, factor: float, ahead: int, interval: int) -> int:
        """Fewer where much of what is above the budget will be gone by then."""
        assert self.budget is not None
        for steps in (interval, interval // 2, interval // 4, interval // 8):
            if steps > 1:
                # A neuron with lethal factor L is gone after about L / factor of the way.
                gone = {name: factors > factor * min(1.0, 2 * steps / max(1, ahead)) for name, factors in lethal.items()}
                if left - cost.of(gone) < 0.5 * (left - self.budget):
                    return steps
        return 1

    def decided(self, factor: float, next_look: int) -> None:
        self.factor, self._next_look = factor, next_look

    def state_dict(self) -> dict[str, Any]:
        return {
            "factor": self.factor, "budget": self.budget, "whole": self.whole, "next_look": self._next_look, "norms": dict(self._norms), "pulled": dict(self._pulled),
            "moved": self._moved, "known": [list(each) for each in self.known],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.factor, self.budget, self._next_look = float(state["factor"]), state["budget"], int(state["next_look"])
        self.whole = float(state["whole"])
        self._norms, self._pulled, self._moved = dict(state["norms"]), dict(state["pulled"]), float(state["moved"])
        self.known = [(float(macs), float(ms)) for macs, ms in state["known"]]


def _norms(neurons: Neurons, layer: NeuronLayer) -> Tensor:
    if layer.num_neurons == 0:
        return torch.zeros(0, dtype=torch.float64)
    return row_norms(neurons.parts(layer)).detach().double().cpu()


def shortfall(state: RunState) -> str | None:
    """Of a training that is over: what is left more than its target allows."""
    steering = state.steering
    if steering is None or steering.is_met or steering.budget is None:
        return None
    left = Cost(steering.target.kind, state.model, state.neurons, steering.known).now()
    if left <= steering.budget:
        return None
    later = "" if steering.has_no_end else "a later penalty.beta_schedule.end, or "
    return f"train.target {steering.target}: {left:.6g} are left where {steering.budget:.6g} may be; more epochs, or {later}larger betas to start from"


L1_OF_GAUSSIAN = math.sqrt(2 / math.pi)
"""The L1 norm of a row over its L2 norm and the root of its length, where its entries are normal."""


def pull_of(beta: float, alpha: float, group_size: int) -> float:
    """What a proximal step takes from a neuron's norm over its t, about: exact for alpha = 0."""
    return beta * math.sqrt(group_size) * ((1 - alpha) + alpha * L1_OF_GAUSSIAN)


def steer(state: RunState, step: int) -> None:
    """Every process calls it after every step, counted from 1 over the whole run."""
    steering = state.steering
    if steering is None or steering.is_met:
        return
    rate, penalty = state.optimizer.param_groups[0]["lr"], state.penalty
    steering.after_step(
        {layer.name: rate * pull_of(*penalty.strength(layer.name, step - 1), layer.group_size) for layer in state.neurons}, rate
    )
    if not steering.is_due(step):
        return
    decision = torch.zeros(2, dtype=torch.float64)
    if dist.get_rank() == 0:
        decision[:] = torch.tensor(
            steering.look(
                state.neurons, Cost(steering.target.kind, state.model, state.neurons, steering.known), step=step,
                pull_of=lambda layer: pull_of(state.betas.get(layer.name, 0.0), penalty.strength(layer.name, step)[1], layer.group_size),
                weights_of=state.optimizer.pull_weights, learning_rate=lambda each: state.rate_factor * state.setup.learning_rate(each),
                min_alive=lambda layer: 0 if state.optimizer.depth and layer.bypassed else state.optimizer.min_alive,
            ),
            dtype=torch.float64,
        )  # fmt: skip
    decision = decision.to(state.setup.device)
    dist.broadcast(decision, 0)
    factor, next_look = decision.tolist()
    steering.decided(factor, int(next_look))
