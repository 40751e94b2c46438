"""The loader: exact pixels, the same batches for any world size, batches that stay, threads that end."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dist_gsl import data
from dist_gsl.data import Augment, Loader
from dist_gsl.data.sources import open_source

from .conftest import COUNTS

pytestmark = pytest.mark.timeout(120)  # nothing here may hang


def pixels(loader: Loader, batch: data.Batch) -> np.ndarray:
    """The grey levels that a batch was made from."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (loader.info.mean, loader.info.std))
    levels = (batch.images.double() * std + mean) * 255
    rounded = levels.round()
    assert (levels - rounded).abs().max() < 0.01
    return rounded.to(torch.uint8).numpy()


def test_grey_images_come_back_exactly(chars_dir: Path) -> None:
    loader = Loader(chars_dir / "val.beton", batch_size=16, train=False)
    samples = open_source("chars", seed=3, counts=COUNTS).splits["val"]
    position = 0
    assert len(loader) == 4
    for batch in loader:
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous()
        assert batch.targets.dtype == batch.indices.dtype == torch.int64
        assert batch.indices.tolist() == list(range(position, position + len(batch.indices)))
        for image, target in zip(pixels(loader, batch), batch.targets.tolist(), strict=True):
            np.testing.assert_array_equal(image[0], samples[position].image)
            assert target == samples[position].target
            position += 1
    assert position == COUNTS["val"]


def test_training_images_have_mean_0_and_deviation_1(chars_dir: Path) -> None:
    images = torch.cat([batch.images for batch in Loader(chars_dir / "train.beton", batch_size=64, train=False)])
    assert abs(float(images.mean())) < 1e-5
    assert abs(float(images.std(correction=0)) - 1) < 1e-5


def test_regression_targets_come_back(tmp_path: Path) -> None:
    counts = {"train": 40, "val": 10, "test": 10}
    data.write("rotated-digits", tmp_path, counts=counts, seed=2)
    samples = open_source("rotated-digits", counts=counts, seed=2).splits["train"]
    for batch in Loader(tmp_path / "train.beton", batch_size=10, train=True):
        assert batch.targets.dtype == torch.float32
        assert batch.targets.shape == (10, 1)
        wanted = np.stack([np.asarray(samples[i].target) for i in batch.indices.tolist()])
        np.testing.assert_array_equal(batch.targets.numpy(), wanted)
    assert data.dataset_info(tmp_path).num_outputs == 1


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("augment", [Augment.NONE, Augment.SHIFT])
def test_any_world_size_trains_on_the_same_batches(chars_dir: Path, world_size: int, augment: Augment) -> None:
    def loader(rank: int, world_size: int, num_threads: int) -> Loader:
        made = Loader(
            chars_dir / "train.beton",
            batch_size=40,
            train=True,
            rank=rank,
            world_size=world_size,
            seed=11,
            augment=augment,
            num_threads=num_threads,
        )
        made.set_epoch(3)
        return made

    alone = list(loader(0, 1, 1))
    ranks = [list(loader(rank, world_size, 2)) for rank in range(world_size)]
    assert [len(batches) for batches in ranks] == [5] * world_size
    for step, whole in enumerate(alone):
        parts = [batches[step] for batches in ranks]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
        assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_visits_every_sample_once(chars_dir: Path, world_size: int) -> None:
    visited = []
    for rank in range(world_size):
        loader = Loader(chars_dir / "val.beton", batch_size=20, train=False, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        visited += [index for batch in batches for index in batch.indices.tolist()]
    assert sorted(visited) == list(range(COUNTS["val"]))


def test_starting_inside_an_epoch_gives_its_tail(chars_dir: Path) -> None:
    loader = Loader(chars_dir / "train.beton", batch_size=32, train=True, seed=1, augment=Augment.SHIFT)
    loader.set_epoch(2)
    whole = list(loader)
    loader.set_epoch(2, start_step=4)
    tail = list(loader)
    assert len(whole) == len(loader) == 6
    assert len(tail) == 2
    for got, wanted in zip(tail, whole[4:], strict=True):
        assert torch.equal(got.images, wanted.images)
        assert torch.equal(got.indices, wanted.indices)
    loader.set_epoch(2, start_step=6)
    assert list(loader) == []


def test_epochs_and_seeds_differ(chars_dir: Path) -> None:
    def first(seed: int, epoch: int) -> list[int]:
        loader = Loader(chars_dir / "train.beton", batch_size=32, train=True, seed=seed)
        loader.set_epoch(epoch)
        return next(iter(loader)).indices.tolist()

    assert first(0, 0) == first(0, 0)
    assert len({tuple(first(*key)) for key in ((0, 0), (0, 1), (1, 0))}) == 3


def test_kept_batches_stay_as_they_were(chars_dir: Path) -> None:
    loader = Loader(chars_dir / "train.beton", batch_size=8, train=False)
    kept, copies = [], []
    for batch in loader:
        kept.append(batch)
        copies.append((batch.images.clone(), batch.targets.clone(), batch.indices.clone()))
    assert len(kept) == 26  # many times the ring of buffers
    for batch, (images, targets, indices) in zip(kept, copies, strict=True):
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.targets, targets)
        assert torch.equal(batch.indices, indices)


def test_no_thread_outlives_an_early_break(chars_dir: Path) -> None:
    loader = Loader(chars_dir / "train.beton", batch_size=8, train=True)
    before = set(threading.enumerate())
    for _ in range(3):
        batches = iter(loader)
        next(batches)
        assert len(set(threading.enumerate()) - before) == 1
        batches.close()  # type: ignore[attr-defined]
        assert set(threading.enumerate()) == before

    def stumble() -> None:
        for _ in loader:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stumble()
    assert set(threading.enumerate()) == before


def test_error_in_the_reading_thread_surfaces(chars_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_gsl.data import _ffcv

    loader = Loader(chars_dir / "train.beton", batch_size=8, train=True)

    def failing(self: Any, number: int, *args: Any) -> Any:
        if number == 2:
            raise OSError("the disk went away")
        return original(self, number, *args)

    original = _ffcv.EpochIterator.run_pipeline
    monkeypatch.setattr(_ffcv.EpochIterator, "run_pipeline", failing)
    with pytest.raises(RuntimeError, match="the disk went away"):
        list(loader)


def test_torch_keeps_its_threads(chars_dir: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for _ in Loader(chars_dir / "train.beton", batch_size=50, train=True, num_threads=2):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_colour_evaluation_is_the_centre(colour_dir: Path) -> None:
    loader = Loader(colour_dir / "val.beton", batch_size=5, train=False, size=32)
    batches = list(loader)
    assert [len(batch.targets) for batch in batches] == [5, 5, 2]
    images = torch.cat([batch.images for batch in batches])
    assert images.shape == (12, 3, 32, 32)
    mean, std = torch.tensor(loader.info.mean).view(3, 1, 1), torch.tensor(loader.info.std).view(3, 1, 1)
    levels = ((images * std + mean) * 255).permute(0, 2, 3, 1).numpy()
    samples = open_source(loader.info.source).splits["val"]
    for position, got in enumerate(levels):
        image = samples[position].image
        scale = min(1.0, 64 / max(image.shape))
        height, width = (int(side * scale) for side in image.shape[:2])
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        side = int(min(height, width) * 224 / 256)
        top, left = (height - side) // 2, (width - side) // 2
        square = Image.fromarray(small[top : top + side, left : left + side])
        wanted = np.asarray(square.resize((32, 32), Image.Resampling.BILINEAR)).astype(float)
        error = np.abs(got - wanted)
        assert error.mean() < 1.5  # half of the files are JPEG
        assert error.max() < 12


@pytest.mark.parametrize("augment", [Augment.CROP_FLIP, Augment.RANDOM_RESIZED])
def test_colour_training_crops_do_not_depend_on_rank_or_threads(colour_dir: Path, augment: Augment) -> None:
    def loader(rank: int, world_size: int, num_threads: int) -> Loader:
        return Loader(
            colour_dir / "train.beton", batch_size=8, train=True, rank=rank, world_size=world_size, size=28, augment=augment,
            num_threads=num_threads, channels_last=True,
        )  # fmt: skip

    alone = list(loader(0, 1, 2))
    ranks = [list(loader(rank, 2, 1)) for rank in range(2)]
    assert alone[0].images.shape == (8, 3, 28, 28)
    assert alone[0].images.is_contiguous(memory_format=torch.channels_last)
    for step, whole in enumerate(alone):
        assert torch.equal(torch.cat([batches[step].images for batches in ranks]), whole.images)
    slopes = torch.cat([batch.images for batch in alone]).diff(dim=3).mean(dim=(1, 2, 3))
    assert 4 <= int((slopes < 0).sum()) <= 20  # of 24, mirrored ones run the other way


def test_the_images_of_an_epoch_are_a_set_of_their_own(colour_dir: Path) -> None:
    """By hash: alike for one and two processes, one and two threads; another for another epoch or seed."""

    def hashes(*, seed: int = 0, epoch: int = 0, world_size: int = 1, num_threads: int = 1, batch_size: int = 8) -> set[int]:
        found = set()
        for rank in range(world_size):
            loader = Loader(
                colour_dir / "train.beton", batch_size=batch_size, train=True, rank=rank, world_size=world_size, size=24,
                augment=Augment.RANDOM_RESIZED, num_threads=num_threads, seed=seed,
            )  # fmt: skip
            loader.set_epoch(epoch)
            found |= {hash(image.numpy().tobytes()) for batch in loader for image in batch.images}
        return found

    alone = hashes()
    assert len(alone) == 24
    assert hashes(num_threads=2) == hashes(world_size=2) == hashes(world_size=2, num_threads=2) == hashes(batch_size=4) == alone
    assert not hashes(epoch=1) & alone
    assert not hashes(seed=1) & alone


def test_two_epochs_at_once_do_not_disturb_each_other(colour_dir: Path) -> None:
    loader = Loader(colour_dir / "train.beton", batch_size=8, train=True, size=24, augment=Augment.RANDOM_RESIZED)

    def epoch(number: int) -> Iterator[data.Batch]:
        loader.set_epoch(number)
        return iter(loader)

    alone = [[batch.images for batch in epoch(number)] for number in range(2)]
    first = epoch(0)
    images = [next(first).images]
    second = epoch(1)
    interleaved = [next(second).images]
    images += [batch.images for batch in first]
    interleaved += [batch.images for batch in second]
    for got, whole in ((images, alone[0]), (interleaved, alone[1])):
        assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))


def test_a_damaged_image_ends_the_epoch_with_its_number(colour_dir: Path, tmp_path: Path) -> None:
    from dist_gsl.data import _ffcv

    directory = tmp_path / "copy"
    shutil.copytree(colour_dir, directory)
    path = directory / "val.beton"
    rows = _ffcv.Reader(str(path)).metadata["f0"]
    jpeg = next(i for i, row in enumerate(rows) if row["mode"] == 0)
    content = bytearray(path.read_bytes())
    start = int(rows[jpeg]["data_ptr"])
    content[start + 20 : start + 60] = bytes(40)
    path.write_bytes(content)
    loader = Loader(path, batch_size=5, train=False, size=32)
    with pytest.raises(data.DataError, match=f"image {jpeg} of .* is damaged, its checksum"):
        list(loader)
    assert list(Loader(colour_dir / "val.beton", batch_size=5, train=False, size=32))  # others are read as before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank must be"),
        ({"batch_size": 2, "world_size": 3}, "over all processes"),
        ({"batch_size": 1_000}, "larger than the 203 samples"),
        ({"seed": -1}, "seed"),
        ({"num_threads": 0}, "num_threads"),
        ({"size": 64}, "stored at 32"),
        ({"augment": Augment.CROP_FLIP}, "for colour"),
    ],
)
def test_bad_arguments_are_refused(chars_dir: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(chars_dir / "train.beton", **{"batch_size": 10, "train": True, **arguments})


def test_bad_epoch_is_refused(chars_dir: Path) -> None:
    loader = Loader(chars_dir / "train.beton", batch_size=100, train=True)
    with pytest.raises(ValueError, match="from 0 to 2"):
        loader.set_epoch(0, start_step=3)


def test_shift_is_refused_for_colour(colour_dir: Path) -> None:
    with pytest.raises(ValueError, match="for grey"):
        Loader(colour_dir / "train.beton", batch_size=2, train=True, augment=Augment.SHIFT)


def test_beton_without_description_is_refused(chars_dir: Path, tmp_path: Path) -> None:
    shutil.copy(chars_dir / "val.beton", tmp_path)
    with pytest.raises(data.DataError, match=r"dataset\.json is missing"):
        Loader(tmp_path / "val.beton", batch_size=4, train=False)


def test_description_of_other_fields_is_refused(chars_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(chars_dir, directory)
    text = (directory / "dataset.json").read_text()
    (directory / "dataset.json").write_text(text.replace('"num_targets": 0', '"num_targets": 2'))
    with pytest.raises(data.DataError, match="field 'target'"):
        Loader(directory / "val.beton", batch_size=4, train=False)


def test_truncated_file_is_refused_before_reading(chars_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(chars_dir, directory)
    path = directory / "train.beton"
    path.write_bytes(path.read_bytes()[:-1_000])
    with pytest.raises(data.DataError, match="cut short"):
        Loader(path, batch_size=4, train=True)


def test_images_may_be_kept_and_memory_is_used_again(colour_dir: Path) -> None:
    loader = Loader(colour_dir / "train.beton", batch_size=4, train=True, size=24, augment=Augment.RANDOM_RESIZED)
    whole = [batch.images.clone() for batch in loader.levels()]
    kept = [batch.images[1:, :, ::2] for batch in loader.levels()]  # a view alone must hold the memory
    assert len({images.data_ptr() for images in kept}) == len(whole) == 6
    for images, wanted in zip(kept, whole, strict=True):
        assert torch.equal(images, wanted[1:, :, ::2])
    del kept
    places = set()
    for epoch in range(3):
        loader.set_epoch(epoch)
        places |= {batch.images.data_ptr() for batch in loader.levels()}
    assert len(places) <= 6


@pytest.fixture(scope="module")
def paged_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw images on four pages of 2 MB."""
    root = tmp_path_factory.mktemp("paged")
    rng = np.random.default_rng(0)
    for split, count in (("train", 150), ("val", 6)):
        for number in range(count):
            folder = root / "tree" / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (130, 130, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")
    data.write(f"imagefolder:{root / 'tree'}", root / "out", jpeg_share=0.0)
    return root / "out"


def quasi_random(directory: Path, *, memory: int | None = 10**6, rank: int = 0, world_size: int = 1, batch_size: int = 10) -> Loader:
    return Loader(
        directory / "train.beton", batch_size=batch_size, train=True, rank=rank, world_size=world_size, size=16,
        augment=Augment.RANDOM_RESIZED, memory=memory,
    )  # fmt: skip


def test_quasi_random_epochs(paged_dir: Path) -> None:
    loader = quasi_random(paged_dir)
    assert loader.pages_at_once == 1
    assert quasi_random(paged_dir, memory=9 * 2**20).pages_at_once == 2  # two more are fetched meanwhile
    assert quasi_random(paged_dir, memory=20 * 2**20).pages_at_once is None  # it fits
    pages = loader._reader.pages
    assert len(set(pages.tolist())) == 4

    def hashes(batches: list[data.Batch]) -> set[int]:
        return {hash(image.numpy().tobytes()) for batch in batches for image in batch.images}

    alone = list(loader)
    order = np.concatenate([batch.indices.numpy() for batch in alone])
    np.testing.assert_array_equal(np.sort(order), np.arange(150))
    assert np.count_nonzero(np.diff(pages[order])) == 3  # a page at a time
    assert np.count_nonzero(np.diff(order) == 1) < 10  # but no sample after its neighbour
    assert hashes(alone) == hashes(list(quasi_random(paged_dir, memory=None)))
    ranks = [list(quasi_random(paged_dir, rank=rank, world_size=3)) for rank in range(3)]
    for step, batch in enumerate(alone):
        assert torch.equal(torch.cat([batches[step].images for batches in ranks]), batch.images)
    loader.set_epoch(0, 7)
    for batch, whole in zip(loader, alone[7:], strict=True):
        assert torch.equal(batch.images, whole.images)
    loader.set_epoch(1)
    assert not np.array_equal(np.concatenate([batch.indices.numpy() for batch in loader]), order)


@pytest.mark.parametrize(("rank", "world_size", "start"), [(0, 1, 0), (1, 2, 0), (0, 1, 9)])
def test_windows_are_fetched_before_they_are_read(
    paged_dir: Path, monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, start: int
) -> None:
    from dist_gsl.data import _ffcv

    happened: list[tuple[str, list[int]]] = []
    fetch, run = _ffcv._Epoch._fetch, _ffcv.EpochIterator.run_pipeline

    def fetching(self: Any, positions: Any) -> None:
        happened.append(("fetched", positions.tolist()))
        fetch(self, positions)

    def reading(self: Any, number: int, positions: Any, *others: Any) -> Any:
        happened.append(("read", positions.tolist()))
        return run(self, number, positions, *others)

    monkeypatch.setattr(_ffcv._Epoch, "_fetch", fetching)
    monkeypatch.setattr(_ffcv.EpochIterator, "run_pipeline", reading)
    loader = quasi_random(paged_dir, rank=rank, world_size=world_size)
    loader.set_epoch(0, start)
    read = [int(index) for batch in loader for index in batch.indices]
    fetched = [positions for what, positions in happened if what == "fetched"]
    assert [position for each in fetched for position in each] == read  # each once, and only what this process reads
    assert len(fetched) == (4 if start == 0 else 2)
    assert [what for what, _ in happened[:3]] == ["fetched", "fetched", "read"]
    at_hand: set[int] = set()
    for what, positions in happened:
        if what == "fetched":
            at_hand |= set(positions)
        assert set(positions) <= at_hand


@pytest.mark.parametrize("memory", [None, 10**6])
def test_the_number_of_processes_may_change_between_epochs(paged_dir: Path, memory: int | None) -> None:
    """Four processes, then two, from the middle of an epoch on one: every sample once an epoch."""
    for epoch, world_size in enumerate((4, 2)):
        seen = []
        for rank in range(world_size):
            loader = quasi_random(paged_dir, rank=rank, world_size=world_size, memory=memory)
            loader.set_epoch(epoch)
            seen += [int(index) for batch in loader for index in batch.indices]
        assert sorted(seen) == list(range(150))
    seen = []
    for world_size, steps in ((4, range(6)), (1, range(6, 15))):
        for rank in range(world_size):
            loader = quasi_random(paged_dir, rank=rank, world_size=world_size, memory=memory)
            loader.set_epoch(2, steps.start)
            for _, batch in zip(steps, loader, strict=False):
                seen += [int(index) for index in batch.indices]
    assert sorted(seen) == list(range(150))


def test_images_grow_with_the_epochs(colour_dir: Path) -> None:
    config = data.DataConfig(start_size=32, full_size_epoch=3)
    loader = Loader(
        colour_dir / "train.beton", batch_size=8, train=True, size=128, augment=Augment.RANDOM_RESIZED,
        sizes=partial(config.train_size, full=128),
    )  # fmt: skip
    sizes = []
    for epoch in range(5):
        loader.set_epoch(epoch)
        sizes.append({batch.images.shape[2:] for batch in loader})
        alone = Loader(colour_dir / "train.beton", batch_size=8, train=True, size=(32, 64, 96, 128, 128)[epoch], augment=Augment.RANDOM_RESIZED)
        alone.set_epoch(epoch)
        for batch, wanted in zip(loader, alone, strict=True):
            assert torch.equal(batch.images, wanted.images)
    assert sizes == [{(32, 32)}, {(64, 64)}, {(96, 96)}, {(128, 128)}, {(128, 128)}]
    assert next(iter(Loader(colour_dir / "val.beton", batch_size=8, train=False, size=128, sizes=lambda epoch: 32))).images.shape[2] == 128


def test_grey_images_do_not_grow(chars_dir: Path) -> None:
    with pytest.raises(ValueError, match="start_size"):
        Loader(chars_dir / "train.beton", batch_size=8, train=True, sizes=lambda epoch: 16)


def test_an_epoch_that_is_left_is_not_read_to_its_end(colour_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_gsl.data import _ffcv

    decoded = []
    run = _ffcv.EpochIterator.run_pipeline

    def slowly(self: Any, number: int, *others: Any) -> Any:
        decoded.append(number)
        time.sleep(0.02)
        return run(self, number, *others)

    monkeypatch.setattr(_ffcv.EpochIterator, "run_pipeline", slowly)
    batches = Loader(colour_dir / "train.beton", batch_size=1, train=True, size=16).levels()
    next(batches)
    batches.close()
    assert len(decoded) < 10  # of 24: two are ahead and one under way


def test_what_is_fetched_is_asked_for_in_small_pieces(paged_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reads only the beginning of a large one."""
    from dist_gsl.data import _ffcv

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: asked.append((start, start + size)))
    stop = _ffcv._Epoch.stop

    def stop_later(self: Any) -> None:
        self._fetcher.submit(lambda: None).result()  # the epoch may be over before all is asked for, which is left then
        stop(self)

    monkeypatch.setattr(_ffcv._Epoch, "stop", stop_later)
    loader = quasi_random(paged_dir)
    list(loader)
    stored = loader._reader._loader.memory_manager.stored
    assert max(end - start for start, end in asked) <= 1 << 17
    covered = np.zeros(int(stored.pointers.max()) + 200_000, bool)
    for start, end in asked:
        covered[start:end] = True
    for start, size in zip(stored.pointers.tolist(), stored.image_sizes.tolist(), strict=True):
        assert covered[start : start + size].all()


@pytest.mark.parametrize("size", [512, 30_000])
def test_arrays_of_another_size_are_refused(chars_dir: Path, tmp_path: Path, size: int) -> None:
    from dist_gsl.data import _ffcv

    directory = tmp_path / "copy"
    shutil.copytree(chars_dir, directory)
    path = directory / "val.beton"
    content = bytearray(path.read_bytes())
    table = np.frombuffer(content, _ffcv.ALLOC_TABLE_TYPE, offset=int(np.frombuffer(content, _ffcv.HeaderType, 1)[0]["alloc_table_ptr"])).copy()
    table["size"][3] = size
    content[len(content) - table.nbytes :] = table.tobytes()
    path.write_bytes(content)
    for verify in (True, False):
        with pytest.raises(data.DataError, match=r"image 3 of .* its size is not"):
            Loader(path, batch_size=4, train=False, verify=verify)


def test_a_process_of_one_core_comes_to_its_end() -> None:
    """FFCV's numba may start threads of TBB, whose pool is lost where a process forks: with one core nobody is left to end it."""
    code = (
        "import os, subprocess; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import dist_gsl.data._ffcv\n"
        "subprocess.run(['true'], preexec_fn=lambda: None)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
