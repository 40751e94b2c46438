"""A budget instead of a beta: what a network costs, and that trainings end with what the budget allows."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dist_gsl import ProximalAdamW, ProximalSGD, SparseGroupLasso, compact, create_model, find_neurons
from dist_gsl.config import RunConfig
from dist_gsl.neurons import Neurons
from dist_gsl.penalty import PenaltyConfig, PerLayer, Schedule
from dist_gsl.proximal import ProximalOptimizer
from dist_gsl.training import checkpoint, loop
from dist_gsl.training.budget import Cost, Target, positions_of_weights
from dist_gsl.training.config import TrainConfig
from dist_gsl.training.path import PathConfig
from dist_gsl.training.state import RunState, build
from dist_gsl.training.steering import DEADLINES, LEAST, AtOnce, ByForesight, Course, Steering
from dist_gsl.training.watch import CommonError, Outside
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
    [*((target, beta, 6.0) for target in ("neurons=70%", "neurons=30%", "params=40%", "params=15%", "macs=60%", "macs=20%") for beta in (0.3, 3.0, 30.0)),
     ("neurons=70%", 3.0, None), ("neurons=30%", 3.0, None), ("params=15%", 30.0, None)],
)  # fmt: skip
def test_a_training_ends_with_its_budget(target: str, beta: float, end: float | None) -> None:
    """Whatever beta it starts from, and with or without an end before its own."""
    state, records = trained(replace(LONGER, target=target), replace(PENALTY, beta=PerLayer(rest=beta), beta_schedule=Schedule(start=1, end=end)))
    steering = state.steering
    assert steering is not None
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
    share = Cost("latency_ms", state.model, state.neurons).now() / state.steering.course.whole
    assert 0.7 < share <= 0.75
    assert records[-1]["neurons"] > 0
    assert len(state.steering.known) >= 3


@pytest.mark.filterwarnings(FORCED)
def test_a_budget_that_is_not_met_is_told() -> None:
    short = PenaltyConfig(beta=PerLayer(rest=1e-6), beta_schedule=Schedule(start=3.7))
    with pytest.warns(UserWarning, match=r"train\.target neurons=60%: \d+ are left where 59\.4 may be; more epochs, or larger betas to start from"):
        trained(replace(TRAIN, target="neurons=60%"), short)


@pytest.mark.filterwarnings(FORCED)
@pytest.mark.parametrize("target", ["neurons=60%", "neurons=30%"])
def test_resumed_is_uninterrupted(target: str, tmp_path: Path) -> None:
    config = replace(LONGER, target=target, shrink="3")
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


def test_a_state_of_before_there_were_two_laws_goes_on_by_foresight() -> None:
    """It had no names of laws, and a met budget was a factor of 0."""
    options: dict[str, Any] = {"image_shape": (1, 32, 32), "train": replace(LONGER, target="neurons=30%"), "penalty": PENALTY, "steps_per_epoch": 6, "device": DEVICE}
    kept = {key: value for key, value in ByForesight(course_of("neurons=30%", whole=99.0)).state_dict().items() if key not in ("law", "is_met")}
    for factor in (0.0, 2.5):
        state = build(NETWORK, **options, state=None).state_dict()
        resumed = build(NETWORK, **options, state={**state, "steering": {**kept, "budget": 29.7, "factor": factor}})
        assert isinstance(resumed.steering, ByForesight)
        assert resumed.steering.is_met == (factor == 0)
        assert resumed.steering.at(20) == factor
        assert resumed.optimizer.every == "step"


def course_of(
    target: str, *, whole: float, schedule: Schedule = PENALTY.beta_schedule, steps_per_epoch: int = 10, num_steps: int = 200,
    learning_rate: Callable[[int], float] = lambda step: 0.1, **options: Any,
) -> Course:  # fmt: skip
    way = tuple(itertools.accumulate((learning_rate(step) for step in range(num_steps)), initial=0.0))
    return Course(Target.parse(target), whole, schedule, steps_per_epoch, num_steps, way, **options)


def test_what_may_be_left_falls_from_all_to_the_budget() -> None:
    course = course_of("neurons=40%", whole=10.0, steps_per_epoch=16)
    start, end = (round(16 * each) for each in (PENALTY.beta_schedule.start, PENALTY.beta_schedule.end or 0))
    allowed = [course.allowed(step) for step in range(200)]
    assert allowed[: start + 1] == [10.0] * (start + 1)
    assert allowed[end:] == [4.0] * (200 - end)
    assert all(a >= b for a, b in itertools.pairwise(allowed))
    assert allowed[(start + end) // 2] == pytest.approx(4 + 6 * 0.5 ** (0.6 / 0.4), abs=0.1), "most goes early"
    lower = course_of("neurons=30%", whole=10.0, steps_per_epoch=16)
    assert lower.allowed((start + end) // 2) == pytest.approx(3 + 7 * 0.5**2, abs=0.1), "the earlier, the less may be left"
    later = course_of("neurons=40%", whole=10.0, steps_per_epoch=16, delay=0.25)
    allowed = [later.allowed(step) for step in range(200)]
    delayed = start + (end - start) // 4
    assert allowed[: delayed + 1] == [10.0] * (delayed + 1)
    assert allowed[(delayed + end) // 2] == pytest.approx(4 + 6 * 0.5 ** (0.6 / 0.4), abs=0.1)


@pytest.mark.parametrize(("left", "by"), [(1.0, 0.8), (2.0, 0.8), (2.5, 0.9), (3.0, 1.0), (4.0, 1.0)])
def test_few_neurons_are_to_be_had_before_the_end(left: float, by: float) -> None:
    course = course_of(f"neurons={left}", whole=10.0, schedule=Schedule())
    there = round(200 * by)
    allowed = [course.allowed(step) for step in range(201)]
    assert allowed[there:] == [left] * (201 - there)
    assert allowed[there - 20] > left
    assert allowed[there // 2] == pytest.approx(left + (10 - left) * 0.5 ** min(4.0, 0.6 / left * 10))


@pytest.mark.parametrize("kind", ["params", "macs", "latency_ms"])
@pytest.mark.parametrize("share", [0.01, 0.04, 0.25, 0.64])
def test_weights_fall_with_the_square_of_the_widths(kind: str, share: float) -> None:
    """As a budget of as many neurons as leave them."""
    weights = course_of(f"{kind}={100 * share:g}%", whole=900.0, schedule=Schedule(), earliness=0.8, delay=0.15)
    widths = course_of(f"neurons={100 * math.sqrt(share):g}%", whole=30.0, schedule=Schedule(), earliness=0.8, delay=0.15)
    assert weights.width == pytest.approx(widths.width)
    for step in range(201):
        assert weights.allowed(step) == pytest.approx(widths.allowed(step) ** 2)


def test_time_is_the_sum_of_the_learning_rates() -> None:
    """A rate that drops to a tenth in the middle leaves a tenth of the way for the second half."""
    for end in (20.0, None):
        course = course_of("neurons=50%", whole=100.0, schedule=Schedule(end=end), learning_rate=lambda step: 1.0 if step < 100 else 0.1)
        for step, way in ((0, 110), (55, 55), (100, 10), (150, 5), (200, 0)):
            assert course.allowed(step) == pytest.approx(50 + 50 * (way / 110) ** (0.6 / 0.5)), (end, step)


@pytest.mark.parametrize("kind", ["neurons", "params"])
@given(whole=st.integers(2, 10**6), percent=st.integers(1, 99), start=st.floats(0, 5))
def test_until_it_is_due_all_may_be_left(kind: str, whole: int, percent: int, start: float) -> None:
    """To the last digit: or the operator would take somebody."""
    course = course_of(f"{kind}={percent}%", whole=whole, schedule=Schedule(start=start), delay=0.15)
    assert all(course.allowed(step) == whole for step in range(course.start + 18))
    assert course.allowed(200) == pytest.approx(whole * percent / 100)


@pytest.mark.parametrize(
    ("target", "law"),
    [("neurons=50%", ByForesight), ("neurons=49%", AtOnce), ("neurons=60", ByForesight), ("neurons=30", AtOnce), ("params=25%", ByForesight),
     ("params=24%", AtOnce), ("macs=4%", ByForesight)],
)  # fmt: skip
def test_half_of_the_widths_decides_how_it_is_steered(target: str, law: type[Steering]) -> None:
    state = build(NETWORK, image_shape=(1, 32, 32), train=replace(LONGER, target=target), penalty=PENALTY, steps_per_epoch=6, device=DEVICE)
    assert type(state.steering) is law
    assert state.optimizer.every == law.every


# --- by foresight


def needed(norms: torch.Tensor, steering: Steering, *, step: int, end: int, taken: float) -> float:
    """The largest factor over the deadlines, each by counting. taken: of each norm in a step at a factor of 1."""
    found = []
    for share in DEADLINES:
        steps = math.ceil(share * (end - step))
        allowed = 6 + 4 * ((end - step - steps) / (end - PENALTY.beta_schedule.start * 16)) ** (0.6 / 0.6)
        to_go = math.ceil(10 - allowed - 1e-9)
        found.append(float(norms[to_go - 1]) / (steps * taken) if to_go else 0.0)
    return max(found)


def test_the_factor_is_the_one_at_which_the_budget_is_met() -> None:
    """Neurons that nothing supports lose what the penalty takes: the factor at which so many of them are gone by each deadline is exact."""
    first = nn.Linear(1, 10, bias=False)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(10, 1))
    neurons = find_neurons(model, torch.zeros(2, 1))
    steering = ByForesight(course_of("neurons=60%", whole=10.0, steps_per_epoch=16))
    cost = Cost("neurons", model, neurons)
    norms = torch.arange(1.0, 11.0)
    options: dict[str, Any] = {
        "pull_of": lambda layer: 2.0, "weights_of": lambda layer: torch.ones(10, dtype=torch.float64), "learning_rate": lambda step: 0.1,
        "min_alive": lambda layer: 1,
    }  # fmt: skip
    with torch.no_grad():
        first.weight[:, 0] = norms
        steering.look(neurons, cost, step=20, **options)
        steering.moved({"0": 0.2}, 0.1)
        first.weight[:, 0] = norms - 0.2
        factor, next_look = steering.look(neurons, cost, step=21, **options)
    # 75 steps are left, of 0.1 * 2 * factor each. By each deadline so many are gone as the schedule asks if that takes the norm of the last of them.
    assert factor == pytest.approx(max(needed(norms - 0.2, steering, step=21, end=96, taken=0.2), 0.5))
    assert next_look == 22
    steering.decided(1.3, 22)
    steering.moved({"0": 0.1}, 0.1)
    with torch.no_grad():  # all are supported by half of what is taken
        first.weight[:, 0] = norms - 0.2 - 0.05
        factor, _ = steering.look(neurons, cost, step=22, **options)
    assert factor == pytest.approx(needed(norms - 0.25, steering, step=22, end=96, taken=0.2) + 0.5 / 2, rel=1e-5)
    assert math.isfinite(factor)


def test_a_neuron_that_is_almost_nothing_does_not_take_the_factor_with_it() -> None:
    """As weight decay leaves one that is dead but for rounding: it would be followed for ever."""
    first = nn.Linear(1, 10, bias=False)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(10, 1))
    neurons = find_neurons(model, torch.zeros(2, 1))
    steering = ByForesight(course_of("neurons=9", whole=10.0, schedule=Schedule()))
    steering.decided(1.5 * LEAST, 0)
    options: dict[str, Any] = {
        "pull_of": lambda layer: 2.0, "weights_of": lambda layer: torch.ones(10, dtype=torch.float64), "learning_rate": lambda step: 0.1,
        "min_alive": lambda layer: 1,
    }  # fmt: skip
    for step, norm in ((199, 1e-12), (199, 1e-13)):
        with torch.no_grad():
            first.weight.fill_(1.0)
            first.weight[0] = norm
        factor, _ = steering.look(neurons, Cost("neurons", model, neurons), step=step, **options)
        steering.moved({"0": 0.0}, 0.1)
    assert factor == LEAST


# --- at once


def test_a_state_knows_whether_it_has_just_shrunk() -> None:
    """A training that stopped between an epoch's last step and its evaluation is evaluated when it goes on."""
    course = course_of("neurons=10%", whole=100.0)
    before, after = AtOnce(course), AtOnce(course)
    before.decided(1.0, step=20)
    after.load_state_dict(before.state_dict())
    assert after.has_just_shrunk(20)
    after.decided(0.0, step=30)
    assert not after.has_just_shrunk(30)


@pytest.mark.parametrize("target", ["neurons=4", "neurons=7", "params=20", "params=15"])
@pytest.mark.parametrize("step", [20, 40, 96])
@pytest.mark.parametrize("kind", [ProximalSGD, ProximalAdamW])
def test_the_factor_is_the_least_at_which_no_more_is_left_than_is_allowed(target: str, step: int, kind: type[ProximalSGD] | type[ProximalAdamW]) -> None:
    """By the operator itself, with that factor and with a little less."""

    def begun() -> tuple[AtOnce, ProximalOptimizer, Cost]:
        torch.manual_seed(step)
        model = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 1))
        neurons = find_neurons(model, torch.zeros(2, 3))
        cost = Cost(Target.parse(target).kind, model, neurons)
        steering = AtOnce(course_of(target, whole=cost.whole(), steps_per_epoch=16))
        penalty = SparseGroupLasso(beta=lambda layer, step: 0.3 * steering.factor, alpha=0.5)
        optimizer = kind(model.parameters(), neurons, penalty, lr=0.1, every="epoch")
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        return steering, optimizer, cost

    def left_with(factor: float) -> float:
        steering, optimizer, cost = begun()
        steering.factor = factor
        optimizer.run_operator()
        return cost.now()

    steering, optimizer, cost = begun()
    lethal = {layer.name: optimizer.lethal_factors(layer, beta=0.3, alpha=0.5) for layer in optimizer.neurons}
    chosen = steering.choose(cost, lethal, step=step)
    assert left_with(chosen) <= steering.course.allowed(step)
    if chosen:
        assert left_with(chosen * (1 - 2e-4)) > steering.course.allowed(step)


def test_the_operator_runs_at_the_ends_of_epochs_and_where_much_is_to_go() -> None:
    steering = AtOnce(course_of("neurons=10%", whole=100.0, schedule=Schedule(start=1), num_steps=205))
    ran = []
    for step in range(1, 206):
        if steering.is_due(step):
            steering.decided(1.0, step=step)
            ran.append(step)
    assert set(range(20, 210, 10)) <= set(ran)
    assert min(ran) > 10
    assert steering.course.allowed(195) == 10, "an epoch is left to those who stay"
    allowed = [steering.course.allowed(step) for step in ran]
    assert all(b >= 0.8 * a for a, b in itertools.pairwise(allowed)), "never a fifth at once"
    assert len(ran) > 20
    steering.is_met = True
    assert not any(steering.is_due(step) for step in range(1, 206))


def test_a_budget_that_is_missed_at_the_schedules_end_is_due_at_each_epochs_end() -> None:
    steering = AtOnce(course_of("neurons=10%", whole=100.0, schedule=Schedule(start=1, end=12.5)))
    steering.decided(1.0, step=125)
    assert [step for step in range(126, 201) if steering.is_due(step)] == list(range(130, 201, 10))


@pytest.mark.filterwarnings(FORCED)
def test_it_goes_on_to_the_bit_from_within_an_epoch() -> None:
    """Also between two runs of the operator, whose t is what has gathered by then."""
    config = replace(LONGER, target="neurons=30%", shrink="5", checkpoint_steps=4, checkpoint_minutes=None)
    kept: list[dict[str, Any]] = []
    data = TensorBatches()
    whole = build(NETWORK, image_shape=(1, 32, 32), train=config, penalty=PENALTY, steps_per_epoch=len(data), device=DEVICE)
    loop.train(
        whole, config=config, penalty=PENALTY, training_data=data, validation_data=data, on_epoch=lambda state, record: None,
        outside=Outside(save=lambda state, at_once: kept.append(checkpoint.snapshot(state))),
    )  # fmt: skip
    within = [state for state in kept if 0 < state["position"]["step"] < 6 and state["steering"]["factor"] > 0 and not state["steering"]["is_met"]]
    assert any(state["optimizer"]["since_prox"][0] > 0 for state in within)
    for state in within[:3]:
        resumed, _ = trained(config, PENALTY, state=state)
        assert equal(whole, resumed)


@pytest.mark.filterwarnings(FORCED, "ignore:stepping after backward")
@pytest.mark.parametrize("end", [2.5, None])
def test_adamw_and_clipping_meet_it_too(end: float | None) -> None:
    config = replace(TRAIN, target="neurons=30%", optimizer="adamw", learning_rate=0.003, max_grad_norm=1.0)
    penalty = PenaltyConfig(beta=PerLayer(rest=0.01), alpha=PerLayer(rest=0.5), beta_schedule=Schedule(start=0.5, end=end))
    state, _ = trained(config, penalty)
    assert isinstance(state.steering, AtOnce)
    assert state.steering.is_met
    assert state.steering.budget - 1 < Cost("neurons", state.model, state.neurons).now() <= state.steering.budget


def test_milliseconds_that_no_network_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_gsl.training.budget.latency_ms", lambda model, **_: 1.5 + sum(p.numel() for p in model.parameters()) / 1e5)
    with pytest.raises(CommonError, match=r"train\.target latency_ms=1: with one neuron a layer an image takes 1\.50\d ms on cpu, where 1 are asked for; ask for more"):
        build(NETWORK, image_shape=(1, 32, 32), train=replace(LONGER, target="latency_ms=1"), penalty=PENALTY, steps_per_epoch=6, device=torch.device("cpu"))


@pytest.mark.filterwarnings(FORCED)
def test_what_has_just_shrunk_is_evaluated_with_statistics_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on as without them, to the bit."""
    config, penalty = replace(LONGER, target="neurons=30%"), replace(PENALTY, beta_schedule=Schedule(start=1))
    network = {**NETWORK, "batch_norm": True}
    state, records = trained(config, penalty, network=network)
    monkeypatch.setattr("dist_gsl.training.loop.estimate_statistics", lambda model, parts: None)
    other, without = trained(config, penalty, network=network)
    assert equal(state, other)
    assert all(torch.equal(a, b) for a, b in zip(state.model.buffers(), other.model.buffers(), strict=True))
    differ = [a["epoch"] for a, b in zip(records, without, strict=True) if a["val_loss"] != b["val_loss"]]
    assert differ
    assert max(differ) < LONGER.epochs
    assert max(record["val_loss"] for record in records) < max(record["val_loss"] for record in without)


@pytest.mark.filterwarnings(FORCED)
def test_one_epoch_is_enough() -> None:
    """The operator runs as often as it takes."""
    short = PenaltyConfig(beta=PerLayer(rest=1.0), beta_schedule=Schedule())
    state, _ = trained(replace(TRAIN, epochs=1, target="neurons=30%"), short)
    assert state.steering is not None
    assert state.steering.is_met
    assert state.steering.budget - 1 < Cost("neurons", state.model, state.neurons).now() <= state.steering.budget


@pytest.mark.filterwarnings(FORCED)
def test_a_budget_below_a_neuron_of_each_layer_is_not_met() -> None:
    with pytest.warns(UserWarning, match=r"train\.target neurons=3: 6 are left where 3 may be; more epochs, or a later .*betas above 0 for more layers"):
        trained(replace(TRAIN, target="neurons=3"), PENALTY)
