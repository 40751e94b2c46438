"""Steering the penalty so that a training ends with what a budget allows. Imports torch alone.

The strength of the penalty is a number whose meaning nobody knows before the training; how large a network may be is often known. So one factor of
all betas is chosen anew on the way. What may be left falls from the whole network to the budget as it does under a constant penalty (`Course`), in the
time that norms know, the sum of the learning rates: after the last drop of a rate there is hardly time to kill, and none to recover. How the factor
is chosen depends on how much is to go.

`ByForesight`, where half of the neurons or more may be left, and for budgets of multiply-adds and milliseconds: the operator runs in every step, and the factor is set anew several times an epoch. At each
look every neuron tells, by how its norm moved since the last one, how much the loss supports it, and so at which factor it would just be gone by
a given time: its lethal factor. The least factor at which what is left is allowed at several times to come is the one to go on with. (Aiming at the
end alone kills too late: those that live are supported the more, the fewer they are.) The penalty shrinks all the way, and so regularises those that stay.

`AtOnce`, where fewer neurons, or less than a quarter of the parameters, may be left: the operator runs at the end of each epoch, and more often where there are few epochs. At that moment nothing has to be
foreseen: each neuron's norm says at which factor the operator takes it to zero, and the least one at which no more is left than is allowed is found
exactly. Between two of them the loss alone moves the norms, so that they say who is needed.

When the budget is met the penalty ends. Nothing else changes: a neuron dies of the proximal step alone, and what is dead stays dead.
"""

from __future__ import annotations

import bisect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_gsl.neurons import NeuronLayer, Neurons
from dist_gsl.penalty import PenaltyConfig, Schedule, row_norms
from dist_gsl.training.budget import Cost, Target
from dist_gsl.training.watch import CommonError

if TYPE_CHECKING:
    from dist_gsl.training.state import RunState

HALF = 0.5
"""Share of the widths, below which `AtOnce` steers what it can."""
AT_ONCE = ("neurons", "params")
"""Multiply-adds, and milliseconds with them, lie in the first layers, where there are few neurons, which are the last to go: all others would be gone before,
at once, when they have hardly learned."""
MOST_EARLINESS = 4.0
"""What is still to go is the share of the way that is left to a power (Zhu and Gupta 2017 have the cube, for shares): the course's earliness over the share of
the widths that may be left, at most this. So a constant penalty does by itself: the fewer it leaves, the more of them it takes early."""
EARLY, EARLIEST = 0.3, 0.2
"""Shares of the widths. Those that may have less than the first are to be there before the end, by `MET_BY` of the way for the second and less: so few
neurons have to learn again what the others did, and do it when they are to stay."""
MET_BY = 0.8


@dataclass(frozen=True)
class Course:
    """What may be left on the way from the whole network to the budget."""

    target: Target
    whole: float
    """What the starting network costs, in the target's unit."""
    schedule: Schedule
    """Of beta: what may be left falls from its start to its end, or the training's."""
    steps_per_epoch: int
    num_steps: int
    """Of the whole training."""
    way: tuple[float, ...]
    """Sum of the learning rates before each step, and at the end: how far a norm can have come."""
    earliness: float = 0.6
    delay: float = 0.0
    """Share of the way on which nothing need be gone."""
    spare: int = 0
    """Steps of the training after the budget is met, where the schedule has no end."""

    @property
    def budget(self) -> float:
        """What may be left in the end, in the target's unit."""
        return self.target.value if not self.target.is_percent else self.whole * self.target.value / 100

    @property
    def width(self) -> float:
        """Share of the widths that may be left: weights go with the product of two widths."""
        share = min(1.0, self.budget / self.whole) if self.whole else 1.0
        return share if self.target.kind == "neurons" else math.sqrt(share)

    @property
    def start(self) -> int:
        """The first step with a penalty."""
        return min(self.num_steps, math.ceil(self.schedule.start * self.steps_per_epoch))

    @property
    def end(self) -> int:
        """The step by which the budget is to be met."""
        return self.num_steps - self.spare if self.schedule.end is None else min(self.num_steps, round(self.schedule.end * self.steps_per_epoch))

    def allowed(self, step: int) -> float:
        """What may be left after so many steps, in the target's unit."""
        budget, width = self.budget, self.width
        begin, now, end = (self.way[min(each, self.end)] for each in (self.start, step, self.end))
        end -= (1 - MET_BY) * (end - begin) * min(1.0, max(0.0, (EARLY - width) / (EARLY - EARLIEST)))
        begin += self.delay * (end - begin)
        rest = (end - now) / (end - begin) if now < end else 0.0
        if rest > 1 - 1e-9:
            return max(self.whole, budget)  # to the last digit, or somebody would have to go
        to_go = rest ** min(MOST_EARLINESS, self.earliness / width)
        if self.target.kind != "neurons":
            to_go *= (2 * width + (1 - width) * to_go) / (1 + width)  # of the square, where that is to go of the widths
        return budget + max(0.0, self.whole - budget) * to_go


class Steering(ABC):
    """The factor of all betas over a training, one for all processes: the first one decides.

    `after_step` is called in every process after every step.
    """

    every: str
    """When the optimizer is to run the operator by itself: in every "step", or where it is told ("epoch")."""

    def __init__(self, course: Course) -> None:
        self.course = course
        self.factor = 1.0
        """Of the betas that were given."""
        self.is_met = False
        self.known: list[tuple[float, float]] = []
        """(multiply-adds, milliseconds) of networks that were timed."""

    @property
    def target(self) -> Target:
        return self.course.target

    @property
    def budget(self) -> float:
        return self.course.budget

    def cost(self, state: RunState) -> Cost:
        return Cost(self.target.kind, state.model, state.neurons, self.known)

    @abstractmethod
    def at(self, step: int) -> float:
        """Factor of the given betas at a step, counted from 0; 0 once the budget is met."""

    @abstractmethod
    def after_step(self, state: RunState, step: int) -> None:
        """step: counted from 1 over the whole run."""

    def has_just_shrunk(self, step: int) -> bool:
        """Whether the operator ran after a step, counted from 1, with all that several steps are worth."""
        return False

    def state_dict(self) -> dict[str, Any]:
        return {
            "law": type(self).__name__, "factor": self.factor, "is_met": self.is_met, "whole": self.course.whole, "known": [list(each) for each in self.known],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.factor, self.is_met = float(state["factor"]), bool(state["is_met"])
        self.known = [(float(macs), float(ms)) for macs, ms in state["known"]]


def from_first(values: Callable[[], tuple[float, ...]], *, length: int, device: torch.device) -> list[float]:
    """What the first process says; the others do not ask."""
    told = torch.tensor(values() if dist.get_rank() == 0 else (0.0,) * length, dtype=torch.float64, device=device)
    dist.broadcast(told, 0)
    found: list[float] = told.tolist()
    return found


def make_steering(
    target: Target, config: PenaltyConfig, *, steps_per_epoch: int, num_steps: int, learning_rate: Callable[[int], float], cost: Callable[[list[tuple[float, float]]], Cost],
    device: torch.device, state: Mapping[str, Any] | None = None,
) -> Steering:  # fmt: skip
    """Of a training that starts, or goes on from what `Steering.state_dict` gave. num_steps: of the whole training; learning_rate: of a step;
    cost: of the starting network, given the list of networks that were timed. Every process calls it. `CommonError` for milliseconds that no network has."""
    known: list[tuple[float, float]] = []
    if state is None:
        its_own = cost(known).whole()  # milliseconds differ
        (whole,) = from_first(lambda: (its_own,), length=1, device=device)
    else:
        whole = float(state["whole"])
    way = tuple(itertools.accumulate((learning_rate(step) for step in range(num_steps)), initial=0.0))
    course = Course(target, whole, config.beta_schedule, steps_per_epoch, num_steps, way)
    steering: Steering
    if state is None:
        if target.kind == "latency_ms":
            its_own = cost([]).least()
            (least,) = from_first(lambda: (its_own,), length=1, device=device)
            if least > course.budget:
                raise CommonError(
                    f"train.target {target}: with one neuron a layer an image takes {least:.4g} ms on {device}, where {course.budget:.4g} are asked for; ask for more"
                )
        steering = AtOnce(course) if course.width < HALF and target.kind in AT_ONCE else ByForesight(course)
        steering.known = known
        return steering
    # Before there were two laws the one was by foresight, and a met budget a factor of 0.
    state = {"law": ByForesight.__name__, "is_met": state["factor"] == 0, **state}
    steering = AtOnce(course) if state["law"] == AtOnce.__name__ else ByForesight(course)
    steering.load_state_dict(state)
    return steering


def left_at(factor: float, lethal: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Who lives on with a factor, {layer name: bool (num_neurons,)}. lethal: the factor from which on each neuron dies, {layer name: (num_neurons,)}."""
    return {name: factors > factor for name, factors in lethal.items()}


def _candidates(lethal: Mapping[str, Tensor]) -> list[float]:
    """Factors at which somebody dies, from the least."""
    found: list[float] = torch.cat([factors[factors.isfinite()] for factors in lethal.values()]).unique().tolist()
    return found


def _least(lethal: Mapping[str, Tensor], cost: Cost, allowed: float) -> float | None:
    """The least factor that leaves no more than is allowed, or as little as there is to be left; None where nobody can die."""
    candidates = _candidates(lethal)
    if not candidates:
        return None
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost.of(left_at(candidates[middle], lethal)) <= allowed else (middle + 1, high)
    return candidates[low]


# --- half or more is left, multiply-adds, milliseconds


LOOKS_PER_EPOCH = 16
"""Looks at the neurons in an epoch of the penalty; more where the budget is near."""
FASTEST = 2.0
"""Times by which a look changes the factor at most."""
DEADLINES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the way that is left, at whose ends what is left must be allowed."""
LEAST, LARGEST = 1e-4, 1e4
"""Of the given beta. Neurons that weight decay alone takes to almost nothing ask for less and less, and would never be gone."""


class ByForesight(Steering):
    """The operator in every step, with a factor by what will have become of each neuron by several times to come."""

    every = "step"

    def __init__(self, course: Course) -> None:
        super().__init__(course)
        self._next_look = 0
        self._norms: dict[str, Tensor] = {}
        """At the last look, (starting_neurons,) each."""
        self._pulled: dict[str, float] = {}
        """By layer, what the penalty has taken from the norm of each of its neurons since then."""
        self._moved = 0.0
        """Sum of the learning rates since then."""

    def at(self, step: int) -> float:
        """The schedule's start and ramp, then as steered until the budget is met."""
        epoch = step / self.course.steps_per_epoch
        start, ramp = self.course.schedule.start, self.course.schedule.ramp
        if self.is_met or epoch < start:
            return 0.0
        return self.factor * (1.0 if ramp == 0 else min(1.0, (epoch - start) / ramp))

    def _until(self, step: int) -> int:
        """The step by which the budget is to be met, seen from another. Where the schedule has ended without it, half an epoch later, and so on: a time
        that comes, as one that moves on with the steps would be aimed at for ever."""
        late = max(1, self.course.steps_per_epoch // 2)
        return min(self.course.num_steps, self.course.end + late * max(0, -(-(step + 1 - self.course.end) // late)))

    def after_step(self, state: RunState, step: int) -> None:
        if self.is_met:
            return
        rate, penalty = state.optimizer.param_groups[0]["lr"], state.penalty
        self.moved({layer.name: rate * pull_of(*penalty.strength(layer.name, step - 1), layer.group_size) for layer in state.neurons}, rate)
        if step < self._next_look or self.at(step) == 0:
            return

        def look() -> tuple[float, ...]:
            return self.look(
                state.neurons, self.cost(state), step=step,
                pull_of=lambda layer: pull_of(state.betas.get(layer.name, 0.0), penalty.strength(layer.name, step)[1], layer.group_size),
                weights_of=state.optimizer.pull_weights, learning_rate=lambda each: state.rate_factor * state.setup.learning_rate(each),
                min_alive=lambda layer: 0 if state.optimizer.depth and layer.bypassed else state.optimizer.min_alive,
            )  # fmt: skip

        factor, next_look = from_first(look, length=2, device=state.setup.device)
        self.decided(factor, int(next_look))

    def moved(self, pulls: Mapping[str, float], learning_rate: float) -> None:
        """In a step. pulls: {layer name: what its penalty took from a norm}."""
        self._moved += learning_rate
        for name, pull in pulls.items():
            self._pulled[name] = self._pulled.get(name, 0.0) + pull

    def look(
        self, neurons: Neurons, cost: Cost, *, step: int, pull_of: Callable[[NeuronLayer], float], weights_of: Callable[[NeuronLayer], Tensor],
        learning_rate: Callable[[int], float], min_alive: Callable[[NeuronLayer], int],
    ) -> tuple[float, int]:
        """(factor, step of the next look), by the first process.

        pull_of: what the penalty takes from a norm of a layer's neurons per unit of learning rate at a factor of 1, in the identity's metric;
        weights_of: times it in the optimizer's, (num_neurons,). learning_rate: of a step.
        """
        interval = max(1, self.course.steps_per_epoch // LOOKS_PER_EPOCH)
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
            allowed = self.course.allowed(step + steps)
            if left > allowed and any(rates[:steps]):
                least = _least(lethal_by(steps), cost, allowed)
                wanted = max(wanted, self.factor if least is None else least)
        factor = min(max(wanted, self.factor / FASTEST, LEAST), max(self.factor * FASTEST, LEAST), LARGEST)
        return factor, step + self._steps_to_next(lethal_by(len(rates)), cost, left=left, factor=factor, ahead=len(rates), interval=interval)

    def _steps_to_next(self, lethal: Mapping[str, Tensor], cost: Cost, *, left: float, factor: float, ahead: int, interval: int) -> int:
        """Fewer where much of what is above the budget will be gone by then."""
        for steps in (interval, interval // 2, interval // 4, interval // 8):
            if steps > 1:
                # A neuron with lethal factor L is gone after about L / factor of the way.
                gone = {name: factors > factor * min(1.0, 2 * steps / max(1, ahead)) for name, factors in lethal.items()}
                if left - cost.of(gone) < 0.5 * (left - self.budget):
                    return steps
        return 1

    def decided(self, factor: float, next_look: int) -> None:
        self.factor, self.is_met, self._next_look = factor, factor == 0, next_look

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "next_look": self._next_look, "norms": dict(self._norms), "pulled": dict(self._pulled), "moved": self._moved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._next_look, self._norms = int(state["next_look"]), dict(state["norms"])
        self._pulled, self._moved = dict(state["pulled"]), float(state["moved"])


def _norms(neurons: Neurons, layer: NeuronLayer) -> Tensor:
    if layer.num_neurons == 0:
        return torch.zeros(0, dtype=torch.float64)
    return row_norms(neurons.parts(layer)).detach().double().cpu()


L1_OF_GAUSSIAN = math.sqrt(2 / math.pi)
"""The L1 norm of a row over its L2 norm and the root of its length, where its entries are normal."""


def pull_of(beta: float, alpha: float, group_size: int) -> float:
    """What a proximal step takes from a neuron's norm over its t, about: exact for alpha = 0."""
    return beta * math.sqrt(group_size) * ((1 - alpha) + alpha * L1_OF_GAUSSIAN)


# --- less than half is left


FALL = 0.15
"""Share by which what may be left has fallen since the operator ran, where it runs before the epoch's end: so many at once a network can lose."""
MARGIN = 1e-4
"""Relative, above a lethal factor, so that rounding in the operator saves nobody."""
DELAY, EARLIER = 0.15, 0.8
"""Of the course. Filters that have hardly learned say little about who is needed."""
SPARE = 0.1
"""Share of a training without an end of the penalty, an epoch at most, in which the last that are left learn to do without the others."""


class AtOnce(Steering):
    """The operator at each epoch's end, and wherever much is to go, with the least factor at which no more is left than is allowed."""

    every = "epoch"

    def __init__(self, course: Course) -> None:
        super().__init__(replace(course, earliness=EARLIER, delay=DELAY, spare=min(course.steps_per_epoch, int(SPARE * course.num_steps))))
        self.factor = 0.0
        self._allowed = course.whole
        """When the operator ran last."""
        self._shrunk_at = 0
        """The step after which it ran last with a factor."""

    def at(self, step: int) -> float:
        """That with which the operator ran last, whatever the step; a ramp of the schedule has no meaning here."""
        return 0.0 if self.is_met else self.factor

    def is_due(self, step: int) -> bool:
        """Whether the operator runs after a step, counted from 1. Where the schedule has ended without the budget, at each epoch's end."""
        if self.is_met or step <= self.course.start:
            return False
        return step % self.course.steps_per_epoch == 0 or step == self.course.end or self.course.allowed(step) <= (1 - FALL) * self._allowed

    def after_step(self, state: RunState, step: int) -> None:
        if not self.is_due(step):
            return
        optimizer, penalty = state.optimizer, state.penalty

        def choose() -> tuple[float, ...]:
            lethal = {
                layer.name: optimizer.lethal_factors(layer, beta=state.betas.get(layer.name, 0.0), alpha=penalty.strength(layer.name, optimizer.num_steps - 1)[1])
                for layer in state.neurons
            }
            return (self.choose(self.cost(state), lethal, step=step),)

        self.decided(from_first(choose, length=1, device=state.setup.device)[0], step=step)
        optimizer.run_operator()
        self.is_met = from_first(lambda: (float(self.cost(state).now() <= self.budget),), length=1, device=state.setup.device) == [1.0]

    def choose(self, cost: Cost, lethal: Mapping[str, Tensor], *, step: int) -> float:
        """The least factor at which no more is left than is allowed after a step, counted from 1.

        lethal: the factor from which on each neuron is taken to zero, {layer name: float64 (num_neurons,)}; inf where none does, 0 of the dead.
        """
        allowed = self.course.allowed(step)
        if cost.now() <= allowed:
            return 0.0
        return (_least(lethal, cost, allowed) or 0.0) * (1 + MARGIN)

    def decided(self, factor: float, *, step: int) -> None:
        """With what the operator runs after a step, counted from 1."""
        self.factor, self._allowed = factor, self.course.allowed(step)
        self._shrunk_at = step if factor > 0 else self._shrunk_at

    def has_just_shrunk(self, step: int) -> bool:
        return step == self._shrunk_at

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "allowed": self._allowed, "shrunk_at": self._shrunk_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._allowed, self._shrunk_at = float(state["allowed"]), int(state["shrunk_at"])


# --- of a training


def steer(state: RunState, step: int) -> None:
    """Every process calls it after every step, counted from 1 over the whole run."""
    if state.steering is not None:
        state.steering.after_step(state, step)


def shortfall(state: RunState) -> str | None:
    """Of a training that is over: what is left more than its target allows."""
    steering = state.steering
    if steering is None or steering.is_met:
        return None
    left = steering.cost(state).now()
    if left <= steering.budget:
        return None
    later = "" if steering.course.schedule.end is None else "a later penalty.beta_schedule.end, or "
    betas = "larger betas to start from" if isinstance(steering, ByForesight) else "betas above 0 for more layers, or penalty.min_alive lower"
    return f"train.target {steering.target}: {left:.6g} are left where {steering.budget:.6g} may be; more epochs, or {later}{betas}"
