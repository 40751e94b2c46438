"""The released layouts, read as torchvision reads them, and through to betons."""

import io
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision import datasets

from dist_gsl import data, storage
from dist_gsl.data.images import BadImageError
from dist_gsl.data.sources import ImageKind, Source, open_source
from dist_gsl.data.sources.grey import grey_square
from tests.data import layouts
from tests.object_store import KEYS, s3


def check_same(source: Source, split: str, wanted: list[tuple[Any, int]]) -> None:
    """The same images, in any order, with the same labels."""
    samples = source.splits[split]
    found = sorted((np.asarray(samples[i].image).tobytes(), samples[i].target) for i in range(len(samples)))
    assert found == sorted((np.asarray(image.convert("RGB")).tobytes(), label) for image, label in wanted)


def test_imagenets_archives_are_what_torchvision_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = layouts.make_imagenet(tmp_path / "imagenet")
    source = open_source(f"imagenet:{root}")
    # torchvision checks the real archives' MD5.
    monkeypatch.setattr(datasets.imagenet, "check_integrity", lambda file, md5=None: os.path.isfile(file))
    for split in ("train", "val"):
        theirs = datasets.ImageNet(str(root), split=split)
        check_same(source, split, list(theirs))
    assert list(source.classes) == [", ".join(words) for words in theirs.classes]
    assert source.classes == tuple(layouts.WORDS.values())


def test_imagenets_folders(tmp_path: Path) -> None:
    root = layouts.make_imagenet_folders(tmp_path / "folders")
    source = open_source(f"imagenet:{root}")
    for split in ("train", "val"):
        check_same(source, split, list(datasets.ImageFolder(str(root / split))))
    assert source.classes == tuple(sorted(layouts.WORDS))
    (layouts.make_imagenet(tmp_path / "archives") / "ILSVRC2012_devkit_t12.tar.gz").rename(root / "ILSVRC2012_devkit_t12.tar.gz")
    assert open_source(f"imagenet:{root}").classes == tuple(layouts.WORDS.values())


def test_places_is_what_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = layouts.make_places(tmp_path / "places")
    source = open_source(f"places2:{root}")
    monkeypatch.setattr(datasets.Places365, "_check_integrity", lambda self, file, md5, download: True)
    for split, theirs in (("train", "train-standard"), ("val", "val")):
        check_same(source, split, list(datasets.Places365(str(root), split=theirs, small=True)))
    assert source.classes == ("airfield", "bar", "field/cultivated")


@pytest.mark.parametrize("rows", [1, 9, 1000])
def test_parquet(tmp_path: Path, rows: int) -> None:
    root = layouts.make_parquet(tmp_path / "shards", rows=rows)
    source = open_source(f"parquet:{root}")
    assert source.classes == ("cat", "dog", "owl")
    assert list(source.splits) == ["train", "val"]
    samples = source.splits["train"]
    wanted = [(Image.open(io.BytesIO(layouts.jpeg(n))), (2 * n) % 3) for n in range(50)]
    check_same(source, "train", wanted)
    order = np.random.default_rng(0).permutation(50)
    assert [samples.read(int(i)) for i in order] == [(layouts.jpeg(int(i)), 2 * int(i) % 3) for i in order]
    with ThreadPoolExecutor(4) as pool:  # as they are read from storage that is no path
        assert list(pool.map(samples.read, [*range(50)] * 4)) == [samples.read(i) for i in range(50)] * 4
    assert samples.describe(43) == f"row 3 of {root}/data/train-00002-of-00009.parquet"
    few = open_source(f"parquet:{root}", counts={"train": 11}, seed=1).splits["train"]
    assert len({few.read(i)[0] for i in range(11)}) == 11


def test_parquet_without_names(tmp_path: Path) -> None:
    root = layouts.make_parquet(tmp_path / "shards", named=False)
    assert open_source(f"parquet:{root}").classes == ("0", "1", "2")
    file = next((root / "data").glob("train*"))
    pq.write_table(pq.read_table(file).rename_columns(["image", "caption"]), file)
    with pytest.raises(ValueError, match=r"has columns image, caption: one of .* are needed"):
        open_source(f"parquet:{root}")
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no Parquet file"):
        open_source(f"parquet:{root}")


def test_webdataset(tmp_path: Path) -> None:
    root = layouts.make_webdataset(tmp_path / "shards")
    source = open_source(f"webdataset:{root}")
    assert source.classes == ("cat", "dog", "owl")
    samples = source.splits["train"]
    assert [samples.read(i) for i in range(20)] == [(layouts.jpeg(i), i % 3) for i in range(20)]
    assert samples.describe(17) == f"00017.jpg in {root}/train-000002.tar"
    with tarfile.open(root / "val-000009.tar", "w") as archive:
        layouts.add(archive, "lonely.jpg", layouts.jpeg(1))
    with pytest.raises(ValueError, match=r"lonely\.jpg in .*val-000009\.tar has no class"):
        open_source(f"webdataset:{root}")


@pytest.mark.parametrize("hdf5", [False, True])
def test_icdar(tmp_path: Path, hdf5: bool) -> None:
    root = layouts.make_icdar(tmp_path / "icdar" / "data", hdf5=hdf5).parent
    source = open_source(f"icdar:{root}", counts={"val": 8})
    assert source.classes == layouts.CHARACTERS
    assert source.kind is ImageKind.GREY
    found: dict[str, list[tuple[bytes, int]]] = {}
    for split, samples in source.splits.items():
        read = [samples[i] for i in range(len(samples))]
        assert all(sample.image.shape == (32, 32) for sample in read)
        found[split] = sorted((sample.image.tobytes(), int(sample.target)) for sample in read)
    assert {split: len(each) for split, each in found.items()} == {"train": 32, "val": 8, "test": 12}
    assert np.bincount([label for _, label in found["val"]]).tolist() == [2, 2, 2, 2]

    def enlarged(number: int, label: int) -> tuple[bytes, int]:
        return np.asarray(Image.fromarray(layouts.character(number)).resize((32, 32), Image.Resampling.BILINEAR)).tobytes(), label

    assert sorted(found["train"] + found["val"]) == sorted(enlarged(100 * label + each, label) for label in range(4) for each in range(10))
    assert found["test"] == sorted(enlarged(1000 + 100 * label + each, label) for label in range(4) for each in range(3))
    assert len(open_source(f"icdar:{root}").splits["val"]) == 2  # a twentieth
    other = open_source(f"icdar:{root}", counts={"val": 8}, seed=1).splits["val"]
    assert sorted((other[i].image.tobytes(), int(other[i].target)) for i in range(8)) != found["val"]
    assert len(open_source(f"icdar:{root}", counts={"train": 5, "test": 4}).splits["train"]) == 5


@pytest.mark.parametrize("kind", ["share", "bool", "nan", "uint16"])
def test_levels_of_other_kinds(kind: str) -> None:
    levels = layouts.character(0)
    if kind == "share":
        np.testing.assert_array_equal(grey_square(levels / 255, 32), grey_square(levels, 32))
    elif kind == "bool":
        assert set(np.unique(grey_square(levels > 99, 24))) >= {0, 255}
    else:
        wrong = levels.astype(float) * np.nan if kind == "nan" else levels.astype(np.uint16) * 200
        with pytest.raises(BadImageError, match="not from 0 to 255"):
            grey_square(wrong, 32)


def test_icdar_leaves_an_image_of_each_class_for_training(tmp_path: Path) -> None:
    source = open_source(f"icdar:{layouts.make_icdar(tmp_path / 'one', train=1)}", counts={"val": 1})
    assert len(source.splits["train"]) == 3  # as asked for
    few = open_source(f"icdar:{layouts.make_icdar(tmp_path / 'few', train=2)}")
    assert {int(few.splits["train"][i].target) for i in range(len(few.splits["train"]))} == {0, 1, 2, 3}


def test_parquet_with_odd_shards_is_refused_or_read(tmp_path: Path) -> None:
    root = layouts.make_parquet(tmp_path / "shards")
    first, second, *_ = sorted((root / "data").glob("train*"))
    table = pq.read_table(first)
    pq.write_table(table.slice(0, 0), first)
    assert len(open_source(f"parquet:{root}").splits["train"]) == 50 - len(table)
    for labels in (pa.array([1.7] * len(table)), pa.array([None] * len(table), pa.int64()), None):
        others = table.drop(["label"])
        pq.write_table(others if labels is None else others.append_column("label", labels), second)
        with pytest.raises(ValueError, match=rf"{second.name} (needs a column 'label' of whole numbers|has \d+ rows without a class)"):
            open_source(f"parquet:{root}")


def test_icdar_is_refused_with_the_reason(tmp_path: Path) -> None:
    root = layouts.make_icdar(tmp_path / "icdar")
    for wanted in ({"val": 40}, {"train": 39}, {"test": 13}):
        with pytest.raises(ValueError, match="wanted"):
            open_source(f"icdar:{root}", counts=wanted)
    file = root / "case-insensitive-train.mat"
    for content in (b"", b"nothing", file.read_bytes()[:2000], b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\nnothing"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"train\.mat is not a file of the released characters .* download it again"):
            open_source(f"icdar:{root}")
    file.rename(root / "else.mat")
    with pytest.raises(ValueError, match="neither is there"):
        open_source(f"icdar:{root}")


MAKERS: dict[str, Callable[[Path], Path]] = {
    "imagenet": layouts.make_imagenet, "places2": layouts.make_places, "parquet": layouts.make_parquet,
    "webdataset": layouts.make_webdataset, "imagefolder": layouts.make_imagenet_folders,
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_betons_hold_the_source(name: str, tmp_path: Path) -> None:
    """Written by one process, by three, and from an object store: the same bytes; and by the loader the same pictures."""
    root = MAKERS[name](tmp_path / "root")
    for num_workers in (1, 3):
        data.write(f"{name}:{root}", tmp_path / str(num_workers), as_is=True, max_side=None, jpeg_share=1.0, num_workers=num_workers)
    one = (tmp_path / "1" / "train.beton").read_bytes()
    assert one == (tmp_path / "3" / "train.beton").read_bytes()
    samples = open_source(f"{name}:{root}").splits["train"]
    loader = data.Loader(tmp_path / "1" / "train.beton", batch_size=10, train=False, size=72)  # less would be decoded at half the scale
    mean, std = (np.array(values)[:, None, None] for values in (loader.info.mean, loader.info.std))
    for batch in loader:
        for image, target, index in zip(batch.images.numpy(), batch.targets.tolist(), batch.indices.tolist(), strict=True):
            whole, label = samples[index]
            assert target == label
            side = int(min(whole.shape[:2]) * 224 / 256)
            top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
            square = Image.fromarray(whole[top : top + side, left : left + side]).resize((72, 72), Image.Resampling.BILINEAR)
            assert np.abs((image * std + mean) * 255 - np.asarray(square).transpose(2, 0, 1)).max() < 1.01


@pytest.mark.parametrize("name", [*MAKERS, "icdar"])
def test_sources_on_an_object_store(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    root = {**MAKERS, "icdar": layouts.make_icdar}[name](tmp_path / "root")
    with s3() as bucket:
        there = storage.join(bucket, "source")
        for file in root.rglob("*"):
            if file.is_file():
                storage.upload(file, storage.join(there, str(file.relative_to(root))))
        here, remote = open_source(f"{name}:{root}"), open_source(f"{name}:{there}")
        assert here.classes == remote.classes
        data.write(f"{name}:{there}", tmp_path / "out", num_workers=2)
    data.write(f"{name}:{root}", tmp_path / "here")
    for split in here.splits:
        assert (tmp_path / "out" / f"{split}.beton").read_bytes() == (tmp_path / "here" / f"{split}.beton").read_bytes()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    def message(spec: str) -> str:
        with pytest.raises(ValueError, match=r"[a-z]") as error:
            open_source(spec)
        assert "\n" not in str(error.value)
        return str(error.value)

    for name in ("imagenet", "places2", "icdar", "parquet", "webdataset", "imagefolder"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert str(tmp_path / "empty") in message(f"{name}:{tmp_path}/empty")
    root = layouts.make_imagenet(tmp_path / "imagenet")
    for file in sorted(root.iterdir()):
        content = file.read_bytes()
        if file.suffix == ".tar":
            file.write_bytes(content[: len(content) // 2 // 512 * 512 + 100])
            assert "download" in message(f"imagenet:{root}")
        file.write_bytes(b"\x1f\x8bnothing")
        assert "download it again" in message(f"imagenet:{root}")
        file.unlink()
        assert file.name in message(f"imagenet:{root}")
        file.write_bytes(content)
    root = layouts.make_places(tmp_path / "places")
    (root / "places365_val.txt").write_text("Places365_val_00000001.jpg one\n")
    assert "line 1 of" in message(f"places2:{root}")
    (root / "places365_val.txt").write_text("Places365_val_00000001.jpg 7\n")
    assert "a class that categories_places365.txt does not have" in message(f"places2:{root}")
    (root / "places365_val.txt").write_text("Places365_val_00000001.jpg 1\nPlaces365_val_00000099.jpg 1\n")
    assert "Places365_val_00000099.jpg, listed in places365_val.txt, is missing" in message(f"places2:{root}")
