"""Two ways to do the same, timed in pairs, one after the other in a new order each time: the ratio, with its interval.

What a machine does besides falls on both of a pair alike, so ratios stand where seconds do not.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from scipy.stats import t

from dist_gsl import heap

AT_LEAST = 30
"""Pairs that a claim of a few percent needs."""


def device_name(text: str) -> str:
    """Of an option --device: torch's name of a device that is there."""
    import torch

    try:
        kind = torch.device(text).type
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text}: there is no GPU here")
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text}: must be cpu or cuda")
    return text


class Ratio(NamedTuple):
    """The geometric mean over pairs of how much longer one takes than the other."""

    ratio: float
    low: float
    """Of its interval of 95 %."""
    high: float
    seconds: float
    """Median of one."""
    other_seconds: float
    """Median of the other."""
    pairs: int
    """How many were timed."""

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio_of(seconds: list[float], other: list[float]) -> Ratio:
    """Of times that were taken pair by pair, at least two. The interval is Student's, of the logarithms."""
    logs = [math.log(a / b) for a, b in zip(seconds, other, strict=True)]
    mean = statistics.mean(logs)
    spread = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - spread), math.exp(mean + spread), statistics.median(seconds), statistics.median(other), len(logs))


def timed(run: Callable[[], object], synchronize: Callable[[], object], *, wait: bool = True) -> float:
    """Seconds of a call, and of what it started if `wait`."""
    heap.keep_freed()  # as a training does; or a ratio would be of what lay where in memory
    synchronize()
    began = time.perf_counter()
    run()
    if wait:
        synchronize()
    return time.perf_counter() - began


def device_seconds(run: Callable[[], object], *, ahead: bool = True) -> float:
    """What a GPU needs for what a call launches, without the time that it waits for launches: it is kept busy until all are queued, as in a
    training, whose host is ahead of it. `RuntimeError` if the call waits for the device, or launches more than can be queued; if not `ahead`,
    what it took then."""
    import torch

    heap.keep_freed()
    cycles = 1 << 20
    while True:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        began.record()
        run()
        ended.record()
        was_ahead = not began.query()
        ended.synchronize()
        if was_ahead or (not ahead and cycles >= 1 << 24):
            return began.elapsed_time(ended) / 1e3
        if cycles >= 1 << 30:
            raise RuntimeError("the call waits for the device, or launches more than can be queued ahead")
        cycles *= 2


def compare(
    one: Callable[[], object], other: Callable[[], object], *, pairs: int = AT_LEAST, warmup: int = 2, seed: int = 0,
    synchronize: Callable[[], object] = lambda: None, clock: Callable[[Callable[[], object]], float] | None = None, seconds: float = math.inf,
    fewest: int = 5,
) -> Ratio:  # fmt: skip
    """`synchronize` waits until the device is done, and for other processes; or `clock` times a call. The order of each pair is drawn alike from
    the seed everywhere.

    After so many `seconds` no more pair is begun, once there are `fewest`; for pairs of one process alone, as each has a clock of its own.
    """
    for _ in range(warmup):
        one()
        other()
    order = random.Random(seed)
    taken: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for number in range(pairs):
        if number >= fewest and time.perf_counter() - began > seconds:
            break
        for which in order.sample((0, 1), 2):
            run = (one, other)[which]
            taken[which].append(timed(run, synchronize) if clock is None else clock(run))
    return ratio_of(*taken)
