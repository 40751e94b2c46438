"""Front, hypervolume, knee: against brute force, Monte Carlo-free closed forms, and Optuna."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_gsl import pareto

numbers = st.integers(-20, 20).map(float)
points = st.lists(st.tuples(numbers, numbers), max_size=12)


@given(points)
def test_the_front_is_what_nothing_dominates(given_points: list[pareto.Point]) -> None:
    found = pareto.front(given_points)
    by_hand = {p for p in given_points if not any(pareto.dominates(q, p) for q in given_points)}
    assert {given_points[i] for i in found} == by_hand
    assert len({given_points[i] for i in found}) == len(found)
    assert [given_points[i][1] for i in found] == sorted(given_points[i][1] for i in found)


@given(points)
def test_hypervolume_counts_the_unit_cells_that_are_dominated(given_points: list[pareto.Point]) -> None:
    low, high = -21, 21
    cells = sum(
        any(quality >= q + 1 and cost <= c for quality, cost in given_points)
        for q in range(low, high)
        for c in range(low, high)
    )
    assert pareto.hypervolume(given_points, reference=(low, high)) == cells


def test_hypervolume_is_optunas() -> None:
    from optuna._hypervolume import compute_hypervolume

    rng = np.random.default_rng(0)
    found = [(float(q), float(c)) for q, c in rng.random((20, 2))]
    losses = np.array([[-q, c] for q, c in found])
    expected = compute_hypervolume(losses, np.array([0.0, 1.0]))
    assert pareto.hypervolume(found, reference=(0.0, 1.0)) == pytest.approx(expected)


def test_points_outside_the_reference_add_nothing() -> None:
    assert pareto.hypervolume([(1.0, 5.0), (-1.0, 0.0)], reference=(0.0, 4.0)) == 0.0


def test_the_knee_lies_farthest_above_the_chord() -> None:
    line = [(80.0, 10.0), (90.0, 30.0), (91.0, 60.0), (92.0, 100.0), (70.0, 50.0)]
    assert pareto.knee(line) == 1


def test_the_knee_of_few_points() -> None:
    assert pareto.knee([]) is None
    assert pareto.knee([(1.0, 1.0)]) == 0
    assert pareto.knee([(2.0, 2.0), (1.0, 1.0)]) == 1


@given(points.filter(bool), st.floats(0.5, 3), st.floats(0.5, 3))
def test_the_knee_does_not_depend_on_units(given_points: list[pareto.Point], a: float, b: float) -> None:
    scaled = [(a * quality, b * cost) for quality, cost in given_points]
    knee, of_scaled = pareto.knee(given_points), pareto.knee(scaled)
    assert knee is not None
    assert of_scaled is not None
    assert pareto.front(scaled) == pareto.front(given_points)

    def above(i: int) -> float:
        front = [given_points[k] for k in pareto.front(given_points)]
        (q0, c0), (q1, c1) = front[0], front[-1]
        q, c = given_points[i]
        return 0.0 if len(front) < 3 else (q - q0) / (q1 - q0) - (c - c0) / (c1 - c0)

    assert above(knee) == pytest.approx(above(of_scaled))  # rounding may choose among equals
