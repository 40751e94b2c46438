"""Killed anywhere and gone on with, a training ends where it would have ended."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_gsl import data
from dist_gsl.training.checkpoint import Checkpoints
from tests.distributed.killed import config, train

CUTS = random.Random(0).sample(range(1, 48), 10)
FAST = 2
"""Cuts that are made each time; the others with the slow tests."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    data.write("digits", folder)
    return folder


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """The last states of trainings that nobody disturbed, by number of processes."""
    found = {}
    for number in (1, 2):
        folder = tmp_path_factory.mktemp("whole") / "checkpoints"
        assert train(config(), digits, folder, num_processes=number) == [0] * number
        found[number] = last(folder)
    return found


def last(folder: Path) -> dict[str, Any]:
    found = Checkpoints(folder).last()
    assert found is not None
    return found[1]


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Names of what is not equal to the bit, but for times."""
    if isinstance(a, dict):
        assert set(a) == set(b), where
        return [name for key in a if key not in ("seconds", "images_per_second") for name in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple):
        assert len(a) == len(b), where
        return [name for i, (x, y) in enumerate(zip(a, b, strict=True)) for name in differences(x, y, f"{where}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [where]


def sizes(state: dict[str, Any]) -> list[int]:
    return [record["parameters"] for record in state["history"]]


@pytest.mark.parametrize("number", [1, 2])
def test_removals_lie_between_the_checkpoints(number: int, whole: dict[int, dict[str, Any]]) -> None:
    first, second, third = sizes(whole[number])
    assert first > second > third or first > third
    assert whole[number]["position"] == {"epoch": 3, "step": 0}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("cut", [pytest.param(cut, marks=[] if i < FAST else [pytest.mark.slow]) for i, cut in enumerate(CUTS)])
def test_killed_and_resumed_equals_uninterrupted(cut: int, number: int, digits: Path, whole: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    codes = train(config(), digits, folder, num_processes=number, kill=(cut % number, cut))
    assert codes[cut % number] == -9
    assert 0 not in codes
    assert train(config(), digits, folder, num_processes=number) == [0] * number
    assert differences(whole[number], last(folder)) == []


def test_one_process_is_two(whole: dict[int, dict[str, Any]]) -> None:
    """With BatchNorm, and to the bit: both add the gradients of the same two micro-batches."""
    check_same_network(whole[1], whole[2])


def check_same_network(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Parameters, statistics, momentum, masks are equal to the bit; losses are sums in another order."""
    for part in ("widths", "model", "optimizer", "average"):
        assert differences(a[part], b[part], part) == []
    for row, other in zip(a["history"], b["history"], strict=True):
        for key in ("train_loss", "val_loss", "val_top1"):
            assert row[key] == pytest.approx(other[key], rel=1e-6)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_gone_on_with_by_another_number_of_processes(
    first: int, then: int, digits: Path, whole: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    assert 0 not in train(config(), digits, folder, num_processes=first, kill=(0, 23))
    assert train(config(), digits, folder, num_processes=then) == [0] * then
    state = last(folder)
    assert [record["workers"] for record in state["history"]] == [first, then, then]
    check_same_network(whole[1], state)
