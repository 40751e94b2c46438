"""What a search writes down while its disk is full, and a path's reports."""

import errno
import io
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dist_gsl.recipes import find
from dist_gsl.tuning import Float, paths
from dist_gsl.tuning.driver import Conductor
from dist_gsl.tuning.records import SearchFolder, SearchSettings, Status, TrialRecord, described
from dist_gsl.tuning.space import Space

SPACE: Space = {"penalty.beta.rest": Float(0.5, 4.0, log=True)}


def epoch(number: int) -> dict[str, Any]:
    return {"epoch": number, "val_top1": 50.0 + number, "all_neurons": 5.0 * number, "alive": {"conv1": 9}}


@pytest.fixture
def conductor(tmp_path: Path) -> Conductor:
    settings = SearchSettings(space_file="x", space=described(SPACE), base=find("digits"))
    folder = SearchFolder(tmp_path / "runs" / "s")
    console = Console(file=io.StringIO(), width=300)
    made = Conductor(folder, settings, SPACE, {"conv1": 10}, tmp_path / "runs", [], console, track=False)
    made.begin()
    return made


def said(conductor: Conductor) -> str:
    file = conductor.display.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_full_disk_ends_no_search(conductor: Conductor, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 1):
        conductor.start(TrialRecord(number, {}, is_baseline=number == 0))
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(SearchFolder, "save", full)
        conductor.result(0, "epoch", epoch(1))
        conductor.result(1, "epoch", epoch(1))
        conductor.result(0, "epoch", epoch(2))
    assert said(conductor).count("No space left on device; it is written again after the next epoch") == 2
    assert not any(record.curve for record in conductor.folder.records().values())
    conductor.result(1, "failed", "a reason")  # there is room again, for what waited too
    kept = conductor.folder.records()
    assert [moment.epoch for moment in kept[0].curve] == [1, 2]
    assert kept[1].status is Status.FAILED
    assert conductor.unsaved == set()


def test_a_trial_begins_when_there_is_room(conductor: Conductor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_gsl.training.checkpoint.time.sleep", lambda seconds: None)
    make, failures = Path.mkdir, [True, True]

    def full(self: Path, *arguments: Any, **options: Any) -> None:
        if self.name.startswith("trial-") and failures:
            failures.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    assert conductor.start(TrialRecord(0, {}, is_baseline=True)) is not None
    assert failures == []
    assert conductor.folder.trial(0).config_file.exists()
    assert list(conductor.folder.records()) == [0]


def test_machines_that_are_gone_fail_no_trial(conductor: Conductor) -> None:
    conductor.start(TrialRecord(0, {}, is_baseline=True))
    conductor.result(0, "left", "no machine came")
    assert conductor.next_job() is None
    assert conductor.folder.records()[0].status is Status.RUNNING
    assert "no machine came" in said(conductor)


def test_a_folder_that_is_gone_does(conductor: Conductor, monkeypatch: pytest.MonkeyPatch) -> None:
    conductor.start(TrialRecord(0, {}, is_baseline=True))

    def gone(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(SearchFolder, "save", gone)
    with pytest.raises(FileNotFoundError):
        conductor.result(0, "epoch", epoch(1))


def test_reports_are_waited_for_but_where_the_search_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    reports = paths._Reports()
    for number in range(3):
        reports.add(lambda number=number: made.append(number))  # type: ignore[misc]
    reports.finish()
    assert made == [0, 1, 2]

    reports = paths._Reports()
    reports.add(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        reports.finish()

    monkeypatch.setattr(paths, "LEAVE_S", 0.05)
    reports, begun, goes_on = paths._Reports(), threading.Event(), threading.Event()

    def long() -> None:
        begun.set()
        goes_on.wait(30)

    reports.add(long)
    reports.add(lambda: made.append(3))
    assert begun.wait(30)
    reports.leave()  # long before it is made
    goes_on.set()
    reports._thread.join(30)
    assert made == [0, 1, 2]
