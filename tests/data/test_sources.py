"""Sources: what they hold, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dist_gsl.data.sources import SOURCES, ImageKind, Task, in_grey, open_source
from dist_gsl.data.sources.files import Names


def test_unknown_source_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown data source 'mnist'") as error:
        open_source("mnist")
    assert all(name in str(error.value) for name in SOURCES)


@pytest.mark.parametrize(
    ("spec", "counts", "message"),
    [
        ("imagefolder", {}, "needs a folder"),
        ("chars:x", {}, "takes no argument"),
        ("chars", {"validation": 3}, "no split 'validation'"),
        ("digits", {"train": 0}, "at least 1"),
        ("digits", {"train": 5_000}, "fewer than the 5000"),
        ("imagefolder:/nowhere/at/all", {}, "/nowhere/at/all/train"),
    ],
)
def test_bad_requests_are_refused(spec: str, counts: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(spec, counts=counts)


def test_digits_are_shared_out_by_class_without_overlap() -> None:
    source = open_source("digits", seed=1)
    assert source.kind is ImageKind.GREY
    assert {name: len(samples) for name, samples in source.splits.items()} == {"train": 1078, "val": 360, "test": 359}
    seen: set[bytes] = set()
    for samples in source.splits.values():
        labels = np.array([samples[i].target for i in range(len(samples))])
        assert np.bincount(labels, minlength=10).min() >= 0.09 * len(labels)
        images = {samples[i].image.tobytes() for i in range(len(samples))}
        assert not images & seen
        seen |= images
    first = open_source("digits", seed=1).splits["val"][0]
    np.testing.assert_array_equal(first.image, source.splits["val"][0].image)
    assert (first.image != open_source("digits", seed=2).splits["val"][0].image).any()


def test_digits_keep_what_was_written() -> None:
    """A linear classifier reads the enlarged digits as well as it does the originals."""
    from sklearn.linear_model import RidgeClassifier

    source = open_source("digits")
    train, test = source.splits["train"], source.splits["test"]

    def arrays(samples: object) -> tuple[np.ndarray, np.ndarray]:
        rows = [samples[i] for i in range(len(samples))]  # type: ignore[index,arg-type]
        return np.stack([row.image[::4, ::4].ravel() for row in rows]), np.array([row.target for row in rows])

    images, labels = arrays(train)
    assert (
        RidgeClassifier(alpha=100.0).fit(images / 255.0, labels).score(*[arrays(test)[0] / 255.0, arrays(test)[1]])
        > 0.85
    )


def test_rotated_digits_are_turned_by_their_target() -> None:
    """Turning back by the target restores the upright digit, better than turning by the opposite angle."""
    import cv2

    source = open_source("rotated-digits", seed=3)
    upright = open_source("digits", seed=3).splits["val"]
    samples = source.splits["val"]
    assert source.task is Task.REGRESSION
    assert source.num_targets == 1
    targets = np.array([samples[i].target for i in range(len(samples))])
    assert targets.dtype == np.float32
    assert targets.shape == (360, 1)
    assert np.abs(targets).max() <= 1
    assert np.abs(targets).max() > 0.95
    better = 0
    for i in range(60):
        image, target = samples[i]
        assert isinstance(target, np.ndarray)

        def error(degrees: float, image: np.ndarray = image, i: int = i) -> float:
            back = cv2.warpAffine(image, cv2.getRotationMatrix2D((15.5, 15.5), degrees, 1.25), (32, 32))
            return float(np.abs(back.astype(float) - upright[i].image).mean())

        better += error(-45 * float(target[0])) < error(45 * float(target[0]))
    assert better >= 57  # a round 0 looks alike either way


def test_image_folder_lists_classes_and_converts_modes(image_folder: Path) -> None:
    source = open_source(f"imagefolder:{image_folder}")
    assert source.classes == ("cat", "dog")
    assert source.kind is ImageKind.COLOUR
    assert {name: len(samples) for name, samples in source.splits.items()} == {"train": 24, "val": 12}
    for position in range(6):  # RGB, grey and CMYK
        image, target = source.splits["train"][position]
        assert image.shape[2] == 3
        assert target == 0
    few = open_source(f"imagefolder:{image_folder}", counts={"train": 5}, seed=1)
    assert len(few.splits["train"]) == 5


def test_aliases_are_class_folders(image_folder: Path) -> None:
    for name in ("imagenet", "places2", "icdar"):
        assert open_source(f"{name}:{image_folder}").classes == ("cat", "dog")


def test_characters_in_class_folders_become_grey_squares(image_folder: Path) -> None:
    source, colour = open_source(f"icdar:{image_folder}"), open_source(f"imagefolder:{image_folder}")
    assert source.kind is ImageKind.GREY
    assert source.fingerprint not in (colour.fingerprint, in_grey(colour, 16).fingerprint)
    for position in range(3):  # RGB, grey and CMYK
        wanted = Image.fromarray(colour.splits["val"][position].image).convert("L").resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(source.splits["val"][position].image, np.asarray(wanted))
    with pytest.raises(ValueError, match="in grey already"):
        in_grey(source, 32)


def test_class_that_training_lacks_is_refused(image_folder: Path) -> None:
    (image_folder / "val" / "dog").rename(image_folder / "val" / "bird")
    with pytest.raises(ValueError, match="class 'bird'"):
        open_source(f"imagefolder:{image_folder}")


def test_empty_class_is_refused(image_folder: Path) -> None:
    (image_folder / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        open_source(f"imagefolder:{image_folder}")


def test_broken_image_is_named(image_folder: Path) -> None:
    path = image_folder / "train" / "cat" / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff nothing")
    samples = open_source(f"imagefolder:{image_folder}").splits["train"]
    position = next(i for i in range(len(samples)) if samples.describe(i) == str(path))
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be decoded"):
        samples[position]


@given(names=st.lists(st.text(max_size=6)), place=st.integers(-8, 8))
def test_names_are_a_sequence(names: list[str], place: int) -> None:
    packed = Names(names)
    assert list(packed) == names
    assert packed[place:] == names[place:]
    if -len(names) <= place < len(names):
        assert packed[place] == names[place]
    else:
        with pytest.raises(IndexError):
            packed[place]
    assert Names(["caf\udce9.jpg"])[0] == "caf\udce9.jpg"  # a name that is no UTF-8
