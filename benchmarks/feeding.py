"""What the input costs a training: epochs of the demo fed by the loader, against the same steps on batches that lie in memory.

    python benchmarks/feeding.py [--pairs 30] [--threads 1]

One process; the loader's own threads come on top, as in training, and share its cores. Batches in memory are those of one epoch, decoded,
augmented and normalised before. Epochs alternate in one run (`pairs.py`); no penalty, so that every epoch has the same work.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.pairs import AT_LEAST, compare
from dist_gsl import data
from dist_gsl.recipes import find
from dist_gsl.training import loop, session
from dist_gsl.training.state import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=AT_LEAST)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    recipe = find("dec3-chars")
    config = replace(recipe, penalty=recipe.penalty.without(), workers=replace(recipe.workers, num=1))
    data_dir = data.prepare(config.data).absolute()
    shapes = session.shapes_of(config, data.dataset_info(data_dir))
    loader = session.make_loader(config, "train", data_dir, train=True)
    state = build(
        session.network_arguments(config, shapes), image_shape=shapes.image, train=config.train, penalty=config.penalty,
        steps_per_epoch=len(loader), device=torch.device("cpu"),
    )  # fmt: skip
    state.ddp.train()
    in_memory = list(loader)
    epochs = iter(range(1, 10_000))

    def epoch(batches: Iterable[Any]) -> None:
        for batch in batches:
            loop.train_step(state, config.train, batch)

    def fed() -> None:
        loader.set_epoch(next(epochs))
        epoch(loader)

    found = compare(fed, lambda: epoch(in_memory), pairs=options.pairs, warmup=1)
    print(f"the demo, epochs of {len(in_memory)} steps of {config.train.batch_size}: fed by the loader over in memory {found}; "
          f"{found.seconds:.2f} s against {found.other_seconds:.2f} s")  # fmt: skip
    print(f"{options.pairs} pairs, {options.threads} thread(s) beside the loader's, torch {torch.__version__}; command: {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
