"""How cost grows: with parameters, neurons, workers and trials.

    python benchmarks/growth.py parameters FOLDER [--millions 1 5 20 100 500] [--device cuda]
    python benchmarks/growth.py neurons FOLDER [--neurons 100 1000 10000 100000 1000000]
    python benchmarks/growth.py workers FOLDER [--workers 1 2 4 8]
    python benchmarks/growth.py trials FOLDER [--trials 1 4 16 64]
    python benchmarks/growth.py plot FOLDER OUT.svg          draws what the others have written to FOLDER

parameters: the proximal step over all neurons of a network, as the optimizer does it, against a copy of as many entries, in interleaved pairs
(`pairs.py`). The networks are chains of --layers convolutions of 3x3, each with BatchNorm and ReLU, whose width makes the parameters: rows get longer
with it, their number grows as its root. Nothing dies.

neurons: the same step at a fixed number of entries (--millions) in more and shorter rows: --layers convolutions of 1x1 without bias, beside each
other on one input, together of so many neurons, whose outputs a linear layer reads. A million neurons have 20 entries each.

workers: a step of the demo's Dec3 (`step.py`), the same batch a worker, by processes of one thread over gloo; in turns in one run all train a step
together, or the first alone while the others wait. "beyond" is what a step of all takes more than that of one, times the workers that share a core:
all-reduce, waiting, and memory that cores share. Processor seconds are those of all threads of all workers.

trials: a search of random points, as `dist-gsl tune` runs it, on a Ray of its own and with MLflow; each trial is one epoch of a few digits, by
one worker of one CPU, as many at once as there are cores. "beyond" is the time on the clock, times trials at once, less the training's own, for
each trial; "one more" what a trial more costs on the clock against the search of the row before. Memory is the main process's, each search in a
process of its own, which is ended after --minutes and so many seconds a trial.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.pairs import AT_LEAST, compare, device_name, device_seconds, ratio_of, timed
from benchmarks.step import NETWORKS, step_of
from dist_gsl import ProximalSGD, SparseGroupLasso, create_model, find_neurons
from dist_gsl.neurons import Neurons

Row = dict[str, Any]
BETA, RATE = 1e-9, 0.1
"""So weak that nothing dies and every step has the same work."""
CORES = len(os.sched_getaffinity(0))


def keep(folder: Path, what: str, rows: Sequence[Row]) -> None:
    """Whole or not at all; called after each row."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{what}.tmp"
    temporary.write_text(json.dumps({"machine": machine(), "command": " ".join(sys.argv), "rows": rows}, indent=1) + "\n")
    os.replace(temporary, folder / f"{what}.json")


def machine() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    processor = found[1] if found else platform.machine()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{CORES} cores of {processor} ({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}"


def tell(*cells: Any) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*titles: str) -> None:
    tell(*titles)
    print("|" + "---|" * len(titles))


# --- the proximal step: parameters, neurons


def chain(entries: float, *, num_layers: int) -> nn.Module:
    """Convolutions of 3x3 with about so many entries: 9 width^2 each, but for the first, which reads 3 channels."""
    width = max(1, round((entries / 9 / max(1, num_layers - 1)) ** 0.5))
    features: list[nn.Module] = []
    for number in range(num_layers):
        features += [nn.Conv2d(width if number else 3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Beside(nn.Module):
    """Convolutions of 1x1 that read the same channels, `row` of them, and a linear layer that reads them all."""

    def __init__(self, num_neurons: int, *, row: int, num_layers: int) -> None:
        super().__init__()
        widths = [num_neurons // num_layers + (number < num_neurons % num_layers) for number in range(num_layers)]
        self.layers = nn.ModuleList(nn.Conv2d(row, width, 1, bias=False) for width in widths)
        self.classifier = nn.Linear(num_neurons, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.cat([layer(x).relu() for layer in self.layers], 1).flatten(1))


def proximal_step(model: nn.Module, neurons: Neurons, *, alpha: float) -> Callable[[], None]:
    """The proximal part of a step, over all layers."""
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=BETA, alpha=alpha), lr=RATE)

    @torch.no_grad()
    def step() -> None:
        optimizer.begin_step()
        optimizer.prox_(neurons)
        optimizer.finish_step()

    return step


def rows_of(model: nn.Module, example: Tensor, *, options: argparse.Namespace) -> list[Row]:
    """One for each alpha."""
    neurons = find_neurons(model, example)
    entries = sum(part.numel() for layer in neurons for part in neurons.parts(layer))
    num_neurons = sum(layer.num_neurons for layer in neurons)
    model.to(options.device)
    source = torch.randn(entries, device=options.device)
    target = torch.empty_like(source)
    rows = []
    for alpha in options.alpha:
        step = proximal_step(model, neurons, alpha=alpha)
        found = compare(step, lambda: target.copy_(source), pairs=options.pairs, seconds=options.seconds, clock=device_seconds if options.device == "cuda" else None)
        rows.append({
            "alpha": alpha, "entries": entries, "neurons": num_neurons, "layers": len(neurons), "step_ms": 1e3 * found.seconds,
            "copy_ms": 1e3 * found.other_seconds, "ns_per_entry": 1e9 * found.seconds / entries, "ratio": found.ratio, "low": found.low,
            "high": found.high, "pairs": found.pairs,
        })  # fmt: skip
    return rows


def step_cost(what: str, sizes: Sequence[float], make: Callable[[float], tuple[nn.Module, Tensor]], *, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    head("entries, million", "neurons", "layers", "alpha", "step, ms", "copy, ms", "ns an entry", "step over copy", "pairs")
    for size in sizes:
        model, example = make(size)
        for row in rows_of(model, example, options=options):
            rows.append(row | {"threads": options.threads})
            keep(options.folder, what, rows)
            ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            tell(f"{row['entries'] / 1e6:.2f}", f"{row['neurons']:,}", row["layers"], f"{row['alpha']:g}", f"{row['step_ms']:.3g}",
                 f"{row['copy_ms']:.3g}", f"{row['ns_per_entry']:.3f}", ratio, row["pairs"])  # fmt: skip
        del model, example


def parameters(options: argparse.Namespace) -> None:
    def make(millions: float) -> tuple[nn.Module, Tensor]:
        return chain(1e6 * millions, num_layers=options.layers), torch.randn(2, 3, 8, 8)

    step_cost("parameters", sorted(options.millions), make, options=options)
    print(f"chains of {options.layers} convolutions of 3x3, {options.device}, {options.threads} thread(s), at most {options.pairs} pairs")


def neurons(options: argparse.Namespace) -> None:
    def make(number: float) -> tuple[nn.Module, Tensor]:
        row = max(1, round(1e6 * options.millions / number))
        return Beside(int(number), row=row, num_layers=options.layers), torch.randn(2, row, 1, 1)

    if min(options.neurons) < 2 * options.layers:
        raise SystemExit(f"growth: {min(options.neurons)} neurons are too few for {options.layers} layers; lower --layers")
    step_cost("neurons", sorted(options.neurons), make, options=options)
    print(f"{options.layers} convolutions of 1x1 beside each other, {options.device}, {options.threads} thread(s), at most {options.pairs} pairs")


# --- workers


def work(rank: int, num_workers: int, options: argparse.Namespace, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_workers)
    first = dist.new_group([0])
    arguments, shape, classes = NETWORKS[options.network]
    torch.manual_seed(0)
    model = create_model(options.network, num_classes=classes, **arguments)
    generator = torch.Generator().manual_seed(rank)
    batch = torch.randn(shape, generator=generator), torch.randint(classes, shape[:1], generator=generator)
    together = step_of(model, batch, bucket_mb=25.0, how="within", alpha=0.0)
    alone = step_of(model, batch, bucket_mb=25.0, how="within", alpha=0.0, group=first) if rank == 0 else lambda: None
    taken: tuple[list[float], list[float]] = ([], [])
    processor = torch.zeros(2, dtype=torch.float64)
    for number in range(options.pairs + options.warmup):
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.process_time()
            seconds = timed((alone, together)[which], dist.barrier)
            if number >= options.warmup:
                taken[which].append(seconds)
                # Who waits for the first one spends next to nothing, and is not counted.
                processor[which] += (time.process_time() - began) * (which == 1 or rank == 0)
    dist.all_reduce(processor)
    if rank == 0:
        share = max(1.0, num_workers / CORES)
        beyond = ratio_of(taken[1], [share * each for each in taken[0]])
        images = shape[0] * options.pairs
        row = {
            "workers": num_workers, "cores": CORES, "batch": shape[0],
            "alone_ms": 1e3 * beyond.other_seconds / share, "together_ms": 1e3 * beyond.seconds,
            "images_per_second": num_workers * shape[0] / beyond.seconds,
            "alone_images_per_second": shape[0] * share / beyond.other_seconds,
            "processor_ms_per_image": 1e3 * float(processor[1]) / (images * num_workers),
            "alone_processor_ms_per_image": 1e3 * float(processor[0]) / images,
            "beyond_percent": 100 * (1 - 1 / beyond.ratio), "beyond_low": 100 * (1 - 1 / beyond.low), "beyond_high": 100 * (1 - 1 / beyond.high),
        }  # fmt: skip
        Path(folder, "row.json").write_text(json.dumps(row))
    dist.barrier()
    dist.destroy_process_group()


def workers(options: argparse.Namespace) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[Row] = []
    head("workers", "step of one, ms", "step of all, ms", "images a second", "over one alone", "processor-ms an image", "of one alone",
         "beyond, % of the step")  # fmt: skip
    for num_workers in sorted(options.workers):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, (num_workers, options, folder), nprocs=num_workers)
            row: Row = json.loads(Path(folder, "row.json").read_text())
        rows.append(row)
        keep(options.folder, "workers", rows)
        tell(num_workers, f"{row['alone_ms']:.1f}", f"{row['together_ms']:.1f}", f"{row['images_per_second']:,.0f}",
             f"{row['images_per_second'] / row['alone_images_per_second']:.2f}", f"{row['processor_ms_per_image']:.3f}",
             f"{row['alone_processor_ms_per_image']:.3f}",
             f"{row['beyond_percent']:.1f} ({row['beyond_low']:.1f} to {row['beyond_high']:.1f})")  # fmt: skip
    print(f"{options.network}, workers of one thread on {CORES} cores, {NETWORKS[options.network][1][0]} images each, {options.pairs} pairs")


# --- trials


def run_search(options: argparse.Namespace) -> None:
    """One search, in this process; its row goes to FOLDER/trials-K.json."""
    from rich.console import Console

    from dist_gsl import data
    from dist_gsl.penalty import Schedule
    from dist_gsl.recipes import find
    from dist_gsl.tuning import Float, driver
    from dist_gsl.tuning.records import SearchSettings, Status

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that Ray is ended and the runs are removed
    (num_trials,) = options.trials
    os.environ.setdefault("DIST_GSL_DATA", str(options.folder / "data"))
    base = find("digits")
    base = replace(
        base, workers=replace(base.workers, num=1, cpus=1, gpu=False), data=replace(base.data, num_train=options.images, num_val=64, num_test=64),
        train=replace(base.train, epochs=1, warmup_epochs=0.0), penalty=replace(base.penalty, beta_schedule=Schedule(start=0.0)),
    )  # fmt: skip
    settings = SearchSettings(
        num_trials=num_trials, space_file="growth", space={}, base=base, searcher="random", baseline=False, stopping=None,
    )  # fmt: skip
    data.prepare(base.data)
    at_once = min(num_trials, CORES)
    with tempfile.TemporaryDirectory(dir=options.folder) as runs, Path(options.folder, f"trials-{num_trials}.log").open("w") as log:
        before = resident("VmRSS")
        began = time.perf_counter()
        folder = driver.search(
            settings, {"penalty.beta.rest": Float(5.0, 20.0, log=True)}, name="growth", runs_dir=Path(runs), console=Console(file=log, width=200),
            track=not options.no_tracking, max_concurrent=at_once,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        records = folder.records()
        finished = [record for record in records.values() if record.status is Status.FINISHED]
        if len(finished) < num_trials:
            raise SystemExit(f"growth: {num_trials - len(finished)} of {num_trials} trials did not finish: "
                             f"{next((r.reason for r in records.values() if r.reason), 'no reason given')}")  # fmt: skip
        reports = [json.loads((folder.trial(record.number).path / "report.json").read_text()) for record in finished]
    training = sum(report["train_seconds"] for report in reports)
    row = {
        "trials": num_trials, "at_once": at_once, "seconds": seconds, "training_seconds": training, "tracked": not options.no_tracking,
        "beyond_seconds_per_trial": (at_once * seconds - training) / num_trials, "resident_before_mib": before, "resident_mib": resident("VmRSS"),
        "peak_mib": resident("VmHWM"),
    }  # fmt: skip
    Path(options.folder, f"trials-{num_trials}.json").write_text(json.dumps(row))


def resident(entry: str) -> float:
    """MiB of this process."""
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def trials(options: argparse.Namespace) -> None:
    options.folder = options.folder.absolute()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.inside:
        try:
            run_search(options)
        except KeyboardInterrupt:
            raise SystemExit("growth: the search was ended") from None
        return
    rows: list[Row] = []
    head("trials", "at once", "seconds", "a trial", "its training", "beyond, a trial", "one more", "main process, MiB", "peak")
    for num_trials in sorted(options.trials):
        limit_s = 60 * options.minutes + options.seconds_a_trial * num_trials
        command = [sys.executable, __file__, "trials", str(options.folder), "--inside", "--trials", str(num_trials), "--images", str(options.images),
                   *(["--no-tracking"] if options.no_tracking else [])]  # fmt: skip
        file = options.folder / f"trials-{num_trials}.json"
        file.unlink(missing_ok=True)
        process = subprocess.Popen(command, stdout=sys.stderr)
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # the search keeps its state and ends Ray
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            tell(num_trials, f"not done in {limit_s:.0f} s", *[""] * 7)
            continue
        if process.returncode or not file.exists():
            tell(num_trials, f"failed (exit code {process.returncode}); see trials-{num_trials}.log", *[""] * 7)
            continue
        row: Row = json.loads(file.read_text())
        file.unlink()
        if rows:
            row["one_more_seconds"] = (row["seconds"] - rows[-1]["seconds"]) / (num_trials - rows[-1]["trials"])
        rows.append(row)
        keep(options.folder, "trials", rows)
        tell(num_trials, row["at_once"], f"{row['seconds']:.1f}", f"{row['seconds'] / num_trials:.1f}", f"{row['training_seconds'] / num_trials:.2f}",
             f"{row['beyond_seconds_per_trial']:.1f}", f"{row['one_more_seconds']:.1f}" if "one_more_seconds" in row else "",
             f"{row['resident_before_mib']:.0f} to {row['resident_mib']:.0f}", f"{row['peak_mib']:.0f}")  # fmt: skip
    print(f"one epoch of {options.images} digits a trial, one worker of one CPU, {'without' if options.no_tracking else 'with'} MLflow")


# --- the drawing

BLUE, GREY, ORANGE = "#1f5a99", "#9aa5b1", "#d1662a"
LARGEST_SVG = 200_000


def plot(options: argparse.Namespace) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    found: dict[str, list[Row]] = {
        what: json.loads(file.read_text())["rows"] for what in ("parameters", "neurons", "workers", "trials")
        if (file := options.folder / f"{what}.json").exists()
    }  # fmt: skip
    if not found:
        raise SystemExit(f"growth: {options.folder} holds no rows; run another command first")
    style = {"font.size": 9, "svg.hashsalt": "growth", "axes.spines.top": False, "axes.spines.right": False,
             "legend.frameon": False, "axes.axisbelow": True, "grid.color": "#e6e9ee"}  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 6.5), layout="constrained")
        for axes, (what, draw) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
            axes.set(xscale="log", yscale="log", title=what)
            axes.grid(True)
            if what in found:
                draw(axes, found[what])
                axes.legend(fontsize=8)
            else:
                axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        figure.savefig(options.out, format="svg", metadata={"Date": None})
    size = options.out.stat().st_size
    if size > LARGEST_SVG:
        raise SystemExit(f"growth: {options.out} has {size:,} bytes, more than {LARGEST_SVG:,}")
    print(f"{options.out}: {', '.join(found)}; {size:,} bytes")


def line(axes: Any, rows: Sequence[Row], x: str, y: str, *, label: str, color: str, style: str = "-") -> None:
    axes.plot([row[x] for row in rows], [row[y] for row in rows], style, color=color, label=label, marker="o", markersize=3)


def draw_step(axes: Any, rows: Sequence[Row], *, x: str, label: str) -> None:
    alphas = sorted({row["alpha"] for row in rows})
    for alpha, color in zip(alphas, (BLUE, ORANGE), strict=False):
        line(axes, [row for row in rows if row["alpha"] == alpha], x, "step_ms", label=f"proximal step, alpha {alpha:g}", color=color)
    line(axes, [row for row in rows if row["alpha"] == alphas[0]], x, "copy_ms", label="copy of the entries", color=GREY, style="--")
    axes.set(xlabel=label, ylabel="milliseconds")


def draw_parameters(axes: Any, rows: Sequence[Row]) -> None:
    draw_step(axes, rows, x="entries", label="entries of all neurons")


def draw_neurons(axes: Any, rows: Sequence[Row]) -> None:
    draw_step(axes, rows, x="neurons", label=f"neurons, {rows[0]['entries'] / 1e6:.0f} million entries in all")


def draw_workers(axes: Any, rows: Sequence[Row]) -> None:
    line(axes, rows, "workers", "images_per_second", label="images a second", color=BLUE)
    ideal = [row | {"ideal": row["alone_images_per_second"] * min(row["workers"], row["cores"])} for row in rows]
    line(axes, ideal, "workers", "ideal", label=f"of one, times the workers up to {rows[0]['cores']} cores", color=GREY, style="--")
    line(axes, rows, "workers", "processor_ms_per_image", label="processor-milliseconds an image", color=ORANGE)
    axes.set(xlabel="workers of one thread", xticks=[row["workers"] for row in rows], xticklabels=[row["workers"] for row in rows])
    axes.minorticks_off()


def draw_trials(axes: Any, rows: Sequence[Row]) -> None:
    line(axes, rows, "trials", "seconds", label="seconds of the search", color=BLUE)
    line(axes, rows, "trials", "beyond_seconds_per_trial", label="seconds a trial beyond its training", color=ORANGE)
    line(axes, rows, "trials", "resident_mib", label="MiB of the main process", color=GREY, style="--")
    axes.set(xlabel="trials")


PANELS: dict[str, Callable[[Any, Sequence[Row]], None]] = {
    "parameters": draw_parameters, "neurons": draw_neurons, "workers": draw_workers, "trials": draw_trials,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)

    def add(run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        command = commands.add_parser(run.__name__, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("folder", type=Path, help="where the rows are written")
        command.set_defaults(run=run)
        return command

    of_parameters, of_neurons = add(parameters), add(neurons)
    of_parameters.add_argument("--millions", type=float, nargs="+", default=[1.0, 5.0, 20.0, 100.0, 500.0])
    of_parameters.add_argument("--layers", type=int, default=16)
    of_neurons.add_argument("--neurons", type=int, nargs="+", default=[100, 1_000, 10_000, 100_000, 1_000_000])
    of_neurons.add_argument("--millions", type=float, default=20.0, help="entries in all")
    of_neurons.add_argument("--layers", type=int, default=10)
    for each in (of_parameters, of_neurons):
        each.add_argument("--alpha", type=float, nargs="+", default=[0.0, 0.5])
        each.add_argument("--device", type=device_name, default="cpu")
        each.add_argument("--threads", type=int, default=1)
        each.add_argument("--pairs", type=int, default=AT_LEAST)
        each.add_argument("--seconds", type=float, default=60.0, help="for the pairs of a row, if five of them do not take longer")
    of_workers = add(workers)
    of_workers.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    of_workers.add_argument("--network", choices=list(NETWORKS), default="dec3")
    of_workers.add_argument("--pairs", type=int, default=AT_LEAST)
    of_workers.add_argument("--warmup", type=int, default=3)
    of_trials = add(trials)
    of_trials.add_argument("--trials", type=int, nargs="+", default=[1, 4, 16, 64])
    of_trials.add_argument("--images", type=int, default=256, help="of an epoch")
    of_trials.add_argument("--no-tracking", action="store_true", help="without MLflow")
    of_trials.add_argument("--minutes", type=float, default=5.0, help="after which a search is ended, its trials' seconds not counted")
    of_trials.add_argument("--seconds-a-trial", type=float, default=30.0)
    of_trials.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    add(plot).add_argument("out", type=Path, help="the drawing, an .svg")
    options = parser.parse_args()
    options.run(options)
    if options.what != "plot" and not getattr(options, "inside", False):
        print(f"{machine()}; command: {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
