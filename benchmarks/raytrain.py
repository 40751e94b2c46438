"""An epoch through Ray Train, against the same loop in two processes that torchrun starts. Goal: at most 1.02 once both train.

    python benchmarks/raytrain.py [--pairs 30] [--slice-seconds 4] [--images 300000] [--width 0.25] [--keep FOLDER]

The demo's recipe, `dec3-chars`, with so many images that one epoch holds all that is measured of a side, and its penalty on from the first step.
One side is the ordinary command, `dist-gsl train`, with all that belongs to it: Ray, its workers, MLflow, what the first worker tells of its
steps; it writes to a file and so shows no bar. The other is `session.run` alone: same config, data, seed, order, threads and niceness, nobody to tell.

Both have begun their epoch when the measuring begins. Then one runs for a slice of time while every process of the other is stopped (SIGSTOP),
and the other way round, in a new order for each pair: what Ray does in the background falls on Ray's side alone. What follows right after a
side goes on is not counted. The first worker of each side writes down when each step is done; the steps that lie wholly within a slice give
its seconds a step, the slices of a pair their ratio (`pairs.py`). Processor time is that of every process of a side during its slices; it does
not depend on what else the machine does.

The images are rendered on first use, in some minutes, to DIST_GSL_DATA or ./data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIDES = ("Ray Train", "torchrun")
NICENESS = 15
"""What Ray adds for its workers unless told otherwise; added for torchrun's too."""
STARTED_S = 10.0
"""Time that a side trains before it is stopped for the first time."""
SETTLE_S = 0.3
PATIENCE_S = 300.0
END_S = 40.0


# --- what the sides run


def stamp_steps(file: str) -> None:
    """From now on the first worker appends the time to the file whenever a step is done."""
    import torch.distributed as dist

    from dist_gsl.training import loop

    if dist.get_rank() != 0:
        return
    step, stamps = loop.train_step, os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def train_step(state: Any, config: Any, batch: Any) -> Any:
        totals = step(state, config, batch)
        os.write(stamps, struct.pack("d", time.monotonic()))
        return totals

    loop.train_step = train_step


def ray_side(file: str, command: list[str]) -> int:
    """`dist-gsl` whose workers write down their steps."""
    from dist_gsl import cli
    from dist_gsl.training import worker

    def stamped(job: dict[str, Any]) -> None:
        from dist_gsl.training.worker import train_worker  # as it is in the worker's process

        stamp_steps(file)
        train_worker(job)

    worker.train_worker = stamped
    return cli.main(command)


def torchrun_side(file: str, config_file: Path) -> None:
    os.nice(NICENESS)  # before there are threads
    import torch
    import torch.distributed as dist

    from dist_gsl import data
    from dist_gsl.config import RunConfig
    from dist_gsl.training import session
    from dist_gsl.training.checkpoint import Checkpoints

    config = RunConfig.load(config_file)
    dist.init_process_group("gloo")
    stamp_steps(file)
    place = session.Place(Checkpoints(str(config_file.parent / "torchrun")))
    session.run(config, data_dir=data.prepare(config.data), device=torch.device("cpu"), place=place)


# --- processes


class Process(NamedTuple):
    """What /proc says of one."""

    parent: int
    state: str
    seconds: float
    """Of the processor, so far."""
    niceness: int
    began: int


def processes() -> dict[int, Process]:
    found = {}
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid, fields = int(each.name), (each / "stat").read_text().rpartition(")")[2].split()
            ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            found[pid] = Process(int(fields[1]), fields[0], ticks, int(fields[16]), int(fields[19]))
    return found


def title(pid: int) -> str:
    """What a process runs, in a word."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        is_python = Path(words[0]).name.startswith("python")
        word = next((each for each in words[1:] if each and not each.startswith("-")), words[0]) if is_python else words[0]
        return Path(word.split()[0]).name if word.strip() else "?"
    return "?"


class Side:
    """A training with all its processes."""

    def __init__(self, name: str, command: list[str], folder: Path, **environment: str) -> None:
        self.name, self.stamps = name, folder / f"{name}.stamps"
        self.log = folder / f"{name}.log"
        self._known: set[tuple[int, int]] = set()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, cwd=folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]), **environment},
            )  # fmt: skip

    def members(self) -> dict[int, Process]:
        """Whatever was started by the command, directly or not, and is still there: parents may have gone."""
        there = processes()
        mine = {pid for pid, began in self._known if pid in there and there[pid].began == began} | ({self.process.pid} & there.keys())
        while new := {pid for pid, process in there.items() if process.parent in mine} - mine:
            mine |= new
        self._known = {(pid, there[pid].began) for pid in mine}
        return {pid: there[pid] for pid in mine}

    def workers(self) -> dict[int, Process]:
        """Those that train."""
        return {pid: process for pid, process in self.members().items() if self._trains(pid, process)}

    def _trains(self, pid: int, process: Process) -> bool:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            return b"RayTrainWorker" in command or (process.parent == self.process.pid and b"--torchrun" in command)
        return False

    def signal(self, number: int, members: dict[int, Process] | None = None) -> None:
        for pid in self.members() if members is None else members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        end = time.monotonic() + 10
        while running := {pid: process for pid, process in self.members().items() if process.state not in "TZX"}:
            self.signal(signal.SIGSTOP, running)
            if time.monotonic() > end:
                raise SystemExit(f"raytrain: processes of {self.name} do not stop")
            time.sleep(0.005)

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def times(self) -> list[float]:
        """When each step was done so far."""
        content = self.stamps.read_bytes() if self.stamps.exists() else b""
        return [each for (each,) in struct.iter_unpack("d", content[: len(content) // 8 * 8])]

    def wait_until_trains(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while not self.times():
            self.check()
            if time.monotonic() > end:
                self.fail(f"does not train within {PATIENCE_S:g} s")
            time.sleep(0.5)
        time.sleep(STARTED_S)

    def check(self) -> None:
        self.members()  # who they are is not to be found out any more once those above are gone
        if self.process.poll() is not None:
            self.fail(f"ended with {self.process.returncode}")

    def fail(self, what: str) -> NoReturn:
        raise SystemExit(f"raytrain: {self.name} {what}:\n{self.log.read_text()[-3000:]}")

    def end(self) -> None:
        """Leaves nothing behind, whatever happened."""
        self.go_on()
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        end = time.monotonic() + 5
        while self._alive() and time.monotonic() < end:
            time.sleep(0.1)
        self.signal(signal.SIGKILL)
        self.process.wait()

    def _alive(self) -> bool:
        return any(process.state not in "ZX" for process in self.members().values())


class Slice(NamedTuple):
    """What was measured of a side, per step."""

    seconds: float
    workers: float
    """Seconds of the processor, of those that train."""
    others: dict[str, float]
    """The same of each other process, by what it runs."""
    steps: int

    @property
    def processor(self) -> float:
        return self.workers + sum(self.others.values())


def measure(side: Side, seconds: float) -> Slice:
    """Lets a stopped side run for a slice."""
    side.go_on()
    time.sleep(SETTLE_S)
    before, began = side.members(), time.monotonic()
    time.sleep(seconds)
    ended, after, workers = time.monotonic(), side.members(), side.workers()
    side.stop()
    side.check()
    times = [each for each in side.times() if began <= each <= ended]
    if len(times) < 2:
        side.fail(f"has {len(times)} steps in a slice of {seconds:g} s: give it more --slice-seconds")
    a_step = (times[-1] - times[0]) / (len(times) - 1)
    share = a_step / (ended - began)
    used = {pid: share * (process.seconds - (before[pid].seconds if pid in before else 0.0)) for pid, process in after.items()}
    others: Counter[str] = Counter()
    for pid in used.keys() - workers.keys():
        others[title(pid)] += used[pid]
    return Slice(a_step, sum(used[pid] for pid in workers.keys() & used.keys()), dict(others), len(times) - 1)


# --- the whole


def prepared(options: argparse.Namespace, folder: Path) -> tuple[Path, int]:
    """The config's file, and the steps of an epoch; the data are written."""
    from dist_gsl import data
    from dist_gsl.launch import settled
    from dist_gsl.recipes import find

    recipe = find("dec3-chars")
    config = settled(replace(
        recipe, network=replace(recipe.network, width=options.width), data=replace(recipe.data, num_train=options.images),
        penalty=replace(recipe.penalty, beta_schedule=replace(recipe.penalty.beta_schedule, start=0.0)),
        train=replace(recipe.train, checkpoint_minutes=None), workers=replace(recipe.workers, num=options.workers),
    ))  # fmt: skip
    data.prepare(replace(config.data, dir=None))
    config.save(folder / "config.yaml")
    return folder / "config.yaml", options.images // config.train.batch_size


@contextlib.contextmanager
def started(options: argparse.Namespace, folder: Path, config_file: Path) -> Iterator[dict[str, Side]]:
    """Both sides within their epoch, stopped."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    script = str(Path(__file__).resolve())
    sides: dict[str, Side] = {}
    commands = {
        "torchrun": [
            "-m", "torch.distributed.run", "--nproc-per-node", str(options.workers), "--master-addr", "127.0.0.1", "--master-port", str(port),
            script, "--torchrun", str(folder / "torchrun.stamps"), str(config_file),
        ],
        "Ray Train": [
            script, "--ray", str(folder / "Ray Train.stamps"), "train", str(config_file), "--name", "ray", "--runs", str(folder / "runs"),
        ],
    }  # fmt: skip
    environment = {"torchrun": {"OMP_NUM_THREADS": "1"}, "Ray Train": {"RAY_worker_niceness": str(NICENESS)}}
    try:
        for name, command in commands.items():
            sides[name] = Side(name, [sys.executable, *command], folder, **environment[name])
            sides[name].wait_until_trains()
            sides[name].stop()
        yield sides
    finally:
        for side in sides.values():
            side.end()


def compared(options: argparse.Namespace, folder: Path) -> None:
    from benchmarks.pairs import ratio_of

    config_file, steps_per_epoch = prepared(options, folder)
    found: dict[str, list[Slice]] = {name: [] for name in SIDES}
    order = random.Random(options.seed)
    with started(options, folder, config_file) as sides:
        workers = {name: side.workers() for name, side in sides.items()}
        niceness = {name: sorted({process.niceness for process in of.values()}) for name, of in workers.items()}
        if {len(of) for of in workers.values()} != {options.workers} or niceness["Ray Train"] != niceness["torchrun"]:
            raise SystemExit(f"raytrain: the sides do not have as many workers of the same niceness: {niceness}")
        numbers = {name: len(side.members()) for name, side in sides.items()}
        for pair in range(1, options.pairs + 1):
            for name in order.sample(SIDES, 2):
                found[name].append(measure(sides[name], options.slice_seconds))
                to_come = (options.pairs - pair) * (options.slice_seconds + SETTLE_S) / found[name][-1].seconds
                if len(sides[name].times()) + 1.1 * to_come >= steps_per_epoch:
                    raise SystemExit(f"raytrain: an epoch of {steps_per_epoch} steps ends before the pairs do; give more --images")
            print(f"pair {pair}: " + ", ".join(f"{name} {1e3 * found[name][-1].seconds:.2f} ms a step" for name in SIDES), file=sys.stderr)
        for name, side in sides.items():
            if side.workers().keys() != workers[name].keys():
                side.fail("has other workers than at the beginning")
    (folder / "slices.json").write_text(json.dumps({name: [each._asdict() for each in slices] for name, slices in found.items()}))
    ratio = ratio_of(*([each.seconds for each in found[name]] for name in SIDES))
    used = ratio_of(*([each.processor for each in found[name]] for name in SIDES))
    print("| | step, ms | processor a step, ms: workers | all else | processes | steps |\n|---|---|---|---|---|---|")
    others: dict[str, Counter[str]] = {name: Counter() for name in SIDES}
    for name in SIDES:
        slices = found[name]
        for each in slices:
            others[name].update({word: 1e3 * seconds / len(slices) for word, seconds in each.others.items()})
        print(f"| {name} | {1e3 * statistics.median(each.seconds for each in slices):.2f} | {1e3 * statistics.mean(each.workers for each in slices):.2f} "
              f"| {sum(others[name].values()):.2f} | {numbers[name]} | {sum(each.steps for each in slices)} |")  # fmt: skip
    print(f"| ratio | **{ratio}** | all: {used} | | | |\n")
    for name in SIDES:
        most = ", ".join(f"{word} {each:.2f}" for word, each in others[name].most_common(8) if each >= 0.005)
        print(f"All else of {name}, processor ms a step: {most or 'nothing'}.")
    import ray
    import torch

    print(f"{options.pairs} pairs of {options.slice_seconds:g} s, {options.workers} workers of one thread and niceness {niceness['torchrun']}, "
          f"epoch of {steps_per_epoch} steps, torch {torch.__version__}, ray {ray.__version__}; command: {' '.join(sys.argv)}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--slice-seconds", type=float, default=4.0)
    parser.add_argument("--images", type=int, default=300_000, help="of the epoch")
    parser.add_argument("--width", type=float, default=0.25, help="of Dec3; the demo's is 0.25")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the pairs")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new one for logs, runs and slices; otherwise they are not kept")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends too
    if options.keep is not None:
        options.keep.mkdir(parents=True)
        compared(options, options.keep.resolve())
        return
    with tempfile.TemporaryDirectory() as folder:
        compared(options, Path(folder))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ray"]:
        sys.exit(ray_side(sys.argv[2], sys.argv[3:]))
    elif sys.argv[1:2] == ["--torchrun"]:
        torchrun_side(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
