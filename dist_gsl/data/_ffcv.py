"""FFCV's format and its loader, in one place: a reader of given batches whose errors surface and whose samples are verified.

FFCV's own loader waits for ever when its thread raises. This module is the only one that imports ffcv when it is loaded, so import
it inside functions.
"""
# ruff: noqa: E402

import contextlib
import math
import mmap
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

import numba
import numba.typed
import numpy as np
import torch
from numpy.typing import NDArray

_torch_threads = torch.get_num_threads()  # importing ffcv sets it to 1
# ffcv keeps the numbers of two image modes in one of numba's dictionaries, which only Python reads: compiling it took
# five seconds of every process that was started.
_typed_dict, numba.typed.Dict = numba.typed.Dict, dict
# Importing ffcv starts numba's threads, which nobody needs here. Those of TBB wait for ever when a process ends that has one core and has
# started another by fork: the task that they wait for was lost with their pool.
_numba_config: Any = numba.config
_numba_config.THREADING_LAYER_PRIORITY = ["omp", "workqueue", "tbb"]

from ffcv.fields import FloatField, IntField, NDArrayField, RGBImageField
from ffcv.fields.base import Field
from ffcv.fields.basics import IntDecoder
from ffcv.fields.ndarray import NDArrayDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader as FfcvLoader
from ffcv.loader import loader as ffcv_loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers import OSCacheManager
from ffcv.memory_managers.os_cache import OSCacheContext
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.graph import Node
from ffcv.pipeline.state import State
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, TYPE_ID_HANDLER, FieldDescType, HeaderType, get_metadata_type

torch.set_num_threads(_torch_threads)
numba.typed.Dict = _typed_dict

from dist_gsl.data import native
from dist_gsl.data.checking import damaged

__all__ = [
    "ALLOC_TABLE_TYPE",
    "CURRENT_VERSION",
    "SCALAR_FIELDS",
    "TYPE_ID_HANDLER",
    "BatchReader",
    "Field",
    "FieldDescType",
    "HeaderType",
    "IntField",
    "NDArrayField",
    "RGBImageField",
    "Reader",
    "Stored",
    "get_metadata_type",
    "head",
    "header",
]

_POLL_SECONDS: Final = 0.05
_BATCHES_AHEAD: Final = 2
_FETCHED_AT_ONCE: Final = 1 << 17
"""Bytes; of more the system would read only the beginning."""
_MOST_FREE: Final = 8
"""Buffers that are kept for later batches."""


SCALAR_FIELDS: Final = (IntField, FloatField)
"""Fields kept in the metadata of a sample, outside the pages."""


def head(fields: Mapping[str, Field], *, page_size: int) -> bytes:
    """The beginning of a beton that is not finished: a header without samples, and what the fields are."""
    described = np.zeros(len(fields), FieldDescType)
    type_ids = {handler: number for number, handler in TYPE_ID_HANDLER.items()}
    for row, (name, handler) in zip(described, fields.items(), strict=True):
        row["type_id"] = type_ids[type(handler)]
        row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        row["arguments"][:] = handler.to_binary()[0]
    return header(len(fields), page_size, 0, 0) + described.tobytes()


def header(num_fields: int, page_size: int, num_samples: int, table: int) -> bytes:
    """table: where the table of what is stored where begins."""
    made = np.zeros(1, HeaderType)
    made["version"], made["num_fields"], made["page_size"] = CURRENT_VERSION, num_fields, page_size
    made["num_samples"], made["alloc_table_ptr"] = num_samples, table
    return made.tobytes()


class Stored:
    """A beton's samples as they are stored: what a decoder needs, whichever way it is called.

    settings: the part of `native.SETTINGS` that follows from the file.
    """

    def __init__(self, reader: Reader) -> None:
        self.rows = reader.metadata
        order = np.argsort(reader.alloc_table["ptr"], kind="stable")
        self.ptrs = np.ascontiguousarray(reader.alloc_table["ptr"][order])
        self.sizes = np.ascontiguousarray(reader.alloc_table["size"][order])
        fields = list(reader.handlers.items())
        self.is_colour = isinstance(fields[0][1], RGBImageField)
        self.pointers = self.rows["f0"]["data_ptr"] if self.is_colour else self.rows["f0"]
        places = np.searchsorted(self.ptrs, self.pointers).clip(max=len(self.ptrs) - 1)
        # Nothing is where no entry of the table begins.
        self.image_sizes = np.where(self.ptrs[places] == self.pointers, self.sizes[places], np.uint64(0)).astype(np.uint64)
        if not self.is_colour:
            wrong = np.flatnonzero(self.image_sizes != np.uint64(fields[0][1].element_size))
            if len(wrong):
                raise damaged(reader.file_name, int(wrong[0]), native.REASONS[4])
        self.settings: dict[str, int] = {}
        for number, (name, handler) in enumerate(fields):
            offset = self.rows.dtype.fields[f"f{number}"][1]
            if name == "target" and isinstance(handler, NDArrayField):
                self.settings |= {"target_offset": offset, "target_bytes": int(handler.element_size)}
            if name == "checksum":
                self.settings["checksum_offset"] = offset


_SETTINGS_PLACE: Final = 4
"""Of the settings, in what compiled code is given."""
_CodeKey = tuple[bool, bool, bool]
_compiled: dict[_CodeKey, Any] = {}
_compiling = threading.Lock()


class _Context(OSCacheContext):
    """What compiled code is given with every batch: FFCV's map of the file and table, and what our decoder needs besides."""

    manager: "_CacheManager"

    @property
    def state(self) -> tuple[Any, ...]:
        manager = self.manager
        return (self.mmap, manager.ptrs, manager.sizes, manager.stored.image_sizes, manager.settings, manager.bad_sample)


class _CacheManager(OSCacheManager):
    """FFCV's memory map without its dictionaries of all samples, which take kilobytes a sample and minutes for millions.

    Its reading function depends on nothing of the file: compiled once a process.
    """

    _read: Any = None

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.stored = Stored(reader)
        self.ptrs, self.sizes = self.stored.ptrs, self.stored.sizes
        self.settings = np.zeros(native.SETTINGS.itemsize, np.uint8)
        self.bad_sample = np.zeros(1, np.uint64)
        self.context = _Context(self)

    @property
    def state_type(self) -> Any:
        u64, u8 = numba.uint64[::1], numba.uint8[::1]
        return numba.types.Tuple([*super().state_type.types, u64, u8, u64])

    def compile_reader(self) -> Any:
        if _CacheManager._read is None:
            _CacheManager._read = super().compile_reader()
        return _CacheManager._read


ffcv_loader.OSCacheManager = _CacheManager


def _batch_code(function: Any) -> Callable[..., Any]:
    """FFCV's code of an operation that hands a whole batch to one of our functions."""

    def run(positions: Any, destination: Any, metadata: Any, state: Any) -> Any:
        status = function(
            state[0].ctypes.data, state[0].size, metadata.ctypes.data, metadata.strides[0], state[3].ctypes.data,
            positions.ctypes.data, positions.size, state[4].ctypes.data, destination.ctypes.data, state[5].ctypes.data,
        )  # fmt: skip
        # Compiled code raises constants only.
        if status == 1:
            raise ValueError(1)
        if status == 2:
            raise ValueError(2)
        if status == 3:
            raise ValueError(3)
        if status == 4:
            raise ValueError(4)
        if status == 5:
            raise ValueError(5)
        return destination[: len(positions)]

    return run


class _RegionDecoder(SimpleRGBImageDecoder):
    """FFCV's operation that reads images, by our decoder: regions drawn by sample, only what is in them decoded.

    It decodes to a buffer of ours, whose address is in the settings; FFCV's own memory is a byte, so its size is compiled nowhere.
    """

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (1,), np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        return _batch_code(native.library().dist_gsl_decode)


class _ArrayReader(NDArrayDecoder):
    """FFCV's operation that copies arrays, with their checksums verified."""

    def generate_code(self) -> Callable[..., Any]:
        return _batch_code(native.library().dist_gsl_copy)


class _Loader(FfcvLoader):
    """FFCV's loader, compiled once a process for all files that are decoded in the same way.

    Compiling takes seconds, and numba fails now and then when compiled code is collected.
    """

    def __init__(self, path: str, *, code_key: _CodeKey, **options: Any) -> None:
        self._code_key = code_key
        self.code: Any = None
        with _compiling:
            # Compiled code names its arguments by the numbers of the graph's nodes: count from 0 in every graph.
            Node.last_node_id = 0
            super().__init__(path, **options)

    def generate_code(self) -> None:
        if self._code_key not in _compiled:
            super().generate_code()
            _compiled[self._code_key] = self.code
        self.code = _compiled[self._code_key]


class _Buffers:
    """Memory for batches, used again once nobody holds it: the system clears fresh memory, which takes as long as copying."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        wanted = math.prod(shape)
        try:
            memory = self._free.pop()
        except IndexError:  # asked for first, another epoch's thread may take the last one meanwhile
            memory = np.empty(0, np.uint8)
        if memory.size < wanted:
            memory = np.empty(wanted, np.uint8)
        # Views keep this array alive and not only the memory, since the memoryview between them is no array.
        taken = np.frombuffer(memory.data[:wanted], np.uint8)
        weakref.finalize(taken, self._give_back, memory).atexit = False
        return taken.reshape(shape)

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        if len(self._free) < _MOST_FREE:
            self._free.append(memory)


class _Epoch(EpochIterator):
    """FFCV's reading thread; what it raises is kept and raised where the batches are consumed.

    buffers: for images of `size` pixels a side, instead of FFCV's own memory; None where images are arrays.
    windows: where in `order` each part begins that is fetched from the disk before it is read; none: nothing is.
    """

    error: BaseException | None = None

    def __init__(
        self, loader: FfcvLoader, order: NDArray[np.uint64], *, buffers: _Buffers | None, size: int, windows: NDArray[np.int64]
    ) -> None:
        self._buffers, self._size = buffers, size
        # Each is fetched when the one before it is begun.
        begins = [0, *(windows[:-1] // loader.batch_size).tolist()]
        self._to_fetch = deque(zip(begins, np.split(order, windows[1:]), strict=True) if len(windows) else [])
        self._fetcher = ThreadPoolExecutor(1)  # since asking takes as long as the disk's queue is full
        super().__init__(loader, order)

    def _fetch(self, positions: NDArray[np.uint64]) -> None:
        """Asks the system to read these images, in the order of the disk, while others are decoded."""
        stored = self.loader.memory_manager.stored
        ordered = np.sort(positions)
        starts = stored.pointers[ordered].astype(np.int64)
        ends = starts + stored.image_sizes[ordered].astype(np.int64)
        is_inside = (starts >= 0) & (ends <= self.memory_context.mmap.size)  # others are named when they are read
        starts, ends = starts[is_inside], ends[is_inside]
        if len(starts) == 0:
            return
        is_first = np.concatenate([[True], starts[1:] - ends[:-1] >= mmap.PAGESIZE])  # neighbours are asked for together
        is_last = np.concatenate([is_first[1:], [True]])
        self._fetcher.submit(self._advise, list(zip(starts[is_first].tolist(), ends[is_last].tolist(), strict=True)))

    def _advise(self, pieces: list[tuple[int, int]]) -> None:
        with open(self.loader.fname, "rb") as file:
            for start, end in pieces:
                for place in range(start, end, _FETCHED_AT_ONCE):
                    if self.terminate_event.is_set():
                        return
                    os.posix_fadvise(file.fileno(), place, min(_FETCHED_AT_ONCE, end - place), os.POSIX_FADV_WILLNEED)

    def run_pipeline(self, number: int, positions: NDArray[np.uint64], *others: Any) -> tuple[Any, ...]:
        if self.terminate_event.is_set():  # FFCV would look at it only where the queue is full, which `stop` keeps empty
            raise StopIteration
        while self._to_fetch and self._to_fetch[0][0] <= number:
            self._fetch(self._to_fetch.popleft()[1])
        if self._buffers is None:
            return super().run_pipeline(number, positions, *others)
        images = self._buffers.take((len(positions), self._size, self._size, 3))
        self.storage_state[_SETTINGS_PLACE].view(native.SETTINGS)["out"] = images.ctypes.data
        _, *rest = super().run_pipeline(number, positions, *others)
        return (images, *rest)

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.error = error
            self.output_queue.put(None)

    def stop(self) -> None:
        """End the thread. It may be waiting for room in the queue, so make room until it is gone."""
        self.terminate_event.set()
        while self.is_alive():
            with contextlib.suppress(queue.Empty):
                self.output_queue.get(timeout=_POLL_SECONDS)
        self._fetcher.shutdown(cancel_futures=True)
        self.close()


class BatchReader:
    """Reads batches of given positions from a beton through FFCV, decoding ahead in a thread of its own.

    Args:
        path: the beton, already checked.
        batch_size: number of samples of every batch but, perhaps, the last.
        is_colour: are images FFCV's own in colour, and no arrays?
        target_is_array: is the target a vector of numbers and no class?
        has_checksum: has every sample a checksum, as those that we write have?
    """

    def __init__(
        self, path: str, *, batch_size: int, is_colour: bool, target_is_array: bool, has_checksum: bool
    ) -> None:
        image = _RegionDecoder() if is_colour else _ArrayReader()
        target = NDArrayDecoder() if target_is_array else IntDecoder()
        pipelines = {"image": [image], "target": [target], "index": [IntDecoder()]}
        self._buffers = _Buffers() if is_colour else None
        torch_threads = torch.get_num_threads()
        try:
            self._loader = _Loader(
                path,
                code_key=(is_colour, target_is_array, has_checksum),
                batch_size=batch_size,
                num_workers=1,  # of numba, which takes ten seconds to compile for more; our decoder has its own
                os_cache=True,
                seed=0,
                pipelines={"checksum": None, **pipelines} if has_checksum else pipelines,
                drop_last=False,
                batches_ahead=_BATCHES_AHEAD,
            )
        finally:
            torch.set_num_threads(torch_threads)  # FFCV's constructor overwrites it

    @property
    def pages(self) -> NDArray[np.int64]:
        """The page of the file that each image lies on, int64 (N,)."""
        return (self._loader.memory_manager.stored.pointers // self.page_size).astype(np.int64)

    @property
    def page_size(self) -> int:
        return int(self._loader.reader.page_size)

    def read(
        self, order: NDArray[np.int64], *, windows: NDArray[np.int64] | None = None, size: int = 0, verify: bool = True, **settings: Any
    ) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """Yield (images, targets, indices) for consecutive runs of `batch_size` positions of `order`.

        windows: where in `order` those parts begin that are fetched before they are read; None: the system's cache is relied upon.
        size: side of the square that colour images are resized to. settings: others of `native.SETTINGS` that do not follow from the
        file. Colour images may be kept; the other arrays are views of a ring of buffers and hold until the next ones are asked for. Whatever ends the iteration, the reading thread is gone afterwards. DataError, naming the
        sample, where one cannot be decoded.
        """
        manager = self._loader.memory_manager
        stored = manager.stored.settings if verify else {}
        manager.settings = native.settings(**stored, size=size, **settings).view(np.uint8)
        torch_threads = torch.get_num_threads()
        try:
            epoch = _Epoch(self._loader, order.astype(np.uint64), buffers=self._buffers, size=size, windows=np.zeros(0, np.int64) if windows is None else windows)  # the type that FFCV compiles for
        finally:
            torch.set_num_threads(torch_threads)
        try:
            yield from epoch
            if epoch.error is not None:
                raise self._error(epoch.error) from epoch.error
        finally:
            epoch.stop()

    def _error(self, error: BaseException) -> Exception:
        reason = native.REASONS.get(error.args[0]) if isinstance(error, ValueError) and error.args else None
        if reason is None:
            return RuntimeError(f"reading {self._loader.fname} failed: {error}")
        sample = int(self._loader.memory_manager.bad_sample[0])
        return damaged(self._loader.fname, sample, reason)
