"""Rendered crops of scene-text characters: 36 classes, 32x32 grey, made from the fonts that ship with matplotlib.

The character set of the ICDAR 2003 competition cannot be redistributed, and recipes must run on a fresh machine. This
module stands in for it. An image is what a word detector would hand to a character classifier: one character fills the
crop, its neighbours in the word are cut at the borders, and font, case, pose, contrast, lighting, blur, resolution,
compression and sensor noise vary. Some classes cannot be told apart in some fonts (0/O, 1/l/I, 5/S, 2/Z), so no
classifier reaches 100 %.

Classes are the digits ``0-9`` (labels 0 to 9), then the letters ``a-z`` (labels 10 to 35) without regard to case.

Every image has its own counter-based random stream, derived from (seed, split, index): any subset, rendered in any
order by any number of processes, has the same bytes.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

RENDERER_VERSION: Final = 1
"""Raised whenever the same seed and difficulty give other images than before."""
CLASSES: Final[tuple[str, ...]] = tuple(string.digits + string.ascii_lowercase)
SIZE: Final = 32  # pixels on a side of an image

_EM = 48  # pixels per em of the cached glyphs
_OVERSAMPLING = 2  # the warp is done on a finer grid, then averaged, so that thin strokes do not alias
_STRIP_HEIGHT, _STRIP_WIDTH = 112, 240  # a canvas that holds three glyphs of any font at _EM
_UNIFORMS = 64  # uniform numbers drawn for one image, more than are used


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """The ranges from which the appearance of an image is drawn; wider means harder.

    A pair is (low, high) of a uniform distribution, `*_probability` the chance that an effect occurs at all. Levels
    are grey levels out of 255; lengths are pixels of the final image.
    """

    fill: tuple[float, float] = (0.62, 0.95)
    """Longest side of the character's box, as a share of the image side."""
    stretch: float = 0.2
    """Width and height are each multiplied by exp(u), u uniform in [-stretch, stretch]."""
    rotation_degrees: float = 10.0
    """Rotation is uniform in [-rotation_degrees, rotation_degrees]."""
    shear: float = 0.2
    """Horizontal shift per unit of height, uniform in [-shear, shear]."""
    shift: float = 1.5
    """Horizontal and vertical displacement, each uniform in [-shift, shift]."""
    neighbour_probability: float = 0.75
    """Chance of a neighbouring character, for each side."""
    tracking: tuple[float, float] = (-0.05, 0.12)
    """Space added between characters, in em."""
    weight_probability: float = 0.35
    """Chance that strokes are thickened or thinned."""
    contrast: tuple[float, float] = (40.0, 200.0)
    """Difference of level between character and background."""
    gradient: float = 0.5
    """Largest change of background across the image, as a share of the contrast."""
    texture: float = 0.25
    """Largest standard deviation of the background's smooth texture, as a share of the contrast."""
    shadow_probability: float = 0.2
    """Chance of a drop shadow."""
    streak_probability: float = 0.12
    """Chance of a straight streak (a scratch, an edge of the sign) across the crop."""
    blur: tuple[float, float] = (0.0, 1.0)
    """Standard deviation of the Gaussian blur."""
    low_resolution_probability: float = 0.5
    """Chance that the crop was smaller and enlarged to the image side."""
    low_resolution: tuple[float, float] = (1.0, 2.0)
    """Factor by which such a crop was enlarged."""
    noise: tuple[float, float] = (0.0, 9.0)
    """Standard deviation of the sensor noise."""
    jpeg_probability: float = 0.35
    """Chance of JPEG compression."""
    jpeg_quality: tuple[float, float] = (15.0, 70.0)
    """Quality of that compression."""


DIFFICULTY: Final = Difficulty()


class Fonts(Enum):
    """Which typefaces an image may use. Whole families are held out, so `UNSEEN` shares no design with `SEEN`."""

    SEEN = "seen"
    UNSEEN = "unseen"


FONT_FILES: Final[dict[Fonts, tuple[str, ...]]] = {
    # DejaVu Sans and Serif, and Computer Modern (roman, bold, sans, italic, typewriter).
    Fonts.SEEN: (
        "DejaVuSans.ttf",
        "DejaVuSans-Bold.ttf",
        "DejaVuSans-Oblique.ttf",
        "DejaVuSans-BoldOblique.ttf",
        "DejaVuSerif.ttf",
        "DejaVuSerif-Bold.ttf",
        "DejaVuSerif-Italic.ttf",
        "DejaVuSerif-BoldItalic.ttf",
        "cmr10.ttf",
        "cmb10.ttf",
        "cmss10.ttf",
        "cmti10.ttf",
        "cmtt10.ttf",
    ),
    # STIX General, a Times-like family, and DejaVu Sans Mono.
    Fonts.UNSEEN: (
        "STIXGeneral.ttf",
        "STIXGeneralBol.ttf",
        "STIXGeneralItalic.ttf",
        "STIXGeneralBolIta.ttf",
        "DejaVuSansMono.ttf",
        "DejaVuSansMono-Bold.ttf",
        "DejaVuSansMono-Oblique.ttf",
        "DejaVuSansMono-BoldOblique.ttf",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split: the number that separates its random streams from the others', its default size and its fonts."""

    stream: int
    count: int
    fonts: Fonts


SPLITS: Final[dict[str, Split]] = {
    "train": Split(stream=0, count=5_000, fonts=Fonts.SEEN),
    "val": Split(stream=1, count=5_000, fonts=Fonts.SEEN),
    "test": Split(stream=2, count=10_000, fonts=Fonts.SEEN),
    "test_fonts": Split(stream=3, count=5_000, fonts=Fonts.UNSEEN),
}


class Characters(NamedTuple):
    """Rendered images, uint8 of shape (N, 32, 32), and labels, int64 of shape (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


class _Glyph(NamedTuple):
    """Coverage of one character, uint8 (h, w), with its place against the pen, all in pixels at `_EM`."""

    coverage: NDArray[np.uint8]
    left: int  # from the pen to the first column
    top: int  # from the baseline to the first row, negative is above
    advance: float  # from this pen to the next one


def render(
    indices: int | Sequence[int] | NDArray[np.integer],
    *,
    seed: int,
    stream: int = 0,
    fonts: Fonts = Fonts.SEEN,
    difficulty: Difficulty = DIFFICULTY,
) -> Characters:
    """Render the images of the given indices.

    Args:
        indices: the images wanted, each a number >= 0; or a count N, which means 0 to N - 1.
        seed: seed of the whole data set, >= 0.
        stream: separates splits of the same seed.
        fonts: the typefaces to draw from.
        difficulty: the ranges of appearance.

    Returns:
        Images uint8 (N, 32, 32) and labels int64 (N,), in the order of `indices`. Image i depends on (seed, stream,
        i, fonts, difficulty) alone.
    """
    wanted = np.arange(indices) if isinstance(indices, int) else np.asarray(indices, dtype=np.int64)
    if wanted.ndim != 1 or (wanted.size and wanted.min() < 0):
        raise ValueError("indices must be a count, or a one-dimensional sequence of numbers >= 0")
    if seed < 0 or stream < 0:
        raise ValueError(f"seed and stream must be >= 0, not {seed} and {stream}")
    key = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint64)
    images = np.empty((len(wanted), SIZE, SIZE), np.uint8)
    labels = np.empty(len(wanted), np.int64)
    typefaces = tuple(_typeface(name) for name in FONT_FILES[fonts])
    for position, index in enumerate(wanted.tolist()):
        # The index is the highest word of the counter, so every image has 2**192 numbers of its own.
        rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, index]))
        images[position], labels[position] = _render_one(rng, typefaces, difficulty)
    return Characters(images, labels)


def render_split(name: str, *, seed: int, count: int | None = None, difficulty: Difficulty = DIFFICULTY) -> Characters:
    """Render the first `count` images (default: all) of the split `name`, one of `SPLITS`."""
    if name not in SPLITS:
        raise ValueError(f"unknown split {name!r}: choose one of {', '.join(SPLITS)}")
    split = SPLITS[name]
    count = split.count if count is None else count
    return render(count, seed=seed, stream=split.stream, fonts=split.fonts, difficulty=difficulty)


class _Draw:
    """Uniform numbers of one image, drawn at once because a call to numpy costs more than the number."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._numbers = iter(rng.random(_UNIFORMS).tolist())

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def chance(self, probability: float) -> bool:
        return next(self._numbers) < probability

    def below(self, bound: int) -> int:
        return int(next(self._numbers) * bound)


def _render_one(
    rng: np.random.Generator, typefaces: tuple[dict[str, _Glyph], ...], difficulty: Difficulty
) -> tuple[NDArray[np.uint8], int]:
    draw = _Draw(rng)
    label = draw.below(len(CLASSES))
    glyphs = typefaces[draw.below(len(typefaces))]
    coverage = _pose(_word(draw, glyphs, label, difficulty), draw, difficulty)
    levels = _light(coverage, draw, rng, difficulty)
    return _photograph(levels, draw, rng, difficulty), label


def _word(
    draw: _Draw, glyphs: dict[str, _Glyph], label: int, difficulty: Difficulty
) -> tuple[NDArray[np.uint8], _Glyph]:
    """A strip with the character at its centre and, perhaps, a neighbour on either side."""
    upper = draw.chance(0.5)

    def cased(index: int) -> str:
        return CLASSES[index].upper() if upper else CLASSES[index]

    def neighbour() -> _Glyph:
        # Words are mostly of one kind: numbers stand beside numbers, letters beside letters of the same case.
        same_kind, pick = draw.chance(0.8), draw.uniform(0.0, 1.0)
        digits = (label < 10) == same_kind
        return glyphs[CLASSES[int(pick * 10)] if digits else cased(10 + int(pick * 26))]

    centre = glyphs[cased(label)]
    before = neighbour() if draw.chance(difficulty.neighbour_probability) else None
    after = neighbour() if draw.chance(difficulty.neighbour_probability) else None
    tracking = draw.uniform(*difficulty.tracking) * _EM

    strip = np.zeros((_STRIP_HEIGHT, _STRIP_WIDTH), np.uint8)
    height, width = centre.coverage.shape
    pen = _STRIP_WIDTH / 2 - width / 2 - centre.left
    baseline = _STRIP_HEIGHT // 2 - height // 2 - centre.top
    _stamp(strip, centre, pen, baseline)
    if before is not None:
        _stamp(strip, before, pen - before.advance - tracking, baseline)
    if after is not None:
        _stamp(strip, after, pen + centre.advance + tracking, baseline)
    if draw.chance(difficulty.weight_probability):
        thick, thin = (3 if draw.chance(0.5) else 2), 2  # thinning by more would erase hairlines
        change, side = (cv2.dilate, thick) if draw.chance(0.6) else (cv2.erode, thin)
        strip = change(strip, np.ones((side, side), np.uint8)).astype(np.uint8, copy=False)
    return strip, centre


def _stamp(strip: NDArray[np.uint8], glyph: _Glyph, pen: float, baseline: int) -> None:
    height, width = glyph.coverage.shape
    x, y = round(pen + glyph.left), baseline + glyph.top
    x0, x1 = max(x, 0), min(x + width, _STRIP_WIDTH)
    y0, y1 = max(y, 0), min(y + height, _STRIP_HEIGHT)
    if x0 < x1 and y0 < y1:
        target = strip[y0:y1, x0:x1]
        np.maximum(target, glyph.coverage[y0 - y : y1 - y, x0 - x : x1 - x], out=target)


def _pose(word: tuple[NDArray[np.uint8], _Glyph], draw: _Draw, difficulty: Difficulty) -> NDArray[np.float32]:
    """Place the strip's centre in the image by an affine map; coverage in [0, 1], float32 (32, 32)."""
    strip, centre = word
    side = SIZE * _OVERSAMPLING
    scale = side * draw.uniform(*difficulty.fill) / max(centre.coverage.shape)
    scale_x = scale * np.exp(draw.uniform(-difficulty.stretch, difficulty.stretch))
    scale_y = scale * np.exp(draw.uniform(-difficulty.stretch, difficulty.stretch))
    angle = np.deg2rad(draw.uniform(-difficulty.rotation_degrees, difficulty.rotation_degrees))
    shear = draw.uniform(-difficulty.shear, difficulty.shear)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, -sin], [sin, cos]])
    linear = rotation @ np.array([[scale_x, shear * scale_y], [0.0, scale_y]])
    shift = np.array([draw.uniform(-1, 1), draw.uniform(-1, 1)]) * difficulty.shift * _OVERSAMPLING
    offset = (side - 1) / 2 + shift - linear @ np.array([(_STRIP_WIDTH - 1) / 2, (_STRIP_HEIGHT - 1) / 2])
    warped = cv2.warpAffine(strip, np.column_stack([linear, offset]), (side, side), flags=cv2.INTER_LINEAR)
    small = cv2.resize(warped, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / np.float32(255)


def _light(
    coverage: NDArray[np.float32], draw: _Draw, rng: np.random.Generator, difficulty: Difficulty
) -> NDArray[np.float32]:
    """Grey levels, float32 (32, 32), of a character of one level on an uneven background."""
    contrast = draw.uniform(*difficulty.contrast)
    darker = draw.uniform(0.0, 255.0 - contrast)
    ink, ground = (darker, darker + contrast) if draw.chance(0.5) else (darker + contrast, darker)

    direction, slope = draw.uniform(0.0, 2 * np.pi), draw.uniform(0.0, difficulty.gradient) * contrast
    ramp = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
    background = ground + np.float32(slope) * (
        np.float32(np.cos(direction)) * ramp[None, :] + np.float32(np.sin(direction)) * ramp[:, None]
    )
    cells = 3 + draw.below(7)  # from broad stains to the grain of a wall
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    texture = cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    background += np.float32(draw.uniform(0.0, difficulty.texture) * contrast) * texture

    if draw.chance(difficulty.shadow_probability):
        dx, dy = 1 + draw.below(2), 1 + draw.below(2)
        shadow = np.zeros_like(coverage)
        shadow[dy:, dx:] = coverage[:-dy, :-dx]
        background += shadow * np.float32(draw.uniform(-0.6, 0.6) * contrast)
    image = background + coverage * (np.float32(ink) - background)
    if draw.chance(difficulty.streak_probability):
        ends = [draw.below(SIZE) for _ in range(2)]
        level = draw.uniform(min(ink, ground), max(ink, ground))
        first, last = ((0, ends[0]), (SIZE - 1, ends[1])) if draw.chance(0.5) else ((ends[0], 0), (ends[1], SIZE - 1))
        cv2.line(image, first, last, level, 1 + draw.below(2))
    return image


def _photograph(
    levels: NDArray[np.float32], draw: _Draw, rng: np.random.Generator, difficulty: Difficulty
) -> NDArray[np.uint8]:
    """What a camera and a file format make of it: blur, few pixels, noise, compression. Returns uint8 (32, 32)."""
    sigma = draw.uniform(*difficulty.blur)
    if sigma > 0.2:  # below, the kernel is a single pixel
        levels = cv2.GaussianBlur(levels, (0, 0), sigma).astype(np.float32, copy=False)
    noise = np.float32(draw.uniform(*difficulty.noise)) * rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    if draw.chance(difficulty.low_resolution_probability):
        side = round(SIZE / draw.uniform(*difficulty.low_resolution))
        small = cv2.resize(levels, (side, side), interpolation=cv2.INTER_AREA) + noise[:side, :side]
        levels = cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR).astype(np.float32, copy=False)
    else:
        levels = levels + noise
    image = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    if draw.chance(difficulty.jpeg_probability):
        quality = round(draw.uniform(*difficulty.jpeg_quality))
        _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        decoded = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)
        assert decoded is not None
        image = decoded.astype(np.uint8, copy=False)
    return image


@cache
def _typeface(file_name: str) -> dict[str, _Glyph]:
    """The digits and letters of a font file of matplotlib, rasterised once for the process."""
    from matplotlib import get_data_path

    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / file_name), _EM)
    glyphs = {}
    for character in string.digits + string.ascii_letters:
        left, top, right, bottom = (int(edge) for edge in font.getbbox(character, anchor="ls"))
        mask = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(mask).text((-left, -top), character, fill=255, font=font, anchor="ls")
        glyphs[character] = _Glyph(np.asarray(mask), left, top, font.getlength(character))
    return glyphs
