"""Does group sparsity learn the right number of neurons? One harness for controls and rivals at equal epochs.

    python benchmarks/learning/run.py FOLDER [--setting small] [--seeds 0 1 2] [--only default magnitude] [--processes 2]
    python benchmarks/learning/page.py FOLDER docs/learning.md

Rendered characters, Dec3; every method starts from the same network with the same seed, sees the same batches in the same order for the same epochs,
and ends with a network whose dead neurons are removed. Each is run at several strengths, so that each has a front of accuracy over neurons
left. Accuracy is that of the validation split; the test split is read once for each network that is done, and nothing is chosen by it. What is
done already is not run again: a row of FOLDER/rows.jsonl for each training.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in each process
sys.path.insert(0, str(Path(__file__).absolute().parent.parent.parent))

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.learning.methods import METHODS, rows_of
from benchmarks.learning.setting import SETTINGS, images_of, top1
from dist_gsl import heap, launch

ROOT = Path(__file__).absolute().parent.parent.parent


class Task(NamedTuple):
    """One training."""

    method: str
    seed: int
    strength: float


def work(setting_name: str, folder: Path, task: Task) -> dict[str, Any]:
    """One row, by a process of one thread. A training that fails is a row that says so: a loss that is not finite is a result too."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    heap.keep_freed()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gc.collect()
    gc.freeze()  # as in a run: no removal of neurons looks through what is here, which took a quarter of a second
    setting, method = SETTINGS[setting_name], METHODS[task.method]
    began = time.perf_counter()
    row = {**task._asdict(), "setting": setting_name, "weight_decay": method.setting(setting, task.strength).weight_decay}
    try:
        outcome = method.trained(setting, task.seed, task.strength, folder)
    except (RuntimeError, ValueError) as error:
        return {**row, "error": str(error).splitlines()[0]}
    seconds = time.perf_counter() - began
    return {
        **row, "neurons": outcome.neurons, "val_top1": top1(outcome.model, setting, "val"), "test_top1": top1(outcome.model, setting, "test"),
        "parameters": outcome.parameters, "zero_parameters": outcome.zero_parameters, "widths": outcome.widths, "seconds": seconds, **outcome.extra,
    }  # fmt: skip


def done_in(folder: Path) -> set[Task]:
    return {Task(row["method"], row["seed"], row["strength"]) for row in rows_of(folder)}


def needed(task: Task) -> Task | None:
    """What it goes on from."""
    return {"scratch": Task("default", task.seed, task.strength), "init": Task("none", task.seed, 0.0)}.get(task.method)


def tasks_of(names: Sequence[str], seeds: Sequence[int], *, done: Collection[Task]) -> list[list[Task]]:
    """Those that wait for nothing, and those that go on from what they leave."""
    stages: list[list[Task]] = [[], []]
    for name in names:
        method = METHODS[name]
        tasks = (Task(name, seed, strength) for strength in method.strengths for seed in (seeds[:1] if method.one_seed else seeds))
        stages[method.comes_later] += [task for task in tasks if task not in done]
    return stages


def by_processes(pool: ProcessPoolExecutor, tasks: Sequence[Task], setting: str, folder: Path) -> Iterator[dict[str, Any]]:
    for finished in as_completed([pool.submit(work, setting, folder, task) for task in tasks]):
        yield finished.result()


def by_ray(tasks: Sequence[Task], setting: str, folder: Path) -> Iterator[dict[str, Any]]:
    """On a cluster, a GPU for each training where it has some. Its nodes see the folder, by the same path, and the written data."""
    import ray

    # A job's folder is on the path of all its workers.
    if not ray.is_initialized():
        ray.init(log_to_driver=False, runtime_env=None if launch.is_job() else {"env_vars": {"PYTHONPATH": str(ROOT)}})
    num_gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    remote = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=3)(work)
    waiting = [remote.remote(setting, folder, task) for task in tasks]
    while waiting:
        (finished,), waiting = ray.wait(waiting)
        yield ray.get(finished)


def keep(rows: Iterator[dict[str, Any]], folder: Path, *, total: int) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress, (folder / "rows.jsonl").open("a") as file:
        bar = progress.add_task("trainings", total=total)
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress.advance(bar)
            came_to = row.get("error") or f"{row['neurons']:.1f} % gone, top-1 {row['val_top1']:.2f}, {row['seconds']:.0f} s"
            progress.console.print(f"{row['method']} {row['strength']:g}, seed {row['seed']}: {came_to}", highlight=False)


def reason_against(options: argparse.Namespace) -> str | None:
    """Why this cannot be run, before anything is written."""
    folder = options.folder
    if launch.is_job() and not folder.is_absolute():
        return f"{folder} would lie in the job's own copy of the code, which is deleted: name an absolute path that all nodes see"
    others = {row["setting"] for row in rows_of(folder)} - {options.setting}
    if others:
        return f"{folder} holds trainings of the setting {others.pop()!r}: name another folder"
    done = done_in(folder)
    first, later = tasks_of(options.only, options.seeds, done=done)
    for task in later:
        need = needed(task)
        if need is not None and need not in {*first, *done}:
            return f"{task.method} goes on from what {need.method} leaves in {folder}: add it to --only"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--setting", choices=list(SETTINGS), default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), help="these methods alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="trainings at once, of one thread each")
    parser.add_argument("--ray", action="store_true", help="on a Ray cluster instead, whose nodes all see FOLDER")
    options = parser.parse_args()
    try:
        refused = reason_against(options)
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        parser.exit(2, f"run: error: {refused}\n")
    options.folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):  # written once, before the processes look for it
        images_of(SETTINGS[options.setting], split)
    folder = options.folder.absolute()
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:  # whose processes begin with the first task
        for stage in (0, 1):
            tasks = tasks_of(options.only, options.seeds, done=done_in(folder))[stage]
            if tasks:
                rows = by_ray(tasks, options.setting, folder) if options.ray else by_processes(pool, tasks, options.setting, folder)
                keep(rows, folder, total=len(tasks))


if __name__ == "__main__":
    main()
