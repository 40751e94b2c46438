"""How long an epoch of ImageNet takes on 8, 64 and 512 GPUs, before and after removal: a model, every assumption of which is printed and can be set.

    python benchmarks/cluster.py [--networks bnet-c dec8-640 dec8-768 resnet50] [--gpus 8 64 512] [--batch 64] [--teraflops 46] ...

No cluster was at hand: nothing here is timed. What is known exactly: the multiply-adds and parameters of each network, whole and without the
share of neurons that the paper's group sparsity removed (the same share of every layer, removed by `compact`; ResNet-50: none), and the bytes
that a step all-reduces, four for each parameter (`tests/test_costs.py` counts them). What is assumed:

- compute: 6 floating-point operations a multiply-add, forward and backward, at --teraflops sustained. The default follows from what FFCV's
  authors published, ResNet-50 on 8 A100s, 88 epochs in 77 minutes, at their average of about 176 pixels: 46 of an A100's 312;
- input: --images-per-core of decoding and cropping a second (this project's loader, JPEGs of 500 x 375 as they are, `input.py`: 2,188 on two
  cores), --cores for each GPU;
- all-reduce: rings; within a machine of 8 at --gigabytes-inside a second, between machines at --gigabytes-between for a machine; --latency-us a
  hop and bucket, buckets of 25 MiB; all but the last bucket hides behind backward, two thirds of the compute, as far as that lasts;
- proximal step: two reads and a write of every parameter and momentum's two and one at --gigabytes-memory a second; nothing of it is hidden;
- no stragglers, no other cost of the host; the batch a GPU stays the same, so that the batch of a step grows with the GPUs.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.latency import NETWORKS as PUBLISHED
from dist_gsl import compact, create_model, find_neurons, timing

IMAGES = 1_281_167
BUCKET = 25 * 2**20
PER_MACHINE = 8


@dataclass(frozen=True)
class Work:
    """What a network does for an image, and holds."""

    multiply_adds: int
    parameters: int


@dataclass(frozen=True)
class Epoch:
    """Seconds of an epoch, by what takes them."""

    compute: float
    exposed: float
    """All-reduce that backward does not hide."""
    proximal: float
    input: float
    """Of the loaders, which work beside all that."""

    @property
    def total(self) -> float:
        return max(self.compute + self.exposed + self.proximal, self.input)


def works_of(name: str) -> tuple[Work, Work]:
    """Of the whole network, and of what is left of it."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=1000)
    example = torch.randn(1, 3, 224, 224)
    neurons = find_neurons(model, example)
    whole = timing.size(model, example=example)
    share = PUBLISHED[name].neurons_percent / 100 if name in PUBLISHED else 0.0
    for layer in neurons:
        neurons.zero_({layer.name: range(round(share * layer.num_neurons))})
    left = timing.size(compact(model, neurons).model, example=example)
    return Work(whole.multiply_adds, whole.parameters), Work(left.multiply_adds, left.parameters)


def epoch_of(work: Work, gpus: int, options: argparse.Namespace) -> Epoch:
    steps = math.ceil(IMAGES / (gpus * options.batch))
    compute = steps * options.batch * 6 * work.multiply_adds / (options.teraflops * 1e12)
    num_bytes = 4 * work.parameters
    exposed = steps * _exposed_s(num_bytes, gpus, hidden_behind=2 / 3 * compute / steps, options=options)
    proximal = steps * 6 * num_bytes / (options.gigabytes_memory * 1e9)
    return Epoch(compute, exposed, proximal, IMAGES / (gpus * options.cores * options.images_per_core))


def _exposed_s(num_bytes: int, gpus: int, *, hidden_behind: float, options: argparse.Namespace) -> float:
    machines = math.ceil(gpus / PER_MACHINE)
    inside = min(gpus, PER_MACHINE)

    def seconds(size: float) -> float:
        ring = 2 * (inside - 1) / inside * size / (options.gigabytes_inside * 1e9)
        between = 2 * (machines - 1) / machines * size / (options.gigabytes_between * 1e9)
        hops = 2 * (inside - 1) + 2 * (machines - 1).bit_length()  # rings inside, trees between
        return ring + between + hops * options.latency_us * 1e-6

    buckets = [BUCKET] * (num_bytes // BUCKET) + [num_bytes % BUCKET]
    last = seconds(buckets[-1])
    return last + max(0.0, sum(seconds(size) for size in buckets[:-1]) - hidden_behind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["bnet-c", "dec8-640", "dec8-768", "resnet50"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--batch", type=int, default=64, help="images of a GPU and step")
    parser.add_argument("--teraflops", type=float, default=46.0, help="sustained by a GPU in training")
    parser.add_argument("--images-per-core", type=float, default=1094.0, help="a second")
    parser.add_argument("--cores", type=int, default=12, help="for each GPU's input")
    parser.add_argument("--gigabytes-inside", type=float, default=200.0, help="a second, of a GPU to its neighbours in a machine")
    parser.add_argument("--gigabytes-between", type=float, default=25.0, help="a second, of a machine to others (200 Gbit/s)")
    parser.add_argument("--latency-us", type=float, default=5.0, help="of a hop")
    parser.add_argument("--gigabytes-memory", type=float, default=1500.0, help="a second, of a GPU's memory")
    options = parser.parse_args()
    for key, value in vars(options).items():
        if key not in ("networks", "gpus"):
            print(f"assumed: {key.replace('_', ' ')} {value:g}")
    print("\n| network | million parameters | multiply-adds, 10^9 | GPUs | MB all-reduced a step | compute, s | all-reduce not hidden, s | proximal step, s "
          "| input, s | an epoch, s | before removal, s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in options.networks:
        whole, left = works_of(name)
        for gpus in options.gpus:
            before, after = epoch_of(whole, gpus, options), epoch_of(left, gpus, options)
            print(
                f"| {name} | {whole.parameters / 1e6:.1f} to {left.parameters / 1e6:.1f} | {whole.multiply_adds / 1e9:.2f} to "
                f"{left.multiply_adds / 1e9:.2f} | {gpus} | {4 * whole.parameters / 1e6:.0f} to {4 * left.parameters / 1e6:.0f} | "
                f"{after.compute:.1f} | {after.exposed:.2f} | {after.proximal:.2f} | {after.input:.1f} | **{after.total:.1f}** | {before.total:.1f} |",
                flush=True,
            )  # fmt: skip
    print(f"\na model, not a measurement; torch {torch.__version__}; command: {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
