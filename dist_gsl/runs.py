"""A run's folder: what is in it, its network full and compact, and the report made from it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_gsl import artifact, compaction, data, storage, timing
from dist_gsl.config import RunConfig
from dist_gsl.measures import measure
from dist_gsl.neurons import Neurons
from dist_gsl.report import Report
from dist_gsl.training import loop, session
from dist_gsl.training.checkpoint import Checkpoints
from dist_gsl.training.state import build_whole

CHECKPOINTS = "checkpoints"
NEURON_LOG = "neurons.parquet"
TRACKING = "tracking.json"
Say = Callable[[str], None]


def _silent(text: str) -> None:
    pass


def check_plain_name(name: str) -> None:
    """`ValueError` unless it can be a folder's name."""
    if not name or name != Path(name).name or name.startswith("."):
        raise ValueError(f"--name {name!r} must be a plain name without slashes, such as my-run")


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME."""

    path: Path

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """`ValueError` unless it is a run's folder."""
        folder = cls(Path(path).absolute())
        folder.pull()
        if not folder.config_file.is_file():
            raise ValueError(f"{folder.remote or path} is not a run's folder: it has no config.yaml; name one such as runs/NAME")
        return folder

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def remote(self) -> str | None:
        """The URI of which this folder is a copy; None for one that is where it belongs."""
        return storage.remote_of(self.path)

    def pull(self) -> None:
        """Brings a copy up to date; checkpoints are fetched when one is asked for."""
        storage.pull(self.path, without=CHECKPOINTS)

    def push(self) -> None:
        """Sends what has changed in a copy; checkpoints go there by themselves."""
        storage.push(self.path, without=CHECKPOINTS)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def compact_dir(self) -> Path:
        return self.path / "compact"

    @property
    def config(self) -> RunConfig:
        return RunConfig.load(self.config_file)

    def mlflow_run_id(self) -> str | None:
        """The tracking store's name for the run, once it has one."""
        file = self.path / TRACKING
        return json.loads(file.read_text())["mlflow_run_id"] if file.exists() else None

    def save_mlflow_run_id(self, run_id: str | None) -> None:
        if run_id is not None and run_id != self.mlflow_run_id():
            temporary = self.path / f".{TRACKING}.tmp"
            temporary.write_text(json.dumps({"mlflow_run_id": run_id}))
            os.replace(temporary, self.path / TRACKING)

    @property
    def checkpoints(self) -> Checkpoints:
        """Where they belong, by path or URI."""
        return Checkpoints(self.path / CHECKPOINTS if self.remote is None else storage.join(self.remote, CHECKPOINTS))

    def last_state(self) -> dict[str, Any] | None:
        """The last good checkpoint; None if there is none yet. Warns of damaged ones that are passed over."""
        last = self.checkpoints.last(lambda text: warnings.warn(text, stacklevel=2))
        return None if last is None else last[1]

    def state(self) -> dict[str, Any]:
        """The last good checkpoint. `ValueError` if there is none yet."""
        state = self.last_state()
        if state is None:
            raise ValueError(
                f"run {self.name!r} has no checkpoint yet: train it first, `dist-gsl train {self.config_file}`"
            )
        return state

    @property
    def is_finished(self) -> bool:
        """Is it trained to its end?"""
        state = self.last_state()
        return state is not None and bool(state["position"]["epoch"] >= self.config.train.epochs)


@dataclass
class Trained:
    """A run's network as training left it, on the CPU, with what is needed to feed it."""

    folder: RunFolder
    config: RunConfig
    data_dir: Path
    info: data.DatasetInfo
    model: nn.Module
    neurons: Neurons
    state: dict[str, Any]

    @classmethod
    def load(cls, folder: RunFolder) -> Trained:
        config, state = folder.config, folder.state()
        if not state["history"]:
            raise ValueError(f"run {folder.name!r} has trained no whole epoch yet: go on with it, `dist-gsl train {folder.config_file} --resume`")
        data_dir = data.prepare(config.data).absolute()
        info = data.dataset_info(data_dir)
        shapes = session.shapes_of(config, info)
        model, neurons = build_whole(state["network"], image_shape=shapes.image, state=state, averaged=True)
        return cls(folder, config, data_dir, info, model, neurons, state)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return session.shapes_of(self.config, self.info).image

    @property
    def has_dead_neurons(self) -> bool:
        return any(layer.num_dead for layer in self.neurons)

    def batches(self, split: str) -> data.Loader:
        return session.make_loader(self.config, split, self.data_dir, batch_size=256)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        batches = self.batches(split)
        layout = torch.channels_last if self.config.train.channels_last else torch.contiguous_format
        return loop.evaluate(model.to(memory_format=layout), batches, self.config.train, device=torch.device("cpu"))


def compact_run(trained: Trained, *, multiple_of: int = 1, say: Say = _silent) -> tuple[compaction.Compacted, float]:
    """Removes the dead neurons, proves on the whole validation split in float64 that the function is the same, and only
    then writes RUN_DIR/compact/. (the compact network, largest absolute difference on validation)."""
    say("removing the dead neurons")
    trained.neurons.settle_()  # with penalty.revive some may have been waiting to come back
    compacted = compaction.compact(trained.model, trained.neurons, multiple_of=multiple_of)
    difference = compacted.max_abs_difference
    if trained.has_dead_neurons:
        say("comparing both networks on the whole validation split in float64")
        on_validation, largest = compaction.max_difference(
            trained.model, compacted.model, (batch.images for batch in trained.batches("val"))
        )
        compaction.check_difference(on_validation, largest)
        difference = max(difference, on_validation)
    shapes = session.shapes_of(trained.config, trained.info)
    artifact.save_compact(
        trained.folder.compact_dir, model=compacted.model, neurons=compacted.neurons, network=trained.state["network"],
        classes=list(trained.info.classes),
        image={"channels": shapes.channels, "size": shapes.size, "mean": list(trained.info.mean),
               "std": list(trained.info.std), "task": trained.info.task.value},
        extra={"run": trained.folder.name},
    )  # fmt: skip
    return compacted, difference


def make_report(
    trained: Trained,
    *,
    baseline: Trained | None,
    recipe: str = "",
    command: str = "",
    final: bool = False,
    run_time: bool = True,
    say: Say = _silent,
) -> tuple[Report, compaction.Compacted]:
    """Compacts a run, evaluates both networks and the baseline, times them (unless told not to measure
    run time: where others compute on the same machine it says little). `final` reads the test splits."""
    config, history = trained.config, trained.state["history"]
    before = measure(trained.model, trained.neurons)
    compacted, difference = compact_run(trained, say=say)
    split = "test" if final else "val"
    say(f"evaluating on the {'test' if final else 'validation'} split")
    full = trained.evaluate(trained.model, split)
    small = trained.evaluate(compacted.model, split)
    plain = None if baseline is None else baseline.evaluate(baseline.model, split)
    quality = "top1" if "top1" in full else "rmse"
    extra = [name for name in trained.info.splits if name not in ("train", "val", "test")] if final else []
    timed = None
    if run_time and trained.has_dead_neurons:  # else they are the same network
        say("timing the full against the compact network")
        example = torch.zeros(1, *trained.image_shape)
        timed = timing.compare(trained.model.eval(), compacted.model.eval(), example=example)
    made = Report(
        name=trained.folder.name, recipe=recipe, command=command, network=config.network.name, source=trained.info.source,
        seed=config.train.seed, split=split,
        top1=full.get("top1"), top5=full.get("top5"), rmse=full.get("rmse"), val_top1=history[-1].get("val_top1"),
        extra_splits={name: trained.evaluate(trained.model, name)[quality] for name in extra},
        baseline=None if baseline is None else os.path.relpath(baseline.folder.path, trained.folder.path.parent),
        baseline_top1=None if plain is None else plain.get("top1"),
        baseline_rmse=None if plain is None else plain.get("rmse"),
        accuracy_gap=None if plain is None or "top1" not in plain else full["top1"] - plain["top1"],
        neurons=before.neurons, group_param=before.group_param, total_param=before.total_param,
        total_induced=before.total_induced, all_neurons=before.all_neurons,
        layers=[{"name": layer.name, "neurons": layer.starting_neurons, "alive": layer.starting_neurons - layer.num_dead}
                for layer in trained.neurons],
        compact={"max_abs_difference": difference, quality: small[quality],
                 "parameters_before": sum(p.numel() for p in trained.model.parameters()),
                 "parameters_after": sum(p.numel() for p in compacted.model.parameters())},
        speedup_percent=dict.fromkeys(("1", "2", "8", "16"), 0.0) if timed is None else timed.speedup_percent,
        memory_saved_percent={"params": 0.0, "features": 0.0} if timed is None else timed.memory_saved_percent,
        multiply_adds_before=None if timed is None else timed.full.multiply_adds,
        multiply_adds_after=None if timed is None else timed.compact.multiply_adds,
        device="" if timed is None else timed.device,
        train_seconds=sum(row["seconds"] for row in history),
        images_per_second=sum(row["images_per_second"] for row in history) / len(history),
    )  # fmt: skip
    return made, compacted


def summary(made: Report) -> dict[str, float | None]:
    """The final numbers by fixed names, for comparing runs."""
    names = ("top1", "top5", "rmse", "val_top1", "baseline_top1", "accuracy_gap", "neurons", "group_param", "total_param",
             "total_induced", "all_neurons", "train_seconds", "images_per_second")  # fmt: skip
    values = {f"final_{name}": getattr(made, name) for name in names}
    values |= {f"final_speedup_percent_{size}": value for size, value in made.speedup_percent.items()}
    return {**values, "final_parameters_after": made.compact["parameters_after"]}


def model_requirements() -> list[str]:
    """What a program written by torch.export needs to be loaded."""
    return [f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"]
