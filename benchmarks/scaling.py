"""Two workers on two cores against one on one, the same batch a worker: how much more they train.

    torchrun --nproc-per-node 2 --standalone benchmarks/scaling.py [--networks dec3 resnet18]

In turns in one run, all train a step together, or the first alone while the others wait: how many times the images a
second. A worker computes with one thread. Gradients go over gloo, the proximal step runs within backward, the penalty so weak that nothing dies.

"Apart" is the machine's own limit: all train at the same time, each on its own and reducing nothing with others, so that what is lost is lost to cores
that share memory, caches and clock.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.pairs import AT_LEAST, ratio_of, timed
from benchmarks.step import NETWORKS, step_of
from dist_gsl import create_model
from dist_gsl.training.state import buffers_matter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--pairs", type=int, default=AT_LEAST)
    parser.add_argument("--pin", action="store_true", help="all threads of a worker, gloo's too, on a core of its own")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, workers = dist.get_rank(), dist.get_world_size()
    if len(os.sched_getaffinity(0)) < workers:
        raise SystemExit(f"scaling: {workers} workers need a core each, there are {len(os.sched_getaffinity(0))}")
    if options.pin:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    alone = [dist.new_group([each]) for each in range(workers)][rank]
    if rank == 0:
        print(
            f"| network | a worker's batch | images a second, {workers} workers over 1 | apart over 1 | together over apart | step of one, ms | of all, ms |\n"
            "|---|---|---|---|---|---|---|"
        )
    for name in options.networks:
        arguments, shape, classes = NETWORKS[name]
        torch.manual_seed(0)
        model = create_model(name, num_classes=classes, **arguments)
        batch = torch.randn(shape), torch.randint(classes, shape[:1])
        together = step_of(model, batch, bucket_mb=25.0, how="within", alpha=0.0)
        apart = step_of(model, batch, bucket_mb=25.0, how="within", alpha=0.0, group=alone)
        together.ddp.broadcast_buffers = apart.ddp.broadcast_buffers = buffers_matter(model)  # as in a training
        ways: dict[str, Callable[[], object]] = {"one": apart if rank == 0 else lambda: None, "apart": apart, "together": together}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        order = random.Random(0)
        for number in range(options.pairs + 3):
            for way in order.sample(sorted(ways), len(ways)):
                taken = timed(ways[way], dist.barrier)
                if number >= 3:
                    seconds[way].append(taken)
        if rank == 0:
            one = [workers * each for each in seconds["one"]]
            found = ratio_of(one, seconds["together"])
            print(
                f"| {name} | {shape[0]} | {found} | {ratio_of(one, seconds['apart'])} | {ratio_of(seconds['apart'], seconds['together'])} "
                f"| {1e3 * found.seconds / workers:.1f} | {1e3 * found.other_seconds:.1f} |",
                flush=True,
            )
    if rank == 0:
        print(f"{options.pairs} pairs, torch {torch.__version__}; command: torchrun --nproc-per-node {workers} --standalone {' '.join(sys.argv)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
