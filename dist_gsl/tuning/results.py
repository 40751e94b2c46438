"""What a search comes to: its front, knee and choice under a constraint; front.json, front.md, plots/front.png."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_gsl import pareto, plots
from dist_gsl.tuning.records import SearchFolder, SearchSettings, Status, TrialRecord, write_text
from dist_gsl.tuning.space import short_names

if TYPE_CHECKING:
    from rich.console import Console

FRONT_JSON, FRONT_MD, FRONT_PLOT = "front.json", "front.md", "plots/front.png"


@dataclass(frozen=True)
class Front:
    """The trials of a search and which of them no other dominates."""

    name: str
    objective: str
    trials: Sequence[TrialRecord]
    """Those that are done, by number."""
    front: Sequence[TrialRecord]
    """Finished and not dominated, by rising cost."""
    knee: TrialRecord | None
    baseline: TrialRecord | None
    files: Sequence[Path] = ()

    @classmethod
    def of(cls, folder: SearchFolder, objective: str, records: Mapping[int, TrialRecord]) -> Front:
        done = [record for _, record in sorted(records.items()) if record.is_done]
        finished = [r for r in done if r.status is Status.FINISHED and r.point(objective) is not None]
        points = [point for record in finished if (point := record.point(objective)) is not None]
        knee = pareto.knee(points)
        return cls(
            folder.name, objective, done, [finished[i] for i in pareto.front(points)],
            None if knee is None else finished[knee], next((r for r in finished if r.is_baseline), None),
            [folder.path / name for name in (FRONT_JSON, FRONT_MD, FRONT_PLOT)],
        )  # fmt: skip

    @property
    def failed(self) -> list[TrialRecord]:
        return [record for record in self.trials if record.status is Status.FAILED]

    @property
    def reference_quality(self) -> float | None:
        """What an accuracy drop is counted from: the baseline, or without one the best trial."""
        if self.baseline is not None:
            return self.baseline.quality
        return max((record.quality for record in self.front if record.quality is not None), default=None)

    def choose(self, *, max_accuracy_drop: float | None = None, max_latency_ms: float | None = None) -> TrialRecord | None:
        """The cheapest trial of those that lose no more than `max_accuracy_drop` (percentage points of top-1, or units
        of the root mean square error) against the reference and run within `max_latency_ms`; with the second alone the
        most accurate of them. None if none does."""
        fits = [record for record in self.trials if record.status is Status.FINISHED]
        if max_accuracy_drop is not None:
            least = (self.reference_quality or 0.0) - max_accuracy_drop
            fits = [r for r in fits if r.quality is not None and r.quality >= least]
        if max_latency_ms is not None:
            fits = [r for r in fits if r.latency_ms is not None and r.latency_ms <= max_latency_ms]
        fits = [r for r in fits if r.point(self.objective) is not None]
        if max_accuracy_drop is None:
            return max(fits, key=lambda r: (r.quality or 0.0, -_cost(r, self.objective)), default=None)
        return min(fits, key=lambda r: (_cost(r, self.objective), -(r.quality or 0.0)), default=None)

    def numbers(self) -> dict[str, float | None]:
        """Fixed names, for the tracking store."""
        return {
            "num_finished": sum(r.status is Status.FINISHED for r in self.trials),
            "num_stopped": sum(r.status is Status.STOPPED for r in self.trials),
            "num_failed": len(self.failed), "front_size": len(self.front),
            "knee_quality": None if self.knee is None else self.knee.quality,
            "knee_cost": None if self.knee is None else _cost(self.knee, self.objective),
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a trial, of equal keys."""
        fields = dict.fromkeys(name for record in self.trials for name in record.params)
        names = short_names(list(fields))
        return [
            {
                "trial": record.number, "status": record.status.value, "on_front": record in self.front,
                "knee": record is self.knee, "quality": record.quality,
                "neurons_removed": None if record.alive is None else 100.0 - record.alive,
                "latency_ms": record.latency_ms, "parameters_after": record.summary.get("final_parameters_after"),
                "epochs": record.curve[-1].epoch if record.curve else 0,
                **{short: record.params.get(name) for name, short in names.items()}, "reason": record.reason or "",
            }
            for record in self.trials
        ]  # fmt: skip


def _cost(record: TrialRecord, objective: str) -> float:
    point = record.point(objective)
    assert point is not None
    return point[1]


def load(folder: SearchFolder) -> Front:
    return Front.of(folder, folder.settings().objective, folder.records())


def add_latencies(folder: SearchFolder) -> None:
    """Measures the run time of every finished trial's compact network that has none yet, here and now."""
    from dist_gsl.tuning.trial import measure_latency

    for record in folder.records().values():
        if record.status is Status.FINISHED and record.latency_ms is None:
            record.latency_ms = measure_latency(folder.trial(record.number))
            folder.save(record)


def write(folder: SearchFolder, settings: SearchSettings, records: Mapping[int, TrialRecord]) -> Front:
    """Writes front.json, front.md and the plot, each whole or not at all."""
    found = Front.of(folder, settings.objective, records)
    content = {
        "search": folder.name, "objective": settings.objective, "seed": settings.seed,
        "front": [record.number for record in found.front],
        "knee": None if found.knee is None else found.knee.number,
        "baseline": None if found.baseline is None else found.baseline.number, **found.numbers(), "trials": found.rows(),
    }  # fmt: skip
    write_text(folder.path / FRONT_JSON, json.dumps(content, indent=1) + "\n")
    write_text(folder.path / FRONT_MD, to_markdown(found))
    plots.write_front(
        folder.path / FRONT_PLOT,
        points={r.number: p for r in found.trials if (p := r.point(found.objective)) is not None},
        front=[r.number for r in found.front], knee=None if found.knee is None else found.knee.number,
        baseline=None if found.baseline is None else found.baseline.number,
        stopped=[r.number for r in found.trials if r.status is Status.STOPPED], objective=found.objective,
        title=found.name,
    )  # fmt: skip
    return found


_HEADINGS = ("trial", "status", "front", "quality", "neurons removed", "latency ms", "parameters chosen")


def _cells(found: Front, record: TrialRecord, names: Mapping[str, str]) -> list[str]:
    mark = "knee" if record is found.knee else "front" if record in found.front else ""
    chosen = " ".join(f"{names[field]}={_text(value)}" for field, value in record.params.items())
    return [
        f"{record.number:03d}", record.status.value, mark, _text(record.quality, 2),
        _text(None if record.alive is None else 100.0 - record.alive, 1), _text(record.latency_ms, 2),
        "without penalty (baseline)" if record.is_baseline else chosen,
    ]  # fmt: skip


def _names(found: Front) -> dict[str, str]:
    return short_names(list(dict.fromkeys(name for record in found.trials for name in record.params)))


def _text(value: Any, digits: int = 3) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.{digits}f}" if digits < 3 else f"{value:.{digits}g}"


def _ordered(found: Front) -> list[TrialRecord]:
    """The front first, cheapest first; then the others by number."""
    return [*found.front, *(record for record in found.trials if record not in found.front)]


def to_markdown(found: Front) -> str:
    names = _names(found)
    lines = [f"# {found.name}", "", "Quality is validation top-1 in percent (minus the rmse for a regression).", "",
             "| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]  # fmt: skip
    lines += ["| " + " | ".join(_cells(found, record, names)) + " |" for record in _ordered(found)]
    reasons = [f"trial-{r.number:03d} {r.status.value}: {r.reason}  " for r in found.trials if r.reason is not None]
    return "\n".join([*lines, "", *reasons]).rstrip() + "\n"


def print_front(found: Front, console: Console) -> None:
    """The table on the screen, and under it what failed or was stopped, and why."""
    from rich import box
    from rich.table import Table

    names = _names(found)
    has_latency = any(record.latency_ms is not None for record in found.trials)
    shown = [i for i, heading in enumerate(_HEADINGS) if heading != "latency ms" or has_latency]
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), title_justify="left",
        title=f"{found.name}: accuracy against {found.objective}, on validation",
    )  # fmt: skip
    for i in shown:
        is_text = i < 3 or i == len(_HEADINGS) - 1
        heading = _HEADINGS[i] if is_text else _HEADINGS[i].replace(" ", "\n")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=i < len(_HEADINGS) - 1, overflow="fold")
    for record in _ordered(found):
        cells = _cells(found, record, names)
        table.add_row(*(cells[i] for i in shown), style=None if record in found.front else "dim")
    console.print(table)
    for record in found.trials:
        if record.reason is not None:
            console.print(f"trial-{record.number:03d} {record.status.value}: {record.reason}", highlight=False)
