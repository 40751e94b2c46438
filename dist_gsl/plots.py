"""The plots of a run, written to RUN_DIR/plots/*.png. matplotlib is imported when a plot is made, and pyplot never."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_gsl.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dist_gsl.data import DatasetInfo

History = Sequence[Mapping[str, Any]]
"""One record an epoch: "epoch", "train_loss", "val_loss", "val_top1" (or "val_rmse"), "beta_factor", "neurons",
"all_neurons", "alive" {layer: neurons}, ..."""

PLOTS = "plots"
_BEFORE, _AFTER, _ACCENT, _TEXT, _GRID = "#cfd6df", "#1f5a99", "#d1662a", "#3a4450", "#e6e9ee"
_MAX_LINES = 8


def write_plots(
    run_dir: str | Path, *, history: History, report: Report, baseline_history: History | None = None
) -> list[Path]:
    """Draw a run; returns the files. A plot that the run has no numbers for is left out.

    neurons.png: neurons per layer before and after. accuracy-reduction.png: accuracy against the share of neurons
    removed, a point an epoch. learning.png: losses and accuracy. cost.png: run time, memory and multiply-adds after
    removal. alive.png: neurons alive per layer over the epochs.
    """
    import matplotlib as mpl

    directory = Path(run_dir) / PLOTS
    directory.mkdir(parents=True, exist_ok=True)
    removes = any(record.get("beta_factor", 0) > 0 or _reduction(record, report) > 0 for record in history)
    drawings: dict[str, Callable[[], Figure] | None] = {
        "neurons": (lambda: neurons_figure(report)) if report.layers else None,
        "accuracy-reduction": (lambda: reduction_figure(history, report, baseline_history)) if removes else None,
        "learning": (lambda: learning_figure(history, report, baseline_history)) if history else None,
        "cost": (lambda: cost_figure(report)) if report.speedup_percent or report.memory_saved_percent else None,
        "alive": (lambda: alive_figure(history, report)) if removes and history[0].get("alive") else None,
    }
    files = []
    with mpl.rc_context(_style()):
        for name, draw in drawings.items():
            if draw is not None:
                files.append(_save(draw(), directory / f"{name}.png"))
    return files


def data_sheet(info: DatasetInfo, directory: Path, file: Path) -> Path:
    """Draw a written data set: images of train as the network gets them with their targets, and how many each class has.

    DataError where the file is damaged.
    """
    import matplotlib as mpl

    images, labels = _samples(info, directory)
    with mpl.rc_context(_style()):
        return _save(_sheet_figure(info, images, labels), file)


_SHEET_COLUMNS, _SHEET_ROWS = 10, 5


def _samples(info: DatasetInfo, directory: Path) -> tuple[list[Any], list[str]]:
    """Some images of train, (H, W, 3) or (H, W) in 0..1, and what each is."""
    from dist_gsl.data import Loader

    split = info.splits["train"]
    count = min(split.num_samples, _SHEET_COLUMNS * _SHEET_ROWS)
    size = 112 if info.channels == 3 else None
    loader = Loader(directory / split.file, batch_size=count, train=True, size=size)
    with contextlib.closing(loader.levels()) as batches:
        batch = next(batches)
    levels = batch.images.permute(0, 2, 3, 1).numpy() / 255
    targets = batch.targets.tolist()
    labels = [info.classes[t] if info.classes else ", ".join(f"{value:.2f}" for value in t) for t in targets]
    return [image if info.channels == 3 else image[:, :, 0] for image in levels], labels


def _sheet_figure(info: DatasetInfo, images: Sequence[Any], labels: Sequence[str]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.2 if info.classes else 6.2), layout="constrained")
    sheet, *rest = figure.subfigures(2 if info.classes else 1, 1, height_ratios=[5, 1.7] if info.classes else [1], squeeze=False)[:, 0]
    sheet.suptitle(f"{info.source}: samples of train")
    for axes in sheet.subplots(_SHEET_ROWS, _SHEET_COLUMNS).flat:
        axes.set_axis_off()
    for axes, image, label in zip(sheet.axes, images, labels, strict=False):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        axes.set_title(label if len(label) <= 14 else label[:13] + "…", fontsize=7, fontweight="normal", loc="center", pad=2)
    for part in rest:
        axes = part.subplots()
        for name, split in info.splits.items():
            axes.plot(sorted(split.class_counts, reverse=True), label=name, drawstyle="steps-mid")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("classes, the largest first")
        axes.set_ylabel("images")
        axes.legend()
    return figure


def write_front(
    file: Path, *, points: Mapping[int, tuple[float, float]], front: Sequence[int], knee: int | None,
    baseline: int | None, stopped: Sequence[int], objective: str, title: str,
) -> Path:  # fmt: skip
    """Draw a search: {trial: (quality, cost)}, the trials of its front by rising cost, its knee and its baseline.

    Cost is the percentage of neurons alive, or milliseconds for `objective` "latency".
    """
    import matplotlib as mpl

    file.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_style()):
        return _save(
            front_figure(points=points, front=front, knee=knee, baseline=baseline, stopped=stopped, objective=objective,
                         title=title), file,
        )  # fmt: skip


# --- one function a plot


def front_figure(
    *, points: Mapping[int, tuple[float, float]], front: Sequence[int], knee: int | None, baseline: int | None,
    stopped: Sequence[int], objective: str, title: str,
) -> Figure:  # fmt: skip
    """Accuracy against neurons removed (or run time), a point a trial; the front is joined."""

    def place(trial: int) -> tuple[float, float]:
        quality, cost = points[trial]
        return (100 - cost if objective == "neurons" else cost), quality

    figure, axes = _figure(height=4.4)
    others = [trial for trial in points if trial not in front and trial not in stopped]
    if front:
        axes.plot(*zip(*map(place, front), strict=True), color=_AFTER, linewidth=1.2, drawstyle="steps-post", zorder=1)
    for trials, colour, label in (
        (others, "#8a97a8", "dominated"), (front, _AFTER, "front"), ([t for t in stopped if t in points], _BEFORE, "stopped"),
    ):  # fmt: skip
        if trials:
            x, y = zip(*map(place, trials), strict=True)
            axes.scatter(x, y, s=34, color=colour, label=label, edgecolors="white", linewidths=0.5, zorder=2)
    if knee is not None:
        at = place(knee)
        axes.scatter(at[:1], at[1:], s=130, facecolors="none", edgecolors=_ACCENT, linewidths=1.6, label="knee", zorder=3)
    if baseline is not None:
        axes.axhline(place(baseline)[1], color=_ACCENT, linewidth=1.1, linestyle="--", zorder=0, label="without penalty")
    for trial in front:
        axes.annotate(str(trial), place(trial), (5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("neurons removed, percent" if objective == "neurons" else "run time of one image, ms")
    axes.set_ylabel("quality on validation (top-1 percent, or minus rmse)")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    _title(axes, f"{title}: what the trials reached")
    return figure




def neurons_figure(report: Report) -> Figure:
    """Neurons of each layer in the starting network, and those left."""
    layers = report.layers
    names = _short([layer["name"] for layer in layers])
    figure, axes = _figure(height=1.6 + 0.3 * len(layers))
    rows = range(len(layers))
    axes.barh(rows, [layer["neurons"] for layer in layers], height=0.72, color=_BEFORE, label="removed")
    axes.barh(rows, [layer["alive"] for layer in layers], height=0.72, color=_AFTER, label="left")
    widest = max(layer["neurons"] for layer in layers)
    for row, layer in enumerate(layers):
        text = f"{layer['alive']:,} of {layer['neurons']:,}"
        axes.text(layer["neurons"] + 0.012 * widest, row, text, va="center", fontsize=8.5)
    axes.set_yticks(rows, names)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlim(0, 1.17 * widest)
    axes.set_xlabel("neurons")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    _legend_below(figure)
    _title(axes, f"{report.name}: neurons per layer")
    return figure


def reduction_figure(history: History, report: Report, baseline_history: History | None = None) -> Figure:
    """Accuracy on validation against the share of neurons removed, a point an epoch."""
    from matplotlib.ticker import MaxNLocator

    key, label = _quality(history)
    epochs = [record["epoch"] for record in history]
    x = [_reduction(record, report) for record in history]
    y = [record[key] for record in history]
    figure, axes = _figure(height=4.4)
    axes.plot(x, y, color=_BEFORE, linewidth=1, zorder=1)
    points = axes.scatter(x, y, c=epochs, cmap="viridis_r", s=34, zorder=2, edgecolors="white", linewidths=0.5)
    bar = figure.colorbar(points, ax=axes, pad=0.02, ticks=MaxNLocator(integer=True))
    bar.set_label("epoch")
    bar.outline.set_visible(False)
    baseline = baseline_history[-1].get(key) if baseline_history else None
    hidden = _focus(axes, x, y, baseline=baseline, higher_is_better=key == "val_top1")
    if baseline is not None:
        axes.axhline(baseline, color=_ACCENT, linewidth=1.3, linestyle="--", zorder=0)
        text = f"without penalty {baseline:.4g}"
        axes.annotate(text, (0, baseline), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="left", va="bottom", color=_ACCENT, fontsize=8.5)  # fmt: skip
    if hidden:
        text = f"{hidden} early epoch{'s' if hidden > 1 else ''} out of view"
        axes.text(0.01, 0.02, text, transform=axes.transAxes, fontsize=8, color=_TEXT)
    axes.set_xlabel("neurons removed, percent")
    axes.set_ylabel(label)
    what = "accuracy" if key == "val_top1" else "error"
    _title(axes, f"{report.name}: {what} against neurons removed")
    return figure


def learning_figure(history: History, report: Report, baseline_history: History | None = None) -> Figure:
    """Losses above, accuracy below, over the epochs; shaded where the penalty acts."""
    from matplotlib.ticker import MaxNLocator

    key, label = _quality(history)
    figure = _canvas(height=5.6)
    loss, quality = figure.subplots(2, 1, sharex=True)
    _lines(loss, history, {"train_loss": ("training", _BEFORE_LINE), "val_loss": ("validation", _AFTER)})
    loss.set_ylabel("loss")
    train_key = key.replace("val_", "train_")
    _lines(quality, history, {train_key: ("training", _BEFORE_LINE), key: ("validation", _AFTER)})
    if baseline_history:
        _lines(quality, baseline_history, {key: ("validation, without penalty", _ACCENT)}, linestyle="--")
    quality.set_ylabel(label.replace(" on validation", "").replace(", validation", ""))
    quality.set_xlabel("epoch")
    for axes in (loss, quality):
        _shade_penalty(axes, history)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(history[0]["epoch"] - 1, history[-1]["epoch"] * 1.01)
    loss.legend(loc="upper right", frameon=False)
    handles = [line for line in quality.get_lines() if not str(line.get_label()).startswith("_")]
    quality.legend(handles=handles, loc="lower right" if key == "val_top1" else "upper right", frameon=False)
    _title(loss, f"{report.name}: learning")
    return figure


def cost_figure(report: Report) -> Figure:
    """What the compact network needs, in percent of the full one."""
    rows = {f"run time, batch {batch}": 100 - saved for batch, saved in report.speedup_percent.items()}
    names = {"params": "memory of the parameters", "features": "memory of the features, batch 1"}
    rows |= {names.get(what, what): 100 - saved for what, saved in report.memory_saved_percent.items()}
    if report.multiply_adds_before and report.multiply_adds_after is not None:
        rows["multiply-adds"] = 100 * report.multiply_adds_after / report.multiply_adds_before
    figure, axes = _figure(height=1.6 + 0.34 * len(rows))
    positions = range(len(rows))
    axes.barh(positions, [100] * len(rows), height=0.68, color=_BEFORE, label="full network")
    axes.barh(positions, list(rows.values()), height=0.68, color=_AFTER, label="compact network")
    for position, percent in zip(positions, rows.values(), strict=True):
        axes.text(max(percent, 100) + 1.5, position, f"{percent:.0f} %", va="center", fontsize=8.5)
    axes.set_yticks(positions, list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * max(100, *rows.values()))
    where = f"; run time on {report.device}" if report.device and report.speedup_percent else ""
    axes.set_xlabel(f"percent of the full network{where}")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    _legend_below(figure)
    _title(axes, f"{report.name}: run time and memory after removal")
    return figure


def alive_figure(history: History, report: Report) -> Figure:
    """Share of each layer's neurons alive after each epoch: lines, or colours where the layers are many."""
    starting = {layer["name"]: layer["neurons"] for layer in report.layers}
    layers = [name for name in history[0]["alive"] if starting.get(name, history[0]["alive"][name])]
    start = {name: starting.get(name, history[0]["alive"][name]) for name in layers}
    shares = [[100 * record["alive"][name] / start[name] for record in history] for name in layers]
    draw = _alive_lines if len(layers) <= _MAX_LINES else _alive_colours
    figure, axes = draw(_short(layers), shares, [record["epoch"] for record in history])
    axes.set_xlabel("epoch")
    _title(axes, f"{report.name}: neurons alive")
    return figure


def _alive_lines(names: Sequence[str], shares: Sequence[Sequence[float]], epochs: Sequence[int]) -> tuple[Figure, Axes]:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(height=4.2)
    for number, (name, share) in enumerate(zip(names, shares, strict=True)):
        colour = colormaps["viridis"](0.85 * number / max(1, len(names) - 1))  # dark at the input, light at the output
        axes.plot([epochs[0] - 1, *epochs], [100, *share], color=colour, label=f"{name}  {share[-1]:.0f} %")
    axes.set_ylim(0, 103)
    axes.set_ylabel("alive, percent of the layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title="layer, alive at the end")
    return figure, axes


def _alive_colours(
    names: Sequence[str], shares: Sequence[Sequence[float]], epochs: Sequence[int]
) -> tuple[Figure, Axes]:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(height=1.6 + 0.2 * len(names))
    extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(names) - 0.5, -0.5)
    image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=100, interpolation="nearest", extent=extent)
    axes.set_yticks(range(len(names)), names, fontsize=8 if len(names) <= 40 else 6)
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("alive, percent of the layer")
    bar.outline.set_visible(False)
    return figure, axes


# --- parts

_BEFORE_LINE = "#8a97a8"


def _style() -> Any:
    """rcParams."""
    return {
        "font.size": 9.5, "axes.labelsize": 9.5, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
        "axes.edgecolor": "#aab4c0", "axes.labelcolor": _TEXT, "text.color": _TEXT, "xtick.color": _TEXT,
        "ytick.color": _TEXT, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": _GRID, "grid.linewidth": 0.8, "axes.axisbelow": True, "lines.linewidth": 1.7,
        "legend.title_fontsize": 9,
    }  # fmt: skip


def _canvas(*, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, min(height, 20)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(*, height: float) -> tuple[Figure, Axes]:
    figure = _canvas(height=height)
    return figure, figure.add_subplot()


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold", pad=10)


def _legend_below(figure: Figure) -> None:
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


def _lines(axes: Axes, history: History, keys: Mapping[str, tuple[str, str]], *, linestyle: str = "-") -> None:
    for key, (label, colour) in keys.items():
        points = [(record["epoch"], record[key]) for record in history if record.get(key) is not None]
        if points:
            marker = "o" if len(points) < 3 else None  # a line of one point cannot be seen
            axes.plot(*zip(*points, strict=True), color=colour, label=label, linestyle=linestyle, marker=marker)


def _shade_penalty(axes: Axes, history: History) -> None:
    """The darker, the larger beta is in that epoch."""
    factors = [record.get("beta_factor") or 0.0 for record in history]
    largest = max(factors, default=0.0)
    if largest <= 0 or len(set(factors)) == 1:
        return
    for record, factor in zip(history, factors, strict=True):
        if factor > 0:
            end, alpha = record["epoch"], 0.13 * factor / largest
            axes.axvspan(end - 1, end, color=_ACCENT, alpha=alpha, linewidth=0)
    axes.axvspan(0, 0, color=_ACCENT, alpha=0.13, linewidth=0, label="penalty acts (darker: larger β)")


def _focus(
    axes: Axes, x: Sequence[float], y: Sequence[float], *, baseline: float | None, higher_is_better: bool
) -> int:
    """Limits the axes to the epochs of the second half and what is near them; how many epochs are out of view.

    The first epochs are so much worse that they would press all others into one line.
    """
    late = [*y[len(y) // 2 :], *([] if baseline is None else [baseline])]
    low, high = min(late), max(late)
    reach = max(1.5 * (high - low), 0.02 * abs(high), 1e-9)
    if higher_is_better:
        low, high = max(low - reach, min(*y, low)), max(*y, high)
    else:
        low, high = min(*y, low), min(high + reach, max(*y, high))
    inside = [low <= value <= high for value in y]
    seen = [value for value, is_inside in zip(x, inside, strict=True) if is_inside]
    pad_x, pad_y = max(0.06 * (max(seen) - min(seen)), 0.5), 0.08 * (high - low) or 0.01 * abs(high) or 1.0
    axes.set_xlim(min(seen) - pad_x, max(seen) + pad_x)
    axes.set_ylim(low - pad_y, high + pad_y)
    return len(y) - sum(inside)


def _quality(history: History) -> tuple[str, str]:
    """Key and label of what is to be good."""
    if history and history[-1].get("val_top1") is None:
        return "val_rmse", "root mean square error, validation"
    return "val_top1", "top-1 on validation, percent"


def _reduction(record: Mapping[str, Any], report: Report) -> float:
    """Percent of the convolution neurons that is zero; of all neurons where the network has no convolution."""
    share, everything = record.get("neurons", 0.0), record.get("all_neurons", 0.0)
    return everything if report.neurons == 0 and (report.all_neurons or 0) > 0 else share


def _short(names: Sequence[str]) -> list[str]:
    """The last part of each name, where that tells them apart."""
    last = [name.rpartition(".")[2] for name in names]
    return last if len(set(last)) == len(last) else list(names)


def _save(figure: Figure, file: Path) -> Path:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return file
