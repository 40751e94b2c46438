"""What one waits for between typing `dist-gsl train dec3-chars` and the end of the first training step, item by item.

    python benchmarks/startup.py [--repeats 3] [--workers 2] [--keep FOLDER]

The real command runs, its data already written, and is ended after its first step. Functions of this package and of Ray Train are wrapped by ones
that write down when they begin and end, in the command's process, in Ray Train's controller and in the workers; so is every `import` (an import
counts as that of the first package asked for, with all that it imports in turn). Each moment belongs to one item alone: of what goes on then, to
the process that is furthest on the way (a worker before the controller before the command), and in it to the innermost function. So the items
add up to the time by the wall clock; what is under no function is a row of its own.

Medians over the repeats. One run before them is told apart: it makes the tracking store, and brings the files from the disk.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PATIENCE_S = 300.0
FIRST_STEP = "first step"
COMMAND, DRIVER, RAY, WORKER = "command", "driver", "Ray", "worker"
PYTHON = "Python"
PROCESSES = "workers' processes: Python, import ray"
UNACCOUNTED = ("not accounted for", "")
STORE = "tracking store opened, run begun"
DRIVER_REST = "rest of the driver"
CREATE = "workers' processes asked for"

IN_COMMAND = {
    "dist_gsl.cli": {"main": "rest of the command", "_parser": "command line's parser"},
    "dist_gsl.experiment": {"run": DRIVER_REST, "_train_and_report": "run's folder and config"},
    "dist_gsl.events": {"fit": "rest of Ray Train"},
    "dist_gsl.launch": {"prepare": "rest of the checks", "_launch": "trainer made", "_resources": "cluster's resources"},
    "dist_gsl.data": {"prepare": "data found", "check": "data checked"},
    "dist_gsl.training.session": {"dry_build": "network built to check it", "make_loader": "loaders made to check them"},
    "dist_gsl.tracking": {"MlflowTracker.start": STORE},
    "ray": {"init": "ray.init"},
}
IN_CONTROLLER = {
    "ray.train.v2._internal.execution.worker_group.worker_group": {
        "WorkerGroup._start_impl": "rest of the start of workers", "WorkerGroup._create_placement_group": "places asked for",
        "WorkerGroup._create_workers": CREATE, "WorkerGroup._init_train_context": "workers' contexts",
    },
    "ray.train.v2._internal.execution.worker_group.placement_group_handle": {"DefaultPlacementGroupHandle.wait": "places waited for"},
    "ray.train.v2._internal.callbacks.backend_setup": {"BackendSetupCallback.after_execution_group_start": "process group"},
}  # fmt: skip
IN_WORKER = {
    "dist_gsl.training.worker": {
        "_work": "rest of the worker", "_begun_before": "first word with the driver", "_unseen": "folder and data seen", "_first_problem": "all agree",
    },
    "dist_gsl.data": {"prepare": "data found"},
    "dist_gsl.training.session": {
        "last_state": "last checkpoint looked for", "Session.__init__": "rest of the session", "make_loader": "loaders made", "build": "rest of the state",
        "data_memory": "memory of the nodes",
    },
    "dist_gsl.training.state": {"build_network": "network and its neurons", "Setup.wrapped": "DDP, optimizer", "starting_betas": "penalty's strengths"},
    "dist_gsl.data.loader": {"Loader.__iter__": "first batch"},
    "dist_gsl.training.loop": {"train": "rest of the loop", "train_step": FIRST_STEP},
}  # fmt: skip


# --- in the processes that are looked at


class Tracer:
    """Writes a line to a file for each wrapped function that ends, and for each import that takes long."""

    def __init__(self, file: str, targets: dict[str, dict[str, str]], replaced: dict[str, dict[str, Callable[..., Any]]] | None = None) -> None:
        """targets: by module, the items of its functions; replaced: what takes some of these functions' place, made from them."""
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._targets = {module: dict(names) for module, names in targets.items()}
        self._replaced = replaced or {}
        self._within = threading.local()
        self._import = builtins.__import__
        builtins.__import__ = self._traced_import
        self._wrap()

    def tell(self, item: str, begin: float, end: float) -> None:
        line = {"item": item, "begin": begin, "end": end, "pid": os.getpid(), "rank": os.environ.get("RANK")}
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def _traced_import(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        package = (name if level == 0 else (globals or {}).get("__package__") or "").partition(".")[0]
        if getattr(self._within, "other", False) or package in sys.stdlib_module_names:
            return self._import(name, globals, locals, fromlist, level)
        self._within.other = package != "dist_gsl"
        item = f"import {package}"
        if self._within.other and package in sys.modules:  # a part that comes later
            item += "".join(f".{each}" for each in [*name.split(".")[1:2], *(fromlist or ())][:1])
        begin = time.monotonic()
        try:
            return self._import(name, globals, locals, fromlist, level)
        finally:
            self._within.other = False
            if (end := time.monotonic()) - begin > 1e-3:
                self.tell(item, begin, end)
                self._wrap()

    def _wrap(self) -> None:
        """The functions of those modules that have come."""
        for module in [each for each in self._targets if each in sys.modules]:
            if getattr(sys.modules[module].__spec__, "_initializing", False):
                continue
            for path, item in self._targets.pop(module).items():
                *owners, name = path.split(".")
                owner = functools.reduce(getattr, owners, sys.modules[module])
                traced = self._first_of if name == "__iter__" else self._whole
                function = self._replaced.get(module, {}).get(path, lambda same: same)(getattr(owner, name))
                setattr(owner, name, traced(function, item))

    def _whole(self, function: Callable[..., Any], item: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def traced(*arguments: Any, **named: Any) -> Any:
            begin = time.monotonic()
            try:
                return function(*arguments, **named)
            finally:
                self.tell(item, begin, time.monotonic())

        return traced

    def _first_of(self, function: Callable[..., Any], item: str) -> Callable[..., Any]:
        def traced(iterable: Any) -> Iterator[Any]:
            begin = time.monotonic()
            for number, each in enumerate(function(iterable)):
                if number == 0:
                    self.tell(item, begin, time.monotonic())
                yield each

        return traced


def process_start() -> float:
    """When this process was started, by the monotonic clock."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def trace_worker(file: str) -> None:
    Tracer(file, IN_WORKER).tell(PROCESSES, process_start(), time.monotonic())


def ray_callback(file: str) -> Any:
    """Brings tracers to Ray Train's controller and, before anything else is done in them, to the workers."""
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

    asked = time.monotonic()

    class Callback(ControllerCallback, WorkerGroupCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            tracer, start = Tracer(file, IN_CONTROLLER), max(asked, process_start())
            tracer.tell("controller's process asked for", asked, start)
            tracer.tell("controller's process: Python, import ray, torch", start, time.monotonic())

        def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
            ray.get([worker.execute_async(trace_worker, file) for worker in workers])
            return {}

    return Callback()


def inside(file: str, command: list[str]) -> int:
    """`dist-gsl`, traced."""

    def train_worker(job: dict[str, Any]) -> None:
        from dist_gsl.training.worker import train_worker  # as it is in the worker's process

        train_worker(job)

    def traced_launch(launch: Callable[..., None]) -> Callable[..., None]:
        return lambda worker, *arguments: launch(train_worker, *arguments)

    def traced_fit(fit: Callable[..., str | None]) -> Callable[..., str | None]:
        def fit_with_callback(trainer: Any, *arguments: Any, **named: Any) -> str | None:
            create = trainer._create_default_callbacks
            trainer._create_default_callbacks = lambda: [ray_callback(file), *create()]
            return fit(trainer, *arguments, **named)

        return fit_with_callback

    tracer = Tracer(file, IN_COMMAND, {"dist_gsl.launch": {"_launch": traced_launch}, "dist_gsl.events": {"fit": traced_fit}})
    tracer.tell(PYTHON, process_start(), time.monotonic())
    from dist_gsl.cli import main

    return main(command)


# --- what was written


class Event(NamedTuple):
    item: str
    where: str
    begin: float
    end: float
    level: int
    """The furthest on the way counts."""


def lines_of(file: Path) -> list[dict[str, Any]]:
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def is_first_step(line: dict[str, Any]) -> bool:
    return line["item"] == FIRST_STEP and line["rank"] == "0"


def events_of(file: Path) -> list[Event]:
    """Of a run that has ended: what lasts longer than the first step is told when it ends."""
    lines = lines_of(file)
    step = min((line for line in lines if is_first_step(line)), key=lambda line: line["end"])
    (command,) = [line["pid"] for line in lines if line["item"] == PYTHON]
    (create,) = [line for line in lines if line["item"] == CREATE]
    (driver,) = [line for line in lines if line["item"] == DRIVER_REST]
    events = []
    for line in lines:
        begin, end = line["begin"], min(line["end"], step["end"])
        if line["pid"] == command:
            where, level = (COMMAND if begin < driver["begin"] else DRIVER), 1
        elif line["pid"] == create["pid"]:
            where, level = RAY, 2
        elif line["pid"] == step["pid"]:
            where, level = WORKER, 3
        else:
            continue
        if line["item"] == PROCESSES:
            where, begin, end = RAY, max(begin, create["begin"]), create["end"]
        if line["item"] != FIRST_STEP or line is step:
            events.append(Event(line["item"], where, begin, end, level))
    return [event for event in events if event.begin < event.end]


def shares(events: list[Event], begin: float) -> dict[tuple[str, str], float]:
    """Seconds of each (item, where), in the order of time, from `begin` to the last event's end: each moment belongs to one."""
    borders = sorted({begin, *(max(begin, border) for event in events for border in (event.begin, event.end))})
    found: dict[tuple[str, str], float] = defaultdict(float)
    for left, right in itertools.pairwise(borders):
        going_on = [event for event in events if event.begin <= left and event.end >= right]
        if going_on:
            event = max(going_on, key=lambda each: (each.level, each.begin, -each.end))
            found[event.item, event.where] += right - left
        else:
            found[UNACCOUNTED] += right - left
    return found


def run(options: argparse.Namespace, folder: Path, number: int, data_dir: Path) -> dict[tuple[str, str], float]:
    from benchmarks.raytrain import Side

    trace = folder / f"{number}.trace"
    began = time.monotonic()
    side = Side(
        str(number),
        [sys.executable, str(Path(__file__).resolve()), "--inside", str(trace), "train", "dec3-chars", "--name", f"run-{number}", "--runs",
         str(folder / "runs"), "--data.dir", str(data_dir), "--workers.num", str(options.workers)],
        folder,
    )  # fmt: skip
    try:
        while not any(map(is_first_step, lines_of(trace))):
            side.check()
            if time.monotonic() > began + PATIENCE_S:
                side.fail(f"has no step done within {PATIENCE_S:g} s")
            time.sleep(0.5)
    finally:
        side.end()
    return shares(events_of(trace), began)


def tell(found: list[dict[tuple[str, str], float]], *, least: float) -> None:
    def row(item: str, where: str, seconds: list[float]) -> None:
        print(f"| {item} | {where} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |")

    seconds = {key: [each.get(key, 0.0) for each in found] for key in dict.fromkeys(key for each in found for key in each)}
    unaccounted = seconds.pop(UNACCOUNTED, [0.0] * len(found))
    short = [key for key, of in seconds.items() if statistics.median(of) < least]
    print("| item | where | seconds | from, to |\n|---|---|---|---|")
    for (item, where), of in seconds.items():
        if (item, where) not in short:
            row(item, where, of)
    row(f"{len(short)} items of less than {least:g} s", "", [sum(each.get(key, 0.0) for key in short) for each in found])
    row(UNACCOUNTED[0], "", unaccounted)
    row("**together**", "", [sum(each.values()) for each in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--least", type=float, default=0.05, help="seconds of an item that has a row of its own")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new one for traces, logs and runs; otherwise they are not kept")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends too
    if options.keep is not None:
        options.keep.mkdir(parents=True)
        measured(options, options.keep.resolve())
        return
    with tempfile.TemporaryDirectory() as folder:
        measured(options, Path(folder))


def measured(options: argparse.Namespace, folder: Path) -> None:
    import ray
    import torch

    from dist_gsl import data
    from dist_gsl.recipes import find

    data_dir = data.prepare(find("dec3-chars").data).absolute()
    first, *found = (run(options, folder, number, data_dir) for number in range(1 + options.repeats))
    tell(found, least=options.least)
    print(f"\n{options.repeats} repeats, {options.workers} workers; the run before them {sum(first.values()):.2f} s, of which the tracking store "
          f"{first.get((STORE, DRIVER), 0.0):.2f}; torch {torch.__version__}, ray {ray.__version__}; command: {' '.join(sys.argv)}")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(inside(sys.argv[2], sys.argv[3:]))
    else:
        main()
