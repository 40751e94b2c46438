"""Image files to pixels: every kind that a collection from the web holds, and no wrong picture unnoticed."""

import io
import warnings
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_gsl.data import native

_ORIENTATION: Final = 0x0112  # EXIF's tag: how the camera was held


class BadImageError(ValueError):
    """An image that cannot be used, and why, in one line without its name."""


class Decoded(NamedTuple):
    """An image's pixels, whether its file is a JPEG that can be stored as it is, and whether it is in grey."""

    pixels: NDArray[np.uint8]
    """RGB, (H, W, 3), upright."""
    is_plain_jpeg: bool
    is_grey: bool
    """Are the three channels the same?"""


def decode(content: bytes) -> Decoded:
    """Pixels of an image file.

    Grey becomes RGB, CMYK and palettes too; 16 bits become their upper eight; a photograph is turned as its EXIF says; of an
    animation the first frame counts. `BadImageError` for what is empty, none of the known formats, or damaged: also where a
    JPEG's data end early or make no sense, which most decoders paint grey without a word.
    """
    from PIL import Image, ImageOps

    if not content:
        raise BadImageError("is empty")
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content)) as image:
            warnings.simplefilter("ignore")  # of metadata that do not matter here
            is_upright = image.getexif().get(_ORIENTATION, 1) == 1
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):  # a camera's MPO begins with a JPEG
                pixels = native.decode_jpeg(content)
                is_plain = is_upright and image.format == "JPEG"
                return Decoded(pixels if is_upright else _turned(pixels, image), is_plain, image.mode == "L")
            if image.format in ("JPEG", "MPO"):
                native.check_jpeg(content)  # in CMYK, which Pillow decodes whatever is wrong
            upright = image if is_upright else ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
                grey = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return Decoded(np.repeat(grey[:, :, None], 3, axis=2), False, True)
            return Decoded(np.array(upright.convert("RGB")), False, upright.mode in ("1", "L", "LA"))
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise BadImageError(f"cannot be decoded ({_one_line(error)})") from error


def as_jpeg(pixels: NDArray[np.uint8], *, quality: int, is_grey: bool) -> bytes:
    """RGB pixels, (H, W, 3), as a JPEG, in grey where they are: smaller, and the decoder gives three channels again."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[:, :, 0]) if is_grey else pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _turned(pixels: NDArray[np.uint8], image: object) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    bare = Image.fromarray(pixels)
    bare.getexif()[_ORIENTATION] = image.getexif()[_ORIENTATION]  # type: ignore[attr-defined]
    return np.array(ImageOps.exif_transpose(bare))


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
