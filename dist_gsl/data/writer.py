"""One split to one beton: encoded by many processes in blocks, appended by one, so that its bytes follow from its samples.

While it is written, three files lie beside the place where it will be:

- ``.NAME.part``: the beton itself, of which rows and data are there as far as it has come;
- ``.NAME.sizes.part``: the number of bytes of each sample's image, uint64;
- ``.NAME.journal.part``: a line of JSON for each block that is wholly in the other two.

Whoever is interrupted goes on after the last line of the journal. A sample's checksum is in its row: CRC-32 of its image's bytes,
then of its target's where that is an array, then of the row before the checksum. Every reader verifies it.
"""

import contextlib
import ctypes
import json
import math
import multiprocessing
import os
import signal
import zlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from dist_gsl.data import images, native
from dist_gsl.data.info import JPEG, RAW, SMALLEST_PAGE, DataError, Skipped
from dist_gsl.data.sources import Samples

LARGEST_PAGE: Final = 1 << 31
SMALLEST_SIDE: Final = 8
"""Pixels; a region needs some to be chosen from."""
VERSION: Final = 2
"""Of how samples become bytes: what another version began is not gone on with."""
LARGEST_SIDE: Final = 65_535
"""FFCV stores sides as 16-bit numbers."""
LARGEST_JPEG: Final = 1 << 25
"""Bytes of an image, where all are JPEGs of any size."""
LARGEST_GREY: Final = 4096
"""Pixels of a side of images in grey, all of which are as large."""
_ROWS_AT_ONCE: Final = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How colour images are stored."""

    max_side: int | None
    """Larger images are reduced until their longer side has so many pixels; None: they are not."""
    jpeg_quality: int
    jpeg_share: float
    """Share of the images that are stored as JPEG; the others are stored raw."""
    as_is: bool
    """Files that are JPEGs and need no change are stored byte for byte."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the samples of a file have in common."""

    channels: int
    """1: arrays, all of one shape; 3: FFCV's RGB images."""
    shape: tuple[int, int]
    """(height, width) of grey images."""
    num_targets: int
    """Numbers of a target that is an array; 0: it is a class."""
    encoding: Encoding

    @property
    def page_size(self) -> int:
        """A power of two into which the largest sample goes."""
        largest = math.prod(self.shape)
        if self.channels == 3:
            # A JPEG of noise at full quality is larger than the pixels themselves. Small pages mix better in quasi-random order.
            side, all_jpeg = self.encoding.max_side, self.encoding.jpeg_share == 1.0
            largest = 6 * (side or 4096) ** 2 + 4096 if side or not all_jpeg else LARGEST_JPEG
        page_size = SMALLEST_PAGE
        while page_size < largest + 4 * self.num_targets:
            page_size *= 2
        if page_size > LARGEST_PAGE:
            raise ValueError(f"images of up to {largest} bytes are too large for a beton: choose a smaller max_side")
        return page_size


@dataclass
class Tally:
    """What is known of the samples that were written."""

    num_read: int = 0
    num_samples: int = 0
    end: int = 0
    """Where in the file the next sample may begin."""
    sums: list[int] = field(default_factory=list)
    """Of the levels of each channel, 0 to 255."""
    squares: list[int] = field(default_factory=list)
    num_pixels: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    def mean(self) -> tuple[float, ...]:
        """Of each channel, levels in 0..1."""
        return tuple(total / self.num_pixels / 255 for total in self.sums)

    def std(self) -> tuple[float, ...]:
        """Of each channel; 1 for one that never changes, which would be divided by zero."""
        variances = [square / self.num_pixels / 255**2 - mean**2 for square, mean in zip(self.squares, self.mean(), strict=True)]
        return tuple(math.sqrt(variance) if variance > 1e-12 else 1.0 for variance in variances)


# --- encoding, in any process


@dataclass
class Block:
    """Some samples, one after another, as they are stored."""

    num_read: int
    modes: list[int]
    sides: list[tuple[int, int]]
    """(height, width)."""
    contents: list[bytes]
    checksums: list[int]
    """Of the images' bytes and those of their targets, where these are arrays."""
    targets: list[Any]
    sums: list[int]
    squares: list[int]
    num_pixels: int
    skipped: list[Skipped]


def encode_block(samples: Samples, start: int, stop: int, *, layout: Layout, skip_bad: bool) -> Block:
    """The samples from `start` to `stop`. `ValueError`, with its name, for an image that cannot be used, unless it is skipped."""
    block = Block(stop - start, [], [], [], [], [], [0] * layout.channels, [0] * layout.channels, 0, [])
    for position in range(start, stop):
        try:
            content, target = samples.read(position)
            mode, pixels, stored = _encoded(content, position, layout)
        except images.BadImageError as error:
            name = samples.describe(position)
            if not skip_bad:
                raise ValueError(f"image {name} {error}: repair it, take it out, or leave such images out by --on-bad skip") from error
            block.skipped.append(Skipped(name=name, reason=str(error)))
            continue
        checksum = zlib.crc32(stored)
        if layout.num_targets:
            checksum = zlib.crc32(_target_bytes(target), checksum)
        block.modes.append(mode)
        block.sides.append((pixels.shape[0], pixels.shape[1]))
        block.contents.append(stored)
        block.checksums.append(checksum)
        block.targets.append(target)
        # Sums of bytes are exact in integers, so they do not depend on the order of summation.
        for channel, (total, squares) in enumerate(zip(*native.moments(pixels), strict=True)):
            block.sums[channel] += total
            block.squares[channel] += squares
        block.num_pixels += pixels.shape[0] * pixels.shape[1]
    return block


def _encoded(content: NDArray[np.uint8] | bytes, position: int, layout: Layout) -> tuple[int, NDArray[np.uint8], bytes]:
    """(mode, the pixels that are stored before they are compressed, the bytes)."""
    is_plain = is_grey = False
    if isinstance(content, bytes):
        pixels, is_plain, is_grey = images.decode(content)
    else:
        pixels = content
    height, width = pixels.shape[:2]
    if layout.channels == 1:
        if (height, width) != layout.shape:
            raise images.BadImageError(f"of {width} x {height} pixels is not as large as the first one of its split")
        return RAW, pixels, pixels.tobytes()
    encoding = layout.encoding
    scale = 1.0 if encoding.max_side is None else min(1.0, encoding.max_side / max(height, width))
    if min(height, width) * scale < SMALLEST_SIDE:
        most = f" when the longer one has at most {encoding.max_side}" if scale < 1.0 else ""
        raise images.BadImageError(
            f"of {width} x {height} pixels is too small or too narrow: its shorter side must have at least {SMALLEST_SIDE} pixels{most}"
        )
    if max(height, width) * scale > LARGEST_SIDE:
        raise images.BadImageError(f"of {width} x {height} pixels is too large: choose a max_side of at most {LARGEST_SIDE}")
    if scale < 1.0:
        size = (max(SMALLEST_SIDE, int(width * scale)), max(SMALLEST_SIDE, int(height * scale)))
        pixels = native.resize(pixels, width=size[0], height=size[1])
    # A draw by sample gives the same file however many processes write it.
    draw = np.random.default_rng([encoding.seed, position]).random()
    if draw >= encoding.jpeg_share:
        mode, stored = RAW, pixels.tobytes()
    elif encoding.as_is and is_plain and scale == 1.0 and isinstance(content, bytes):
        mode, stored = JPEG, content
    else:
        mode, stored = JPEG, images.as_jpeg(pixels, quality=encoding.jpeg_quality, is_grey=is_grey)
    if len(stored) > layout.page_size - 4 * layout.num_targets:
        raise images.BadImageError(f"takes {len(stored)} bytes, more than the {layout.page_size} of a page: choose a smaller max_side")
    return mode, pixels, stored


def _target_bytes(target: Any) -> bytes:
    return np.ascontiguousarray(target, np.float32).tobytes()


_PR_SET_PDEATHSIG: Final = 1  # of Linux's prctl


def _work(commands: Connection, samples: Samples, layout: Layout, skip_bad: bool, parent: int) -> None:
    """What a process does that was forked to encode: from each (start, stop) it is given to a block, or to what was raised."""
    # Who gives the work says when it ends: it is killed, with its terminal's Ctrl-C and its own handlers left to its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    while True:
        start, stop = commands.recv()
        result: Block | BaseException
        try:
            result = encode_block(samples, start, stop, layout=layout, skip_bad=skip_bad)
        except BaseException as error:
            result = error
        commands.send(result)


class _Processes:
    """Forked processes that encode spans in turn. Each has a pipe of its own, whose other end no third one holds: one that is killed
    in the middle of a block is the end of its pipe, and nobody waits for the rest."""

    def __init__(self, samples: Samples, layout: Layout, *, num_workers: int, skip_bad: bool) -> None:
        context = multiprocessing.get_context("fork")
        self._workers: list[tuple[Any, Connection]] = []
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, samples, layout, skip_bad, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def encoded(self, spans: Sequence[tuple[int, int]]) -> Generator[Block, None, None]:
        try:
            for ahead in range(min(_BLOCKS_AHEAD * len(self._workers), len(spans))):
                self._pipe(ahead).send(spans[ahead])
            for number in range(len(spans)):
                result = self._pipe(number).recv()
                if isinstance(result, BaseException):
                    raise result
                ahead = number + _BLOCKS_AHEAD * len(self._workers)
                if ahead < len(spans):
                    self._pipe(ahead).send(spans[ahead])
                yield result
        except (EOFError, ConnectionError) as error:
            raise RuntimeError("a process that wrote the data set ended early (was it killed, or out of memory?)") from error
        finally:
            for process, pipe in self._workers:
                process.kill()
                pipe.close()
            for process, _ in self._workers:
                process.join()

    def _pipe(self, number: int) -> Connection:
        return self._workers[number % len(self._workers)][1]


_BLOCKS_AHEAD: Final = 2
"""Given to each process at most."""


def _blocks(
    samples: Samples, layout: Layout, first: int, *, num_workers: int, skip_bad: bool
) -> Generator[Block, None, None]:
    """Blocks from sample `first` on, in order; a bounded number of them is encoded ahead."""
    spans = [(start, min(start + samples.block, len(samples))) for start in range(first, len(samples), samples.block)]
    if num_workers == 1 or len(spans) <= 1:
        for start, stop in spans:
            yield encode_block(samples, start, stop, layout=layout, skip_bad=skip_bad)
        return
    if samples.may_fork:
        yield from _Processes(samples, layout, num_workers=num_workers, skip_bad=skip_bad).encoded(spans)
        return
    waiting = deque(spans)
    with ThreadPoolExecutor(num_workers) as pool:
        encode = partial(encode_block, samples, layout=layout, skip_bad=skip_bad)
        running = deque(pool.submit(encode, *waiting.popleft()) for _ in range(min(_BLOCKS_AHEAD * num_workers, len(waiting))))
        try:
            while running:
                block = running.popleft().result()
                if waiting:
                    running.append(pool.submit(encode, *waiting.popleft()))
                yield block
        finally:
            for future in running:
                future.cancel()


# --- the file


class _File:
    """The file of a split while it is written, and the two beside it."""

    def __init__(self, path: Path, samples: Samples, layout: Layout, key: str) -> None:
        from dist_gsl.data import _ffcv

        self.path, self._layout = path, layout
        self.part, self.sizes_part, self.journal_part = parts(path)
        image: Any = _ffcv.RGBImageField() if layout.channels == 3 else _ffcv.NDArrayField(np.dtype(np.uint8), (1, *layout.shape))
        target: Any = _ffcv.NDArrayField(np.dtype(np.float32), (layout.num_targets,)) if layout.num_targets else _ffcv.IntField()
        self._fields = {"image": image, "target": target, "index": _ffcv.IntField(), "checksum": _ffcv.IntField()}
        self.row_type = _ffcv.get_metadata_type(list(self._fields.values()))
        self._head = _ffcv.head(self._fields, page_size=layout.page_size)
        self._rows_start = len(self._head)
        first_page = -(-(self._rows_start + len(samples) * self.row_type.itemsize) // layout.page_size)
        self.tally = Tally(end=first_page * layout.page_size, sums=[0] * layout.channels, squares=[0] * layout.channels)
        self._key = key
        self.is_whole = False

    def open(self) -> None:
        """Go on after the last block of the journal, if it is of the very same samples and settings."""
        lines = self._journal()
        if lines[:1] != [{"key": self._key}] or not self.part.exists() or not self.sizes_part.exists():
            for file in (self.part, self.sizes_part, self.journal_part):
                file.unlink(missing_ok=True)
            self.part.write_bytes(self._head)
            self.sizes_part.write_bytes(b"")
            lines = [{"key": self._key}]
        num_bytes, num_sizes = self.part.stat().st_size, self.sizes_part.stat().st_size // 8
        kept = lines[:1]
        for line in lines[1:]:
            if "sha256" in line:
                self.is_whole = True
            elif line["end"] > num_bytes or line["num_samples"] > num_sizes:  # its end was lost with the power
                break
            else:
                skipped = [*self.tally.skipped, *(Skipped(**each) for each in line["skipped"])]
                self.tally = Tally(**{**line, "skipped": skipped})
            kept.append(line)
        if not self.is_whole:
            os.truncate(self.sizes_part, 8 * self.tally.num_samples)
        # What a killed writer has begun of a line is written over.
        self.journal_part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def _journal(self) -> list[dict[str, Any]]:
        if not self.journal_part.exists():
            return []
        lines = []
        for text in self.journal_part.read_text(encoding="utf-8").splitlines(keepends=True):
            if not text.endswith("\n"):
                break
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        return lines

    def append(self, block: Block, data: BinaryIO, sizes: BinaryIO, journal: BinaryIO) -> None:
        tally, count = self.tally, len(block.contents)
        rows = np.zeros(count, self.row_type)
        image, target, index, checksum = (rows[name] for name in self.row_type.names or ())
        offset, page_size = (self.row_type.fields or {})["f3"][1], self._layout.page_size
        pieces: list[tuple[int, list[bytes]]] = []
        for number, content in enumerate(block.contents):
            regions = [content] + ([_target_bytes(block.targets[number])] if self._layout.num_targets else [])
            size = sum(map(len, regions))
            if tally.end % page_size + size > page_size:  # nothing lies on two pages
                tally.end = -(-tally.end // page_size) * page_size
                pieces.append((tally.end, []))
            if not pieces:
                pieces.append((tally.end, []))
            pieces[-1][1].extend(regions)
            if self._layout.channels == 3:
                height, width = block.sides[number]
                image[number] = (block.modes[number], width, height, tally.end)
            else:
                image[number] = tally.end
            target[number] = tally.end + len(content) if self._layout.num_targets else block.targets[number]
            index[number] = tally.num_samples + number
            checksum[number] = zlib.crc32(rows[number : number + 1].tobytes()[:offset], block.checksums[number])
            tally.end += size
        for start, regions in pieces:
            data.seek(start)
            data.write(b"".join(regions))
        data.seek(self._rows_start + tally.num_samples * self.row_type.itemsize)
        data.write(rows.tobytes())
        sizes.write(np.array([len(content) for content in block.contents], np.uint64).tobytes())
        tally.num_read += block.num_read
        tally.num_samples += count
        tally.sums = [a + b for a, b in zip(tally.sums, block.sums, strict=True)]
        tally.squares = [a + b for a, b in zip(tally.squares, block.squares, strict=True)]
        tally.num_pixels += block.num_pixels
        tally.skipped += block.skipped
        data.flush()
        sizes.flush()
        line = {**vars(tally), "skipped": [vars(each) for each in block.skipped]}
        journal.write(json.dumps(line).encode() + b"\n")
        journal.flush()

    def finish(self) -> str:
        """The table of what is where, and the header, which makes it a beton; its checksum, once every sample was verified."""
        from dist_gsl.data import _ffcv
        from dist_gsl.data.checking import sha256_of, verify

        tally = self.tally
        sizes = np.fromfile(self.sizes_part, np.uint64)
        num_regions = 2 if self._layout.num_targets else 1
        with self.part.open("r+b") as data:
            data.truncate(tally.end)  # what a killed writer wrote of a block that is not in the journal
            for start in range(0, tally.num_samples, _ROWS_AT_ONCE):
                stop = min(start + _ROWS_AT_ONCE, tally.num_samples)
                data.seek(self._rows_start + start * self.row_type.itemsize)
                rows = np.frombuffer(data.read((stop - start) * self.row_type.itemsize), self.row_type)
                table = np.zeros((stop - start, num_regions), _ffcv.ALLOC_TABLE_TYPE)
                table["sample_id"] = np.arange(start, stop)[:, None]
                table["ptr"][:, 0] = rows["f0"]["data_ptr"] if self._layout.channels == 3 else rows["f0"]
                table["size"][:, 0] = sizes[start:stop]
                if num_regions == 2:
                    table["ptr"][:, 1], table["size"][:, 1] = rows["f1"], 4 * self._layout.num_targets
                data.seek(0, os.SEEK_END)
                data.write(table.tobytes())
            data.seek(0)
            data.write(_ffcv.header(len(self._fields), self._layout.page_size, tally.num_samples, tally.end))
            data.flush()
            os.fsync(data.fileno())
        with ThreadPoolExecutor(1) as other:
            hashing = other.submit(sha256_of, self.part)
            try:
                verify(self.part)
            except DataError as error:
                for file in parts(self.path):
                    file.unlink(missing_ok=True)
                raise DataError(f"{self.path} did not come to the disk as it was written ({error}): is the disk well? write it again") from None
            digest = hashing.result()
        with self.journal_part.open("ab") as journal:
            journal.write(json.dumps({"sha256": digest}).encode() + b"\n")
        self.is_whole = True
        return digest

    def digest(self) -> str:
        return next(line["sha256"] for line in self._journal() if "sha256" in line)


def parts(path: Path) -> tuple[Path, Path, Path]:
    """The three files beside a beton while it is written: its own content, sizes, journal."""
    part, sizes, journal = (path.with_name(f".{path.name}{kind}.part") for kind in ("", ".sizes", ".journal"))
    return part, sizes, journal


def write_split(
    path: Path,
    samples: Samples,
    layout: Layout,
    *,
    key: str,
    num_workers: int,
    skip_bad: bool,
    progress: Callable[[int, int], None],
) -> tuple[str, Tally]:
    """Write a split to the first of `parts(path)`, or go on with it where `key` is that of the one that is there.

    Returns its sha256 and what is known of its samples.

    Raises:
        ValueError: an image that cannot be used (named), or none that can.
        OSError: the disk is full, or the source cannot be read. What was written stays, to go on with.
        RuntimeError: a process that wrote was killed. Likewise.
    """
    file = _File(path, samples, layout, key)
    file.open()
    if file.is_whole:
        return file.digest(), file.tally
    progress(file.tally.num_read, len(samples))
    with file.part.open("r+b") as data, file.sizes_part.open("ab") as sizes, file.journal_part.open("ab") as journal:
        blocks = _blocks(samples, layout, file.tally.num_read, num_workers=num_workers, skip_bad=skip_bad)
        with contextlib.closing(blocks):
            for block in blocks:
                file.append(block, data, sizes, journal)
                progress(file.tally.num_read, len(samples))
    if file.tally.num_samples == 0:
        raise ValueError(f"no image of {path.stem} can be used: the first, {file.tally.skipped[0].name}, {file.tally.skipped[0].reason}")
    return file.finish(), file.tally
