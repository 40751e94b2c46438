"""A training step with the proximal hook, against the same DDP step with torch's SGD and no penalty; and against stepping after backward.

    python benchmarks/step.py [--networks dec3 bnet-c resnet18] [--bucket-mb 25 1] [--alpha 0 0.5] [--batch 1] [--device cuda]

Two processes of one thread each, gloo, or one for each GPU, NCCL; channels_last, momentum and weight decay in both, the same network, batch and buckets. The hook divides by
the samples of all workers, as in training. "SGD" is torch's as it comes, "fused" its fused one. The penalty is on in every step and so weak
that nothing dies: every pair does the same work. Steps alternate in one run, a barrier before and after each (`pairs.py`).
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.pairs import AT_LEAST, Ratio, compare, device_name
from dist_gsl import ProximalSGD, SparseGroupLasso, create_model, find_neurons

NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {  # arguments, a worker's batch, classes
    "dec3": ({"width": 0.25, "batch_norm": True, "in_channels": 1}, (32, 1, 32, 32), 36),
    "bnet-c": ({}, (8, 3, 224, 224), 1000),
    "resnet18": ({}, (8, 3, 224, 224), 1000),
}
"""The demo's network and batch; those of ImageNet's images with a batch that steps in about a second."""
RECIPE = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
BETA = 1e-9


def step_of(
    model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], *, bucket_mb: float, how: str, alpha: float, group: Any = None
) -> Any:
    """A step of a copy of the model. how: "sgd", "fused", "within" (backward steps), or "after" it."""
    device = batch[0].device
    images, targets = batch[0].to(memory_format=torch.channels_last), batch[1]
    model = copy.deepcopy(model)
    neurons = None if how in ("sgd", "fused") else find_neurons(model, images[:1].cpu())
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_mb, process_group=group)
    if neurons is None:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), **RECIPE, fused=how == "fused")
    else:
        optimizer = proximal = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=BETA, alpha=alpha), **RECIPE)
        if how == "within":
            proximal.attach(ddp)

    def step() -> None:
        optimizer.zero_grad()
        if how == "within":
            proximal.set_num_samples(len(targets), total=len(targets) * dist.get_world_size(group))
        F.cross_entropy(ddp(images), targets, reduction="sum" if how == "within" else "mean").backward()
        if how != "within":
            optimizer.step()

    step.ddp = ddp  # type: ignore[attr-defined]
    return step


def num_buckets(step: Any) -> int:
    """As DDP rebuilt them in the order of its first backward."""
    found = step.ddp._get_ddp_logging_data()
    return len((found.get("rebuilt_bucket_sizes") or found["bucket_sizes"]).split(","))


def all_done(device: torch.device) -> None:
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()


def work(rank: int, options: argparse.Namespace, store: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    is_cuda = options.device == "cuda"
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_cuda else "gloo", init_method=f"file://{store}", rank=rank, world_size=options.workers)
    tell = print if rank == 0 else lambda *_, **__: None
    tell("| network, batch | million parameters | buckets | alpha | hook over SGD | hook over fused | hook over after backward | step with SGD, ms |")
    tell("|---|---|---|---|---|---|---|---|")
    for name in options.networks:
        arguments, shape, classes = NETWORKS[name]
        torch.manual_seed(0)
        model = create_model(name, num_classes=classes, **arguments)
        generator = torch.Generator().manual_seed(rank)
        shape = (options.batch or shape[0], *shape[1:])
        batch = torch.randn(shape, generator=generator).to(device), torch.randint(classes, shape[:1], generator=generator).to(device)
        for bucket_mb in options.bucket_mb:
            for alpha in options.alpha:
                make = partial(step_of, model, batch, bucket_mb=bucket_mb, alpha=alpha)
                within = make(how="within")
                found: list[Ratio] = [
                    compare(within, make(how=other), pairs=options.pairs, warmup=3, synchronize=partial(all_done, device)) for other in ("sgd", "fused", "after")
                ]
                parameters = sum(p.numel() for p in model.parameters()) / 1e6
                ratios = " | ".join(map(str, found))
                tell(f"| {name}, {shape[0]} | {parameters:.2f} | {num_buckets(within)} | {alpha:g} | {ratios} | {1e3 * found[0].other_seconds:.1f} |", flush=True)
    tell(f"{options.workers} worker(s) on {torch.cuda.get_device_name() if is_cuda else 'a thread each'}, {options.pairs} pairs, torch {torch.__version__}; command: {' '.join(sys.argv)}")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--bucket-mb", type=float, nargs="+", default=[25.0])
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--batch", type=int, help="of a worker; a network's own if not given")
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--workers", type=int, help="2, or as many as there are GPUs")
    parser.add_argument("--pairs", type=int, default=AT_LEAST)
    options = parser.parse_args()
    options.workers = options.workers or (torch.cuda.device_count() if options.device == "cuda" else 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (options, f"{folder}/store"), nprocs=options.workers)


if __name__ == "__main__":
    main()
