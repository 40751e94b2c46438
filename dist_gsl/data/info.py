"""What is known of a data set on disk: the description beside its files, and what a file's own header says."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from dist_gsl.data.sources import Task

DESCRIPTION: Final = "dataset.json"
FORMAT_VERSION: Final = 2
SMALLEST_PAGE: Final = 1 << 21
"""Bytes of the smallest page that FFCV knows."""
JPEG: Final = 0
RAW: Final = 1
"""How FFCV numbers the two ways in which an image in colour is stored."""


class DataError(ValueError):
    """A data file is missing, foreign, damaged, or not what its description says. One line: what, and what to do."""


@dataclass(frozen=True, kw_only=True)
class BetonInfo:
    """What a beton holds, by its own header."""

    path: Path
    num_samples: int
    fields: dict[str, str]
    """Name of each field and its FFCV type, such as ``RGBImageField``, in the file's order."""
    channels: int
    """Channels of the field ``image``; 0 where there is no such field."""
    height: int
    """Largest height of an image, in pixels."""
    width: int
    """Largest width of an image, in pixels."""
    target_size: int
    """Number of real numbers in a target; 0 where the target is a class."""
    num_bytes: int
    sha256: str | None
    """Hash of the file, where it was computed (``full=True``)."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """An image of the source that is not in the file."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One file of a data set."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str
    class_counts: tuple[int, ...]
    """Samples of each class; empty for regression."""
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The description of a data set, kept as ``dataset.json`` beside its betons."""

    version: int
    source: str
    seed: int
    task: Task
    classes: tuple[str, ...]
    """Class names by label; empty for regression."""
    num_targets: int
    """Number of real numbers in a target; 0 for classification."""
    channels: int
    size: int | None
    """Side of the images where all are squares of one size, else None."""
    mean: tuple[float, ...]
    """Mean of each channel over train, levels in 0..1."""
    std: tuple[float, ...]
    """Standard deviation of each channel over the pixels of train, levels in 0..1."""
    splits: dict[str, SplitInfo]
    settings: dict[str, Any] = field(repr=False)
    """All that the files follow from; equal settings mean equal samples."""

    @property
    def num_outputs(self) -> int:
        """Outputs of a network for this data: one a class, or one a number of the target."""
        return len(self.classes) if self.task is Task.CLASSIFICATION else self.num_targets

    def to_json(self) -> str:
        content = {
            "version": self.version,
            "source": self.source,
            "seed": self.seed,
            "task": self.task.value,
            "classes": self.classes,
            "num_targets": self.num_targets,
            "channels": self.channels,
            "size": self.size,
            "mean": self.mean,
            "std": self.std,
            "splits": {name: asdict(split) for name, split in self.splits.items()},
            "settings": self.settings,
        }
        return json.dumps(content, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> "DatasetInfo":
        """Raises KeyError, TypeError or ValueError where `text` is not such a description."""
        content = json.loads(text)
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"version {content['version']} instead of {FORMAT_VERSION}")
        return DatasetInfo(
            **{
                **content,
                "task": Task(content["task"]),
                "classes": tuple(content["classes"]),
                "mean": tuple(content["mean"]),
                "std": tuple(content["std"]),
                "splits": {name: _split_info(split) for name, split in content["splits"].items()},
            }
        )


def _split_info(content: dict[str, Any]) -> SplitInfo:
    skipped = tuple(Skipped(**each) for each in content["skipped"])
    return SplitInfo(**{**content, "class_counts": tuple(content["class_counts"]), "skipped": skipped})


def dataset_info(directory: str | Path) -> DatasetInfo:
    """Read ``dataset.json`` of a folder that `write` made. Raises DataError where it is missing or not readable."""
    path = Path(directory) / DESCRIPTION
    try:
        return DatasetInfo.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: write it with `dist-gsl data write SOURCE {directory}`") from None
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} is not a description of a data set ({error}): write the data set again") from error
