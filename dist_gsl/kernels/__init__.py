"""The proximal step of layers at the speed of memory: in C++ on a CPU, in Triton on a GPU. Imports torch (and triton) alone.

What neither takes (other types, layouts that runs do not describe, other devices) goes by torch's operations, `SparseGroupLasso.prox_`,
which is also what both are tested against.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from enum import Enum

import torch
from torch import Tensor

from dist_gsl.kernels import cpu
from dist_gsl.kernels.layout import Layout, Rows

__all__ = ["Kind", "Layout", "Rows", "check", "cpu", "kind_of"]


class Kind(Enum):
    """What takes a layer's proximal step."""

    CPU = "C++"
    GPU = "Triton"
    TORCH = "torch's operations"


def kind_of(layout: Layout) -> Kind:
    """The fastest that can take a layer's step."""
    if layout.parts is None:
        return Kind.TORCH
    if layout.device.type == "cpu":
        return Kind.CPU
    return Kind.GPU if layout.device.type == "cuda" and importlib.util.find_spec("triton") is not None else Kind.TORCH


def check(parameters: Iterable[Tensor]) -> None:
    """`NotCompiledError` where the compiled functions are missing and some parameter needs them: now, and not when the penalty sets in."""
    if any(p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64) for p in parameters):
        cpu.library()
