"""What processes decide together: to keep the state, to end, that the loss is beyond hope."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_gsl import data
from dist_gsl.config import RunConfig
from dist_gsl.training import loop, session
from dist_gsl.training.checkpoint import Checkpoints, snapshot
from dist_gsl.training.config import TrainConfig
from dist_gsl.training.state import Position, RunState, build
from dist_gsl.training.watch import DivergedError, Outside, Request, StoppedError, Watch
from tests.device import DEVICE
from tests.distributed.killed import config as digits_config
from tests.training.trainings import NETWORK, PENALTY, TRAIN, TensorBatches, equal, trained

NO_TIME = replace(TRAIN, checkpoint_minutes=None)


class Kept:
    """Trains and keeps what would be written: (position, at once) and the states."""

    def __init__(self, config: TrainConfig = NO_TIME, request: Callable[[], Request] = lambda: Request.NONE) -> None:
        self.places: list[tuple[int, int, bool]] = []
        self.states: list[dict[str, Any]] = []
        self.error: Exception | None = None
        batches = TensorBatches()
        self.run: RunState = build(
            NETWORK, image_shape=(1, 32, 32), train=config, penalty=PENALTY, steps_per_epoch=len(batches), device=DEVICE
        )
        try:
            loop.train(
                self.run, config=config, penalty=PENALTY, training_data=batches, validation_data=TensorBatches(),
                on_epoch=lambda state, record: None, outside=Outside(request, self._save),
            )  # fmt: skip
        except (DivergedError, StoppedError) as error:
            self.error = error

    def _save(self, state: dict[str, Any], at_once: bool) -> None:
        self.places.append((*state["position"].values(), at_once))
        self.states.append(snapshot(state))


class Asked:
    """Answers with a request at the n-th question, counted from 1."""

    def __init__(self, request: Request, n: int) -> None:
        self.request, self.n, self.count = request, n, 0

    def __call__(self) -> Request:
        self.count += 1
        return self.request if self.count == self.n else Request.NONE


@pytest.fixture
def look_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_gsl.training.watch.LOOK_S", 0.0)


def test_the_end_of_each_epoch_is_kept() -> None:
    assert Kept().places == [(epoch, 0, False) for epoch in (1, 2, 3, 4)]


def test_so_is_every_so_manieth_step() -> None:
    places = Kept(replace(NO_TIME, checkpoint_steps=4)).places[:4]
    assert places == [(0, 4, False), (1, 0, False), (1, 2, False), (2, 0, False)]  # of six steps an epoch


@pytest.mark.usefixtures("look_after_every_step")
def test_and_the_state_after_so_many_minutes() -> None:
    assert (0, 3, False) in Kept(replace(NO_TIME, checkpoint_minutes=1e-9)).places


@pytest.mark.usefixtures("look_after_every_step")
def test_asked_to_end_it_keeps_the_state_and_goes_on_from_there() -> None:
    kept = Kept(request=Asked(Request.STOP, 9))
    assert isinstance(kept.error, StoppedError)
    assert kept.places[-1] == (1, 2, True)  # six questions in the first epoch's six steps, one at its end
    whole, records = trained(NO_TIME)
    resumed, rest = trained(NO_TIME, state=kept.states[-1])
    assert equal(whole, resumed)
    assert len(rest) == 3
    for key in ("train_loss", "train_top1", "val_loss", "alive"):
        assert [record[key] for record in rest] == [record[key] for record in records[1:]]


def test_asked_at_an_epochs_last_step_it_does_not_wait_for_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_gsl.training.watch.LOOK_S", 1000.0)
    kept = Kept(request=Asked(Request.STOP, 2))  # the first question is after the first step
    assert isinstance(kept.error, StoppedError)
    assert kept.places == [(0, 6, True)]
    whole, records = trained(NO_TIME)
    resumed, again = trained(NO_TIME, state=kept.states[-1])
    assert equal(whole, resumed)
    assert [_without_times(record) for record in again] == [_without_times(record) for record in records]


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("seconds", "images_per_second")}


@pytest.mark.usefixtures("look_after_every_step")
def test_asked_to_keep_the_state_it_goes_on() -> None:
    kept = Kept(request=Asked(Request.SAVE, 2))
    assert kept.error is None
    assert kept.places[0] == (0, 2, True)
    assert kept.places[-1] == (4, 0, False)


@pytest.mark.usefixtures("look_after_every_step")
def test_a_loss_beyond_hope_ends_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_gsl.training.watch.EXPLODED", 1e-9)
    error = Kept().error
    assert isinstance(error, DivergedError)
    assert "times that of a network that has learned nothing in epoch 1, step 3; lower train.learning_rate" in str(error)


class Losses:
    """What a watch makes of losses that are not computed: (step, mean loss) after each of which it looks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: TrainConfig = NO_TIME) -> None:
        monkeypatch.setattr("dist_gsl.training.watch.LOOK_S", 0.0)
        self.state, _ = trained()
        self.state.first_loss, self.state.uninformed_loss = None, None
        self.saved: list[dict[str, int]] = []
        self.watch = Watch(config, Outside(save=lambda state, at_once: self.saved.append(state["position"])))
        self.totals, self.steps = torch.zeros(3, dtype=torch.float64), 0
        self.watch.begin_epoch(self.totals)

    def after(self, loss: float, *, samples: int = 8) -> None:
        self.totals += torch.tensor([loss * samples, 0, samples], dtype=torch.float64)
        self.steps += 1
        self.state.position = Position(0, self.steps)
        self.watch.after_step(self.state, self.totals, steps_done=self.steps, step=self.steps, is_last=False)


def test_a_peak_passes_and_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Losses(monkeypatch, replace(NO_TIME, checkpoint_steps=1))
    for loss in (2.0, 25.0, 25.0, 3.0, 25.0, 25.0, 19.0):
        losses.after(loss)
    assert [each["step"] for each in losses.saved] == [1, 4, 7]
    losses.after(21.0)
    losses.after(21.0)
    with pytest.raises(DivergedError, match="stays more than 10 times that of a network that has learned nothing in epoch 1, step 10"):
        losses.after(21.0)


def test_a_run_that_begins_with_a_small_loss_may_have_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that starts from a trained network."""
    losses = Losses(monkeypatch)
    losses.state.uninformed_loss = math.log(10)
    for loss in (0.001, 0.3, 1.5, 2.0, 2.3):
        losses.after(loss)
    assert losses.state.first_loss == pytest.approx(0.001)


def test_a_run_does_not_end_well_at_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Losses(monkeypatch)
    losses.after(2.0)
    losses.after(25.0)
    losses.state.position = Position(1, 0)
    losses.watch.end_epoch(losses.state)
    assert losses.saved == []
    losses.state.position = Position(NO_TIME.epochs, 0)
    with pytest.raises(DivergedError):
        losses.watch.end_epoch(losses.state)


def test_the_loss_of_a_network_that_has_learned_nothing() -> None:
    state, _ = trained()
    assert state.uninformed_loss == pytest.approx(math.log(NETWORK["num_classes"]))
    targets = torch.tensor([[1.0, 2.0], [3.0, 0.0]], device=DEVICE)
    assert loop._uninformed_loss(state, replace(TRAIN, loss="square"), targets) == pytest.approx((1 + 4 + 9) / 2)


def test_a_state_that_is_not_finite_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_at(monkeypatch, epoch=0, step=3)
    kept = Kept(replace(NO_TIME, checkpoint_steps=2))
    assert isinstance(kept.error, DivergedError)
    assert kept.places == [(0, 2, False)]


def spoil_at(patch: pytest.MonkeyPatch, *, epoch: int, step: int, times: int = 1) -> list[float]:
    """A parameter is not finite after that step, the first times. The learning rates of the steps."""
    original, rates, left = loop.train_step, list[float](), [times]

    def spoilt(state: RunState, config: TrainConfig, batch: Any) -> torch.Tensor:
        totals = original(state, config, batch)
        rates.append(state.optimizer.param_groups[0]["lr"])
        if (state.position.epoch, state.position.step) == (epoch, step) and left[0]:
            left[0] -= 1
            with torch.no_grad():
                next(state.model.parameters()).view(-1)[0] = math.nan
        return totals

    patch.setattr(loop, "train_step", spoilt)
    return rates


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    data.write("digits", folder)
    return folder


def run(folder: Path, directory: Path, **train: Any) -> RunState:
    config: RunConfig = digits_config(**train)
    return session.run(
        config, data_dir=directory, device=torch.device("cpu"), place=session.Place(Checkpoints(folder), on_back=BACK.append)
    )


BACK: list[int] = []
"""Epochs that trainings went back to."""


# Of one channel, where strides mean nothing; and a penalty so strong that the test is short.
EXPECTED = ("ignore:Grad strides do not match", "ignore:layer .* would kill every neuron")


@pytest.mark.filterwarnings(*EXPECTED)
def test_back_to_the_last_checkpoint_with_a_smaller_step(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = spoil_at(monkeypatch, epoch=1, step=7)
    BACK.clear()
    with pytest.warns(UserWarning, match=r"not finite in epoch 2, step 8; back to epoch 1, step 4, with 0\.5 of the learning rate"):
        state = run(tmp_path / "run", digits, on_divergence="back")
    assert BACK == [1]
    assert state.rate_factor == 0.5
    assert [record["epoch"] for record in state.history] == [1, 2, 3]
    assert len(rates) == 48 + 4  # some were made twice
    assert rates[24:28] == pytest.approx([rate / 2 for rate in rates[20:24]])


@pytest.mark.filterwarnings(*EXPECTED)
def test_from_where_it_diverged_twice_it_goes_back_further(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = spoil_at(monkeypatch, epoch=1, step=7, times=2)
    first, second = r"back to epoch 1, step 4, with 0\.5 of", r"back to epoch 1, step 0, with 0\.25 of"
    with pytest.warns(UserWarning, match=first), pytest.warns(UserWarning, match=second):
        state = run(tmp_path / "run", digits, on_divergence="back")
    assert [record["epoch"] for record in state.history] == [1, 2, 3]
    assert len(rates) == 48 + 4 + 8
    assert Checkpoints(tmp_path / "run").names()[0] == "epoch-0003"


@pytest.mark.filterwarnings(*EXPECTED)
def test_not_for_ever(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_at(monkeypatch, epoch=0, step=2, times=100)
    remedy = "not finite in epoch 1, step 3, with 0.03125 of the learning rate too; set a lower train.learning_rate"
    with pytest.warns(UserWarning, match="back to epoch 0, step 0"), pytest.raises(DivergedError, match=remedy):
        run(tmp_path / "run", digits, on_divergence="back")


def test_totals_of_other_numbers_of_processes() -> None:
    state, _ = trained()
    state.totals = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert loop._totals_before(state).tolist() == [5, 7, 9]
    state.totals = [[1.0, 2.0, 3.0]]
    assert loop._totals_before(state).tolist() == [1, 2, 3]
    state.totals = None
    assert loop._totals_before(state).tolist() == [0, 0, 0]
