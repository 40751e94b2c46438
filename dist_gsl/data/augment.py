"""Random changes of images, as functions of (seed, epoch, sample): pixels do not depend on rank, threads or batch.

Shapes: images uint8 (B, C, H, W); indices int64 (B,), the samples' numbers in their split.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

MAX_SHIFT: Final = 2  # pixels

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def hashed(indices: NDArray[np.int64], *, seed: int, epoch: int, draw: int) -> NDArray[np.uint64]:
    """64 random bits a sample, uint64 (B,): SplitMix64's finaliser over seed, epoch, sample and number of the draw.

    A generator per sample would take microseconds each; this takes nanoseconds, and the same for any batch.
    """
    bits = np.zeros(len(indices), np.uint64)
    for word in (seed, epoch, draw):
        bits = _mixed(bits + np.uint64(word % 2**64) + _GOLDEN)
    return _mixed(bits + indices.astype(np.uint64) + _GOLDEN)


def below(bound: int, indices: NDArray[np.int64], *, seed: int, epoch: int, draw: int) -> NDArray[np.int64]:
    """A whole number from 0 to bound - 1 a sample, int64 (B,)."""
    bits = hashed(indices, seed=seed, epoch=epoch, draw=draw) >> np.uint64(32)
    return (bits * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


def shift(images: NDArray[np.uint8], indices: NDArray[np.int64], *, seed: int, epoch: int) -> NDArray[np.uint8]:
    """Each image moved by up to `MAX_SHIFT` pixels each way, its border repeated into the gap."""
    height, width = images.shape[2:]
    down, right = (below(2 * MAX_SHIFT + 1, indices, seed=seed, epoch=epoch, draw=draw) - MAX_SHIFT for draw in (0, 1))
    rows = np.clip(np.arange(height) - down[:, None], 0, height - 1)
    columns = np.clip(np.arange(width) - right[:, None], 0, width - 1)
    batch = np.arange(len(images))
    # The channels stand last after this indexing, where an index array comes before a slice and another after it.
    moved = images[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return np.ascontiguousarray(np.moveaxis(moved, -1, 1))

