"""Two Ray nodes on two hosts with a link between them: training across it, and what may happen to it on the way.

Everything is as a user does it: `dist-gsl submit` from a third host, with token authentication, a tracking server, and a
folder that all see.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.learning.methods import METHODS
from dist_gsl.cli import main
from dist_gsl.runs import RunFolder
from dist_gsl.training.checkpoint import position_of
from tests.distributed.namespaces import (
    BIN,
    HEAD,
    JOBS,
    MLFLOW,
    RAY_PORT,
    WORKER,
    Host,
    Network,
    network,
    until,
    why_not,
)

NOT_HERE = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore"),  # Ray's and MLflow's own
    pytest.mark.skipif(NOT_HERE is not None, reason=str(NOT_HERE)),
]

EPOCHS = 5
DISTURBED_EPOCHS = 30
"""More than pass while things happen."""


def train(name: str, epochs: int = EPOCHS) -> list[str]:
    return ["train", "digits", "--name", name, "--train.epochs", str(epochs), "--penalty.beta.rest", "4",
            "--penalty.beta-schedule.start", "0", "--penalty.beta-schedule.end", "3"]  # fmt: skip


COMPARISON = Path("benchmarks/learning")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with network(tmp_path_factory.mktemp("net")) as made:
        made.start_mlflow()
        made.start_node(made.head)
        until(lambda: alive_nodes(made) == 1, seconds=90, name="the head")
        made.start_node(made.worker)
        until(lambda: alive_nodes(made) == 2, seconds=60, name="the second node")
        yield made


def alive_nodes(net: Network) -> int:
    code = f"from ray.util.state import list_nodes; print(sum(n.state == 'ALIVE' for n in list_nodes(address={JOBS!r})))"
    done = net.run([BIN / "python", "-c", code])
    return int(done.stdout.strip() or 0)


def gsl(net: Network, *arguments: str, timeout: float = 800) -> subprocess.CompletedProcess[str]:
    return net.run([BIN / "dist-gsl", *arguments], timeout=timeout, MLFLOW_TRACKING_URI=MLFLOW)


@contextlib.contextmanager
def submitted(net: Network, name: str, epochs: int, *options: str, fields: Sequence[str] = ()) -> Iterator[subprocess.Popen]:
    """`dist-gsl submit` at work; it is ended if it did not end."""
    process = net.start(
        net.hub, [BIN / "dist-gsl", "submit", "--address", JOBS, *options, "--", *train(name, epochs), *fields], log=f"{name}.log",
        environment={"MLFLOW_TRACKING_URI": MLFLOW},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def log(net: Network, name: str) -> str:
    file = net.folder / f"{name}.log"
    return file.read_text() if file.exists() else ""


def trained_epochs(net: Network, name: str) -> int:
    """Epochs in checkpoints."""
    kept = [position_of(each) for each in RunFolder(net.runs / name).checkpoints.names()]
    return max((position[0] for position in kept if position is not None), default=0)


def has_trained(net: Network, name: str, epochs: int) -> bool:
    return trained_epochs(net, name) >= epochs


def training_processes(host: Host) -> list[int]:
    found = []
    for pid in host.processes():
        with contextlib.suppress(OSError):
            if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def check_whole(net: Network, name: str, epochs: int) -> None:
    """The run has every epoch once, in its history, in its log and in one run of the tracking store."""
    folder = RunFolder(net.runs / name)
    assert folder.is_finished
    assert (folder.path / "report.json").exists()
    assert [row["epoch"] for row in folder.state()["history"]] == list(range(1, epochs + 1))
    code = (
        "import json; from mlflow.tracking import MlflowClient; client = MlflowClient()\n"
        "experiment = client.get_experiment_by_name('dist_gsl').experiment_id\n"
        f"runs = [r for r in client.search_runs([experiment]) if r.info.run_name == {name!r}]\n"
        "print(json.dumps([[r.info.status, [m.step for m in client.get_metric_history(r.info.run_id, 'epoch')]] for r in runs]))"
    )
    done = net.run([BIN / "python", "-c", code], MLFLOW_TRACKING_URI=MLFLOW)
    assert json.loads(done.stdout.splitlines()[-1]) == [["FINISHED", list(range(1, epochs + 1))]], done.stderr


def test_training_crosses_the_link_and_gives_what_one_node_gives(
    net: Network, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = net.head.received_bytes(), net.worker.received_bytes()
    done = gsl(net, "submit", "--address", JOBS, "--workers", "2", "--gpus-per-worker", "0", "--", *train("across"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"dashboard: {JOBS}/#/jobs/across-" in done.stdout
    assert f"across: epoch  {EPOCHS}/{EPOCHS}" in done.stdout
    check_whole(net, "across", EPOCHS)
    across = RunFolder(net.runs / "across").state()
    sent = across["position"]["step"] * 4 * sum(value.numel() for name, value in across["model"].items() if "running" not in name)
    for host, earlier in zip((net.head, net.worker), before, strict=True):
        assert host.received_bytes() - earlier > sent  # each sends its gradients to the other, of four bytes each

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main([*train("one"), "--data.dir", str(next((net.folder / "data").iterdir())), "--no-tracking"]) == 0
    one = RunFolder(tmp_path / "runs" / "one").state()
    assert one["position"] == across["position"]
    for name, value in one["model"].items():
        assert torch.equal(value, across["model"][name]), name


def test_jobs_are_listed_and_their_output_is_kept(net: Network) -> None:
    listed = gsl(net, "jobs", "list", "--address", JOBS)
    assert listed.returncode == 0, listed.stderr
    job_id = next(word for word in listed.stdout.split() if word.startswith("across-"))
    assert "succeeded" in listed.stdout
    logs = gsl(net, "jobs", "logs", job_id, "--address", JOBS)
    assert f"across: epoch  {EPOCHS}/{EPOCHS}" in logs.stdout
    missing = gsl(net, "jobs", "logs", "nothing", "--address", JOBS)
    assert missing.returncode == 2
    assert "has no job 'nothing'" in missing.stderr


def test_the_comparison_of_methods_runs_on_the_cluster(net: Network) -> None:
    shutil.copytree(Path(__file__).parents[2] / COMPARISON, net.folder / COMPARISON)
    made = net.runs / "comparison"
    command = ["python", str(COMPARISON / "run.py"), str(made), "--setting", "tiny", "--seeds", "0", "--ray", "--only", "none", "init", "magnitude"]
    done = gsl(net, "submit", "--address", JOBS, "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (made / "rows.jsonl").read_text().splitlines()]
    assert {name: sum(row["method"] == name for row in rows) for name in ("none", "init", "magnitude")} == {
        name: len(METHODS[name].strengths) for name in ("none", "init", "magnitude")
    }
    assert (made / "dense-0.pt").is_file()


def kill_a_worker(net: Network) -> None:
    os.kill(training_processes(net.worker)[0], signal.SIGKILL)


def kill_a_node(net: Network) -> None:
    net.worker.kill_all()
    time.sleep(3)
    net.start_node(net.worker)


def take_a_machine_away(net: Network) -> None:
    """With notice, as clouds give it: the run keeps its state before the machine goes."""
    code = f"from ray.util.state import list_nodes; print(*(n.node_id for n in list_nodes(address={JOBS!r}) if n.state == 'ALIVE' and n.node_ip == {WORKER!r}))"
    node_id = net.run([BIN / "python", "-c", code]).stdout.split()[-1]
    notice = net.run(
        [BIN / "ray", "drain-node", "--address", f"{HEAD}:{RAY_PORT}", "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
         "--reason-message", "test", "--deadline-remaining-seconds", "20"]
    )  # fmt: skip
    assert notice.returncode == 0, notice.stdout + notice.stderr
    until(lambda: "a machine of this run will be taken away" in log(net, "disturbed"), seconds=60, name="the notice reaches the run")
    net.worker.kill_all()
    time.sleep(3)
    net.start_node(net.worker)


def cut_the_link(net: Network) -> None:
    """For longer than the cluster waits for a node."""
    net.cut(net.worker)
    until(lambda: alive_nodes(net) == 1, seconds=300, name="the cluster gives the node up")
    net.mend(net.worker)
    net.worker.kill_all()  # what is left of it
    net.start_node(net.worker)


def kill_the_driver(net: Network) -> None:
    """Whoever submitted the job submits it again."""
    drivers = []
    for pid in net.head.processes():
        with contextlib.suppress(OSError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"dist_gsl.cli" in arguments and b"-m" in arguments:
                drivers.append(pid)
    for pid in drivers:
        os.kill(pid, signal.SIGKILL)
    assert drivers


@pytest.fixture(scope="module")
def disturbed(net: Network) -> Iterator[subprocess.Popen]:
    """One job to which all of the following happens, one after another."""
    # Who lost a node to a notice may hear of it as of any other loss, on a slow machine: of these failures one more than a run takes by itself.
    with submitted(net, "disturbed", DISTURBED_EPOCHS, "--retry", "1", fields=["--workers.max-failures", "9"]) as process:
        until(lambda: has_trained(net, "disturbed", 1) or process.poll() is not None, seconds=500, name="an epoch")
        assert process.poll() is None, log(net, "disturbed")
        yield process


@pytest.mark.parametrize("happens", [kill_a_worker, kill_a_node, take_a_machine_away, cut_the_link, kill_the_driver])
def test_a_run_goes_on_after(happens: Callable[[Network], None], net: Network, disturbed: subprocess.Popen) -> None:
    """By itself, from its last checkpoint: those who trained are gone, and more epochs follow."""

    def workers() -> set[int]:
        return {pid for host in (net.head, net.worker) for pid in training_processes(host)}

    before = workers()
    happens(net)
    until(lambda: not before & workers(), seconds=300, name="the end of those who trained")
    done = trained_epochs(net, "disturbed")
    until(lambda: trained_epochs(net, "disturbed") > done or disturbed.poll() is not None, seconds=500, name="the next epoch")
    assert disturbed.poll() is None, log(net, "disturbed")
    assert ("failed; again in" in log(net, "disturbed")) == (happens is kill_the_driver)
    until(lambda: alive_nodes(net) == 2, seconds=60, name="both nodes")


def test_the_disturbed_run_is_whole(net: Network, disturbed: subprocess.Popen) -> None:
    assert disturbed.wait(timeout=800) == 0, log(net, "disturbed")
    check_whole(net, "disturbed", DISTURBED_EPOCHS)


def interrupt_the_submitter(net: Network) -> None:
    for pid in net.hub.processes():
        with contextlib.suppress(OSError):
            if b"submit" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGINT)


def test_a_run_uses_what_is_there(net: Network) -> None:
    """A node goes and comes back: the run goes on with one worker, then with two again; it lasts for as long as that takes."""
    options = ["--workers", "1:2", "--gpus-per-worker", "0"]
    with submitted(net, "elastic", 10_000, *options, fields=["--workers.resize-interval", "5"]) as process:

        def says(text: str) -> None:
            until(lambda: text in log(net, "elastic") or process.poll() is not None, seconds=500, name=text)
            assert process.poll() is None, log(net, "elastic")

        says("begins with 2 workers at epoch 1; a step is 1 micro-batch of 32 on the first")
        until(lambda: has_trained(net, "elastic", 2), seconds=300, name="two epochs")
        net.worker.kill_all()
        says("goes on with one worker at epoch")
        done = trained_epochs(net, "elastic")
        until(lambda: has_trained(net, "elastic", done + 2), seconds=300, name="two epochs more")
        net.start_node(net.worker)
        says("goes on with 2 workers at epoch")
        done = trained_epochs(net, "elastic")
        until(lambda: has_trained(net, "elastic", done + 2), seconds=300, name="two epochs of both")
        interrupt_the_submitter(net)
        assert process.wait(timeout=800) == 130, log(net, "elastic")
    history = RunFolder(net.runs / "elastic").state()["history"]
    assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
    workers = [row["workers"] for row in history]
    assert [workers[0], workers[-1]] == [2, 2]
    assert 1 in workers


def test_a_stopped_job_leaves_its_checkpoints_and_says_so_to_the_store(net: Network) -> None:
    """Ctrl-C on the submitter: the job's driver is asked to end, and ends in order."""
    with submitted(net, "stopped", DISTURBED_EPOCHS) as process:
        until(lambda: has_trained(net, "stopped", 1) or process.poll() is not None, seconds=500, name="an epoch")
        assert process.poll() is None, log(net, "stopped")
        interrupt_the_submitter(net)
        assert process.wait(timeout=800) == 130, log(net, "stopped")
    output = log(net, "stopped")
    assert "submit it with --no-wait" in output
    assert "stopped after" in output
    logs = gsl(net, "jobs", "logs", next(word for word in output.split() if word.startswith("stopped-")), "--address", JOBS).stdout
    assert "the workers keep their state and end" in logs  # who submitted it listens no more
    assert "did not end within" not in logs
    assert logs.rstrip().endswith("`--resume` goes on from the last checkpoint")
    assert RunFolder(net.runs / "stopped").checkpoints.names()
    code = (
        "from mlflow.tracking import MlflowClient; client = MlflowClient()\n"
        "experiment = client.get_experiment_by_name('dist_gsl').experiment_id\n"
        "print([r.info.status for r in client.search_runs([experiment]) if r.info.run_name == 'stopped'])"
    )
    done = net.run([BIN / "python", "-c", code], MLFLOW_TRACKING_URI=MLFLOW)
    assert done.stdout.strip().splitlines()[-1] == "['KILLED']", done.stderr


def test_what_cannot_be_had_is_refused_at_once(net: Network) -> None:
    begin = time.monotonic()
    done = gsl(net, "submit", "--address", JOBS, "--gpus-per-worker", "1", "--", *train("no-gpus"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "2 workers need 2 GPUs, the cluster has 0" in done.stdout
    assert not (net.runs / "no-gpus").exists()
    assert time.monotonic() - begin < 300  # not a claim of speed: Ray itself would wait for ever

    dead = gsl(net, "submit", "--address", f"http://{HEAD}:1", "--", *train("x"))
    assert dead.returncode == 2
    assert f"no job server answers at http://{HEAD}:1" in dead.stderr
    begin = time.monotonic()
    silent = gsl(net, "submit", "--address", "http://10.77.0.99:8265", "--", *train("x"))  # no such host on the bridge
    assert silent.returncode == 2
    assert "no job server answers" in silent.stderr
    assert time.monotonic() - begin < 30


def test_a_missing_or_wrong_token_is_named(net: Network, tmp_path: Path) -> None:
    command = [str(BIN / "dist-gsl"), "submit", "--address", JOBS, "--", *train("x")]
    without = net.run(command, RAY_AUTH_MODE="disabled")
    assert without.returncode == 2
    assert "asks for a token: export RAY_AUTH_MODE=token" in without.stderr
    other = tmp_path / "token"
    other.write_text("0" * 64)
    wrong = net.run(command, RAY_AUTH_TOKEN_PATH=str(other))
    assert wrong.returncode == 2
    assert "does not take this token" in wrong.stderr


def test_a_folder_that_a_node_does_not_see_is_found_at_the_start(net: Network) -> None:
    elsewhere = ["--data.dir", str(next((net.folder / "data").iterdir())), "--runs", str(net.unshared / "runs")]
    runs = gsl(net, "submit", "--address", JOBS, "--", *train("unseen"), *elsewhere)
    assert runs.returncode == 1, runs.stdout + runs.stderr
    assert f"node {WORKER} does not see the run's folder {net.unshared}/runs/unseen: give --runs a path" in runs.stdout
    assert "epoch  1" not in runs.stdout


def test_tokens_are_nowhere(net: Network) -> None:
    """In no log, config or record of all that the tests above did."""
    token = net.token_file.read_bytes()
    for file in net.folder.rglob("*"):
        if file.is_file() and file != net.token_file:
            assert token not in file.read_bytes(), file
