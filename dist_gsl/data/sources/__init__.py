"""Where images come from. A source is named by a spec string: ``chars``, or ``imagefolder:PATH``. `SOURCES` lists them; a PATH may be
a URI that pyarrow opens."""

from collections.abc import Callable, Mapping
from typing import Final

from dist_gsl.data.sources.base import ImageKind, Sample, Samples, Source, Task
from dist_gsl.data.sources.folders import open_class_folders
from dist_gsl.data.sources.grey import in_grey
from dist_gsl.data.sources.icdar import open_icdar
from dist_gsl.data.sources.imagenet import open_imagenet
from dist_gsl.data.sources.parquet import open_parquet
from dist_gsl.data.sources.places import open_places
from dist_gsl.data.sources.rendered import open_chars, open_digits, open_rotated_digits
from dist_gsl.data.sources.webdataset import open_webdataset

__all__ = ["SOURCES", "ImageKind", "Sample", "Samples", "Source", "Task", "in_grey", "open_source"]


def open_source(spec: str, *, seed: int = 0, counts: Mapping[str, int] | None = None) -> Source:
    """Open the source named by `spec`.

    Args:
        spec: one of `SOURCES`, such as ``chars`` or ``imagefolder:/data/birds``.
        seed: seed of what the source renders, and of what it draws from larger sets.
        counts: number of samples of some splits; the others keep the source's own number.

    Raises:
        ValueError: unknown source, unknown split, a count that cannot be had, a folder that is not as it should be.
    """
    name, colon, argument = spec.partition(":")
    if name not in _OPENERS:
        raise ValueError(f"unknown data source {spec!r}: choose one of {', '.join(SOURCES)}")
    wants_path = SOURCES_BY_NAME[name].endswith(":PATH")
    if wants_path and not argument:
        raise ValueError(f"data source {name!r} needs a folder: write {SOURCES_BY_NAME[name]}")
    if colon and not wants_path:
        raise ValueError(f"data source {name!r} takes no argument: write {name!r} instead of {spec!r}")
    if seed < 0:
        raise ValueError(f"the seed of a data source must be >= 0, not {seed}")
    for split, count in (counts or {}).items():
        if count < 1:
            raise ValueError(f"the number of {split} samples must be at least 1, not {count}")
    return _OPENERS[name](spec, argument, seed, dict(counts or {}))


_Opener = Callable[[str, str, int, dict[str, int]], Source]

_OPENERS: Final[dict[str, _Opener]] = {
    "chars": open_chars,
    "digits": open_digits,
    "rotated-digits": open_rotated_digits,
    "imagefolder": open_class_folders,
    "imagenet": open_imagenet,
    "places2": open_places,
    "icdar": open_icdar,
    "parquet": open_parquet,
    "webdataset": open_webdataset,
}

SOURCES: Final[dict[str, str]] = {
    "chars": "36 classes of rendered scene-text characters, 32x32 grey",
    "digits": "the 10 classes of real handwritten digits of scikit-learn, 32x32 grey",
    "rotated-digits": "regression: the angle by which a real handwritten digit was turned",
    "imagefolder:PATH": "a folder PATH/train/CLASS/*.jpg, PATH/val/CLASS/*.jpg and perhaps PATH/test, in colour",
    "imagenet:PATH": "ImageNet: the official archives as downloaded, or class folders",
    "places2:PATH": "Places2 (365 or 401 classes): the released lists and images, or class folders",
    "parquet:PATH": "Parquet shards train-*.parquet, val-*.parquet with an image's bytes and a label in each row",
    "webdataset:PATH": "tar shards train-*.tar, val-*.tar with NAME.jpg and NAME.cls",
    "icdar:PATH": "ICDAR characters, 32x32 grey: the files of Jaderberg et al., or class folders",
}
"""How each source is written, and what it is."""

SOURCES_BY_NAME: Final = {spec.partition(":")[0]: spec for spec in SOURCES}
