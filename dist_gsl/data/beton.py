"""Writing a source as FFCV files (betons), with a description beside them.

A folder holds ``train.beton``, ``val.beton``, perhaps ``test.beton`` and ``test_fonts.beton``, and ``dataset.json``.
Every sample has four fields:

- ``image``: uint8 array (1, H, W) without loss where the source is grey; FFCV's RGB image, JPEG or raw, in colour;
- ``target``: an integer, the class; or a float32 array (K,) for regression;
- ``index``: an integer, the sample's position in its split, by which augmentation is seeded;
- ``checksum``: an integer, by which the loader knows that it reads what was written (see `writer.py`).
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_gsl.data import writer
from dist_gsl.data.checking import check, read_layout
from dist_gsl.data.info import DESCRIPTION, FORMAT_VERSION, DataError, DatasetInfo, SplitInfo, dataset_info
from dist_gsl.data.sources import ImageKind, Source, in_grey, open_source
from dist_gsl.data.writer import LARGEST_GREY, LARGEST_SIDE, SMALLEST_SIDE, Encoding, Layout, parts, write_split

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, samples done, samples in total)."""


def write(
    source: str,
    out_dir: str | Path,
    *,
    seed: int = 0,
    counts: Mapping[str, int] | None = None,
    max_side: int | None = 400,
    jpeg_quality: int = 90,
    jpeg_share: float = 0.5,
    as_is: bool = False,
    grey: int | None = None,
    on_bad: Literal["end", "skip"] = "end",
    num_workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Write the splits of a source as betons, and ``dataset.json`` beside them.

    Files appear under their names only when all of them are complete and every sample was read back and verified, so an error
    or an interruption leaves the data set of a folder as it was. What was written until then stays beside it, hidden, and the
    same call goes on with it; an image that cannot be used ends the call and leaves nothing. A folder that already holds the
    same data is left alone.

    Args:
        source: spec of a source, such as ``chars`` or ``imagefolder:/data/birds``.
        out_dir: folder to write to, made if missing.
        seed: seed of the source, >= 0.
        counts: number of samples of some splits, such as ``{"train": 2000}``.
        max_side: colour images are reduced until their longer side is at most this many pixels; None: they are not.
        jpeg_quality: quality of the images stored as JPEG, 1 to 100.
        jpeg_share: share of the colour images stored as JPEG, 0 to 1; the others are stored raw: larger, read faster.
        as_is: JPEG files that need no change are stored byte for byte.
        grey: colour images are stored as squares in grey with this side in pixels, one channel without loss; the settings above are then
            for nothing. None: in colour.
        on_bad: an image that cannot be used ends the call, or is left out and listed in ``dataset.json``.
        num_workers: processes that encode; threads where the source is a URI. The bytes of a file do not depend on it.
        progress: called now and then with (what is being done, samples done, samples in total).

    Returns:
        Path of the beton of each split, in the order of the source's splits.

    Raises:
        ValueError: unknown source, bad setting, or an image that cannot be used (named).
        OSError: no room is left, or the source cannot be read.
        RuntimeError: a process that wrote was killed.
    """
    if not 1 <= jpeg_quality <= 100:
        raise ValueError(f"jpeg_quality must be from 1 to 100, not {jpeg_quality}")
    if not 0.0 <= jpeg_share <= 1.0:
        raise ValueError(f"jpeg_share must be from 0 to 1, not {jpeg_share}")
    if max_side is not None and not SMALLEST_SIDE <= max_side <= LARGEST_SIDE:
        raise ValueError(f"max_side must be from {SMALLEST_SIDE} to {LARGEST_SIDE} pixels, not {max_side}")
    if grey is not None and not SMALLEST_SIDE <= grey <= LARGEST_GREY:
        raise ValueError(f"grey must be from {SMALLEST_SIDE} to {LARGEST_GREY} pixels, not {grey}")
    if on_bad not in ("end", "skip"):
        raise ValueError(f"on_bad must be 'end' or 'skip', not {on_bad!r}")
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, not {num_workers}")
    opened = open_source(source, seed=seed, counts=counts)
    if grey is not None:
        opened = in_grey(opened, grey)
    settings: dict[str, Any] = {
        "source": source,
        "seed": seed,
        "counts": {name: len(samples) for name, samples in opened.splits.items()},
        "fingerprint": opened.fingerprint,
    }
    if opened.kind is ImageKind.COLOUR:
        settings |= {"max_side": max_side, "jpeg_quality": jpeg_quality, "jpeg_share": jpeg_share, "as_is": as_is, "on_bad": on_bad}
    elif grey is not None:
        settings |= {"grey": grey, "on_bad": on_bad}

    directory = Path(out_dir)
    paths = {name: directory / f"{name}.beton" for name in opened.splits}
    if _is_current(directory, settings):
        return paths
    made_directory = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    encoding = Encoding(max_side=max_side, jpeg_quality=jpeg_quality, jpeg_share=jpeg_share, as_is=as_is, seed=seed)
    try:
        with locked(directory):
            # Whoever held the lock may have written the very same.
            if not _is_current(directory, settings):
                _write_splits(
                    directory, opened, settings, encoding=encoding, num_workers=num_workers, skip_bad=on_bad == "skip",
                    progress=progress if progress is not None else _no_progress,
                )  # fmt: skip
    except ValueError:
        if made_directory:
            with contextlib.suppress(OSError):  # not empty: someone else writes there
                directory.rmdir()
        raise
    return paths


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the folder against other processes that write to it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folder; files still appear whole
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def clear_parts(directory: Path, *, keep: frozenset[Path] = frozenset()) -> None:
    """Remove what a killed writer has left, but for some files; call it with the folder locked."""
    for path in directory.glob(".*.part"):
        if path not in keep:
            path.unlink(missing_ok=True)


def _write_splits(
    directory: Path, source: Source, settings: dict[str, Any], *, encoding: Encoding, num_workers: int, skip_bad: bool,
    progress: Progress,
) -> None:  # fmt: skip
    paths = {name: directory / f"{name}.beton" for name in source.splits}
    ours = frozenset(part for path in paths.values() for part in parts(path))
    clear_parts(directory, keep=ours)
    layouts, tallies, digests = {}, {}, {}
    try:
        for name, samples in source.splits.items():
            shape = samples.shape() if source.kind is ImageKind.GREY else (0, 0)
            layouts[name] = Layout(channels=source.kind.channels, shape=shape, num_targets=source.num_targets, encoding=encoding)
            key = json.dumps([FORMAT_VERSION, writer.VERSION, layouts[name].page_size, settings, name], sort_keys=True)
            digests[name], tallies[name] = write_split(
                paths[name], samples, layouts[name], key=hashlib.sha256(key.encode()).hexdigest(), num_workers=num_workers,
                skip_bad=skip_bad, progress=partial(progress, f"writing {name}"),
            )  # fmt: skip
    except ValueError:  # another call would find the same
        clear_parts(directory)
        raise
    splits = {}
    for name, path in paths.items():
        part = parts(path)[0]
        num_bytes = part.stat().st_size
        assert read_layout(part, num_bytes).num_samples == tallies[name].num_samples
        splits[name] = SplitInfo(
            file=path.name, num_samples=tallies[name].num_samples, num_bytes=num_bytes, sha256=digests[name],
            class_counts=_class_counts(part, len(source.classes)), skipped=tuple(tallies[name].skipped),
        )  # fmt: skip
    description = DatasetInfo(
        version=FORMAT_VERSION,
        source=source.spec,
        seed=encoding.seed,
        task=source.task,
        classes=source.classes,
        num_targets=source.num_targets,
        channels=source.kind.channels,
        size=_common_size(layouts) if source.kind is ImageKind.GREY else None,
        mean=tallies["train"].mean(),
        std=tallies["train"].std(),
        splits=splits,
        settings=settings,
    )
    _publish(directory, {path: parts(path)[0] for path in paths.values()}, description)
    clear_parts(directory)


def _class_counts(path: Path, num_classes: int) -> tuple[int, ...]:
    from dist_gsl.data import _ffcv

    if not num_classes:
        return ()
    labels = _ffcv.Reader(str(path)).metadata["f1"]
    return tuple(np.bincount(labels, minlength=num_classes).tolist())


def _common_size(layouts: Mapping[str, Layout]) -> int | None:
    shapes = {layout.shape for layout in layouts.values()}
    height, width = next(iter(shapes))
    return height if len(shapes) == 1 and height == width else None


def _is_current(directory: Path, settings: dict[str, Any]) -> bool:
    """Does the folder hold just that? By its description and its files' sizes: every sample is verified when it is read."""
    try:
        info = dataset_info(directory)
        if info.settings != settings:
            return False
        for split in info.splits.values():
            check(directory / split.file)
    except DataError:
        return False
    return True


def _publish(directory: Path, written: Mapping[Path, Path], description: DatasetInfo) -> None:
    """Give the files their names. The description goes first and comes last, so it never stands beside other files."""
    stale: set[str] = set()
    with contextlib.suppress(DataError):
        stale = {split.file for split in dataset_info(directory).splits.values()}
    (directory / DESCRIPTION).unlink(missing_ok=True)
    for path, part in written.items():
        os.replace(part, path)
    for file in stale - {split.file for split in description.splits.values()}:
        (directory / file).unlink(missing_ok=True)
    part = directory / f".{DESCRIPTION}.part"
    part.write_text(description.to_json(), encoding="utf-8")
    os.replace(part, directory / DESCRIPTION)


def _no_progress(what: str, done: int, total: int) -> None:
    """Where nobody listens."""
