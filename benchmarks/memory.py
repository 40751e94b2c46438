"""The largest memory of a training process, with what this project adds and without.

    python benchmarks/memory.py [--networks dec3 bnet-c resnet18] [--device cuda]

Each is a process of its own that trains five steps of a network of this library by DDP, momentum on, and tells its peak (resident, MiB): torch's SGD
alone; or the network's neurons found, the penalty, and the optimizer in DDP's hook, in a process that keeps the memory it frees, with one heap for
all threads as in a Ray of our own. On a GPU it is the memory of the device that torch's allocator gave out at most.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.pairs import device_name
from dist_gsl import heap

NETWORKS = ("dec3", "bnet-c", "resnet18")
STEPS = 5


def train(name: str, how: str, device: str) -> None:
    """Prints the peak in KiB, of the process or of the device."""
    import warnings

    import torch
    import torch.distributed as dist

    from benchmarks.step import NETWORKS, step_of
    from dist_gsl import create_model

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if how != "sgd":
        heap.keep_freed()
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    arguments, shape, classes = NETWORKS[name]
    model = create_model(name, num_classes=classes, **arguments)
    batch = torch.randn(shape).to(device), torch.randint(classes, shape[:1]).to(device)
    step = step_of(model, batch, bucket_mb=25.0, how=how, alpha=0.5)
    for _ in range(STEPS):
        step()
    if device == "cuda":
        print(torch.cuda.max_memory_allocated() // 1024)
        return
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(*options.train, options.device)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environments = {"sgd": environment, "within": environment | heap.LOCAL}
    print("| network | torch's SGD, MiB | with neurons, penalty and hook | ratio |\n|---|---|---|---|")
    for name in options.networks:
        peaks = {
            how: statistics.median(
                int(subprocess.run([sys.executable, __file__, "--train", name, how, "--device", options.device], env=environments[how], check=True, stdout=subprocess.PIPE).stdout)
                for _ in range(options.repeats)
            )
            for how in ("sgd", "within")
        }  # fmt: skip
        print(f"| {name} | {peaks['sgd'] / 1024:.0f} | {peaks['within'] / 1024:.0f} | {peaks['within'] / peaks['sgd']:.3f} |", flush=True)
    print(f"median of {options.repeats}; command: {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
