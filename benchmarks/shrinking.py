"""What training gains by removing dead neurons on the way: seconds, multiply-adds and bytes all-reduced, with and without, in one run.

    python benchmarks/shrinking.py demo FOLDER [--epochs 16] [--threads 1]     the demo's recipe, two whole trainings that take turns by epoch
    python benchmarks/shrinking.py dec8-768 FOLDER [--batch-size 4]            steps of Dec8-768 on images of 224 pixels, at the widths of a course

demo: one process; both trainings are the same to rounding, epoch by epoch, and each epoch of one is timed next to the same of the other.
dec8-768: the course is that of the demo's neurons, epoch by epoch, scaled so that it ends where the paper's did (26.83 % of the neurons, the
same share of each layer, as it does not tell them apart). Each width's step (forward, backward, proximal step) is timed in turn with that
of the whole network.

The goal: of the multiply-adds saved, summed over the course, at least 0.8 is saved in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import dist_gsl
from dist_gsl import data, recipes, timing
from dist_gsl.penalty import PerLayer, Schedule
from dist_gsl.training import loop, session
from dist_gsl.training.config import TrainConfig
from dist_gsl.training.state import Setup, build

FINAL_PERCENT = 26.83
"""Neurons that Dec8-768 lost in the paper, by group sparsity."""
COURSE = "course.json"


def saved(before: float, after: float) -> str:
    return f"{100 * (1 - after / before):.1f} %"


# --- the demo's recipe


def demo(folder: Path, *, epochs: int | None) -> None:
    config = recipes.find("dec3-chars")
    if epochs is not None:
        stretch = epochs / config.train.epochs
        schedule = config.penalty.beta_schedule
        config = replace(
            config,
            train=replace(
                config.train, epochs=epochs, warmup_epochs=config.train.warmup_epochs * stretch,
                drop_epochs=tuple(e * stretch for e in config.train.drop_epochs),
            ),
            penalty=replace(
                config.penalty, beta=PerLayer(rest=config.penalty.beta.rest * stretch),
                beta_schedule=replace(schedule, start=schedule.start * stretch, end=None if schedule.end is None else schedule.end * stretch),
            ),
        )  # fmt: skip
    data_dir = data.prepare(config.data).absolute()
    shapes = session.shapes_of(config, data.dataset_info(data_dir))
    turn = Turns("never", "epoch")
    records: dict[str, list[dict[str, Any]]] = {"never": [], "epoch": []}
    problems: list[BaseException] = []

    def train(shrink: str) -> None:
        try:
            turn.take(shrink)
            its = replace(config, train=replace(config.train, shrink=shrink, checkpoint_minutes=None))
            training_data = session.make_loader(its, "train", data_dir, train=True)
            state = build(
                session.network_arguments(its, shapes), image_shape=shapes.image, train=its.train, penalty=its.penalty,
                steps_per_epoch=len(training_data), device=torch.device("cpu"),
            )  # fmt: skip

            def on_epoch(run: Any, record: dict[str, Any]) -> None:
                example = torch.zeros(1, *shapes.image)
                size = timing.size(run.model, example=example)
                records[shrink].append(record | {"multiply_adds": size.multiply_adds, "bytes": 4 * run.num_parameters * len(training_data)})
                print(f"{shrink:>5}: epoch {record['epoch']:2}  {record['seconds']:6.2f} s  {record['parameters']:>9,} parameters  "
                      f"{size.multiply_adds:>11,} multiply-adds  top-1 {record['val_top1']:.2f}", flush=True)  # fmt: skip
                turn.give(shrink)
                turn.take(shrink)

            loop.train(
                state, config=its.train, penalty=its.penalty, training_data=training_data,
                validation_data=session.make_loader(its, "val", data_dir, batch_size=256), on_epoch=on_epoch,
            )  # fmt: skip
        except BaseException as error:  # raised again below
            problems.append(error)
        finally:
            turn.leave(shrink)

    threads = [threading.Thread(target=train, args=(shrink,)) for shrink in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    whole, small = records["never"], records["epoch"]
    (folder / COURSE).write_text(json.dumps([{"epoch": r["epoch"], "alive": r["alive"]} for r in small]))
    # What an epoch computes is what the one before left.
    course = [whole[0]["multiply_adds"]] + [record["multiply_adds"] for record in small[:-1]]
    bytes_reduced = [whole[0]["bytes"]] + [record["bytes"] for record in small[:-1]]
    summary(
        f"the demo's recipe, {len(whole)} epochs of training without evaluation",
        seconds=(sum(r["seconds"] for r in whole), sum(r["seconds"] for r in small)),
        multiply_adds=(whole[0]["multiply_adds"] * len(whole), sum(course)), reduced=(whole[0]["bytes"] * len(whole), sum(bytes_reduced)),
    )  # fmt: skip
    print(f"validation after the last epoch: {whole[-1]['val_top1']:.2f} without removal, {small[-1]['val_top1']:.2f} with; "
          f"last epoch alone: {saved(whole[-1]['seconds'], small[-1]['seconds'])} of the seconds, "
          f"{saved(whole[-1]['multiply_adds'], course[-1])} of the multiply-adds")  # fmt: skip


class Turns:
    """One of two threads works, the other waits."""

    def __init__(self, *names: str) -> None:
        self._names, self._changed, self._whose = list(names), threading.Condition(), names[0]

    def take(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._whose == name)

    def give(self, name: str) -> None:
        with self._changed:
            self._whose = next((other for other in self._names if other != name), name)
            self._changed.notify_all()

    def leave(self, name: str) -> None:
        with self._changed:
            self._names.remove(name)
            self._whose = self._names[0] if self._names else ""
            self._changed.notify_all()


# --- Dec8-768


def dec8(folder: Path, *, batch_size: int, repeats: int) -> None:
    if not (folder / COURSE).exists():
        raise SystemExit(f"dec8-768 follows the course of the demo: run `python benchmarks/shrinking.py demo {folder}` first")
    course = json.loads((folder / COURSE).read_text())
    alive = [sum(row["alive"].values()) for row in course]
    start = dist_gsl.create_model("dec3", num_classes=36, width=0.25)
    total = sum(layer.num_neurons for layer in dist_gsl.find_neurons(start, torch.zeros(2, 1, 32, 32)))
    gone = [0.0] + [(total - n) / (total - alive[-1]) * FINAL_PERCENT / 100 for n in alive[:-1]]  # as each epoch begins
    images, targets = torch.randn(batch_size, 3, 224, 224), torch.randint(1000, (batch_size,))
    images = images.contiguous(memory_format=torch.channels_last)
    reference, full_size = Stepper(0.0, images, targets), None
    rows = []
    for share in sorted({round(g, 3) for g in gone}):
        stepper = Stepper(share, images, targets)
        size = timing.size(stepper.model, example=images[:1])
        full_size = full_size or size
        pairs = []
        for _ in range(repeats):
            before, after = reference.seconds(), stepper.seconds()
            pairs.append((before, after))
        before, after = (statistics.median(each) for each in zip(*pairs, strict=True))
        epochs = sum(round(g, 3) == share for g in gone)
        rows.append((epochs, before, after, size))
        print(f"{100 * share:5.1f} % of the neurons gone, {epochs:2} epochs: {after:.2f} s a step against {before:.2f}; "
              f"{size.multiply_adds:,} multiply-adds, {size.parameters:,} parameters", flush=True)  # fmt: skip
    assert full_size is not None
    summary(
        f"Dec8-768, batch {batch_size}, {len(gone)} epochs of equally many steps",
        seconds=(sum(e * b for e, b, _, _ in rows), sum(e * a for e, _, a, _ in rows)),
        multiply_adds=(full_size.multiply_adds * len(gone), sum(e * s.multiply_adds for e, _, _, s in rows)),
        reduced=(4 * full_size.parameters * len(gone), sum(4 * e * s.parameters for e, _, _, s in rows)),
    )  # fmt: skip


class Stepper:
    """Steps of Dec8-768 without a share of each layer's neurons."""

    def __init__(self, share: float, images: torch.Tensor, targets: torch.Tensor) -> None:
        torch.manual_seed(0)
        model: nn.Module = dist_gsl.create_model("dec8-768", num_classes=1000)
        neurons = dist_gsl.find_neurons(model, images[:2].contiguous())
        neurons.zero_({layer.name: list(range(round(share * layer.num_neurons))) for layer in neurons})
        if share:
            smaller = dist_gsl.compact(model, neurons)
            model, neurons = smaller.model, smaller.neurons
        self.model = model.to(memory_format=torch.channels_last).train()
        neurons = neurons.bound_to(self.model)
        config = replace(recipes.find("dec8-768-imagenet-gs").penalty, beta_schedule=Schedule(start=0))
        penalty = dist_gsl.SparseGroupLasso(beta=1e-4)
        setup = Setup(TrainConfig(), config, 1000, torch.device("cpu"))
        self.ddp, self.optimizer = setup.wrapped(self.model, neurons, penalty)
        self.images, self.targets = images, targets
        self.seconds()

    def seconds(self) -> float:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.ddp(self.images), self.targets).backward()
        return time.perf_counter() - began


def summary(title: str, *, seconds: tuple[float, float], multiply_adds: tuple[float, float], reduced: tuple[float, float]) -> None:
    time_saved, work_saved = (1 - after / before for before, after in (seconds, multiply_adds))
    print(f"\n{title}:")
    print("| | without removal | with | saved |\n|---|---|---|---|")
    print(f"| seconds | {seconds[0]:.1f} | {seconds[1]:.1f} | {saved(*seconds)} |")
    print(f"| multiply-adds of a forward pass, mean over the course | {multiply_adds[0]:.4g} | {multiply_adds[1]:.4g} | {saved(*multiply_adds)} |")
    print(f"| bytes all-reduced a process | {reduced[0]:.4g} | {reduced[1]:.4g} | {saved(*reduced)} |")
    print(f"time saved over multiply-adds saved: {time_saved / work_saved:.2f}" if work_saved else "nothing was removed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["demo", "dec8-768"])
    parser.add_argument("folder", type=Path, help="where the course is kept")
    parser.add_argument("--epochs", type=int, help="another number for the demo, its schedules stretched")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of steps at each width of Dec8-768")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if options.what == "demo":
        demo(options.folder, epochs=options.epochs)
    else:
        dec8(options.folder, batch_size=options.batch_size, repeats=options.repeats)
    print("command: " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
