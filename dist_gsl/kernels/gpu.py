"""The proximal step of layers on a GPU, in Triton: many layers a launch, and no word to the host.

`Shrink` multiplies the neurons that live; who is dying is left as it is. `Clear` comes when all layers have had that: it takes
the dying to zero, and what else their deaths clear, unless too few of their layer would be left. Who is dead is kept on the device,
for whoever asks. Imported only where it is used; imports torch and triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_gsl.kernels.layout import Layout, Rows

ENTRIES: Final = 1024
"""Of a tile, which is a program's work at a time."""
SHAPES: Final = ((1, 1024), (16, 64), (128, 8))
"""Tiles, (neurons, entries of each): for long rows, short ones, and very short ones."""
NEURONS: Final = 32
"""That a program looks at for deaths."""
_PART = tl.constexpr(7)
_LAYER = tl.constexpr(9)
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
    layer, first, layers, parts, limits, num_layers, dtype: tl.constexpr, num_rows: tl.constexpr, num_columns: tl.constexpr
):
    its = layers + _LAYER * layer
    begin, end, num_neurons = tl.load(its).to(tl.int32), tl.load(its + 1).to(tl.int32), tl.load(its + 2).to(tl.int32)
    factors, norms = tl.load(its + 3).to(tl.pointer_type(dtype)), tl.load(its + 4).to(tl.pointer_type(dtype))
    survivors = tl.load(its + 5).to(tl.pointer_type(tl.int32))
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
    tl.store(factors + neurons, factor, mask=exists)
    tl.store(norms + neurons, _sqrt(squares, dtype), mask=exists)
    lives = exists & (factor != 0.0)
    tl.atomic_add(survivors, tl.sum(lives.to(tl.int32), axis=0))
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
    programs, layers, parts, limits, num_layers, dtype: tl.constexpr,
    r0: tl.constexpr, c0: tl.constexpr, r1: tl.constexpr, c1: tl.constexpr, r2: tl.constexpr, c2: tl.constexpr,
):  # fmt: skip
    mine = programs + 3 * tl.program_id(0)
    layer, first, shape = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2)
    if shape == 0:
        _shrink_tile(layer, first, layers, parts, limits, num_layers, dtype, r0, c0)
    elif shape == 1:
        _shrink_tile(layer, first, layers, parts, limits, num_layers, dtype, r1, c1)
    else:
        _shrink_tile(layer, first, layers, parts, limits, num_layers, dtype, r2, c2)


@triton.jit
def _clear(programs, layers, parts, for_good, dtype: tl.constexpr, num_looked_at: tl.constexpr, num_columns: tl.constexpr):
    mine = programs + 2 * tl.program_id(0)
    layer, first = tl.load(mine), tl.load(mine + 1)
    its = layers + _LAYER * layer
    begin, end, num_neurons = tl.load(its).to(tl.int32), tl.load(its + 1).to(tl.int32), tl.load(its + 2).to(tl.int32)
    factors, norms = tl.load(its + 3).to(tl.pointer_type(dtype)), tl.load(its + 4).to(tl.pointer_type(dtype))
    alive = tl.load(its + 6).to(tl.pointer_type(tl.uint8))
    neurons = first + tl.arange(0, num_looked_at)
    exists = neurons < num_neurons
    factor = tl.load(factors + neurons, mask=exists, other=1.0)
    was_alive = tl.load(alive + neurons, mask=exists, other=0)
    is_zero = factor == 0.0
    if for_good == 0:  # who was dead may live again
        tl.store(alive + neurons, (factor != 0.0).to(tl.uint8), mask=exists & (factor != 0.0))
        dying = is_zero.to(tl.int32)
    else:
        dying = (is_zero & (was_alive != 0)).to(tl.int32)
    # A gradient from before its death may have moved a dead neuron.
    moved = (exists & (was_alive == 0) & (tl.load(norms + neurons, mask=exists, other=0.0) != 0.0)).to(tl.int32)
    moved = moved * for_good
    if tl.sum(dying + moved, axis=0) > 0:
        missing = tl.load(its + 8).to(tl.int32) - tl.load(tl.load(its + 5).to(tl.pointer_type(tl.int32)))
        for k in range(num_looked_at):
            here = tl.arange(0, num_looked_at) == k
            is_dying = tl.sum(tl.where(here, dying, 0), axis=0) > 0
            if is_dying or tl.sum(tl.where(here, moved, 0), axis=0) > 0:
                neuron = first + k
                kept = missing * 0
                if is_dying and missing > 0:  # the strongest stay; one that was zero before does not
                    norm = tl.load(norms + neuron)
                    rank = 0
                    for start in range(0, num_neurons, num_columns):
                        others = start + tl.arange(0, num_columns)
                        is_there = others < num_neurons
                        theirs = tl.load(norms + others, mask=is_there, other=-1.0)
                        die_too = tl.load(factors + others, mask=is_there, other=1.0) == 0.0
                        stronger = die_too & ((theirs > norm) | ((theirs == norm) & (others < neuron)))
                        rank += tl.sum(stronger.to(tl.int32), axis=0)
                    kept = ((rank < missing) & (norm > 0.0)).to(tl.int32)
                if kept != 0:
                    tl.store(tl.load(its + 7).to(tl.pointer_type(tl.int32)), 1)
                else:
                    row = tl.zeros([1], tl.int32) + neuron
                    for part in range(begin, end):
                        size = _size(parts + _PART * part)
                        for start in range(0, size, num_columns):
                            entries = start + tl.arange(0, num_columns)
                            valid = (entries < size)[None, :]
                            where = _pointers(parts + _PART * part, row, entries, valid, dtype)
                            tl.store(where, tl.zeros([1, num_columns], dtype), mask=valid)
                tl.store(alive + neuron, kept.to(tl.uint8))


_TYPES: Final = {torch.float32: tl.float32, torch.float64: tl.float64}


class Shrink:
    """s = S(x, cut) over all parts of a neuron; x becomes (1 - threshold / |s|) s where |s| > threshold: for some layers, as often as wanted.

    layouts: of one type and device, with parts.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self.layouts = list(layouts)
        self.device, self.dtype = layouts[0].device, layouts[0].dtype
        self.sizes = [layout.num_neurons for layout in layouts]
        both = torch.empty(2, sum(self.sizes), dtype=self.dtype, device=self.device)
        self.factors, self.norms = (list(flat.split(self.sizes)) for flat in both)
        self.survivors = torch.zeros(len(layouts), dtype=torch.int32, device=self.device)
        """Neurons of each layer whose factor is not 0."""
        shapes = [_shape(layout) for layout in layouts]
        starts = [(layer, n, shape) for layer, shape in enumerate(shapes) for n in range(0, self.sizes[layer], SHAPES[shape][0])]
        self._programs = torch.tensor(starts, dtype=torch.int32).to(self.device)
        rows = [
            (size, factors.data_ptr(), norms.data_ptr(), survivors.data_ptr(), 0, 0, 0)
            for size, factors, norms, survivors in zip(self.sizes, self.factors, self.norms, self.survivors, strict=True)
        ]
        self._layers, self._parts = _tables(rows, [[layout] for layout in layouts], self.device)

    def __call__(self, *, cuts: Sequence[float], thresholds: Sequence[float]) -> None:
        limits = torch.tensor([*cuts, *thresholds], dtype=self.dtype, pin_memory=self.device.type == "cuda")
        self.survivors.zero_()
        with _on(self.device):
            _shrink[len(self._programs),](
                self._programs, self._layers, self._parts, limits.to(self.device, non_blocking=True), len(self.layouts), _TYPES[self.dtype],
                *SHAPES[0], *SHAPES[1], *SHAPES[2],
            )  # fmt: skip


class Clear:
    """Takes those to zero whom `Shrink` left, with what else their deaths clear; not the strongest of them where a layer would be left with
    fewer than it keeps.

    Args:
        shrinks: of one type and device, each launched before.
        also: for each of their layers, what is cleared besides.
        min_alive: of each layer, neurons that it keeps.
        alive: of each layer, uint8 (num_neurons,) on the device: who is; this is what a launch changes.
        for_good: a neuron that died is not looked at again.
    """

    def __init__(
        self, shrinks: Sequence[Shrink], *, also: Sequence[Sequence[Layout]], min_alive: Sequence[int], alive: Sequence[Tensor], for_good: bool
    ) -> None:
        self.shrinks, self.also, self.alive, self.for_good = list(shrinks), [list(layouts) for layouts in also], list(alive), for_good
        self._device, self._dtype = shrinks[0].device, shrinks[0].dtype
        layers = [(shrink, number) for shrink in shrinks for number in range(len(shrink.layouts))]
        self._forced = torch.zeros(len(layers), dtype=torch.int32, device=self._device)
        looks = [(layer, n) for layer, (shrink, number) in enumerate(layers) for n in range(0, shrink.sizes[number], NEURONS)]
        self._looks = torch.tensor(looks, dtype=torch.int32).to(self._device)
        rows = [
            (
                shrink.sizes[number], shrink.factors[number].data_ptr(), shrink.norms[number].data_ptr(), shrink.survivors[number].data_ptr(),
                its.data_ptr(), forced.data_ptr(), least,
            )
            for (shrink, number), its, forced, least in zip(layers, alive, self._forced, min_alive, strict=True)
        ]  # fmt: skip
        layouts = [[shrink.layouts[number], *more] for (shrink, number), more in zip(layers, self.also, strict=True)]
        self._layers, self._parts = _tables(rows, layouts, self._device)

    def __call__(self) -> None:
        with _on(self._device):
            _clear[len(self._looks),](
                self._looks, self._layers, self._parts, int(self.for_good), _TYPES[self._dtype], NEURONS, ENTRIES
            )  # fmt: skip

    def heard(self) -> list[tuple[Tensor, bool]]:
        """Of each layer, who is alive, bool (num_neurons,) on the CPU, and whether neurons ever stayed for `min_alive`: waits for the device."""
        masks = torch.cat(self.alive).cpu().bool().split([len(each) for each in self.alive])
        return list(zip(masks, self._forced.cpu().bool().tolist(), strict=True))


def _tables(rows: Sequence[tuple[int, ...]], layouts: Sequence[Sequence[Layout]], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 on the device: of each layer (first part, last and one, neurons, and by address factors, norms, survivors, who is alive, whether
    some were kept by force, then how many are to stay), and of each part of all its layouts (data, index, positions, stride, blocks, block_stride, run)."""
    layers: list[tuple[int, ...]] = []
    parts: list[tuple[int, ...]] = []
    for row, its in zip(rows, layouts, strict=True):
        begin = len(parts)
        for layout in its:
            assert layout.parts is not None
            parts += [tuple(getattr(part, name) or 0 for name, *_ in part._fields_) for part in layout.parts]
        layers.append((begin, len(parts), *row))
    return torch.tensor(layers).to(device), torch.tensor(parts).to(device)


def works(device: torch.device) -> None:
    """Compiles and launches both for a neuron. Raises whatever Triton does where there is no compiler, or none for this device."""
    weight = torch.ones(1, 1, device=device)
    shrink = Shrink([Layout([Rows(weight, 0, torch.zeros(1, 1, dtype=torch.int64), is_block=True)], 1)])
    shrink(cuts=[0.0], thresholds=[2.0])
    Clear([shrink], also=[[]], min_alive=[0], alive=[torch.ones(1, dtype=torch.uint8, device=device)], for_good=True)()
    if float(weight) != 0:
        raise RuntimeError(f"a neuron that is to be 0 is {float(weight)}")


def _shape(layout: Layout) -> int:
    """The tile that wastes least on a layer's longest part."""
    assert layout.parts is not None
    longest = max(part.entries for part in layout.parts)
    return 0 if longest > 256 else 1 if longest > 8 else 2


def _on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
