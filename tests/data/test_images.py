"""Image files of every kind to pixels, and nothing wrong unnoticed."""

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from dist_gsl.data import images

pytestmark = pytest.mark.timeout(120)  # nothing here may hang

photograph = load_sample_images().images[1][:120, :200]


def file(image: Image.Image | NDArray[np.uint8], kind: str = "JPEG", **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "PPM", "TIFF"])
def test_lossless_files(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    found = images.decode(file(photograph, kind, **options))
    np.testing.assert_array_equal(found.pixels, photograph)
    assert not found.is_plain_jpeg


def test_a_jpeg_is_what_pillow_reads() -> None:
    content = file(photograph, quality=85)
    pixels, is_plain, _ = images.decode(content)
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(content))))
    assert is_plain


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_photographs_stand_upright(orientation: int, kind: str) -> None:
    content = file(photograph, kind, exif=exif(orientation))
    pixels, is_plain, _ = images.decode(content)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(pixels, np.asarray(wanted))
    assert is_plain == (kind == "JPEG" and orientation == 1)
    assert pixels.shape[:2] == ((120, 200) if orientation <= 4 else (200, 120))


def test_other_modes_become_rgb() -> None:
    for mode in ("L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"):
        image = Image.fromarray(photograph).convert(mode)
        kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
        np.testing.assert_array_equal(images.decode(file(image, kind)).pixels, np.asarray(image.convert("RGB")))
    cmyk = file(Image.fromarray(photograph).convert("CMYK"), quality=95)
    found = images.decode(cmyk)
    assert np.abs(found.pixels.astype(int) - photograph).mean() < 8
    assert not found.is_plain_jpeg


def test_sixteen_bit_grey_keeps_its_upper_bits() -> None:
    levels = (np.arange(64, dtype=np.uint16) * 1_000).reshape(8, 8)
    pixels = images.decode(file(Image.fromarray(levels), "PNG")).pixels
    np.testing.assert_array_equal(pixels[:, :, 1], levels // 256)


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.fromarray(np.full((16, 16, 3), level, np.uint8)) for level in (10, 200)]
    content = file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (images.decode(content).pixels == 10).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_a_file_that_is_cut_short_is_bad(kind: str) -> None:
    content = file(photograph, kind)
    for share in (0.02, 0.5, 0.95):
        with pytest.raises(images.BadImageError, match="cannot be decoded"):
            images.decode(content[: int(len(content) * share)])


def test_what_is_no_image_is_bad() -> None:
    for content, reason in ((b"", "is empty"), (b"\x00", "cannot be decoded"), (b"<html></html>", "cannot be decoded")):
        with pytest.raises(images.BadImageError, match=reason) as error:
            images.decode(content)
        assert "\n" not in str(error.value)


def test_random_corruptions_are_errors_or_pictures_of_the_size() -> None:
    """A thousand: never a crash; and most that can be seen are refused, where Pillow says nothing."""
    content = file(photograph)
    rng = np.random.default_rng(0)
    refused = quiet = 0
    for _ in range(1000):
        damaged = bytearray(content)
        for _ in range(int(rng.integers(1, 4))):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        try:
            pixels = images.decode(bytes(damaged)).pixels
        except images.BadImageError:
            refused += 1
            try:
                np.asarray(Image.open(io.BytesIO(bytes(damaged))))
                quiet += 1
            except Exception:  # of any kind, as Pillow has it
                pass
        else:
            assert pixels.ndim == 3
    assert refused > 500
    assert quiet > 100


@pytest.mark.parametrize("kind", ["MPO", "CMYK"])
def test_damage_is_found_in_rarer_jpegs_too(kind: str) -> None:
    good = file(Image.fromarray(photograph).convert("CMYK")) if kind == "CMYK" else file(photograph, "MPO", save_all=True, append_images=[Image.fromarray(photograph[:50])])
    whole = images.decode(good)
    assert not whole.is_plain_jpeg
    assert np.abs(whole.pixels.astype(int) - photograph).mean() < 12
    with pytest.raises(images.BadImageError):
        images.decode(good[: len(good) // 3])
