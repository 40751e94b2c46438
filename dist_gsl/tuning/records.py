"""What is on disk of a search: runs/SEARCH/search.yaml, and a folder for each trial with trial.json.

The files are the truth: the searcher, the front and the report are functions of them. Each is written whole or not at
all, by the driver alone.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from dist_gsl.config import RunConfig
from dist_gsl.pareto import Point
from dist_gsl.runs import RunFolder
from dist_gsl.training.path import PathConfig
from dist_gsl.tuning.searchers import SEARCHERS, Known
from dist_gsl.tuning.space import Space
from dist_gsl.tuning.stopping import Moment, StoppingConfig

OBJECTIVES = ("neurons", "latency")
PATH = "path"
"""The searcher of trials that are the points of one path."""
SEARCH_FILE, TRIAL_FILE, PREFIX = "search.yaml", "trial.json", "trial-"


class Status(StrEnum):
    """How far a trial came."""

    RUNNING = "running"
    """Begun; after an interruption it is gone on with."""
    FINISHED = "finished"
    STOPPED = "stopped"
    """Ended early, as it had no hope."""
    FAILED = "failed"


@dataclass
class TrialRecord:
    """One trial; trial.json has these names."""

    number: int
    params: dict[str, Any]
    """The fields that the search chose; empty for the baseline."""
    is_baseline: bool = False
    """Trained without penalty: where the front begins, and what accuracy drops are counted from."""
    status: Status = Status.RUNNING
    reason: str | None = None
    """Why it was stopped or failed."""
    curve: list[Moment] = field(default_factory=list)
    """Quality and alive neurons after each epoch."""
    latency_ms: float | None = None
    """Run time of the compact network for one image, where it was measured."""
    summary: dict[str, float | None] = field(default_factory=dict)
    """The final numbers of its report."""
    mlflow_run_id: str | None = None
    num_starts: int = 0
    """How often it was begun or gone on with."""

    @property
    def is_done(self) -> bool:
        return self.status is not Status.RUNNING

    @property
    def quality(self) -> float | None:
        return self.curve[-1].quality if self.curve else None

    @property
    def alive(self) -> float | None:
        return self.curve[-1].alive if self.curve else None

    def point(self, objective: str) -> Point | None:
        """(quality, cost) of a trial that ended with a network, else None.

        A trial that was stopped has no latency; its point is only there for the searcher to learn from."""
        if self.status not in (Status.FINISHED, Status.STOPPED) or not self.curve:
            return None
        cost = self.curve[-1].alive if objective == "neurons" else self.latency_ms
        quality = self.curve[-1].quality
        return None if cost is None or not math.isfinite(quality) else (quality, cost)


@dataclass
class SearchSettings:
    """What makes a search; search.yaml has these names."""

    space_file: str
    space: dict[str, str]
    """The space's domains, as text."""
    base: RunConfig
    searcher: str = "optuna"
    objective: str = "neurons"
    """What is to be low: "neurons" that are alive, or measured "latency" of one image."""
    seed: int = 0
    baseline: bool = True
    """Whether the first trial is the base config without penalty."""
    stopping: StoppingConfig | None = field(default_factory=StoppingConfig)
    """None: every trial runs to its end."""
    num_trials: int = 20
    """The baseline counted. More may be asked for when the search is gone on with, but for a path."""
    path: PathConfig | None = None
    """How long a path's parts are, where the trials are its points and `searcher` is "path"."""

    def __post_init__(self) -> None:
        if (self.searcher == PATH) != (self.path is not None):
            raise ValueError(f"--searcher is {self.searcher!r} and --path is {'not ' if self.path is None else ''}given; give one of them")
        if self.searcher not in (*SEARCHERS, PATH):
            raise ValueError(f"--searcher is {self.searcher!r}, must be one of {', '.join(SEARCHERS)}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"--objective is {self.objective!r}, must be one of {', '.join(OBJECTIVES)}")
        if self.num_trials < 1:
            raise ValueError(f"--trials is {self.num_trials}, must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "base": self.base.to_dict()}


def described(space: Space) -> dict[str, str]:
    return {name: repr(domain) for name, domain in space.items()}


@dataclass(frozen=True)
class SearchFolder:
    """runs/SEARCH."""

    path: Path

    @classmethod
    def existing(cls, path: str | Path) -> SearchFolder:
        """`ValueError` unless it is a search's folder."""
        folder = cls(Path(path).absolute())
        if not folder.settings_file.is_file():
            raise ValueError(f"{path} is not a search's folder: it has no {SEARCH_FILE}; name one such as runs/NAME")
        return folder

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def settings_file(self) -> Path:
        return self.path / SEARCH_FILE

    def settings(self) -> SearchSettings:
        try:
            content = yaml.safe_load(self.settings_file.read_text())
            stopping, path = content["stopping"], content.get("path")
            return SearchSettings(
                **{**content, "base": RunConfig.from_dict(content["base"]),
                   "stopping": None if stopping is None else StoppingConfig(**stopping),
                   "path": None if path is None else PathConfig(**path)},
            )  # fmt: skip
        except (OSError, TypeError, KeyError, yaml.YAMLError) as error:
            raise ValueError(f"{self.settings_file} cannot be read ({error}); start a new search") from error

    def save_settings(self, settings: SearchSettings, mlflow_run_id: str | None) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.settings_file, yaml.safe_dump(settings.to_dict(), sort_keys=False))
        write_text(self.path / "mlflow.json", json.dumps({"run_id": mlflow_run_id}) + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Held by the one driver of the search. `ValueError` where another holds it; it ends with its process."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"search {self.name!r} is running already; wait for it, or end its process") from None
            yield

    def mlflow_run_id(self) -> str | None:
        file = self.path / "mlflow.json"
        return json.loads(file.read_text())["run_id"] if file.exists() else None

    def trial(self, number: int) -> RunFolder:
        return RunFolder(self.path / f"{PREFIX}{number:03d}")

    def records(self) -> dict[int, TrialRecord]:
        """Every trial that was ever begun, by number."""
        found = (load_trial(file) for file in sorted(self.path.glob(f"{PREFIX}*/{TRIAL_FILE}")))
        return {record.number: record for record in found}

    def save(self, record: TrialRecord) -> None:
        folder = self.trial(record.number).path
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / TRIAL_FILE, json.dumps(asdict(record), indent=1) + "\n")


def find_trial(runs_dir: Path, name: str) -> RunFolder:
    """The trial of "SEARCH/trial-003", or "SEARCH/3". `ValueError` if there is none."""
    search, _, trial = name.removeprefix(f"{runs_dir}/").strip("/").partition("/")
    number = trial.removeprefix(PREFIX)
    if not number.isdigit():
        raise ValueError(f"--from-trial {name!r} must look like SEARCH/{PREFIX}003; the search's table has the names")
    folder = SearchFolder.existing(runs_dir / search).trial(int(number))
    if not folder.config_file.is_file():
        raise ValueError(f"--from-trial {name!r}: search {search!r} has no trial {int(number)}")
    if SearchFolder.existing(runs_dir / search).settings().path is not None and load_trial(folder.path / TRIAL_FILE).status is not Status.FINISHED:
        raise ValueError(f"--from-trial {name!r}: this point of a path is not finished; go on with the search by --resume first")
    return folder


def baseline_of(runs_dir: Path, trial: RunFolder) -> str | None:
    """The name, seen from the runs' folder, of the finished baseline of a trial's search; None if there is none."""
    search = SearchFolder.existing(trial.path.parent)
    for record in search.records().values():
        if record.is_baseline and record.status is Status.FINISHED:
            return f"{search.name}/{search.trial(record.number).name}"
    return None


def load_trial(file: Path) -> TrialRecord:
    """`ValueError` where the file is damaged."""
    try:
        content = json.loads(file.read_text())
        known = {entry.name for entry in fields(TrialRecord)}
        values = {name: value for name, value in content.items() if name in known}
        values["status"] = Status(values["status"])
        values["curve"] = [Moment(**moment) for moment in values["curve"]]
        return TrialRecord(**values)
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); remove its folder to have the trial run again") from error


def known_points(records: Mapping[int, TrialRecord], *, objective: str) -> list[Known]:
    """What the searcher learns from: neither failures nor the baseline, which is no point of the space."""
    return [
        Known(record.params, record.point(objective))
        for _, record in sorted(records.items())
        if not record.is_baseline and (not record.is_done or record.point(objective) is not None)
    ]


def write_text(file: Path, text: str) -> None:
    """The whole file or nothing."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
