"""Two processes remove the same neurons at the same step."""

import pytest

from tests.distributed.pair import Pair


@pytest.mark.parametrize(("shrink", "optimizer"), [("7", "sgd"), ("10%", "sgd"), ("epoch", "sgd"), ("7", "adamw")])
def test_training_goes_on_as_it_would_have(pair: Pair, shrink: str, optimizer: str) -> None:
    results = pair.run("with_removal_and_without", shrink=shrink, optimizer=optimizer)
    for result in results:
        assert result["difference"] <= 1e-9
        assert result["num_steps"] == 64
        assert result["num_removals"] >= 3
    assert results[0]["sizes"] == results[1]["sizes"]
    assert results[0]["alive"] == results[1]["alive"]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_running_statistics_need_not_be_handed_out(pair: Pair, ema: float | None) -> None:
    """All that comes of a training is the same without it, to the bit, in both processes."""
    results = pair.run("with_buffers_of_the_first", ema=ema)
    for result in results:
        assert result["does"] == [False, True]
        assert result["different"] == []
        assert result["losses"][0] == result["losses"][1]
        assert result["val"][0] == result["val"][1]
        assert result["num_removals"] >= 3
    assert results[0]["state"] == results[1]["state"]
    assert results[0]["state"]


@pytest.mark.parametrize("target", ["neurons=60%", "neurons=40%", "params=20%"])
def test_the_first_process_steers(target: str, pair: Pair) -> None:
    first, second = pair.run("steered", target=target)
    assert first == second
    assert first["met"]
    assert max(first["factors"]) > 0
    if "neurons" in target:
        assert 0.85 * first["budget"] <= sum(first["alive"].values()) <= first["budget"]


def test_rounding_at_a_death_is_settled_by_the_first_process(pair: Pair) -> None:
    first, second = pair.run("death_in_one_process", norm=1e-7)
    assert first["alive"][3] is True
    assert first == second


def test_another_difference_names_the_layer(pair: Pair) -> None:
    for result in pair.run("death_in_one_process", norm=1.0):
        assert result["error"].startswith("layer 'features.conv2v': processes differ in which neurons are dead, by more than rounding; ")
