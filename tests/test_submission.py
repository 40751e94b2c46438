"""What is shipped to a cluster and what is refused before; the job server itself is in tests/distributed/test_two_nodes.py."""

import asyncio
import http.server
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_gsl import launch, submission
from dist_gsl.cli import main, submit
from dist_gsl.recipes import find
from dist_gsl.training.config import WorkersConfig


class Answers(http.server.BaseHTTPRequestHandler):
    """A test double: a server that is not Ray's, or one of Ray's as far as its first answer."""

    mode: Any = None

    def do_GET(self) -> None:
        if self.mode is None:
            self.send_error(500)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(self.mode).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serving() -> Iterator[Callable[[Any], str]]:
    servers = []

    def serve(mode: Any) -> str:
        server = http.server.HTTPServer(("127.0.0.1", 0), type("Server", (Answers,), {"mode": mode}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "http://", "head"])
def test_what_is_no_job_server_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is no job server; give that of the cluster's head"):
        submission.Cluster(address)


def test_passwords_in_the_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="leave user and password out") as caught:
        submission.Cluster("http://me:secret@head:8265")
    assert "secret" not in str(caught.value)


def test_a_dead_address_is_named() -> None:
    port = free_port()
    with pytest.raises(ValueError, match=f"no job server answers at http://127.0.0.1:{port}: is the cluster up"):
        submission.Cluster(f"127.0.0.1:{port}")


@pytest.mark.parametrize(("mode", "says"), [(None, "answers 500"), ({"some": "thing"}, "is no Ray job server"), ([], "is no Ray")])
def test_another_server_is_told_from_ray(mode: Any, says: str, serving: Callable[[Any], str]) -> None:
    with pytest.raises(ValueError, match=says):
        submission.Cluster(serving(mode))


def test_a_guarded_cluster_says_what_is_missing(serving: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(ValueError, match="asks for a token: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"):
        submission.Cluster(serving({"authentication_mode": "token"}))


def test_the_package_is_shipped_without_data_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/x/config.yaml", "data/d/train.beton", ".git/config", "tune_spaces/mine.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    given = tmp_path / "runs" / "x" / "config.yaml"
    with submission.shipped([given]) as (folder, names):
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert names == {given: "given/x/config.yaml"}
        assert {"dist_gsl/cli/__main__.py", "tune_spaces/mine.py", "tune_spaces/chars.py", "given/x/config.yaml"} <= files
        assert {name.split("/")[0] for name in files} == {"dist_gsl", "tune_spaces", "given"}
        assert not [name for name in files if "__pycache__" in name]
        assert sum((folder / name).stat().st_size for name in files) < 2_000_000
    assert not folder.exists()


def test_a_script_is_shipped_with_what_is_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("work/part/main.py", "work/part/more/other.py", "work/part/data.bin", "work/else.py", "work/part/.venv/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    with submission.shipped(script=Path("work/part/main.py")) as (folder, _):
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert {name for name in files if name.startswith("work")} == {"work/part/main.py", "work/part/more/other.py"}
        assert (folder / "work/part/main.py").read_text() == "work/part/main.py"


def test_workers_are_not_a_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--address", "http://head:8265", "--workers", "2", "--", "python", "benchmarks/learning/run.py"]) == 2
    assert "a script says itself what it needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name what to run after `--`"),
        (["report", "runs/x"], "name what to run after `--`"),
        (["train"], "name a recipe after `train`"),
        (["train", "dec33"], "dec33"),
        (["train", "digits", "--train.epoch", "3"], "did you mean train.epochs"),
        (["train", "digits", "--runs", "runs"], "--runs runs must be an absolute path"),
        (["tune", "nothing"], "no space is called 'nothing'"),
        (["python"], "name a script after `python`"),
        (["python", "-c", "print()"], "name a script after `python`"),
        (["python", "nowhere/run.py"], "no such file"),
        (["python", __file__], "must lie in a folder below this one"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_shipped(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "--address", f"http://127.0.0.1:{free_port()}", "--", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1


def test_retry_needs_somebody_who_waits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--address", "http://head:8265", "--no-wait", "--retry", "2", "--", "train", "digits"]) == 2
    assert "--retry 2 needs" in capsys.readouterr().err


def test_a_given_file_takes_the_name_that_it_has_there(tmp_path: Path) -> None:
    file = tmp_path / "first" / "config.yaml"
    file.parent.mkdir()
    find("digits").save(file)
    arguments = ["train", "--baseline-run", str(file), str(file), "--name", "x"]  # an option of the same value
    assert submit._checked(arguments).given_file == file
    assert submit._renamed(arguments, str(file), "given/c.yaml") == ["train", "--baseline-run", str(file), "given/c.yaml", "--name", "x"]


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("sqlite:////srv/mlflow.db", "is this machine's, and the job's driver runs on the cluster"),
        ("http://me:secret@server:5000", "which every reader of the dashboard would see"),
    ],
)
def test_a_tracking_store_that_a_cluster_cannot_use_is_refused(
    uri: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match=says) as caught:
        submission.tracking_environment()
    assert "secret" not in str(caught.value)


def test_a_forwarded_tracking_server_is_not_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert submission.tracking_environment() == {}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert submission.tracking_environment() == {"MLFLOW_TRACKING_URI": "http://server:5000"}


def test_keys_in_an_address_are_not_sent_to_the_dashboard(capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "digits", "--data.dir", "s3://id:secret@bucket/digits"]
    assert main(["submit", "--address", f"http://127.0.0.1:{free_port()}", "--", *train]) == 2
    error = capsys.readouterr().err
    assert "leave keys out of the address" in error
    assert "secret" not in error


def test_a_log_that_falls_silent_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a connection that died without a word; what was written is not written again."""
    monkeypatch.setattr(submission, "SILENCE_S", 0.05)

    async def source(*texts: str, then_hang: bool) -> AsyncIterator[str]:
        for text in texts:
            yield text
        if then_hang:
            await asyncio.sleep(60)

    written: list[str] = []
    tail = submission._Tail(written.append, skip=0)
    asyncio.run(tail.follow(source("abc", "de", then_hang=True)))
    again = submission._Tail(written.append, skip=tail.written)
    asyncio.run(again.follow(source("abcd", "ef", "g", then_hang=False)))
    assert "".join(written) == "abcdefg"
    assert (tail.written, again.written) == (5, 2)


# --- what a cluster holds


def nodes(*resources: dict[str, float]) -> Callable[[], list[dict[str, float]]]:
    return lambda: list(resources)


def test_workers_lie_on_nodes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_nodes", nodes({"CPU": 3, "GPU": 1}, {"CPU": 3, "GPU": 4}, {"GPU": 2}))
    assert launch._resources(WorkersConfig(num=2, cpus=2)) == launch.Resources(2, True, 1, 3)
    assert launch._resources(WorkersConfig(num=4, cpus=1)) == launch.Resources(4, True, 1, 3)
    assert launch._resources(WorkersConfig(num=5, cpus=1)) == launch.Resources(5, False, 1, 3)  # four have a GPU to have
    assert launch._resources(WorkersConfig(num=1, cpus=1)) == launch.Resources(1, True, 4, 3)
    with pytest.raises(ValueError, match="5 workers need 5 GPUs, the cluster has 7"):
        launch._resources(WorkersConfig(num=5, gpu=True))
    with pytest.raises(ValueError, match="3 workers need 6 CPUs, the cluster has 6"):
        launch._resources(WorkersConfig(num=3, cpus=2))


def test_few_workers_are_enough_where_they_may_be_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_nodes", nodes({"CPU": 3}))
    assert launch._resources(WorkersConfig(num=8, min=2)) == launch.Resources(3, False, 1, 1)
    with pytest.raises(ValueError, match=r"4 workers need 4 CPUs, the cluster has 3; lower --workers\.min"):
        launch._resources(WorkersConfig(num=8, min=4))


def test_an_autoscaler_s_machines_count(monkeypatch: pytest.MonkeyPatch) -> None:
    head = {"CPU": 0.0, "memory": 1.0}
    one = {"CPU": 8.0, "GPU": 1.0, "memory": 1.0}
    kind = {"CPU": 8.0, "GPU": 1.0}
    assert launch.autoscaled([head], "") == []
    assert launch.autoscaled([head], "4xCPU:8,GPU:1") == [kind] * 4
    assert launch.autoscaled([head, one], "4xCPU:8,GPU:1; 1xCPU:96") == [kind] * 3 + [{"CPU": 96.0}]
    assert launch.autoscaled([head, one, one], "1xCPU:8,GPU:1") == []
    with pytest.raises(ValueError, match="'4 CPUs' must look like 4xCPU:8,GPU:1"):
        launch.autoscaled([], "4 CPUs")
