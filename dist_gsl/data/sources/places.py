"""Places2, with its 401 classes of the challenge or the 365 of the later release: images and file lists, or class folders.

ROOT holds the lists, as they are released (``categories_places365.txt``, ``places365_train_standard.txt`` or ``_challenge``,
``places365_val.txt``; or ``categories.txt``, ``train.txt``, ``val.txt``), of lines ``PATH NUMBER``, and the images: for the 365 in
``data_large_standard/`` or ``data_256_standard/`` and ``val_large/`` or ``val_256/``, as torchvision lays them out, else below ROOT
or ``images/``.
"""

from dist_gsl.data.sources.base import Source, check_split_names
from dist_gsl.data.sources.files import Entry, Files
from dist_gsl.data.sources.folders import class_folders, file_source

CATEGORIES = ("categories_places365.txt", "categories_places401.txt", "categories.txt")
LISTS = {
    "train": ("places365_train_challenge.txt", "places365_train_standard.txt", "places401_train.txt", "train.txt"),
    "val": ("places365_val.txt", "places401_val.txt", "val.txt"),
}
FOLDERS = {
    "train": ("data_large_{}", "data_256_{}"),
    "val": ("val_large", "val_256"),
}


def open_places(spec: str, argument: str, seed: int, counts: dict[str, int]) -> Source:
    files = Files(argument)
    categories = next((name for name in CATEGORIES if files.is_file(name)), None)
    if categories is None:
        if not files.is_folder("train"):
            raise ValueError(
                f"data source {spec!r} needs its lists ({CATEGORIES[0]}, ...), or a folder train/ of class folders, in {files.address()}: "
                "neither is there"
            )
        return class_folders(spec, files, seed, counts)
    check_split_names(counts, list(LISTS), spec=spec)
    numbers = dict(_lines(files, categories))
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise ValueError(f"{files.address(categories)} does not number its {len(numbers)} classes from 0 on: download it again")
    classes = sorted(numbers, key=lambda name: numbers[name])
    found = {}
    for split, lists in LISTS.items():
        listed = next((name for name in lists if files.is_file(name)), None)
        if listed is None:
            raise ValueError(f"data source {spec!r} has no list of {split} in {files.address()}: {' or '.join(lists)}")
        lines = list(_lines(files, listed))
        wrong = next((name for name, number in lines if number not in range(len(classes))), None)
        if wrong is not None:
            raise ValueError(f"{files.address(listed)} gives {wrong} a class that {categories} does not have: download both again")
        folder = _folder(files, split, "challenge" if "challenge" in listed else "standard", lines[0][0])
        entries = {entry.name: entry for entry in files.listing(folder)}
        missing = next((name for name, _ in lines if _joined(folder, name) not in entries), None)
        if missing is not None:
            raise ValueError(f"{files.address(_joined(folder, missing))}, listed in {listed}, is missing: unpack the images there")
        chosen: list[Entry] = [entries[_joined(folder, name)] for name, _ in lines]
        found[split] = chosen, [number for _, number in lines]
    return file_source(spec, files, found, [name.removeprefix("/").partition("/")[2] or name for name in classes], seed=seed, counts=counts)


def _lines(files: Files, name: str) -> list[tuple[str, int]]:
    lines = []
    for number, line in enumerate(files.read(name).decode("utf-8").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not words[1].isdigit():
            raise ValueError(f"line {number} of {files.address(name)} is not a name and a number: {line!r}; download it again")
        lines.append((words[0], int(words[1])))
    if not lines:
        raise ValueError(f"{files.address(name)} is empty: download it again")
    return lines


def _joined(folder: str, name: str) -> str:
    return "/".join(part for part in (folder, name.strip("/")) if part)


def _folder(files: Files, split: str, variant: str, first: str) -> str:
    """The folder below which the names of a list are."""
    candidates = [*(name.format(variant) for name in FOLDERS[split]), f"images/{split}", "images", split, ""]
    for folder in candidates:
        if files.is_file(_joined(folder, first)):
            return folder
    raise ValueError(f"{first}, the first of {split}, is in none of {', '.join(c for c in candidates if c)} of {files.address()}: unpack it there")
