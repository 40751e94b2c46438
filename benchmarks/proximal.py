"""The proximal step over all neurons of a network, against what moving as much memory takes.

    python benchmarks/proximal.py [--device cuda] [--threads 1] [--networks dec8-768 resnet50 vit_b_16] [--loop]

"step" is what the optimizer does for every layer in every step, deaths included. "copy" copies as many entries elsewhere, "in place" multiplies them where they
are: one read and one write, the least for what changes every entry. Timed in interleaved pairs (`pairs.py`); beta is so small that nothing
dies, so that every pair has the same work. "torch" is the operator by vectorised operations of torch, as on devices that have no kernel, and
stands over copy; --loop adds one neuron after another in Python, as other implementations of the method have it.

On a GPU times are the device's own, while the host is ahead of it, as in a training; "host" is what a step takes of the host, which launches
it and waits for nothing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.pairs import AT_LEAST, compare, device_name, device_seconds, timed
from dist_gsl import ProximalSGD, SparseGroupLasso, create_model, find_neurons
from dist_gsl.penalty import row_norms, shrink_factors, soft_threshold

NETWORKS = ("dec8-768", "resnet50", "vit_b_16")
BETA, RATE = 1e-9, 0.1


def by_torch(parts: list[Tensor], *, cut: float, threshold: float) -> None:
    shrunk = [soft_threshold(part, cut) for part in parts] if cut > 0 else parts
    factors = shrink_factors(row_norms(shrunk), threshold)
    for part, s in zip(parts, shrunk, strict=True):
        torch.mul(s, factors.view(-1, *[1] * (part.dim() - 1)), out=part)


def neuron_by_neuron(parts: list[Tensor], *, cut: float, threshold: float) -> None:
    for n in range(len(parts[0])):
        by_torch([part[n : n + 1] for part in parts], cut=cut, threshold=threshold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--pairs", type=int, default=AT_LEAST)
    parser.add_argument("--loop", action="store_true", help="one neuron after another too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    is_cuda = device.type == "cuda"
    clock = device_seconds if is_cuda else None
    as_it_comes = partial(device_seconds, ahead=False) if is_cuda else None  # torch's launches are more than a GPU queues
    synchronize: Callable[[], Any] = torch.cuda.synchronize if is_cuda else lambda: None
    more = ("host, ms | " if is_cuda else "") + ("loop over copy | " if options.loop else "")
    print("| network | entries, million | alpha | step over copy | step over in place | torch over copy | copy, GB/s | " + more)
    print("|---|---|---|---|---|---|---|" + "---|" * more.count("|"))
    for name in options.networks:
        model = create_model(name, num_classes=1000)
        neurons = find_neurons(model, torch.randn(1, 3, 224, 224))
        model.to(device)
        layers = [(layer, [part.detach() for part in neurons.parts(layer)]) for layer in neurons]
        entries = sum(part.numel() for _, parts in layers for part in parts)
        source = torch.randn(entries, device=device)
        target = torch.empty_like(source)
        for alpha in (0.0, 0.5):
            optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=BETA, alpha=alpha), lr=RATE)

            @torch.no_grad()
            def step(optimizer: ProximalSGD = optimizer, neurons: Any = neurons) -> None:
                optimizer.begin_step()
                optimizer.prox_(neurons)
                optimizer.finish_step()

            def each(way: Callable[..., None], layers: Any = layers, alpha: float = alpha) -> None:
                for layer, parts in layers:
                    way(parts, cut=RATE * alpha * BETA, threshold=RATE * (1 - alpha) * BETA * math.sqrt(layer.group_size))

            def copy(source: Tensor = source, target: Tensor = target) -> None:
                target.copy_(source)

            def in_place(source: Tensor = source) -> None:
                source.mul_(1.0)

            ratio = partial(compare, pairs=options.pairs, clock=clock)
            found = ratio(step, copy)
            copied = 2 * source.nbytes / found.other_seconds / 1e9
            cells: list[Any] = [found, ratio(step, in_place), compare(lambda: each(by_torch), copy, pairs=options.pairs, clock=as_it_comes), f"{copied:,.0f}"]
            if is_cuda:
                cells.append(f"{1e3 * statistics.median(timed(step, synchronize, wait=False) for _ in range(options.pairs)):.3f}")
            if options.loop:
                cells.append(f"{compare(lambda: each(neuron_by_neuron), copy, pairs=3, warmup=0, synchronize=synchronize).ratio:.0f}")
            print(f"| {name} | {entries / 1e6:.1f} | {alpha:g} | {' | '.join(map(str, cells))} |", flush=True)
    where = torch.cuda.get_device_name(device) if is_cuda else f"{options.threads} thread(s)"
    print(f"{where}, {options.pairs} pairs, torch {torch.__version__}; command: {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
