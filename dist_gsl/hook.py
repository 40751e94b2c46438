"""A proximal optimizer's step inside backward: run by DDP as soon as a bucket of gradients is reduced. Imports torch alone.

Buckets finish last layer first and on several threads, on a device in several streams, so nothing here may depend on their order.
DDP reads the hook's annotations, which must be types, not text.
"""

import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_gsl.neurons import NeuronLayer

if TYPE_CHECKING:
    from dist_gsl.proximal import ProximalSGD


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
        self._work: list[Any] = []  # the futures of this backward's buckets
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
        ddp.register_comm_hook(None, self._hook)

    def release(self) -> None:
        """Holds nothing any more."""
        del self.optimizer, self.ddp, self._layers_of

    def count_samples(self, num_samples: int, total: int | None) -> None:
        if total is not None:
            self._samples = total, None
            return
        device = next(self.ddp.module.parameters()).device
        count = torch.tensor(float(num_samples), device=device)
        self._samples = count, dist.all_reduce(count, group=self.ddp.process_group, async_op=True)

    def _hook(self, _state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if not self._work:
            self._begin()
        buffer, parameters = bucket.buffer(), bucket.parameters()
        gradients = [  # bucket.gradients() reads channels_last parameters in the wrong order
            g.as_strided(p.shape, p.stride(), g.storage_offset()) if is_dense(p) else g
            for p, g in zip(parameters, bucket.gradients(), strict=True)
        ]

        def reduced(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            flat = future.value()[0]
            with torch.no_grad():  # pool threads have gradients on
                flat.div_(self._divisor())
                if self.overlap:
                    self._step(parameters, gradients)
            return flat

        future = dist.all_reduce(buffer, group=self.ddp.process_group, async_op=True).get_future().then(reduced)
        self._work.append(future)
        return future

    def _begin(self) -> None:
        """Before the first bucket of a backward."""
        if self.overlap:
            self.optimizer.begin_step()
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _divisor(self) -> Tensor | int:
        if self._samples is None:
            return dist.get_world_size(self.ddp.process_group)
        count, work = self._samples
        if work is not None:
            work.wait()
        return count

    def _step(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Of a bucket: each runs on a thread, and on a device in a stream, of its own. So a layer takes its proximal step here only if all that
        its neurons own lies in this bucket."""
        optimizer = self.optimizer
        by_group: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for p, g in zip(parameters, gradients, strict=True):
            its_parameters, its_gradients = by_group.setdefault(optimizer._group_of[p], ([], []))
            its_parameters.append(p)
            its_gradients.append(g)
        for number, (some, theirs) in by_group.items():
            optimizer.update_(some, theirs, optimizer.param_groups[number])
        if not optimizer.prox_is_due:
            return
        here = Counter(layer.name for p in parameters for layer in self._layers_of.get(p, []))
        whole = [name for name, num_pieces in here.items() if num_pieces == self._num_pieces[name]]
        optimizer.prox_([optimizer.neurons[name] for name in whole])
        self._split += [optimizer.neurons[name] for name in here if name not in whole]

    @torch.no_grad()
    def _end(self) -> None:
        """When backward ends: all buckets are waited for before the second phase."""
        for future in self._work:
            future.wait()
        self._work, self._samples = [], None
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
