"""Searches on a real Ray: what they leave behind, what fails in them, and going on after the driver was killed."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_gsl.cli import main
from dist_gsl.tuning.records import SearchFolder, Status

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),  # Ray's and MLflow's own
]

CHROMIUM = [  # no sandbox for root, no calls home
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

FAULTY = '''"""A grid in which some trials fail; of one worker each, so that two run side by side."""
from dataclasses import replace
from dist_gsl.recipes import find
from dist_gsl.tuning import Choice

def base():
    digits = find("digits")
    return replace(
        digits, network=replace(digits.network, batch_norm=False),
        penalty=replace(digits.penalty, beta_schedule=replace(digits.penalty.beta_schedule, start=0.0, end=2.0)),
        train=replace(digits.train, epochs=2, warmup_epochs=0.0), workers=replace(digits.workers, num=1, max_failures=0),
    )

def space():
    return {"train.init": Choice([None, "/nowhere/state.pt"]), "train.learning_rate": Choice([0.01, 1e9])}
'''

PLAIN = '''"""Three epochs of digits."""
from dataclasses import replace
from dist_gsl.recipes import find
from dist_gsl.tuning import Float

def base():
    digits = find("digits")
    return replace(
        digits, train=replace(digits.train, epochs=3),
        penalty=replace(digits.penalty, beta_schedule=replace(digits.penalty.beta_schedule, start=0.0, end=3.0)),
    )

def space():
    return {"penalty.beta.rest": Float(1.5, 3.0)}
'''


@pytest.fixture(scope="module")
def directory(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("search")
    (folder / "faulty.py").write_text(FAULTY)
    (folder / "plain.py").write_text(PLAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder


def until(what: Callable[[], bool], process: subprocess.Popen, *, seconds: float = 500) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, f"the search ended before that: {process.communicate()}"
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.05)


def children(directory: Path) -> tuple[list, list]:
    """(searches, trials) in the store."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{directory}/runs/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "dist_gsl"]
    runs = client.search_runs([experiment.experiment_id])
    return [r for r in runs if r.data.tags.get("kind") == "search"], [r for r in runs if r.data.tags.get("kind") == "trial"]


def test_failures_are_recorded_and_the_search_goes_on(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And all the cluster's CPUs are free afterwards."""
    import ray

    code = main(["tune", "faulty.py", "--searcher", "grid", "--name", "faulty", "--trials", "9"])
    end = time.monotonic() + 30  # Ray frees what is done within seconds
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < end:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
    captured = capsys.readouterr()
    assert code == 1
    assert "3 of 5 trials failed" in captured.err
    assert re.search("the loss is not finite in epoch 1, step [0-9]+; lower train.learning_rate", captured.out)
    folder = SearchFolder(directory / "runs" / "faulty")
    records = folder.records()
    by_point = {(r.params.get("train.init"), r.params.get("train.learning_rate")): r for r in records.values()}
    assert len(records) == 5, "the grid has four points, and the baseline"
    assert by_point[None, None].is_baseline
    assert by_point[None, None].status is Status.FINISHED
    assert by_point[None, 0.01].status is Status.FINISHED
    assert by_point[None, 0.01].summary["final_neurons"] is not None
    assert (folder.trial(1).path / "compact" / "weights.safetensors").exists()
    assert by_point[None, 1e9].status is Status.FAILED
    assert "not finite" in (by_point[None, 1e9].reason or "")
    for rate in (0.01, 1e9):
        record = by_point["/nowhere/state.pt", rate]
        assert record.status is Status.FAILED
        assert "/nowhere/state.pt: no such file" in (record.reason or "")
    content = json.loads((folder.path / "front.json").read_text())
    assert content["num_failed"] == 3
    (search,), trials = children(directory)
    assert len(trials) == 5
    assert {trial.data.tags["mlflow.parentRunId"] for trial in trials} == {search.info.run_id}
    assert sorted(trial.info.status for trial in trials) == ["FAILED"] * 3 + ["FINISHED"] * 2
    assert search.data.metrics["num_failed"] == 3
    finished = [trial for trial in trials if trial.info.status == "FINISHED"]
    for trial in finished:
        assert float(trial.data.params["beta_rest"]) >= 0
        assert {"final_top1", "final_neurons", "final_alive_percent"} <= set(trial.data.metrics)


def test_killed_and_resumed(directory: Path) -> None:
    """The driver is killed in the second trial, then a worker while it goes on: every trial ends, none is run twice."""
    folder = SearchFolder(directory / "runs" / "killed")
    command = [sys.executable, "-m", "dist_gsl.cli", "tune", "plain.py", "--name", "killed", "--trials", "3"]

    def curve(number: int) -> list[int]:
        records = folder.records() if folder.path.exists() else {}
        return [moment.epoch for moment in records[number].curve] if number in records else []

    def start(*options: str) -> subprocess.Popen:
        return subprocess.Popen([*command, *options], cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    driver = start()
    try:
        until(lambda: len(curve(1)) == 1, driver)
    finally:
        driver.kill()
        driver.communicate()
    first = folder.records()
    assert first[0].status is Status.FINISHED
    assert first[1].status is Status.RUNNING
    before = (folder.trial(0).path / "report.json").stat().st_mtime_ns

    driver = start("--resume")
    try:
        until(lambda: len(curve(2)) == 1, driver)
        os.kill(worker_of(driver.pid), signal.SIGKILL)
        output, _ = driver.communicate(timeout=500)
    finally:
        driver.kill()
    assert driver.returncode == 0, output
    assert "1 done before, 1 to go on with" in output
    assert "trial 1: penalty.beta.rest=" in output
    assert "goes on after epoch 1" in output
    records = folder.records()
    assert [record.status for record in records.values()] == [Status.FINISHED] * 3
    assert [record.num_starts for record in records.values()] == [1, 2, 1]
    assert (folder.trial(0).path / "report.json").stat().st_mtime_ns == before
    assert [curve(number) for number in range(3)] == [[1, 2, 3]] * 3
    assert records[1].params == first[1].params
    searches, trials = children(directory)
    (search,) = [run for run in searches if run.info.run_name == "killed"]
    mine = [trial for trial in trials if trial.data.tags["mlflow.parentRunId"] == search.info.run_id]
    assert [trial.info.status for trial in mine] == ["FINISHED"] * 3
    assert search.data.metrics["num_finished"] == 3


def worker_of(driver: int) -> int:
    """A training worker's process among the descendants of a driver."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    mine = {driver}
    for _ in range(5):
        mine |= {int(pid) for pid, parent, _ in rows if int(parent) in mine}
    return next(int(pid) for pid, _, name in rows if int(pid) in mine and "RayTrainWorker" in name)


def test_the_chosen_trial_is_trained_to_the_end(directory: Path) -> None:
    """Nothing is left to train here: the trial's network becomes a run, with the search's baseline, and its test split is
    read once."""
    assert main(["train", "--from-trial", "killed/trial-001", "--name", "chosen"]) == 0
    report = json.loads((directory / "runs" / "chosen" / "report.json").read_text())
    trial = json.loads((directory / "runs" / "killed" / "trial-001" / "report.json").read_text())
    assert report["baseline"] == "killed/trial-000"
    assert report["split"] == trial["split"] == "val"
    assert report["top1"] == trial["top1"]
    assert report["layers"] == trial["layers"]
    assert main(["report", "runs/chosen", "--final"]) == 0
    assert json.loads((directory / "runs" / "chosen" / "report.json").read_text())["split"] == "test"
    assert main(["report", "runs/killed", "--final"]) == 2
    assert main(["report", "runs/killed"]) == 0


def test_constraints_after_the_search(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow.tracking import MlflowClient

    again = ["tune", "plain.py", "--name", "killed", "--resume"]  # as many trials as before
    client = MlflowClient(f"sqlite:///{directory}/runs/mlflow.db")
    ids = [record.mlflow_run_id for record in SearchFolder(directory / "runs" / "killed").records().values()]
    before = [client.get_run(each).info.end_time for each in ids if each is not None]
    assert ids[1] is not None
    client.update_run(ids[1], status="RUNNING")  # as where the driver is killed between its own record and the store's
    assert main([*again, "--max-latency-ms", "1000"]) == 0
    runs = [client.get_run(each).info for each in ids if each is not None]
    assert [run.status for run in runs] == ["FINISHED"] * len(ids)
    assert [run.end_time for run in runs[:1] + runs[2:]] == before[:1] + before[2:]  # the others are left as they are
    assert "choice (at most 1000 ms): killed/trial-" in capsys.readouterr().out
    assert main([*again, "--max-accuracy-drop", "-50"]) == 1
    assert "no finished trial fits" in capsys.readouterr().out
    assert main(["tune", "plain.py", "--name", "killed"]) == 2
    assert "go on with it by --resume" in capsys.readouterr().err


def test_a_path_is_one_training_with_a_network_for_each_strength(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its driver is killed while the second strength is on; what was trained until then is not trained again."""
    folder = SearchFolder(directory / "runs" / "along")
    given = ["tune", "plain.py", "--path", "--trials", "3", "--name", "along", "--train.epochs", "5", "--step-epochs", "2", "--finish-epochs", "2"]
    driver = subprocess.Popen([sys.executable, "-m", "dist_gsl.cli", *given], cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until(lambda: folder.path.exists() and 2 in (records := folder.records()) and bool(records[2].curve), driver)
    finally:
        driver.kill()
        driver.communicate()
    kept = {number: record.status is Status.FINISHED for number, record in folder.records().items()}
    assert kept[0]
    files = [folder.trial(number).path / "report.json" for number in kept if kept[number]]
    before = [file.stat().st_mtime_ns for file in files]
    assert main([*given, "--resume"]) == 0
    output = capsys.readouterr().out
    assert f"a path of 3 networks, 13 epochs in all, {len(files)} done before, {3 - len(files)} to go on with" in output
    assert "trial 1: epoch" not in output  # trained, if not reported
    assert [file.stat().st_mtime_ns for file in files] == before
    records = folder.records()
    assert [record.status for record in records.values()] == [Status.FINISHED] * 3
    assert [record.params.get("penalty.beta.rest") for record in records.values()] == [None, 3.0, 1.5]
    assert [[moment.epoch for moment in record.curve] for record in records.values()] == [[1, 2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]
    alive = [record.alive for record in records.values()]
    assert alive == sorted(alive, reverse=True)  # type: ignore[type-var]
    assert alive[-1] is not None
    assert alive[-1] < 100
    searches, trials = children(directory)
    (search,) = [run for run in searches if run.info.run_name == "along"]
    mine = [trial for trial in trials if trial.data.tags["mlflow.parentRunId"] == search.info.run_id]
    assert [trial.info.status for trial in mine] == ["FINISHED"] * 3
    assert main(["train", "--from-trial", "along/trial-002", "--name", "from-path"]) == 0
    assert json.loads((directory / "runs" / "from-path" / "report.json").read_text())["baseline"] == "along/trial-000"
    capsys.readouterr()
    assert main([*given[:4], "4", *given[5:], "--resume"]) == 2
    assert "--resume: --num_trials is 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--path", "--no-baseline"], "--path: it begins with the dense network"),
        (["--path", "--objective", "latency"], "--path: run time is not measured beside a training"),
        (["--path", "--train.epochs", "4"], "path: train.epochs is 4, of which 4 finish"),
        (["--step-epochs", "2"], "tune: --step-epochs is of a path; give --path too"),
        (["--searcher", "path"], "--searcher is 'path'"),
    ],
)
def test_what_makes_no_path_is_refused(options: list[str], message: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "plain.py", "--name", "none", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (directory / "runs" / "none").exists()


def test_the_compare_view_draws_accuracy_against_neuron_reduction(directory: Path) -> None:
    """A real browser on the real UI: the scatter plot of the compare view has a point for each trial."""
    from playwright.sync_api import expect, sync_playwright

    _, trials = children(directory)
    mine = [trial for trial in trials if trial.info.run_name.startswith("killed/")]
    (experiment,) = {trial.info.experiment_id for trial in mine}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ui = subprocess.Popen(
        [sys.executable, "-m", "dist_gsl.cli", "ui", "--port", str(port)], cwd=directory, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        until(lambda: answers(port), ui)
        ids = json.dumps([trial.info.run_id for trial in mine]).replace(" ", "")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
            page = browser.new_page(viewport={"width": 1300, "height": 900})
            page.goto(f"http://127.0.0.1:{port}/#/compare-runs?runs={ids}&experiments={json.dumps([experiment])}")
            page.get_by_role("tab", name="Scatter Plot").click(timeout=90_000)
            for box, name in (("x-axis-selector", "final_neurons"), ("y-axis-selector", "final_top1")):
                page.locator(f"#{box}").click()
                page.get_by_role("option", name=name, exact=True).click()
            plot = page.locator(".js-plotly-plot")
            expect(plot.locator("text.xtitle")).to_have_text("final_neurons")
            expect(plot.locator("text.ytitle")).to_have_text("final_top1")
            expect(plot.locator("canvas").first).to_be_visible()
            close = page.get_by_role("button", name="Close")  # of the panel that covers a third of the page
            if close.count():
                close.first.click()
            drawn = plot.evaluate("plot => plot.data.map(trace => [trace.x, trace.y])")
            if os.environ.get("DIST_GSL_SCREENSHOT"):
                page.screenshot(path=os.environ["DIST_GSL_SCREENSHOT"])
            browser.close()
    finally:
        os.killpg(ui.pid, signal.SIGTERM)
        ui.wait(timeout=30)
    points = sorted((float(x), float(y)) for xs, ys in drawn for x, y in zip(xs, ys, strict=True))
    assert points == sorted((t.data.metrics["final_neurons"], t.data.metrics["final_top1"]) for t in mine)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except OSError:
        return False
