"""Images a second into batches: this loader against torchvision's, plain FFCV's, and against decoding and nothing else.

    python benchmarks/input.py [--images 4000] [--rounds 5]

JPEGs of 500 x 375 pixels, quality 90, cut from two photographs; random-resized crops of 224 pixels, mirrored or not, batches of 128 of bytes,
as they travel to a device; and what normalising them on the CPU costs besides. Every contender has as many threads or processes as there are CPUs, and all take turns. Then writing:
this writer against FFCV's and against copying the files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

NUM_CPUS = len(os.sched_getaffinity(0))
BATCH, SIZE = 128, 224


def make_images(root: Path, count: int) -> None:
    """Class folders of `count` JPEGs for training and a few for validation."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 8)):
        for position in range(number):
            photograph = photographs[position % 2]
            width = rng.integers(400, photograph.width + 1)
            height = min(photograph.height, width * 3 // 4)
            left, top = rng.integers(photograph.width - width + 1), rng.integers(photograph.height - height + 1)
            image = photograph.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.LANCZOS)
            file = root / split / f"class{position % 4}" / f"{position:05d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, quality=90)


def torchvision_epoch(root: Path) -> Callable[[], int]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    loader = DataLoader(ImageFolder(str(root / "train"), transform), batch_size=BATCH, shuffle=True, num_workers=NUM_CPUS)
    return lambda: sum(len(images) for images, _ in loader)


def ffcv_epoch(file: Path) -> Callable[[], int]:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.loader import loader as module
    from ffcv.memory_managers import OSCacheManager
    from ffcv.transforms import RandomHorizontalFlip

    module.OSCacheManager, ours = OSCacheManager, module.OSCacheManager
    loader = Loader(
        str(file), batch_size=BATCH, num_workers=NUM_CPUS, order=OrderOption.RANDOM, os_cache=True, seed=0,
        pipelines={"image": [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip()], "target": [IntDecoder()],
                   "index": None, "checksum": None},
    )  # fmt: skip
    module.OSCacheManager = ours
    return lambda: sum(len(torch.from_numpy(images).clone()) for images, _ in loader)


def our_epoch(file: Path, *, verify: bool = True, normalise: bool = False) -> Callable[[], int]:
    from dist_gsl.data import Augment, Loader

    loader = Loader(file, batch_size=BATCH, train=True, size=SIZE, augment=Augment.RANDOM_RESIZED, num_threads=NUM_CPUS, verify=verify)
    epochs: Iterator[int] = iter(range(10**6))

    def epoch() -> int:
        loader.set_epoch(next(epochs))
        return sum(len(batch.images) for batch in (loader if normalise else loader.levels()))

    return epoch


def decoding_alone(root: Path, *, halved: bool = False) -> Callable[[], int]:
    """libjpeg-turbo, through FFCV's binding, on all CPUs, from memory to memory."""
    from ffcv.libffcv import ctypes_imdecode

    jpegs = [np.frombuffer(file.read_bytes(), np.uint8) for file in sorted((root / "train").rglob("*.jpg"))]

    def work(part: int) -> None:
        out = np.empty((375, 500, 3), np.uint8)
        for jpeg in jpegs[part::NUM_CPUS]:
            ctypes_imdecode(jpeg.ctypes.data, jpeg.size, 375, 500, out.ctypes.data, 375, 500, 0, 0, 1, 2 if halved else 1, False, False)

    def decode() -> int:
        threads = [threading.Thread(target=work, args=(part,)) for part in range(NUM_CPUS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(jpegs)

    return decode


def images_a_second(contenders: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, epoch in contenders.items():
            begin = time.perf_counter()
            count = epoch()
            if number > 0:  # the first compiles and fills the page cache
                found[name].append(count / (time.perf_counter() - begin))
    return found


def write_all(root: Path, folder: Path) -> dict[str, dict[str, Any]]:
    from dist_gsl import data

    kinds = {"as-is": {"as_is": True, "max_side": None, "jpeg_share": 1.0}, "shipped": {}, "raw256": {"max_side": 256, "jpeg_share": 0.0}}
    for name, options in kinds.items():
        data.write(f"imagefolder:{root}", folder / name, num_workers=NUM_CPUS, **options)  # type: ignore[arg-type]
    return kinds


def writing(root: Path, folder: Path, count: int, rounds: int) -> dict[str, list[float]]:
    """Images a second of the writers, each with every setting twice or more, taking turns."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    from dist_gsl import data

    target = folder / "written"

    def ours(**options: Any) -> None:
        data.write(f"imagefolder:{root}", target, num_workers=NUM_CPUS, **options)

    def theirs() -> None:
        target.mkdir()
        image = RGBImageField(write_mode="proportion", max_resolution=400, compress_probability=0.5, jpeg_quality=90)
        writer = DatasetWriter(str(target / "train.beton"), {"image": image, "label": IntField()}, num_workers=NUM_CPUS)
        writer.from_indexed_dataset(ImageFolder(str(root / "train")))

    contenders: dict[str, Callable[[], object]] = {
        "ours, shipped settings": ours,
        "FFCV's, the same settings": theirs,
        "ours, as is": lambda: ours(as_is=True, max_side=None, jpeg_share=1.0),
        "copying the files": lambda: shutil.copytree(root / "train", target),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, write in contenders.items():
            shutil.rmtree(target, ignore_errors=True)
            begin = time.perf_counter()
            write()
            found[name].append(count / (time.perf_counter() - begin))
    return found


def report(title: str, found: dict[str, list[float]], unit: str) -> None:
    print(f"\n{title:40} images/s        range   ratio to {unit}")
    for name, rates in found.items():
        middle = statistics.median(rates)
        print(f"{name:40} {middle:8.0f}  {min(rates):5.0f}-{max(rates):5.0f}   {middle / statistics.median(found[unit]):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where files are made; 6 GB (a temporary folder)")
    options = parser.parse_args()
    print(f"{NUM_CPUS} CPUs, {options.images} images, median of {options.rounds} rounds, their range")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        root = folder / "images"
        make_images(root, options.images)
        write_all(root, folder)
        contenders = {
            "torchvision, ImageFolder and DataLoader": torchvision_epoch(root),
            "FFCV, JPEGs as they are": ffcv_epoch(folder / "as-is" / "train.beton"),
            "ours, JPEGs as they are": our_epoch(folder / "as-is" / "train.beton"),
            "ours, the same, not verified": our_epoch(folder / "as-is" / "train.beton", verify=False),
            "ours, the same, normalised floats": our_epoch(folder / "as-is" / "train.beton", normalise=True),
            "ours, shipped settings": our_epoch(folder / "shipped" / "train.beton"),
            "ours, 256 pixels raw": our_epoch(folder / "raw256" / "train.beton"),
            "decoding and nothing else": decoding_alone(root),
            "decoding at half scale": decoding_alone(root, halved=True),
        }
        read = images_a_second(contenders, options.rounds)
        report("reading", read, "torchvision, ImageFolder and DataLoader")
        written = writing(root, folder, options.images, max(2, options.rounds // 2))
        report("writing", written, "copying the files")
    print(json.dumps({"read": {k: statistics.median(v) for k, v in read.items()}, "written": {k: statistics.median(v) for k, v in written.items()}}))


if __name__ == "__main__":
    main()
