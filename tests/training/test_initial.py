"""Starting from weights: of runs, of checkpoints, of files that other programs wrote."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_gsl import create_model, find_neurons
from dist_gsl.penalty import PenaltyConfig, PerLayer, starting_betas
from dist_gsl.removal import set_widths
from dist_gsl.training import checkpoint, initial
from dist_gsl.training.state import initialise

IMAGES = torch.zeros(2, 1, 32, 32)
Saved = Callable[[Mapping[str, Tensor], Path], Path]


def network(seed: int, *, num_classes: int = 5, width: float = 1 / 16) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("dec3", num_classes=num_classes, width=width, batch_norm=True)


def by_torch(content: Callable[[dict[str, Tensor]], Any]) -> Saved:
    def save(tensors: Mapping[str, Tensor], folder: Path) -> Path:
        torch.save(content(dict(tensors)), folder / "weights.pth")
        return folder / "weights.pth"

    return save


def as_safetensors(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def state_of(model: nn.Module, *, keep: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """As much of a checkpoint as says what a network is; `keep`: positions of the neurons that are left, by layer."""
    neurons = find_neurons(model, IMAGES)
    if keep is not None:
        model, neurons = set_widths(model, neurons, keep)
    return {"format": checkpoint.FORMAT, "model": model.state_dict(), "optimizer": {"neurons": neurons.state_dict()}}


def same(a: nn.Module, b: nn.Module, *, but: str = "-") -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items() if not name.startswith(but))


def started(path: Path, **options: Any) -> tuple[nn.Module, list[str]]:
    model = network(1, **options)
    return model, initialise(model, find_neurons(model, IMAGES), str(path))


@pytest.mark.parametrize(
    "save",
    [
        by_torch(lambda tensors: tensors), by_torch(lambda tensors: {"epoch": 3, "state_dict": tensors}),
        by_torch(lambda tensors: {"model": {f"module.{name}": value for name, value in tensors.items()}}),
        by_torch(lambda tensors: OrderedDict((f"_orig_mod.module.{name}", value) for name, value in tensors.items())),
        by_torch(lambda tensors: {**tensors, "aux1.fc.weight": torch.ones(2)}),
        as_safetensors,
    ],
    ids=["state_dict", "in a checkpoint of others", "of DDP", "of torch.compile and DDP", "with an auxiliary classifier", "safetensors"],
)  # fmt: skip
def test_weights_of_other_programs(save: Saved, tmp_path: Path) -> None:
    source = network(0)
    model, at_random = started(save(source.state_dict(), tmp_path))
    assert at_random == []
    assert same(model, source)
    assert not same(model, network(1))


@pytest.mark.parametrize("as_checkpoint", [False, True])
def test_another_number_of_classes(as_checkpoint: bool, tmp_path: Path) -> None:
    source = network(0, num_classes=7)
    if as_checkpoint:
        path = checkpoint.save(state_of(source), tmp_path / "kept")
    else:
        path = as_safetensors(source.state_dict(), tmp_path)
    model, at_random = started(path)
    head = at_random[0].rpartition(".")[0]
    assert at_random == [f"{head}.weight", f"{head}.bias"]
    assert same(model, source, but=head)
    assert same(model.get_submodule(head), network(1).get_submodule(head))


def test_an_average_is_what_was_evaluated(tmp_path: Path) -> None:
    file = checkpoint.save({**state_of(network(0)), "average": network(3).state_dict()}, tmp_path / "kept")
    assert same(started(file)[0], network(3))


def test_what_epochs_mean_is_said_by_neurons_that_live(tmp_path: Path) -> None:
    """Most of the reference layer is gone: the median of all would be zero, and so the penalty."""
    source = network(0)
    neurons = find_neurons(source, IMAGES)
    *_, last = neurons
    keep = {each.name: torch.arange(2 if each is last else each.num_neurons) for each in neurons}
    file = checkpoint.save(state_of(source, keep=keep), tmp_path / "kept")
    model = network(1)
    found = find_neurons(model, IMAGES)
    initialise(model, found, str(file))
    penalty = PenaltyConfig(beta=PerLayer(rest=2.0), unit="epochs")
    assert min(starting_betas(penalty, found, steps_per_epoch=5, learning_rate=lambda step: 0.1).values()) > 0


def test_nothing_can_be_learned_from_a_layer_of_zeros(tmp_path: Path) -> None:
    source = network(0)
    (first, *_) = find_neurons(source, IMAGES)
    with torch.no_grad():
        for piece in first.producers:
            source.get_parameter(piece.tensor).zero_()
    with pytest.raises(ValueError, match=f"all neurons of '{first.name}' are zero"):
        started(as_safetensors(source.state_dict(), tmp_path))


@pytest.mark.parametrize("num_classes", [5, 7])
def test_what_was_removed_is_dead(num_classes: int, tmp_path: Path) -> None:
    source = network(0, num_classes=num_classes)
    neurons = find_neurons(source, IMAGES)
    layer = next(iter(neurons))
    keep = {each.name: torch.arange(each is layer, each.num_neurons) for each in neurons}
    file = checkpoint.save(state_of(source, keep=keep), tmp_path / "kept")
    model = network(1)
    found = find_neurons(model, IMAGES)
    initialise(model, found, str(file))
    assert found[layer.name].mask.tolist() == [False] + [True] * (layer.num_neurons - 1)
    for piece in (*layer.producers, *layer.readers):
        rows = piece.rows(model.get_parameter(piece.tensor))
        assert not rows[0].any()
        assert torch.equal(rows[1:], piece.rows(source.get_parameter(piece.tensor))[1:])


def test_of_a_run_the_last_good_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"has no checkpoint yet; train it first"):
        initial.read(tmp_path)
    for seed, name in enumerate((checkpoint.name_of(1, 0), checkpoint.name_of(2, 0))):
        checkpoint.save(state_of(network(seed)), tmp_path / "checkpoints" / name)
    assert same(started(tmp_path)[0], network(1))
    file = tmp_path / "checkpoints" / name / checkpoint.FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged"):
        model, _ = started(tmp_path)
    assert same(model, network(0))


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm-was-done"),)


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, tmp_path / "weights.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Harmful()))
    for name in ("weights.pt", "plain.pt"):
        with pytest.raises(ValueError, match=r"not readable as weights"):
            initial.read(tmp_path / name)
    assert not (tmp_path / "harm-was-done").exists()


def damaged(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    (folder / "weights.safetensors").write_bytes(b"no tensors")
    return folder / "weights.safetensors"


@pytest.mark.parametrize(
    ("save", "complaint"),
    [
        (by_torch(lambda tensors: {name: value for name, value in tensors.items() if "bn1" not in name}), r"'\S+bn1\S+' is missing"),
        (by_torch(lambda tensors: {**tensors, "extra.weight": torch.ones(2)}), r"'extra.weight' is none of this network's"),
        (by_torch(lambda tensors: network(0, width=1 / 8).state_dict()), r"is of another shape; name weights of the same network and widths"),
        (by_torch(lambda tensors: {name: value.to(torch.int8) for name, value in tensors.items()}), "has no floating-point numbers"),
        (by_torch(lambda tensors: {name: value * math.nan if value.is_floating_point() else value for name, value in tensors.items()}), "not finite"),
        (by_torch(lambda tensors: {**tensors, list(tensors)[-1]: torch.tensor(1.0)}), "is of another shape|is missing"),
        (by_torch(lambda tensors: dict(enumerate(tensors.values()))), "holds no state_dict"),
        (by_torch(lambda tensors: [1, 2]), "holds no state_dict"), (by_torch(lambda tensors: {}), "holds no state_dict"),
        (damaged, "not readable as weights"), (lambda tensors, folder: folder / "nowhere.pt", "no such file; name a run's folder"),
        (lambda tensors, folder: folder, "no such file"),
    ],
    ids=["missing", "foreign", "widths", "integers", "not finite", "scalar", "numbers for names", "list", "empty", "damaged", "nowhere", "folder"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_leaves_the_network(save: Saved, complaint: str, tmp_path: Path) -> None:
    model = network(1)
    path = save(network(0).state_dict(), tmp_path)
    with pytest.raises(ValueError, match=complaint):
        initialise(model, find_neurons(model, IMAGES), str(path))
    assert same(model, network(1))
