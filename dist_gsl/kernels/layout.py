"""Where the neurons of a layer lie in memory, described for the kernels. Imports torch alone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """What the neurons of a layer own of one tensor: neuron n owns the positions index[n] along dimension `dim`."""

    tensor: Tensor
    dim: int
    index: Tensor
    """int64 (num_neurons, k), on the CPU; no position twice."""
    is_block: bool
    """The positions are one contiguous run in neuron order."""


class Part(ctypes.Structure):
    """`Rows` by addresses, in entries, as ``proximal.cpp`` has it."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("index", ctypes.c_void_p), ("positions", ctypes.c_uint64), ("stride", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64), ("block_stride", ctypes.c_uint64), ("run", ctypes.c_uint64),
    )  # fmt: skip

    @property
    def entries(self) -> int:
        """Of one neuron."""
        return self.positions * self.blocks * self.run


class Layout:
    """The parts of a layer's neurons, by their present addresses; `parts` is None where the kernels cannot do with them: they need one of
    two types, one device, and entries that lie in runs at one distance."""

    def __init__(self, rows: Sequence[Rows], num_neurons: int) -> None:
        self.num_neurons = num_neurons
        self._tensors = [each.tensor for each in rows]
        self._places = self._present_places()
        self.dtype, self.device = rows[0].tensor.dtype, rows[0].tensor.device
        self.indices = [None if each.is_block else each.index.contiguous().to(self.device) for each in rows]
        self.parts: ctypes.Array[Part] | None = None
        """Hold only as long as `is_current`."""
        if self.dtype in (torch.float32, torch.float64) and all((r.tensor.dtype, r.tensor.device) == (self.dtype, self.device) for r in rows):
            found = [_parts(each, index) for each, index in zip(rows, self.indices, strict=True)]
            parts = [part for its in found for part in its]
            if all(found):
                self.parts = (Part * len(parts))(*parts)
        self.entries = 0 if self.parts is None else sum(part.entries for part in self.parts)

    @property
    def tensors(self) -> list[Tensor]:
        return self._tensors

    def is_current(self) -> bool:
        """Whether all tensors are where and as they were. An address alone does not tell: what went to another type or device and came back in another
        order may lie where it lay before."""
        return self._present_places() == self._places

    def _present_places(self) -> list[tuple[int, tuple[int, ...], torch.dtype]]:
        return [(tensor.data_ptr(), tensor.stride(), tensor.dtype) for tensor in self._tensors]


FEW: Final = 4
"""Positions of a neuron that are better described one by one, as the query's and the key's of attention are."""


def _parts(rows: Rows, index: Tensor | None) -> list[Part]:
    """None where it takes more to describe them."""
    front = rows.tensor.detach().movedim(rows.dim, 0)
    num_neurons, positions = rows.index.shape
    if index is None:
        first = int(rows.index[0, 0]) if rows.index.numel() else 0
        block = front.narrow(0, first, num_neurons * positions)
        block = block if positions == 1 else block.unflatten(0, (num_neurons, positions))
        runs = _runs(block)
        return [] if runs is None else [Part(block.data_ptr(), None, 1, block.stride(0), *runs)]
    runs = _runs(front)
    if runs is None:
        return []
    step = _step(rows.index)
    if step is None or positions > FEW:
        return [Part(front.data_ptr(), index.data_ptr(), positions, front.stride(0), *runs)]
    return [Part(front[first].data_ptr(), None, 1, step * front.stride(0), *runs) for first in rows.index[0].tolist()]


def _step(index: Tensor) -> int | None:
    """From each neuron to the next, in all of their positions; None where it is not one and the same, or leads back."""
    if len(index) < 2:
        return 1
    steps = index.diff(dim=0)
    step = int(steps[0, 0])
    return step if step > 0 and bool((steps == step).all()) else None


def _runs(rows: Tensor) -> tuple[int, int, int] | None:
    """(blocks, stride from one to the next, entries of each) of one row's entries, rows (N, ...); None where it takes more to describe them."""
    merged: list[tuple[int, int]] = []  # (stride, size) from the outermost to the innermost, neighbours joined
    for stride, size in sorted(zip(rows.stride()[1:], rows.shape[1:], strict=True), reverse=True):
        if size == 1:
            continue
        if merged and merged[-1][0] == stride * size:
            merged[-1] = stride, merged[-1][1] * size
        else:
            merged.append((stride, size))
    run = merged.pop()[1] if merged and merged[-1][0] == 1 else 1
    if len(merged) > 1:
        return None
    stride, blocks = merged[0] if merged else (0, 1)
    end = 1
    # An entry that two positions share would be shrunk twice.
    for stride_of, size in sorted([(1, run), (stride, blocks), (rows.stride(0), len(rows))]):
        if size > 1 and stride_of < end:
            return None
        end = max(end, stride_of * size)
    return blocks, stride, run
