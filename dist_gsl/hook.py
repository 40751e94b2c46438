"""A proximal optimizer's step inside backward: run by DDP as soon as a bucket of gradients is reduced. Imports torch alone.

Buckets finish last layer first, and nothing here depends on their order. They take their step in the thread that runs backward, when it has no
more gradients to compute. On a CPU each while the next ones are still being reduced: a thread of its own would take the core that computes
gradients, and Python's lock (with three buckets on two cores a step took 7 to 9 % longer). On a GPU all together, when the host has queued
what computes the gradients: in the callbacks of the buckets the host, which has little else to do but queue, fell behind (one H100, ResNet-18
in nine buckets: a step took 29 % longer; in two, 10 % longer than stepping after backward).
DDP reads the hook's annotations, which must be types, not text.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_gsl.neurons import NeuronLayer

if TYPE_CHECKING:
    from dist_gsl.proximal import ProximalOptimizer


@dataclass(frozen=True)
class _Bucket:
    """What is to be done with a bucket of gradients: the same in every backward, and a quarter of a millisecond of Python to find out."""

    buffer: Tensor
    """What the gradients are views of."""
    future: torch.futures.Future[Tensor]
    """What DDP is given to wait for, with the buffer in it: done already, as DDP looks at it when `_end` has waited and stepped."""
    by_group: list[tuple[int, list[Tensor], list[Tensor]]]
    """(number of the parameter group, its parameters here, their gradients)."""
    whole: list[NeuronLayer]
    """Layers all of whose parts lie in this bucket."""
    split: list[NeuronLayer]
    """Layers with other parts in other buckets."""

    @classmethod
    def of_all(cls, buckets: Sequence["_Bucket"]) -> "_Bucket":
        """All buckets of a network as one."""
        by_group: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for bucket in buckets:
            for number, parameters, gradients in bucket.by_group:
                its_parameters, its_gradients = by_group.setdefault(number, ([], []))
                its_parameters += parameters
                its_gradients += gradients
        layers = {layer.name: layer for bucket in buckets for layer in (*bucket.whole, *bucket.split)}
        first = buckets[0]
        return cls(first.buffer, first.future, [(number, *both) for number, both in by_group.items()], whole=list(layers.values()), split=[])


class InBackward:
    """Runs an optimizer's step from DDP's communication hook."""

    def __init__(
        self, optimizer: "ProximalOptimizer", ddp: DistributedDataParallel, *, max_grad_norm: float | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.optimizer, self.ddp, self.max_grad_norm, self.scaler = optimizer, ddp, max_grad_norm, scaler
        if getattr(ddp, "skip_all_reduce_unused_params", False):
            raise ValueError(
                "ProximalOptimizer.attach: DDP's skip_all_reduce_unused_params leaves the hook out where the last bucket is unused, and with it the "
                "step; build DDP without it"
            )
        if ddp.static_graph and len({p.dtype for p in ddp.parameters() if p.requires_grad}) > 1:
            raise ValueError(
                "ProximalOptimizer.attach: in the first backward of a static graph DDP does not tell the buckets of several types apart; build DDP "
                "without static_graph, or give all parameters one type"
            )
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
        self._work: list[tuple[_Bucket, Any]] = []
        """The buckets of this backward that are stepped at its end, and what reduces them."""
        self._callbacks: list[torch.futures.Future[Tensor]] = []
        """What is left to be waited for of the others."""
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
        self._all: _Bucket | None = None
        """All of them as one."""
        self._has_rebuilt = False
        """DDP makes its buckets anew after the first backward, and never again; before that none is kept, or it would be held in memory."""
        ddp.register_comm_hook(None, self._hook)

    def release(self) -> None:
        """Holds nothing any more."""
        self._work, self._callbacks, self._split, self._samples = [], [], [], None
        del self.optimizer, self.ddp, self._layers_of, self._buckets, self._all

    def count_samples(self, num_samples: int, total: int | None) -> None:
        if total is not None:
            self._samples = total, None
            return
        device = next(self.ddp.module.parameters()).device
        count = torch.tensor(float(num_samples), device=device)
        self._samples = count, dist.all_reduce(count, group=self.ddp.process_group, async_op=True)

    def _hook(self, _state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if bucket.index() == 0 and self.overlap:  # they come in order, whichever is ready first
            self.optimizer.begin_step()
        if bucket.is_last():  # DDP queues its own end right after this, behind ours: in the same graph task, whichever that is
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        if not self.overlap:
            return self._reduce_with_callback(bucket.buffer(), None)
        known = self._what_is_in(bucket)
        # In the first backward of a static graph DDP waits for its buckets before it lets `_end` come: it would wait for a step that waits for it.
        if self.ddp.static_graph:
            return self._reduce_with_callback(known.buffer, known)
        self._work.append((known, all_reduce(known.buffer, self.ddp.process_group)))
        return known.future

    def _what_is_in(self, bucket: dist.GradBucket) -> _Bucket:
        known = self._buckets.get(bucket.index())
        buffer = bucket.buffer()
        if known is None or known.buffer.data_ptr() != buffer.data_ptr():
            known = self._look_at(bucket, buffer)
            if self._has_rebuilt:
                self._buckets[bucket.index()] = known
                self._all = None
        return known

    def _reduce_with_callback(self, buffer: Tensor, bucket: _Bucket | None) -> torch.futures.Future[Tensor]:
        def reduced(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            flat = future.value()[0]
            with torch.no_grad():  # pool threads have gradients on
                flat.div_(self._divisor())
                if bucket is not None:
                    self._step(bucket)
            return flat

        future = all_reduce(buffer, self.ddp.process_group).get_future().then(reduced)
        self._callbacks.append(future)
        return future

    def _divisor(self) -> Tensor | int:
        if self._samples is None:
            return dist.get_world_size(self.ddp.process_group)
        count, work = self._samples
        if work is not None:
            work.wait()
        return count

    def _look_at(self, bucket: dist.GradBucket, buffer: Tensor) -> _Bucket:
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.device.type != "cpu" else None)
        future.set_result(buffer)
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
            buffer, future, [(number, *both) for number, both in by_group.items()],
            whole=[layer for layer, is_whole in layers if is_whole], split=[layer for layer, is_whole in layers if not is_whole],
        )

    def _step(self, bucket: _Bucket) -> None:
        """Of a bucket, which may be in a thread and a stream of its own: so a layer takes its proximal step here only if all that its neurons
        own lies in this bucket."""
        optimizer = self.optimizer
        for number, parameters, gradients in bucket.by_group:
            optimizer.update_(parameters, gradients, optimizer.param_groups[number])
        if optimizer.prox_is_due:
            optimizer.prox_(bucket.whole)
            self._split += bucket.split

    def _step_reduced(self) -> None:
        """Of the buckets that waited for the end of backward."""
        work, self._work = self._work, []
        if not work:
            return
        if is_one_by_one(work[0][0].buffer.device):
            for bucket, reducing in work:
                reducing.wait()
                bucket.buffer.div_(self._divisor())
                self._step(bucket)
            return
        for _, reducing in work:
            reducing.wait()
        buckets = [bucket for bucket, _ in work]
        torch._foreach_div_([bucket.buffer for bucket in buckets], self._divisor())
        together = self._all or _Bucket.of_all(buckets)
        if self._has_rebuilt:
            self._all = together
        self._step(together)

    @torch.no_grad()
    def _end(self) -> None:
        """When backward ends: all buckets are waited for before the second phase."""
        self._step_reduced()
        for future in self._callbacks:
            future.wait()
        self._callbacks, self._samples, self._has_rebuilt = [], None, True
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


def all_reduce(buffer: Tensor, group: dist.ProcessGroup) -> Any:
    """Begins to sum a buffer over processes, in place. `dist.all_reduce` does the same in several times the time, for each bucket of every step."""
    return group.allreduce([buffer])


def is_one_by_one(device: torch.device) -> bool:
    """Whether buckets are stepped each for itself."""
    return device.type == "cpu"


def is_dense(tensor: Tensor) -> bool:
    """Whether its entries fill their memory without a gap, in whatever order: DDP lays gradients out as such parameters, others contiguously."""
    end = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1):
        if stride != end:
            return False
        end *= size
    return True
