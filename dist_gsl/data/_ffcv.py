"""What FFCV lacks, in one place: a writer that cannot hang, a reader of given batches whose errors surface.

FFCV's own writer waits for ever when a worker dies, and its own loader when its thread raises. This module is the only
one that imports ffcv when it is loaded, so import it inside functions.
"""
# ruff: noqa: E402

import contextlib
import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing import Process, Queue, Value
from typing import Any, Final

import cv2
import numba
import numba.typed
import numpy as np
import torch
from numpy.typing import NDArray

_torch_threads = torch.get_num_threads()  # importing ffcv sets it to 1
# ffcv keeps the numbers of two image modes in one of numba's dictionaries, which only Python reads: compiling it took
# five seconds of every process that was started.
_typed_dict, numba.typed.Dict = numba.typed.Dict, dict

from ffcv.fields import FloatField, IntField, NDArrayField, RGBImageField
from ffcv.fields.base import Field
from ffcv.fields.basics import IntDecoder
from ffcv.fields.ndarray import NDArrayDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader as FfcvLoader
from ffcv.loader import loader as ffcv_loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_allocator import MemoryAllocator
from ffcv.memory_managers import OSCacheManager
from ffcv.memory_managers.os_cache import OSCacheContext
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.graph import Node
from ffcv.pipeline.state import State
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, TYPE_ID_HANDLER, FieldDescType, HeaderType
from ffcv.writer import DatasetWriter, handle_sample, worker_job_indexed_dataset

torch.set_num_threads(_torch_threads)
numba.typed.Dict = _typed_dict

from dist_gsl.data import native
from dist_gsl.data.info import DataError

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
    "Writer",
]

_POLL_SECONDS: Final = 0.05
_CHUNK: Final = 100  # samples handed to a writer's worker, or between two reports, at most
_BATCHES_AHEAD: Final = 2


SCALAR_FIELDS: Final = (IntField, FloatField)
"""Fields kept in the metadata of a sample, outside the pages."""


class Writer(DatasetWriter):
    """FFCV's writer, which ends with an exception when something fails, and leaves no process or shared memory."""

    def __init__(self, path: str, fields: Mapping[str, Field], *, page_size: int, num_workers: int) -> None:
        super().__init__(path, dict(fields), page_size=page_size, num_workers=max(num_workers, 1))

    def write(self, dataset: Any, *, progress: Callable[[int], None]) -> None:
        """Write every sample of `dataset`; `progress` is told how many are done.

        One worker writes in this process: nothing to wait for, and the bytes of the file follow from the samples. More
        are processes of their own, and the order of pages in the file depends on which was faster.
        """
        self.num_samples = len(dataset)
        self.prepare()
        try:
            if self.num_workers == 1:
                self.finalize(self._write_here(dataset, progress))
            else:
                self.finalize(self._write_in_processes(dataset, progress))
        finally:
            self.metadata_sm.close()
            self.metadata_sm.unlink()

    def _write_here(self, dataset: Any, progress: Callable[[int], None]) -> list[Any]:
        # Not a view of the shared memory: while an exception held one, the memory could not be closed.
        metadata = np.zeros(self.num_samples, dtype=self.metadata_type)
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        names = self.metadata_type.names
        with allocator:
            for position in range(self.num_samples):
                handle_sample(dataset[position], position, names, metadata, allocator, self.fields)
                if position % _CHUNK == _CHUNK - 1:
                    progress(position + 1)
        progress(self.num_samples)
        content = metadata.tobytes()
        self.metadata_sm.buf[: len(content)] = content
        return allocator.allocations

    def _write_in_processes(self, dataset: Any, progress: Callable[[int], None]) -> list[Any]:
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        work: Any = Queue()
        allocations: Any = Queue()
        errors: Any = Queue()
        done = Value(ctypes.c_uint64, 0)
        chunk = max(1, min(_CHUNK, self.num_samples // (4 * self.num_workers)))  # so that every worker has some
        for first in range(0, self.num_samples, chunk):
            work.put([(i, i) for i in range(first, min(first + chunk, self.num_samples))])
        for _ in range(self.num_workers):
            work.put(None)
        job = (work, self.metadata_sm, self.metadata_type, self.fields, allocator, done, allocations, dataset)
        processes = [Process(target=_run_worker, args=(errors, job), daemon=True) for _ in range(self.num_workers)]
        try:
            for process in processes:
                process.start()
            while done.value < self.num_samples:
                _raise_if_dead(processes, errors)
                progress(done.value)
                time.sleep(_POLL_SECONDS)
            progress(self.num_samples)
            table: list[Any] = []
            remaining = self.num_workers
            while remaining:
                try:
                    table += allocations.get(timeout=1.0)
                    remaining -= 1
                except queue.Empty:
                    _raise_if_dead(processes, errors)
            for process in processes:
                process.join()
            return table
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
                if process.pid is not None:
                    process.join()
            for channel in (work, allocations, errors):
                channel.close()
                channel.cancel_join_thread()  # what nobody read must not keep this process from ending


def _run_worker(errors: Any, job: tuple[Any, ...]) -> None:
    cv2.setNumThreads(0)  # OpenCV's threads do not survive a fork, and work given to them would wait for ever
    try:
        worker_job_indexed_dataset(*job)
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            errors.put(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def _raise_if_dead(processes: Sequence[Process], errors: Any) -> None:
    for process in processes:
        if process.exitcode:
            try:
                message = errors.get(timeout=1.0)
            except queue.Empty:
                message = f"exit code {process.exitcode} (was it killed, or out of memory?)"
            raise RuntimeError(f"a process that wrote the data set ended early: {message}")


_CodeKey = tuple[bool, bool]
_compiled: dict[_CodeKey, Any] = {}
_compiling = threading.Lock()


class _Context(OSCacheContext):
    """What compiled code is given with every batch: FFCV's map of the file and table, and what our decoder needs besides."""

    manager: "_CacheManager"

    @property
    def state(self) -> tuple[Any, ...]:
        manager = self.manager
        return (self.mmap, manager.ptrs, manager.sizes, manager.image_sizes, manager.checksums, manager.settings, manager.bad_sample)


class _CacheManager(OSCacheManager):
    """FFCV's memory map without its dictionaries of all samples, which take kilobytes a sample and minutes for millions.

    Its reading function depends on nothing of the file: compiled once a process.
    """

    _read: Any = None

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        order = np.argsort(reader.alloc_table["ptr"], kind="stable")
        self.ptrs = np.ascontiguousarray(reader.alloc_table["ptr"][order])
        self.sizes = np.ascontiguousarray(reader.alloc_table["size"][order])
        self.image_sizes = np.zeros(0, np.uint64)
        for number, field in enumerate(reader.handlers.values()):
            if isinstance(field, RGBImageField):
                self.image_sizes = self.sizes[np.searchsorted(self.ptrs, reader.metadata[f"f{number}"]["data_ptr"])]
        self.checksums = np.zeros(0, np.uint32)
        self.settings = np.zeros(native.SETTINGS.itemsize, np.uint8)
        self.bad_sample = np.zeros(1, np.uint64)
        self.context = _Context(self)

    @property
    def state_type(self) -> Any:
        u64, u32, u8 = numba.uint64[::1], numba.uint32[::1], numba.uint8[::1]
        return numba.types.Tuple([*super().state_type.types, u64, u32, u8, u64])

    def compile_reader(self) -> Any:
        if _CacheManager._read is None:
            _CacheManager._read = super().compile_reader()
        return _CacheManager._read


ffcv_loader.OSCacheManager = _CacheManager


class _RegionDecoder(SimpleRGBImageDecoder):
    """FFCV's operation that reads images, by our decoder: regions drawn by sample, only what is in them decoded."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (self.size, self.size, 3), np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        decode_batch = native.decode

        def decode(positions: Any, destination: Any, metadata: Any, state: Any) -> Any:
            status = decode_batch(
                state[0].ctypes.data, state[0].size, metadata.ctypes.data, metadata.strides[0], state[3].ctypes.data,
                state[4].ctypes.data, positions.ctypes.data, positions.size, state[5].ctypes.data, destination.ctypes.data,
                state[6].ctypes.data,
            )  # fmt: skip
            if status != 0:
                # Compiled code raises constants only: the status is told by the one of as many classes.
                if status == 1:
                    raise ValueError(1)
                if status == 2:
                    raise ValueError(2)
                if status == 3:
                    raise ValueError(3)
                if status == 4:
                    raise ValueError(4)
                raise ValueError(5)
            return destination[: len(positions)]

        return decode


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


class _Epoch(EpochIterator):
    """FFCV's reading thread; what it raises is kept and raised where the batches are consumed."""

    error: BaseException | None = None

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
        self.close()


class BatchReader:
    """Reads batches of given positions from a beton through FFCV, decoding ahead in a thread of its own.

    Args:
        path: the beton, already checked.
        batch_size: number of samples of every batch but, perhaps, the last.
        image_size: side of the square that colour images are resized to; None where images are arrays.
        target_is_array: is the target a vector of numbers and no class?
    """

    def __init__(self, path: str, *, batch_size: int, image_size: int | None, target_is_array: bool) -> None:
        image = NDArrayDecoder() if image_size is None else _RegionDecoder(image_size)
        target = NDArrayDecoder() if target_is_array else IntDecoder()
        self._image_size = image_size
        torch_threads = torch.get_num_threads()
        try:
            self._loader = _Loader(
                path,
                code_key=(image_size is None, target_is_array),
                batch_size=batch_size,
                num_workers=1,  # of numba, which takes ten seconds to compile for more; our decoder has its own
                os_cache=True,
                seed=0,
                pipelines={"image": [image], "target": [target], "index": [IntDecoder()]},
                drop_last=False,
                batches_ahead=_BATCHES_AHEAD,
            )
        finally:
            torch.set_num_threads(torch_threads)  # FFCV's constructor overwrites it

    def read(
        self, order: NDArray[np.int64], **settings: Any
    ) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """Yield (images, targets, indices) for consecutive runs of `batch_size` positions of `order`.

        settings: of `native.SETTINGS`, but the size, for colour images. The arrays are views of a ring of buffers and hold until
        the next one is asked for. Whatever ends the iteration, the reading thread is gone afterwards. DataError, naming the
        sample, where one cannot be decoded.
        """
        manager = self._loader.memory_manager
        if self._image_size is not None:
            manager.settings = native.settings(size=self._image_size, **settings).view(np.uint8)
        torch_threads = torch.get_num_threads()
        try:
            epoch = _Epoch(self._loader, order.astype(np.uint64))  # the type that FFCV compiles for
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
        return DataError(f"image {sample} of {self._loader.fname} is damaged, {reason}: write the data set again")
