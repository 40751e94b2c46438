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


def windowed_order(pages: NDArray[np.int64], *, seed: int, epoch: int, pages_at_once: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A quasi-random order for a file that does not fit into memory: pages at random, samples at random among `pages_at_once` of them.

    pages: the page of each sample, int64 (N,). Returns the order, int64 (N,), alike in every process, and the number of the window
    that each of its places belongs to, int64 (N,), rising from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    known, page = np.unique(pages, return_inverse=True)
    window = rng.permutation(len(known))[page] // pages_at_once
    order = rng.permutation(len(pages))
    order = order[np.argsort(window[order], kind="stable")]
    return order.astype(np.int64), window[order].astype(np.int64)


def num_steps(num_samples: int, *, batch_size: int, drop_last: bool) -> int:
    """Global batches of an epoch: N // B, or with the partial one at the end."""
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)


def share(num_samples: int, *, rank: int, world_size: int) -> slice:
    """The contiguous part of a global batch that `rank` reads. Parts differ by at most one sample, larger first."""
    base, extra = divmod(num_samples, world_size)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))


def parts_of(*, rank: int, world_size: int, parts: int) -> range:
    """Which of a step's `parts`, numbered in the order of their samples, are those of `rank`: consecutive ones, at least one."""
    return range(rank * parts // world_size, (rank + 1) * parts // world_size)


def rank_share(num_samples: int, *, rank: int, world_size: int, parts: int) -> slice:
    """The contiguous part of a global batch that `rank` reads, where it is cut into `parts` whatever the number of processes."""
    mine = parts_of(rank=rank, world_size=world_size, parts=parts)
    return slice(share(num_samples, rank=mine[0], world_size=parts).start, share(num_samples, rank=mine[-1], world_size=parts).stop)


def rank_batches(
    order: NDArray[np.int64],
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    drop_last: bool,
    start_step: int = 0,
    parts: int | None = None,
) -> list[NDArray[np.int64]]:
    """The positions that `rank` reads in each step from `start_step` on, one array a step.

    parts: into so many a step is cut, at least world_size; None: one for each process.
    All of them have the same length, but for the partial global batch at the end, of which a rank may get nothing; then
    this rank has one step less.
    """
    batches = []
    for step in range(start_step, num_steps(len(order), batch_size=batch_size, drop_last=drop_last)):
        batch = order[step * batch_size : (step + 1) * batch_size]
        part = batch[rank_share(len(batch), rank=rank, world_size=world_size, parts=parts or world_size)]
        if len(part):
            batches.append(part)
    return batches
