"""A proximal optimizer's step inside backward: run by DDP as soon as a bucket of gradients is reduced. Imports torch alone.

Buckets finish last layer first, on a device in several threads and streams, so nothing here may depend on their order. On a CPU they take their
step in the thread that runs backward, when it has no more gradients to compute, each while the next ones are still being reduced: a thread
of its own would take the core that computes gradients, and Python's lock (with three buckets on two cores a step took 7 to 9 % longer).
DDP reads the hook's annotations, which must be types, not text.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_gsl.neurons import NeuronLayer

if TYPE_CHECKING:
    from dist_gsl.proximal import ProximalSGD


@dataclass(frozen=True)
class _Bucket:
    """What is to be done with a bucket of gradients: the same in every backward, and a quarter of a millisecond of Python to find out."""

    address: int
    """Of the bucket's buffer, which the gradients are views of."""
    by_group: list[tuple[int, list[Tensor], list[Tensor]]]
    """(number of the parameter group, its parameters here, their gradients)."""
    whole: list[NeuronLayer]
    """Layers all of whose parts lie in this bucket."""
    split: list[NeuronLayer]
    """Layers with other parts in other buckets."""


class InBackward:
    """Runs an optimizer's step from DDP's communication hook."""

    def __init__(
        self, optimizer: "ProximalSGD", ddp: DistributedDataParallel, *, max_grad_norm: float | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.optimizer, self.ddp, self.max_grad_norm, self.scaler = optimizer, ddp, max_grad_norm, scaler
        reasons = [
            text for text, given in (
                ("a GradScaler may skip the step", scaler is not None),
                ("the norm is clipped over all gradients", max_grad_norm is not None),
                ("DDP looks for unused parameters", ddp.find_unused_parameters),
            ) if given
        ]
        self.overlap = not reasons
        if reasons:
            warnings.warn(f"stepping after backward, not within it: {', '.join(reasons)}", stacklevel=3)
        self.stepping = False
        self._work: list[Callable[[], object]] = []
        """Of each bucket of this backward, what waits for it and for its step."""
        self._samples: tuple[Tensor | int, Any] | None = None
        self._split: list[NeuronLayer] = []
        """Layers whose parts come in several buckets, in this backward."""
        self._layers_of: dict[Tensor, list[NeuronLayer]] = {}
        for layer in optimizer.neurons:
            for piece in layer.producers:
                p = optimizer.neurons.parameter(piece.tensor)
                if p.requires_grad:  # what has no entries any more takes no gradient
                    self._layers_of.setdefault(p, []).append(layer)
        self._num_pieces = Counter(layer.name for layers in self._layers_of.values() for layer in layers)
        self._buckets: dict[int, _Bucket] = {}
        self._has_rebuilt = False
        """DDP makes its buckets anew after the first backward, and never again; before that none is kept, or it would be held in memory."""
        ddp.register_comm_hook(None, self._hook)

    def release(self) -> None:
        """Holds nothing any more."""
        self._work, self._split, self._samples = [], [], None
        del self.optimizer, self.ddp, self._layers_of, self._buckets

    def count_samples(self, num_samples: int, total: int | None) -> None:
        if total is not None:
            self._samples = total, None
            return
        device = next(self.ddp.module.parameters()).device
        count = torch.tensor(float(num_samples), device=device)
        self._samples = count, dist.all_reduce(count, group=self.ddp.process_group, async_op=True)

    def _hook(self, _state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        # Buckets come in order, whichever is ready first.
        if bucket.index() == 0:
            self._begin()
        if bucket.is_last():  # DDP queues its own end right after this, behind ours: in the same graph task, whichever that is
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        buffer = bucket.buffer()
        if not self.overlap:
            return self._reduce_with_callback(buffer, None)
        known = self._what_is_in(bucket)
        # In the first backward of a static graph DDP waits for its buckets before it lets `_end` come: it would wait for a step that waits for it.
        if buffer.device.type == "cpu" and not self.ddp.static_graph:
            return self._reduce_for_end(buffer, known)
        return self._reduce_with_callback(buffer, known)

    def _what_is_in(self, bucket: dist.GradBucket) -> _Bucket:
        known = self._buckets.get(bucket.index())
        if known is None or known.address != bucket.buffer().data_ptr():
            known = self._look_at(bucket)
            if self._has_rebuilt:
                self._buckets[bucket.index()] = known
        return known

    def _reduce_for_end(self, buffer: Tensor, bucket: _Bucket) -> torch.futures.Future[Tensor]:
        work = dist.all_reduce(buffer, group=self.ddp.process_group, async_op=True)
        future: torch.futures.Future[Tensor] = torch.futures.Future()

        def finish() -> None:
            if work is not None:
                work.wait()
            self._finish(buffer, bucket)
            future.set_result(buffer)

        self._work.append(finish)
        return future

    def _reduce_with_callback(self, buffer: Tensor, bucket: _Bucket | None) -> torch.futures.Future[Tensor]:
        def reduced(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            flat = future.value()[0]
            with torch.no_grad():  # pool threads have gradients on
                self._finish(flat, bucket)
            return flat

        future = dist.all_reduce(buffer, group=self.ddp.process_group, async_op=True).get_future().then(reduced)
        self._work.append(future.wait)
        return future

    def _finish(self, buffer: Tensor, bucket: _Bucket | None) -> None:
        """What is left to do with a bucket that is reduced."""
        buffer.div_(self._divisor())
        if bucket is not None:
            self._step(bucket)

    def _begin(self) -> None:
        """Before the first bucket of a backward."""
        self._work, self._split = [], []  # what a backward that was cut off left
        if self.overlap:
            self.optimizer.begin_step()

    def _divisor(self) -> Tensor | int:
        if self._samples is None:
            return dist.get_world_size(self.ddp.process_group)
        count, work = self._samples
        if work is not None:
            work.wait()
        return count

    def _look_at(self, bucket: dist.GradBucket) -> _Bucket:
        parameters = bucket.parameters()
        by_group: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for p, g in zip(parameters, bucket.gradients(), strict=True):
            its_parameters, its_gradients = by_group.setdefault(self.optimizer._group_of[p], ([], []))
            its_parameters.append(p)
            # bucket.gradients() reads channels_last parameters in the wrong order
            its_gradients.append(g.as_strided(p.shape, p.stride(), g.storage_offset()) if is_dense(p) else g)
        here = Counter(layer.name for p in parameters for layer in self._layers_of.get(p, []))
        layers = [(self.optimizer.neurons[name], num_pieces == self._num_pieces[name]) for name, num_pieces in here.items()]
        return _Bucket(
            bucket.buffer().data_ptr(), [(number, *both) for number, both in by_group.items()],
            whole=[layer for layer, is_whole in layers if is_whole], split=[layer for layer, is_whole in layers if not is_whole],
        )

    def _step(self, bucket: _Bucket) -> None:
        """Of a bucket: on a device each runs on a thread and in a stream of its own. So a layer takes its proximal step here only if all that
        its neurons own lies in this bucket."""
        optimizer = self.optimizer
        for number, parameters, gradients in bucket.by_group:
            optimizer.update_(parameters, gradients, optimizer.param_groups[number])
        if optimizer.prox_is_due:
            optimizer.prox_(bucket.whole)
            self._split += bucket.split

    @torch.no_grad()
    def _end(self) -> None:
        """When backward ends: all buckets are waited for before the second phase."""
        for finish in self._work:
            finish()
        self._work, self._samples, self._has_rebuilt = [], None, True
        if self.overlap:
            split, self._split = {layer.name: layer for layer in self._split}, []
            self.optimizer.prox_(split.values())
            self.optimizer.finish_step()
            self.optimizer._opt_called = True  # or learning-rate schedulers warn that step() was never called
        else:
            # DDP queues its own last work, copying gradients of unused parameters, before this comes round again.
            torch.autograd.Variable._execution_engine.queue_callback(self._step_after_backward)

    def _step_after_backward(self) -> None:
        optimizer = self.optimizer
        self.stepping = True
        try:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            if self.max_grad_norm is not None:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                for p in parameters:
                    if p.grad is not None:
                        optimizer.mask_gradient_(p, p.grad)
                torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            if self.scaler is not None:
                self.scaler.step(optimizer)
                self.scaler.update()
            else:
                optimizer.step()
        finally:
            self.stepping = False


def is_dense(tensor: Tensor) -> bool:
    """Whether its entries fill their memory without a gap, in whatever order: DDP lays gradients out as such parameters, others contiguously."""
    end = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1):
        if stride != end:
            return False
        end *= size
    return True
