"""Augmentation against slow and obvious versions of it."""

import numpy as np
from scipy import stats

from dist_gsl.data import augment


def test_shift_equals_padding_and_cropping() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 2, 9, 11), dtype=np.uint8)
    indices = np.arange(200)
    shifted = augment.shift(images, indices, seed=1, epoch=2)
    assert shifted.flags.c_contiguous
    places = set()
    for image, result in zip(images, shifted, strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="edge")
        matches = [(y, x) for y in range(5) for x in range(5) if (padded[:, y : y + 9, x : x + 11] == result).all()]
        assert len(matches) == 1
        places.add(matches[0])
    assert len(places) == 25


def test_pixels_depend_on_the_sample_and_not_on_the_batch() -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 12, 12), dtype=np.uint8)
    indices = np.arange(40) * 3
    whole = augment.shift(images, indices, seed=4, epoch=1)
    part = augment.shift(images[[7, 3, 30]], indices[[7, 3, 30]], seed=4, epoch=1)
    np.testing.assert_array_equal(part, whole[[7, 3, 30]])
    assert (augment.shift(images, indices, seed=4, epoch=2) != whole).any()
    assert (augment.shift(images, indices, seed=5, epoch=1) != whole).any()


def test_draws_are_uniform_and_independent() -> None:
    indices = np.arange(20_000)
    draws = [augment.below(5, indices, seed=0, epoch=epoch, draw=draw) for epoch in (0, 1) for draw in (0, 1)]
    for values in draws:
        assert stats.chisquare(np.bincount(values, minlength=5)).pvalue > 1e-4
    for first in range(4):
        for second in range(first):
            table = np.bincount(draws[first] * 5 + draws[second], minlength=25)
            assert stats.chisquare(table).pvalue > 1e-4
