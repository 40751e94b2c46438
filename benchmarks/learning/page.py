"""The page of the comparison: fronts as plots and tables, from the rows that run.py has written.

    python benchmarks/learning/page.py FOLDER docs/learning.md

What stands in the page between `<!-- NAME -->` and `<!-- end -->` is written anew, the rest stays; the plots lie beside it (learning-NAME.svg).
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from benchmarks.learning.methods import CONTROL, FOR_PARTS, METHODS, OWN, PART, RIVAL, rows_of
from dist_gsl.pareto import front, hypervolume

REFERENCE = (50.0, 100.0)
"""Top-1 of 50 %, all neurons left: fixed before the first run."""
WITHIN = 2.0
"""Percent of the neurons that a budget may be missed by."""
SIZES = (50, 40, 30, 20)
"""Percent of the neurons left, at which accuracies are compared."""
BELOW = 0.3
"""Points of accuracy that a budget's network may be below the default's front."""
CHOSEN_ON = range(6)
"""Seeds on whose validation accuracy the ways of steering were chosen."""
NEAR = 1.0
"""Points of accuracy below the network without penalty, that is trained as well as it can be, which count as none."""
TUNED = "default-decay"
"""The default with as good a weight decay as its rivals have."""
Rows = list[dict[str, Any]]


def mean_and_error(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def by_seed(rows: Rows) -> dict[int, Rows]:
    found: dict[int, Rows] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["seed"]):
        found[row["seed"]].append(row)
    return dict(found)


def points_of(rows: Rows, split: str) -> list[tuple[float, float]]:
    """(top-1, percent of the neurons that are left) of each."""
    return [(row[f"{split}_top1"], 100 - row["neurons"]) for row in rows]


def volumes(rows: Rows, split: str) -> dict[int, float]:
    """Hypervolume of each seed's front, which is that of the validation split, also where its accuracy is that of the test split."""
    found = {}
    for seed, its in by_seed(rows).items():
        chosen = front(points_of(its, "val"))
        found[seed] = hypervolume([points_of(its, split)[i] for i in chosen], reference=REFERENCE)
    return found


def least_neurons(rows: Rows, dense: Rows) -> list[float]:
    """Percent of the neurons that are enough for nearly the dense network's validation accuracy, by seed; 100 where none is."""
    found = []
    for base in dense:
        enough = [100 - row["neurons"] for row in rows if row["seed"] == base["seed"] and row["val_top1"] >= base["val_top1"] - NEAR]
        found.append(min(enough, default=100.0))
    return found


def of_rivals_seeds(rows_by: dict[str, Rows]) -> dict[str, Rows]:
    """Of the seeds that a rival was run with: others may have more, for what needs no rival."""
    seeds = {row["seed"] for name, rows in rows_by.items() if METHODS[name].kind == RIVAL for row in rows}
    return {name: [row for row in rows if row["seed"] in seeds] for name, rows in rows_by.items()} if seeds else rows_by


def over(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    return [ours[seed] / theirs[seed] for seed in sorted(set(ours) & set(theirs)) if theirs[seed] > 0]


def at_size(rows: Rows, left: float) -> list[float]:
    """Each seed's accuracy with so many neurons left, where its front reaches them."""
    return [top1 for its in by_seed(rows).values() if (top1 := on_front(its, left)) is not None]


def described(name: str, rows: Rows) -> str:
    """With the weight decays, where they are not the setting's."""
    decays = " or ".join(f"{decay:g}" for decay in sorted({row["weight_decay"] for row in rows}))
    return f"{name}: {METHODS[name].title}" + (f" (weight decay {decays})" if METHODS[name].decays else "")


def as_tuned(rows_by: dict[str, Rows]) -> dict[str, Rows]:
    """With the default as tuned as its rivals: where another weight decay is better for a strength, with that."""
    if not rows_by.get(TUNED):
        return rows_by
    return {**rows_by, TUNED: rows_by[TUNED] + [row for row in rows_by["default"] if row["strength"] not in METHODS[TUNED].strengths]}


def table(rows_by: dict[str, Rows], kinds: Sequence[str], *, reference: str = "default", strengths: Sequence[float] | None = None) -> list[str]:
    """Best first, by what validation says. reference: that all are compared with. strengths: of the default, where others have fewer."""
    dense = rows_by.get("tuned-decay") or rows_by["none"]
    named = {name: rows for name, rows in rows_by.items() if METHODS[name].kind in kinds and len(METHODS[name].strengths) > 1}
    if strengths is not None:
        named.pop(TUNED, None)
        named["default"] = [row for row in named["default"] if row["strength"] in strengths]
    found = {name: volumes(rows, "val") for name, rows in named.items()}
    sizes = "".join(f" top-1 at {left} % |" for left in SIZES)
    lines = [
        f"| method | trainings | hypervolume | {reference}'s over it | hypervolume, test | less {reference}'s top-1 at the same sizes |{sizes} neurons left within a point of the dense network's best, % | seconds |",
        "|---|---|---|---|---|---|" + "---|" * len(SIZES) + "---|---|",
    ]
    for name in sorted(named, key=lambda name: -statistics.mean(found[name].values())):
        rows = named[name]
        at = "".join(f" {of_seeds(at_size(rows, left), rows)} |" for left in SIZES)
        lines.append(
            f"| {described(name, rows)} | {len(rows)} | {mean_and_error(list(found[name].values()), 0)} "
            f"| {mean_and_error(over(found[reference], found[name]), 3)} | {mean_and_error(list(volumes(rows, 'test').values()), 0)} "
            f"| {of_seeds(beside(rows, line_of(rows_by, reference)), rows)} |{at} "
            f"{mean_and_error(least_neurons(rows, dense), 1)} | {statistics.mean(row['seconds'] for row in rows):.0f} |"
        )
    return lines


def line_of(rows_by: dict[str, Rows], reference: str) -> Rows:
    """All points of the default. With its best weight decay it begins, without penalty, at that of the network without penalty, and has none of
    the weaker penalties at the demo's."""
    between = rows_by.get("between", [])
    if reference != TUNED:
        return rows_by[reference] + between
    return rows_by[reference] + rows_by.get("tuned-decay", []) + [row for row in between if row["strength"] < min(METHODS[TUNED].strengths)]


def beside(rows: Rows, others: Rows) -> list[float]:
    """Of each seed: by how many points the accuracies are above those of the others at the same sizes, on straight lines between all points of theirs; the
    mean over strengths. Unlike a hypervolume it depends little on how many points there are, and where. Sizes beyond the ends of the others' are left out."""
    found = []
    for seed, its in by_seed(rows).items():
        points = sorted((100 - row["neurons"], row["val_top1"]) for row in others if row["seed"] == seed)
        if not points:
            continue
        sizes, accuracies = zip(*points, strict=True)
        inside = [(row["val_top1"], 100 - row["neurons"]) for row in its if sizes[0] <= 100 - row["neurons"] <= sizes[-1]]
        found += [statistics.mean(top1 - float(np.interp(left, sizes, accuracies)) for top1, left in inside)] if inside else []
    return found


def of_seeds(values: Sequence[float], rows: Rows, digits: int = 1) -> str:
    """With how many seeds reach so far, where not all do."""
    num_seeds = len(by_seed(rows))
    return mean_and_error(values, digits) + ("" if len(values) in (0, num_seeds) else f" ({len(values)} of {num_seeds} seeds)")


def single_networks(rows_by: dict[str, Rows]) -> list[str]:
    """Networks that nothing is removed from."""
    return [
        f"{described(name, rows)}: validation {mean_and_error([row['val_top1'] for row in rows])}, test {mean_and_error([row['test_top1'] for row in rows])}, "
        f"{mean_and_error([row['parameters'] for row in rows], 0)} parameters, {statistics.mean(row['seconds'] for row in rows):.0f} seconds.  "
        for name, rows in rows_by.items() if len(METHODS[name].strengths) == 1
    ]  # fmt: skip


def per_strength(rows_by: dict[str, Rows], names: Sequence[str]) -> list[str]:
    """What each strength came to: mean and standard error over the seeds."""
    lines = ["| method | strength | weight decay | neurons gone, % | top-1, validation | parameters left |", "|---|---|---|---|---|---|"]
    for name in names:
        for strength in METHODS[name].strengths:
            rows = [row for row in rows_by.get(name, []) if row["strength"] == strength]
            if rows:
                lines.append(
                    f"| {name} | {strength:g} | {rows[0]['weight_decay']:g} | {mean_and_error([row['neurons'] for row in rows], 1)} | {mean_and_error([row['val_top1'] for row in rows])} "
                    f"| {mean_and_error([row['parameters'] for row in rows], 0)} |"
                )
    return lines


def on_front(rows: Rows, left: float) -> float | None:
    """Accuracy of a front where so many neurons are left, on straight lines between its points; None beyond its ends."""
    points = points_of(rows, "val")
    kept = sorted((points[i][1], points[i][0]) for i in front(points))
    for (a, low), (b, high) in itertools.pairwise(kept):
        if a <= left <= b:
            return low + (high - low) * (left - a) / (b - a) if b > a else max(low, high)
    best = max(kept)
    return best[1] if left >= best[0] else None  # with more neurons than the best point has, that point can be taken


def means_of(rows: Rows) -> Rows:
    """A row for each method at each strength, the mean of its seeds."""
    found: dict[tuple[str, float], Rows] = defaultdict(list)
    for row in rows:
        found[row["method"], row["strength"]].append(row)
    return [{key: statistics.mean(row[key] for row in its) for key in ("val_top1", "neurons")} for its in found.values()]


def budgets(rows_by: dict[str, Rows]) -> list[str]:
    """Each budget against the front of fixed betas, both with their best weight decay: the mean of its seeds against the front of their means, which decides, and
    each seed against its own front. The latter is too high by what luck gave its points, as a front is of the best. The first one's error is the
    jackknife's over seeds."""
    fixed = by_seed(line_of(as_tuned(rows_by), TUNED) if rows_by.get(TUNED) else rows_by["default"] + rows_by.get("between", []) + rows_by["none"])
    lines = [
        "| may be left, % | weight decay | left, % | off by, at most | top-1, validation | less the front of the means | the same, of seeds that nothing was chosen on | less the front of the same seed | missed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for strength in METHODS["target"].strengths:
        rows = [row for row in rows_by["target"] if row["strength"] == strength and row["seed"] in fixed]
        if not rows:
            continue
        at = [(row["val_top1"], on_front(fixed[row["seed"]], 100 - row["neurons"])) for row in rows]
        differences = [top1 - of_front for top1, of_front in at if of_front is not None]
        off = max(abs(100 - row["neurons"] - strength) for row in rows)
        missed = ["size"] * (off > WITHIN) + ["accuracy"] * (above_front(rows, fixed) < -BELOW)
        lines.append(
            f"| {strength:g} | {rows[0]['weight_decay']:g} | {mean_and_error([100 - row['neurons'] for row in rows], 1)} | {off:.1f} | {mean_and_error([row['val_top1'] for row in rows])} "
            f"| {with_jackknife(rows, fixed)} | {with_jackknife([row for row in rows if row['seed'] not in CHOSEN_ON], fixed)} | {of_seeds(differences, rows, 2)} | {' and '.join(missed)} |"
        )
    return lines


def with_jackknife(rows: Rows, fixed: dict[int, Rows]) -> str:
    """`above_front` with its error."""
    if not rows:
        return "-"
    difference, error = above_front(rows, fixed), jackknife_error([above_front([row for row in rows if row is not out], fixed) for out in rows])
    return "no front there" if math.isnan(difference) else f"{difference:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def above_front(rows: Rows, fixed: dict[int, Rows]) -> float:
    """The mean of rows of one strength, less the front of the means of their seeds; nan where there is none."""
    if not rows:
        return math.nan
    (mean,) = means_of(rows)
    there = on_front(means_of([each for row in rows for each in fixed[row["seed"]]]), 100 - mean["neurons"])
    return math.nan if there is None else mean["val_top1"] - there


def jackknife_error(without_one: Sequence[float]) -> float:
    """Standard error of what is no mean, from its values with one seed left out at a time (Tukey 1958)."""
    if len(without_one) < 2:
        return math.nan
    return math.sqrt((len(without_one) - 1) * statistics.pvariance(without_one))


def from_dense(rows_by: dict[str, Rows]) -> list[str]:
    """Starts from pretrained weights: what they keep on the way and at the end."""
    dense = {row["seed"]: row["val_top1"] for row in rows_by["none"]}
    rows_by = {"init": [row for row in rows_by["init"] if row["seed"] in dense]}
    lines = ["| strength | neurons gone, % | top-1 at the end, less the dense network's | lowest after any epoch, less it |", "|---|---|---|---|"]
    for strength in METHODS["init"].strengths:
        rows = [row for row in rows_by["init"] if row["strength"] == strength]
        if rows:
            lines.append(
                f"| {strength:g} | {mean_and_error([row['neurons'] for row in rows], 1)} "
                f"| {mean_and_error([row['val_top1'] - dense[row['seed']] for row in rows])} "
                f"| {mean_and_error([min(row['course']) - row['start'] for row in rows])} |"
            )
    return lines


def sensitivity(rows: Rows) -> list[str]:
    top1, gone = [row["val_top1"] for row in rows], [row["neurons"] for row in rows]
    return [
        f"{len(rows)} pairs: validation top-1 {statistics.mean(top1):.2f}, standard deviation {statistics.stdev(top1):.2f} ({min(top1):.2f} to {max(top1):.2f}); "
        f"neurons gone {statistics.mean(gone):.1f} %, standard deviation {statistics.stdev(gone):.1f} ({min(gone):.1f} to {max(gone):.1f})."
    ]


def draw(rows_by: dict[str, Rows], path: Path, names: Sequence[str], *, bold: str = "default") -> None:
    """Accuracy over neurons left: every training a dot, the front of the means over seeds a line."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "dist_gsl"
    figure, axis = plt.subplots(figsize=(8, 5.5))
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    names = [name for name in names if rows_by.get(name)]
    for number, name in enumerate(names):
        points = points_of(rows_by[name], "val")
        means = points_of(means_of(rows_by[name]), "val")
        colour = "black" if name == bold else colours[number % 20]
        axis.scatter([p[1] for p in points], [p[0] for p in points], s=14, color=colour, alpha=0.5)
        kept = sorted(front(means), key=lambda i: means[i][1])
        axis.plot([means[i][1] for i in kept], [means[i][0] for i in kept], label=name, color=colour, linewidth=2.5 if name == bold else 1.2)
    dense = statistics.mean(row["val_top1"] for row in rows_by["none"])
    axis.axhline(dense, color="grey", linestyle=":", linewidth=1, label="no penalty")
    if rows_by.get("tuned-decay"):
        best = statistics.mean(row["val_top1"] for row in rows_by["tuned-decay"])
        axis.axhline(best, color="grey", linestyle="--", linewidth=1, label="no penalty, best weight decay")
    shown = [row["val_top1"] for name in names for row in rows_by[name]]
    axis.set_ylim(max(min(shown) - 1, dense - 15), max(shown) + 1)
    axis.set_xlim(0, 101)
    axis.set_xlabel("neurons left, %")
    axis.set_ylabel("validation top-1, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def filled(text: str, parts: dict[str, list[str]]) -> str:
    """The page with its parts written anew. `ValueError` for one that it has no place for."""
    for name, lines in parts.items():
        place = re.search(rf"<!-- {re.escape(name)} -->\n.*?<!-- end -->", text, re.DOTALL)
        if place is None:
            raise ValueError(f"the page has no place for {name!r}: a line <!-- {name} -->, and <!-- end --> after it")
        text = text[: place.start()] + "\n".join([f"<!-- {name} -->", *lines, "<!-- end -->"]) + text[place.end() :]
    return text


def parts_of(rows_by: dict[str, Rows], failed: Rows) -> dict[str, list[str]]:
    compared = of_rivals_seeds(rows_by)
    seeds, more = (", ".join(str(seed) for seed in sorted(by_seed(found["none"]))) for found in (compared, rows_by))
    more = "" if more == seeds else f" (of fixed betas and budgets {more})"
    lost = "".join(f" Failed: {row['method']} {row['strength']:g}, seed {row['seed']} ({row['error']})." for row in failed)
    hours = sum(row["seconds"] for rows in rows_by.values() for row in rows) / 3600
    found = {
        "date": [f"{date.today()}; seeds {seeds}{more}; {sum(map(len, rows_by.values()))} trainings, {hours:.1f} hours of one core.{lost}"],
        "rivals": [*table(as_tuned(compared), (OWN, RIVAL, CONTROL), reference=TUNED if rows_by.get(TUNED) else "default"), "", *single_networks(compared)],
        "parts": table(compared, (OWN, PART), strengths=FOR_PARTS),
        "strengths": per_strength(compared, [name for name, method in METHODS.items() if method.kind in (OWN, PART, RIVAL, CONTROL)]),
    }  # fmt: skip
    for name, made in (("target", budgets), ("init", from_dense)):
        if rows_by.get(name):
            found[name] = made(rows_by)
    if len(rows_by.get("sensitivity", [])) > 1:
        found["sensitivity"] = sensitivity(rows_by["sensitivity"])
    return found


def told_in(folder: Path) -> tuple[dict[str, Rows], Rows]:
    """(rows of each method, of the strengths that it still has; those of trainings that failed)."""
    rows_by: dict[str, Rows] = defaultdict(list)
    failed: Rows = []
    for row in rows_of(folder):
        if row["method"] in METHODS and row["strength"] in METHODS[row["method"]].strengths:
            (failed if "error" in row else rows_by[row["method"]]).append(row)
    return rows_by, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    try:
        rows_by, failed = told_in(options.folder)
    except ValueError as error:
        print(f"page: {error}", file=sys.stderr)
        return 2
    lacking = [name for name in ("none", "default") if not rows_by[name]]
    if lacking:
        print(f"page: {options.folder} has no rows of {lacking[0]!r}; run benchmarks/learning/run.py {options.folder} first", file=sys.stderr)
        return 2
    try:
        text = filled(options.page.read_text(), parts_of(rows_by, failed))
    except (OSError, ValueError) as error:
        print(f"page: {options.page}: {error}", file=sys.stderr)
        return 2
    options.page.write_text(text)
    beside = options.page.with_suffix("")
    kinds = {kind: [name for name, method in METHODS.items() if method.kind in (kind, OWN) and name != "none"] for kind in (PART, RIVAL)}
    compared = of_rivals_seeds(rows_by)
    draw(as_tuned(compared), beside.with_name(f"{beside.name}-rivals.svg"), [*kinds[RIVAL], "scratch", "max-pool-2d"], bold=TUNED if rows_by.get(TUNED) else "default")
    draw(compared, beside.with_name(f"{beside.name}-parts.svg"), [name for name in kinds[PART] if name != TUNED])
    draw(as_tuned(rows_by), beside.with_name(f"{beside.name}-use.svg"), ["default", TUNED, "between", "target", "init", "sensitivity"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
