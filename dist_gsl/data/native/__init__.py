"""The decoder of colour images, in C++ (``decode.cpp``): its settings, and how its functions are called.

`pip install` compiles it to the module ``_dist_gsl_decode``, which belongs to an environment as FFCV does: code that is shipped to
a cluster finds the one that is installed there.
"""

import ctypes
import importlib.util
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MODULE: Final = "_dist_gsl_decode"
VERSION: Final = 1
"""Of the functions that this code calls."""


class Crop(IntEnum):
    """How the region of an image is chosen."""

    CENTRE = 0
    """The central square with a share of the shorter side."""
    SQUARE = 1
    """A square of that side anywhere in the central one, mirrored or not."""
    RANDOM_RESIZED = 2
    """Area and aspect ratio drawn, anywhere in the image, mirrored or not: torchvision's RandomResizedCrop and flip."""


SETTINGS: Final = np.dtype(
    [("crop", "<u8"), ("seed", "<u8"), ("epoch", "<u8"), ("size", "<u8"), ("num_threads", "<u8"), ("verify", "<u8"),
     ("share", "<f8"), ("min_area", "<f8"), ("max_area", "<f8"), ("min_ratio", "<f8"), ("max_ratio", "<f8")]
)  # fmt: skip
"""The settings of a batch: `size` of the output in pixels, `share` of the shorter side, areas as shares of the image's, ratios
of width to height."""

REASONS: Final = {
    1: "it lies outside of the file",
    2: "its checksum is not the one that was written",
    3: "its JPEG cannot be decoded",
    4: "its size is not the one that was written",
    5: "its JPEG is not in colour or grey",
}
"""What a status other than 0 means."""


def _library() -> ctypes.CDLL:
    remedy = "install the same dist_gsl here and on every node (pip compiles it: libjpeg's headers and a compiler are needed)"
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise ImportError(f"the decoder {MODULE} is missing: {remedy}")
    library = ctypes.CDLL(spec.origin)
    installed = library.dist_gsl_decode_version()
    if installed != VERSION:
        raise ImportError(f"the decoder {spec.origin} is of version {installed}, this code needs {VERSION}: {remedy}")
    return library


_lib = _library()
_address, _u64 = ctypes.c_void_p, ctypes.c_uint64

decode = _lib.dist_gsl_decode
"""(file, its bytes, rows, their stride, sizes, checksums, positions, their number, settings, out, bad sample) -> status; addresses."""
decode.argtypes = [_address, _u64, _address, _u64, _address, _address, _address, _u64, _address, _address, _address]
decode.restype = ctypes.c_int32

_region = _lib.dist_gsl_region
_region.argtypes = [_address, _u64, ctypes.c_uint32, ctypes.c_uint32, _address]
_region.restype = None


def settings(**values: Any) -> NDArray[Any]:
    """Settings of a batch, an array of one; what is not given is 0."""
    made = np.zeros(1, SETTINGS)
    for name, value in values.items():
        made[name] = value
    return made


def region(settings: NDArray[Any], sample: int, *, width: int, height: int) -> tuple[int, int, int, int, bool]:
    """The region (x, y, width, height, is it mirrored) that would be read of a sample, an image of width x height pixels."""
    found = np.zeros(5, np.uint32)
    _region(settings.ctypes.data, sample, width, height, found.ctypes.data)
    x, y, w, h, mirrored = found.tolist()
    return x, y, w, h, bool(mirrored)
