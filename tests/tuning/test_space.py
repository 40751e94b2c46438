"""Spaces: what they draw, what a grid holds, and what is refused before anything starts."""

import math
import random
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_gsl.config import RunConfig
from dist_gsl.recipes import find
from dist_gsl.tuning import Choice, Float, Int, When, files, space
from dist_gsl.tuning.space import Space

SPACE: Space = {
    "penalty.beta.rest": Float(0.5, 4.0, log=True),
    "penalty.beta.num_first": Choice([0, 2]),
    "penalty.beta.first": When("penalty.beta.num_first", [2], Float(1.0, 2.0, step=0.5)),
    "train.batch_size": Int(16, 64, step=16),
}


@given(st.integers(0, 10_000))
def test_draws_lie_inside(seed: int) -> None:
    params = space.draw(SPACE, random.Random(seed))
    assert 0.5 <= params["penalty.beta.rest"] <= 4.0
    assert params["train.batch_size"] in (16, 32, 48, 64)
    assert ("penalty.beta.first" in params) == (params["penalty.beta.num_first"] == 2)
    assert params.get("penalty.beta.first", 1.0) in (1.0, 1.5, 2.0)


@pytest.mark.parametrize("domain", [Float(0.0, 0.6, step=0.2), Float(0.0, 0.3, step=0.1), Float(0.1, 0.75, step=0.2)])
def test_steps_are_optunas(domain: Float) -> None:
    from optuna.distributions import FloatDistribution

    with warnings.catch_warnings():  # that it lowers a high that the step does not divide
        warnings.simplefilter("ignore")
        theirs = FloatDistribution(domain.low, domain.high, step=domain.step)
    values = domain.values()
    assert values is not None
    assert all(isinstance(value, float) and theirs._contains(value) for value in values)
    assert values[-1] == theirs.high


def test_log_draws_are_uniform_in_the_logarithm() -> None:
    rng = random.Random(0)
    drawn = [math.log10(Float(1e-4, 1.0, log=True).draw(rng)) for _ in range(4000)]
    shares = [sum(k <= -value < k + 1 for value in drawn) / len(drawn) for k in range(4)]
    assert shares == pytest.approx([0.25] * 4, abs=0.03)


@given(st.integers(0, 1000))
def test_logarithmic_whole_numbers_reach_both_ends(seed: int) -> None:
    drawn = {Int(1, 3, log=True).draw(random.Random(f"{seed}/{i}")) for i in range(100)}
    assert drawn == {1, 2, 3}


def test_a_grid_holds_every_point_once_and_follows_conditions() -> None:
    points = space.grid({k: v for k, v in SPACE.items() if k != "penalty.beta.rest"})
    assert len(points) == (1 + 3) * 4
    assert len({tuple(sorted(point.items())) for point in points}) == len(points)
    assert all(("penalty.beta.first" in point) == (point["penalty.beta.num_first"] == 2) for point in points)


def test_a_grid_of_a_continuous_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"penalty\.beta\.rest.*give it a step"):
        space.grid(SPACE)


def test_a_point_becomes_a_config() -> None:
    config = space.applied(RunConfig(), {"penalty.beta.rest": 2.5, "penalty.beta.by_layer.conv1": 0.5, "train.epochs": 7})
    assert config.penalty.beta.rest == 2.5
    assert config.penalty.beta.by_layer == {"conv1": 0.5}
    assert config.train.epochs == 7
    assert RunConfig() == space.applied(RunConfig(), {})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"penalty.beta.rset": Float(0, 1)}, "did you mean penalty.beta.rest"),
        ({"penalty.alpha.rest": Float(0.0, 1.2)}, r"penalty\.alpha\.rest = 1\.2: .*must lie in \[0, 1\]"),
        ({"penalty.alpha.rest": Choice([0.0, -0.5])}, r"penalty\.alpha\.rest = -0\.5"),
        ({"penalty.beta.rest": Float(-1.0, 1.0)}, r"penalty\.beta\.rest = -1\.0"),
        ({"penalty.beta.rest": 3.0}, "must be Float, Int, Choice or When"),
        ({"penalty.beta.first": When("penalty.beta.rest", [1], Float(0, 1))}, "must stand before it"),
        ({}, "must return a dict"),
        ({"penalty.beta_schedule.start": Float(5.0, 9.0), "penalty.beta_schedule.end": Float(1.0, 4.0)}, "needs start"),
        ({"network.width": Float(0.5, 1.0)}, r"network\.width must be the same in all trials"),
        ({"workers.num": Int(1, 2)}, r"workers\.num must be the same in all trials"),
        ({"data.seed": Int(1, 2)}, r"data\.seed must be the same in all trials"),
        ({"penalty.beta.by_layer.conv9": Float(0, 1)}, r"by_layer\.conv9: no layer with neurons has that name"),
    ],
)
def test_a_wrong_space_is_refused(entry: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space.check(entry, find("digits"), layers=["conv1"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float(2.0, 1.0), "empty range"),
        (lambda: Float(float("nan"), 1.0), "empty range"),
        (lambda: Int(3, 2), "empty range"),
        (lambda: Int(1, 2.5),  # type: ignore[arg-type]
          "whole numbers"),
        (lambda: Choice([]), "empty"),
        (lambda: Float(0.0, 1.0, log=True), "low above 0"),
        (lambda: Float(0.0, 1.0, step=0.0), "step above 0"),
    ],
)
def test_a_wrong_domain_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", sorted(files.names()))
def test_every_space_that_ships_fits_its_config(name: str) -> None:
    file, base, entries = files.load(name)
    space.check(entries, base)
    assert files.summary(file)


def test_a_space_file_by_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        '"""Mine."""\nfrom dist_gsl.recipes import find\nfrom dist_gsl.tuning import Float\n'
        'def base(): return find("digits")\ndef space(): return {"penalty.beta.rest": Float(1, 2)}\n'
    )
    _, base, entries = files.load(str(file))
    assert base == find("digits")
    assert entries == {"penalty.beta.rest": Float(1, 2)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def base(): return 3\ndef space(): return {}", "must return a run's config"),
        ("def base(): return None", "AttributeError.*space"),
        ("1/0", "ZeroDivisionError"),
        ("def base(:", "SyntaxError"),
        ("from dist_gsl.tuning import Float\nX = Float(2, 1)", "empty range"),
    ],
)
def test_a_broken_space_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        files.load(str(file))


def test_an_unknown_name_is_answered_with_the_closest() -> None:
    with pytest.raises(ValueError, match="did you mean smoke"):
        files.load("smok")
    with pytest.raises(ValueError, match="no space file"):
        files.load("nowhere/x.py")


def test_short_names_are_unique() -> None:
    names = space.short_names(["penalty.beta.rest", "penalty.alpha.rest", "train.epochs"])
    assert names == {"penalty.beta.rest": "beta.rest", "penalty.alpha.rest": "alpha.rest", "train.epochs": "epochs"}
