"""The proximal step of a layer at the speed of memory: on a CPU in C++ (``proximal.cpp``), elsewhere by torch's operations.

`pip install` compiles the module ``_dist_gsl_proximal``, which belongs to an environment as the decoder does. Imports torch alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from dist_gsl import compiled

MODULE: Final = "_dist_gsl_proximal"
VERSION: Final = 2
"""Of the functions that this code calls."""
_FUNCTIONS: Final = {torch.float32: "dist_gsl_shrink_float", torch.float64: "dist_gsl_shrink_double"}
PER_THREAD: Final = 1 << 18
"""Entries that are worth a thread: shrinking them takes longer than starting it."""


class Part(ctypes.Structure):
    """What a layer's neurons own of one tensor, in entries: neuron n has `blocks` runs of `run` neighbours."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("neuron_stride", ctypes.c_uint64), ("blocks", ctypes.c_uint64), ("block_stride", ctypes.c_uint64),
        ("run", ctypes.c_uint64),
    )  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """The compiled functions. `NotCompiledError` where they are missing, or of another version than this code."""
    found = compiled.load(MODULE, what="the proximal step", version=VERSION, version_function="dist_gsl_proximal_version")
    for name in _FUNCTIONS.values():
        function: Any = getattr(found, name)
        function.argtypes = [
            ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_double, ctypes.c_double, ctypes.c_void_p, ctypes.c_uint64
        ]  # fmt: skip
        function.restype = ctypes.c_uint64
    return found


def check(parameters: Iterable[Tensor]) -> None:
    """`NotCompiledError` where the compiled functions are missing and some parameter needs them: now, and not when the penalty sets in."""
    if any(p.device.type == "cpu" and p.dtype in _FUNCTIONS for p in parameters):
        library()


def described(parts: Sequence[Tensor]) -> ctypes.Array[Part] | None:
    """The parts (N, ...) of a layer's neurons as `shrink_` takes them, by their present addresses; None where it cannot: it needs one of two
    types, the CPU, and a layout of runs."""
    dtype = parts[0].dtype
    if dtype not in _FUNCTIONS:
        return None
    found = (Part * len(parts))()
    for place, part in zip(found, parts, strict=True):
        runs = _runs(part) if part.dtype == dtype and part.device.type == "cpu" and part.dim() > 0 else None
        if runs is None:
            return None
        place.data, place.neuron_stride = part.data_ptr(), part.stride(0)
        place.blocks, place.block_stride, place.run = runs
    return found


def shrink_(parts: ctypes.Array[Part], factors: Tensor, *, cut: float, threshold: float) -> int:
    """Where |s| > threshold, s = S(x, cut) over all parts of a neuron, x becomes (1 - threshold / |s|) s, in place; other neurons are left
    as they are. factors: (N,), of the parts' type; becomes what each neuron was multiplied with, 0 for those others. Returns how many
    those are."""
    entries = len(factors) * sum(part.blocks * part.run for part in parts)
    num_threads = max(1, min(torch.get_num_threads(), entries // PER_THREAD))
    num_zero: int = getattr(library(), _FUNCTIONS[factors.dtype])(
        ctypes.addressof(parts), len(parts), len(factors), cut, threshold, factors.data_ptr(), num_threads
    )
    return num_zero


def _runs(part: Tensor) -> tuple[int, int, int] | None:
    """(blocks, stride from one to the next, entries of each) of a neuron's entries of a part; None where it takes more to describe them."""
    merged: list[tuple[int, int]] = []  # (stride, size) from the outermost to the innermost, neighbours joined
    for stride, size in sorted(zip(part.stride()[1:], part.shape[1:], strict=True), reverse=True):
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
    for stride_of, size in sorted([(1, run), (stride, blocks), (part.stride(0), len(part))]):
        if size > 1 and stride_of < end:
            return None
        end = max(end, stride_of * size)
    return blocks, stride, run
