"""The decoder: regions against a plain version, pixels against Pillow, damage named."""

import io
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images

from dist_gsl.data import augment, native

pytestmark = pytest.mark.timeout(120)  # nothing here may hang

ROW = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("offset", "<u8")])
JPEG, RAW = 0, 1
RATIOS = {"min_ratio": 3 / 4, "max_ratio": 4 / 3}
RANDOM: dict[str, Any] = {"crop": native.Crop.RANDOM_RESIZED, "min_area": 0.08, "max_area": 1.0, **RATIOS}

photograph = load_sample_images().images[0]  # uint8 (427, 640, 3)


def as_jpeg(pixels: NDArray[np.uint8], **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def pillow(jpeg: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


@dataclass
class File:
    """Images one after another, as a beton has them."""

    blobs: list[bytes]
    rows: NDArray[Any]

    @staticmethod
    def of(*blobs: bytes, mode: int, width: int, height: int) -> "File":
        rows = np.zeros(len(blobs), ROW)
        offsets = np.cumsum([0, *(len(blob) for blob in blobs)])[:-1]
        rows["mode"], rows["width"], rows["height"], rows["offset"] = mode, width, height, offsets
        return File(list(blobs), rows)

    def decode(self, positions: list[int], *, file_bytes: int | None = None, **settings: Any) -> tuple[int, NDArray[np.uint8], int]:
        """(status, images, the bad sample)."""
        content = np.frombuffer(b"".join(self.blobs), np.uint8)
        sizes = np.array([len(blob) for blob in self.blobs], np.uint64)
        chosen = native.settings(**{"num_threads": 1, "share": 1.0, **settings})
        size = int(chosen["size"][0])
        out = np.zeros((len(positions), size, size, 3), np.uint8)
        order, bad = np.array(positions, np.uint64), np.zeros(1, np.uint64)
        status = native.library().dist_gsl_decode(
            content.ctypes.data, content.size if file_bytes is None else file_bytes, self.rows.ctypes.data, self.rows.strides[0],
            sizes.ctypes.data, order.ctypes.data, order.size, chosen.ctypes.data, out.ctypes.data, bad.ctypes.data,
        )  # fmt: skip
        return status, out, int(bad[0])


# --- regions


def uniform(sample: int, *, seed: int, epoch: int, draw: int) -> float:
    bits = int(augment.hashed(np.array([sample]), seed=seed, epoch=epoch, draw=draw)[0])
    return (bits >> 11) / 2**53


def below(bound: int, sample: int, **key: int) -> int:
    return int(augment.below(bound, np.array([sample]), **key)[0])


def random_resized(sample: int, width: int, height: int, *, seed: int, epoch: int) -> tuple[int, int, int, int, bool]:
    """torchvision's RandomResizedCrop.get_params, its draws replaced by hashes."""
    key = {"seed": seed, "epoch": epoch}
    mirrored = bool(below(2, sample, draw=2, **key))
    for attempt in range(1, 11):
        area = width * height * (0.08 + 0.92 * uniform(sample, draw=4 * attempt, **key))
        low, high = math.log(3 / 4), math.log(4 / 3)
        ratio = math.exp(low + (high - low) * uniform(sample, draw=4 * attempt + 1, **key))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x = below(width - w + 1, sample, draw=4 * attempt + 2, **key)
            return x, below(height - h + 1, sample, draw=4 * attempt + 3, **key), w, h, mirrored
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h, mirrored


@given(
    width=st.integers(1, 700), height=st.integers(1, 700), sample=st.integers(0, 2**40), seed=st.integers(0, 2**31),
    epoch=st.integers(0, 1000),
)  # fmt: skip
def test_random_resized_regions(width: int, height: int, sample: int, seed: int, epoch: int) -> None:
    settings = native.settings(seed=seed, epoch=epoch, **RANDOM)
    found = native.region(settings, sample, width=width, height=height)
    assert found == random_resized(sample, width, height, seed=seed, epoch=epoch)
    x, y, w, h, _ = found
    assert x + w <= width
    assert y + h <= height


def test_square_regions_are_everywhere_and_mirrored_by_halves() -> None:
    settings = native.settings(crop=native.Crop.SQUARE, share=224 / 256, seed=1, epoch=2)
    found = [native.region(settings, sample, width=24, height=16) for sample in range(3000)]
    assert {(w, h) for _, _, w, h, _ in found} == {(14, 14)}
    counts = np.zeros((3, 3, 2))
    for x, y, _, _, mirrored in found:
        counts[y, x - 4, int(mirrored)] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4
    later = native.settings(crop=native.Crop.SQUARE, share=224 / 256, seed=1, epoch=3)
    assert [native.region(later, sample, width=24, height=16) for sample in range(3000)] != found


# --- pixels


def wanted(image: NDArray[np.uint8], region: tuple[int, int, int, int, bool], size: int) -> NDArray[np.int64]:
    """By Pillow: what torchvision does with an image."""
    x, y, w, h, mirrored = region
    small = np.asarray(Image.fromarray(image[y : y + h, x : x + w]).resize((size, size), Image.Resampling.BILINEAR))
    return small[:, ::-1 if mirrored else 1].astype(np.int64)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [33, 224])
def test_a_region_is_that_of_the_whole_decoded_image(subsampling: str, progressive: bool, size: int) -> None:
    jpeg = as_jpeg(photograph, subsampling=subsampling, progressive=progressive)
    file, whole = File.of(jpeg, mode=JPEG, width=640, height=427), pillow(jpeg)
    for epoch in range(12):
        settings: dict[str, Any] = {"size": size, "epoch": epoch, **RANDOM}
        region = native.region(native.settings(**settings), 0, width=640, height=427)
        status, (image,), _ = file.decode([0], **settings)
        assert status == 0
        error = np.abs(image - wanted(whole, region, size))
        if min(region[2:4]) < 2 * size:
            assert error.max() <= 1  # Pillow rounds its weights otherwise
        else:  # decoded at a smaller scale
            assert 10 * math.log10(255**2 / (error**2).mean()) > 35


def test_raw_images() -> None:
    file = File.of(photograph.tobytes(), mode=RAW, width=640, height=427)
    for epoch in range(12):
        settings: dict[str, Any] = {"size": 97, "epoch": epoch, **RANDOM}
        region = native.region(native.settings(**settings), 0, width=640, height=427)
        status, (image,), _ = file.decode([0], **settings)
        assert status == 0
        assert np.abs(image - wanted(photograph, region, 97)).max() <= 1


@given(width=st.integers(1, 40), height=st.integers(1, 40), size=st.integers(1, 50), value=st.integers(0, 255))
def test_one_colour_stays_that_colour(width: int, height: int, size: int, value: int) -> None:
    file = File.of(bytes([value]) * (3 * width * height), mode=RAW, width=width, height=height)
    status, images, _ = file.decode([0], size=size, crop=native.Crop.CENTRE)
    assert status == 0
    assert (images == value).all()


@given(width=st.integers(1, 60), height=st.integers(1, 60), size=st.integers(1, 80), seed=st.integers(0, 1000))
def test_small_images_of_noise(width: int, height: int, size: int, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    jpeg = as_jpeg(noise)
    for blob, mode, whole in ((noise.tobytes(), RAW, noise), (jpeg, JPEG, pillow(jpeg))):
        settings: dict[str, Any] = {"size": size, "seed": seed, **RANDOM}
        region = native.region(native.settings(**settings), 0, width=width, height=height)
        status, (image,), _ = File.of(blob, mode=mode, width=width, height=height).decode([0], **settings)
        assert status == 0
        if min(region[2:4]) < 2 * size:
            assert np.abs(image - wanted(whole, region, size)).max() <= 1


def test_grey_jpegs_become_colour() -> None:
    grey = photograph[..., 1]
    jpeg = as_jpeg(grey)
    _, (image,), _ = File.of(jpeg, mode=JPEG, width=640, height=427).decode([0], size=64)
    assert np.ptp(image, axis=2).max() == 0


@given(width=st.integers(1, 200), height=st.integers(1, 200), size=st.integers(1, 70), seed=st.integers(0, 1000))
def test_wide_vectors_give_the_same_pixels(width: int, height: int, size: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = File.of(image.tobytes(), mode=RAW, width=width, height=height)
    chosen: dict[str, Any] = {"size": size, "seed": seed, **RANDOM}
    with_vectors = file.decode([0], **chosen)[1]
    try:
        assert native.library().dist_gsl_use_vectors(0) == 0
        without = file.decode([0], **chosen)[1]
    finally:
        used = native.library().dist_gsl_use_vectors(1)
    assert used == ("avx2" in Path("/proc/cpuinfo").read_text())
    np.testing.assert_array_equal(with_vectors, without)


def test_batches_do_not_depend_on_threads() -> None:
    jpegs = [as_jpeg(photograph[:, shift : shift + 500]) for shift in range(0, 140, 10)]
    file = File.of(*jpegs, mode=JPEG, width=500, height=427)
    order = [3, 1, 13, 7, 7, 0]
    one = file.decode(order, size=50, num_threads=1, **RANDOM)[1]
    for num_threads in (2, 3, 20):
        np.testing.assert_array_equal(file.decode(order, size=50, num_threads=num_threads, **RANDOM)[1], one)
    np.testing.assert_array_equal(one[3], one[4])


# --- damage


def status_of(file: File, **settings: Any) -> int:
    status, _, bad = file.decode([0, 1, 2], size=32, **settings)
    assert status == 0 or bad == 1
    return status


def three(middle: bytes, *, width: int = 640, height: int = 427) -> File:
    good = as_jpeg(photograph)
    file = File.of(good, middle, good, mode=JPEG, width=640, height=427)
    file.rows["width"][1], file.rows["height"][1] = width, height
    return file


def test_damage_is_named() -> None:
    good = as_jpeg(photograph)
    assert status_of(three(good)) == 0
    reasons = {
        "JPEG cannot be decoded": [three(good[:5000]), three(b""), three(b"no image"), three(good[:-1000] + bytes(1000))],
        "size is not": [three(as_jpeg(photograph[:100])), three(good, width=639)],
        "not in colour or grey": [three(cmyk())],
    }
    for reason, files in reasons.items():
        for file in files:
            assert reason in native.REASONS[status_of(file)], reason
    raw = File.of(photograph.tobytes(), photograph.tobytes()[:-3], photograph.tobytes(), mode=RAW, width=640, height=427)
    assert "size is not" in native.REASONS[status_of(raw)]
    far = three(good)
    far.rows["offset"][1] = 2**63
    assert "outside" in native.REASONS[status_of(far)]
    cut = three(good)
    assert cut.decode([0, 1], size=32, file_bytes=len(good) + 10)[::2] == (1, 1)


def cmyk() -> bytes:
    file = io.BytesIO()
    Image.fromarray(photograph).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


CHECKED = np.dtype([("image", ROW), ("target", "<u8"), ("checksum", "<u8")], align=True)


def test_any_changed_byte_is_found_by_its_checksum() -> None:
    """Of the image, of its target, and of the row that leads to them."""
    good, target = as_jpeg(photograph[:64, :64]), b"12345678"
    rows = np.zeros(1, CHECKED)
    rows["image"] = (JPEG, 64, 64, 0)
    rows["target"] = len(good)
    offset = CHECKED.fields["checksum"][1]  # type: ignore[index]
    rows["checksum"] = zlib.crc32(rows.tobytes()[:offset], zlib.crc32(target, zlib.crc32(good)))
    settings = native.settings(
        size=16, share=1.0, num_threads=1, checksum_offset=offset, target_offset=CHECKED.fields["target"][1], target_bytes=len(target)  # type: ignore[index]
    )  # fmt: skip

    def status(content: bytes, row: bytes) -> int:
        sizes, order, bad = np.array([len(good)], np.uint64), np.zeros(1, np.uint64), np.zeros(1, np.uint64)
        data, table, out = np.frombuffer(content, np.uint8), np.frombuffer(row, np.uint8), np.zeros((1, 16, 16, 3), np.uint8)
        return native.library().dist_gsl_decode(
            data.ctypes.data, data.size, table.ctypes.data, table.size, sizes.ctypes.data, order.ctypes.data, 1,
            settings.ctypes.data, out.ctypes.data, bad.ctypes.data,
        )  # fmt: skip

    content, row = good + target, rows.tobytes()
    assert status(content, row) == 0
    rng = np.random.default_rng(0)
    for _ in range(300):
        place = int(rng.integers(len(content)))
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        assert "checksum" in native.REASONS[status(bytes(changed), row)]
    for place in range(len(row)):
        changed = bytearray(row)
        changed[place] ^= 1
        assert status(content, bytes(changed)) != 0


def test_whole_jpegs() -> None:
    for options in ({}, {"progressive": True}, {"subsampling": "4:4:4"}):
        jpeg = as_jpeg(photograph, **options)
        np.testing.assert_array_equal(native.decode_jpeg(jpeg), pillow(jpeg))
    grey = as_jpeg(photograph[..., 0])
    np.testing.assert_array_equal(native.decode_jpeg(grey), pillow(grey))
    for bad in (b"", b"no image", as_jpeg(photograph)[:-2000], cmyk()):
        with pytest.raises(ValueError, match="its JPEG"):
            native.decode_jpeg(bad)


@given(height=st.integers(1, 300), width=st.integers(1, 300), channels=st.sampled_from([0, 1, 3]), seed=st.integers(0, 1000))
@example(height=300, width=300, channels=3, seed=0)  # the largest sum of all
def test_moments(height: int, width: int, channels: int, seed: int) -> None:
    shape = (height, width, channels) if channels else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    if seed % 10 == 0:
        pixels[:] = 255  # the largest sums
    exact = pixels.astype(np.int64).reshape(height * width, -1)
    assert native.moments(pixels) == (exact.sum(0).tolist(), (exact**2).sum(0).tolist())


@pytest.mark.parametrize(("width", "height"), [(400, 266), (640, 427), (100, 300), (3, 1), (700, 500)])
def test_resizing_is_pillows(width: int, height: int) -> None:
    found = native.resize(photograph, width=width, height=height)
    theirs = np.asarray(Image.fromarray(photograph).resize((width, height), Image.Resampling.BILINEAR))
    assert np.abs(found.astype(int) - theirs).max() <= 1


def test_random_corruptions_neither_crash_nor_hang() -> None:
    """Without checksums: an error or some picture, of memory that is ours."""
    good = as_jpeg(photograph[:96, :96])
    rng = np.random.default_rng(0)
    statuses = []
    for number in range(1000):
        content = bytearray(good)
        for _ in range(int(rng.integers(1, 20))):
            content[rng.integers(len(content))] = rng.integers(256)
        if number % 3 == 0:
            del content[rng.integers(len(content)) :]
        statuses.append(File.of(bytes(content), mode=JPEG, width=96, height=96).decode([0], size=40, epoch=number, **RANDOM)[0])
    assert set(statuses) <= {0, *native.REASONS}
    assert statuses.count(3) > 300
