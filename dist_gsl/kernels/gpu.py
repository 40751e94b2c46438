"""The proximal step of layers on a GPU, in Triton: many layers a launch, and no word to the host.

`Shrink` multiplies the neurons that live; who is dying is left as it is. `Clear` comes when all layers have had that: it takes
the dying to zero, and what else their deaths clear, unless too few of their layer would be left. Who is dead is kept on the device,
for whoever asks. Imported only where it is used; imports torch and triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_gsl.kernels.layout import Layout, Part, Rows

SHAPES: Final = ((1, 512), (2, 256), (4, 128), (16, 32))
"""Tiles, (neurons, float32 entries of each); half as many entries of float64."""
PIECES: Final = 5
"""Tiles that a program reads at once, into registers: runs are cut into pieces of a tile's width. A filter of 3 x 3 over 2^n channels is four and
a half, with another tile for each n."""
ANY: Final = (16, 64)
"""Neurons, and entries at a time of each, of layers whose parts are not all runs."""
WARPS, REGISTERS = 2, 128
"""Of a program, and at most of each of its threads. An H100 had 1.07 to 1.18 of a copy so, 1.10 to 1.31 with four warps and tiles twice as large, and
1.12 to 1.24 with three quarters of the registers."""
ENTRIES: Final = 1024
"""That are cleared at a time."""
NEURONS: Final = 32
"""That a program looks at for deaths."""
SINGLES: Final = 3
"""Parts of one entry a neuron (a bias, BatchNorm's scale and shift) that are read together with the filter."""
_PART = tl.constexpr(7)
_PIECE = tl.constexpr(3)
_LAYER = tl.constexpr(27)
_CLEARED = tl.constexpr(8)
"""Columns of the tables of parts, of pieces, of layers to shrink, and of layers to clear."""


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
def _soft_threshold(x, cut):
    return x - tl.minimum(tl.maximum(x, -cut, propagate_nan=tl.PropagateNan.ALL), cut, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _piece(row, first, local, exists, columns, aligned: tl.constexpr, dtype: tl.constexpr):
    """Addresses (R, C), and where there are any, of the entries that neurons have in a piece of a run. aligned: four are read at a time."""
    data, stride, size = tl.load(row).to(tl.pointer_type(dtype)), tl.load(row + 1), tl.load(row + 2).to(tl.int32)
    if aligned:
        data, stride, size = tl.multiple_of(data, 16), tl.multiple_of(stride, 4), tl.multiple_of(size, 4)
    where = data + first.to(tl.int64) * stride + (local * stride.to(tl.int32))[:, None] + columns[None, :]
    return where, exists[:, None] & (columns < size)[None, :]


@triton.jit
def _single(row, first, local, exists, dtype: tl.constexpr):
    """Addresses (R,) of the one entry that each neuron has in a part, and where there are any."""
    data, stride = tl.load(row), tl.load(row + 1)
    return data.to(tl.pointer_type(dtype)) + first.to(tl.int64) * stride + local * stride.to(tl.int32), exists & (data != 0)


@triton.jit
def _factors(its, neurons, exists, squares, cut_squares, threshold, dtype: tl.constexpr):
    """What neurons (R,) are multiplied with; that and their norms are kept for `_clear`."""
    factors, norms = tl.load(its + 4).to(tl.pointer_type(dtype)), tl.load(its + 5).to(tl.pointer_type(dtype))
    norm = _sqrt(cut_squares, dtype)
    factor = tl.where(norm <= threshold, 0.0, _ratio(norm - threshold, tl.where(norm > 0, norm, 1.0), dtype))  # NaN stays NaN
    tl.store(factors + neurons, factor, mask=exists)
    tl.store(norms + neurons, _sqrt(squares, dtype), mask=exists)
    return factor


@triton.jit
def _shrink_runs(its, first, pieces, cut, threshold, dtype: tl.constexpr, num_rows: tl.constexpr, num_columns: tl.constexpr, aligned: tl.constexpr):
    """Of neurons whose parts are runs and single entries."""
    begin, singles, end = tl.load(its).to(tl.int32), tl.load(its + 1).to(tl.int32), tl.load(its + 2).to(tl.int32)
    local, columns = tl.arange(0, num_rows), tl.arange(0, num_columns)
    neurons = first + local
    exists = neurons < tl.load(its + 3).to(tl.int32)
    # Five pieces and three single entries are read once, into registers, all at the same time.
    where_0, valid_0 = _piece(its + 6, first, local, exists, columns, aligned, dtype)
    where_1, valid_1 = _piece(its + 9, first, local, exists, columns, aligned, dtype)
    where_2, valid_2 = _piece(its + 12, first, local, exists, columns, aligned, dtype)
    where_3, valid_3 = _piece(its + 15, first, local, exists, columns, aligned, dtype)
    where_4, valid_4 = _piece(its + 18, first, local, exists, columns, aligned, dtype)
    where_a, valid_a = _single(its + 21, first, local, exists, dtype)
    where_b, valid_b = _single(its + 23, first, local, exists, dtype)
    where_c, valid_c = _single(its + 25, first, local, exists, dtype)
    x_0 = tl.load(where_0, mask=valid_0, other=0.0)
    x_1 = tl.load(where_1, mask=valid_1, other=0.0)
    x_2 = tl.load(where_2, mask=valid_2, other=0.0)
    x_3 = tl.load(where_3, mask=valid_3, other=0.0)
    x_4 = tl.load(where_4, mask=valid_4, other=0.0)
    a = tl.load(where_a, mask=valid_a, other=0.0)
    b = tl.load(where_b, mask=valid_b, other=0.0)
    c = tl.load(where_c, mask=valid_c, other=0.0)
    squares = x_0 * x_0 + x_1 * x_1 + x_2 * x_2 + x_3 * x_3 + x_4 * x_4
    single_squares = a * a + b * b + c * c
    x_0, x_1, x_2 = _soft_threshold(x_0, cut), _soft_threshold(x_1, cut), _soft_threshold(x_2, cut)
    x_3, x_4 = _soft_threshold(x_3, cut), _soft_threshold(x_4, cut)
    a, b, c = _soft_threshold(a, cut), _soft_threshold(b, cut), _soft_threshold(c, cut)
    cut_squares = x_0 * x_0 + x_1 * x_1 + x_2 * x_2 + x_3 * x_3 + x_4 * x_4
    single_cut_squares = a * a + b * b + c * c
    for piece in range(begin, singles):
        where, valid = _piece(pieces + _PIECE * piece, first, local, exists, columns, aligned, dtype)
        y = tl.load(where, mask=valid, other=0.0)
        squares += y * y
        y = _soft_threshold(y, cut)
        cut_squares += y * y
    for piece in range(singles, end):
        where, valid = _single(pieces + _PIECE * piece, first, local, exists, dtype)
        d = tl.load(where, mask=valid, other=0.0)
        single_squares += d * d
        d = _soft_threshold(d, cut)
        single_cut_squares += d * d
    all_squares, all_cut_squares = tl.sum(squares, axis=1) + single_squares, tl.sum(cut_squares, axis=1) + single_cut_squares
    factor = _factors(its, neurons, exists, all_squares, all_cut_squares, threshold, dtype)
    lives = exists & (factor != 0.0)
    tl.store(where_0, x_0 * factor[:, None], mask=valid_0 & lives[:, None])
    tl.store(where_1, x_1 * factor[:, None], mask=valid_1 & lives[:, None])
    tl.store(where_2, x_2 * factor[:, None], mask=valid_2 & lives[:, None])
    tl.store(where_3, x_3 * factor[:, None], mask=valid_3 & lives[:, None])
    tl.store(where_4, x_4 * factor[:, None], mask=valid_4 & lives[:, None])
    tl.store(where_a, a * factor, mask=valid_a & lives)
    tl.store(where_b, b * factor, mask=valid_b & lives)
    tl.store(where_c, c * factor, mask=valid_c & lives)
    for number in range(begin, singles):  # what was read last is in the cache
        where, valid = _piece(pieces + _PIECE * (begin + singles - 1 - number), first, local, lives, columns, aligned, dtype)
        tl.store(where, _soft_threshold(tl.load(where, mask=valid, other=0.0), cut) * factor[:, None], mask=valid)
    for piece in range(singles, end):
        where, valid = _single(pieces + _PIECE * piece, first, local, lives, dtype)
        tl.store(where, _soft_threshold(tl.load(where, mask=valid, other=0.0), cut) * factor, mask=valid)


@triton.jit
def _shrink_any(its, first, parts, cut, threshold, dtype: tl.constexpr, num_rows: tl.constexpr, num_columns: tl.constexpr):
    """Of neurons with parts of any kind."""
    begin, end = tl.load(its).to(tl.int32), tl.load(its + 2).to(tl.int32)
    neurons = first + tl.arange(0, num_rows)
    exists = neurons < tl.load(its + 3).to(tl.int32)
    squares, cut_squares = tl.zeros([num_rows], dtype), tl.zeros([num_rows], dtype)
    for part in range(begin, end):
        size = _size(parts + _PART * part)
        for start in range(0, size, num_columns):
            entries = start + tl.arange(0, num_columns)
            valid = exists[:, None] & (entries < size)[None, :]
            x = tl.load(_pointers(parts + _PART * part, neurons, entries, valid, dtype), mask=valid, other=0.0)
            squares += tl.sum(x * x, axis=1)
            x = _soft_threshold(x, cut)
            cut_squares += tl.sum(x * x, axis=1)
    factor = _factors(its, neurons, exists, squares, cut_squares, threshold, dtype)
    lives = exists & (factor != 0.0)
    for part in range(begin, end):
        size = _size(parts + _PART * part)
        for start in range(0, size, num_columns):
            entries = start + tl.arange(0, num_columns)
            valid = lives[:, None] & (entries < size)[None, :]
            where = _pointers(parts + _PART * part, neurons, entries, valid, dtype)
            x = tl.load(where, mask=valid, other=0.0)
            tl.store(where, _soft_threshold(x, cut) * factor[:, None], mask=valid)


@triton.jit(do_not_specialize=["num_layers"])  # or another number of layers would be compiled for anew
def _shrink(
    programs, layers, pieces, parts, limits, num_layers, dtype: tl.constexpr, shapes: tl.constexpr, any_rows: tl.constexpr, any_columns: tl.constexpr
):
    mine = programs + 3 * tl.program_id(0)
    layer, first, kind = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2)
    its = layers + _LAYER * layer
    cut, threshold = tl.load(limits + layer), tl.load(limits + num_layers + layer)
    for number in tl.static_range(len(shapes)):
        if kind == 2 * number:
            _shrink_runs(its, first, pieces, cut, threshold, dtype, shapes[number][0], shapes[number][1], False)
        elif kind == 2 * number + 1:
            _shrink_runs(its, first, pieces, cut, threshold, dtype, shapes[number][0], shapes[number][1], True)
    if kind == 2 * len(shapes):
        _shrink_any(its, first, parts, cut, threshold, dtype, any_rows, any_columns)


@triton.jit(do_not_specialize=["for_good"])
def _clear(programs, layers, parts, for_good, dtype: tl.constexpr, num_looked_at: tl.constexpr, num_columns: tl.constexpr):
    mine = programs + 2 * tl.program_id(0)
    layer, first = tl.load(mine), tl.load(mine + 1)
    its = layers + _CLEARED * layer
    begin, end, num_neurons = tl.load(its).to(tl.int32), tl.load(its + 1).to(tl.int32), tl.load(its + 2).to(tl.int32)
    factors, norms = tl.load(its + 3).to(tl.pointer_type(dtype)), tl.load(its + 4).to(tl.pointer_type(dtype))
    alive = tl.load(its + 5).to(tl.pointer_type(tl.uint8))
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
        missing = tl.load(its + 7).to(tl.int32)
        for start in range(0, num_neurons, num_columns):
            others = start + tl.arange(0, num_columns)
            missing -= tl.sum((tl.load(factors + others, mask=others < num_neurons, other=0.0) != 0.0).to(tl.int32), axis=0)
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
                    tl.store(tl.load(its + 6).to(tl.pointer_type(tl.int32)), 1)
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
        layers: list[tuple[int, ...]] = []
        pieces: list[tuple[int, int, int]] = []
        parts: list[Part] = []
        programs: list[Tensor] = []
        for layout, size, factors, norms in zip(layouts, self.sizes, self.factors, self.norms, strict=True):
            its = _Reading.of(layout, self.dtype)
            addresses = factors.data_ptr(), norms.data_ptr()
            if its.parts:
                layers.append((len(parts), 0, len(parts) + len(its.parts), size, *addresses, *[0] * (3 * PIECES + 2 * SINGLES)))
                parts += its.parts
            else:
                begin, singles = len(pieces), len(pieces) + len(its.pieces[PIECES:])
                at_once = [number for piece in its.pieces[:PIECES] for number in piece]
                singles_at_once = [number for single in its.singles[:SINGLES] for number in single[:2]]
                pieces += [*its.pieces[PIECES:], *its.singles[SINGLES:]]
                layers.append((
                    begin, singles, len(pieces), size, *addresses, *at_once, *[0] * (3 * PIECES - len(at_once)),
                    *singles_at_once, *[0] * (2 * SINGLES - len(singles_at_once)),
                ))  # fmt: skip
            starts = torch.arange(0, size, its.num_rows)
            programs.append(torch.stack([torch.full_like(starts, len(layers) - 1), starts, torch.full_like(starts, its.kind)], dim=1))
        self._programs = torch.cat(programs).to(torch.int32).to(self.device)
        self._layers = torch.tensor(layers).to(self.device)
        self._pieces = torch.tensor(pieces, dtype=torch.int64).to(self.device)
        self._parts = _table_of(parts).to(self.device)
        self._limits = torch.empty(2 * len(layouts), dtype=self.dtype, device=self.device)
        self._known: tuple[float, ...] = ()
        """Limits that the device has."""

    def __call__(self, *, cuts: Sequence[float], thresholds: Sequence[float]) -> None:
        limits = (*cuts, *thresholds)
        if limits != self._known:
            self._limits.copy_(torch.tensor(limits, dtype=self.dtype, pin_memory=self.device.type == "cuda"), non_blocking=True)
            self._known = limits
        with _on(self.device):
            _shrink[len(self._programs),](
                self._programs, self._layers, self._pieces, self._parts, self._limits, len(self.layouts), _TYPES[self.dtype], shapes_of(self.dtype), *ANY,
                num_warps=WARPS, maxnreg=REGISTERS,
            )  # fmt: skip


def shapes_of(dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """Tiles of this type's entries."""
    return tuple((num_rows, num_columns * 4 // dtype.itemsize) for num_rows, num_columns in SHAPES)


@dataclass(frozen=True)
class _Reading:
    """How a program reads the neurons of a layer: by `pieces` of a tile's width and `singles`, (address, stride, entries), or by `parts` of any kind."""

    kind: int
    """Of program: its tile's number, times two, and one more where it is aligned; the last one takes parts of any kind."""
    num_rows: int
    """Neurons of a program."""
    pieces: list[tuple[int, int, int]]
    singles: list[tuple[int, int, int]]
    parts: list[Part]

    @classmethod
    def of(cls, layout: Layout, dtype: torch.dtype) -> _Reading:
        assert layout.parts is not None
        parts, shapes = list(layout.parts), shapes_of(dtype)
        if not all(part.index is None and part.positions == part.blocks == 1 for part in parts):
            return cls(2 * len(shapes), ANY[0], [], [], parts)
        runs = [part for part in parts if part.run > 1]
        fitting = [number for number, (_, width) in enumerate(shapes) if sum(-(-part.run // width) for part in runs) <= PIECES]
        number = fitting[-1] if fitting else 0
        num_rows, width = shapes[number]
        pieces = [
            (part.data + start * dtype.itemsize, part.stride, min(width, part.run - start)) for part in runs for start in range(0, part.run, width)
        ]
        is_aligned = all(part.data % 16 == part.stride % 4 == part.run % 4 == 0 for part in runs)
        return cls(2 * number + is_aligned, num_rows, pieces, [(part.data, part.stride, 1) for part in parts if part.run == 1], [])


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
        rows: list[tuple[int, ...]] = []
        parts: list[Part] = []
        for (shrink, number), more, its, forced, least in zip(layers, self.also, alive, self._forced, min_alive, strict=True):
            begin = len(parts)
            parts += [part for layout in (shrink.layouts[number], *more) for part in layout.parts or ()]
            rows.append((
                begin, len(parts), shrink.sizes[number], shrink.factors[number].data_ptr(), shrink.norms[number].data_ptr(), its.data_ptr(),
                forced.data_ptr(), least,
            ))  # fmt: skip
        self._layers, self._parts = torch.tensor(rows).to(self._device), _table_of(parts).to(self._device)

    def __call__(self) -> None:
        with _on(self._device):
            _clear[len(self._looks),](
                self._looks, self._layers, self._parts, int(self.for_good), _TYPES[self._dtype], NEURONS, ENTRIES
            )  # fmt: skip

    def heard(self) -> list[tuple[Tensor, bool]]:
        """Of each layer, who is alive, bool (num_neurons,) on the CPU, and whether neurons ever stayed for `min_alive`: waits for the device."""
        masks = torch.cat(self.alive).cpu().bool().split([len(each) for each in self.alive])
        return list(zip(masks, self._forced.cpu().bool().tolist(), strict=True))


def _table_of(parts: Sequence[Part]) -> Tensor:
    """int64: a row of each part."""
    rows = [tuple(getattr(part, name) or 0 for name, *_ in part._fields_) for part in parts]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), len(Part._fields_))


def works(device: torch.device) -> None:
    """Compiles and launches both for a neuron. Raises whatever Triton does where there is no compiler, or none for this device."""
    weight = torch.ones(1, 1, device=device)
    shrink = Shrink([Layout([Rows(weight, 0, torch.zeros(1, 1, dtype=torch.int64), is_block=True)], 1)])
    shrink(cuts=[0.0], thresholds=[2.0])
    Clear([shrink], also=[[]], min_alive=[0], alive=[torch.ones(1, dtype=torch.uint8, device=device)], for_good=True)()
    if float(weight) != 0:
        raise RuntimeError(f"a neuron that is to be 0 is {float(weight)}")


def _on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
