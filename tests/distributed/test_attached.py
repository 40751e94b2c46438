"""Stepping inside DDP's backward, on two real processes, equals DDP's average and then step(), bit for bit."""

import itertools
from typing import Any

import pytest

from tests.distributed.pair import Pair

TINY_BUCKETS = 1e-5  # MiB: one parameter each


def check(results: list[dict[str, Any]], *, deaths: bool = True) -> None:
    for result in results:
        assert result["different"] == []
        assert result["num_moved"] > 10  # training happened
        if deaths:
            assert 0 < sum(result["num_dead"]) < 21
    assert results[0]["masks"] == results[1]["masks"]


QUICK: dict[str, dict[str, Any]] = {
    "plain": {},
    "without BatchNorm": {"batch_norm": False},
    "channels_last": {"channels_last": True},
    "accumulation": {"accumulate": 3},
    "several buckets": {"bucket_cap_mb": TINY_BUCKETS},
    "several buckets at once": {"bucket_cap_mb": TINY_BUCKETS, "at_once": True, "accumulate": 2, "channels_last": True},
    "at once, every 4": {"bucket_cap_mb": TINY_BUCKETS, "at_once": True, "every": 4, "beta": 0.06},
    "static graph": {"static_graph": True},
    "bucket views": {"gradient_as_bucket_view": True},
    "everything": {
        "channels_last": True, "accumulate": 2, "bucket_cap_mb": TINY_BUCKETS, "static_graph": True,
        "gradient_as_bucket_view": True, "nesterov": True,
    },
    "mixture": {"alpha": 0.5, "beta": 0.08, "bucket_cap_mb": TINY_BUCKETS},
    "every 4": {"every": 4, "beta": 0.06},
    "every epoch": {"every": "epoch", "epoch": 5, "beta": 0.06, "bucket_cap_mb": TINY_BUCKETS},
    "revive": {"revive": True},
    "shared weights": {"network": "shared", "bucket_cap_mb": TINY_BUCKETS},
}  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_attached_equals_by_hand(pair: Pair, name: str) -> None:
    results = pair.run("attached_equals_by_hand", **QUICK[name])
    check(results)
    for result in results:
        assert result["lines"] == []
        assert (result["num_reduces"] > 10) is ("bucket_cap_mb" in QUICK[name])


COMBINATIONS: dict[str, list[Any]] = {
    "batch_norm": [False, True], "channels_last": [False, True], "accumulate": [1, 2],
    "bucket_cap_mb": [25, TINY_BUCKETS], "static_graph": [False, True], "gradient_as_bucket_view": [False, True],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("values", list(itertools.product(*COMBINATIONS.values())), ids=str)
def test_attached_equals_by_hand_in_every_combination(pair: Pair, values: tuple[object, ...]) -> None:
    check(pair.run("attached_equals_by_hand", **dict(zip(COMBINATIONS, values, strict=True))))


FALLBACKS: dict[str, tuple[dict[str, Any], str]] = {
    "clipping": ({"max_grad_norm": 0.5, "beta": 0.06}, "norm"),
    "scaler": ({"scaler": True}, "GradScaler"),
    "scaler and clipping": ({"scaler": True, "max_grad_norm": 0.5, "bucket_cap_mb": TINY_BUCKETS}, "norm"),
    "scaler that skips": ({"scaler": True, "overflow_at": 4}, "GradScaler"),
    "unused parameters": ({"network": "spare", "find_unused_parameters": True}, "unused"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_where_overlap_cannot_be_right_it_steps_after_backward_and_says_so(pair: Pair, name: str) -> None:
    options, reason = FALLBACKS[name]
    results = pair.run("attached_equals_by_hand", **options)
    check(results)
    for result in results:
        [line] = result["lines"]
        assert "after backward" in line
        assert reason in line
        assert result["scales"][0] == result["scales"][1]
        assert result["num_steps"] == 15 - ("overflow_at" in options)


@pytest.mark.parametrize("sizes", [[(5,), (3,)], [(3, 2), (1, 2)], [(8,), (0,)]])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-6)])
def test_uneven_batches_weigh_as_one_joined_batch(
    pair: Pair, sizes: list[tuple[int, ...]], dtype: str, tolerance: float
) -> None:
    steps = 15 if dtype == "float64" else 6  # rounding grows from step to step
    for result in pair.run("uneven_equals_joined", sizes=sizes, num_steps=steps, dtype=dtype):
        assert result["largest_difference"] <= tolerance
        assert result["same_masks"]
        if dtype == "float64":
            assert 0 < sum(result["num_dead"]) < 21


def test_the_number_of_samples_holds_for_one_backward(pair: Pair) -> None:
    assert pair.run("counted_and_plain_steps_alternate") == [[], []]


def test_step_is_refused_once_attached(pair: Pair) -> None:
    for message in pair.run("step_after_attach"):
        assert "leave out optimizer.step()" in message


def test_an_interrupted_training_goes_on_bit_for_bit(pair: Pair) -> None:
    assert pair.run("state_goes_on") == [[], []]


def test_three_lines_in_somebody_elses_loop(pair: Pair) -> None:
    first, second = pair.run("somebody_elses_loop")
    assert first["losses"][-1] < first["losses"][0]
    assert first["alive"] == second["alive"]
    assert 0 < sum(first["alive"]) < 12
    assert first["widths"] == {"0": sum(first["alive"]), "3": 3}
    assert first["weights"] == second["weights"]


def test_an_error_in_the_step_surfaces_in_backward(pair: Pair) -> None:
    for message in pair.run("two_rates_in_one_neuron"):
        assert "neurons of 'conv2'" in message
