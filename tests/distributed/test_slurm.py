"""The Slurm script on one node, with real Ray and a real training. `srun` and `scontrol` are stand-ins, as no Slurm is here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_gsl.runs import RunFolder

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm" / "dist-gsl.sbatch"
ALONE = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""In namespaces of its own: the script's `ray stop` ends every Ray process that it sees."""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings: Ray's own


def may_unshare() -> bool:
    return subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n',  # runs the command on this node
        "scontrol": 'echo "$3"\n',  # show hostnames LIST
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}")
        (programs / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "DIST_GSL_"))}
    return {**kept, "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "2",
            "DIST_GSL_RUNS": str(tmp_path / "runs"), "DIST_GSL_DATA": str(tmp_path / "data")}  # fmt: skip


@pytest.mark.skipif(not may_unshare(), reason="namespaces may not be made here, and `ray stop` would end others' Ray")
def test_the_script_trains_and_leaves_no_token(environment: dict[str, str], tmp_path: Path) -> None:
    train = ["train", "digits", "--name", "slurm", "--train.epochs", "3", "--penalty.beta-schedule.start", "0",
             "--penalty.beta-schedule.end", "2", "--penalty.beta.rest", "1.5", "--no-tracking"]  # fmt: skip
    begin = 'ip link set lo up && exec bash "$@"'
    done = subprocess.run(
        [*ALONE, "sh", "-c", begin, "sh", SCRIPT, *train], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert RunFolder(tmp_path / "runs" / "slurm").is_finished
    assert not list((tmp_path / "runs").glob(".ray-token-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "sbatch --nodes=2"), (["train", "digits"], "give the run a --name"), (["train", "digits", "--name", "x"], "set DIST_GSL_RUNS")],
)
def test_the_script_refuses(arguments: list[str], message: str, environment: dict[str, str], tmp_path: Path) -> None:
    if "--name" in arguments:
        del environment["DIST_GSL_RUNS"]
    done = subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in done.stderr
