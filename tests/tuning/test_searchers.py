"""What is tried next is a function of seed and knowledge, inside the space, and better than chance where there is
something to learn."""

import math
import random
import statistics

import pytest

from dist_gsl import pareto
from dist_gsl.tuning import Choice, Float, Int, When
from dist_gsl.tuning.searchers import Known, num_random_first, suggest
from dist_gsl.tuning.space import Space

SPACE: Space = {
    "a": Float(0.1, 10.0, log=True),
    "kind": Choice(["x", "y"]),
    "b": When("kind", ["y"], Int(1, 5)),
}


def outcome(params: dict) -> tuple[float, float]:
    a = math.log(params["a"])
    return -((a - 1) ** 2) - 0.3 * params.get("b", 0), (a + 1) ** 2 + (params["kind"] == "x")


def run(searcher: str, seed: int, num: int) -> list[Known]:
    known: list[Known] = []
    for number in range(num):
        params = suggest(SPACE, searcher=searcher, seed=seed, number=number, known=known)
        assert params is not None
        known.append(Known(params, outcome(params)))
    return known


@pytest.mark.parametrize("searcher", ["optuna", "random"])
def test_the_same_seed_and_knowledge_give_the_same_point(searcher: str) -> None:
    assert run(searcher, 3, 8) == run(searcher, 3, 8)
    assert run(searcher, 3, 8) != run(searcher, 4, 8)


def test_going_on_is_as_if_nothing_had_happened() -> None:
    """The points after an interruption are those of the search that was not interrupted."""
    whole = run("optuna", 0, 10)
    assert suggest(SPACE, searcher="optuna", seed=0, number=9, known=whole[:9]) == whole[9].params


@pytest.mark.parametrize("searcher", ["optuna", "random"])
def test_points_lie_in_the_space(searcher: str) -> None:
    for entry in run(searcher, 1, 15):
        assert 0.1 <= entry.params["a"] <= 10.0
        assert ("b" in entry.params) == (entry.params["kind"] == "y")
        assert 1 <= entry.params.get("b", 1) <= 5


def test_running_points_are_not_tried_twice() -> None:
    """The same trial of the same search, with and without knowing that its point runs already."""
    known = run("optuna", 0, 8)
    alone = suggest(SPACE, searcher="optuna", seed=0, number=8, known=known)
    assert alone is not None
    running = [Known(alone, None)] * 3
    assert suggest(SPACE, searcher="optuna", seed=0, number=8, known=[*known, *running]) != alone


def test_networks_without_use_attract_nobody() -> None:
    """Small and at chance is never dominated; after the random points none of them is asked for again."""
    useless = {"a": 0.1, "kind": "x"}
    useful = {"a": 9.0, "kind": "y", "b": 2}
    known = [Known(useless, (5.0, 1.0 + n)) for n in range(6)] + [Known(useful, (70.0, 60.0 - n)) for n in range(6)]
    draws = [suggest(SPACE, searcher="optuna", seed=seed, number=12, known=known) for seed in range(20)]
    assert statistics.median(draw["a"] for draw in draws if draw is not None) > 1.0


def test_a_grid_is_walked_once() -> None:
    space: Space = {"n": Int(1, 3), "c": Choice([True, False])}
    points = [suggest(space, searcher="grid", seed=0, number=n, known=[]) for n in range(7)]
    assert points[6] is None
    assert len({tuple(p.items()) for p in points[:6] if p}) == 6


def test_optuna_learns() -> None:
    """Over ten seeds its points dominate more than random ones do."""

    def volume(searcher: str) -> float:
        return statistics.mean(
            pareto.hypervolume([k.objectives for k in run(searcher, seed, 25) if k.objectives], reference=(-6.0, 6.0))
            for seed in range(10)
        )

    assert volume("optuna") > volume("random")


def test_the_first_points_are_random() -> None:
    for number in range(num_random_first(len(SPACE))):
        expected = suggest(SPACE, searcher="random", seed=5, number=number, known=[])
        assert suggest(SPACE, searcher="optuna", seed=5, number=number, known=run("random", 5, number)) == expected
    assert random.Random("5/0").random() == random.Random("5/0").random()
