"""Dead neurons leave while training goes on, and training goes on as if they had stayed."""

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_gsl
from dist_gsl.penalty import PerLayer
from dist_gsl.training import checkpoint, loop, session
from dist_gsl.training.shrinking import Rule, removable_percent
from dist_gsl.training.state import RunState, build, build_whole
from tests.device import DEVICE
from tests.training.trainings import NETWORK, PENALTY, TRAIN, Course, TensorBatches, equal, trained


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same_course(shrink: str, **options: Any) -> Course:
    """Asserts that losses, measures and the network that is left are those of the training without removal."""
    whole, small = Course("never", **options), Course(shrink, **options)
    difference = (torch.tensor(whole.losses) - torch.tensor(small.losses)).abs() / torch.tensor(whole.losses).abs().clamp_min(1)
    assert len(small.losses) == 8 * options["num_steps"]
    assert float(difference.max()) <= 1e-9
    told = ("neurons", "group_param", "total_param", "total_induced", "all_neurons")
    for a, b in zip(whole.records, small.records, strict=True):
        assert {key: b[key] for key in told} == pytest.approx({key: a[key] for key in told})
        assert a["alive"] == b["alive"]
        assert b["val_loss"] == pytest.approx(a["val_loss"], abs=1e-9)
    shape = TensorBatches(size=options.get("size", 32), channels=options["network"].get("in_channels", 1)).image_shape
    again, neurons = build_whole(options["network"], image_shape=shape, state=small.state.state_dict())
    parameters = dict(whole.state.model.named_parameters())
    for name, tensor in again.named_parameters():
        assert torch.allclose(tensor, parameters[name], rtol=0, atol=1e-9), name
    for layer in whole.state.neurons:
        assert torch.equal(neurons[layer.name].mask, layer.mask), layer.name
    return small


def test_a_layer_that_is_all_dead_stays() -> None:
    """As the output is constant, and no smaller network would have it; with min_alive 0."""
    state, _ = trained()
    rule = Rule.parse("epoch")
    state.neurons.zero_({"features.conv1v": [0]})
    assert rule.is_due(state.neurons, epoch_ends=True)
    layer = state.neurons["features.conv2h"]
    state.neurons.zero_({layer.name: range(layer.num_neurons)})
    assert not rule.is_due(state.neurons, epoch_ends=True)


NEVER_SEEN = "ignore:layer .* would kill every neuron"


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings(NEVER_SEEN)
@pytest.mark.parametrize("shrink", ["5", "10%", "epoch"])
def test_training_goes_on_as_it_would_have(shrink: str) -> None:
    small = same_course(shrink, network={**NETWORK, "batch_norm": True}, epochs=2.0, num_steps=8)
    assert small.num_removals >= 3
    assert small.sizes[-1] < small.sizes[0] / 2
    assert small.records[-1]["parameters"] == small.sizes[-1]


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings(NEVER_SEEN, "ignore:stepping after backward")
@pytest.mark.parametrize(
    "options", [{"ema": 0.9}, {"max_grad_norm": 1.0}, {"accumulate": 2, "nesterov": True, "weight_decay": 1e-3}, {"momentum": 0.0}], ids=str
)
def test_so_do_all_its_parts(options: dict[str, Any]) -> None:
    assert same_course("5", network=NETWORK, epochs=2.0, num_steps=6, **options).num_removals >= 3


ADAMW: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 0.002, "weight_decay": 0.05}


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings(NEVER_SEEN)
@pytest.mark.parametrize("options", [{}, {"ema": 0.9}], ids=str)
def test_so_does_adamw(options: dict[str, Any]) -> None:
    assert same_course("5", network={**NETWORK, "batch_norm": True}, epochs=0.06, unit="absolute", num_steps=8, **ADAMW, **options).num_removals >= 3


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings(NEVER_SEEN)
def test_a_transformer_loses_neurons_of_its_mlps_exactly() -> None:
    network = {"name": "vit-mini", "num_classes": 5, "width": 0.25}
    small = same_course("epoch", network=network, epochs=0.008, unit="absolute", num_steps=8, **ADAMW)
    assert small.num_removals >= 3
    alive = {name: count for name, count in small.records[-1]["alive"].items() if ".mlp." in name}
    assert len(alive) == 4
    assert 0 < sum(alive.values()) < 0.8 * 4 * 64


ZOO: dict[str, dict[str, Any]] = {
    "bnet": {"width": 1 / 64, "in_channels": 3, "image_size": 64}, "bnet-c": {"width": 1 / 16, "in_channels": 3, "image_size": 64},
    **{key: {"width": 1 / 32, "in_channels": 3} for key in ("dec8", "dec8-640", "dec8-768")}, "dec3": {"width": 1 / 16},
    "resnet18": {"width": 1.0, "in_channels": 1},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings(NEVER_SEEN)
@pytest.mark.parametrize("name", ZOO)
def test_every_network(name: str) -> None:
    options = {"name": name, "num_classes": 5, "batch_norm": None, **ZOO[name]}
    is_large = name == "resnet18"  # there is no smaller one
    small = same_course(
        "epoch", network=options, epochs=2.0, num_steps=6 if is_large else 25, size=32 if is_large or name == "dec3" else 64,
        batch_size=4 if is_large else 8,
    )  # fmt: skip
    assert small.num_removals >= 3


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings(NEVER_SEEN)
@pytest.mark.parametrize("shrink", ["epoch", "10%"])
def test_widths_stay_multiples(shrink: str) -> None:
    """And nothing is removed again that brings no width to the next multiple."""
    started: dict[str, int] = {}
    removals = []
    remove = RunState.shrink

    def counted(state: RunState) -> bool:
        before = {layer.name: layer.num_neurons for layer in state.neurons}
        started.update({} if started else before)
        done = remove(state)
        removals.append(before != {layer.name: layer.num_neurons for layer in state.neurons})
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "shrink", counted)
        small = same_course(shrink, network={**NETWORK, "batch_norm": True}, epochs=2.0, num_steps=8, shrink_multiple_of=3, ema=0.9)
    assert len(removals) >= 2
    assert all(removals)
    padding = 0
    for layer in small.state.neurons:
        alive = int(layer.mask.sum())
        assert layer.num_neurons == min(started[layer.name], 3 * -(-alive // 3))
        padding += layer.num_neurons - alive
    assert padding > 0


def test_widths_stay_multiples_on_a_gpu_by_default() -> None:
    setup = build(NETWORK, image_shape=(1, 32, 32), train=TRAIN, penalty=PENALTY, steps_per_epoch=6, device=DEVICE).setup
    for device, multiple_of, expected in (("cuda", None, 32), ("cpu", None, 1), ("cuda", 1, 1), ("cpu", 8, 8)):
        chosen = replace(setup, device=torch.device(device), train=replace(TRAIN, shrink_multiple_of=multiple_of))
        assert chosen.multiple_of == expected


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings(NEVER_SEEN)
def test_dropout_is_drawn_for_the_removed_too() -> None:
    network = {"name": "bnet", "num_classes": 5, "batch_norm": None, **ZOO["bnet"]}
    small = same_course("2", network=network, epochs=2.0, num_steps=4, size=64)
    assert small.num_removals >= 3
    assert {"fc1", "fc2"} & {name.rpartition(".")[2] for name, alive in small.records[-1]["alive"].items() if alive < 64}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_after_removals_equals_uninterrupted(tmp_path: Path, optimizer: str) -> None:
    config = replace(TRAIN, shrink="3", ema=0.9, **(ADAMW if optimizer == "adamw" else {}))
    penalty = replace(PENALTY, unit="absolute", beta=PerLayer(rest=0.06)) if optimizer == "adamw" else PENALTY
    whole, records = trained(config, penalty)
    saved: list[int] = []

    def stop(state: RunState, record: dict[str, Any]) -> None:
        if record["epoch"] == 3:
            checkpoint.save(state.state_dict(), tmp_path / "kept")
            saved.append(record["parameters"])
            raise InterruptedError

    data = TensorBatches()
    part = build(
        NETWORK, image_shape=(1, 32, 32), train=config, penalty=penalty, steps_per_epoch=len(data), device=DEVICE
    )  # fmt: skip
    with pytest.raises(InterruptedError):
        loop.train(part, config=config, penalty=penalty, training_data=data, validation_data=TensorBatches(), on_epoch=stop)
    resumed, rest = trained(config, penalty, state=checkpoint.load(tmp_path / "kept"))
    assert saved[0] < 0.9 * records[0]["parameters"]
    assert equal(whole, resumed)
    assert rest[-1]["val_loss"] == records[-1]["val_loss"]


def test_old_networks_and_buckets_are_let_go() -> None:
    state, _ = trained(replace(TRAIN, shrink="never"))
    before: list[weakref.ref[object]] = [weakref.ref(state.ddp), weakref.ref(state.optimizer), weakref.ref(state.model)]
    state.shrink()
    assert [kept() for kept in before] == [None, None, None]


def test_init_from_a_smaller_network_has_zeros(tmp_path: Path) -> None:
    small, _ = trained(replace(TRAIN, shrink="epoch"))
    whole, _ = trained(replace(TRAIN, shrink="never"))
    file = checkpoint.save(small.state_dict(), tmp_path / "kept")
    started = build(
        NETWORK, image_shape=(1, 32, 32), train=replace(TRAIN, init=str(file)), penalty=PENALTY, steps_per_epoch=6,
        device=DEVICE,
    )  # fmt: skip
    assert small.num_parameters < whole.num_parameters
    assert equal(started, whole, tolerance=1e-5)


def test_norms_are_told_of_the_starting_network() -> None:
    small, _ = trained(replace(TRAIN, shrink="epoch"))
    whole, _ = trained(replace(TRAIN, shrink="never"))
    for name, norms in session.neuron_norms(small.neurons).items():
        assert torch.allclose(norms, session.neuron_norms(whole.neurons)[name], atol=1e-5)
        assert torch.equal(small.neurons[name].in_starting_network(small.neurons[name].mask), whole.neurons[name].mask)


@pytest.mark.parametrize(
    ("text", "rule"),
    [("never", Rule(epoch=False)), ("epoch", Rule()), ("200", Rule(steps=200)), ("5%", Rule(percent=5)), ("0.5 %", Rule(percent=0.5))],
)
def test_rules(text: str, rule: Rule) -> None:
    assert Rule.parse(text) == rule


def test_a_multiple_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.shrink_multiple_of is 0, must be at least 1, or left out"):
        replace(TRAIN, shrink_multiple_of=0)


@pytest.mark.parametrize("text", ["", "0", "-3", "0%", "100%", "often", "5 percent", "1e3"])
def test_other_rules_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"train\.shrink is .*must be never, epoch, a number of steps"):
        replace(TRAIN, shrink=text)


def test_the_share_that_can_go() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    neurons = dist_gsl.find_neurons(model, torch.randn(1, 3))
    assert removable_percent(neurons) == 0
    neurons.zero_({"0": [1, 2]})
    assert removable_percent(neurons) == pytest.approx(100 * 2 * (3 + 1 + 2) / 26)
    assert removable_percent(neurons, multiple_of=3) == pytest.approx(100 * (3 + 1 + 2) / 26)
    assert removable_percent(neurons, multiple_of=4) == 0
    assert Rule.parse("30%").is_due(neurons, epoch_ends=False)
    assert not Rule.parse("30%").is_due(neurons, multiple_of=3, epoch_ends=False)
    assert Rule.parse("epoch").is_due(neurons, multiple_of=3, epoch_ends=True)
    assert not Rule.parse("epoch").is_due(neurons, multiple_of=4, epoch_ends=True)


def test_revivable_neurons_stay() -> None:
    _, records = trained(replace(TRAIN, shrink="epoch"), replace(PENALTY, revive=True))
    assert records[-1]["neurons"] > 0
    assert len({record["parameters"] for record in records}) == 1


def test_what_cannot_be_removed_stays_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, expected = trained(replace(TRAIN, shrink="never"))
    tries = []

    def refuse(*_: Any, **__: Any) -> None:
        tries.append(1)
        raise RuntimeError("compact: the outputs differ by 0.5")

    monkeypatch.setattr("dist_gsl.training.state.compact", refuse)
    with pytest.warns(UserWarning, match="the dead stay in training: compact: the outputs differ by 0.5"):
        state, records = trained(replace(TRAIN, shrink="epoch"))
    assert len(tries) == 1
    assert records[-1]["neurons"] > 0
    assert [record["val_loss"] for record in records] == [record["val_loss"] for record in expected]
    assert equal(state, whole)
