"""Does Optuna's two-objective search find a better front than random search at equal total epochs?

Both search the space of `tune_spaces/chars.py` on a miniature of the demo: rendered characters, Dec3 at an eighth of its
width. Every trial is trained to its end by the same loop as ever, in one process each and without Ray, so that hundreds
of trials take minutes; two processes run side by side. The hypervolume of (validation top-1, percent of neurons alive)
is taken against a fixed reference point.

    .venv/bin/python benchmarks/search.py runs/search-benchmark --seeds 0 1 2 --trials 20

Trials that are done already are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

REFERENCE = (60.0, 100.0)
"""Top-1 of 60 %, all neurons alive: any trial worth its name dominates it."""


def base_config(data_dir: Path | None = None) -> Any:
    from dist_gsl.recipes import find

    config = find("dec3-chars")
    return replace(
        config, network=replace(config.network, width=0.125),
        data=replace(config.data, num_train=2000, num_val=2000, num_test=10, dir=None if data_dir is None else str(data_dir)),
        train=replace(config.train, epochs=8), workers=replace(config.workers, num=1),
    )  # fmt: skip


def space() -> Any:
    from dist_gsl.tuning import Choice, Float, When

    return {
        "penalty.beta.rest": Float(0.3, 4.0, log=True),
        "penalty.beta.num_first": Choice([0, 2, 4]),
        "penalty.beta.first": When("penalty.beta.num_first", [2, 4], Float(0.3, 8.0, log=True)),
        "penalty.alpha.rest": Choice([0.0, 0.25, 0.5]),
        "penalty.beta_schedule.start": Float(0.5, 2.5),
        "penalty.beta_schedule.end": Float(4.0, 7.0),
    }


def train(params: dict[str, Any], data_dir: Path) -> tuple[float, float]:
    """(top-1, percent of neurons alive) on validation after the last epoch."""
    import torch

    from dist_gsl.training import session
    from dist_gsl.tuning.space import applied

    config = applied(base_config(data_dir), params)
    state = session.run(config, data_dir=data_dir, device=torch.device("cpu"), place=session.Place())
    record = state.history[-1]
    return record["val_top1"], 100.0 - record["all_neurons"]


def search(searcher: str, seed: int, num_trials: int, data_dir: Path, folder: Path) -> list[tuple[float, float]]:
    """One search, trial after trial; its points. Each is written down as soon as it is known."""
    import warnings

    import torch
    import torch.distributed as dist

    from dist_gsl.training.watch import DivergedError
    from dist_gsl.tuning.searchers import Known, suggest

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    file = folder / f"{searcher}-seed{seed}.json"
    done = json.loads(file.read_text()) if file.exists() else []
    known = [Known(entry["params"], tuple(entry["point"])) for entry in done]
    for number in range(len(known), num_trials):
        params = suggest(space(), searcher=searcher, seed=seed, number=number, known=known)
        assert params is not None
        try:
            point = train(params, data_dir)
        except DivergedError:
            point = (0.0, 100.0)  # dominates nothing
        known.append(Known(params, point))
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps([{"params": k.params, "point": k.objectives} for k in known], indent=1))
        os.replace(temporary, file)
        print(f"{searcher} seed {seed} trial {number}: top-1 {point[0]:.2f}, alive {point[1]:.1f} %", flush=True)
    return [k.objectives for k in known if k.objectives is not None][:num_trials]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the trials are written down")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    from dist_gsl import data
    from dist_gsl.pareto import front, hypervolume

    options.folder.mkdir(parents=True, exist_ok=True)
    data_dir = data.prepare(base_config().data).absolute()
    jobs = [(searcher, seed) for seed in options.seeds for searcher in ("optuna", "random")]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(options.processes) as pool:
        waiting = [pool.submit(search, *job, options.trials, data_dir, options.folder) for job in jobs]
        found = {job: entry.result() for job, entry in zip(jobs, waiting, strict=True)}
    epochs = options.trials * base_config().train.epochs
    print(f"\nhypervolume against {REFERENCE}, {options.trials} trials = {epochs} epochs each\n")
    print("| seed | optuna | random | ratio | front of optuna | front of random |\n|---|---|---|---|---|---|")
    ratios = []
    for seed in options.seeds:
        points = {searcher: found[searcher, seed] for searcher in ("optuna", "random")}
        volume = {name: hypervolume(entry, reference=REFERENCE) for name, entry in points.items()}
        ratios.append(volume["optuna"] / volume["random"])
        print(f"| {seed} | {volume['optuna']:.1f} | {volume['random']:.1f} | {ratios[-1]:.3f} | "
              f"{len(front(points['optuna']))} | {len(front(points['random']))} |")  # fmt: skip
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else float("nan")
    print(f"\nratio optuna / random: {statistics.mean(ratios):.3f} ± {error:.3f}")
    print("command: " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
