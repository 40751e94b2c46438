"""Which samples are read in which step by which process. Plain functions of numbers, so they can be checked apart.

N samples, B the global batch size, W processes (world size).
"""

import numpy as np
from numpy.typing import NDArray


def epoch_order(num_samples: int, *, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """The order of an epoch, int64 (N,), alike in every process: a permutation drawn from (seed, epoch), or 0..N-1."""
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    return np.random.default_rng([seed, epoch]).permutation(num_samples).astype(np.int64)


def num_steps(num_samples: int, *, batch_size: int, drop_last: bool) -> int:
    """Global batches of an epoch: N // B, or with the partial one at the end."""
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)


def share(num_samples: int, *, rank: int, world_size: int) -> slice:
    """The contiguous part of a global batch that `rank` reads. Parts differ by at most one sample, larger first."""
    base, extra = divmod(num_samples, world_size)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))


def rank_batches(
    order: NDArray[np.int64], *, batch_size: int, rank: int, world_size: int, drop_last: bool, start_step: int = 0
) -> list[NDArray[np.int64]]:
    """The positions that `rank` reads in each step from `start_step` on, one array a step.

    All of them have the same length, but for the partial global batch at the end, of which a rank may get nothing; then
    this rank has one step less.
    """
    batches = []
    for step in range(start_step, num_steps(len(order), batch_size=batch_size, drop_last=drop_last)):
        batch = order[step * batch_size : (step + 1) * batch_size]
        part = batch[share(len(batch), rank=rank, world_size=world_size)]
        if len(part):
            batches.append(part)
    return batches
