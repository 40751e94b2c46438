"""What a run has learned, in numbers: report.json, report.md, the table on the screen, neurons.parquet.

Percent throughout, as in the paper (section 4, tables 1 to 4).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray
    from rich.console import Console

REPORT_JSON, REPORT_MD = "report.json", "report.md"


@dataclass(kw_only=True)
class Report:
    """The numbers of one run; report.json has these names."""

    name: str
    """The run's name."""
    recipe: str = ""
    command: str = ""
    """The command line that made the run."""
    network: str = ""
    """As "dec3"; the paper's row of the same network stands beside it."""
    source: str = ""
    """The data's source, as "chars"."""
    seed: int = 0
    split: str = "val"
    """What the accuracies below were measured on: "val" or "test"."""

    top1: float | None = None
    """Of the learned network; None for regression."""
    top5: float | None = None
    rmse: float | None = None
    """Root mean square error of a regression, else None."""
    val_top1: float | None = None
    """On validation, whatever `split` is."""
    extra_splits: dict[str, float] = field(default_factory=dict)
    """Accuracy (rmse for regression) on further splits, {"test_fonts": 87.1}."""
    baseline_top1: float | None = None
    """Of the same network trained without the penalty, on `split`; None if it was not trained."""
    baseline_rmse: float | None = None
    baseline: str | None = None
    """The baseline's name, a run beside this one."""
    accuracy_gap: float | None = None
    """Learned minus baseline, in points of top-1; None without a baseline."""

    neurons: float = 0.0
    """Share of the convolution neurons that is zero."""
    group_param: float = 0.0
    """Share of the convolution parameters that sit in zero neurons."""
    total_param: float = 0.0
    """That, and zero parameters in live neurons."""
    total_induced: float = 0.0
    """Share of the parameters of the convolutions and the last linear layer that are zero or read zero neurons only."""
    all_neurons: float | None = None
    """Share of all found neurons, linear layers included, that is zero."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """{"name", "neurons" of the starting network, "alive"} of each layer in forward order."""

    compact: dict[str, float | None] = field(default_factory=dict)
    """{"max_abs_difference", "top1", "parameters_before", "parameters_after"}; `rmse` in the place of top1."""
    speedup_percent: dict[str, float] = field(default_factory=dict)
    """Run time saved by removal, by batch size."""
    memory_saved_percent: dict[str, float] = field(default_factory=dict)
    """{"params", "features"} at batch 1."""
    multiply_adds_before: int | None = None
    """For one image."""
    multiply_adds_after: int | None = None
    device: str = ""
    """What run time was measured on."""

    train_seconds: float = 0.0
    images_per_second: float | None = None
    """Throughput of training, all workers together."""

    def to_json(self) -> str:
        return json.dumps(_finite(asdict(self)), indent=2) + "\n"


def write(report: Report, run_dir: str | Path) -> None:
    """Write report.json and report.md to a run's folder, each whole or not at all."""
    run_dir = Path(run_dir)
    _write_text(run_dir / REPORT_JSON, report.to_json())
    _write_text(run_dir / REPORT_MD, to_markdown(report))


def load(run_dir: str | Path) -> Report:
    """The report of a run's folder. `ValueError` if there is none or it is damaged. Unknown entries are left out."""
    file = Path(run_dir) / REPORT_JSON
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = {entry.name for entry in fields(Report)}
        return Report(**{key: value for key, value in content.items() if key in known})
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file} is missing: make it with `dist-gsl report {run_dir}`") from None
    except (OSError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is not a report ({error}): make it again with `dist-gsl report {run_dir}`") from error


# --- tables


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's tables; percent."""

    name: str
    network: str
    data: str
    neurons: float
    group_param: float
    total_param: float
    total_induced: float
    accuracy_gap: float
    top1: float | None = None
    baseline_top1: float | None = None
    speedup_16: float | None = None
    """Run time saved at batch 16, on a K20m."""


PAPER = (
    PaperRow("BNet^C GS", "bnet-c", "ImageNet", 12.70, 13.59, 13.59, 27.38, 1.6, 62.7, 61.1, 13.69),
    PaperRow("Dec8 GS", "dec8", "ImageNet", 3.39, 2.46, 2.46, 2.82, 0.01, 64.8, 64.8),
    PaperRow("Dec8-640 SGL", "dec8-640", "ImageNet", 12.42, 13.69, 22.72, 23.33, 0.94, 67.5, 66.9),
    PaperRow("Dec8-640 GS", "dec8-640", "ImageNet", 10.08, 12.48, 12.48, 19.11, 2.45, 68.6, 66.9, 4.37),
    PaperRow("Dec8-768 GS", "dec8-768", "ImageNet", 26.83, 31.53, 31.63, 48.28, -0.02, 68.0, 68.1, 15.62),
    PaperRow("Dec3 SGL", "dec3", "ICDAR", 38.64, 32.57, 72.41, 72.08, 1.24, 89.9, 89.3),
    PaperRow("Dec3 GS", "dec3", "ICDAR", 55.11, 66.48, 66.48, 80.45, 1.38, 90.1, 89.3, 49.63),
)
"""Alvarez and Salzmann, NIPS 2016: the measures, top-1 and speed-up, for orientation: other data, another machine."""

_MEASURES = {
    "neurons": "neurons", "group param": "group_param", "total param": "total_param", "total induced": "total_induced",
}  # fmt: skip
_NONE = "-"
_SPLITS = {"val": "validation"}


def paper_rows(network: str) -> list[PaperRow]:
    """The paper's rows of a network, by its name in `create_model`; empty where it has none."""
    return [row for row in PAPER if row.network == network]


def print_table(reports: Sequence[Report], console: Console) -> None:
    """The runs as rows in the paper's columns and order; below them the paper's rows of the same networks."""
    from rich import box
    from rich.table import Table

    regression = bool(reports) and all(_is_regression(report) for report in reports)
    quality = "rmse" if regression else "top-1"
    batch = max((batch for report in reports for batch in report.speedup_percent), key=int, default=None)
    splits = {report.split for report in reports}
    where = f" on {splits.pop()}" if len(splits) == 1 else ""
    title = f"Zero neurons and parameters, run time saved, top-1{where}: percent"
    if regression:
        title = f"Zero neurons and parameters, run time saved: percent; rmse{where}"
    papers = [row for network in dict.fromkeys(r.network for r in reports) for row in paper_rows(network)]
    papers = [] if regression else papers
    wide = console.width >= 88
    source = f"paper: on {' and '.join(sorted({row.data for row in papers}))}, run time on a K20m" if papers else None
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False,
        padding=(0, 1 if wide else 0, 0, 0), caption=source, caption_justify="left",
    )  # fmt: skip
    table.add_column("run", overflow="fold", min_width=14)
    for heading in (*_MEASURES, "accuracy gap", quality, "baseline"):
        table.add_column(heading.replace(" ", "\n"), justify="right", vertical="bottom", no_wrap=True)
    if batch is not None:
        table.add_column(f"speed-up\nbatch {batch}", justify="right", no_wrap=True)
    for report in reports:
        cells = [report.name if where else f"{report.name} ({report.split})", *_measure_cells(report)]
        cells += _quality_cells(report, regression)
        table.add_row(*cells, *([] if batch is None else [_number(report.speedup_percent.get(batch))]))
    if papers:
        table.add_section()
    for row in papers:
        speedup = [] if batch is None else [_number(row.speedup_16 if batch == "16" else None)]
        table.add_row(f"paper: {row.name}", *_paper_cells(row), *speedup, style="dim")
    console.print(table)


def to_markdown(report: Report) -> str:
    """report.md: the paper's table of this run, its layers, run time and memory."""
    regression = _is_regression(report)
    quality = "rmse" if regression else "top-1"
    lines = [f"# {report.name}", "", _sentence(report), ""]
    lines += [f"Accuracy on the {_SPLITS.get(report.split, report.split)} split; all in percent"
              f"{', but for the rmse' if regression else ''}.", ""]  # fmt: skip
    rows = [[report.name, *_measure_cells(report), *_quality_cells(report, regression)]]
    if not regression:
        rows += [[f"{row.name} of the paper, {row.data}", *_paper_cells(row)] for row in paper_rows(report.network)]
    lines += _markdown_table(["run", *_MEASURES, "accuracy gap", quality, "baseline"], rows)
    others = {"top-5": report.top5, "top-1 on validation": None if report.split == "val" else report.val_top1}
    others |= {f"{quality} on {split.replace('_', ' ')}": number for split, number in report.extra_splits.items()}
    numbers = [f"- {key}: {_number(number)}" for key, number in others.items() if number is not None]
    lines += ["", *numbers] if numbers else []
    if report.layers:
        rows = [[str(layer["name"]), f"{layer['neurons']:,}", f"{layer['alive']:,}", _removed(layer)]
                for layer in report.layers]  # fmt: skip
        lines += ["", "## Layers", "", *_markdown_table(["layer", "neurons", "alive", "removed, percent"], rows)]
    if report.speedup_percent:
        saved = {f"run time, batch {batch}": percent for batch, percent in report.speedup_percent.items()}
        saved |= {f"memory, {what}": percent for what, percent in report.memory_saved_percent.items()}
        rows = [[what, _number(percent)] for what, percent in saved.items()]
        lines += ["", "## Saved by removal", "", *_markdown_table(["", "percent"], rows)]
        lines += ["", f"Run time on {report.device or 'this machine'}; memory at batch 1."]
    facts = _facts(report)
    lines += ["", "## Figures", "", *facts] if facts else []
    return "\n".join(lines) + "\n"


def _sentence(report: Report) -> str:
    what = " on ".join(part for part in (report.network, report.source) if part) or "A network"
    parts = [f"{what}, seed {report.seed}"]
    if report.recipe:
        parts.append(f"recipe {report.recipe}")
    return ", ".join(parts) + "." + (f" Made by `{report.command}`." if report.command else "")


def _facts(report: Report) -> list[str]:
    compact, facts = report.compact, []
    if compact.get("parameters_before"):
        before, after = compact["parameters_before"] or 0.0, compact.get("parameters_after") or 0.0
        facts.append(f"- Parameters: {before:,.0f} before removal, {after:,.0f} after")
    if report.multiply_adds_before and report.multiply_adds_after is not None:
        before, after = report.multiply_adds_before / 1e6, report.multiply_adds_after / 1e6
        facts.append(f"- Multiply-adds an image: {before:,.1f} million before, {after:,.1f} million after")
    if compact.get("max_abs_difference") is not None:
        facts.append(f"- Largest difference of an output by removal, float64: {compact['max_abs_difference']:.2g}")
    for key, heading, digits in (("top1", "Top-1", 2), ("rmse", "Rmse", 4)):
        if compact.get(key) is not None:
            facts.append(f"- {heading} of the compact network: {_number(compact[key], digits=digits)}")
    if report.train_seconds:
        rate = f", {report.images_per_second:,.0f} images/s" if report.images_per_second else ""
        facts.append(f"- Training: {report.train_seconds:,.0f} s{rate}")
    return facts


def _is_regression(report: Report) -> bool:
    return report.top1 is None and report.rmse is not None


def _measure_cells(report: Report) -> list[str]:
    return [_number(getattr(report, key)) for key in _MEASURES.values()]


def _quality_cells(report: Report, regression: bool) -> list[str]:
    """Gap, value, baseline."""
    if regression:
        return [_NONE, _number(report.rmse, digits=4), _number(report.baseline_rmse, digits=4)]
    return [_signed(report.accuracy_gap), _number(report.top1), _number(report.baseline_top1)]


def _paper_cells(row: PaperRow) -> list[str]:
    measures = [_number(getattr(row, key)) for key in _MEASURES.values()]
    return [*measures, _signed(row.accuracy_gap), _number(row.top1), _number(row.baseline_top1)]


def _removed(layer: Mapping[str, Any]) -> str:
    return _number(100 * (1 - layer["alive"] / layer["neurons"]) if layer["neurons"] else 0.0)


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def _number(value: float | None, *, digits: int = 2) -> str:
    return _NONE if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return _NONE if value is None or not math.isfinite(value) else f"{value:+.2f}"


# --- neurons.parquet


class NeuronLog:
    """Norm and life of every neuron after every epoch: columns epoch, layer, neuron, norm, alive.

    `neuron` is the number in the starting network. A layer's neurons of one epoch are kept as arrays.
    """

    def __init__(self) -> None:
        self.records: list[NeuronRecord] = []

    def append(
        self,
        epoch: int,
        norms: Mapping[str, NDArray[np.floating]],
        alive: Mapping[str, NDArray[np.bool_]],
        *,
        indices: Mapping[str, NDArray[np.integer]] | None = None,
    ) -> None:
        """Add an epoch, {layer: (num_neurons,)}. The same or a later epoch that is there goes: training was resumed.

        indices: the neurons' numbers in the starting network, where some were removed; None: 0, 1, 2, ...
        `ValueError` for arrays of unequal length.
        """
        import numpy as np

        self.records = [record for record in self.records if record.epoch < epoch]
        for layer, values in norms.items():
            numbers = np.arange(len(values)) if indices is None else np.asarray(indices[layer])
            if not len(values) == len(alive[layer]) == len(numbers):
                raise ValueError(
                    f"neuron log: layer {layer!r} has {len(values)} norms, {len(alive[layer])} alive and "
                    f"{len(numbers)} indices; give one of each for every neuron"
                )
            self.records.append(
                NeuronRecord(epoch, layer, numbers.astype(np.int32), np.asarray(values, np.float32),
                             np.asarray(alive[layer], bool))
            )  # fmt: skip

    def table(self) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        counts = [len(record.neuron) for record in self.records]
        names = list(dict.fromkeys(record.layer for record in self.records))
        codes = np.repeat([names.index(record.layer) for record in self.records], counts).astype(np.int32)

        def column(key: str, dtype: Any) -> NDArray[Any]:
            return np.concatenate([np.empty(0, dtype), *(getattr(record, key) for record in self.records)])

        return pa.table(
            {
                "epoch": pa.array(np.repeat([record.epoch for record in self.records], counts).astype(np.int32)),
                "layer": pa.DictionaryArray.from_arrays(codes, pa.array(names, pa.string())),
                "neuron": pa.array(column("neuron", np.int32)),
                "norm": pa.array(column("norm", np.float32)),
                "alive": pa.array(column("alive", np.bool_)),
            }
        )

    def write(self, path: str | Path) -> None:
        """Write all epochs, whole or not at all."""
        import pyarrow.parquet as pq

        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            pq.write_table(self.table(), temporary, compression="zstd")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | Path) -> NeuronLog:
        """`ValueError` for a file that is missing or is not such a log."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path, columns=["epoch", "layer", "neuron", "norm", "alive"])
        except (OSError, pa.ArrowException) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
            raise ValueError(f"{path} is not a log of neurons ({reason}): training writes it") from error
        layers = table["layer"].combine_chunks().dictionary_encode()
        names, codes = layers.dictionary.to_pylist(), layers.indices.to_numpy()
        columns = {key: table[key].to_numpy() for key in ("epoch", "neuron", "norm", "alive")}
        epochs = columns["epoch"]
        # A record is a run of rows of one epoch and one layer.
        starts = np.flatnonzero(np.r_[True, (np.diff(epochs) != 0) | (np.diff(codes) != 0)][: len(codes)])
        log = cls()
        for start, end in zip(starts, [*starts[1:], len(codes)], strict=False):
            part = slice(start, end)
            log.records.append(
                NeuronRecord(int(epochs[start]), names[codes[start]], columns["neuron"][part].astype(np.int32),
                             columns["norm"][part], columns["alive"][part])
            )  # fmt: skip
        return log


@dataclass(frozen=True, eq=False)
class NeuronRecord:
    """The neurons of one layer after one epoch, arrays (num_neurons,)."""

    epoch: int
    layer: str
    neuron: NDArray[np.int32]
    norm: NDArray[np.float32]
    alive: NDArray[np.bool_]


# --- files


def _finite(value: Any) -> Any:
    """JSON has no NaN: null in its place."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
