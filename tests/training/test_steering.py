"""A budget instead of a beta: what a network costs, and that trainings end with what the budget allows."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dist_gsl import compact, create_model, find_neurons
from dist_gsl.config import RunConfig
from dist_gsl.neurons import Neurons
from dist_gsl.penalty import PenaltyConfig, PerLayer, Schedule
from dist_gsl.training import checkpoint, loop
from dist_gsl.training.budget import Cost, Target, positions_of_weights
from dist_gsl.training.config import TrainConfig
from dist_gsl.training.path import PathConfig
from dist_gsl.training.state import RunState, build
from dist_gsl.training.steering import DEADLINES, Steering
from tests.device import DEVICE
from tests.training.trainings import NETWORK, TRAIN, TensorBatches, equal, trained

PENALTY = PenaltyConfig(beta=PerLayer(rest=3.0), unit="epochs", beta_schedule=Schedule(start=1, end=6))
LONGER = replace(TRAIN, epochs=8)
FORCED = "ignore:layer .* would kill every neuron"


@pytest.mark.parametrize(
    ("text", "target"),
    [("neurons=50%", Target("neurons", 50, True)), ("params=1e5", Target("params", 1e5, False)), ("macs = 12.5 %", Target("macs", 12.5, True)),
     ("latency_ms=.5", Target("latency_ms", 0.5, False)), ("neurons=40", Target("neurons", 40, False))],
)  # fmt: skip
def test_targets(text: str, target: Target) -> None:
    assert Target.parse(text) == target
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize("text", ["", "50%", "neurons", "neurons=", "neurons=-3", "neuron=50%", "neurons=50%%", "params=1e5x", "neurons=nan"])
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"train\.target is .*must say what may be left, such as neurons=50%"):
        replace(TRAIN, target=text)


@pytest.mark.parametrize(("text", "need"), [("neurons=0", "above 0$"), ("params=100%", "above 0 and below 100"), ("macs=0%", "above 0 and below 100")])
def test_targets_out_of_range_are_refused(text: str, need: str) -> None:
    with pytest.raises(ValueError, match=need):
        replace(TRAIN, target=text)


def test_what_cannot_be_steered_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set a penalty\.beta to start from"):
        RunConfig(train=TrainConfig(target="neurons=50%"))
    with pytest.raises(ValueError, match=r"leave out penalty\.revive"):
        RunConfig(train=TrainConfig(target="neurons=50%"), penalty=PenaltyConfig(beta=PerLayer(rest=0.1), revive=True))
    with pytest.raises(ValueError, match=r"leave out penalty\.every"):
        RunConfig(train=TrainConfig(target="neurons=50%"), penalty=PenaltyConfig(beta=PerLayer(rest=0.1), every="epoch"))
    with pytest.raises(ValueError, match=r"set penalty\.min_alive 1"):
        RunConfig(train=TrainConfig(target="params=50%"), penalty=PenaltyConfig(beta=PerLayer(rest=0.1), min_alive=0))
    with pytest.raises(ValueError, match=r"path: train\.target"):
        PathConfig().check(TrainConfig(target="neurons=50%"), PENALTY)
    config = RunConfig(train=TrainConfig(target="neurons=50%"), penalty=PENALTY)
    assert config.without_penalty().train.target is None


# --- what a network costs


def half_dead(name: str, **options: Any) -> tuple[nn.Module, Neurons]:
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **options)
    size = options.get("image_size", 32)
    neurons = find_neurons(model, torch.zeros(2, options.get("in_channels", 1), size, size))
    neurons.zero_({layer.name: range(0, layer.num_neurons, 2) for layer in neurons if layer.num_neurons > 1})
    return model, neurons


ZOO: dict[str, dict[str, Any]] = {
    "dec3": {"width": 1 / 16}, "bnet": {"width": 1 / 64, "in_channels": 3, "image_size": 64}, "vit-mini": {"width": 0.5},
    "resnet18": {"in_channels": 3, "image_size": 64}, "mobilenet_v2": {"in_channels": 3, "image_size": 64},
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_costs_are_those_of_the_network_that_is_left(name: str) -> None:
    model, neurons = half_dead(name, **ZOO[name])
    small = compact(model, neurons).model
    for kind, expected in (
        ("params", float(sum(p.numel() for p in small.parameters()))),
        ("neurons", float(sum(int(layer.mask.sum()) for layer in neurons))),
        ("macs", multiply_adds(small, neurons.input_shape)),
    ):
        if kind == "neurons" and name != "dec3":
            continue  # others count layers that cannot lose any, or do not count all that can
        assert Cost(kind, model, neurons).now() == expected
        assert Cost(kind, model, neurons).whole() > expected


def multiply_adds(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Of convolutions and linear layers for one image, by torch's own count, without what attention multiplies beside its weights."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.zeros(1, *shape[1:]))
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if str(operation) in ("aten.convolution", "aten.addmm", "aten.mm")) / 2


def test_multiply_adds_of_a_transposed_convolution() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    neurons = find_neurons(model, torch.zeros(2, 3, 5, 5))
    assert positions_of_weights(model, neurons) == {"0.weight": 25, "2.weight": 100}


def test_milliseconds_are_measured_and_follow_multiply_adds() -> None:
    model, neurons = half_dead("dec3", width=0.25)
    known: list[tuple[float, float]] = []
    cost = Cost("latency_ms", model, neurons, known)
    now = cost.now()
    assert len(known) == 1
    assert 0 < now < 1000
    every = {layer.name: torch.ones(layer.num_neurons, dtype=torch.bool) for layer in neurons}
    macs = Cost("macs", model, neurons)
    assert cost.of(every) == pytest.approx(now * macs.of(every) / macs.now())
    known.append((2 * macs.now(), 3 * now))
    assert cost.of(every) == pytest.approx(now + 2 * now * (macs.of(every) / macs.now() - 1), rel=0.5)


# --- what becomes of a training


@pytest.mark.filterwarnings(FORCED)
@pytest.mark.parametrize(
    ("target", "beta", "end"),
    [*((target, beta, 6.0) for target in ("neurons=70%", "neurons=30%", "params=25%", "macs=60%") for beta in (0.3, 3.0, 30.0)),
     ("neurons=70%", 3.0, None), ("neurons=30%", 3.0, None), ("params=25%", 30.0, None)],
)  # fmt: skip
def test_a_training_ends_with_its_budget(target: str, beta: float, end: float | None) -> None:
    """Whatever beta it starts from, and with or without an end before its own."""
    state, records = trained(replace(LONGER, target=target), replace(PENALTY, beta=PerLayer(rest=beta), beta_schedule=Schedule(start=1, end=end)))
    steering = state.steering
    assert steering is not None
    assert steering.budget is not None
    whole = steering.budget / float(target.partition("=")[2][:-1]) * 100
    left = Cost(steering.target.kind, state.model, state.neurons).now()
    assert steering.is_met
    assert steering.budget - 0.06 * whole <= left <= steering.budget  # a network of so few neurons, each of which is a percent
    assert records[-1]["beta_factor"] == 0
    if end is not None:
        assert len({record["neurons"] for record in records[-2:]}) == 1  # the penalty is over


@pytest.mark.filterwarnings(FORCED)
def test_milliseconds_are_a_budget_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose milliseconds depend on the network alone: a test double, as those of a real one may have changed by the next look."""
    monkeypatch.setattr("dist_gsl.training.budget.latency_ms", lambda model, **_: 0.1 + sum(p.numel() for p in model.parameters()) / 1e5)
    state, records = trained(replace(LONGER, target="latency_ms=75%"), PENALTY)
    assert state.steering is not None
    assert state.steering.is_met
    assert 0.7 * state.steering.whole < Cost("latency_ms", state.model, state.neurons).now() <= 0.75 * state.steering.whole
    assert records[-1]["neurons"] > 0
    assert len(state.steering.known) > 3


@pytest.mark.filterwarnings(FORCED)
def test_a_budget_that_is_not_met_is_told() -> None:
    short = PenaltyConfig(beta=PerLayer(rest=1e-6), beta_schedule=Schedule(start=3.7))
    with pytest.warns(UserWarning, match=r"train\.target neurons=10%: \d+ are left where 9\.9 may be; more epochs"):
        trained(replace(TRAIN, target="neurons=10%"), short)


@pytest.mark.filterwarnings(FORCED)
def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    config = replace(LONGER, target="neurons=40%", shrink="3")
    whole, records = trained(config, PENALTY)

    def stop(state: RunState, record: dict[str, Any]) -> None:
        if record["epoch"] == 3:
            checkpoint.save(state.state_dict(), tmp_path / "kept")
            raise InterruptedError

    data = TensorBatches()
    part = build(NETWORK, image_shape=(1, 32, 32), train=config, penalty=PENALTY, steps_per_epoch=len(data), device=DEVICE)
    with pytest.raises(InterruptedError):
        loop.train(part, config=config, penalty=PENALTY, training_data=data, validation_data=TensorBatches(), on_epoch=stop)
    assert part.steering is not None
    assert 0 < part.steering.factor != 1
    resumed, rest = trained(config, PENALTY, state=checkpoint.load(tmp_path / "kept"))
    assert equal(whole, resumed)
    assert rest[-1]["val_loss"] == records[-1]["val_loss"]


def needed(norms: torch.Tensor, steering: Steering, *, step: int, end: int, taken: float) -> float:
    """The largest factor over the deadlines, each by counting. taken: of each norm in a step at a factor of 1."""
    found = []
    for share in DEADLINES:
        steps = math.ceil(share * (end - step))
        allowed = 4 + 6 * ((end - step - steps) / (end - PENALTY.beta_schedule.start * 16)) ** (0.6 / 0.4)
        to_go = math.ceil(10 - allowed - 1e-9)
        found.append(float(norms[to_go - 1]) / (steps * taken) if to_go else 0.0)
    return max(found)


def test_what_may_be_left_falls_from_all_to_the_budget() -> None:
    steering = Steering(Target("neurons", 40, True), PENALTY, steps_per_epoch=16, num_steps=200, learning_rate=lambda step: 0.1)
    steering.budget, steering.whole = 4.0, 10.0
    start, end = (round(16 * each) for each in (PENALTY.beta_schedule.start, PENALTY.beta_schedule.end or 0))
    course = [steering.allowed(step) for step in range(200)]
    assert course[: start + 1] == [10.0] * (start + 1)
    assert course[end:] == [4.0] * (200 - end)
    assert all(a >= b for a, b in itertools.pairwise(course))
    assert course[(start + end) // 2] == pytest.approx(4 + 6 * 0.5 ** (0.6 / 0.4), abs=0.1), "most goes early"
    steering.budget = 3.0
    assert steering.allowed((start + end) // 2) == pytest.approx(3 + 7 * 0.5**2, abs=0.1), "the earlier, the less may be left"


@pytest.mark.parametrize(("left", "by"), [(1.0, 0.8), (2.0, 0.8), (2.5, 0.9), (3.0, 1.0), (4.0, 1.0)])
def test_few_neurons_are_to_be_had_before_the_end(left: float, by: float) -> None:
    steering = Steering(Target("neurons", 10 * left, True), replace(PENALTY, beta_schedule=Schedule()), steps_per_epoch=10, num_steps=200, learning_rate=lambda step: 0.1)
    steering.budget, steering.whole = left, 10.0
    there = round(200 * by)
    assert all(steering.allowed(step) == left for step in range(there, 201))
    assert steering.allowed(there - 20) > left
    assert steering.allowed(there // 2) == pytest.approx(left + (10 - left) * 0.5 ** min(4.0, 0.6 / left * 10))


@pytest.mark.parametrize("kind", ["params", "macs", "latency_ms"])
@pytest.mark.parametrize("share", [0.01, 0.04, 0.25, 0.64])
def test_weights_fall_with_the_square_of_the_widths(kind: str, share: float) -> None:
    """As a budget of as many neurons as leave them."""
    penalty = replace(PENALTY, beta_schedule=Schedule())
    weights, widths = (
        Steering(target, penalty, steps_per_epoch=10, num_steps=200, learning_rate=lambda step: 0.1)
        for target in (Target(kind, 100 * share, True), Target("neurons", 100 * math.sqrt(share), True))
    )
    weights.budget, weights.whole = 900 * share, 900.0
    widths.budget, widths.whole = 30 * math.sqrt(share), 30.0
    for step in range(201):
        assert weights.allowed(step) == pytest.approx(widths.allowed(step) ** 2)


def test_time_is_the_sum_of_the_learning_rates() -> None:
    """A rate that drops to a tenth in the middle leaves a tenth of the way for the second half."""
    for end in (20.0, None):
        penalty = PenaltyConfig(beta=PerLayer(rest=1.0), beta_schedule=Schedule(end=end))
        steering = Steering(Target("neurons", 50, True), penalty, steps_per_epoch=10, num_steps=200, learning_rate=lambda step: 1.0 if step < 100 else 0.1)
        steering.budget, steering.whole = 50.0, 100.0
        for step, way in ((0, 110), (55, 55), (100, 10), (150, 5), (200, 0)):
            assert steering.allowed(step) == pytest.approx(50 + 50 * (way / 110) ** (0.6 / 0.5)), (end, step)


def test_the_factor_is_the_one_at_which_the_budget_is_met() -> None:
    """Neurons that nothing supports lose what the penalty takes: the factor at which so many of them are gone by each deadline is exact."""
    first = nn.Linear(1, 10, bias=False)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(10, 1))
    neurons = find_neurons(model, torch.zeros(2, 1))
    steering = Steering(Target("neurons", 40, True), PENALTY, steps_per_epoch=16, num_steps=200, learning_rate=lambda step: 0.1)
    steering.budget, steering.whole = 4.0, 10.0
    cost = Cost("neurons", model, neurons)
    norms = torch.arange(1.0, 11.0)
    options: dict[str, Any] = {
        "pull_of": lambda layer: 2.0, "weights_of": lambda layer: torch.ones(10, dtype=torch.float64), "learning_rate": lambda step: 0.1,
        "min_alive": lambda layer: 1,
    }  # fmt: skip
    with torch.no_grad():
        first.weight[:, 0] = norms
        steering.look(neurons, cost, step=20, **options)
        steering.after_step({"0": 0.2}, 0.1)
        first.weight[:, 0] = norms - 0.2
        factor, next_look = steering.look(neurons, cost, step=21, **options)
    # 75 steps are left, of 0.1 * 2 * factor each. By each deadline so many are gone as the schedule asks if that takes the norm of the last of them.
    assert factor == pytest.approx(max(needed(norms - 0.2, steering, step=21, end=96, taken=0.2), 0.5))
    assert next_look == 22
    steering.decided(1.5, 22)
    steering.after_step({"0": 0.1}, 0.1)
    with torch.no_grad():  # all are supported by half of what is taken
        first.weight[:, 0] = norms - 0.2 - 0.05
        factor, _ = steering.look(neurons, cost, step=22, **options)
    assert factor == pytest.approx(needed(norms - 0.25, steering, step=22, end=96, taken=0.2) + 0.5 / 2, rel=1e-5)
    assert math.isfinite(factor)
