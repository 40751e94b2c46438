"""The page of the comparison: fronts as plots, one table, from the rows that run.py has written.

    python benchmarks/learning/page.py FOLDER OUT        writes OUT.md, OUT-fronts.svg, OUT-budget.svg
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from benchmarks.learning.run import Method, methods, rows_of
from dist_gsl.pareto import front, hypervolume

REFERENCE = (50.0, 100.0)
"""Top-1 of 50 %, all neurons left: fixed before the first run."""
Rows = list[dict[str, Any]]


def mean_and_error(values: list[float]) -> str:
    if not values:
        return "-"
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.2f} ± {error:.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def points_of(rows: Rows, split: str) -> list[tuple[float, float]]:
    return [(row[f"{split}_top1"], 100 - row["neurons"]) for row in rows]


def volumes(rows: Rows, split: str) -> list[float]:
    """Of each seed's front. Every method may also leave the network as it is: the dense network is a point of all of them."""
    by_seed: dict[int, Rows] = defaultdict(list)
    for row in rows:
        by_seed[row["seed"]].append(row)
    return [hypervolume(points_of(its, split), reference=REFERENCE) for _, its in sorted(by_seed.items())]


def least_neurons(rows: Rows, dense: Rows, *, loss: float) -> list[float]:
    """Percent of the neurons that are enough for the dense network's validation accuracy less `loss` points, by seed; 100 where none is."""
    found = []
    for base in dense:
        enough = [100 - row["neurons"] for row in rows if row["seed"] == base["seed"] and row["val_top1"] >= base["val_top1"] - loss]
        found.append(min(enough, default=100.0))
    return found


def table(by_method: dict[str, Rows], names: dict[str, Method]) -> list[str]:
    dense = by_method.get("none", [])
    lines = [
        "| method | trainings | hypervolume, validation | test | neurons left at the dense network's accuracy, % | best validation top-1 | seconds a training |",
        "|---|---|---|---|---|---|---|",
    ]
    order = sorted(by_method, key=lambda name: -statistics.mean(volumes(by_method[name] + dense, "val")))
    for name in order:
        rows = by_method[name]
        together = rows if name == "none" else rows + dense
        best = [max(row["val_top1"] for row in rows if row["seed"] == seed) for seed in sorted({row["seed"] for row in rows})]
        lines.append(
            f"| {name}: {names[name].title} | {len(rows)} | {mean_and_error(volumes(together, 'val'))} | {mean_and_error(volumes(together, 'test'))} "
            f"| {mean_and_error(least_neurons(together, dense, loss=0.0))} | {mean_and_error(best)} | {statistics.mean(row['seconds'] for row in rows):.0f} |"
        )
    return lines


def draw(by_method: dict[str, Rows], path: Path, *, only: list[str]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "dist_gsl"
    figure, axis = plt.subplots(figsize=(8, 5.5))
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for number, name in enumerate(name for name in only if name in by_method):
        points = points_of(by_method[name], "val")
        kept = front(points)
        is_ours = name == "default"
        axis.scatter([p[1] for p in points], [p[0] for p in points], s=14, color=colours[number % 20], alpha=0.5)
        axis.plot(
            [points[i][1] for i in kept], [points[i][0] for i in kept], label=name, color=colours[number % 20], linewidth=2.5 if is_ours else 1.2
        )
    axis.set_xlabel("neurons left, %")
    axis.set_ylabel("validation top-1, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    names = methods()
    by_method: dict[str, Rows] = defaultdict(list)
    for row in rows_of(options.folder):
        by_method[row["method"]].append(row)
    if not by_method:
        raise SystemExit(f"page: {options.folder} has no rows; run benchmarks/learning/run.py {options.folder} first")
    fronts = [name for name in names if name in by_method and name not in ("target", "sensitivity", "none", "max-pool-2d", "l2")]
    draw(by_method, options.out.with_name(f"{options.out.name}-fronts.svg"), only=fronts)
    compared = {name: rows for name, rows in by_method.items() if name not in ("target", "sensitivity")}
    print(f"{date.today()}\n")
    print("\n".join(table(compared, names)))
    if "target" in by_method:
        print("\n| may be left, % | left | validation top-1 |\n|---|---|---|")
        for strength in sorted({row["strength"] for row in by_method["target"]}, reverse=True):
            rows = [row for row in by_method["target"] if row["strength"] == strength]
            print(f"| {strength:g} | {mean_and_error([100 - row['neurons'] for row in rows])} | {mean_and_error([row['val_top1'] for row in rows])} |")
    if "sensitivity" in by_method:
        rows = by_method["sensitivity"]
        print(
            f"\n{len(rows)} pairs of beta over a factor of ten: validation top-1 {statistics.mean(row['val_top1'] for row in rows):.2f}, standard deviation "
            f"{statistics.stdev(row['val_top1'] for row in rows):.2f}; neurons gone {statistics.mean(row['neurons'] for row in rows):.1f} %, "
            f"{statistics.stdev(row['neurons'] for row in rows):.1f}"
        )


if __name__ == "__main__":
    main()
