"""A short form of the soak: four faults in one run of two workers, which ends as if nothing had been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_four_faults(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "soak"), "--faults", "4", "--epochs", "40", "--seeds"]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [*command, "--kinds", "worker", "damage", "loss", "terminate"], capture_output=True, text=True, check=False, timeout=600, env=environment
    )
    log = tmp_path / "soak" / "soak.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    summary = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert summary["faults"] == {"worker": 1, "damage": 1, "loss": 1, "terminate": 1}
    assert "after 40 epochs; learning rate at 0.5 of the recipe's" in done.stdout
