"""What is checked before a run starts or goes on."""

from dataclasses import replace
from pathlib import Path

import pytest

from dist_gsl.config import RunConfig
from dist_gsl.experiment import check_name
from dist_gsl.penalty import Schedule
from dist_gsl.recipes import find


def with_train(config: RunConfig, **changes) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


def begun(runs: Path, config: RunConfig) -> None:
    (runs / "a").mkdir(parents=True)
    config.save(runs / "a" / "config.yaml")


@pytest.mark.parametrize(("schedule", "drops"), [("step", (3.0,)), ("constant", ())])
def test_a_resume_may_be_longer(tmp_path: Path, schedule: str, drops: tuple[float, ...]) -> None:
    config = with_train(find("digits"), schedule=schedule, drop_epochs=drops, epochs=4)
    begun(tmp_path, config)
    assert check_name(tmp_path, "a", resume=True, config=with_train(config, epochs=8)).name == "a"
    with pytest.raises(ValueError, match=r"train\.epochs is 3, but run 'a' was started with 4"):
        check_name(tmp_path, "a", resume=True, config=with_train(config, epochs=3))
    with pytest.raises(ValueError, match=r"train\.seed is 1"):
        check_name(tmp_path, "a", resume=True, config=with_train(config, epochs=8, seed=1))


def test_a_cosine_schedule_may_not(tmp_path: Path) -> None:
    config = with_train(find("digits"), schedule="cosine", epochs=4)
    begun(tmp_path, config)
    with pytest.raises(ValueError, match=r"train\.epochs is 8"):
        check_name(tmp_path, "a", resume=True, config=with_train(config, epochs=8))
    check_name(tmp_path, "a", resume=True, config=replace(config, workers=replace(config.workers, num=1)))


@pytest.mark.parametrize("end", [None, 3.0])
def test_a_budget_that_is_to_be_met_by_the_trainings_end_may_not(end: float | None, tmp_path: Path) -> None:
    config = with_train(find("dec3-chars"), target="neurons=50%", epochs=4)
    config = replace(config, penalty=replace(config.penalty, beta_schedule=Schedule(start=1, end=end)))
    begun(tmp_path, config)
    longer = with_train(config, epochs=8)
    if end is None:
        with pytest.raises(ValueError, match=r"train\.epochs is 8"):
            check_name(tmp_path, "a", resume=True, config=longer)
    else:
        assert check_name(tmp_path, "a", resume=True, config=longer).name == "a"
