"""What a training survives: random faults, one after another, in one run of two workers, against the same run undisturbed.

    python benchmarks/soak.py FOLDER [--faults 30] [--seed 0] [--epochs 300]

Handwritten digits by the ordinary command, `dist-gsl train digits`, neurons removed on the way. After each fault the script waits until
the run has written checkpoints of its own accord again, and starts the command anew where the fault ended it. The faults:

    worker     SIGKILL to a worker                        driver     SIGKILL to the command
    terminate  SIGTERM to the command                     memory     a worker may allocate nothing more
    loss       a batch that is not finite (in the worker, by this script: the one fault that no outside can make)
    damage     a byte of the newest checkpoint changes, then SIGKILL to a worker
    disk       the checkpoints' disk is full for a while  storage    the checkpoints' disk is read-only for a while
    tracking   MLflow's server ends, and is started again

It fails unless the run ends with the epochs asked for, every epoch once, and an accuracy no further from that of undisturbed runs of three
seeds than three of their standard deviations. Full and read-only disks need the right to mount; without it they are left out, and said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from dist_gsl.runs import RunFolder

KINDS = ("worker", "driver", "terminate", "memory", "loss", "damage", "disk", "storage", "tracking")
AT_MOST = {"loss": 2}
"""Each halves the learning rate for good."""
POISON = "poison"
PATIENCE_S = 240.0
BIN = Path(sys.executable).parent


def arguments(name: str, folder: Path, *, epochs: int, seed: int) -> list[str]:
    return [
        "train", "digits", "--name", name, "--runs", str(folder / "runs"), "--data.dir", str(folder / "digits"), "--start-or-resume",
        "--train.epochs", str(epochs), "--train.seed", str(seed), "--train.shrink", "epoch", "--train.checkpoint-steps", "5",
        "--train.on-divergence", "back", "--workers.max-failures", "1000", "--train.schedule", "constant", "--train.learning-rate", "0.02",
        "--penalty.beta.rest", "3", "--penalty.beta-schedule.start", "2", "--penalty.beta-schedule.end", "7",
    ]  # fmt: skip


# --- the command, and the one fault that is made within


def drive(folder: Path, command: list[str]) -> int:
    """`dist-gsl` with workers that read a batch of NaN where the file `poison` lies in the folder."""
    from dist_gsl import cli
    from dist_gsl.training import worker

    def poisoned(job: dict[str, Any]) -> None:
        from dist_gsl.training import loop
        from dist_gsl.training.worker import train_worker  # as it is in the worker's process

        step = loop.train_step

        def train_step(state: Any, config: Any, batch: Any) -> Any:
            with contextlib.suppress(FileNotFoundError):
                (folder / POISON).unlink()
                batch.images.fill_(float("nan"))
            return step(state, config, batch)

        loop.train_step = train_step
        train_worker(job)

    worker.train_worker = poisoned
    return cli.main(command)


class Run:
    """The command at work, started again when a fault ends it."""

    def __init__(self, folder: Path, name: str, command: list[str]) -> None:
        self.folder, self.command, self.run = folder, command, RunFolder(folder / "runs" / name)
        self.num_starts = 0
        self.log = folder / f"{name}.log"
        self.start()

    def start(self) -> None:
        self.num_starts += 1
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(self.folder), "--drive", *self.command], stdout=log, stderr=log, start_new_session=True
            )

    def position(self) -> str:
        names = self.run.checkpoints.names() if (self.run.path / "checkpoints").is_dir() else []
        return names[0] if names else ""

    def workers(self) -> list[int]:
        """Processes of this command that train."""
        parents = {}
        for each in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parents[int(each.name)] = int((each / "stat").read_text().rpartition(")")[2].split()[1])
        found = []
        for pid in parents:
            with contextlib.suppress(OSError):
                if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    above = pid
                    while above in parents and above != self.process.pid:
                        above = parents[above]
                    if above == self.process.pid:
                        found.append(pid)
        return sorted(found)

    def goes_on(self, after: str) -> bool:
        """Waits until two checkpoints later than `after` were written; False where the run came to its end first. Starts it where it ended
        early."""
        end, seen = time.monotonic() + PATIENCE_S, {after}
        while len(seen) < 3:
            if self.process.poll() == 0:
                return False
            if self.process.poll() is not None:
                time.sleep(3)  # what is left of its workers may still write
                seen = {self.position()}
                self.start()
            if time.monotonic() > end:
                raise SystemExit(f"soak: the run does not go on after {after}; see {self.log}")
            seen.add(self.position())
            time.sleep(0.05)
        return True


# --- faults


class Faults:
    def __init__(self, run: Run, rng: random.Random, server: Server) -> None:
        self.run, self.rng, self.server = run, rng, server
        self.place = run.run.path / "checkpoints"

    def a_worker(self) -> int:
        end = time.monotonic() + PATIENCE_S
        while not (workers := self.run.workers()):
            if time.monotonic() > end:
                raise SystemExit(f"soak: no worker comes up; see {self.run.log}")
            time.sleep(0.1)
        return self.rng.choice(workers)

    def on_a_worker(self, happens: Callable[[int], object]) -> None:
        """On another where it is gone meanwhile."""
        for _ in range(5):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                happens(self.a_worker())
                return
            time.sleep(1)
        raise SystemExit(f"soak: workers end by themselves; see {self.run.log}")

    def worker(self) -> None:
        self.on_a_worker(lambda pid: os.kill(pid, signal.SIGKILL))

    def driver(self) -> None:
        self.run.process.kill()
        self.run.process.wait()

    def terminate(self) -> None:
        self.run.process.terminate()
        if self.run.process.wait(60) not in (143, 0):
            raise SystemExit(f"soak: SIGTERM ended the command with {self.run.process.returncode}; see {self.run.log}")

    def memory(self) -> None:
        def limit(pid: int) -> None:
            used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
            resource.prlimit(pid, resource.RLIMIT_AS, (used, used))

        self.on_a_worker(limit)

    def loss(self) -> None:
        (self.run.folder / POISON).touch()

    def damage(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # the run may be writing the next one
            file = self.place / self.run.position() / "state.pt"
            content = bytearray(file.read_bytes())
            content[self.rng.randrange(len(content))] ^= 1 + self.rng.randrange(255)
            file.write_bytes(bytes(content))
        self.worker()

    def disk(self) -> None:
        filler = self.place / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(self.rng.uniform(2, 8))
        filler.unlink()

    def storage(self) -> None:
        while subprocess.run(["mount", "-o", "remount,ro", str(self.place)], check=False, capture_output=True).returncode:
            time.sleep(0.05)  # a file is open for writing
        time.sleep(self.rng.uniform(2, 8))
        subprocess.run(["mount", "-o", "remount,rw", str(self.place)], check=True)

    def tracking(self) -> None:
        self.server.stop()
        time.sleep(self.rng.uniform(2, 8))
        self.server.start()


class Server:
    """MLflow's."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with (self.folder / "mlflow.log").open("a") as log:
            self.process = subprocess.Popen(
                [BIN / "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
                 "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", str(self.folder / "artifacts")],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.2)
        raise SystemExit("soak: MLflow's server does not come up")

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """A disk of 32 MB at the place; False where it may not be had."""
    place.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)], check=False, capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            kept = place.with_name("kept")
            shutil.copytree(place, kept)
            subprocess.run(["umount", "--lazy", str(place)], check=True)
            place.rmdir()
            kept.rename(place)


def draw(number: int, kinds: list[str], rng: random.Random) -> list[str]:
    """So many faults, every kind at least once where there is room."""
    faults = kinds[:number]
    while len(faults) < number:
        left = [kind for kind in kinds if Counter(faults)[kind] < AT_MOST.get(kind, number)]
        if not left:
            raise SystemExit(f"soak: {number} faults are more than --kinds {' '.join(kinds)} allows; name another kind")
        faults.append(rng.choice(left))
    rng.shuffle(faults)
    return faults


# --- the whole


def undisturbed(folder: Path, *, epochs: int, seeds: list[int]) -> list[float]:
    """Validation accuracy after the last epoch, percent, of each seed."""
    found = []
    for seed in seeds:
        name = f"calm-{seed}"
        subprocess.run(
            [BIN / "dist-gsl", *arguments(name, folder, epochs=epochs, seed=seed), "--no-tracking"], check=True, stdout=subprocess.DEVNULL
        )
        found.append(RunFolder(folder / "runs" / name).state()["history"][-1]["val_top1"])
        print(f"undisturbed, seed {seed}: top-1 {found[-1]:.2f} after {epochs} epochs", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything is written; a new one")
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the undisturbed runs; none: accuracy is not compared")
    parser.add_argument("--drive", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.absolute()
    if options.drive is not None:
        sys.exit(drive(folder, options.drive))
    folder.mkdir(parents=True)
    from dist_gsl import data

    data.write("digits", folder / "digits")
    calm = undisturbed(folder, epochs=options.epochs, seeds=options.seeds)
    server, rng = Server(folder), random.Random(options.seed)
    server.start()
    os.environ["MLFLOW_TRACKING_URI"] = server.uri
    began = time.monotonic()
    with small_disk(folder / "runs" / "soak" / "checkpoints") as has_disk:
        kinds = [kind for kind in options.kinds if has_disk or kind not in ("disk", "storage")]
        if not has_disk:
            print("no right to mount: left out are disk, storage", flush=True)
        run = Run(folder, "soak", arguments("soak", folder, epochs=options.epochs, seed=0))
        try:
            suffered = suffer(run, Faults(run, rng, server), draw(options.faults, kinds, rng), rng)
            while run.process.wait(20 * PATIENCE_S) != 0:
                if run.num_starts > 2 * options.faults + 10:
                    raise SystemExit(f"soak: the run ends again and again; see {run.log}")
                run.start()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)
            server.stop()
    state = run.run.state()
    epochs = [record["epoch"] for record in state["history"]]
    accuracy = state["history"][-1]["val_top1"]
    print(json.dumps({"faults": dict(Counter(suffered)), "starts": run.num_starts, "seconds": round(time.monotonic() - began)}))
    print(f"disturbed: top-1 {accuracy:.2f} after {len(epochs)} epochs; learning rate at {state['rate_factor']:g} of the recipe's")
    if len(suffered) < options.faults:
        raise SystemExit(f"soak: the run was over after {len(suffered)} faults; give it more --epochs")
    if epochs != list(range(1, options.epochs + 1)):
        raise SystemExit(f"soak: its epochs are {epochs}")
    if len(calm) > 1:
        mean, spread = statistics.mean(calm), statistics.stdev(calm)
        print(f"undisturbed: {mean:.2f} ± {spread:.2f}")
        if abs(accuracy - mean) > max(3 * spread, 0.5):
            raise SystemExit("soak: the accuracy is another one")


def suffer(run: Run, faults: Faults, kinds: list[str], rng: random.Random) -> list[str]:
    """Those that came before the run's end."""
    done: list[str] = []
    before = ""
    for number, kind in enumerate(kinds, 1):
        if not run.goes_on(before):
            return done
        time.sleep(rng.uniform(0, 2))
        before, began = run.position(), time.monotonic()
        happen: Callable[[], None] = getattr(faults, kind)
        happen()
        done.append(kind)
        is_going = run.goes_on(before)
        print(f"{number:2} {kind:<9} at {before}: goes on after {time.monotonic() - began:.1f} s", flush=True)
        if not is_going:
            return done
    return done


if __name__ == "__main__":
    main()
