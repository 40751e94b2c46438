"""Batches of a beton, read through FFCV, the same whatever the number of processes.

B is the number of samples that this process reads in a step, K the length of a regression target.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_gsl.data import augment as augmentation
from dist_gsl.data import native, order
from dist_gsl.data.checking import check
from dist_gsl.data.config import Augment
from dist_gsl.data.info import BetonInfo, DataError, dataset_info

DEFAULT_SIZE: Final = 224  # pixels, of colour images
MIN_AREA: Final = 0.08
"""Smallest share of an image's area that a random-resized crop keeps, as in torchvision and in Inception before it."""

_CROPS: Final = {Augment.NONE: native.Crop.CENTRE, Augment.CROP_FLIP: native.Crop.SQUARE, Augment.RANDOM_RESIZED: native.Crop.RANDOM_RESIZED}


@dataclass(frozen=True)
class Batch:
    """A batch of this process. Its tensors are its own: they may be kept."""

    images: Tensor
    """float32 (B, C, H, W), each channel with the training split's mean 0 and standard deviation 1."""
    targets: Tensor
    """int64 (B,) classes, or float32 (B, K)."""
    indices: Tensor
    """int64 (B,), the samples' positions in their source."""


class Loader:
    """Reads a beton in batches; one epoch each time it is iterated.

    In training the samples are permuted by (seed, epoch), alike in every process. Step k takes the k-th run of
    `batch_size` samples, and each rank a contiguous part of it, so any world size sees the same global batches with the
    same pixels. The partial batch at the end of a training epoch is left out. In evaluation every sample is visited
    exactly once over all ranks, in the file's order; a rank that gets nothing of the last batch has one step less.

    Args:
        path: the beton; ``dataset.json`` stands beside it.
        batch_size: samples of a step over all ranks.
        rank: number of this process.
        world_size: number of processes.
        parts: into so many a step is cut, at least world_size, of which each process reads consecutive ones; None: one each.
        seed: seed of the order and of the augmentation, >= 0.
        train: shuffle, augment, and leave out the partial batch at the end.
        size: side in pixels of the images returned. None: as stored for grey images, 224 for colour.
        augment: what is done to training images at random; ignored in evaluation.
        num_threads: threads that decode.
        device: where the batches go.
        channels_last: memory format of the images.
        memory: bytes of memory for the file. A larger file is read in quasi-random order in training: pages at random, samples at
            random among as many pages as half of it holds, the next ones fetched meanwhile. None: it fits.
        sizes: side of colour images in each epoch of training, instead of `size`.
        verify: check each sample against its checksum as it is read; what that costs is in ``benchmarks/README.md``.

    Colour images in evaluation are the central square of 224 / 256 of the shorter side, resized.

    Raises:
        DataError: the file is missing, damaged, or lacks what is needed.
        ValueError: an argument out of range, or a size or augmentation that does not fit the images.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int,
        train: bool,
        rank: int = 0,
        world_size: int = 1,
        parts: int | None = None,
        seed: int = 0,
        size: int | None = None,
        augment: Augment = Augment.NONE,
        num_threads: int = 1,
        device: str | torch.device = "cpu",
        channels_last: bool = False,
        memory: int | None = None,
        sizes: Callable[[int], int] | None = None,
        verify: bool = True,
    ) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1, not {rank} of {world_size}")
        if parts is not None and parts < world_size:
            raise ValueError(f"parts must be at least world_size {world_size}, not {parts}")
        if batch_size < (parts or world_size):
            raise ValueError(
                f"batch_size is the number of samples of a step over all processes: it must be at least their number "
                f"{parts or world_size}, not {batch_size}"
            )
        if seed < 0:
            raise ValueError(f"seed must be >= 0, not {seed}")
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, not {num_threads}")
        self.path = Path(path)
        self._beton = check(self.path)
        self.info = dataset_info(self.path.parent)
        self._check_fields()
        if train and self._beton.num_samples < batch_size:
            raise ValueError(
                f"batch_size {batch_size} is larger than the {self._beton.num_samples} samples of {self.path}, so a "
                "training epoch would have no step: choose a smaller one"
            )
        self.batch_size, self.rank, self.world_size, self.parts = batch_size, rank, world_size, parts or world_size
        self.seed, self.train = seed, train
        self.augment = augment if train else Augment.NONE
        self.device = torch.device(device)
        self.size = self._checked_size(size)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        statistics = np.array([self.info.mean, self.info.std], np.float32).reshape(2, -1, 1, 1) * 255
        self._mean, self._std = torch.from_numpy(statistics).to(self.device)
        # What the levels from 0 to 255 become, by channel: the same operations as on a device, once for each level.
        self._table = ((np.arange(256, dtype=np.float32) - statistics[0].reshape(-1, 1)) / statistics[1].reshape(-1, 1)).astype(np.float32)
        self._epoch, self._start_step = 0, 0
        self._sizes = sizes if train else None
        if self._sizes is not None and not self._is_colour:
            raise ValueError(f"the grey images of {self.path} are read as they are stored: leave data.start_size out")
        from dist_gsl.data._ffcv import BatchReader

        self._num_threads, self._verify = num_threads, verify
        self._reader = BatchReader(
            str(self.path),
            batch_size=self._share_of(batch_size),
            is_colour=self._is_colour,
            target_is_array=self.info.num_targets > 0,
            has_checksum="checksum" in self._beton.fields,
        )
        self.pages_at_once: int | None = None
        """Pages among whose samples a training epoch chooses at random; None: all."""
        if memory is not None and self._beton.num_bytes > memory:
            self.pages_at_once = max(1, memory // 2 // self._reader.page_size)

    @property
    def num_samples(self) -> int:
        """Samples of the file, over all ranks."""
        return self._beton.num_samples

    @property
    def beton(self) -> BetonInfo:
        return self._beton

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the next iterations, and the step of it to start with.

        The batches from `start_step` on are the tail of those of the whole epoch.
        """
        if epoch < 0 or not 0 <= start_step <= self._num_global_steps:
            raise ValueError(
                f"epoch must be >= 0 and start_step from 0 to {self._num_global_steps}, not {epoch} and {start_step}"
            )
        self._epoch, self._start_step = epoch, start_step

    def __len__(self) -> int:
        """Steps of a whole epoch for this rank."""
        steps = self._num_global_steps
        if self.train or steps == 0:
            return steps
        last = self.num_samples - (steps - 1) * self.batch_size
        return steps if self._share_of(last) else steps - 1

    def __iter__(self) -> Iterator[Batch]:
        for levels, targets, indices in self._arrays():
            # `targets` and `indices` are views of memory that FFCV writes to again.
            yield Batch(
                self._normalised(levels), torch.from_numpy(targets.copy()).to(self.device), torch.from_numpy(indices.copy()).to(self.device)
            )

    def levels(self) -> Generator[Batch, None, None]:
        """The same batches with the images' levels, uint8 from 0 to 255, as they travel to a device."""
        for levels, targets, indices in self._arrays():
            images = torch.from_numpy(levels if self._is_colour else levels.copy()).to(self.device).permute(0, 3, 1, 2)
            yield Batch(images, torch.from_numpy(targets.copy()).to(self.device), torch.from_numpy(indices.copy()).to(self.device))

    def _arrays(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.int64]]]:
        """Augmented images, uint8 (B, H, W, C), targets and indices; they hold until the next ones are asked for, colour images longer."""
        epoch = self._epoch
        window_of, windows = None, None
        if self.train and self.pages_at_once:
            positions, window_of = order.windowed_order(self._reader.pages, seed=self.seed, epoch=epoch, pages_at_once=self.pages_at_once)
        else:
            positions = order.epoch_order(self.num_samples, seed=self.seed, epoch=epoch, shuffle=self.train)
        places = order.rank_batches(
            np.arange(self.num_samples),
            batch_size=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            drop_last=self.train,
            start_step=self._start_step,
            parts=self.parts,
        )
        mine = np.concatenate([np.empty(0, np.int64), *places])
        if window_of is not None:
            windows = np.flatnonzero(np.diff(window_of[mine], prepend=-1))
        size = self.size if self._sizes is None else self._sizes(epoch)
        regions: dict[str, Any] = {
            "size": size, "crop": _CROPS[self.augment], "seed": self.seed, "epoch": epoch, "num_threads": self._num_threads, "share": 224 / 256,
            "min_area": MIN_AREA, "max_area": 1.0, "min_ratio": 3 / 4, "max_ratio": 4 / 3,
        } if self._is_colour else {}  # fmt: skip
        for images, targets, indices in self._reader.read(positions[mine], windows=windows, verify=self._verify, **regions):
            if self.augment is Augment.SHIFT:
                images = augmentation.shift(images, indices[:, 0], seed=self.seed, epoch=epoch)
            if not self._is_colour:
                images = images[:, 0, :, :, None]
            yield images, targets if self.info.num_targets else targets[:, 0], indices[:, 0]

    def _normalised(self, levels: NDArray[np.uint8]) -> Tensor:
        count, height, width, channels = levels.shape
        channels_last = self._memory_format is torch.channels_last
        if self.device.type != "cpu":
            # Bytes travel, a quarter of the floats.
            planes = torch.from_numpy(levels).to(self.device).permute(0, 3, 1, 2)
            normalised = planes.to(torch.float32).sub_(self._mean).div_(self._std)
            return normalised.contiguous(memory_format=self._memory_format)
        out = torch.empty((count, channels, height, width), memory_format=self._memory_format)
        target = out.permute(0, 2, 3, 1) if channels_last else out
        native.normalise(
            np.ascontiguousarray(levels), self._table, target.numpy(), to_planes=not channels_last, num_threads=self._num_threads
        )
        return out

    @property
    def _num_global_steps(self) -> int:
        return order.num_steps(self.num_samples, batch_size=self.batch_size, drop_last=self.train)

    def _share_of(self, num_samples: int) -> int:
        part = order.rank_share(num_samples, rank=self.rank, world_size=self.world_size, parts=self.parts)
        return part.stop - part.start

    @property
    def _is_colour(self) -> bool:
        return self._beton.fields["image"] == "RGBImageField"

    def _check_fields(self) -> None:
        fields, info = self._beton.fields, self.info
        for name in ("image", "target", "index"):
            if name not in fields:
                raise DataError(
                    f"{self.path} has no field {name!r}, only {', '.join(fields)}: write it with `dist-gsl data write`"
                )
        if list(fields)[:3] != ["image", "target", "index"]:
            raise DataError(f"{self.path} has its fields in another order, {', '.join(fields)}: write it with `dist-gsl data write`")
        wanted = {
            "image": "NDArrayField" if info.channels == 1 else "RGBImageField",
            "target": "NDArrayField" if info.num_targets else "IntField",
            "index": "IntField",
        }
        for name, kind in wanted.items():
            if fields[name] != kind:
                raise DataError(
                    f"field {name!r} of {self.path} is a {fields[name]}, not a {kind} as its dataset.json says: "
                    "write the data set again"
                )
        if (self._beton.channels, self._beton.target_size) != (info.channels, info.num_targets):
            raise DataError(
                f"{self.path} has images of {self._beton.channels} channels and {self._beton.target_size} numbers a "
                f"target, its dataset.json says {info.channels} and {info.num_targets}: write the data set again"
            )

    def _checked_size(self, size: int | None) -> int:
        if self._is_colour:
            if self.augment is Augment.SHIFT:
                raise ValueError("augmentation 'shift' is for grey characters: choose 'crop-flip', 'random-resized' or 'none'")
            size = DEFAULT_SIZE if size is None else size
            if size < 8:
                raise ValueError(f"size must be at least 8 pixels, not {size}")
            return size
        if self.augment not in (Augment.NONE, Augment.SHIFT):
            raise ValueError(f"augmentation {self.augment.value!r} is for colour images: choose 'shift' or 'none'")
        stored = self._beton.height
        if self._beton.width != stored:
            raise DataError(f"the images of {self.path} are not square: write the data set again")
        if size is not None and size != stored:
            raise ValueError(f"the grey images of {self.path} are stored at {stored} pixels a side, not {size}")
        return stored
