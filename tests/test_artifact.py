"""The compact folder: what is written is what is read, and nothing is ever half written."""

import copy
import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import dist_gsl
from dist_gsl import artifact, storage
from tests.networks import tiny

GREY: dict[str, Any] = {"channels": 1, "size": 32, "mean": [0.4], "std": [0.2], "task": "classification"}
NETWORK: dict[str, Any] = {"name": "dec3", "num_classes": 5, "width": 1 / 16, "image_size": 32, "batch_norm": True}
CLASSES = ["A", "B", "C", "D", "E"]


def compacted(name: str = "dec3") -> dist_gsl.Compacted:
    """A network of the zoo without every third neuron, with running statistics that are not the starting ones."""
    model, example = tiny(name, batch_norm=True)
    model.train()(example)
    neurons = dist_gsl.find_neurons(model, example)
    neurons.zero_({layer.name: range(0, layer.num_neurons, 3) for layer in neurons})
    return dist_gsl.compact(model, neurons)


def save(directory: Path, result: dist_gsl.Compacted, **changes: Any) -> None:
    options = {"network": NETWORK, "classes": CLASSES, "image": GREY, "extra": {"run": "test"}, **changes}
    artifact.save_compact(directory, model=result.model, neurons=result.neurons, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dist_gsl.Compacted]:
    run = tmp_path_factory.mktemp("run")
    result = compacted()
    save(run / "compact", result)
    return run, result


@pytest.fixture
def folder(written: tuple[Path, dist_gsl.Compacted], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written[0] / "compact", tmp_path / "compact"))


@pytest.mark.parametrize("inside", ["", "compact"])
def test_load_gives_the_same_bits(written: tuple[Path, dist_gsl.Compacted], inside: str) -> None:
    run, result = written
    state = torch.random.get_rng_state()
    loaded = artifact.load(run / inside)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not loaded.training
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), result.model.eval()(x), rtol=0, atol=0)


def test_save_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    result = compacted()
    result.model.train()
    before = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    save(tmp_path / "compact", result)
    assert result.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bnet", "bnet-c", "dec8", "resnet18", "googlenet", "vit_b_32"])
def test_round_trip_of_other_networks(tmp_path: Path, name: str) -> None:
    network: dict[str, Any] = {"name": name, "num_classes": 5, "image_size": 64}
    image = {"channels": 3, "size": 64, "mean": [0.5] * 3, "std": [0.2] * 3, "task": "classification"}
    if name in dist_gsl.models.model_names():
        network["width"] = {"bnet": 1 / 64, "bnet-c": 1 / 16}.get(name, 1 / 32)
    model = dist_gsl.create_model(**network)
    neurons = dist_gsl.find_neurons(model, torch.randn(2, 3, 64, 64))
    neurons.zero_({layer.name: [0] for layer in neurons if layer.num_neurons > 1})
    result = dist_gsl.compact(model, neurons)
    save(tmp_path / "compact", result, network=network, image=image)
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = result.model.eval()(x)
        torch.testing.assert_close(artifact.load(tmp_path)(x), expected, rtol=0, atol=0)
        program = torch.export.load(tmp_path / "compact" / "model.pt2").module()
        torch.testing.assert_close(program(x), expected)


def test_program_runs_with_torch_alone_at_any_batch_size(written: tuple[Path, dist_gsl.Compacted]) -> None:
    run, _ = written
    code = (
        "import sys, torch\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "for n in (1, 2, 7):\n"
        "    assert program(torch.zeros(n, 1, 32, 32)).shape == (n, 5)\n"
        "assert not any(name.startswith('dist_gsl') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(run / "compact" / "model.pt2")], check=True, cwd="/")


def test_onnx_runs_with_onnxruntime_alone_at_any_batch_size(written: tuple[Path, dist_gsl.Compacted], tmp_path: Path) -> None:
    run, result = written
    code = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\n"
        "images = numpy.load(sys.argv[2])\n"
        "outputs = [session.run(['outputs'], {'images': images[:n]})[0] for n in (1, 2, 7)]\n"
        "assert 'torch' not in sys.modules\n"
        "numpy.savez(sys.argv[3], *outputs)\n"
    )
    images = torch.randn(7, 1, 32, 32)
    np.save(tmp_path / "images.npy", images.numpy())
    files = [str(run / "compact" / "model.onnx"), str(tmp_path / "images.npy"), str(tmp_path / "outputs.npz")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, cwd="/")
    with torch.no_grad():
        expected = result.model.eval()(images)
    with np.load(tmp_path / "outputs.npz") as outputs:
        for n, got in zip((1, 2, 7), outputs.values(), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), expected[:n], rtol=1e-4, atol=1e-5)


def test_a_network_that_is_loaded_goes_on_training(written: tuple[Path, dist_gsl.Compacted]) -> None:
    run, result = written
    model, neurons = dist_gsl.load_with_neurons(run)
    for layer, before in zip(neurons, result.neurons, strict=True):
        assert (layer.group_size, layer.starting_neurons) == (before.group_size, before.starting_neurons)
        assert torch.equal(layer.indices, before.indices)
    original = copy.deepcopy(result.model)
    models = [(model, neurons), (original, result.neurons.bound_to(original))]
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(4, 1, 32, 32, generator=generator)
    for each, its in models:
        each.train()
        optimizer = dist_gsl.ProximalSGD(each.parameters(), its, dist_gsl.SparseGroupLasso(beta=0.01), lr=0.05)
        each(batch).square().sum().backward()
        optimizer.step()
    for a, b in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(a, b)


def test_widths_are_rounded_up_by_neurons_that_stay_dead(tmp_path: Path) -> None:
    model, example = tiny("dec3", batch_norm=True)
    neurons = dist_gsl.find_neurons(model, example)
    neurons.zero_({layer.name: range(1, layer.num_neurons) for layer in neurons})
    result = dist_gsl.compact(model, neurons, multiple_of=3)
    assert {layer.num_neurons for layer in result.neurons} == {3}
    assert all(int(layer.mask.sum()) == 1 for layer in result.neurons)
    assert dist_gsl.measure(result.model, result.neurons) == dist_gsl.measure(model, neurons)
    save(tmp_path / "compact", result)
    masked = json.loads((tmp_path / "compact" / "architecture.json").read_text())["masked"]
    assert masked == {layer.name: [1, 2] for layer in neurons}
    loaded, again = dist_gsl.load_with_neurons(tmp_path)
    assert [layer.mask.tolist() for layer in again] == [[True, False, False]] * len(again)
    optimizer = dist_gsl.ProximalSGD(loaded.parameters(), again, dist_gsl.SparseGroupLasso(beta=0.0), lr=0.1, momentum=0.9)
    loaded.train()
    for _ in range(3):
        optimizer.zero_grad()
        loaded(torch.randn(4, 1, 32, 32)).square().sum().backward()
        optimizer.step()
    for layer in again:
        assert not any(part[1:].any() for part in again.parts(layer))


def test_program_computes_the_same(written: tuple[Path, dist_gsl.Compacted]) -> None:
    run, result = written
    program = torch.export.load(run / "compact" / "model.pt2").module()
    for n in (1, 5):
        x = torch.randn(n, 1, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(program(x), result.model.eval()(x))


def test_architecture(written: tuple[Path, dist_gsl.Compacted]) -> None:
    run, result = written
    architecture = artifact.load_architecture(run)
    assert architecture.widths == result.widths
    assert architecture.indices["features.conv1v"] == result.neurons["features.conv1v"].indices.tolist()
    assert architecture.classes == CLASSES
    assert architecture.preprocessing.mean == (0.4,)
    assert architecture.versions == {"dist_gsl": dist_gsl.__version__, "torch": str(torch.__version__)}
    assert architecture.extra == {"run": "test"}


@pytest.mark.parametrize("function", ["safetensors.torch.save_file", "torch.export.save", "torch.onnx.ONNXProgram.save"])
def test_a_full_disk_is_one_that_may_pass(function: str, folder: Path, written: tuple[Path, dist_gsl.Compacted], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the library makes of it; and the old folder stays."""
    errors: dict[str, Exception] = {
        "safetensors.torch.save_file": SafetensorError("I/O error: No space left on device (os error 28)"),
        "torch.export.save": RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/0"),
        "torch.onnx.ONNXProgram.save": OSError(errno.ENOSPC, "No space left on device"),
    }

    def full(*_: Any, **__: Any) -> None:
        raise errors[function]

    before = (folder / "weights.safetensors").read_bytes()
    monkeypatch.setattr(function, full)
    with pytest.raises(OSError, match=r"No space left|cannot be written") as caught:
        save(folder, written[1])
    assert storage.may_pass(caught.value)
    assert (folder / "weights.safetensors").read_bytes() == before


def test_failure_in_the_middle_leaves_the_old_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(artifact, "_save_programs", fail)
    with pytest.raises(OSError, match="disk full"):
        save(folder, compacted())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["compact"]


def test_failure_of_the_last_rename_brings_the_old_folder_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    replace = artifact.os.replace

    def fail(source: Path, target: Path) -> None:
        if source.name.endswith(".new"):
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(artifact.os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        save(folder, compacted())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_replaces_what_was_there(folder: Path) -> None:
    (folder / "stale.txt").write_text("")
    save(folder, compacted(), classes=list("VWXYZ"))
    assert sorted(file.name for file in folder.iterdir()) == ["architecture.json", "model.onnx", "model.pt2", "weights.safetensors"]
    assert artifact.load_architecture(folder).classes == list("VWXYZ")


def test_network_that_cannot_be_exported_is_written_without_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("data-dependent control flow")

    monkeypatch.setattr(torch.export, "export", fail)
    save(tmp_path / "compact", compacted())
    assert not (tmp_path / "compact" / "model.pt2").exists()
    assert not (tmp_path / "compact" / "model.onnx").exists()
    assert "model.pt2 and model.onnx are left out" in caplog.text
    artifact.load(tmp_path)


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "architecture.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def other_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, folder / "weights.safetensors")


DAMAGES = {
    "no architecture": (lambda folder: (folder / "architecture.json").unlink(), "architecture.json is missing"),
    "not JSON": (lambda folder: (folder / "architecture.json").write_text("{"), "does not describe"),
    "a list": (lambda folder: (folder / "architecture.json").write_text("[]"), "does not describe"),
    "later version": (edit(version=99), "version 99"),
    "unknown entry": (edit(colour="red"), "colour"),
    "unknown network": (edit(network={"name": "dec4", "num_classes": 5}), "dec4"),
    "index out of range": (edit(indices={"features.conv1v": [77]}), "does not fit the network"),
    "other layers": (edit(indices={"conv": [0]}), "does not fit the network"),
    "other widths": (edit(network={**NETWORK, "num_classes": 6}), "classifier.fc.bias"),
    "no weights": (lambda folder: (folder / "weights.safetensors").unlink(), "is missing"),
    "weights are text": (lambda folder: (folder / "weights.safetensors").write_text("no"), "does not hold weights"),
    "weights of another network": (other_weights, "it is of another network"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_one_line(folder: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        artifact.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "dist-gsl compact" in str(caught.value)


def test_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no compact network"):
        artifact.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"mean": None}, "mean"), ({"colour": 1}, "colour"), ({"task": "guess"}, "guess"), ({"channels": 3}, "channels")],
)
def test_preprocessing_is_checked(changes: dict[str, Any], message: str) -> None:
    image = {key: value for key, value in {**GREY, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        artifact.Preprocessing.from_dict(image)


# --- the user's images


def test_classify_images_of_any_size_and_mode(written: tuple[Path, dist_gsl.Compacted], tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    files = [tmp_path / f"{mode}.png" for mode in ("L", "RGB", "RGBA", "P")]
    for file in files:
        Image.fromarray(levels).convert(file.stem).save(file)
    predictions = artifact.classify(written[0], files, top=3, batch_size=3)
    assert [prediction.path for prediction in predictions] == files
    for prediction in predictions:
        assert len(prediction.classes) == len(prediction.probabilities) == 3
        assert prediction.probabilities == sorted(prediction.probabilities, reverse=True)
        assert set(prediction.classes) < set(CLASSES)
    assert str(predictions[0]).startswith(f"{files[0]}: {predictions[0].classes[0]} ")
    with torch.no_grad():
        x = artifact.read_image(files[0], artifact.load_architecture(written[0]).preprocessing)
        probabilities = artifact.load(written[0])(x[None]).softmax(1)
    assert predictions[0].probabilities[0] == pytest.approx(float(probabilities.max()), rel=1e-5)


def test_an_image_of_the_network_size_is_read_as_it_is(tmp_path: Path) -> None:
    levels = np.arange(32 * 32, dtype=np.uint32).reshape(32, 32) % 256
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "a.png")
    x = artifact.read_image(tmp_path / "a.png", artifact.Preprocessing.from_dict(GREY))
    expected = (torch.from_numpy(levels.astype(np.float32)) / 255 - 0.4) / 0.2
    torch.testing.assert_close(x[0], expected)


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 128 << 8, np.uint16)).save(tmp_path / "a.png")
    x = artifact.read_image(tmp_path / "a.png", artifact.Preprocessing.from_dict(GREY))
    torch.testing.assert_close(x, torch.full((1, 32, 32), (128 / 255 - 0.4) / 0.2))


def test_centre_of_a_wide_image(tmp_path: Path) -> None:
    levels = np.zeros((64, 192), np.uint8)
    levels[:, 64:128] = 255
    Image.fromarray(levels).save(tmp_path / "a.png")
    x = artifact.read_image(tmp_path / "a.png", artifact.Preprocessing.from_dict(GREY))
    torch.testing.assert_close(x, torch.full((1, 32, 32), (1 - 0.4) / 0.2))


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_unreadable_image_is_named(
    written: tuple[Path, dist_gsl.Compacted], tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "broken.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.png cannot be read") as caught:
        artifact.classify(written[0], [file])
    assert "\n" not in str(caught.value)


def test_regression_gives_values(tmp_path: Path) -> None:
    save(tmp_path / "compact", compacted(), classes=[], image={**GREY, "task": "regression"})
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    (prediction,) = artifact.classify(tmp_path, [tmp_path / "a.png"])
    assert len(prediction.values) == 5
    assert prediction.probabilities == []
    assert str(prediction).startswith(f"{tmp_path / 'a.png'}: ")
