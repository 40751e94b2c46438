"""What is on disk of a search, and what the front makes of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dist_gsl.recipes import find
from dist_gsl.tuning import Float, records, results
from dist_gsl.tuning.driver import _check_folder
from dist_gsl.tuning.records import SearchFolder, SearchSettings, Status, TrialRecord, described
from dist_gsl.tuning.space import Space
from dist_gsl.tuning.stopping import Moment

SPACE: Space = {"penalty.beta.rest": Float(0.5, 4.0, log=True)}


def trial(number: int, quality: float, alive: float, status: Status = Status.FINISHED, **more) -> TrialRecord:
    curve = [Moment(1, quality - 5, 100.0), Moment(2, quality, alive)]
    params = {} if more.get("is_baseline") else {"penalty.beta.rest": 0.5 + number}
    return TrialRecord(number, params, status=status, curve=curve, **more)


RECORDS = [
    trial(0, 90.0, 100.0, is_baseline=True),
    trial(1, 91.0, 70.0, latency_ms=3.0),
    trial(2, 89.8, 40.0, latency_ms=2.0),
    trial(3, 85.0, 30.0, latency_ms=1.0),
    trial(4, 84.0, 60.0, Status.STOPPED, reason="dominated"),
    TrialRecord(5, {"penalty.beta.rest": 1.0}, status=Status.FAILED, reason="the loss is not finite"),
    trial(6, 95.0, 10.0, Status.RUNNING),
]


@pytest.fixture
def folder(tmp_path: Path) -> SearchFolder:
    made = SearchFolder(tmp_path / "runs" / "s")
    settings = SearchSettings(space_file="x", space=described(SPACE), base=find("digits"))
    made.save_settings(settings, "abc")
    for record in RECORDS:
        made.save(record)
        find("digits").save(made.trial(record.number).config_file)
    return made


def test_what_is_written_is_read(folder: SearchFolder) -> None:
    assert list(folder.records().values()) == RECORDS
    settings = folder.settings()
    assert settings.base == find("digits")
    assert settings.space == described(SPACE)
    assert settings.stopping is not None
    assert folder.mlflow_run_id() == "abc"
    folder.save_settings(replace(settings, stopping=None), None)
    assert folder.settings().stopping is None
    assert folder.mlflow_run_id() is None


def test_the_front_has_finished_trials_alone(folder: SearchFolder) -> None:
    front = results.load(folder)
    assert [record.number for record in front.front] == [3, 2, 1]
    assert front.knee is not None
    assert front.knee.number == 2
    assert front.baseline is not None
    assert [record.number for record in front.failed] == [5]
    assert front.reference_quality == 90.0


@pytest.mark.parametrize(
    ("drop", "latency", "chosen"),
    [(0.5, None, 2), (0.1, None, 1), (10.0, None, 3), (None, 1.5, 3), (None, 2.5, 2), (0.5, 2.5, 2), (0.1, 1.5, None), (-2, None, None)],
)  # fmt: skip
def test_choice_under_constraints(folder: SearchFolder, drop: float, latency: float, chosen: int) -> None:
    found = results.load(folder).choose(max_accuracy_drop=drop, max_latency_ms=latency)
    assert (found and found.number) == chosen


def test_the_latency_front(folder: SearchFolder) -> None:
    folder.save_settings(replace(folder.settings(), objective="latency"), None)
    assert [record.number for record in results.load(folder).front] == [3, 2, 1]


def test_files_of_the_front(folder: SearchFolder) -> None:
    results.write(folder, folder.settings(), folder.records())
    content = json.loads((folder.path / "front.json").read_text())
    assert content["front"] == [3, 2, 1]
    assert content["knee"] == 2
    assert content["num_failed"] == 1
    assert len(content["trials"]) == 6
    assert len({tuple(row) for row in content["trials"]}) == 1, "rows of equal keys"
    assert (folder.path / "plots" / "front.png").stat().st_size > 5000
    text = (folder.path / "front.md").read_text()
    assert text.index("| 003 |") < text.index("| 002 |") < text.index("without penalty (baseline)")
    assert "trial-005 failed: the loss is not finite" in text


def test_the_table_on_the_screen(folder: SearchFolder, capsys: pytest.CaptureFixture[str]) -> None:
    results.print_front(results.load(folder), Console(width=80, soft_wrap=True))
    text = capsys.readouterr().out
    assert "002    finished  knee" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "trial-005 failed: the loss is not finite" in text


def test_the_searcher_learns_from_what_ended_with_a_network(folder: SearchFolder) -> None:
    known = records.known_points(folder.records(), objective="neurons")
    assert [entry.objectives for entry in known] == [(91.0, 70.0), (89.8, 40.0), (85.0, 30.0), (84.0, 60.0), None]


def test_a_point_that_is_no_number_teaches_nothing() -> None:
    broken = trial(1, float("nan"), 50.0)
    assert broken.point("neurons") is None
    assert [k.objectives for k in records.known_points({1: broken}, objective="neurons")] == []


def test_one_driver_at_a_time(folder: SearchFolder) -> None:
    with folder.locked(), pytest.raises(ValueError, match="search 's' is running already"), folder.locked():
        pass
    with folder.locked():
        pass


def test_a_trial_by_name(folder: SearchFolder) -> None:
    runs = folder.path.parent
    for name in ("s/trial-003", "s/3", f"{runs}/s/trial-003"):
        assert records.find_trial(runs, name).path == folder.path / "trial-003"
    with pytest.raises(ValueError, match="no trial 17"):
        records.find_trial(runs, "s/17")
    with pytest.raises(ValueError, match="SEARCH/trial-003"):
        records.find_trial(runs, "s")
    with pytest.raises(ValueError, match="not a search's folder"):
        records.find_trial(runs, "t/3")
    assert records.baseline_of(runs, folder.trial(3)) == "s/trial-000"


def test_a_damaged_record_is_named(folder: SearchFolder) -> None:
    (folder.trial(2).path / "trial.json").write_text("{")
    with pytest.raises(ValueError, match=r"trial-002/trial\.json cannot be read"):
        folder.records()


def test_a_search_in_use_is_refused_and_a_changed_one_too(folder: SearchFolder) -> None:
    settings = folder.settings()
    _check_folder(folder, settings, resume=True)
    with pytest.raises(ValueError, match="go on with it by --resume"):
        _check_folder(folder, settings, resume=False)
    with pytest.raises(ValueError, match="there is no search"):
        _check_folder(SearchFolder(folder.path.parent / "t"), settings, resume=True)
    with pytest.raises(ValueError, match="early stopping is None"):
        _check_folder(folder, replace(settings, stopping=None), resume=True)
    with pytest.raises(ValueError, match="--seed is 7"):
        _check_folder(folder, replace(settings, seed=7), resume=True)
    with pytest.raises(ValueError, match=r"space's penalty\.beta\.rest"):
        _check_folder(folder, replace(settings, space={"penalty.beta.rest": "Float(1, 2)"}), resume=True)
    changed = replace(settings.base, train=replace(settings.base.train, epochs=2))
    with pytest.raises(ValueError, match=r"train\.epochs is 2"):
        _check_folder(folder, replace(settings, base=changed), resume=True)
    workers = replace(settings.base, workers=replace(settings.base.workers, num=1))
    _check_folder(folder, replace(settings, base=workers), resume=True)


@pytest.mark.parametrize("given", [{"searcher": "quantum"}, {"objective": "beauty"}])
def test_unknown_settings_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(given))}"):
        SearchSettings(space_file="x", space={}, base=find("digits"), **given)
