"""Does group sparsity learn the right number of neurons? One harness for controls and rivals at equal epochs.

    python benchmarks/learning/run.py FOLDER [--setting small] [--seeds 0 1 2] [--only default magnitude] [--processes 2]
    python benchmarks/learning/page.py FOLDER docs/learning

Rendered characters, Dec3; every method starts from the same network with the same seed, sees the same batches in the same order for the same epochs,
and ends with a network whose dead neurons are removed. Each is run at several strengths, so that each has a front of accuracy over neurons
left. Accuracy is that of the validation split; the test split is read once for each network that is done, and nothing is chosen by it. What is
done already is not run again: a row of FOLDER/rows.jsonl for each training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

STRENGTHS = (5.0, 3.0, 2.2, 1.7, 1.3)
"""Epochs of the demo (16) after which an unsupported neuron is gone; scaled to the setting's."""
SHARES = (0.25, 0.45, 0.6, 0.7, 0.8)
"""Of the neurons, that methods which are told how many cut."""
TARGETS = (95, 90, 80, 70, 60, 50, 40, 30, 20, 10)
"""Percent of the neurons that may be left."""
PAIRS = 20
"""Pairs of beta over a factor of ten, as in the paper's measurement of its sensitivity."""


class Task(NamedTuple):
    """One training."""

    method: str
    strength: float
    seed: int
    detail: str = ""
    """What else it depends on."""

    @property
    def key(self) -> str:
        return f"{self.method}|{self.strength:g}|{self.seed}|{self.detail}"


class Method(NamedTuple):
    title: str
    strengths: Sequence[float]
    run: Callable[..., Any]
    """(setting, seed, strength) -> Outcome."""
    is_rival: bool = True
    """Else one of this project's own, or a control."""


def methods() -> dict[str, Method]:
    from functools import partial

    from benchmarks.learning import ours, rivals

    def trained(penalty: Callable[..., Any]) -> Callable[..., Any]:
        return partial(_trained, penalty=penalty)

    own = {
        "default": ("this project's default", ours.default), "sgl": ("its sparse group lasso, alpha 0.5", ours.sgl),
        "paper-gs": ("the paper's group sparsity: at each epoch's end, revivable", ours.paper_gs),
        "paper-sgl": ("the paper's sparse group lasso", ours.paper_sgl),
        "revive": ("without: dead is dead", ours.may_come_back), "to-the-end": ("without: a last phase that is free", ours.to_the_end),
        "each-epoch": ("without: the operator in every step", ours.each_epoch), "no-root": ("without: the root of P_l", ours.without_root),
        "first-weaker": ("with: half the strength in the first layer", ours.first_weaker),
    }  # fmt: skip
    found = {name: Method(title, STRENGTHS, trained(penalty), is_rival=False) for name, (title, penalty) in own.items()}
    found["none"] = Method("no penalty", (0.0,), rivals.no_penalty, is_rival=False)
    found["narrower"] = Method("every layer cut alike, from the start", SHARES, rivals.narrower)
    found["scratch"] = Method("the default's widths, trained from scratch", STRENGTHS, rivals.from_scratch, is_rival=False)
    found["max-pool-2d"] = Method("Dec3's counterpart with 2D filters", (0.0,), rivals.max_pool_2d, is_rival=False)
    found["l2"] = Method("weight decay and a threshold", (5e-4, 2e-3, 8e-3, 3e-2), rivals.l2)
    found["l1"] = Method("L1 and a threshold", (1e-5, 1e-4, 3e-4, 1e-3, 3e-3), rivals.l1)
    found["gradient-gl"] = Method("group lasso by gradients and a threshold", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), rivals.gradient_group_lasso)
    found["magnitude"] = Method("filters of small magnitude cut, fine-tuned", SHARES, rivals.magnitude)
    found["slimming"] = Method("small BatchNorm scales cut, fine-tuned", SHARES, rivals.slimming)
    found["torch-pruning"] = Method("torch-pruning's GroupNormPruner, fine-tuned", SHARES, rivals.torch_pruning)
    found["rmda"] = Method("RMDA, the same penalty", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), rivals.rmda)
    found["target"] = Method("the default steered to a budget", TARGETS, _steered, is_rival=False)
    found["sensitivity"] = Method("the default at random pairs of beta", range(PAIRS), _drawn, is_rival=False)
    return found


def _scaled(setting: Any, strength: float) -> float:
    return strength * setting.epochs / 16


def _trained(setting: Any, seed: int, strength: float, *, penalty: Callable[..., Any]) -> Any:
    from benchmarks.learning import ours

    return ours.trained(setting, seed, penalty(setting, _scaled(setting, strength)))


def _steered(setting: Any, seed: int, strength: float) -> Any:
    from benchmarks.learning import ours

    return ours.trained(setting, seed, ours.default(setting, _scaled(setting, 1.15)), target=f"neurons={strength:g}%")


def _drawn(setting: Any, seed: int, strength: float) -> Any:
    """One of the pairs (first layer, rest), each drawn evenly in the logarithm over a factor of ten around the demo's."""
    import random
    from dataclasses import replace

    from benchmarks.learning import ours
    from dist_gsl.penalty import PerLayer

    draw = random.Random(int(strength))
    first, rest = (_scaled(setting, 1.15 * 10 ** draw.uniform(-0.5, 0.5)) for _ in range(2))
    penalty = replace(ours.default(setting, rest), beta=PerLayer(rest=rest, first=first, num_first=1))
    outcome = ours.trained(setting, seed, penalty)
    outcome.extra.update(first=first, rest=rest)
    return outcome


def work(setting_name: str, task: Task) -> dict[str, Any]:
    """One row, by a process of one thread."""
    import torch
    import torch.distributed as dist

    from benchmarks.learning import setting as settings
    from dist_gsl import heap

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    heap.keep_freed()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    setting = {"small": settings.SMALL, "large": settings.LARGE}[setting_name]
    began = time.perf_counter()
    what = json.loads(task.detail) if task.method == "scratch" else task.strength
    outcome = methods()[task.method].run(setting, task.seed, what)
    seconds = time.perf_counter() - began
    return {
        "method": task.method, "strength": task.strength, "seed": task.seed, "detail": task.detail, "neurons": outcome.neurons,
        "val_top1": settings.top1(outcome.model, setting, "val"), "test_top1": settings.top1(outcome.model, setting, "test"),
        "parameters": outcome.parameters, "zero_parameters": outcome.zero_parameters, "widths": outcome.widths, "seconds": seconds, **outcome.extra,
    }  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, Any]]:
    file = folder / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--setting", choices=["small", "large"], default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(methods()), help="these methods alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    options.folder.mkdir(parents=True, exist_ok=True)
    chosen = {name: method for name, method in methods().items() if not options.only or name in options.only}
    from benchmarks.learning import setting as settings

    for split in ("train", "val", "test"):  # written once, before the processes look for it
        settings.images_of({"small": settings.SMALL, "large": settings.LARGE}[options.setting], split)
    tasks = [
        Task(name, strength, seed) for name, method in chosen.items() if name != "scratch" for strength in method.strengths
        for seed in (options.seeds if name != "sensitivity" else options.seeds[:1])
    ]  # fmt: skip
    with ProcessPoolExecutor(options.processes) as pool:
        run_all(pool, tasks, options)
        if "scratch" in chosen:
            learned = [row for row in rows_of(options.folder) if row["method"] == "default"]
            run_all(pool, [Task("scratch", row["strength"], row["seed"], json.dumps(row["widths"])) for row in learned], options)


def run_all(pool: ProcessPoolExecutor, tasks: list[Task], options: argparse.Namespace) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done = {Task(row["method"], row["strength"], row["seed"], row["detail"]).key for row in rows_of(options.folder)}
    waiting = {pool.submit(work, options.setting, task): task for task in tasks if task.key not in done}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress, (options.folder / "rows.jsonl").open("a") as file:
        bar = progress.add_task("trainings", total=len(waiting))
        for finished in as_completed(waiting):
            row = finished.result()
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress.advance(bar)
            progress.console.print(
                f"{row['method']} {row['strength']:g}, seed {row['seed']}: {row['neurons']:.1f} % gone, top-1 {row['val_top1']:.2f}, "
                f"{row['seconds']:.0f} s", highlight=False,
            )  # fmt: skip


if __name__ == "__main__":
    main()
