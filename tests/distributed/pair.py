"""Two processes that stay up and run one case after another, because starting them takes longer than any case."""

import importlib
import multiprocessing
import os
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WORLD_SIZE = 2
TIMEOUT_S = 120


class Pair:
    """`run(case, **options)` calls a function of `tests.distributed.cases` on both ranks and gives both results."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_starts = 0
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, case: str, **options: object) -> list[Any]:
        if not self._workers:
            self._start()
        for _, connection in self._workers:
            connection.send((case, options))
        results = []
        for rank, (_, connection) in enumerate(self._workers):
            done, result = connection.recv() if connection.poll(TIMEOUT_S) else (False, "no answer in time")
            if not done:  # the other rank may wait for this one: start both anew for the next case
                self.stop()
                raise AssertionError(f"rank {rank} of {case}({options}):\n{result}")
            results.append(result)
        return results

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._num_starts += 1
        rendezvous = self._folder / f"rendezvous{self._num_starts}"
        for rank in range(WORLD_SIZE):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, rendezvous, there), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))

    def stop(self) -> None:
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers = []


def serve(rank: int, rendezvous: Path, connection: Connection) -> None:
    """What a worker process runs until the connection closes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60)
    )
    cases = importlib.import_module("tests.distributed.cases")
    while True:
        try:
            case, options = connection.recv()
        except EOFError:
            break
        try:
            connection.send((True, getattr(cases, case)(rank, **options)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()
