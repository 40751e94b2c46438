"""Mean and standard error over seeds of finished runs, from their report.json on the test split."""

import argparse
import math
import statistics
import sys
from pathlib import Path

from dist_gsl import report

COLUMNS = ("neurons", "group_param", "total_param", "total_induced", "accuracy_gap", "top1", "baseline_top1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder that holds RECIPE-seed0, RECIPE-seed1, ...")
    parser.add_argument("--recipes", nargs="+", default=["dec3-chars", "digits"])
    options = parser.parse_args()
    print("| recipe | seeds | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " | extra |")
    print("|---|---|" + "---|" * (len(COLUMNS) + 1))
    for recipe in options.recipes:
        print(row(recipe, options.runs))
    print()
    for recipe in options.recipes:
        trained_out(recipe, options.runs)


def row(recipe: str, runs: Path) -> str:
    """The recipe's line of the table."""
    reports = [report.load(path) for path in sorted(runs.glob(f"{recipe}-seed[0-9]"))]
    if any(made.split != "test" for made in reports):
        sys.exit(f"{recipe}: a report is not on the test split; run `dist-gsl report RUN_DIR --final` first")
    cells = [mean_and_error([getattr(made, column) for made in reports]) for column in COLUMNS]
    extra = {name: mean_and_error([made.extra_splits[name] for made in reports]) for name in reports[0].extra_splits}
    seeds = ", ".join(str(made.seed) for made in reports)
    further = ", ".join(f"{name} {value}" for name, value in extra.items())
    return f"| {recipe} | {seeds} | {' | '.join(cells)} | {further} |"


def trained_out(recipe: str, runs: Path) -> None:
    """What twice the epochs do for the baseline, on validation."""
    pairs = []
    for twice in sorted(runs.glob(f"{recipe}-seed[0-9]-twice")):
        once = report.load(twice.with_name(twice.name.removesuffix("-twice") + "-baseline"))
        pairs.append((once.val_top1, report.load(twice).val_top1))
    if pairs:
        once, both = ([value for value in column if value is not None] for column in zip(*pairs, strict=True))
        gains = [b - a for a, b in zip(once, both, strict=True)]
        print(f"{recipe}, baseline on validation: {mean_and_error(once)}; with twice the epochs {mean_and_error(both)}; "
              f"gain {mean_and_error(gains)}")  # fmt: skip


def mean_and_error(values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


if __name__ == "__main__":
    main()
