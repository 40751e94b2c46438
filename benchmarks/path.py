"""The whole front from one path, against trials that are trained one by one: hypervolume and seconds.

    python benchmarks/path.py FOLDER [--seeds 0 1 2] [--points 10]

The demo's characters and recipe (`dec3-chars`), strengths of penalty.beta.rest along the range of `tune_spaces/chars.py`, the same ones in both.
"trials": each strength and the dense network is a training of its own with the recipe's schedules, dead neurons removed on the way as in
the path. "path": `dist-gsl tune chars --path` without Ray, the same epochs for its dense network. One process of one thread each, two side
by side; start-up of Ray, half a minute a trial, is left out, which favours the trials. Seconds are the processor's, of all threads, so that
other work on the machine does not count; those on the clock stand beside. Hypervolume of (validation top-1, percent of neurons alive) against
a fixed reference point. What is done already is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

REFERENCE = (60.0, 100.0)
"""Top-1 of 60 %, all neurons alive: any trial worth its name dominates it."""


def config_of(seed: int, data_dir: Path | None = None) -> Any:
    from dist_gsl.recipes import find

    config = find("dec3-chars")
    return replace(
        config, data=replace(config.data, dir=None if data_dir is None else str(data_dir)), workers=replace(config.workers, num=1),
        train=replace(config.train, seed=seed, shrink="epoch", checkpoint_minutes=None),
    )  # fmt: skip


def strengths(options: argparse.Namespace) -> list[float]:
    from dist_gsl.training import path

    found: list[float] = path.strengths(config_of(0).penalty, options.strong, options.weak, options.points)
    return found


def prepare() -> None:
    import warnings

    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def write(file: Path, found: dict[str, Any]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=1))
    os.replace(temporary, file)


def point_of(record: dict[str, Any]) -> tuple[float, float]:
    return record["val_top1"], 100.0 - record["all_neurons"]


class Watch:
    """Seconds since it was asked last: of the processor, over all threads of this process, and on the clock."""

    def __init__(self) -> None:
        self.last = time.process_time(), time.perf_counter()

    def add_to(self, found: dict[str, Any]) -> None:
        now = time.process_time(), time.perf_counter()
        for key, a, b in zip(("seconds", "clock"), self.last, now, strict=True):
            found[key].append(b - a)
        self.last = now


def trials(seed: int, data_dir: Path, file: Path, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from dist_gsl.training import session
    from dist_gsl.training.path import at_strength

    prepare()
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"points": [], "seconds": [], "clock": [], "epochs": 0}
    config = config_of(seed, data_dir)
    values = [None, *strengths(options)]
    for value in values[len(found["points"]) :]:
        watch = Watch()
        penalty = config.penalty.without() if value is None else at_strength(config.penalty, value)
        state = session.run(replace(config, penalty=penalty), data_dir=data_dir, device=torch.device("cpu"), place=session.Place())
        state.optimizer.detach()
        found["points"].append(point_of(state.history[-1]))
        watch.add_to(found)
        found["epochs"] += config.train.epochs
        write(file, found)
        print(f"trial, seed {seed}, E {value}: top-1 {found['points'][-1][0]:.2f}, alive {found['points'][-1][1]:.1f} %, "
              f"{found['seconds'][-1]:.0f} s", flush=True)  # fmt: skip
    return found


def path(seed: int, data_dir: Path, file: Path, options: argparse.Namespace) -> dict[str, Any]:
    import tempfile

    import torch

    from dist_gsl.training import path
    from dist_gsl.training.checkpoint import Checkpoints
    from dist_gsl.training.session import Place

    if file.exists():
        done: dict[str, Any] = json.loads(file.read_text())
        return done
    prepare()
    config, values = config_of(seed, data_dir), strengths(options)
    parts = path.PathConfig(options.step_epochs, options.finish_epochs)
    found: dict[str, Any] = {"points": [], "seconds": [], "clock": [], "epochs": parts.num_epochs(config.train, len(values))}
    watch = Watch()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def branch(number: int) -> Checkpoints:
            return Checkpoints(folder / str(number))

        def trained(number: int) -> None:
            last = branch(number).last()
            assert last is not None
            found["points"].append(point_of(last[1]["history"][-1]))
            watch.add_to(found)
            print(f"path, seed {seed}, E {values[number - 1] if number else None}: top-1 {found['points'][-1][0]:.2f}, "
                  f"alive {found['points'][-1][1]:.1f} %, {found['seconds'][-1]:.0f} s", flush=True)  # fmt: skip

        path.follow(
            config, parts, values, data_dir=data_dir, device=torch.device("cpu"), trunk=Checkpoints(folder / "path"), branches=branch,
            place=Place(), report=path.Report(trained=trained),
        )  # fmt: skip
    write(file, found)
    return found


METHODS = {"path": path, "trials": trials}


def main() -> None:
    from dist_gsl.training.path import PathConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the points are written down")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--points", type=int, default=10, help="strengths, besides the dense network")
    parser.add_argument("--weak", type=float, default=4.0, help="penalty.beta.rest in epochs")
    parser.add_argument("--strong", type=float, default=0.4)
    parser.add_argument("--step-epochs", type=int, default=PathConfig.step_epochs)
    parser.add_argument("--finish-epochs", type=int, default=PathConfig.finish_epochs)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    options = parser.parse_args()
    from dist_gsl import data
    from dist_gsl.pareto import hypervolume

    options.folder.mkdir(parents=True, exist_ok=True)
    data_dir = data.prepare(config_of(0).data).absolute()
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(method, seed) for seed in options.seeds for method in options.methods]
    with ProcessPoolExecutor(2) as pool:
        waiting = [pool.submit(METHODS[method], seed, data_dir, options.folder / f"{method}-seed{seed}.json", options) for method, seed in jobs]
        found = {job: entry.result() for job, entry in zip(jobs, waiting, strict=True)}
    print("\n| seed | method | hypervolume | seconds | on the clock | epochs | best top-1 | fewest neurons alive at 85 % or more |\n|---|---|---|---|---|---|---|---|")
    volumes: dict[str, list[float]] = {method: [] for method in options.methods}
    times: dict[str, list[float]] = {method: [] for method in options.methods}
    for method, seed in jobs:
        points = [tuple(point) for point in found[method, seed]["points"]]
        volumes[method].append(hypervolume(points, reference=REFERENCE))
        times[method].append(sum(found[method, seed]["seconds"]))
        fewest = min((alive for top1, alive in points if top1 >= 85), default=math.nan)
        print(f"| {seed} | {method} | {volumes[method][-1]:.0f} | {times[method][-1]:.0f} | {sum(found[method, seed]['clock']):.0f} | "
              f"{found[method, seed]['epochs']} | {max(top1 for top1, _ in points):.2f} | {fewest:.1f} % |")  # fmt: skip
    if len(options.methods) == 2:
        for name, of in (("hypervolume", volumes), ("seconds", times)):
            ratios = [a / b for a, b in zip(of["path"], of["trials"], strict=True)]
            error = f" ± {statistics.stdev(ratios) / math.sqrt(len(ratios)):.3f}" if len(ratios) > 1 else ""
            print(f"{name}, path over trials: {statistics.mean(ratios):.3f}{error}")
    print("command: " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
