"""Run time, memory and multiply-adds of a network before and after removal. Imports torch alone."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Run time of both networks at one batch size."""

    batch_size: int
    full_ms: float
    """Median over the repeats, milliseconds a batch."""
    compact_ms: float
    saved_percent: float
    """Percent of run time saved: the median over pairs of runs, one after the other, of 100 (1 - compact / full)."""
    num_repeats: int


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a network holds and does for one input."""

    parameters: int
    parameter_bytes: int
    feature_bytes: int
    """Outputs of all leaf modules at batch 1; an operation in place, or not in a module, has none of its own."""
    multiply_adds: int
    """Of the convolutions and linear layers, at batch 1."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A network before and after removal, as in the paper's table of speed-up and memory."""

    timings: list[Timing]
    full: Size
    compact: Size
    device: str
    """As "CPU, 2 threads", or the accelerator's name."""
    speedup_percent: dict[str, float] = field(init=False)
    """{"1": percent of run time saved at batch 1, ...}."""
    memory_saved_percent: dict[str, float] = field(init=False)
    """{"params": of the parameters' bytes, "features": of the layers' outputs at batch 1}."""

    def __post_init__(self) -> None:
        speedup = {str(timing.batch_size): timing.saved_percent for timing in self.timings}
        memory = {
            "params": saved_percent(self.full.parameter_bytes, self.compact.parameter_bytes),
            "features": saved_percent(self.full.feature_bytes, self.compact.feature_bytes),
        }
        object.__setattr__(self, "speedup_percent", speedup)
        object.__setattr__(self, "memory_saved_percent", memory)


def saved_percent(before: float, after: float) -> float:
    """100 (1 - after / before); 0 where there was nothing."""
    return 100.0 * (1.0 - after / before) if before else 0.0


def compare(
    full: nn.Module,
    compact: nn.Module,
    *,
    example: Tensor,
    batch_sizes: Sequence[int] = (1, 2, 8, 16),
    repeats: int = 100,
    threads: int | None = None,
    seconds: float = 6.0,
) -> Comparison:
    """Time both networks on the device they are on, in evaluation mode, and count what they hold.

    They run in turn, so that what else the machine does strikes both; each batch size gets its share of the time.

    Args:
        full, compact: the networks, on one device; left as they are.
        example: one batch (N, ...) of inputs; its first is repeated to each batch size.
        batch_sizes: those to time, each at least 1.
        repeats: pairs of runs at most, at least 1, after two that are not counted.
        threads: of torch on the CPU; None is as it is set.
        seconds: about how long all of it may take. At least 3 pairs are run in any case.

    Raises:
        ValueError: an argument out of range, or networks on different devices.
    """
    if repeats < 1 or seconds <= 0 or not batch_sizes or min(batch_sizes) < 1 or (threads is not None and threads < 1):
        raise ValueError("timing: repeats, seconds, threads and every batch size must be above 0; give larger ones")
    devices = {next(network.parameters()).device for network in (full, compact)}
    if len(devices) > 1:
        raise ValueError(f"timing: the networks are on {' and '.join(map(str, devices))}; move them to one device")
    device = devices.pop()
    one = example[:1].to(device)
    networks = [copy.deepcopy(network).eval() for network in (full, compact)]
    with _threads(threads), torch.inference_mode():
        sizes = [size(network, example=one) for network in networks]
        share = seconds / len(batch_sizes)
        timings = [
            _time(networks, one.expand(n, *one.shape[1:]).contiguous(), repeats=repeats, seconds=share)
            for n in batch_sizes
        ]
        count = torch.get_num_threads()
        where = f"CPU, {count} thread{'' if count == 1 else 's'}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return Comparison(timings=timings, full=sizes[0], compact=sizes[1], device=where)


def latency_ms(network: nn.Module, *, example: Tensor, repeats: int = 200, seconds: float = 3.0) -> float:
    """Median run time in milliseconds for the first input of `example`, on the device the network is on."""
    device = next(network.parameters()).device
    network, one, synchronize = copy.deepcopy(network).eval(), example[:1].to(device), _synchronize(device)
    began = time.perf_counter()
    taken: list[float] = []
    with torch.inference_mode():
        for _ in range(3):
            _run_s(network, one, synchronize)
        while len(taken) < repeats and (len(taken) < 3 or time.perf_counter() - began < seconds):
            taken.append(_run_s(network, one, synchronize))
    return 1e3 * statistics.median(taken)


@torch.no_grad()
def size(network: nn.Module, *, example: Tensor) -> Size:
    """Parameters, features and multiply-adds of a network for the first input of a batch, as it runs in evaluation. Multiply-adds are
    those of convolutions and matrix products, attention's included; features are the tensors that its innermost modules return."""
    feature_bytes = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        nonlocal feature_bytes
        if not isinstance(output, Tensor):
            return
        shares = [output.data_ptr() == tensor.data_ptr() for tensor in inputs if isinstance(tensor, Tensor)]
        if not any(shares):  # ReLU in place, Flatten, Dropout in evaluation: the memory of what they read
            feature_bytes += output.numel() * output.element_size()

    leaves = [module for module in network.modules() if not list(module.children())]
    handles = [module.register_forward_hook(count) for module in leaves]
    training = [(module, module.training) for module in network.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    # Fused attention would be one operation that the counter does not know.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
            network.eval()(example[:1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
        for module, was_training in training:
            module.training = was_training
    parameters = list(network.parameters())
    return Size(
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        feature_bytes=feature_bytes,
        multiply_adds=flops.get_total_flops() // 2,
    )


def _time(networks: Sequence[nn.Module], batch: Tensor, *, repeats: int, seconds: float) -> Timing:
    synchronize = _synchronize(batch.device)
    began = time.perf_counter()
    for network in (*networks, *networks):  # kernels are chosen and memory is allocated
        _run_s(network, batch, synchronize)
    pairs: list[tuple[float, float]] = []
    while len(pairs) < repeats and (len(pairs) < 3 or time.perf_counter() - began < seconds):
        order = (0, 1) if len(pairs) % 2 == 0 else (1, 0)
        taken = {which: _run_s(networks[which], batch, synchronize) for which in order}
        pairs.append((taken[0], taken[1]))
    return Timing(
        batch_size=len(batch),
        full_ms=1e3 * statistics.median(full for full, _ in pairs),
        compact_ms=1e3 * statistics.median(small for _, small in pairs),
        saved_percent=statistics.median(saved_percent(full, small) for full, small in pairs),
        num_repeats=len(pairs),
    )


def _run_s(network: nn.Module, batch: Tensor, synchronize: Callable[[], None]) -> float:
    synchronize()
    began = time.perf_counter()
    network(batch)
    synchronize()
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> Callable[[], None]:
    """An accelerator only takes the work; what it took is done after this."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
