"""The report of a run: file, tables, log of neurons, plots."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from dist_gsl import plots, report
from dist_gsl.report import NeuronLog, Report

LAYERS = [
    {"name": "features.conv1v", "neurons": 48, "alive": 30},
    {"name": "features.conv1h", "neurons": 96, "alive": 96},
]


def made(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "name": "dec3-gs", "recipe": "dec3-chars", "command": "dist-gsl train dec3-chars", "network": "dec3",
        "source": "chars", "seed": 1, "split": "test", "top1": 91.2, "top5": 99.1, "val_top1": 90.9,
        "extra_splits": {"test_fonts": 70.5}, "baseline_top1": 90.4, "accuracy_gap": 0.8, "neurons": 50.1,
        "group_param": 61.0, "total_param": 61.25, "total_induced": 77.7, "all_neurons": 50.1, "layers": LAYERS,
        "compact": {"max_abs_difference": 1e-15, "top1": 91.2, "parameters_before": 371, "parameters_after": 93},
        "speedup_percent": {"1": 50.0, "2": -3.0, "8": 60.0, "16": 61.0},
        "memory_saved_percent": {"params": 70.0, "features": 20.0}, "multiply_adds_before": 183175168,
        "multiply_adds_after": 45908992, "device": "CPU, 1 thread", "train_seconds": 1000.0, "images_per_second": 700.0,
    }  # fmt: skip
    return Report(**{**values, **changes})


def regression() -> Report:
    compact = {"max_abs_difference": 0.0, "rmse": 3.25}
    return made(top1=None, top5=None, val_top1=None, baseline_top1=None, accuracy_gap=None, rmse=3.25,
                baseline_rmse=3.5, compact=compact, extra_splits={})  # fmt: skip


@pytest.mark.parametrize("value", [made(), regression(), Report(name="little")])
def test_round_trip(tmp_path: Path, value: Report) -> None:
    report.write(value, tmp_path)
    assert report.load(tmp_path) == value
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_names_of_the_contract(tmp_path: Path) -> None:
    report.write(made(), tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    contract = {"top1", "top5", "baseline_top1", "accuracy_gap", "neurons", "group_param", "total_param",
                "total_induced", "layers", "compact", "speedup_percent", "memory_saved_percent",
                "train_seconds", "seed"}  # fmt: skip
    assert contract <= set(content)
    assert set(content["compact"]) == {"max_abs_difference", "top1", "parameters_before", "parameters_after"}
    assert content["layers"] == LAYERS


def test_what_is_not_a_number_is_null(tmp_path: Path) -> None:
    report.write(made(top1=float("nan"), speedup_percent={"1": float("inf")}), tmp_path)
    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert content["top1"] is None
    assert content["speedup_percent"] == {"1": None}
    report.to_markdown(report.load(tmp_path))


def test_unknown_entries_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"name": "a", "later": 1}))
    assert report.load(tmp_path) == Report(name="a")


@pytest.mark.parametrize(("content", "message"), [(None, "is missing"), ("{", "not a report"), ("{}", "not a report"),
                                                  ("[1]", "not a report")])  # fmt: skip
def test_damaged_report(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        report.load(tmp_path)
    assert "dist-gsl report" in str(caught.value)


def test_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write(made(), tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(made(top1=1.0), tmp_path)
    assert report.load(tmp_path) == made()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.json", "report.md"]


# --- tables


def test_markdown_has_the_paper_columns_in_order() -> None:
    lines = report.to_markdown(made()).splitlines()
    heading = next(line for line in lines if line.startswith("| run "))
    assert heading == (
        "| run | neurons | group param | total param | total induced | accuracy gap | top-1 | baseline |"
    )
    assert "| dec3-gs | 50.10 | 61.00 | 61.25 | 77.70 | +0.80 | 91.20 | 90.40 |" in lines
    assert "| Dec3 GS of the paper, ICDAR | 55.11 | 66.48 | 66.48 | 80.45 | +1.38 | 90.10 | 89.30 |" in lines
    assert "| features.conv1v | 48 | 30 | 37.50 |" in lines
    assert "| run time, batch 2 | -3.00 |" in lines
    assert "- top-1 on test fonts: 70.50" in lines


def test_markdown_of_a_regression() -> None:
    text = report.to_markdown(regression())
    assert "| dec3-gs | 50.10 | 61.00 | 61.25 | 77.70 | - | 3.2500 | 3.5000 |" in text
    assert "of the paper" not in text


def printed(reports: list[Report], *, width: int = 100) -> list[str]:
    stream = io.StringIO()
    report.print_table(reports, Console(file=stream, width=width))
    return stream.getvalue().splitlines()


def cells(lines: list[str], start: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(start)]
    return line.removeprefix(start).split()


@pytest.mark.parametrize("width", [80, 200])
def test_table(width: int) -> None:
    other = made(name="other", accuracy_gap=None, baseline_top1=None, speedup_percent={})
    lines = printed([made(), other], width=width)
    assert cells(lines, "dec3-gs") == ["50.10", "61.00", "61.25", "77.70", "+0.80", "91.20", "90.40", "61.00"]
    assert cells(lines, "other") == ["50.10", "61.00", "61.25", "77.70", "-", "91.20", "-", "-"]
    assert cells(lines, "paper: Dec3 GS") == ["55.11", "66.48", "66.48", "80.45", "+1.38", "90.10", "89.30", "49.63"]
    assert all(len(line) <= width for line in lines)


def test_table_of_regressions_and_of_none() -> None:
    lines = printed([regression()])
    assert cells(lines, "dec3-gs")[-3:] == ["3.2500", "3.5000", "61.00"]
    assert not any("paper" in line for line in lines)
    printed([])


def test_table_of_different_splits_names_them() -> None:
    lines = printed([made(), made(name="b", split="val")], width=120)
    assert cells(lines, "dec3-gs (test)")
    assert cells(lines, "b (val)")


def test_every_network_of_the_paper_has_a_row() -> None:
    from dist_gsl.models import model_names

    without = {"bnet"}  # the paper gives its accuracy only
    assert {row.network for row in report.PAPER} == set(model_names()) - without


# --- neurons.parquet


def logged(epochs: int = 3) -> NeuronLog:
    log = NeuronLog()
    for epoch in range(1, epochs + 1):
        norms = {"conv1": np.arange(4.0) + epoch, "conv2": np.arange(2.0)}
        log.append(epoch, norms, {"conv1": np.array([True, True, False, True]), "conv2": np.array([True, False])})
    return log


def test_log_round_trip(tmp_path: Path) -> None:
    log = logged()
    log.write(tmp_path / "neurons.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["neurons.parquet"]
    table = pq.read_table(tmp_path / "neurons.parquet")
    assert table.column_names == ["epoch", "layer", "neuron", "norm", "alive"]
    rows = table.to_pylist()
    assert len(rows) == 18
    assert rows[6] == {"epoch": 2, "layer": "conv1", "neuron": 0, "norm": 2.0, "alive": True}
    assert rows[11] == {"epoch": 2, "layer": "conv2", "neuron": 1, "norm": 1.0, "alive": False}
    assert NeuronLog.read(tmp_path / "neurons.parquet").table().equals(log.table())


def test_log_goes_on_after_a_resume(tmp_path: Path) -> None:
    logged(3).write(tmp_path / "neurons.parquet")
    log = NeuronLog.read(tmp_path / "neurons.parquet")
    log.append(2, {"conv1": np.zeros(4)}, {"conv1": np.zeros(4, bool)})  # epochs 2 and 3 are trained again
    assert [(record.epoch, record.layer) for record in log.records] == [(1, "conv1"), (1, "conv2"), (2, "conv1")]


def test_log_of_a_network_with_removed_neurons() -> None:
    log = NeuronLog()
    log.append(1, {"conv1": np.ones(2)}, {"conv1": np.ones(2, bool)}, indices={"conv1": np.array([1, 7])})
    assert log.table()["neuron"].to_pylist() == [1, 7]


def test_empty_log(tmp_path: Path) -> None:
    NeuronLog().write(tmp_path / "neurons.parquet")
    assert NeuronLog.read(tmp_path / "neurons.parquet").records == []


def test_log_of_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="conv1"):
        NeuronLog().append(1, {"conv1": np.ones(2)}, {"conv1": np.ones(3, bool)})


@pytest.mark.parametrize("content", [None, b"no"])
def test_damaged_log(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "neurons.parquet"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="not a log of neurons"):
        NeuronLog.read(file)


# --- plots


def history(epochs: int = 4, *, quality: str = "val_top1", layers: int = 2) -> list[dict[str, Any]]:
    return [
        {"epoch": epoch, "train_loss": 2 / epoch, "val_loss": 2.2 / epoch, quality: 90 - 40 / epoch,
         "learning_rate": 0.1, "beta_factor": 1.0 if epoch < 3 else 0.0,
         "neurons": 10.0 * epoch, "all_neurons": 10.0 * epoch,
         "alive": {f"features.conv{n}": 48 - epoch for n in range(layers)}}
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip


ALL = ["neurons", "accuracy-reduction", "learning", "cost", "alive"]


def names(files: list[Path]) -> list[str]:
    return [file.stem for file in files]


@pytest.mark.parametrize(
    ("epochs", "quality", "layers"), [(4, "val_top1", 2), (1, "val_top1", 12), (4, "val_rmse", 12), (1, "val_rmse", 2)]
)
def test_plots(tmp_path: Path, epochs: int, quality: str, layers: int) -> None:
    value = made() if quality == "val_top1" else regression()
    rows = history(epochs, quality=quality, layers=layers)
    files = plots.write_plots(tmp_path, history=rows, report=value, baseline_history=rows)
    assert names(files) == ALL
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == sorted(f"{name}.png" for name in ALL)
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000 for file in files)


def test_plots_without_numbers_are_left_out(tmp_path: Path) -> None:
    assert plots.write_plots(tmp_path, history=[], report=Report(name="a")) == []
    plain = [{**row, "beta_factor": 0.0, "neurons": 0.0, "all_neurons": 0.0} for row in history()]
    assert names(plots.write_plots(tmp_path, history=plain, report=Report(name="a"))) == ["learning"]


def test_plots_leave_the_state_of_matplotlib_alone(tmp_path: Path) -> None:
    code = (
        "import sys, json\n"
        "from dist_gsl import plots, report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.write_plots(sys.argv[1], history=json.loads(sys.argv[2]), report=report.Report(name='a'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "import matplotlib\n"
        "assert matplotlib.rcParams['axes.grid'] is False\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), json.dumps(history())], check=True)
