"""The config of a run: the configs of its parts together, saved as YAML with every run. An unknown key is an error."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from dist_gsl.data.config import DataConfig
from dist_gsl.models.config import NetworkConfig
from dist_gsl.penalty import PenaltyConfig
from dist_gsl.training.config import TrainConfig, WorkersConfig


@dataclass
class RunConfig:
    """Everything that makes a run."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The overcomplete network to start from."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it learns from."""
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    """What makes neurons vanish."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How it is trained."""
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    """Where it runs."""

    def __post_init__(self) -> None:
        if self.penalty.revive and self.train.ema is not None:
            raise ValueError("penalty.revive and train.ema: a neuron that may come back is never zero in the average; choose one")
        if self.train.target is not None and (self.penalty.revive or self.penalty.every != "step" or not self.penalty.enabled):
            remedy = (
                "leave out penalty.revive" if self.penalty.revive
                else "leave out penalty.every" if self.penalty.every != "step"
                else "set a penalty.beta to start from, such as penalty.beta.rest"
            )  # fmt: skip
            raise ValueError(f"train.target {self.train.target} says when the penalty's proximal step runs, and the dead stay dead; {remedy}")
        if self.train.target is not None and self.penalty.min_alive == 0:
            raise ValueError(
                f"train.target {self.train.target} asks what a network costs, and one that has lost a layer cannot say; set penalty.min_alive 1"
            )
        if self.train.optimizer != "sgd" and self.penalty.unit == "epochs" and self.penalty.enabled:
            raise ValueError(
                f"penalty.unit epochs counts steps of SGD, train.optimizer is {self.train.optimizer}; set penalty.unit absolute and its betas"
            )

    def without_penalty(self) -> RunConfig:
        """The same run without penalty: what a baseline is."""
        return dataclasses.replace(self, penalty=self.penalty.without(), train=dataclasses.replace(self.train, target=None))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """`ValueError` for an unknown key, naming the closest known one."""
        return _build(cls, values, where="")

    def save(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> RunConfig:
        try:
            values = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(
                f"config {path}: cannot be read ({type(error).__name__}); name a run's config.yaml"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(f"config {path}: is not a mapping of fields; name a run's config.yaml")
        return cls.from_dict(values)

    def flat(self) -> dict[str, Any]:
        """{"train.epochs": 12, ...}."""
        return dict(_flatten(self.to_dict(), ""))

    def effective(self) -> dict[str, float]:
        """The penalty in plain numbers by short names, for comparing runs: what is left out has the value it stands for."""
        beta, alpha, schedule = self.penalty.beta, self.penalty.alpha, self.penalty.beta_schedule
        return {
            "beta_rest": beta.rest, "beta_first": beta.rest if beta.first is None else beta.first,
            "beta_num_first": 0 if beta.first is None else beta.num_first, "alpha": alpha.rest,
            "penalty_start": schedule.start, "penalty_ramp": schedule.ramp,
            "penalty_end": float(self.train.epochs) if schedule.end is None else schedule.end,
        }  # fmt: skip


def field_names() -> list[str]:
    """Every field's dotted name, e.g. "penalty.beta.rest"."""
    return list(RunConfig().flat())


def check_field(name: str, known: list[str]) -> None:
    """`ValueError` unless the dotted name is known."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "`dist-gsl train RECIPE --help` lists them"
        raise ValueError(f"config: no field is called {name!r}; {hint}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _build(cls: Any, values: Any, *, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"config: {where or 'the file'} must be a mapping of fields, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in fields:
            check_field(path, [f"{where}.{known}" if where else known for known in fields])
        arguments[name] = _convert(hints[name], value, path)
    return cls(**arguments)


def _convert(hint: Any, value: Any, path: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise ValueError(f"config: {path} must have a value")
    (kind,) = [option for option in options if option is not type(None)]
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where=path)
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            known = ", ".join(str(member.value) for member in kind)
            raise ValueError(f"config: {path} is {value!r}, must be one of {known}") from None
    origin = typing.get_origin(kind)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_convert(typing.get_args(kind)[0], item, path) for item in value)
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(key): _convert(typing.get_args(kind)[1], item, f"{path}.{key}") for key, item in value.items()}
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind is not float and isinstance(value, kind) and (kind is not int or not isinstance(value, bool)):
        return value
    raise ValueError(f"config: {path} is {value!r}, must be {getattr(kind, '__name__', kind)}")


def _flatten(values: Mapping[str, Any], prefix: str) -> typing.Iterator[tuple[str, Any]]:
    for name, value in values.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, path)
        else:
            yield path, value
