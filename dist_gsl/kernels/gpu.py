"""The proximal step of layers on a GPU, in Triton: two launches for all layers at once, and no word to the host.

`Step.shrink_` multiplies the neurons that live; who is dying is left as it is. `Step.clear_` comes when all layers have had that: it takes
the dying to zero, and what else their deaths clear, unless too few of their layer would be left. Who is dead is kept on the device
(`Step.alive`), for whoever asks. Imported only where it is used; imports torch and triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_gsl.kernels.layout import Layout

ENTRIES: Final = 1024
"""Of a tile, which is a program's work at a time."""
SHAPES: Final = ((1, 1024), (16, 64), (128, 8))
"""Tiles, (neurons, entries of each): for long rows, short ones, and very short ones."""
NEURONS: Final = 32
"""That a program looks at for deaths."""
_PART = tl.constexpr(7)
_LAYER = tl.constexpr(5)
"""Columns of the tables of parts and of layers."""


@triton.jit
def _pointers(row, neurons, entries, valid, dtype: tl.constexpr):
    """Addresses (R, C) of entries (C,) of neurons (R,) in the part that a row of the table describes."""
    data = tl.load(row).to(tl.pointer_type(dtype))
    index = tl.load(row + 1)
    positions, stride = tl.load(row + 2), tl.load(row + 3)
    blocks, block_stride, run = tl.load(row + 4).to(tl.int32), tl.load(row + 5), tl.load(row + 6).to(tl.int32)
    within = entries % (blocks * run)
    offsets = (within // run).to(tl.int64) * block_stride + within % run
    places = neurons.to(tl.int64)[:, None] + tl.zeros_like(offsets)[None, :]
    if index != 0:
        number = (entries // (blocks * run)).to(tl.int64)
        places = tl.load(index.to(tl.pointer_type(tl.int64)) + places * positions + number[None, :], mask=valid, other=0)
    return data + places * stride + offsets[None, :]


@triton.jit
def _size(row):
    return (tl.load(row + 2) * tl.load(row + 4) * tl.load(row + 6)).to(tl.int32)


@triton.jit
def _sqrt(x, dtype: tl.constexpr):
    return tl.sqrt_rn(x) if dtype == tl.float32 else tl.sqrt(x)  # rounded as on a CPU, in both types


@triton.jit
def _ratio(x, y, dtype: tl.constexpr):
    return tl.div_rn(x, y) if dtype == tl.float32 else x / y


@triton.jit
def _shrink_tile(
    layer, first, layers, parts, limits, num_layers, factors, norms, survivors, dtype: tl.constexpr, num_rows: tl.constexpr, num_columns: tl.constexpr
):
    its = layers + _LAYER * layer
    begin, end, num_neurons, offset = tl.load(its).to(tl.int32), tl.load(its + 1).to(tl.int32), tl.load(its + 2).to(tl.int32), tl.load(its + 3)
    cut, threshold = tl.load(limits + layer), tl.load(limits + num_layers + layer)
    neurons = first + tl.arange(0, num_rows)
    exists = neurons < num_neurons
    cut_squares = tl.zeros([num_rows], dtype)
    squares = tl.zeros([num_rows], dtype)
    for part in range(begin, end):
        size = _size(parts + _PART * part)
        for start in range(0, size, num_columns):
            entries = start + tl.arange(0, num_columns)
            valid = exists[:, None] & (entries < size)[None, :]
            x = tl.load(_pointers(parts + _PART * part, neurons, entries, valid, dtype), mask=valid, other=0.0)
            s = x - tl.minimum(tl.maximum(x, -cut, propagate_nan=tl.PropagateNan.ALL), cut, propagate_nan=tl.PropagateNan.ALL)
            cut_squares += tl.sum(s * s, axis=1)
            squares += tl.sum(x * x, axis=1)
    norm = _sqrt(cut_squares, dtype)
    factor = tl.where(norm <= threshold, 0.0, _ratio(norm - threshold, tl.where(norm > 0, norm, 1.0), dtype))  # NaN stays NaN
    tl.store(factors + offset + neurons, factor, mask=exists)
    tl.store(norms + offset + neurons, _sqrt(squares, dtype), mask=exists)
    lives = exists & (factor != 0.0)
    tl.atomic_add(survivors + layer, tl.sum(lives.to(tl.int32), axis=0))
    for part in range(begin, end):  # what was just read is in the cache
        size = _size(parts + _PART * part)
        for start in range(0, size, num_columns):
            entries = start + tl.arange(0, num_columns)
            valid = lives[:, None] & (entries < size)[None, :]
            where = _pointers(parts + _PART * part, neurons, entries, valid, dtype)
            x = tl.load(where, mask=valid, other=0.0)
            s = x - tl.minimum(tl.maximum(x, -cut, propagate_nan=tl.PropagateNan.ALL), cut, propagate_nan=tl.PropagateNan.ALL)
            tl.store(where, s * factor[:, None], mask=valid)


@triton.jit
def _shrink(
    programs, layers, parts, limits, num_layers, factors, norms, survivors, dtype: tl.constexpr,
    r0: tl.constexpr, c0: tl.constexpr, r1: tl.constexpr, c1: tl.constexpr, r2: tl.constexpr, c2: tl.constexpr,
):  # fmt: skip
    mine = programs + 3 * tl.program_id(0)
    layer, first, shape = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2)
    if shape == 0:
        _shrink_tile(layer, first, layers, parts, limits, num_layers, factors, norms, survivors, dtype, r0, c0)
    elif shape == 1:
        _shrink_tile(layer, first, layers, parts, limits, num_layers, factors, norms, survivors, dtype, r1, c1)
    else:
        _shrink_tile(layer, first, layers, parts, limits, num_layers, factors, norms, survivors, dtype, r2, c2)


@triton.jit
def _clear(
    programs, layers, parts, factors, norms, survivors, forced, alive, for_good, dtype: tl.constexpr, num_looked_at: tl.constexpr, num_columns: tl.constexpr
):
    mine = programs + 2 * tl.program_id(0)
    layer, first = tl.load(mine), tl.load(mine + 1)
    its = layers + _LAYER * layer
    num_neurons, offset = tl.load(its + 2).to(tl.int32), tl.load(its + 3)
    neurons = first + tl.arange(0, num_looked_at)
    exists = neurons < num_neurons
    factor = tl.load(factors + offset + neurons, mask=exists, other=1.0)
    was_alive = tl.load(alive + offset + neurons, mask=exists, other=0)
    dying = ((factor == 0.0) & (was_alive != 0)).to(tl.int32)
    if tl.sum(dying, axis=0) > 0:
        begin, end = tl.load(its).to(tl.int32), tl.load(its + 1).to(tl.int32)
        missing = tl.load(its + 4).to(tl.int32) - tl.load(survivors + layer)
        for k in range(num_looked_at):
            is_dying = tl.sum(tl.where(tl.arange(0, num_looked_at) == k, dying, 0), axis=0) > 0
            if is_dying:
                neuron = first + k
                kept = 0
                if missing > 0:  # the strongest stay; one that was zero before does not
                    norm = tl.load(norms + offset + neuron)
                    rank = 0
                    for start in range(0, num_neurons, num_columns):
                        others = start + tl.arange(0, num_columns)
                        is_there = others < num_neurons
                        theirs = tl.load(norms + offset + others, mask=is_there, other=-1.0)
                        die_too = tl.load(factors + offset + others, mask=is_there, other=1.0) == 0.0
                        stronger = die_too & ((theirs > norm) | ((theirs == norm) & (others < neuron)))
                        rank += tl.sum(stronger.to(tl.int32), axis=0)
                    kept = ((rank < missing) & (norm > 0.0)).to(tl.int32)
                if kept != 0:
                    tl.store(forced + layer, 1)
                else:
                    row = tl.zeros([1], tl.int32) + neuron
                    for part in range(begin, end):
                        size = _size(parts + _PART * part)
                        for start in range(0, size, num_columns):
                            entries = start + tl.arange(0, num_columns)
                            valid = (entries < size)[None, :]
                            where = _pointers(parts + _PART * part, row, entries, valid, dtype)
                            tl.store(where, tl.zeros([1, num_columns], dtype), mask=valid)
                    if for_good != 0:
                        tl.store(alive + offset + neuron, 0)


_TYPES: Final = {torch.float32: tl.float32, torch.float64: tl.float64}


class Step:
    """The proximal step of some layers, as often as wanted; its tables lie on the device.

    Args:
        layouts: of one type and device, with parts.
        min_alive: neurons that each layer keeps at least.
        masks: of each layer, bool (num_neurons,): who is alive.
        for_good: a neuron that died is not looked at again.
    """

    def __init__(self, layouts: Sequence[Layout], *, min_alive: Sequence[int], masks: Sequence[Tensor], for_good: bool) -> None:
        self.layouts, self.for_good = list(layouts), for_good
        self._min_alive = list(min_alive)
        self._device, dtype = layouts[0].device, layouts[0].dtype
        self._sizes = [layout.num_neurons for layout in layouts]
        num_neurons = sum(self._sizes)
        self._factors, self._norms = torch.empty(2, num_neurons, dtype=dtype, device=self._device)
        self._survivors, self._forced = torch.zeros(2, len(layouts), dtype=torch.int32, device=self._device)
        self.alive = torch.cat(list(masks)).to(torch.uint8).to(self._device)
        """Of all layers, one after another."""
        shapes = [_shape(layout) for layout in layouts]
        starts = [(layer, n, shape) for layer, shape in enumerate(shapes) for n in range(0, self._sizes[layer], SHAPES[shape][0])]
        self._programs = torch.tensor(starts, dtype=torch.int32).to(self._device)
        looks = [(layer, n) for layer, size in enumerate(self._sizes) for n in range(0, size, NEURONS)]
        self._looks = torch.tensor(looks, dtype=torch.int32).to(self._device)
        self._layers, self._parts = self._tables([[layout] for layout in layouts])
        self._cleared: list[list[Layout]] = []
        self._clear_tables = self._layers, self._parts

    def is_current(self) -> bool:
        return all(layout.is_current() for layout in self.layouts)

    def shrink_(self, *, cuts: Sequence[float], thresholds: Sequence[float]) -> None:
        """s = S(x, cut) over all parts of a neuron; x becomes (1 - threshold / |s|) s where |s| > threshold."""
        limits = torch.tensor([*cuts, *thresholds], dtype=self.layouts[0].dtype, pin_memory=self._device.type == "cuda")
        self._survivors.zero_()
        with _on(self._device):
            _shrink[len(self._programs),](
                self._programs, self._layers, self._parts, limits.to(self._device, non_blocking=True), len(self.layouts), self._factors,
                self._norms, self._survivors, _TYPES[self.layouts[0].dtype], *SHAPES[0], *SHAPES[1], *SHAPES[2],
            )  # fmt: skip

    def clear_(self, also: Sequence[Sequence[Layout]]) -> None:
        """Takes those to zero whose |s| was not above the threshold, and what they own of `also`, layouts for each layer; not the strongest of
        them where a layer would be left with fewer than it keeps."""
        if not self._is_cleared_with(also):
            self._cleared = [list(layouts) for layouts in also]
            self._clear_tables = self._tables([[own, *more] for own, more in zip(self.layouts, also, strict=True)])
        layers, parts = self._clear_tables
        with _on(self._device):
            _clear[len(self._looks),](
                self._looks, layers, parts, self._factors, self._norms, self._survivors, self._forced, self.alive, int(self.for_good),
                _TYPES[self.layouts[0].dtype], NEURONS, ENTRIES,
            )  # fmt: skip

    def masks(self) -> list[Tensor]:
        """Who is alive, bool (num_neurons,) of each layer, on the CPU: waits for the device."""
        return list(self.alive.cpu().bool().split(self._sizes))

    def kept_by_force(self) -> list[bool]:
        """Of each layer, whether neurons ever stayed for `min_alive`: waits for the device."""
        found: list[bool] = self._forced.cpu().bool().tolist()
        return found

    def _is_cleared_with(self, also: Sequence[Sequence[Layout]]) -> bool:
        known = [layout for layouts in self._cleared for layout in layouts]
        asked = [layout for layouts in also for layout in layouts]
        return len(known) == len(asked) and all(a is b for a, b in zip(known, asked, strict=True))

    def _tables(self, layouts: Sequence[Sequence[Layout]]) -> tuple[Tensor, Tensor]:
        """int64 tables on the device: of each layer (first part, last and one, neurons, where they begin among all, neurons that stay), and of
        each part of all its layouts (data, index, positions, stride, blocks, block_stride, run)."""
        layers: list[tuple[int, ...]] = []
        parts: list[tuple[int, ...]] = []
        offset = 0
        for size, least, its in zip(self._sizes, self._min_alive, layouts, strict=True):
            begin = len(parts)
            for layout in its:
                assert layout.parts is not None
                parts += [tuple(getattr(part, name) or 0 for name, _ in part._fields_) for part in layout.parts]
            layers.append((begin, len(parts), size, offset, least))
            offset += size
        return torch.tensor(layers).to(self._device), torch.tensor(parts).to(self._device)


def _shape(layout: Layout) -> int:
    """The tile that wastes least on a layer's longest part."""
    assert layout.parts is not None
    longest = max(part.entries for part in layout.parts)
    return 0 if longest > 256 else 1 if longest > 8 else 2


def _on(device: torch.device) -> torch.cuda.device:
    return torch.cuda.device(device if device.type == "cuda" else -1)
