"""Eight concurrent writers on a tracking server over a real PostgreSQL lose nothing."""

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SCRIPT = Path(__file__).parents[1] / "cluster" / "mlflow-server.sh"
WRITERS, EPOCHS, METRICS = 8, 30, 12

WRITER = f"""
import sys
from dist_gsl.tracking import MlflowTracker
number, uri, runs = int(sys.argv[1]), sys.argv[2], sys.argv[3]
tracker = MlflowTracker(runs, uri=uri)
tracker.start(f"writer-{{number}}", {{"number": number}}, {{"kind": "trial"}})
print(tracker.run_id, flush=True)
sys.stdin.readline()  # all begin together
for epoch in range({EPOCHS}):
    tracker.metrics({{f"metric-{{k}}": 1000 * number + epoch + k / 100 for k in range({METRICS})}}, step=epoch)
tracker.summary({{"final_top1": float(number)}})
tracker.end()
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def postgresql(program: str) -> str:
    found = shutil.which(program) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))), None)
    assert found is not None, f"PostgreSQL's {program} is missing; `make test-slow` installs it"
    return found


@pytest.fixture
def database(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A PostgreSQL of our own on the loopback, with a password; its address."""
    folder = Path("/tmp") / f"dist-gsl-postgresql-{secrets.token_hex(4)}"  # pytest's own is not for other users
    folder.mkdir(mode=0o700)
    prefix: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        prefix = ["runuser", "-u", "postgres", "--"]
    password, port = secrets.token_urlsafe(), free_port()
    password_file = folder / "password"
    password_file.write_text(password)
    if prefix:
        shutil.chown(password_file, "postgres")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(
        [*prefix, postgresql("initdb"), "-D", str(folder / "data"), "-U", "gsl", "-A", "scram-sha-256",
         "--pwfile", str(password_file)], check=True, cwd="/", **quiet,
    )  # fmt: skip
    server = subprocess.Popen(
        [*prefix, postgresql("postgres"), "-D", str(folder / "data"), "-p", str(port), "-k", str(folder),
         "-c", "listen_addresses=127.0.0.1"], cwd="/", **quiet,
    )  # fmt: skip
    monkeypatch.setenv("PGPASSWORD", password)
    try:
        create = [postgresql("createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "gsl", "mlflow"]
        for _ in range(100):
            if subprocess.run(create, check=False, **quiet).returncode == 0:
                break
            time.sleep(0.2)
        yield f"postgresql://gsl@127.0.0.1:{port}/mlflow"
    finally:
        server.terminate()
        server.wait(timeout=30)
        shutil.rmtree(folder)


@pytest.fixture
def server(database: str, tmp_path: Path) -> Iterator[str]:
    port = free_port()
    with (tmp_path / "server.log").open("w") as log:
        yield from _serve(database, tmp_path, port, log)
    assert os.environ["PGPASSWORD"] not in (tmp_path / "server.log").read_text()


def _serve(database: str, tmp_path: Path, port: int, log: IO[str]) -> Iterator[str]:
    process = subprocess.Popen(
        ["sh", str(SCRIPT), database, str(tmp_path / "artifacts"), str(port)], env={**os.environ, "MLFLOW_WORKERS": "2"},
        stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.5)
        yield uri
    finally:
        os.killpg(process.pid, 15)  # MLflow's own workers too
        process.wait(timeout=30)


def test_eight_writers_lose_no_metric(server: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    command = [sys.executable, "-c", WRITER]
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                subprocess.Popen([*command, str(number), server, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for number in range(WRITERS)
        ]  # fmt: skip
        for writer in writers:
            stack.callback(writer.kill)  # before its pipes are closed, as callbacks run last one first
        run_ids = [writer.stdout.readline().strip() for writer in writers if writer.stdout]
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        assert [writer.wait(timeout=240) for writer in writers] == [0] * WRITERS
    assert len(set(run_ids)) == WRITERS
    client = MlflowClient(server)
    for number, run_id in enumerate(run_ids):
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.data.metrics["final_top1"] == number
        for k in range(METRICS):
            history = client.get_metric_history(run_id, f"metric-{k}")
            assert sorted((m.step, m.value) for m in history) == [
                (epoch, pytest.approx(1000 * number + epoch + k / 100)) for epoch in range(EPOCHS)
            ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "cluster/mlflow-server.sh postgresql://"),
        (["sqlite:///x.db", "files"], "is no PostgreSQL address"),
        (["postgresql://gsl:secret@localhost/mlflow", "files"], "leave the password out"),
        (["postgres://gsl:secret@localhost/mlflow", "files"], "leave the password out"),
        (["postgresql://gsl@localhost/mlflow?sslmode=require&password=secret", "files"], "leave the password out"),
    ],
)
def test_the_server_script_refuses(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(["sh", str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "secret" not in done.stderr
    assert not list(tmp_path.iterdir())
