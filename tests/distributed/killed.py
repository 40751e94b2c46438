"""Trainings in processes of their own that are killed on the way: what `test_killed` starts."""

import multiprocessing
import os
import signal
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from dist_gsl import recipes
from dist_gsl.config import RunConfig
from dist_gsl.penalty import PerLayer, Schedule

PROCESSES = multiprocessing.get_context("forkserver")
# What a training would import, some of it late.
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "dist_gsl.training.session", "dist_gsl.data._ffcv"])
TIMEOUT_S = 120


def config(**train: Any) -> RunConfig:
    """Digits, three epochs of 16 steps, neurons removed on the way."""
    digits = recipes.find("digits")
    return replace(
        digits,
        network=replace(digits.network, width=1 / 16),
        penalty=replace(digits.penalty, beta=PerLayer(rest=0.8), beta_schedule=Schedule(start=0.5, end=3.0)),
        train=replace(
            digits.train, epochs=3, batch_size=64, shrink="3", checkpoint_steps=5, checkpoint_minutes=None, ema=0.9,
            **train,
        ),
    )  # fmt: skip


def train(config: RunConfig, data_dir: Path, folder: Path, *, num_processes: int, kill: tuple[int, int] | None = None) -> list[int | None]:
    """Trains on so many processes from the folder's last checkpoint; kill: (rank, step over the whole run) before which SIGKILL comes.
    The exit codes."""
    rendezvous = folder.with_name(f".{folder.name}-{os.urandom(4).hex()}")
    processes = [
        PROCESSES.Process(
            target=_train, args=(rank, num_processes, str(rendezvous), config.to_dict(), str(data_dir), str(folder), kill and (kill[1] if kill[0] == rank else None))
        )
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _train(rank: int, num_processes: int, rendezvous: str, values: dict[str, Any], data_dir: str, folder: str, kill_at: int | None) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import warnings

    import torch
    import torch.distributed as dist

    from dist_gsl.training import loop, session
    from dist_gsl.training.checkpoint import Checkpoints

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_processes, timeout=timedelta(seconds=30))
    step = loop.train_step

    def killed(state: Any, train: Any, batch: Any) -> Any:
        if kill_at is not None and state.position.epoch * 16 + state.position.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(state, train, batch)

    loop.train_step = killed  # type: ignore[assignment]
    session.run(
        RunConfig.from_dict(values), data_dir=Path(data_dir), device=torch.device("cpu"), place=session.Place(Checkpoints(folder)),
    )  # fmt: skip
    os._exit(0)
