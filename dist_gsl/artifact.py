"""The folder of a learned network, `compact/`: written whole or not at all, read back without pickle.

`architecture.json`: the network's name and arguments, its widths, which neurons of the starting network it kept, its
classes and preprocessing. `weights.safetensors`: its parameters and running statistics. `model.pt2`: the network with
its weights as a torch.export program, any batch size, which loads with torch alone. `model.onnx`: the same for
onnxruntime; input `images`, output `outputs`.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_gsl.models import create_model
from dist_gsl.neurons import Neurons
from dist_gsl.removal import set_widths
from dist_gsl.storage import StorageAwayError, may_pass
from dist_gsl.tracing import find_neurons

if TYPE_CHECKING:
    from PIL.Image import Image

ARCHITECTURE, WEIGHTS, PROGRAM, ONNX = "architecture.json", "weights.safetensors", "model.pt2", "model.onnx"
FORMAT_VERSION = 1
CLASSIFICATION, REGRESSION = "classification", "regression"
_REMEDY = "write it with `dist-gsl compact RUN_DIR`"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What an image goes through before the network: crop, resize, (level / 255 - mean) / std."""

    channels: int
    """1: grey, 3: RGB."""
    size: int
    """Height and width in pixels that the network reads."""
    mean: tuple[float, ...]
    """One a channel, levels in 0..1."""
    std: tuple[float, ...]
    """One a channel, levels in 0..1."""
    task: str
    """"classification" or "regression"."""
    crop: float
    """Side of the central square that is kept, as a share of the shorter side: 224 / 256 in colour, 1 in grey."""

    @classmethod
    def from_dict(cls, image: Mapping[str, Any]) -> Preprocessing:
        """`ValueError` for a missing or unknown entry; `crop` may be left out."""
        values = {"crop": 224 / 256 if image.get("channels") == 3 else 1.0, **image}
        names = [entry.name for entry in fields(cls)]
        odd = sorted(set(names) ^ set(values))
        if odd:
            raise ValueError(f"preprocessing: entry {odd[0]!r} is missing or unknown; give {', '.join(names)}")
        values["mean"], values["std"] = tuple(values["mean"]), tuple(values["std"])
        if {len(values["mean"]), len(values["std"])} != {values["channels"]}:
            raise ValueError(f"preprocessing: mean and std need one number for each of {values['channels']} channels")
        if values["task"] not in (CLASSIFICATION, REGRESSION):
            raise ValueError(f"preprocessing: task is {values['task']!r}; give {CLASSIFICATION} or {REGRESSION}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All of a compact network but its weights."""

    network: dict[str, Any]
    """Arguments of `create_model`, `name` among them."""
    widths: dict[str, int]
    """Neurons of each layer, those included that cannot be removed."""
    indices: dict[str, list[int]]
    """The neurons of the starting network that each layer kept."""
    masked: dict[str, list[int]] = field(default_factory=dict)
    """Of those the dead ones, all zero, that round a layer's width up; a layer without any is left out."""
    classes: list[str]
    """Class names by output; for regression empty, or a name for each output."""
    preprocessing: Preprocessing
    versions: dict[str, str]
    """Versions of dist_gsl and torch that wrote the folder."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the writer wanted to keep: the run's name, its accuracy."""
    transform_input: bool | None = None
    """Of googlenet and inception_v3: whether they rescale their input, as those with torchvision's weights do."""
    version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Raises KeyError, TypeError or ValueError where `text` is not such a description."""
        content = json.loads(text)
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"version {content['version']} instead of {FORMAT_VERSION}")
        return cls(**{**content, "preprocessing": Preprocessing.from_dict(content["preprocessing"])})


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says of one image."""

    path: Path
    classes: list[str]
    """The likeliest classes, likeliest first; for regression the outputs' names."""
    probabilities: list[float]
    """Their probabilities; for regression empty."""
    values: list[float]
    """For regression the network's outputs; otherwise empty."""

    def __str__(self) -> str:
        """As "a.png: E 97.3 %, F 1.2 %", or for regression "a.png: angle 31.4"."""
        if self.values:
            names = self.classes or [""] * len(self.values)
            parts = [f"{name} {value:.4g}".strip() for name, value in zip(names, self.values, strict=False)]
        else:
            parts = [f"{c} {100 * p:.1f} %" for c, p in zip(self.classes, self.probabilities, strict=True)]
        return f"{self.path}: {', '.join(parts)}"


def save_compact(
    directory: Path,
    *,
    model: nn.Module,
    neurons: Neurons,
    network: Mapping[str, Any],
    classes: Sequence[str],
    image: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a network to a folder, in the place of what was there; an interrupted write leaves the old folder.

    A network that torch.export cannot follow at every batch size is written without `model.pt2`, with a warning.

    Args:
        directory: the folder, by convention RUN_DIR/compact.
        model: the network, already cut (`compact(...).model`); left as it is.
        neurons: its neurons, with their numbers in the starting network (`compact(...).neurons`).
        network: the arguments of `create_model` that build the starting network, `name` among them.
        classes: class names by output; empty for regression.
        image: channels, size, mean, std (levels in 0..1), task; and `crop`, if not the default of `Preprocessing`.
        extra: what else to keep, as JSON.

    Raises:
        ValueError: `image` lacks an entry.
        OSError: the folder cannot be written.
    """
    from dist_gsl import __version__

    directory = Path(directory)
    model = copy.deepcopy(model).cpu().eval()
    architecture = Architecture(
        network={**network, "pretrained": False},  # the weights are in the folder
        widths={layer.name: layer.num_neurons for layer in neurons.all_layers},
        indices={layer.name: layer.indices.tolist() for layer in neurons},
        masked={layer.name: layer.indices[~layer.mask].tolist() for layer in neurons if not layer.mask.all()},
        classes=list(classes),
        preprocessing=Preprocessing.from_dict(image),
        versions={"dist_gsl": __version__, "torch": str(torch.__version__)},
        extra=dict(extra or {}),
        transform_input=getattr(model, "transform_input", None),
    )
    with _replaced(directory) as new:
        (new / ARCHITECTURE).write_text(architecture.to_json(), encoding="utf-8")
        _save_weights(model, new / WEIGHTS)
        _save_programs(model, new, example=_example(architecture.preprocessing))


def load_architecture(path: str | Path) -> Architecture:
    """The description in a compact folder, or in the run's folder that holds one. `ValueError` if there is none."""
    file = _folder(path) / ARCHITECTURE
    try:
        return Architecture.from_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} holds no compact network ({ARCHITECTURE} is missing): {_REMEDY}") from None
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} does not describe a compact network ({_line(error)}): {_REMEDY}") from error


def load(path: str | Path) -> nn.Module:
    """The compact network of a folder that training wrote, on the CPU, in evaluation mode.

    path: RUN_DIR/compact, or RUN_DIR. `ValueError` where a file is missing, is not one of ours, or does not fit the
    others. The global random state is left as it is. `load_with_neurons` gives what going on with the penalty needs too.
    """
    return load_with_neurons(path)[0]


def load_with_neurons(path: str | Path) -> tuple[nn.Module, Neurons]:
    """`load`, and the network's neurons with the group sizes and numbers that they had in the starting network: what
    `ProximalSGD` takes to train it on."""
    architecture = load_architecture(path)
    file = _folder(path) / WEIGHTS
    weights = _load_weights(file)
    preprocessing = architecture.preprocessing
    try:
        with torch.random.fork_rng(devices=[]):
            model = create_model(**architecture.network)
        if architecture.transform_input is not None:
            model.transform_input = architecture.transform_input  # type: ignore[assignment]
        neurons = find_neurons(model, _example(preprocessing))
        kept = {name: torch.tensor(indices, dtype=torch.int64) for name, indices in architecture.indices.items()}
        model, neurons = set_widths(model, neurons, kept)
        for name, indices in architecture.masked.items():
            neurons[name].mask &= ~torch.isin(neurons[name].indices, torch.tensor(indices, dtype=torch.int64))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_folder(path) / ARCHITECTURE} does not fit the network it names ({_line(error)}): {_REMEDY}"
        ) from error
    _check_weights(weights, model.state_dict(), file)
    model.load_state_dict(weights)
    return model.eval(), neurons


def classify(
    path: str | Path, images: Sequence[str | Path], *, top: int = 5, batch_size: int = 32
) -> list[Prediction]:
    """What the compact network of a folder says of images of the user's own, in their order.

    An image is turned as its camera says, made grey or RGB as the network needs, cut to its central square, resized
    and normalised. `ValueError` naming the image that cannot be read, or the folder that holds no network.
    """
    architecture = load_architecture(path)
    model = load(path)
    preprocessing, paths = architecture.preprocessing, [Path(image) for image in images]
    predictions = []
    for start in range(0, len(paths), batch_size):
        part = paths[start : start + batch_size]
        with torch.inference_mode():
            outputs = model(torch.stack([read_image(image, preprocessing) for image in part]))
        predictions += [_prediction(image, row, architecture, top) for image, row in zip(part, outputs, strict=True)]
    return predictions


def read_image(path: str | Path, preprocessing: Preprocessing) -> Tensor:
    """An image of any size as the network reads it: float32 (C, size, size). `ValueError` if it cannot be decoded."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = _eight_bit(ImageOps.exif_transpose(opened))
            image = image.convert("L" if preprocessing.channels == 1 else "RGB")
    except Exception as error:  # PIL's decoders raise nearly anything on broken bytes
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else _line(error)
        raise ValueError(f"image {path} cannot be read ({reason}): give an image file, such as PNG or JPEG") from error
    size, side = preprocessing.size, max(1, int(min(image.size) * preprocessing.crop))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # The same square by the same filter as the loader's, which grows with the reduction.
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    levels = torch.from_numpy(np.array(image, np.float32)).view(size, size, -1).permute(2, 0, 1)
    mean, std = (torch.tensor(v).view(-1, 1, 1) * 255 for v in (preprocessing.mean, preprocessing.std))
    return (levels - mean) / std


def _eight_bit(image: Image) -> Image:
    """16-bit grey to 8 bits, which PIL's convert would clip at 255; any other image as it is."""
    if not image.mode.startswith("I"):
        return image
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))


def _prediction(path: Path, output: Tensor, architecture: Architecture, top: int) -> Prediction:
    if architecture.preprocessing.task == REGRESSION:
        return Prediction(path=path, classes=architecture.classes, probabilities=[], values=output.tolist())
    probabilities, numbers = output.softmax(0).topk(min(top, len(output)))
    names = [architecture.classes[n] if n < len(architecture.classes) else str(n) for n in numbers.tolist()]
    return Prediction(path=path, classes=names, probabilities=probabilities.tolist(), values=[])


# --- files


def _folder(path: str | Path) -> Path:
    path = Path(path)
    inside = path / "compact"
    return inside if not (path / ARCHITECTURE).exists() and (inside / ARCHITECTURE).exists() else path


@contextmanager
def _replaced(directory: Path) -> Iterator[Path]:
    """A new empty folder: at the end of the block it takes the place of `directory`; it vanishes where that raises."""
    new, old = (directory.parent / f".{directory.name}.{suffix}" for suffix in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    new.mkdir(parents=True)
    try:
        yield new
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(directory, old)
        try:
            os.replace(new, directory)
        except OSError:
            if old.exists():
                os.replace(old, directory)
            raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _example(preprocessing: Preprocessing) -> Tensor:
    """Two images: torch.export takes a batch of one for a constant."""
    return torch.zeros(2, preprocessing.channels, preprocessing.size, preprocessing.size)


def _save_weights(model: nn.Module, file: Path) -> None:
    from safetensors.torch import save_file

    # A clone each: safetensors refuses tensors that share memory, and strides.
    state = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in model.state_dict().items()}
    with _writing(file):
        save_file(state, file)


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """What libraries raise of their own where a file cannot be written is a `StorageAwayError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "writ" not in str(error):
            raise
        raise StorageAwayError(f"{file} cannot be written: {_line(error)}") from error


def _load_weights(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: {_REMEDY}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} does not hold weights ({_line(error)}): {_REMEDY}") from error


def _check_weights(weights: Mapping[str, Tensor], state: Mapping[str, Tensor], file: Path) -> None:
    odd = sorted(set(weights) ^ set(state))
    if odd:
        where = "lacks" if odd[0] in state else "holds a foreign"
        raise ValueError(f"{file} {where} tensor {odd[0]!r}: it is of another network than {ARCHITECTURE}; {_REMEDY}")
    for name, tensor in weights.items():
        if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
            raise ValueError(
                f"{file} has {name!r} as {tensor.dtype} {list(tensor.shape)}, the network needs {state[name].dtype} "
                f"{list(state[name].shape)}: it is of another network than {ARCHITECTURE}; {_REMEDY}"
            )


def _save_programs(model: nn.Module, directory: Path, *, example: Tensor) -> None:
    """As programs for torch and for onnxruntime; one that cannot be made is left out, with a warning."""
    network = type(model).__name__
    try:
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch.export raises types of its own for what it cannot follow
        _log.warning("%s and %s are left out: torch.export cannot follow %s (%s)", PROGRAM, ONNX, network, _line(error))
        return
    with _writing(directory / PROGRAM):
        torch.export.save(program, directory / PROGRAM)
    try:
        _save_onnx(program, directory / ONNX)
    except Exception as error:  # the exporter and its libraries raise types of their own
        if isinstance(error, OSError) and may_pass(error):
            raise
        _log.warning("%s is left out: it cannot be made of %s (%s)", ONNX, network, _line(error))


def _save_onnx(program: torch.export.ExportedProgram, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        exported = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["outputs"], verbose=False)
    assert exported is not None
    exported.save(file, external_data=False)


def _line(error: BaseException) -> str:
    """The first line of an error, for messages of one line."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return text.splitlines()[0] if text else type(error).__name__
