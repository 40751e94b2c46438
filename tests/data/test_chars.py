"""The renderer: equal bytes for equal seeds whatever the chunking, and what its splits promise."""

import dataclasses
import hashlib

import numpy as np
import pytest

from dist_gsl.data import chars
from dist_gsl.data.chars import FONT_FILES, Fonts, render


def test_same_seed_gives_same_bytes_however_it_is_chunked() -> None:
    whole = render(60, seed=7)
    again = render(60, seed=7)
    pieces = [render(range(first, first + 20), seed=7) for first in (0, 20, 40)]
    backwards = render(np.arange(60)[::-1], seed=7)

    assert whole.images.dtype == np.uint8
    assert whole.images.shape == (60, 32, 32)
    assert whole.labels.dtype == np.int64
    np.testing.assert_array_equal(whole.images, again.images)
    np.testing.assert_array_equal(whole.images, np.concatenate([piece.images for piece in pieces]))
    np.testing.assert_array_equal(whole.labels, np.concatenate([piece.labels for piece in pieces]))
    np.testing.assert_array_equal(whole.images[::-1], backwards.images)


def test_seeds_splits_and_indices_give_different_images() -> None:
    splits = [chars.render_split(name, seed=0, count=40) for name in chars.SPLITS]
    splits.append(chars.render_split("train", seed=1, count=40))
    seen = [hashlib.sha256(image.tobytes()).hexdigest() for split in splits for image in split.images]
    assert len(set(seen)) == len(seen)
    assert len({split.stream for split in chars.SPLITS.values()}) == len(chars.SPLITS)


def test_every_class_appears_about_equally_often() -> None:
    labels = render(1_500, seed=0).labels
    counts = np.bincount(labels, minlength=36)
    assert len(counts) == 36
    assert counts.min() > 15  # 42 expected, standard deviation 6.4
    assert counts.max() < 75


def test_classes_are_digits_then_letters() -> None:
    assert "".join(chars.CLASSES) == "0123456789abcdefghijklmnopqrstuvwxyz"


def test_unseen_fonts_share_no_family_with_seen_ones() -> None:
    from PIL import ImageFont

    def families(fonts: Fonts) -> set[str | None]:
        from matplotlib import get_data_path

        return {ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}").getname()[0] for name in FONT_FILES[fonts]}

    assert not families(Fonts.SEEN) & families(Fonts.UNSEEN)
    assert chars.SPLITS["test_fonts"].fonts is Fonts.UNSEEN
    assert all(split.fonts is Fonts.SEEN for name, split in chars.SPLITS.items() if name != "test_fonts")


def test_fonts_change_the_images_but_not_the_labels() -> None:
    seen, unseen = render(50, seed=2), render(50, seed=2, fonts=Fonts.UNSEEN)
    np.testing.assert_array_equal(seen.labels, unseen.labels)
    assert (seen.images != unseen.images).any(axis=(1, 2)).all()


def test_an_easy_image_shows_its_character() -> None:
    """Without any difficulty, images of a class correlate with their own class more than with others."""
    easy = chars.Difficulty(
        stretch=0.0, rotation_degrees=0.0, shear=0.0, shift=0.0, fill=(0.8, 0.8), neighbour_probability=0.0,
        weight_probability=0.0, contrast=(150.0, 150.0), gradient=0.0, texture=0.0, shadow_probability=0.0,
        streak_probability=0.0, blur=(0.0, 0.0), low_resolution_probability=0.0, noise=(0.0, 0.0),
        jpeg_probability=0.0,
    )  # fmt: skip
    images, labels = render(900, seed=0, difficulty=easy)
    shapes = images.reshape(len(images), -1).astype(float)
    shapes = np.abs(shapes - shapes[:, :1])  # the corner is background: polarity and level do not matter
    shapes /= np.linalg.norm(shapes, axis=1, keepdims=True)
    likeness = shapes @ shapes.T
    np.fill_diagonal(likeness, -1)
    nearest = labels[likeness.argmax(axis=1)]
    assert (nearest == labels).mean() > 0.85


def test_difficulty_is_used() -> None:
    quiet = dataclasses.replace(chars.DIFFICULTY, noise=(0.0, 0.0))
    assert (render(5, seed=0).images != render(5, seed=0, difficulty=quiet).images).any()


@pytest.mark.parametrize(
    ("indices", "seed"), [(np.array([-1]), 0), (np.zeros((2, 2), int), 0), (3, -1)], ids=["negative", "shape", "seed"]
)
def test_bad_arguments_are_refused(indices: np.ndarray | int, seed: int) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        render(indices, seed=seed)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="test_fonts"):
        chars.render_split("validation", seed=0)
