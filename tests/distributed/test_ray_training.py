"""The command line on a real Ray: train, resume, refuse, report, evaluate; two workers against one."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dist_gsl
from dist_gsl import runs, storage
from dist_gsl.cli import main
from tests.data import layouts
from tests.object_store import KEYS, s3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's and MLflow's own
]

SMALL = ["--train.epochs", "3", "--penalty.beta.rest", "0.8", "--penalty.beta-schedule.start", "0",
         "--penalty.beta-schedule.end", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def directory(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with digits written and one finished run with its baseline."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert main(["train", "digits", "--name", "first", "--baseline", *SMALL]) == 0
        yield folder


def wait_for(folder: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 180
    while not folder.exists():
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < end, f"no {folder} within three minutes"
        time.sleep(0.02)


def test_the_run_folder_is_complete(directory: Path) -> None:
    run = directory / "runs" / "first"
    report = json.loads((run / "report.json").read_text())
    wanted = {"top1", "top5", "baseline_top1", "accuracy_gap", "neurons", "group_param", "total_param", "total_induced",
              "layers", "compact", "speedup_percent", "memory_saved_percent", "train_seconds", "seed"}  # fmt: skip
    assert wanted <= set(report)
    assert report["neurons"] > 5
    assert report["compact"]["max_abs_difference"] < 1e-9
    assert report["compact"]["parameters_after"] < report["compact"]["parameters_before"]
    assert set(report["speedup_percent"]) == {"1", "2", "8", "16"}
    assert report["split"] == "val"
    for name in ("config.yaml", "report.md", "neurons.parquet", "compact/architecture.json", "compact/weights.safetensors",
                 "compact/model.pt2", "plots/neurons.png", "plots/learning.png"):  # fmt: skip
        assert (run / name).is_file(), name
    assert runs.RunFolder(run).checkpoints.names() == ["epoch-0003", "epoch-0002"]


def test_the_compact_network_is_the_trained_one(directory: Path) -> None:
    run = runs.RunFolder.existing(directory / "runs" / "first")
    trained = runs.Trained.load(run)
    small = dist_gsl.load(run.compact_dir).double().eval()
    images = next(iter(trained.batches("val"))).images.double()
    with torch.no_grad():
        full, compact = trained.model.double().eval()(images), small(images)
    assert float((full - compact).abs().max()) <= 1e-9 * float(full.abs().max())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in trained.model.parameters())


def test_tracking_has_both_runs(directory: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{directory}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("dist_gsl")
    assert experiment is not None
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(found) >= {"first", "first-baseline"}
    run = found["first"]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == "3"
    assert run.data.metrics["final_neurons"] > 5
    history = client.get_metric_history(run.info.run_id, "val_top1")
    assert [point.step for point in history] == [1, 2, 3]


def test_a_used_name_is_refused(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(directory.rglob("*"))
    assert main(["train", "digits", "--name", "first", *SMALL]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", "digits", "--name", "first", "--resume", *SMALL[2:], "--train.epochs", "9"]) == 2
    assert "train.epochs is 9" in capsys.readouterr().err
    assert sorted(directory.rglob("*")) == before


def test_evaluate_reads_a_users_image(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sklearn.datasets import load_digits

    digit = load_digits().images[0]  # a zero
    Image.fromarray((digit * 15.9).astype(np.uint8)).resize((96, 96)).save(directory / "zero.png")
    assert main(["evaluate", "runs/first", "zero.png"]) == 0
    assert "zero.png" in capsys.readouterr().out
    (directory / "broken.png").write_bytes(b"no image")
    assert main(["evaluate", "runs/first", "broken.png"]) == 2
    assert "broken.png" in capsys.readouterr().err


def test_compact_and_bench_repeat_what_training_did(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = directory / "runs" / "first" / "compact"
    before = (folder / "weights.safetensors").read_bytes()
    assert main(["compact", "runs/first"]) == 0
    assert (folder / "weights.safetensors").read_bytes() == before
    assert main(["bench", "runs/first"]) == 0
    printed = capsys.readouterr().out
    assert "outputs differ by at most" in printed
    assert "multiply-adds" in printed


def test_dry_run_needs_no_data(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(directory.rglob("*"))
    options = ["--network.width", "0.0625", "--workers.num", "2"]
    assert main(["train", "bnet-c-places2-sgl", "--dry-run", *options]) == 0
    printed = capsys.readouterr().out
    assert "features.conv10" in printed
    assert "2 workers" in printed
    assert sorted(directory.rglob("*")) == before


def test_a_collapsing_layer_is_named(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--penalty.beta.rest", "0.05", "--penalty.beta-schedule.start", "0", "--train.epochs", "2"]
    assert main(["train", "digits", "--name", "collapsed", "--no-tracking", *options]) == 0
    assert "would kill every neuron" in capsys.readouterr().out
    report = json.loads((directory / "runs" / "collapsed" / "report.json").read_text())
    assert min(layer["alive"] for layer in report["layers"]) >= 1


def test_a_budget_is_met(directory: Path) -> None:
    schedule = ["--train.epochs", "8", "--penalty.beta-schedule.start", "1", "--penalty.beta-schedule.end", "6"]
    assert main(["train", "digits", "--name", "budget", "--target", "neurons=60%", "--no-tracking", *schedule]) == 0
    report = json.loads((directory / "runs" / "budget" / "report.json").read_text())
    assert 40 <= report["neurons"] <= 42
    assert report["compact"]["max_abs_difference"] < 1e-9


def test_init_goes_on_with_what_a_run_has_learned_and_resume_needs_it_no_more(directory: Path) -> None:
    weights = directory / "learned.pt"
    torch.save({"model": runs.RunFolder(directory / "runs" / "first-baseline").state()["model"]}, weights)
    weak = ["--train.epochs", "1", "--train.warmup-epochs", "0", "--train.learning-rate", "0.001", "--penalty.unit", "absolute",
            "--penalty.beta.rest", "1e-6", "--penalty.beta-schedule.start", "0", "--train.schedule", "constant", "--init", str(weights)]  # fmt: skip
    assert main(["train", "digits", "--name", "further", "--no-tracking", *weak]) == 0
    first, further = (runs.RunFolder(directory / "runs" / name).state()["history"] for name in ("first-baseline", "further"))
    assert further[0]["val_top1"] > first[-1]["val_top1"] - 3
    weights.unlink()
    assert main(["train", "digits", "--name", "further", "--no-tracking", *weak, "--train.epochs", "2", "--resume"]) == 0
    assert runs.RunFolder(directory / "runs" / "further").state()["history"][0] == further[0]


def test_final_reads_the_test_split(directory: Path) -> None:
    assert main(["report", "runs/first", "--final"]) == 0
    report = json.loads((directory / "runs" / "first" / "report.json").read_text())
    assert report["split"] == "test"
    assert report["accuracy_gap"] is not None


def test_resume_ends_where_the_uninterrupted_run_ends(directory: Path) -> None:
    """A run whose driver is killed after the first epoch and which is resumed has, bit for bit, the parameters of the
    run that was not."""
    checkpoints = directory / "runs" / "cut" / "checkpoints"
    command = [sys.executable, "-m", "dist_gsl.cli", "train", "digits", "--name", "cut", *SMALL]
    driver = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(checkpoints / "epoch-0001", driver)
    finally:
        driver.kill()
        driver.wait()
    assert not (checkpoints / "epoch-0003").exists()
    assert main(["train", "digits", "--name", "cut", "--resume", *SMALL]) == 0
    whole, cut = (runs.RunFolder(directory / "runs" / name).state() for name in ("first", "cut"))
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, cut["model"][name]), name
    assert [row["val_loss"] for row in whole["history"]] == [row["val_loss"] for row in cut["history"]]
    assert [row["alive"] for row in whole["history"]] == [row["alive"] for row in cut["history"]]


def test_runs_and_data_by_uri(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has nothing but two addresses, the run is the one that lies in folders, bit for bit; and so is its
    report on a third machine."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    first = runs.RunFolder(directory / "runs" / "first")
    with s3() as root:
        betons, place = storage.join(root, "data"), storage.join(root, "runs")
        for file in Path(first.config.data.dir or "").glob("*.*"):
            storage.upload(file, storage.join(betons, file.name))
        monkeypatch.setenv("DIST_GSL_SCRATCH", str(tmp_path / "scratch"))
        monkeypatch.setenv("DIST_GSL_STAGING", str(tmp_path / "staging"))
        train = ["train", "digits", "--name", "remote", "--runs", place, "--data.dir", betons, "--no-tracking", *SMALL]
        subprocess.run([sys.executable, "-m", "dist_gsl.cli", *train], check=True)  # its workers need the addresses' keys
        assert not (directory / "runs" / "remote").exists()

        monkeypatch.setenv("DIST_GSL_SCRATCH", str(tmp_path / "scratch of another machine"))
        monkeypatch.setenv("DIST_GSL_STAGING", str(tmp_path / "staging of another machine"))
        assert main(["report", storage.join(place, "remote")]) == 0
        remote = runs.RunFolder(storage.local_run(storage.join(place, "remote")))
        assert remote.is_finished
        state, other = first.state(), remote.state()
        assert json.loads((remote.path / "report.json").read_text())["layers"]
        assert (remote.path / "compact" / "weights.safetensors").exists()
        assert main(train) == 2  # the name is in use, there
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, other["model"][name]), name


def test_interrupted_in_the_baseline_and_resumed(directory: Path) -> None:
    """Ctrl-C while the baseline trains keeps its state, within an epoch, and says how to go on; going on makes both runs."""
    checkpoints = directory / "runs" / "stopped-baseline" / "checkpoints"
    command = [sys.executable, "-m", "dist_gsl.cli", "train", "digits", "--name", "stopped", "--baseline", *SMALL]
    driver = subprocess.Popen(
        command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
    )  # fmt: skip
    try:
        wait_for(checkpoints / "epoch-0001", driver)
        driver.send_signal(signal.SIGINT)
        _, error = driver.communicate(timeout=120)
    finally:
        driver.kill()
    assert driver.returncode == 130
    assert not (checkpoints / "epoch-0003").exists()
    assert error.strip().splitlines()[-1] == "dist-gsl: interrupted; `--resume` goes on from the last checkpoint"
    assert main(["train", "digits", "--name", "stopped", "--resume", *SMALL]) == 0
    report = json.loads((directory / "runs" / "stopped" / "report.json").read_text())
    first = runs.RunFolder(directory / "runs" / "first").state()
    assert report["accuracy_gap"] is not None
    for name, tensor in runs.RunFolder(directory / "runs" / "stopped").state()["model"].items():
        assert torch.equal(tensor, first["model"][name]), name


def test_a_diverging_training_ends_with_the_remedy(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--train.learning-rate", "1e9", "--train.warmup-epochs", "0", "--no-tracking", "--network.batch-norm", "False"]
    assert main(["train", "digits", "--name", "exploded", *options]) == 1
    error = capsys.readouterr().err
    assert "in epoch 1, step " in error
    assert "; lower train.learning_rate" in error
    assert not (directory / "runs" / "exploded").exists()


def test_two_workers_are_one_worker_on_the_joined_batch(directory: Path) -> None:
    """Without BatchNorm, whose statistics are each worker's own."""
    options = ["--network.batch-norm", "False", "--train.learning-rate", "0.01", "--train.epochs", "2", "--no-tracking",
               "--penalty.beta.rest", "1", "--penalty.beta-schedule.start", "0", "--penalty.beta-schedule.end", "2"]  # fmt: skip
    assert main(["train", "digits", "--name", "one", "--workers.num", "1", *options]) == 0
    assert main(["train", "digits", "--name", "two", "--workers.num", "2", *options]) == 0
    one, two = (runs.RunFolder(directory / "runs" / name).state() for name in ("one", "two"))
    for name, tensor in one["model"].items():
        torch.testing.assert_close(tensor, two["model"][name], rtol=1e-3, atol=1e-4, msg=name)
    for name, layer in one["optimizer"]["neurons"].items():
        assert torch.equal(layer["mask"], two["optimizer"]["neurons"][name]["mask"])


def test_regression(directory: Path) -> None:
    assert main(["train", "rotated-digits", "--name", "turned", "--train.epochs", "4", "--no-tracking"]) == 0
    report = json.loads((directory / "runs" / "turned" / "report.json").read_text())
    assert report["top1"] is None
    assert 0 < report["rmse"] < 1


@pytest.mark.parametrize(
    ("source", "make", "recipe", "given"),
    [
        ("imagenet", layouts.make_imagenet, "dec8-imagenet-sgl",
         ["--data.size", "64", "--data.start-size", "48", "--data.full-size-epoch", "1", "--data.memory-gb", "0.001"]),
        ("places2", layouts.make_places, "bnet-c-places2-gs", ["--data.size", "64"]),
        ("icdar", layouts.make_icdar, "dec3-icdar-gs", []),
    ],
)  # fmt: skip
def test_released_layouts_to_a_report(
    source: str, make: Callable[[Path], Path], recipe: str, given: list[str], directory: Path
) -> None:
    """As a user with the whole data set would: write, train by the paper's recipe, report; small, and no other path through."""
    root = make(directory / source)
    out = directory / f"{source}-betons"
    assert main(["data", "write", f"{source}:{root}", str(out), "--workers", "2"]) == 0
    options = [*given, "--network.width", "0.0625", "--data.num-threads", "1", "--train.batch-size", "8", "--train.epochs", "1",
               "--workers.num", "2", "--no-tracking"]  # fmt: skip
    assert main(["train", recipe, "--name", source, "--data.dir", str(out), *options]) == 0
    report = json.loads((directory / "runs" / source / "report.json").read_text())
    assert report["top5"] == 100.0  # of three classes
    assert report["compact"]["max_abs_difference"] < 1e-9
    assert main(["report", f"runs/{source}"]) == 0
