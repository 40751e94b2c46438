"""The proximal step of layers at the speed of memory: in C++ on a CPU, in Triton on a GPU. Imports torch (and triton) alone.

What neither takes (other types, layouts that runs do not describe, other devices) goes by torch's operations, `SparseGroupLasso.prox_`,
which is also what both are tested against.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from enum import Enum
from functools import cache

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
    return Kind.GPU if layout.device.type == "cuda" and _gpu_works(layout.device) else Kind.TORCH


def check(parameters: Iterable[Tensor]) -> None:
    """Now, and not when the penalty sets in: `NotCompiledError` where the compiled functions are missing and some parameter needs them, a
    warning where a GPU cannot be compiled for."""
    devices = {p.device for p in parameters if p.dtype in (torch.float32, torch.float64)}
    for device in devices:
        if device.type == "cpu":
            cpu.library()
        elif device.type == "cuda":
            _gpu_works(device)


@cache
def _gpu_works(device: torch.device) -> bool:
    try:
        from dist_gsl.kernels import gpu

        gpu.works(device)
    except Exception as error:  # Triton's compilers and drivers raise of all kinds
        reason = " ".join(str(error).split())[:300]
        warnings.warn(
            f"the proximal step on {device} goes by torch's operations, which make the host wait: Triton cannot be used "
            f"({type(error).__name__}: {reason}); it needs a C compiler and a GPU of compute capability 7.0 or above", stacklevel=3,
        )  # fmt: skip
        return False
    return True
