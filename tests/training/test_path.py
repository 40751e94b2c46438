"""A regularisation path: one training, a network for each strength of the penalty, and as if nothing had been when it is interrupted."""

import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_gsl import data
from dist_gsl.config import RunConfig
from dist_gsl.penalty import PenaltyConfig, PerLayer, starting_betas
from dist_gsl.training import loop, path
from dist_gsl.training.checkpoint import Checkpoints
from dist_gsl.training.config import TrainConfig
from dist_gsl.training.path import PathConfig, Report, at_strength, strengths
from dist_gsl.training.session import Place, UnavailableError, dry_build, shapes_of
from dist_gsl.training.state import RunState
from dist_gsl.training.watch import Request, StoppedError
from tests.distributed.killed import config as digits_config

# Of one channel, where strides mean nothing; and a penalty so strong that the test is short.
pytestmark = [pytest.mark.filterwarnings("ignore:Grad strides do not match"), pytest.mark.filterwarnings("ignore:layer .* would kill every neuron")]

PARTS = PathConfig(step_epochs=1, finish_epochs=1)
VALUES = [0.5, 0.25]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    data.write("digits", folder)
    return folder


def config(**train: Any) -> RunConfig:
    made = digits_config(**train)
    return replace(made, train=replace(made.train, shrink="epoch", checkpoint_steps=None))


class Followed:
    """A path, what it told and what it left."""

    def __init__(self, directory: Path, folder: Path, request: Callable[[], Request] = lambda: Request.NONE, **train: Any) -> None:
        self.told: list[tuple[str, int]] = []
        self.before: list[list[int]] = []
        """Epochs that led to each beginning."""
        self.epochs: list[int] = []
        self.folder, self.is_stopped = folder, False
        try:
            path.follow(
                config(**train), PARTS, VALUES, data_dir=directory, device=torch.device("cpu"), trunk=Checkpoints(folder / "path"),
                branches=self.branch, place=Place(request=request, on_epoch=lambda state, record: self.epochs.append(record["epoch"])),
                report=Report(self.begun, lambda number: self.told.append(("trained", number))),
            )  # fmt: skip
        except StoppedError:
            self.is_stopped = True

    def begun(self, number: int, history: Sequence[dict[str, Any]]) -> None:
        self.told.append(("begun", number))
        self.before.append([record["epoch"] for record in history])

    def branch(self, number: int) -> Checkpoints:
        return Checkpoints(self.folder / str(number))

    def state(self, number: int) -> dict[str, Any]:
        _, state = self.branch(number).last() or ("", {})
        return state

    def alive(self, number: int) -> int:
        return sum(self.state(number)["history"][-1]["alive"].values())


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """To the bit, parameters and metrics."""
    metrics = ("epoch", "train_loss", "train_top1", "val_loss", "val_top1", "learning_rate", "alive", "parameters")
    return all(torch.equal(value, b["model"][name]) for name, value in a["model"].items()) and all(
        row[key] == other[key] for row, other in zip(a["history"], b["history"], strict=True) for key in metrics
    )


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Followed:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Followed(digits, tmp_path_factory.mktemp("whole"))


def test_one_training_leads_to_a_network_for_each_strength(whole: Followed) -> None:
    assert whole.told == [("begun", 0), ("trained", 0), ("begun", 1), ("trained", 1), ("begun", 2), ("trained", 2)]
    assert whole.before == [[], [1, 2], [1, 2, 3]]
    # Dense to 2 and its branch to 3; then each part of the trunk and its branch.
    assert whole.epochs == [1, 2, 3, 3, 4, 4, 5]
    assert [whole.state(number)["position"]["epoch"] for number in (0, 1, 2)] == [3, 4, 5]
    assert [row["epoch"] for row in whole.state(2)["history"]] == [1, 2, 3, 4, 5]
    assert PARTS.num_epochs(config().train, 2) == 7 == len(whole.epochs)


def test_neurons_die_along_it_and_not_in_its_branches(whole: Followed) -> None:
    assert whole.alive(0) > whole.alive(1) > whole.alive(2)
    for number in (1, 2):
        before, after = whole.state(number)["history"][-2:]
        assert after["alive"] == before["alive"]
        assert set(whole.state(number)["betas"].values()) == {0.0}
    _, trunk = Checkpoints(whole.folder / "path").last() or ("", {})
    for layer, kept in trunk["optimizer"]["neurons"].items():  # dead is dead
        assert set(kept["indices"].tolist()) <= set(whole.state(1)["optimizer"]["neurons"][layer]["indices"].tolist())


def test_its_strengths_are_those_of_trainings_of_their_own(whole: Followed, digits: Path) -> None:
    _, trunk = Checkpoints(whole.folder / "path").last() or ("", {})
    own = replace(config(), penalty=at_strength(config().penalty, VALUES[-1]))
    torch.manual_seed(own.train.seed)
    neurons = dry_build(own, shapes_of(own, data.dataset_info(digits)))
    expected = starting_betas(own.penalty, neurons, steps_per_epoch=16, learning_rate=lambda s: own.train.learning_rate_at(s, steps_per_epoch=16))
    assert trunk["betas"] == expected


@pytest.mark.parametrize(
    "question", [pytest.param(3, marks=pytest.mark.slow), 40, pytest.param(55, marks=pytest.mark.slow), 70, pytest.param(100, marks=pytest.mark.slow)]
)
def test_interrupted_it_ends_as_if_nothing_had_been(question: int, whole: Followed, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_gsl.training.watch.LOOK_S", 0.0)
    count = 0

    def request() -> Request:
        nonlocal count
        count += 1
        return Request.STOP if count == question else Request.NONE

    first = Followed(digits, tmp_path, request)
    assert first.is_stopped
    again = Followed(digits, tmp_path)
    assert again.told[-1] == ("trained", 2)
    assert len(again.epochs) < len(whole.epochs) or question == 3
    assert again.before[0] == {3: [], 40: [1, 2], 55: [1, 2], 70: [1, 2, 3], 100: [1, 2, 3]}[question]
    for number in (0, 1, 2):
        assert same(again.state(number), whole.state(number)), number
    assert Followed(digits, tmp_path).epochs == []  # all is there


def test_where_it_diverges_it_goes_back_within_its_part(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first steps of a branch, and of a part of the trunk: neither the beginning nor another strength is gone back to."""
    original, count, betas = loop.train_step, 0, list[dict[str, float]]()

    def spoilt(state: RunState, train: TrainConfig, batch: Any) -> torch.Tensor:
        nonlocal count
        totals = original(state, train, batch)
        count += 1
        betas.append(state.betas)
        if count in (36, 55):  # of 16 steps an epoch: the fourth step of the dense branch, the second of the first strength
            with torch.no_grad():
                next(state.model.parameters()).view(-1)[0] = math.nan
        return totals

    monkeypatch.setattr(loop, "train_step", spoilt)
    monkeypatch.setattr("dist_gsl.training.watch.LOOK_S", 0.0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        followed = Followed(digits, tmp_path, on_divergence="back")
    texts = [str(each.message) for each in warned if "back to" in str(each.message)]
    assert len(texts) == 2
    assert all("back to epoch 2, step 0, with 0.5 of the learning rate" in text for text in texts), texts
    assert followed.told[-1] == ("trained", 2)
    for number in (0, 1, 2):
        assert [row["epoch"] for row in followed.state(number)["history"]] == list(range(1, 4 + number))
    begun = 32 + 5 + 16  # steps before the first strength, those counted that were made twice: it is seen a step later
    assert not any(betas[begun - 1].values())
    assert all(betas[begun].values())
    assert betas[begun] == betas[begun + 3] == betas[begun + 3 + 15]  # three steps, then back


def test_a_network_that_is_gone_cannot_be_made_again(whole: Followed, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "1")
    with pytest.raises(UnavailableError, match="/1 is gone, and the path is beyond it: start a new search"):
        Followed(digits, tmp_path / "copy")


def test_a_damaged_network_is_finished_again(whole: Followed, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "copy")
    file = tmp_path / "copy" / "1" / "epoch-0004" / "state.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="epoch-0004: damaged"):
        again = Followed(digits, tmp_path / "copy")
    assert again.epochs == [4]
    assert same(again.state(1), whole.state(1))


def test_strengths_rise_by_the_same_factor() -> None:
    epochs, absolute = PenaltyConfig(unit="epochs"), PenaltyConfig()
    assert strengths(epochs, 0.5, 4.0, 4) == pytest.approx([4.0, 2.0, 1.0, 0.5])
    assert strengths(absolute, 0.5, 4.0, 4) == pytest.approx([0.5, 1.0, 2.0, 4.0])
    assert strengths(epochs, 0.5, 4.0, 1) == [0.5]


def test_other_layers_keep_their_share_of_the_strength() -> None:
    penalty = PenaltyConfig(beta=PerLayer(2.0, first=1.0, by_layer={"a": 4.0}))
    beta = at_strength(penalty, 1.0).beta
    assert (beta.rest, beta.first, beta.by_layer) == (1.0, 0.5, {"a": 2.0})


def test_what_makes_no_path_is_refused() -> None:
    with pytest.raises(ValueError, match="step_epochs is 0, must be at least 1"):
        PathConfig(step_epochs=0)
    with pytest.raises(ValueError, match=r"train\.epochs is 4, of which 4 finish"):
        PathConfig().check(TrainConfig(epochs=4), PenaltyConfig())
    with pytest.raises(ValueError, match=r"penalty\.revive"):
        PathConfig().check(TrainConfig(), PenaltyConfig(revive=True))
