"""A training step in other ways than float32, contiguous, as it comes: channels_last, bfloat16 autocast, torch.compile, and together.

    python benchmarks/modes.py [--networks dec3 resnet18] [--device cuda] [--threads 1] [--batch 64] [--pairs 30]

One process: forward, backward, and the step of `ProximalSGD` by hand, each way on its own copy of the network, in interleaved pairs with the
plain one (`pairs.py`). Autocast leaves parameters, gradients and the proximal step in float32; the loss is taken of float32 outputs, and
bfloat16 needs no loss scaling. Below 1 is faster. The losses of the first step are compared, within bfloat16's rounding.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.pairs import AT_LEAST, compare, device_name
from benchmarks.step import BETA, NETWORKS, RECIPE
from dist_gsl import ProximalSGD, SparseGroupLasso, create_model, find_neurons

WAYS = ("channels_last", "autocast", "compile", "channels_last autocast", "channels_last compile", "channels_last autocast compile")


def step_of(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], way: str) -> Callable[[], float]:
    images, targets = batch
    model = copy.deepcopy(model)
    neurons = find_neurons(model, images[:1].cpu()) if images.device.type == "cpu" else find_neurons(copy.deepcopy(model).cpu(), images[:1].cpu())
    if images.device.type != "cpu":
        neurons = neurons.bound_to(model)
    if "channels_last" in way:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=BETA), **RECIPE)
    called: Any = torch.compile(model) if "compile" in way else model

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled="autocast" in way):
            outputs = called(images)
        loss = F.cross_entropy(outputs.float(), targets)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["dec3", "resnet18"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="words of: " + ", ".join(WAYS))
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, help="a network's own if not given")
    parser.add_argument("--pairs", type=int, default=AT_LEAST)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    synchronize: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print("| network, batch | way | step over the plain one | plain, ms |\n|---|---|---|---|")
    for name in options.networks:
        arguments, shape, classes = NETWORKS[name]
        torch.manual_seed(0)
        shape = (options.batch or shape[0], *shape[1:])
        model = create_model(name, num_classes=classes, **arguments).to(device)
        batch = torch.randn(shape).to(device), torch.randint(classes, shape[:1]).to(device)
        for way in options.ways:
            plain, other = step_of(model, batch, ""), step_of(model, batch, way)
            losses = plain(), other()
            if abs(losses[0] - losses[1]) > 0.05 * abs(losses[0]):
                raise SystemExit(f"modes: {name} by {way} has a loss of {losses[1]:.4f}, plain {losses[0]:.4f}")
            found = compare(other, plain, pairs=options.pairs, synchronize=synchronize)
            print(f"| {name}, {' x '.join(map(str, shape))} | {way} | {found} | {1e3 * found.other_seconds:.1f} |", flush=True)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} thread(s)"
    print(f"{where}, {options.pairs} pairs, torch {torch.__version__}; command: {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
