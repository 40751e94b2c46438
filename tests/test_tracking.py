"""Tracking against a real store; and that no failure of a store ends a run."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from dist_gsl import tracking
from dist_gsl.tracking import MlflowTracker, NullTracker, Status, Tracker, mlflow_tracker
from dist_gsl.tracking import store as stores
from tests.networks import tiny

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# MLflow and what it brings: nothing of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:(mlflow|pydantic).*"),
]


@pytest.fixture(autouse=True)
def no_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", *mlflow_tracker._ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the module (its creation takes seconds), in a folder with a space in its name."""
    return tmp_path_factory.mktemp("my runs")


def client(runs_dir: Path) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(tracking.tracking_uri(runs_dir))


def started(runs_dir: Path, **options: Any) -> tuple[MlflowTracker, str]:
    tracker = MlflowTracker(runs_dir)
    run_id = tracker.start("a", {"train.epochs": 3, "penalty.beta": None}, {"recipe": "r"}, **options)
    assert run_id is not None
    assert run_id == tracker.run_id
    return tracker, run_id


def recorded(runs_dir: Path, run_id: str) -> "Run":
    return client(runs_dir).get_run(run_id)


# --- the store


def test_default_store_is_absolute_and_in_the_runs_folder(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs_dir.parent)
    assert tracking.tracking_uri(runs_dir.name) == f"sqlite:///{runs_dir}/mlflow.db"
    assert tracking.artifact_root(runs_dir.name) == runs_dir / "mlartifacts"


def test_given_store(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking.tracking_uri(runs_dir) == "http://tracking:5000"


def test_create_store_twice(runs_dir: Path) -> None:
    assert tracking.create_store(runs_dir) == tracking.create_store(runs_dir)
    experiment = client(runs_dir).get_experiment_by_name("dist_gsl")
    assert experiment is not None
    assert experiment.artifact_location == (runs_dir / "mlartifacts").as_uri()


def test_a_run(runs_dir: Path, tmp_path: Path) -> None:
    tracker, run_id = started(runs_dir)
    tracker.metrics({"loss": 2.0, "top1": 10.0, "rmse": None}, step=1)
    tracker.metrics({"loss": float("nan"), "top1": 20.0}, step=2)
    tracker.summary({"final_top1": 21.0, "top1": 21.5})
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.png").write_bytes(b"png")
    (tmp_path / "report.md").write_text("# a")
    tracker.artifacts(tmp_path / "plots")
    tracker.artifacts([tmp_path / "report.md"])
    tracker.table("layers", [{"name": "conv1", "alive": 16}])
    tracker.table("layers", [{"name": "conv1", "alive": 3}, {"name": "conv2", "alive": 4}])  # in its place
    tracker.table("trials", [{"trial": 0}])
    tracker.end()
    run = recorded(runs_dir, run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a"
    assert run.data.params == {"train.epochs": "3", "penalty.beta": "None"}
    assert run.data.tags["recipe"] == "r"
    assert run.data.metrics["final_top1"] == 21.0
    assert run.data.metrics["top1"] == 21.5
    assert "rmse" not in run.data.metrics
    assert [m.value for m in client(runs_dir).get_metric_history(run_id, "top1")] == [10.0, 20.0, 21.5]
    folder = runs_dir / "mlartifacts" / run_id / "artifacts"
    assert (folder / "plots" / "a.png").read_bytes() == b"png"
    assert (folder / "report.md").exists()
    table = json.loads((folder / "layers.json").read_text())
    assert table == {"columns": ["name", "alive"], "data": [["conv1", 3], ["conv2", 4]]}
    shown = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "layers.json", "type": "table"}, {"path": "trials.json", "type": "table"}]


def test_resume_goes_on_with_the_run_and_keeps_its_parameters(runs_dir: Path) -> None:
    tracker, run_id = started(runs_dir)
    tracker.metrics({"loss": 2.0}, step=1)
    tracker.end(Status.FAILED)
    assert recorded(runs_dir, run_id).info.status == "FAILED"
    resumed = MlflowTracker(runs_dir)
    assert resumed.start("a", {"train.epochs": 99}, run_id=run_id) == run_id
    assert recorded(runs_dir, run_id).info.status == "RUNNING"
    resumed.metrics({"loss": 1.0}, step=2)
    resumed.end()
    run = recorded(runs_dir, run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == "3"
    assert run.data.metrics["loss"] == 1.0


def test_resume_of_a_run_that_the_store_does_not_know(runs_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, run_id = started(runs_dir, run_id="0" * 32)
    assert run_id != "0" * 32
    assert "a new one begins" in caplog.text
    assert recorded(runs_dir, run_id).data.params["train.epochs"] == "3"


def test_many_and_long_parameters(runs_dir: Path) -> None:
    tracker = MlflowTracker(runs_dir)
    run_id = tracker.start("a", {f"p{n}": "x" * 10_000 for n in range(150)})
    assert run_id is not None
    assert len(recorded(runs_dir, run_id).data.params) == 150


def test_a_record_that_the_store_refuses_does_not_block_those_after_it(
    runs_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, run_id = started(runs_dir)
    tracker.metrics({"not: a? name!": 1.0}, step=1)
    tracker.metrics({"loss": 1.0}, step=1)
    assert recorded(runs_dir, run_id).data.metrics == {"loss": 1.0}
    assert "does not take metrics" in caplog.text


def test_unknown_status(runs_dir: Path) -> None:
    with pytest.raises(ValueError, match="DONE"):
        MlflowTracker(runs_dir).end("DONE")


@pytest.mark.slow
def test_parallel_runs_create_one_store(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from dist_gsl.tracking import MlflowTracker\n"
        "tracker = MlflowTracker(sys.argv[1])\n"
        "assert tracker.start('a', {'x': 1}) is not None\n"
        "tracker.metrics({'loss': 1.0}, 1)\n"
        "tracker.end()\n"
        "assert not tracker._waiting\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    experiment = client(tmp_path).get_experiment_by_name("dist_gsl")
    assert experiment is not None
    assert len(client(tmp_path).search_runs([experiment.experiment_id])) == 2


# --- the model


def test_an_experiment_that_another_run_creates_meanwhile(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    original = MlflowClient.get_experiment_by_name

    def overtaken(self: MlflowClient, name: str) -> Any:
        found = original(self, name)
        if found is None:
            self.create_experiment(name)
        return found

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", overtaken)
    tracker = MlflowTracker(runs_dir, experiment="overtaken")
    run_id = tracker.start("a", {}, {})
    tracker.end()
    assert run_id is not None
    found = original(client(runs_dir), "overtaken")
    assert found is not None
    assert client(runs_dir).get_run(run_id).info.experiment_id == found.experiment_id


@pytest.mark.slow
def test_model_loads_without_this_project(runs_dir: Path, tmp_path: Path) -> None:
    tracker, run_id = started(runs_dir)
    network, example = tiny("dec3")
    network.train()
    tracker.model(network, example.numpy(), pip_requirements=[f"torch=={torch.__version__}", "numpy"])
    assert network.training
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert recorded(runs_dir, run_id).info.status == "RUNNING"
    tracker.end()
    assert recorded(runs_dir, run_id).info.status == "FINISHED"
    x = np.random.default_rng(0).standard_normal((5, 1, 32, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    (model,) = (runs_dir / "mlartifacts" / "models").glob("*/artifacts")
    code = (
        "import sys, mlflow, numpy as np\n"
        "sys.modules['dist_gsl'] = None\n"  # importing it fails
        "x = np.load('x.npy')\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "np.save('y.npy', model.predict(x))\n"
        "assert model.predict(x[:1]).shape == (1, 5)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(model)], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-4, atol=1e-5)


def test_example_of_one_input(runs_dir: Path) -> None:
    with pytest.raises(ValueError, match="give 2 or more"):
        MlflowTracker(runs_dir).model(torch.nn.Linear(1, 1), np.zeros((1, 1), np.float32), pip_requirements=[])


def test_model_that_cannot_be_exported_does_not_end_the_run(runs_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Data(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    tracker, run_id = started(runs_dir)
    tracker.model(Data(), np.ones((2, 3), np.float32), pip_requirements=["torch"])
    tracker.metrics({"loss": 1.0}, 1)
    assert "the model is left out" in caplog.text
    assert recorded(runs_dir, run_id).data.metrics["loss"] == 1.0


# --- stores that fail


def everything(tracker: Tracker, folder: Path) -> None:
    tracker.start("a", {"x": 1}, {"t": "u"})
    tracker.metrics({"loss": 1.0}, step=1)
    tracker.summary({"top1": 1.0})
    tracker.artifacts(folder)
    tracker.table("layers", [{"a": 1}])
    tracker.model(torch.nn.Linear(1, 1), np.zeros((2, 1), np.float32), pip_requirements=["torch"])
    tracker.end("FAILED")


def test_null_tracker(tmp_path: Path) -> None:
    tracker = NullTracker()
    everything(tracker, tmp_path)
    assert tracker.run_id is None
    assert list(tmp_path.iterdir()) == []


class _Silent(BaseHTTPRequestHandler):
    """A server with a fault."""

    def do_GET(self) -> None:
        self.send_response(500)
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def faulty_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Silent)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def closed_port(_: Path) -> str:
    return "http://me:secret@127.0.0.1:9"


def broken_database(folder: Path) -> str:
    (folder / "broken.db").write_bytes(b"not a database" * 100)
    return f"sqlite:///{folder}/broken.db"


def folder_is_a_file(folder: Path) -> str:
    (folder / "file").write_bytes(b"")
    return f"sqlite:///{folder}/file/mlflow.db"


def no_driver(_: Path) -> str:
    return "mssql+nothing://me:secret@127.0.0.1:9/x"


@pytest.mark.parametrize("store", [closed_port, broken_database, folder_is_a_file, no_driver])
def test_store_that_cannot_be_reached_ends_nothing_and_is_quick(
    tmp_path: Path, store: Callable[[Path], str], caplog: pytest.LogCaptureFixture
) -> None:
    stores.failures()  # the import of MLflow, which takes seconds, is not what is timed
    tracker = MlflowTracker(tmp_path, uri=store(tmp_path), retry_after_s=0)
    began = time.perf_counter()
    everything(tracker, tmp_path)
    assert time.perf_counter() - began < 5
    assert tracker.run_id is None
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2  # one for the failures, one at the end
    assert "cannot be reached" in lines[0]
    assert "did not reach" in lines[1]
    assert "secret" not in caplog.text
    assert "\n" not in lines[0]


def test_server_with_a_fault(tmp_path: Path, faulty_server: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker = MlflowTracker(tmp_path, uri=f"http://me:secret@{faulty_server}")
    began = time.perf_counter()
    everything(tracker, tmp_path)
    assert time.perf_counter() - began < 20
    assert "cannot be reached" in caplog.text
    assert "secret" not in caplog.text


def test_records_arrive_when_the_store_is_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dist_gsl")
    uri = broken_database(tmp_path)
    tracker = MlflowTracker(tmp_path, uri=uri, retry_after_s=0)
    assert tracker.start("a", {"x": 1}) is None
    tracker.metrics({"loss": 2.0}, step=1)
    (tmp_path / "broken.db").unlink()
    tracker.metrics({"loss": 1.0}, step=2)
    assert tracker.run_id is not None
    tracker.end()
    from mlflow import MlflowClient

    store = MlflowClient(uri)
    assert [m.value for m in store.get_metric_history(tracker.run_id, "loss")] == [2.0, 1.0]
    run = store.get_run(tracker.run_id)
    assert run.data.params == {"x": "1"}
    assert run.info.status == "FINISHED"
    assert "is reached again" in caplog.text


def test_nothing_is_sent_soon_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def fail(uri: str) -> None:
        attempts.append(uri)
        raise OSError("away")

    monkeypatch.setattr(mlflow_tracker, "probe_database", fail)
    tracker = MlflowTracker(tmp_path, retry_after_s=60)
    tracker.start("a", {})
    first = len(attempts)
    for step in range(10):
        tracker.metrics({"loss": 1.0}, step)
    assert len(attempts) == first
    tracker.end()  # the last chance
    assert len(attempts) > first


# --- credentials


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://me:secret@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg2://me:se%40cret@db/x and http://a/b@c", "postgresql+psycopg2://***@db/x and http://a/b@c"),
        ("http://token@host", "http://***@host"),
        ("sqlite:////a/mlflow.db", "sqlite:////a/mlflow.db"),
    ],
)
def test_masked(text: str, expected: str) -> None:
    assert tracking.masked(text) == expected


def test_passwords_of_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:from-the-uri@host")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "from-a-variable")
    assert tracking.masked("said from-the-uri and from-a-variable") == "said *** and ***"


def test_mlflow_is_imported_only_when_a_run_is_tracked() -> None:
    code = (
        "import sys\n"
        "from dist_gsl import tracking\n"
        "tracking.MlflowTracker('/nowhere')\n"
        "tracking.tracking_uri('/nowhere')\n"
        "assert 'mlflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- epochs, told by whoever comes to tell


def test_an_epoch_is_in_the_store_once(runs_dir: Path) -> None:
    """A worker that was replaced tells its last epoch again, and so does the driver that goes on with the run."""

    def record(epoch: int, loss: float) -> dict[str, Any]:
        return {"epoch": epoch, "train_loss": loss, "alive": {"conv1": 10 - epoch}}

    tracker, run_id = started(runs_dir)
    for epoch, loss in ((1, 3.0), (2, 2.0), (2, 2.5)):
        tracker.epoch(record(epoch, loss))
    resumed = MlflowTracker(runs_dir)
    resumed.start("a", {}, run_id=run_id)
    for epoch, loss in ((1, 9.0), (2, 9.0), (3, 1.0)):
        resumed.epoch(record(epoch, loss))
    resumed.summary({"final_top1": 5.0})
    resumed.end()
    for name, values in (("train_loss", [3.0, 2.0, 1.0]), ("alive/conv1", [9.0, 8.0, 7.0]), ("epoch", [1.0, 2.0, 3.0])):
        history = client(runs_dir).get_metric_history(run_id, name)
        assert [(m.step, m.value) for m in history] == list(enumerate(values, 1))
    assert recorded(runs_dir, run_id).data.metrics["final_top1"] == 5.0


def test_epochs_of_a_course_that_was_left_are_told_again(runs_dir: Path) -> None:
    tracker, run_id = started(runs_dir)
    for epoch, loss in ((1, 3.0), (2, 9.0), (3, 99.0)):
        tracker.epoch({"epoch": epoch, "train_loss": loss, "alive": {}})
    tracker.back(1)
    for epoch, loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
        tracker.epoch({"epoch": epoch, "train_loss": loss, "alive": {}})
    tracker.end()
    history = client(runs_dir).get_metric_history(run_id, "train_loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 3.0), (2, 2.0), (2, 9.0), (3, 1.0), (3, 99.0)]
    assert recorded(runs_dir, run_id).data.metrics["train_loss"] == 1.0


# --- whose file is the store?

MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/export /mnt/shared\\040runs nfs4 rw 0 0
tmpfs /mnt/shared\\040runs/local tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("runs", "may_move", "why"),
    [
        ("/srv/runs", False, None),
        ("/srv/runs", True, "driver may start on another next time"),
        ("/mnt/shared runs/mine", False, "another machine's disk \\(nfs4\\)"),
        ("/mnt/shared runs/local/mine", False, None),
        ("/mnt/shared runs2/mine", False, None),
    ],
)
def test_a_database_file_belongs_to_one_machine(
    runs: str, may_move: bool, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why is None:
        tracking.check_owner(runs, may_move=may_move, mounts=MOUNTS)
    else:
        with pytest.raises(ValueError, match=f"{why}: start a server where it stays, `mlflow server --backend-store-uri"):
            tracking.check_owner(runs, may_move=may_move, mounts=MOUNTS)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    tracking.check_owner(runs, may_move=may_move, mounts=MOUNTS)
