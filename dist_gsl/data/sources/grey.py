"""Images of any kind as squares in grey, one channel without loss: characters and digits."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_gsl.data import images
from dist_gsl.data.sources.base import ImageKind, Samples, Source, fingerprint


class GreySamples(Samples):
    """The samples of another split, squares of `size` pixels in grey."""

    def __init__(self, samples: Samples, size: int) -> None:
        self.samples, self.size = samples, size
        self.block, self.may_fork = samples.block, samples.may_fork

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, position: int) -> tuple[NDArray[np.uint8], int | NDArray[np.float32]]:
        content, target = self.samples.read(position)
        return grey_square(images.decode(content).pixels if isinstance(content, bytes) else content, self.size), target

    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def describe(self, position: int) -> str:
        return self.samples.describe(position)


def in_grey(source: Source, size: int) -> Source:
    """`ValueError` where its images are stored in grey anyway, at a size of their own."""
    if source.kind is ImageKind.GREY:
        raise ValueError(f"data source {source.spec!r} is in grey already, at its own size: leave grey out")
    return replace(
        source, kind=ImageKind.GREY, splits={name: GreySamples(samples, size) for name, samples in source.splits.items()},
        fingerprint=fingerprint(source=source.fingerprint, grey=size),
    )  # fmt: skip


def grey_square(pixels: NDArray[Any], size: int) -> NDArray[np.uint8]:
    """Levels, (H, W) or RGB (H, W, 3), as uint8 (size, size); the whole image, its shape not kept.

    Levels are from 0 to 255; or where none is above 1 and they are no bytes, from 0 to 1. `BadImageError` for others.
    """
    from PIL import Image

    levels = pixels
    if pixels.dtype != np.uint8 and pixels.size:
        exact = pixels.astype(np.float64)
        if not (exact >= 0).all() or not (exact <= 255).all():  # what is no number is neither
            raise images.BadImageError("has levels that are not from 0 to 255")
        levels = np.rint(exact * (255 if exact.max() <= 1 else 1)).astype(np.uint8)
    if levels.ndim not in (2, 3) or 0 in levels.shape:
        raise images.BadImageError(f"has shape {levels.shape}")
    image = Image.fromarray(np.ascontiguousarray(levels)).convert("L")
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR))
