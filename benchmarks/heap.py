"""A training step of a process that keeps the memory it frees (`dist_gsl/heap.py`), against one with glibc's heap as it comes.

    python benchmarks/heap.py [--networks dec3 resnet18] [--batches 8 32]

Each is a process of its own that trains a network of this library on random images, momentum on, one thread, channels_last; they step in turns in one
run (`pairs.py`), the other one waiting; in a thread, as Ray Train does, and the one that keeps memory with one heap for all threads, as in a Ray of our own. Faults are pages that the system gave to the process, in a step; the peak is the process's largest memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import statistics
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.pairs import AT_LEAST, ratio_of
from dist_gsl import heap

WARMUP = 5


def work(pipe: Connection, name: str, batch_size: int, keeps: bool) -> None:
    """A step for whatever comes through the pipe, which gets its seconds, faults and the peak in KiB."""
    import torch
    import torch.nn.functional as F

    from benchmarks.step import NETWORKS, RECIPE
    from dist_gsl import create_model

    torch.set_num_threads(1)
    if keeps and not heap.keep_freed():
        raise SystemExit("heap: nothing can be kept here: another C library, or its variables are set")
    arguments, (_, *image), classes = NETWORKS[name]
    model = create_model(name, num_classes=classes, **arguments).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), **RECIPE)
    images, targets = torch.randn(batch_size, *image).to(memory_format=torch.channels_last), torch.randint(classes, (batch_size,))

    def steps() -> None:
        while pipe.recv():
            before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(model(images), targets).backward()
            optimizer.step()
            seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
            pipe.send((seconds, after.ru_minflt - before, after.ru_maxrss))

    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()


def compared(name: str, batch_size: int, pairs: int) -> None:
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for keeps in (True, False):
        pipes[keeps], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(theirs, name, batch_size, keeps)))
        with mock.patch.dict(os.environ, heap.LOCAL if keeps else {}):
            processes[-1].start()
        theirs.close()
    steps: dict[bool, list[tuple[float, int, int]]] = {True: [], False: []}
    order = random.Random(0)
    for _ in range(WARMUP + pairs):
        for keeps in order.sample((True, False), 2):
            pipes[keeps].send(True)
            steps[keeps].append(pipes[keeps].recv())
    for keeps, process in zip(pipes, processes, strict=True):
        pipes[keeps].send(False)
        process.join()
    kept, as_it_comes = (steps[keeps][WARMUP:] for keeps in (True, False))
    ratio = ratio_of([seconds for seconds, *_ in kept], [seconds for seconds, *_ in as_it_comes])
    faults = [round(statistics.mean(number for _, number, _ in of)) for of in (kept, as_it_comes)]
    peaks = [of[-1][2] / 1024 for of in (kept, as_it_comes)]
    print(f"| {name}, {batch_size} | **{ratio}** | {1e3 * ratio.other_seconds:.1f} | {faults[0]:,} | {faults[1]:,} | {peaks[0]:.0f} over {peaks[1]:.0f} MiB, "
          f"{peaks[0] / peaks[1]:.3f} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["dec3", "resnet18"])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--pairs", type=int, default=AT_LEAST)
    options = parser.parse_args()
    print("| network, batch | step, kept over as it comes | as it comes, ms | faults, kept | as it comes | peak |\n|---|---|---|---|---|---|")
    for name in options.networks:
        for batch_size in options.batches:
            compared(name, batch_size, options.pairs)
    print(f"{options.pairs} pairs; command: {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
