"""What a tracker is: where the records of one run go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn


class Status(Enum):
    """How a run ended."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


class Tracker:
    """Where the records of one run go. This one is the null object: it takes everything and does nothing."""

    run_id: str | None = None
    """The store's name for the run, for checkpoints; None until the store has given one."""

    def start(
        self, name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None, *, run_id: str | None = None
    ) -> str | None:
        """Begin a run, or go on with `run_id`; returns the run's id, None where there is none (yet).

        params: the config, flat; logged only where the run is new, as parameters of a run cannot change.
        """
        return None

    def metrics(self, values: Mapping[str, float | None], step: int) -> None:
        """Numbers of one epoch; None is left out."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """The numbers of an epoch's record, once: an epoch that the store has is left as it is, whoever told of it."""

    def back(self, epoch: int) -> None:
        """The training went back to after this epoch: later ones that the store has are told again, and count as they are told then."""

    def summary(self, values: Mapping[str, float | None]) -> None:
        """The final numbers, under the same names in every run, for the store's compare view; None is left out."""

    def artifacts(self, paths: Path | Iterable[Path]) -> None:
        """A folder (with all in it, under its name) or files. They are read now, or later where the store is away."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of equal keys, shown as a table."""

    def model(self, model: nn.Module, example: NDArray[np.float32], *, pip_requirements: Sequence[str]) -> None:
        """The network as a program that loads without this project, at any batch size.

        example: a batch of at least 2 inputs. `ValueError` for fewer. The model is left as it is.
        """

    def is_running(self, run_id: str) -> bool:
        """Whether the store has a run that was not closed; False where it cannot be asked."""
        return False

    def end(self, status: Status | str = Status.FINISHED) -> None:
        """Close the run: "FINISHED", "FAILED" or "KILLED"."""


class NullTracker(Tracker):
    """Tracks nothing."""


def epoch_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch's record, and the alive neurons of each layer as "alive/LAYER"."""
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
    return {**numbers, **{f"alive/{layer}": count for layer, count in record["alive"].items()}}
