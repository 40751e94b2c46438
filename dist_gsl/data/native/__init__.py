"""The decoder of colour images, in C++ (``decode.cpp``): its settings, and how its functions are called.

`pip install` compiles it to the module ``_dist_gsl_decode``, which belongs to an environment as FFCV does: code that is shipped to
a cluster finds the one that is installed there.
"""

import ctypes
from enum import IntEnum
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dist_gsl import compiled

MODULE: Final = "_dist_gsl_decode"
VERSION: Final = 3
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
    [("crop", "<u8"), ("seed", "<u8"), ("epoch", "<u8"), ("size", "<u8"), ("num_threads", "<u8"),
     ("checksum_offset", "<u8"), ("target_offset", "<u8"), ("target_bytes", "<u8"), ("out", "<u8"), ("share", "<f8"), ("min_area", "<f8"),
     ("max_area", "<f8"), ("min_ratio", "<f8"), ("max_ratio", "<f8")]
)  # fmt: skip
"""The settings of a batch: `size` of the output in pixels, `out` the address that decoded images go to (0: to the
function's argument), `share` of the shorter side,
areas as shares of the image's, ratios of width to height. In a row, `checksum_offset` is where its checksum is (0: none is verified), `target_offset` where the address
of the target's `target_bytes` is (0: the target is in the row itself)."""

REASONS: Final = {
    1: "it lies outside of the file",
    2: "its checksum is not the one that was written",
    3: "its JPEG cannot be decoded",
    4: "its size is not the one that was written",
    5: "its JPEG is not in colour or grey",
}
"""What a status other than 0 means."""


@cache
def library() -> ctypes.CDLL:
    """The compiled functions. All arguments that are not numbers are addresses.

    - ``dist_gsl_decode`` and ``dist_gsl_copy``: (file, its bytes, rows, their stride, sizes, positions, their number, settings, out,
      bad sample) -> status;
    - ``dist_gsl_verify``: (file, its bytes, rows, their stride, sizes, begin, end, is it in colour, settings, bad sample) -> status.

    `NotCompiledError` where they are missing, or of another version than this code.
    """
    found = compiled.load(
        MODULE, what="the decoder", version=VERSION, version_function="dist_gsl_decode_version",
        needs="a compiler, with the headers of libjpeg and libdeflate,",
    )  # fmt: skip
    address, u64, u32, i32 = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int32
    function: Any
    for function, arguments in (
        (found.dist_gsl_decode, [address, u64, address, u64, address, address, u64, address, address, address]),
        (found.dist_gsl_copy, [address, u64, address, u64, address, address, u64, address, address, address]),
        (found.dist_gsl_verify, [address, u64, address, u64, address, u64, u64, i32, address, address]),
        (found.dist_gsl_jpeg_size, [address, u64, address]),
        (found.dist_gsl_jpeg, [address, u64, u32, u32, address]),
        (found.dist_gsl_moments, [address, u64, u64, address, address]),
        (found.dist_gsl_resize, [address, u32, u32, u32, u32, address]),
        (found.dist_gsl_normalise, [address, u64, u64, u64, address, i32, address, u64]),
        (found.dist_gsl_region, [address, u64, u32, u32, address]),
        (found.dist_gsl_use_vectors, [i32]),
        (found.dist_gsl_jpeg_check, [address, u64]),
    ):
        function.argtypes, function.restype = arguments, i32
    return found


def settings(**values: Any) -> NDArray[Any]:
    """Settings of a batch, an array of one; what is not given is 0."""
    made = np.zeros(1, SETTINGS)
    for name, value in values.items():
        made[name] = value
    return made


def region(settings: NDArray[Any], sample: int, *, width: int, height: int) -> tuple[int, int, int, int, bool]:
    """The region (x, y, width, height, is it mirrored) that would be read of a sample, an image of width x height pixels."""
    found = np.zeros(5, np.uint32)
    library().dist_gsl_region(settings.ctypes.data, sample, width, height, found.ctypes.data)
    x, y, w, h, mirrored = found.tolist()
    return x, y, w, h, bool(mirrored)


def decode_jpeg(content: bytes) -> NDArray[np.uint8]:
    """A JPEG in colour or grey as RGB, uint8 (H, W, 3).

    `ValueError` with the reason where it is no such JPEG, or where its data are damaged or end early: other decoders fill what
    is missing with grey and say nothing.
    """
    data, size = np.frombuffer(content, np.uint8), np.zeros(2, np.uint32)
    status = library().dist_gsl_jpeg_size(data.ctypes.data, data.size, size.ctypes.data)
    width, height = size.tolist()
    if status == 0:
        pixels = np.empty((height, width, 3), np.uint8)
        status = library().dist_gsl_jpeg(data.ctypes.data, data.size, width, height, pixels.ctypes.data)
    if status != 0:
        raise ValueError(REASONS[status])
    return pixels


def check_jpeg(content: bytes) -> None:
    """`ValueError` where a JPEG, of whatever colours, is damaged or ends early."""
    data = np.frombuffer(content, np.uint8)
    status = library().dist_gsl_jpeg_check(data.ctypes.data, data.size)
    if status != 0:
        raise ValueError(REASONS[status])


def moments(pixels: NDArray[np.uint8]) -> tuple[list[int], list[int]]:
    """Of each channel the sum of its levels and of their squares, of pixels (H, W) or (H, W, channels)."""
    levels = np.ascontiguousarray(pixels)
    channels = levels.shape[2] if levels.ndim == 3 else 1
    found = np.zeros((2, channels), np.uint64)
    library().dist_gsl_moments(levels.ctypes.data, levels.size // channels, channels, found[0].ctypes.data, found[1].ctypes.data)
    sums, squares = found.tolist()
    return sums, squares


def resize(pixels: NDArray[np.uint8], *, width: int, height: int) -> NDArray[np.uint8]:
    """Pixels in colour, (H, W, 3), to other sides, by the triangle filter: torchvision's "bilinear" with antialias."""
    source, out = np.ascontiguousarray(pixels), np.empty((height, width, 3), np.uint8)
    library().dist_gsl_resize(source.ctypes.data, source.shape[1], source.shape[0], width, height, out.ctypes.data)
    return out


def normalise(
    levels: NDArray[np.uint8], table: NDArray[np.float32], out: NDArray[np.float32], *, to_planes: bool, num_threads: int
) -> None:
    """Levels (B, ..., channels), channels last, to floats by a table (channels, 256); to `out` in the same order, or with the
    channels as planes of their own."""
    channels = len(table)
    assert levels.flags.c_contiguous
    assert out.size == levels.size
    assert table.flags.c_contiguous
    library().dist_gsl_normalise(
        levels.ctypes.data, len(levels), levels[0].size // channels, channels, table.ctypes.data, to_planes, out.ctypes.data, num_threads
    )
