"""Memory of the writer over many images, and of the loader over a beton ten times larger than what it may keep.

    sudo python benchmarks/input_memory.py [--images 50000]

Images are those of `input.py`, linked as often as needed. What is counted is what a process has of its own (private and anonymous), of
the writer and all its workers; the page cache is the system's. The loader reads in quasi-random order, with a tenth of the file as its
limit, in a memory control group of that tenth and what the process takes, which needs root; without it the loader runs freely and the
script says so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from input import make_images

GROUPS = Path("/sys/fs/cgroup/memory")
READ = """
import sys, time
from dist_gsl.data import Augment, Loader
loader = Loader(sys.argv[1], batch_size=128, train=True, augment=Augment.RANDOM_RESIZED, num_threads=2, memory=int(sys.argv[2]) or None)
for epoch in range(2):
    loader.set_epoch(epoch)
    began = time.monotonic()
    for number, batch in enumerate(loader):
        if number % 40 == 39 or number + 1 == len(loader):
            own = next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous:"))
            print(epoch, number + 1, own // 1024, f"{128 * (number + 1) / (time.monotonic() - began):.0f} images/s", flush=True)
"""


def own_mebibytes(pid: int) -> int:
    """Anonymous memory of a process and of its descendants; what they share counts once for each part of it."""
    total, todo = 0.0, [pid]
    while todo:
        each = todo.pop()
        try:
            todo += [int(child) for child in Path(f"/proc/{each}/task/{each}/children").read_text().split()]
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss_Anon:"):
                    total += int(line.split()[1]) / 1024
        except OSError:  # it has ended
            continue
    return int(total)


def sampled(work: Callable[[], None]) -> list[tuple[float, int]]:
    """(seconds, MiB) once a second while it runs."""
    samples, done, begin = [], threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(1.0):
            samples.append((time.monotonic() - begin, own_mebibytes(os.getpid())))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return samples


def main() -> None:
    from dist_gsl import data

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root, out = Path(temporary) / "images", Path(temporary) / "out"
        make_images(root, 1000)
        files = sorted((root / "train").rglob("*.jpg"))
        for number in range(len(files), options.images):
            original = files[number % len(files)]
            os.link(original, original.with_name(f"{number:06d}.jpg"))
        samples = sampled(lambda: data.write(f"imagefolder:{root}", out, as_is=True, max_side=None, jpeg_share=1.0, num_workers=2))  # type: ignore[func-returns-value]
        print(f"writer, {options.images} images, {samples[-1][0]:.0f} s: MiB after each tenth of the time")
        print("  " + " ".join(str(samples[len(samples) * tenth // 10][1]) for tenth in range(1, 10)), samples[-1][1])
        beton = out / "train.beton"
        size = beton.stat().st_size
        for order, memory in (("quasi-random", size // 10), ("random, its file taken for one that fits", 0)):
            with beton.open("rb") as file:  # what the writer left in the page cache would count for nobody
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            print(f"loader, {order}, {size / 1e9:.2f} GB; {(size // 10) / 1e9:.2f} GB and 0.6 for the process: epoch, batch, MiB", flush=True)
            in_group([sys.executable, "-c", READ, str(beton), str(memory)], size // 10 + 600 * 2**20)


def in_group(command: list[str], limit: int) -> None:
    """Runs it in a memory control group of so many bytes, where one can be made."""
    group = GROUPS / f"dist-gsl-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
        command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
    except OSError as error:
        print(f"  not in a group of less memory ({error})", flush=True)
    try:
        subprocess.run(command, check=True)
    finally:
        if group.exists():
            group.rmdir()


if __name__ == "__main__":
    main()
