"""Memory that a process keeps."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dist_gsl import heap

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = [
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of glibc"),
    pytest.mark.skipif(HUGE.exists() and "[always]" in HUGE.read_text(), reason="pages of 2 MiB are few"),
]

STEPS = """
import resource, sys, threading
from dist_gsl import heap
import torch
def step():
    blocks = [torch.ones(12_500_000) for _ in range(3)]  # 50 MB each, which glibc by itself never keeps
def steps():
    for _ in range(6):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
if sys.argv[1] == "kept":
    print(heap.keep_freed())
if sys.argv[2] == "main":
    steps()
else:
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
"""
OFTEN = 1000
"""Pages of a step that are anything but chance, wherever they are of 64 KiB or less: 150 MB are 2,289 of those."""


def steps(how: str, where: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name not in (*heap.USERS, *heap.LOCAL, "THP_MEM_ALLOC_ENABLE")}
    command = [sys.executable, "-c", STEPS, how, where]
    return subprocess.run(command, env={**clean, "OMP_NUM_THREADS": "1", **environment}, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


@pytest.mark.parametrize(("where", "environment"), [("main", {}), ("thread", heap.LOCAL)])
def test_a_step_gets_no_pages_anew(where: str, environment: dict[str, str]) -> None:
    did, faults = steps("kept", where, **environment)
    assert did == "True"
    assert int(faults) < 100
    assert int(steps("as it comes", where, **environment)[0]) > OFTEN


def test_what_the_user_set_stays() -> None:
    did, faults = steps("kept", "main", MALLOC_TRIM_THRESHOLD_="131072")
    assert did == "False"
    assert int(faults) > OFTEN
