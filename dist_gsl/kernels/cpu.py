"""The proximal step of layers in C++ (``proximal.cpp``). Imports torch alone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from dist_gsl import compiled
from dist_gsl.kernels.layout import Layout

MODULE: Final = "_dist_gsl_proximal"
VERSION: Final = 3
"""Of the functions that this code calls."""
_FUNCTIONS: Final = {torch.float32: "dist_gsl_shrink_float", torch.float64: "dist_gsl_shrink_double"}
PER_THREAD: Final = 1 << 18
"""Entries that are worth a thread: shrinking them takes longer than starting it."""
PER_TASK: Final = 1 << 15
"""Entries that a thread takes at a time."""


class _Layer(ctypes.Structure):
    _fields_ = (
        ("parts", ctypes.c_void_p), ("num_parts", ctypes.c_uint64), ("num_neurons", ctypes.c_uint64), ("entries", ctypes.c_uint64),
        ("min_alive", ctypes.c_uint64), ("cut", ctypes.c_double), ("threshold", ctypes.c_double), ("factors", ctypes.c_void_p),
        ("num_zero", ctypes.c_uint64),
    )  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """The compiled functions. `NotCompiledError` where they are missing, or of another version than this code."""
    found = compiled.load(MODULE, what="the proximal step", version=VERSION, version_function="dist_gsl_proximal_version")
    for name in _FUNCTIONS.values():
        function: Any = getattr(found, name)
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64], None
    return found


def shrink_(
    layouts: Sequence[Layout], *, cuts: Sequence[float], thresholds: Sequence[float], min_alive: Sequence[int]
) -> list[tuple[Tensor, int]]:
    """The proximal step of layers, in place: s = S(x, cut) over all parts of a neuron, and x becomes max(0, 1 - threshold / |s|) s.

    Where fewer than `min_alive` neurons of a layer would be left, those that would become zero are left as they are. layouts: of one type,
    with parts. Returns of each layer the factors that its neurons were multiplied with, (num_neurons,), and how many are 0.
    """
    dtype = layouts[0].dtype
    factors = list(torch.empty(sum(layout.num_neurons for layout in layouts), dtype=dtype).split([layout.num_neurons for layout in layouts]))
    layers = (_Layer * len(layouts))(*(
        _Layer(ctypes.addressof(layout.parts), len(layout.parts), layout.num_neurons, layout.entries, least, cut, threshold, its.data_ptr(), 0)
        for layout, its, cut, threshold, least in zip(layouts, factors, cuts, thresholds, min_alive, strict=True)
        if layout.parts is not None
    ))  # fmt: skip
    assert all(layout.parts is not None for layout in layouts)
    entries = sum(layout.entries * layout.num_neurons for layout in layouts)
    num_threads = max(1, min(torch.get_num_threads(), entries // PER_THREAD))
    getattr(library(), _FUNCTIONS[dtype])(ctypes.addressof(layers), len(layers), num_threads, PER_TASK)
    return [(its, layer.num_zero) for its, layer in zip(factors, layers, strict=True)]
