"""The ICDAR 2003 characters as Jaderberg et al. released them ("Deep Features for Text Spotting", ECCV 2014), or class folders.

ROOT, or ROOT/data, holds ``case-insensitive-train.mat`` and ``icdar2003-chars-test.mat``: in each a struct ``gt`` with ``labels``, the
name of each class, and ``images``, a cell of grey images for each. Validation samples, of which the release has none, are drawn by
class from those for training. Images become squares of 32 pixels, as the paper's Dec3 takes them.
"""

import io
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dist_gsl.data.sources.base import ImageKind, Samples, Source, Task, check_split_names, fingerprint
from dist_gsl.data.sources.files import Files
from dist_gsl.data.sources.folders import chosen, class_folders
from dist_gsl.data.sources.grey import grey_square, in_grey
from dist_gsl.data.sources.rendered import ArraySamples

TRAIN, TEST = "case-insensitive-train.mat", "icdar2003-chars-test.mat"
SIZE: Final = 32
VAL_SHARE: Final = 0.05
"""Of the training samples of each class, that validate unless a number is asked for."""

_Classes = dict[str, list[NDArray[np.uint8]]]


def open_icdar(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
    files = Files(argument)
    folder = next((folder for folder in ("", "data/") if files.is_file(folder + TRAIN)), None)
    if folder is None:
        if not files.is_folder("train"):
            raise ValueError(f"data source {spec!r} needs {TRAIN} and {TEST}, or a folder train/ of class folders, in {files.address()}: neither is there")
        return in_grey(class_folders(spec, files, seed, counts), SIZE)
    if not files.is_file(folder + TEST):
        raise ValueError(f"{files.address(folder + TEST)} of data source {spec!r} is missing: put it beside {TRAIN}")
    check_split_names(counts, ["train", "val", "test"], spec=spec)
    released, test = _read(files, folder + TRAIN), _read(files, folder + TEST)
    unknown = sorted(set(test) - set(released))
    if unknown:
        raise ValueError(f"{files.address(folder + TEST)} has class {unknown[0]!r}, which {TRAIN} lacks: download both again")
    classes = sorted(released)
    train, val = _divided(released, classes, seed=seed, num_val=counts.get("val"), where=files.address(folder + TRAIN))
    splits: dict[str, Samples] = {}
    for number, (split, found) in enumerate((("train", train), ("val", val), ("test", [(i, c) for c, name in enumerate(classes) for i in test.get(name, [])]))):
        wanted = None if split == "val" else counts.get(split)
        kept = chosen(len(found), wanted, seed=seed, number=number, what=f"{split} of {files.address()} holds")
        splits[split] = ArraySamples(np.stack([found[i][0] for i in kept]), np.array([found[i][1] for i in kept], np.int64))
    return Source(
        spec=spec, kind=ImageKind.GREY, task=Task.CLASSIFICATION, classes=tuple(classes), num_targets=0, splits=splits,
        fingerprint=fingerprint(version=1, files=[list(entry) for entry in files.listing() if entry.name in (folder + TRAIN, folder + TEST)]),
    )  # fmt: skip


_Labelled = list[tuple[NDArray[np.uint8], int]]


def _divided(released: _Classes, classes: list[str], *, seed: int, num_val: int | None, where: str) -> tuple[_Labelled, _Labelled]:
    """Samples for training and for validation, each class in proportion."""
    total = sum(map(len, released.values()))
    share = VAL_SHARE if num_val is None else num_val / total
    if share >= 1:
        raise ValueError(f"{where} holds {total} images, no more than the {num_val} wanted for validation")
    train: _Labelled = []
    val: _Labelled = []
    ends = np.rint(np.cumsum([len(released[name]) for name in classes]) * share).astype(int)  # so that their sum is as asked
    if num_val is None and ends[-1] == 0:
        ends[:] = 1
    for label, name in enumerate(classes):
        count = int(ends[label] - (ends[label - 1] if label else 0))
        if num_val is None:
            count = min(count, len(released[name]) - 1)  # one is left to learn from
        drawn = set(np.random.default_rng([seed, 2, label]).permutation(len(released[name]))[: max(count, 0)].tolist())
        for number, image in enumerate(released[name]):
            (val if number in drawn else train).append((image, label))
    return train, val


def _read(files: Files, name: str) -> _Classes:
    """The images of each class, squares of `SIZE` pixels."""
    with files.open(name) as file:
        is_hdf5 = file.read(512)[:128].startswith(b"MATLAB 7.3") or (not file.seek(0) and file.read(8) == b"\x89HDF\r\n\x1a\n")
        file.seek(0)
        try:
            # Two containers go by this name: MATLAB's own, and HDF5 since its version 7.3.
            found: _Classes = {}
            for label, images in _hdf5(file) if is_hdf5 else _matlab(file):
                found.setdefault(label, []).extend(grey_square(image, SIZE) for image in images)
        except Exception as error:  # of two libraries, on what they do not expect
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{files.address(name)} is not a file of the released characters ({reason}): download it again") from error
    if not any(found.values()):
        raise ValueError(f"{files.address(name)} holds no image: download it again")
    return found


def _matlab(file: Any) -> Iterator[tuple[str, list[NDArray[Any]]]]:
    from scipy.io import loadmat

    ground_truth = loadmat(io.BytesIO(file.read()), variable_names=["gt"])["gt"][0, 0]
    for label, images in zip(ground_truth["labels"].ravel(), ground_truth["images"].ravel(), strict=True):
        yield str(np.asarray(label).ravel()[0]), [np.asarray(image) for image in images.ravel()]


def _hdf5(file: Any) -> Iterator[tuple[str, list[NDArray[Any]]]]:
    import h5py

    with h5py.File(file, "r") as content:
        ground_truth = content["gt"]
        for label, images in zip(ground_truth["labels"][()].ravel(), ground_truth["images"][()].ravel(), strict=True):
            name = "".join(chr(code) for code in content[label][()].ravel())
            yield name, [content[image][()].T for image in content[images][()].ravel()]  # MATLAB counts columns first
