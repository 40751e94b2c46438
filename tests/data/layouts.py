"""Small trees in the layouts in which data sets are released: the same photographs, so that readers can be compared."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

PHOTOGRAPHS = load_sample_images().images
WORDS = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus", "n01484850": "great white shark"}
NUMBERS = {"n01443537": 1, "n01484850": 2, "n01440764": 3}
"""The development kit's, which are not in the order of the ids."""


def pixels(number: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(number)
    height, width = rng.integers(60, 120, size=2)
    top, left = rng.integers(300), rng.integers(500)
    return PHOTOGRAPHS[number % 2][top : top + height, left : left + width]


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(number)).save(file, "JPEG", quality=92)
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def imagenet_train(counts: int) -> Iterator[tuple[str, str, bytes]]:
    """(WordNet id, file, content)."""
    number = 0
    for wnid in sorted(WORDS):
        for each in range(counts):
            yield wnid, f"{wnid}_{each}.JPEG", jpeg(number)
            number += 1


def imagenet_val(count: int) -> list[tuple[str, str, bytes]]:
    ids = sorted(WORDS)
    return [(ids[(7 * n) % 3], f"ILSVRC2012_val_{n + 1:08d}.JPEG", jpeg(1000 + n)) for n in range(count)]


def make_imagenet(root: Path, *, train: int = 8, val: int = 9) -> Path:
    """The three archives as they are downloaded."""
    from scipy.io import savemat

    root.mkdir(parents=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in sorted(WORDS, reverse=True):  # in no order that one could rely on
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for other, name, image in imagenet_train(train):
                    if other == wnid:
                        add(inner, name, image)
            add(outer, f"{wnid}.tar", content.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        for _, name, image in imagenet_val(val):
            add(archive, name, image)
    kind: Any = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.array(
        [(NUMBERS[wnid], wnid, WORDS[wnid], "a fish", 0) for wnid in NUMBERS] + [(4, "n00000001", "fish", "all fish", 3)], dtype=kind
    )
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        truth = "".join(f"{NUMBERS[wnid]}\n" for wnid, _, _ in imagenet_val(val))
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    return root


def make_imagenet_folders(root: Path, *, train: int = 8, val: int = 9) -> Path:
    """As torchvision unpacks them."""
    for split, found in (("train", imagenet_train(train)), ("val", imagenet_val(val))):
        for wnid, name, content in found:
            file = root / split / wnid / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return root


PLACES = ("/a/airfield", "/b/bar", "/f/field/cultivated")


def make_places(root: Path, *, train: int = 8, val: int = 6) -> Path:
    """Places365-standard, small images, as torchvision lays them out."""
    root.mkdir(parents=True)
    (root / "categories_places365.txt").write_text("".join(f"{name} {number}\n" for number, name in enumerate(PLACES)))
    lines = {"train": [], "val": []}  # type: dict[str, list[str]]
    for number in range(3 * train):
        label = (5 * number) % 3
        name = f"{PLACES[label]}/{number:08d}.jpg"
        write(root / "data_256_standard" / name[1:], jpeg(number))
        lines["train"].append(f"{name} {label}")
    for number in range(val):
        name = f"Places365_val_{number + 1:08d}.jpg"
        write(root / "val_256" / name, jpeg(2000 + number))
        lines["val"].append(f"{name} {number % 3}")
    (root / "places365_train_standard.txt").write_text("\n".join(lines["train"]) + "\n")
    (root / "places365_val.txt").write_text("\n".join(lines["val"]) + "\n")
    return root


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def make_parquet(root: Path, *, train: int = 50, val: int = 12, rows: int = 9, per_shard: int = 20, named: bool = True) -> Path:
    """As the `datasets` library writes ImageNet: image {bytes, path}, label; and a test split without labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "data").mkdir(parents=True)
    names = ["cat", "dog", "owl"]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    if named:
        info = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
        schema = schema.with_metadata({"huggingface": json.dumps(info)})
    for split, count, start in (("train", train, 0), ("validation", val, 3000), ("test", 5, 4000)):
        for shard, first in enumerate(range(0, count, per_shard)):
            numbers = range(first, min(first + per_shard, count))
            table = pa.table({
                "image": pa.array([{"bytes": jpeg(start + n), "path": f"{n}.jpg"} for n in numbers], image),
                "label": pa.array([-1 if split == "test" else (2 * n) % 3 for n in numbers], pa.int64()),
            }, schema=schema)  # fmt: skip
            pq.write_table(table, root / "data" / f"{split}-{shard:05d}-of-00009.parquet", row_group_size=rows)
    return root


def make_webdataset(root: Path, *, train: int = 20, val: int = 6, per_shard: int = 8) -> Path:
    root.mkdir(parents=True)
    (root / "classes.txt").write_text("cat\ndog\nowl\n")
    for split, count, start in (("train", train, 0), ("val", val, 5000)):
        for shard, first in enumerate(range(0, count, per_shard)):
            with tarfile.open(root / f"{split}-{shard:06d}.tar", "w") as archive:
                for number in range(first, min(first + per_shard, count)):
                    add(archive, f"{number:05d}.jpg", jpeg(start + number))
                    if number % 2:
                        add(archive, f"{number:05d}.cls", str(number % 3).encode())
                    else:
                        add(archive, f"{number:05d}.json", json.dumps({"label": number % 3}).encode())
    return root


CHARACTERS = ("0", "7", "a", "z")


def character(number: int) -> NDArray[np.uint8]:
    """Not as high as wide, so that a transposed one is found."""
    return np.random.default_rng(number).integers(0, 256, (24, 22), dtype=np.uint8)


def make_icdar(root: Path, *, train: int = 10, test: int = 3, hdf5: bool = False) -> Path:
    """The two files of the released characters, in either of MATLAB's containers."""
    import h5py
    from scipy.io import savemat

    root.mkdir(parents=True)
    for start, name, count in ((0, "case-insensitive-train.mat", train), (1000, "icdar2003-chars-test.mat", test)):
        labels = np.empty((1, len(CHARACTERS)), object)
        images = np.empty((1, len(CHARACTERS)), object)
        for label, letter in enumerate(CHARACTERS):
            labels[0, label] = letter
            cell = np.empty((1, count), object)
            for each in range(count):
                cell[0, each] = character(start + 100 * label + each)
            images[0, label] = cell
        if not hdf5:
            savemat(root / name, {"gt": {"labels": labels, "images": images}})
            continue
        with h5py.File(root / name, "w", userblock_size=512) as file:
            kind = h5py.ref_dtype
            references = file.create_group("#refs#")
            group = file.create_group("gt")
            to_labels = group.create_dataset("labels", (len(CHARACTERS), 1), kind)
            to_images = group.create_dataset("images", (len(CHARACTERS), 1), kind)
            for label, letter in enumerate(CHARACTERS):
                to_labels[label, 0] = references.create_dataset(f"l{label}", data=np.array([[ord(letter)]], np.uint16)).ref
                cell = references.create_dataset(f"c{label}", (count, 1), kind)
                for each in range(count):
                    cell[each, 0] = references.create_dataset(f"i{label}-{each}", data=images[0, label][0, each].T).ref
                to_images[label, 0] = cell.ref
        with (root / name).open("r+b") as raw:
            raw.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + bytes((0, 2)) + b"IM")
    return root
