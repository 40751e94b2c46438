"""Weights to start a training from: those of a run, of one of its checkpoints, or a file that another program wrote."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_gsl.training import checkpoint
from dist_gsl.training.checkpoint import Checkpoints

WRAPPERS = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before the names of the network that they hold."""
PLACES = ("state_dict", "model_state_dict", "model")
"""Where programs keep the weights in what they save besides."""
AUXILIARY = "aux"
"""In the names of classifiers that networks have for their training alone; this project's go without."""


class Weights(NamedTuple):
    """A network's tensors."""

    tensors: Mapping[str, Tensor]
    """By their names in its `state_dict`."""
    neurons: Mapping[str, Any] | None
    """Of each layer which neurons of the starting network are left; None where that is not known."""


def read(path: str | Path) -> Weights:
    """Of a run's folder (its last good checkpoint), a checkpoint's folder or file, or a state_dict saved by `torch.save` or as safetensors, alone or
    under the names that programs give it. Nothing in a file is run.

    `ValueError` where there is nothing of the kind.
    """
    path = Path(path)
    if (path / "config.yaml").is_file():
        last = Checkpoints(path / "checkpoints").last(lambda text: warnings.warn(text, stacklevel=2))
        if last is None:
            raise ValueError(f"train.init: run {path} has no checkpoint yet; train it first")
        return _of_checkpoint(last[1])
    if path.is_dir() or path.name == checkpoint.FILE:
        return _of_checkpoint(checkpoint.load(path))
    if not path.is_file():
        raise ValueError(f"train.init: {path}: no such file; name a run's folder, a checkpoint, or a file of weights (.pt, .pth, .safetensors)")
    return Weights(_plain(path, _loaded(path)), None)


def _of_checkpoint(state: Mapping[str, Any]) -> Weights:
    """With a moving average, that is what was evaluated."""
    average = state.get("average")
    return Weights(state["model"] if average is None else average, state["optimizer"]["neurons"])


def _loaded(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise  # of this machine, not of the file
    except Exception as error:  # whatever a foreign file makes them raise
        raise ValueError(
            f"train.init: {path}: not readable as weights ({type(error).__name__}); save a state_dict by torch.save or as safetensors"
        ) from error


def _plain(path: Path, found: Any) -> dict[str, Tensor]:
    """The tensors, found where programs put them, by the names of the network itself."""
    for place in PLACES:
        if isinstance(found, Mapping) and isinstance(found.get(place), Mapping):
            found = found[place]
    if not isinstance(found, Mapping) or not found or not all(isinstance(n, str) and isinstance(v, Tensor) for n, v in found.items()):
        raise ValueError(f"train.init: {path} holds no state_dict: names and tensors, alone or as {', '.join(map(repr, PLACES))}")
    tensors = dict(found)
    for wrapper in WRAPPERS * len(WRAPPERS):
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors


def load(model: nn.Module, tensors: Mapping[str, Tensor], *, path: str) -> list[str]:
    """Loads them into a network of their kind, but for the last layer where that has another number of outputs: the names of its tensors, which
    stay as they were. `ValueError` where anything else does not fit; the network is then as it was.
    """
    state = model.state_dict()
    layer = list(state)[-1].rpartition(".")[0]
    last_layer = [name for name in state if name.rpartition(".")[0] == layer]
    missing = [name for name in state if name not in tensors and not name.endswith("num_batches_tracked")]
    foreign = [name for name in tensors if name not in state and AUXILIARY not in name.lower()]
    other = [name for name, own in state.items() if name in tensors and tensors[name].shape != own.shape]
    is_of_others = all(
        name in tensors and tensors[name].dim() == state[name].dim() and len(tensors[name]) != len(state[name]) for name in last_layer
    )
    kept = last_layer if is_of_others else []
    numbers = [name for name, own in state.items() if own.is_floating_point() and name in tensors and name not in kept]
    for names, what in (
        (missing, "is missing"), (foreign, "is none of this network's"), ([n for n in other if n not in kept], "is of another shape"),
        ([n for n in numbers if not tensors[n].is_floating_point()], "has no floating-point numbers"),
        ([n for n in numbers if not tensors[n].isfinite().all()], "holds numbers that are not finite"),
    ):  # fmt: skip
        if names:
            raise ValueError(f"train.init: {path} does not fit: {names[0]!r} {what}; name weights of the same network and widths")
    model.load_state_dict({name: tensors[name] if name in tensors and name not in kept else own for name, own in state.items()})
    return kept
