"""A compact network's run time against the full one's, and against the ratio of their multiply-adds.

    python benchmarks/latency.py [--networks dec3 dec8-768] [--backends eager compile onnx] [--batches 1 2 8 16 64 256] [--threads 1]
        [--multiple-of 8] [--channels-last] [--device cuda]

The networks of the paper's table of speed-ups, untrained, without the share of neurons that its group sparsity removed. How that share falls on
the layers it does not tell: here every layer loses the same one, its neurons drawn by a seed. They die by `neurons.zero_` and are removed by
`compact`, which proves in float64 that the function is the same; before a cell is timed both networks' outputs are compared once more in it.

Columns: torch as it comes; torch.compile (inductor, its default mode, each batch size on its own); ONNX Runtime on the file that
`save_compact` writes, on the CPU, above batch 16 without its arena, which would not fit. A cell: percent of run time saved with its interval
of 95 %; the ratio of run times over that of multiply-adds, 1 where time follows arithmetic; the full network's milliseconds; the pairs. Timed in
interleaved pairs (`pairs.py`), at most --pairs of them and as many as begin within --seconds, at least five. Goals: what the paper saved on its
K20m, where it has the batch (1, 2, 8, 16); and at the largest batch a ratio of run times of at most 1.2 times that of multiply-adds. A cell that
does not fit --memory-gb is left out and says so.
"""

from __future__ import annotations

import argparse
import gc
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.pairs import AT_LEAST, Ratio, compare, device_name
from dist_gsl import artifact, compact, create_model, find_neurons, timing
from dist_gsl.models.registry import input_shape
from dist_gsl.neurons import Neurons

GB = 1e9
WITHIN = 1.2
"""The largest ratio of run times over that of multiply-adds that counts as following it, at the largest batch."""


@dataclass(frozen=True)
class Published:
    """What the paper has of a network (Alvarez and Salzmann 2016, the rows GS of its tables of neurons and of speed-ups)."""

    classes: int
    neurons_percent: float
    """Neurons removed."""
    saved_percent: dict[int, float]
    """{batch: run time saved on a K20m}."""


NETWORKS = {
    "bnet-c": Published(1000, 12.70, {1: 10.04, 2: 8.97, 8: 13.01, 16: 13.69}),
    "dec8-640": Published(1000, 10.08, {1: -0.1, 2: 5.44, 8: 3.91, 16: 4.37}),
    "dec8-768": Published(1000, 26.83, {1: 15.29, 2: 17.11, 8: 15.99, 16: 15.62}),
    "dec3": Published(36, 55.11, {1: 35.62, 2: 43.07, 8: 44.40, 16: 49.63}),
}
BACKENDS = {"eager": "eager", "compile": "torch.compile", "onnx": "ONNX Runtime"}
Run = Callable[[], Any]


# --- the two networks


@dataclass
class Pair:
    """A network and what is left of it."""

    name: str
    full: nn.Module
    neurons: Neurons
    small: nn.Module
    small_neurons: Neurons
    full_size: timing.Size
    small_size: timing.Size

    @property
    def work(self) -> float:
        """Ratio of multiply-adds."""
        return self.small_size.multiply_adds / self.full_size.multiply_adds


def pair_of(name: str, *, multiple_of: int, seed: int) -> Pair:
    published, shape = NETWORKS[name], input_shape(name)
    torch.manual_seed(seed)
    full = create_model(name, num_classes=published.classes).eval()
    neurons = find_neurons(full, torch.randn(2, *shape))
    generator = torch.Generator().manual_seed(seed)
    neurons.zero_({
        layer.name: torch.randperm(layer.num_neurons, generator=generator)[: round(published.neurons_percent / 100 * layer.num_neurons)]
        for layer in neurons
    })  # fmt: skip
    smaller = compact(full, neurons, multiple_of=multiple_of)
    example = torch.zeros(1, *shape)
    sizes = [timing.size(network, example=example) for network in (full, smaller.model)]
    return Pair(name, full, neurons, smaller.model.eval(), smaller.neurons, *sizes)


# --- the ways to run them


def eager(network: nn.Module, batch: Tensor) -> Run:
    return lambda: network(batch)


def compiled(network: nn.Module, batch: Tensor) -> Run:
    program = torch.compile(network, dynamic=False)
    return lambda: program(batch)


ARENA_BATCH = 16
"""Largest batch at which ONNX Runtime keeps its arena of memory, one for each network: it holds three times what the network needs."""


def by_onnx(file: Path, batch: Tensor, *, threads: int, arena: bool) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.enable_cpu_mem_arena = arena
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or the threads of one network take the other's time
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    images = batch.contiguous().numpy()
    return lambda: session.run(["outputs"], {"images": images})


def write_onnx(network: nn.Module, neurons: Neurons, directory: Path, *, name: str) -> Path:
    channels, size, _ = input_shape(name)
    image = {"channels": channels, "size": size, "mean": (0.5,) * channels, "std": (0.25,) * channels, "task": artifact.CLASSIFICATION}
    arguments = {"name": name, "num_classes": NETWORKS[name].classes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        artifact.save_compact(directory, model=network, neurons=neurons, network=arguments, classes=[], image=image)
    return directory / artifact.ONNX


def check_same(one: Any, other: Any, *, where: str) -> None:
    """In float32, by whatever kernels: this is to find another network, not another rounding."""
    a, b = (torch.as_tensor(each[0] if isinstance(each, list) else each) for each in (one, other))
    if not (a - b).abs().max() <= 0.01 * a.abs().max():
        raise RuntimeError(f"{where}: the outputs of the two networks differ by {(a - b).abs().max():.3g}, the largest is {a.abs().max():.3g}")


# --- memory


class Memory:
    """What both networks of a cell take beyond what was there before, by batch; and from that what a larger batch will take."""

    def __init__(self, device: torch.device, limit_gb: float | None) -> None:
        self.device = device
        if limit_gb is None:
            limit_gb = 12.0 if device.type == "cpu" else 0.9 * torch.cuda.mem_get_info(device)[0] / GB
        self.limit = limit_gb * GB
        self.known: dict[int, float] = {}

    def expected(self, batch: int) -> float:
        """On the line through the two largest batches."""
        *_, (before, less), (last, most) = [(0, 0.0), (0, 0.0), *sorted(self.known.items())]
        slope = (most - less) / (last - before) if last else 0.0
        return most + slope * (batch - last)

    def begin(self) -> None:
        gc.collect()
        if self.device.type == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
            self._before = _status("VmRSS")
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)

    def end(self, batch: int) -> None:
        peak = _status("VmHWM") if self.device.type == "cpu" else torch.cuda.max_memory_allocated(self.device)
        self.known[batch] = max(0.0, peak - self._before)


def _status(entry: str) -> float:
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024.0 * int(found[1])


# --- the table


@dataclass
class Cell:
    """One network, batch and way to run."""

    text: str
    reaches_paper: bool | None = None
    ratio: Ratio | None = None


PROBE = 8
"""Batch whose memory tells that of larger ones, where none was timed before."""


def cell_of(pair: Pair, batch: int, *, backend: str, files: list[Path], memory: Memory, options: argparse.Namespace) -> Cell:
    arena = batch <= ARENA_BATCH
    if not memory.known and batch > PROBE:
        _prepared(pair, PROBE, backend=backend, files=files, memory=memory, options=options, arena=arena)
    if (wanted := memory.expected(batch)) > memory.limit:
        return Cell(f"left out: some {wanted / GB:.1f} GB of memory, {memory.limit / GB:.1f} may be used")
    full, small = _prepared(pair, batch, backend=backend, files=files, memory=memory, options=options, arena=arena)
    synchronize: Run = torch.cuda.synchronize if memory.device.type == "cuda" else lambda: None
    # Compiled, checked and warm: each has run once already.
    found = compare(small, full, pairs=options.pairs, seconds=options.seconds, warmup=1 if batch <= PROBE else 0, synchronize=synchronize)
    saved, paper = 100 * (1 - found.ratio), NETWORKS[pair.name].saved_percent.get(batch)
    reaches = None if paper is None else saved >= paper
    interval = f"{100 * (1 - found.high):.1f} to {100 * (1 - found.low):.1f}"
    goal = "" if reaches is None else ", met" if reaches else ", **missed**"
    text = f"{saved:.1f} ({interval}){goal}; {found.ratio / pair.work:.2f}; {_milliseconds(found.other_seconds)} ms; {found.pairs}"
    return Cell(text, reaches, found)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _prepared(
    pair: Pair, batch: int, *, backend: str, files: list[Path], memory: Memory, options: argparse.Namespace, arena: bool
) -> tuple[Run, Run]:
    """Both networks ready to run a batch, of which each has run one."""
    torch._dynamo.reset()
    memory.begin()
    images = torch.randn(batch, *input_shape(pair.name), generator=torch.Generator().manual_seed(batch))
    networks = pair.full, pair.small
    if backend == "onnx":
        full, small = (by_onnx(file, images, threads=options.threads, arena=arena) for file in files)
    else:
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        images = images.to(memory.device, memory_format=layout)
        full, small = ((compiled if backend == "compile" else eager)(network, images) for network in networks)
    check_same(full(), small(), where=f"{pair.name}, batch {batch}, {BACKENDS[backend]}")
    memory.end(batch)
    return full, small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=list(BACKENDS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8, 16, 64, 256])
    parser.add_argument("--device", type=device_name, default="cpu", help="of torch; ONNX Runtime stays on the CPU and is left out on another")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true", help="torch's layout of images and filters, training's default")
    parser.add_argument("--multiple-of", type=int, default=1, help="widths are rounded up to it, by dead neurons that stay")
    parser.add_argument("--pairs", type=int, default=AT_LEAST)
    parser.add_argument("--seconds", type=float, default=120.0, help="for the pairs of a cell, if five of them do not take longer")
    parser.add_argument("--memory-gb", type=float, help="for a cell; 12 on the CPU, nine tenths of what is free on a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights and of the neurons that die")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    backends = [backend for backend in options.backends if backend != "onnx" or device.type == "cpu"]
    batches = sorted(options.batches)
    header = "eager: % of run time saved; run times' ratio over multiply-adds'; full, ms; pairs"
    titles = [header if backend == "eager" else BACKENDS[backend] for backend in backends]
    print(f"| network | batch | multiply-adds saved, % | paper, % | {' | '.join(titles)} |\n|---|---|---|---|{'---|' * len(backends)}")
    reached: dict[str, list[tuple[str, bool]]] = {backend: [] for backend in backends}
    followed: dict[str, list[tuple[str, bool]]] = {backend: [] for backend in backends}
    told = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            pair = pair_of(name, multiple_of=options.multiple_of, seed=options.seed)
            files = []
            if "onnx" in backends:
                files = [
                    write_onnx(network, neurons, Path(folder) / f"{name}-{which}", name=name)
                    for which, network, neurons in (("full", pair.full, pair.neurons), ("small", pair.small, pair.small_neurons))
                ]
            layout = torch.channels_last if options.channels_last else torch.contiguous_format
            for network in (pair.full, pair.small):
                network.to(device, memory_format=layout)
            told.append(f"{name}: {pair.full_size.multiply_adds:,} multiply-adds of an image became {pair.small_size.multiply_adds:,}, "
                        f"{pair.full_size.parameters:,} parameters {pair.small_size.parameters:,}")  # fmt: skip
            memories = {(backend, large): Memory(device, options.memory_gb) for backend in backends for large in (False, True)}
            last: dict[str, tuple[int, float]] = {}
            for batch in batches:
                with torch.inference_mode():
                    cells = {
                        backend: cell_of(
                            pair, batch, backend=backend, files=files, options=options,
                            memory=memories[backend, backend == "onnx" and batch > ARENA_BATCH],
                        )
                        for backend in backends
                    }  # fmt: skip
                for backend, cell in cells.items():
                    if cell.reaches_paper is not None:
                        reached[backend].append((f"{name} at {batch}", cell.reaches_paper))
                    if cell.ratio is not None:
                        last[backend] = batch, cell.ratio.ratio / pair.work
                paper = NETWORKS[name].saved_percent.get(batch)
                texts = " | ".join(cell.text for cell in cells.values())
                print(f"| {name} | {batch} | {100 * (1 - pair.work):.1f} | {'' if paper is None else f'{paper:g}'} | {texts} |", flush=True)
            for backend, (batch, over) in last.items():
                followed[backend].append((f"{name} at {batch}: {over:.2f}", over <= WITHIN))
    print("\n" + "\n".join(told))
    at_end = f"largest batch timed: at most {WITHIN:g} of the multiply-adds' ratio"
    for title, counts in (("at least the paper's share", reached), (at_end, followed)):
        print(f"{title}: " + "; ".join(_count(BACKENDS[backend], met) for backend, met in counts.items()))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    layout_name = "channels_last" if options.channels_last else "contiguous"
    print(f"{where}, {options.threads} thread(s), torch {torch.__version__}{_onnx_version(backends)}, {layout_name} (ONNX Runtime: its own layout), "
          f"widths multiples of {options.multiple_of}; command: {' '.join(sys.argv)}")  # fmt: skip


def _count(title: str, met: list[tuple[str, bool]]) -> str:
    missed = [text for text, is_met in met if not is_met]
    return f"{title} {len(met) - len(missed)} of {len(met)}" + (f" (not {', '.join(missed)})" if missed else "")


def _processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def _onnx_version(backends: list[str]) -> str:
    if "onnx" not in backends:
        return ""
    import onnxruntime

    return f", onnxruntime {onnxruntime.__version__}"


if __name__ == "__main__":
    main()
