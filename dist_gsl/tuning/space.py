"""What a search may choose: fields of a run's config, and for each a range or a list of values.

A space is a dict from a config field's dotted name to a domain:

    {"penalty.beta.rest": Float(0.5, 4.0, log=True),
     "penalty.beta.num_first": Choice([0, 2]),
     "penalty.beta.first": When("penalty.beta.num_first", [2], Float(0.5, 4.0, log=True))}

Standard library alone.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from dist_gsl.config import RunConfig, check_field, field_names

Value = float | int | str | bool | None


@dataclass(frozen=True)
class Float:
    """A number between `low` and `high`, both included; with `log` its logarithm is uniform, with `step` it is one of
    low, low + step, ..."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        _check_range(self)

    def values(self) -> list[Value] | None:
        if self.low == self.high:
            return [self.low]
        if self.step is None:
            return None
        # In decimals, as Optuna does: 0 + 3 x 0.2 is 0.6, and not outside [0, 0.6].
        low, high, step = (Decimal(str(number)) for number in (self.low, self.high, self.step))
        return [float(low + i * step) for i in range(int((high - low) / step) + 1)]

    def ends(self) -> list[Value]:
        return [self.low, self.high]

    def draw(self, rng: random.Random) -> Any:
        if self.step is not None:
            return rng.choice(self.values() or [])
        if self.log:
            # Rounding must not leave the range.
            return min(self.high, max(self.low, math.exp(rng.uniform(math.log(self.low), math.log(self.high)))))
        return rng.uniform(self.low, self.high)


@dataclass(frozen=True)
class Int:
    """A whole number between `low` and `high`, both included."""

    low: int
    high: int
    log: bool = False
    step: int | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.low, int) and isinstance(self.high, int)):
            raise ValueError(f"space: {self} needs whole numbers; use Float for others")
        _check_range(self)

    def values(self) -> list[Value]:
        return list(range(self.low, self.high + 1, self.step or 1))

    def ends(self) -> list[Value]:
        return [self.low, self.high]

    def draw(self, rng: random.Random) -> Any:
        if self.log:
            drawn = round(math.exp(rng.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5))))
            return min(self.high, max(self.low, drawn))
        return rng.choice(self.values())


@dataclass(frozen=True)
class Choice:
    """One of the values."""

    options: Sequence[Value]

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        if not self.options:
            raise ValueError("space: Choice([]) is empty; give it at least one value")

    def values(self) -> list[Value]:
        return list(self.options)

    def ends(self) -> list[Value]:
        return list(self.options)

    def draw(self, rng: random.Random) -> Any:
        return rng.choice(self.options)


@dataclass(frozen=True)
class When:
    """A domain that counts only where an earlier field has one of some values; else the field stays as in base()."""

    field: str
    values_of_field: Sequence[Value]
    domain: Float | Int | Choice

    def __post_init__(self) -> None:
        object.__setattr__(self, "values_of_field", tuple(self.values_of_field))

    def holds(self, params: Mapping[str, Value]) -> bool:
        return self.field in params and params[self.field] in self.values_of_field


Domain = Float | Int | Choice
Space = Mapping[str, Domain | When]


def _check_range(domain: Float | Int) -> None:
    ends = (domain.low, domain.high)
    if not all(isinstance(end, (int, float)) and math.isfinite(end) for end in ends) or domain.low > domain.high:
        raise ValueError(f"space: {domain} is an empty range; low must be a number no larger than high")
    if domain.log and domain.low <= 0:
        raise ValueError(f"space: {domain} needs low above 0 for a logarithm")
    if domain.step is not None and (domain.step <= 0 or domain.log):
        raise ValueError(f"space: {domain} needs a step above 0, and no log beside it")


def active(space: Space, params: Mapping[str, Value]) -> Iterator[tuple[str, Domain]]:
    """The fields that are to be chosen, in order; `params` is to be filled while this is read."""
    for field, domain in space.items():
        if not isinstance(domain, When):
            yield field, domain
        elif domain.holds(params):
            yield field, domain.domain


def draw(space: Space, rng: random.Random) -> dict[str, Any]:
    """A random point."""
    params: dict[str, Any] = {}
    for field, domain in active(space, params):
        params[field] = domain.draw(rng)
    return params


def grid(space: Space) -> list[dict[str, Any]]:
    """Every point of a space of finitely many. `ValueError` for a continuous range."""
    points: list[dict[str, Any]] = [{}]
    for field, entry in space.items():
        domain = entry.domain if isinstance(entry, When) else entry
        values = domain.values()
        if values is None:
            raise ValueError(f"space: a grid cannot hold {field} = {domain}; give it a step, or use Choice([...])")
        points = list(
            itertools.chain.from_iterable(
                [{**point, field: value} for value in values]
                if not isinstance(entry, When) or entry.holds(point)
                else [point]
                for point in points
            )
        )
    return points


def applied(base: RunConfig, params: Mapping[str, Value]) -> RunConfig:
    """The base config with the fields set. `ValueError` for what the config refuses."""
    content = base.to_dict()
    for name, value in params.items():
        *parents, last = name.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    return RunConfig.from_dict(content)


FIXED = ("network.", "data.", "workers.")
"""What trials are compared on, and how many run at once."""
FREE = ("data.augment", "data.size", "data.start_size", "data.full_size_epoch", "data.num_threads")


def check(space: Space, base: RunConfig, *, layers: Sequence[str] | None = None, num_draws: int = 200) -> None:
    """`ValueError`, naming the field, where a point of the space would make no config.

    layers: the network's layers with neurons, where they are known.

    Every end of every range is tried, and some random points for what only a combination breaks.
    """
    if not isinstance(space, Mapping) or not space:
        raise ValueError("space: space() must return a dict from field names to Float, Int, Choice or When")
    known = field_names()
    seen: list[str] = []
    for field, entry in space.items():
        by_layer = re.fullmatch(r"penalty\.(?:beta|alpha)\.by_layer\.(.+)", field)
        if by_layer is None:
            check_field(field, known)
        elif layers is not None and by_layer[1] not in layers:
            raise ValueError(f"space: {field}: no layer with neurons has that name; layers: {', '.join(layers)}")
        if field.startswith(FIXED) and field not in FREE:
            raise ValueError(f"space: {field} must be the same in all trials; set it in base()")
        if isinstance(entry, When) and entry.field not in seen:
            raise ValueError(f"space: {field} depends on {entry.field!r}, which must stand before it in the space")
        domain = entry.domain if isinstance(entry, When) else entry
        if not isinstance(domain, Float | Int | Choice):
            raise ValueError(f"space: {field} is {domain!r}, must be Float, Int, Choice or When")
        seen.append(field)
        for end in domain.ends():
            try:
                applied(base, {field: end})
            except ValueError as error:
                if not _needs_others(field):
                    raise ValueError(f"space: {field} = {end!r}: {error}") from None
    rng = random.Random(0)
    for _ in range(num_draws):
        params = draw(space, rng)
        try:
            applied(base, params)
        except ValueError as error:
            chosen = ", ".join(f"{name}={value}" for name, value in params.items())
            raise ValueError(f"space: {chosen}: {error}") from None


def _needs_others(field: str) -> bool:
    """A schedule's ends are right or wrong only together."""
    return "_schedule." in field


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """{field: a short name that is still unique}, for tables and plots."""
    names = {}
    for field in fields:
        parts = field.split(".")
        count = 1
        while count < len(parts) and any(
            other != field and other.split(".")[-count:] == parts[-count:] for other in fields
        ):
            count += 1
        names[field] = ".".join(parts[-count:])
    return names
