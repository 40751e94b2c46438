"""ImageNet (ILSVRC 2012): the official archives as they were downloaded, or class folders.

ROOT holds ``ILSVRC2012_img_train.tar``, ``ILSVRC2012_img_val.tar`` and ``ILSVRC2012_devkit_t12.tar.gz``, of which nothing is
unpacked; or ``train/WNID/`` and ``val/WNID/``, as torchvision lays them out, where the development kit only brings names. Classes are
numbered as torchvision does: by the order of their WordNet ids.
"""

import hashlib
import io
import tarfile
from dataclasses import dataclass

from dist_gsl.data.sources.base import ImageKind, Source, Task, check_split_names
from dist_gsl.data.sources.files import Files, Member, TarSamples, members
from dist_gsl.data.sources.folders import chosen, class_folders

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


@dataclass(frozen=True)
class _Devkit:
    words: dict[str, str]
    """What each WordNet id means."""
    val_ids: list[str]
    """The WordNet id of each validation image, in the order of their names."""


def open_imagenet(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
    files = Files(argument)
    devkit = _read_devkit(files) if files.is_file(DEVKIT) else None
    if not files.is_file(TRAIN):
        if not files.is_folder("train"):
            raise ValueError(f"data source {spec!r} needs {TRAIN}, or a folder train/ of class folders, in {files.address()}: neither is there")
        return class_folders(spec, files, seed, counts, names=devkit.words if devkit else None)
    for name in (VAL, DEVKIT):
        if not files.is_file(name):
            raise ValueError(f"{files.address(name)} of data source {spec!r} is missing: put it beside {TRAIN}")
    assert devkit is not None
    check_split_names(counts, ["train", "val"], spec=spec)
    train = list(members(files, TRAIN))
    ids = sorted({member.name.partition("/")[0] for member in train})
    label_of = {wnid: label for label, wnid in enumerate(ids)}
    val = sorted(members(files, VAL))
    if len(val) != len(devkit.val_ids):
        raise ValueError(f"{files.address(VAL)} holds {len(val)} images, {DEVKIT} knows {len(devkit.val_ids)}: download both again")
    unknown = sorted(set(devkit.val_ids) - set(ids))
    if unknown:
        raise ValueError(f"{files.address(TRAIN)} lacks class {unknown[0]} ({devkit.words[unknown[0]]}): download it again")
    splits = {}
    for number, (split, archive, found, labels) in enumerate((
        ("train", TRAIN, train, [label_of[member.name.partition("/")[0]] for member in train]),
        ("val", VAL, val, [label_of[wnid] for wnid in devkit.val_ids]),
    )):  # fmt: skip
        kept = chosen(len(found), counts.get(split), seed=seed, number=number, what=f"{files.address(archive)} holds")
        splits[split] = TarSamples(files, [archive], [len(kept)], [found[i] for i in kept], [labels[i] for i in kept])
    return Source(
        spec=spec, kind=ImageKind.COLOUR, task=Task.CLASSIFICATION, classes=tuple(devkit.words.get(wnid, wnid) for wnid in ids),
        num_targets=0, splits=splits, fingerprint=_fingerprint(train, val),
    )  # fmt: skip


def _fingerprint(*found: list[Member]) -> str:
    listing = hashlib.sha256()
    for each in found:
        for member in each:
            listing.update(f"{member.name}\0{member.offset}\0{member.size}\n".encode())
    return listing.hexdigest()


def _read_devkit(files: Files) -> _Devkit:
    from scipy.io import loadmat

    wanted = {"data/meta.mat": b"", "data/ILSVRC2012_validation_ground_truth.txt": b""}
    try:
        with tarfile.open(fileobj=io.BytesIO(files.read(DEVKIT)), mode="r:gz") as archive:
            for member in archive:
                for name in wanted:
                    content = archive.extractfile(member) if member.name.endswith(name) else None
                    if content is not None:
                        wanted[name] = content.read()
        meta, truth = wanted.values()
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # (number, WordNet id, words, gloss, number of children, ...); those without children are the classes.
        classes = [(int(row[0]), str(row[1]), str(row[2])) for row in synsets if int(row[4]) == 0]
        id_of = {number: wnid for number, wnid, _ in classes}
        return _Devkit({wnid: words for _, wnid, words in classes}, [id_of[int(line)] for line in truth.split()])
    except (tarfile.TarError, EOFError, KeyError, ValueError, TypeError, IndexError, OSError) as error:
        raise ValueError(f"{files.address(DEVKIT)} is not ImageNet's development kit ({error}): download it again") from error
