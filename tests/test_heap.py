"""Memory that a process keeps."""

import os
import platform
import subprocess
import sys

import pytest

from dist_gsl import heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of glibc")

STEPS = """
import resource, sys
from dist_gsl import heap
import torch
if sys.argv[1] == "kept":
    print(heap.keep_freed())
def step():
    torch.ones(12_500_000)  # 50 MB, which glibc by itself never keeps
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""


def steps(how: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name not in heap.USERS and name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", STEPS, how]
    return subprocess.run(command, env={**clean, "OMP_NUM_THREADS": "1", **environment}, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def test_a_step_gets_no_pages_anew() -> None:
    did, faults = steps("kept")
    assert did == "True"
    assert int(faults) < 100
    assert int(steps("as it comes")[0]) > 10_000  # in pages of 4 KiB they are 12,208


def test_what_the_user_set_stays() -> None:
    did, faults = steps("kept", MALLOC_TRIM_THRESHOLD_="131072")
    assert did == "False"
    assert int(faults) > 10_000
