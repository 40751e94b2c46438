"""Reading and writing checkpoints: one file, atomically, loaded without running anything in it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
"""Version of the layout of a checkpoint."""
FILE = "state.pt"


def save(state: dict[str, Any], directory: str | Path) -> Path:
    """Writes the state to `directory`/state.pt: a temporary file first, then renamed."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{FILE}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, directory / FILE)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return directory / FILE


def load(path: str | Path) -> dict[str, Any]:
    """The state in a checkpoint's file or directory, on the CPU. `ValueError` if there is none that can be read."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"checkpoint {path}: no such file; name a run's checkpoints/*/{FILE}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes torch raise
        raise ValueError(
            f"checkpoint {path}: not readable ({type(error).__name__}); it is damaged or another kind of file"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path}: not a checkpoint of this version (format {FORMAT}); train again or use the version that wrote it"
        )
    return state
