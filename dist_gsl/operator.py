"""The proximal step of layers where their parameters lie, and the deaths that follow from it. Imports torch alone.

Which of the kernels takes a layer's step is chosen here. On a CPU the host hears at once who died. On a GPU it does not: the device itself
clears what a death clears, and the host asks when somebody reads a mask.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dist_gsl import kernels
from dist_gsl.kernels import Kind, Layout
from dist_gsl.neurons import NeuronLayer, Neurons
from dist_gsl.penalty import Prox, SparseGroupLasso, dying, lethal_factors, row_norms

if TYPE_CHECKING:
    from dist_gsl.kernels import gpu


class _Due(NamedTuple):
    """A layer and the proximal step that it is to take."""

    layer: NeuronLayer
    layout: Layout
    step: int
    t: float
    group_size: int
    cut: float
    threshold: float
    beta: float
    min_alive: int
    is_one_group: bool
    """All of the layer's neurons are one group."""


class ProximalOperator:
    """The proximal operator of a penalty on the neurons of a network, and their deaths: the options are `ProximalOptimizer`'s.

    `shrink_` may be called for some layers after others and from several threads; `bury_` comes when all have been.
    """

    def __init__(
        self, neurons: Neurons, penalty: SparseGroupLasso, *, revive: bool, min_alive: int, depth: bool, branches_are_groups: bool,
        metric_of: Callable[[NeuronLayer], Sequence[Tensor]] | None = None,
    ) -> None:
        """metric_of: the diagonal of the metric of a layer's parts, (N, ...) each, or nothing where they take no step; None: the identity."""
        self.neurons, self.penalty = neurons, penalty
        self.revive, self.min_alive, self.depth, self.branches_are_groups = revive, min_alive, depth, branches_are_groups
        self.metric_of = metric_of
        self.warned: set[str] = set()
        self._layouts: dict[str, Layout] = {}
        self._found: dict[str, Prox] = {}
        """What the host knows of this step."""
        self._shrinks: dict[tuple[str, ...], gpu.Shrink] = {}
        self._launched: dict[tuple[str, ...], tuple[gpu.Shrink, list[_Due]]] = {}
        self._clears: dict[tuple[tuple[str, ...], ...], gpu.Clear] = {}
        self._alive: dict[str, tuple[int, Tensor]] = {}
        """Of each layer on a device, the version of its mask that was taken there, and what became of it."""
        self._unheard: list[tuple[gpu.Clear, list[_Due], list[int]]] = []
        self._cleared: dict[str, tuple[int, list[Layout]]] = {}
        self._looked_at: set[str] = set()
        """Layers of whose `_cleared` it is known since `bury_` that it still lies where it did."""
        self._generation = 0
        """Of the tensors that mirror the parameters."""

    def shrink_(self, layers: Iterable[NeuronLayer], *, step: int, t_of: Callable[[NeuronLayer], float]) -> None:
        """The proximal step of layers. step: what the penalty's schedules are read at; t_of: a layer's t."""
        by_kind: dict[tuple[Kind, torch.dtype, torch.device], list[_Due]] = {}
        for layer in layers:
            if layer.num_neurons == 0:  # a branch that was removed
                continue
            due = self._due(layer, step, t_of(layer))
            if due.t * due.beta == 0:
                self._found[layer.name] = Prox(dead=None, kept_by_force=False, beta=due.beta)
            else:
                by_kind.setdefault((self._kind_of(due), due.layout.dtype, due.layout.device), []).append(due)
        for (kind, *_), dues in by_kind.items():
            if kind is Kind.TORCH:
                for due in dues:
                    self._by_torch_(due)
                continue
            torch.autograd.graph.increment_version([tensor for due in dues for tensor in due.layout.tensors])
            (self._in_cpp_ if kind is Kind.CPU else self._on_device_)(dues)

    @property
    def has_shrunk(self) -> bool:
        """Whether some layer has taken its proximal step since `bury_`."""
        return bool(self._found or self._launched)

    def bury_(self) -> None:
        """Kills what reached zero in the layers that `shrink_` was called for."""
        found, self._found = self._found, {}
        launched, self._launched = self._launched, {}
        for name, prox in found.items():
            layer = self.neurons[name]
            if self.revive:  # without penalty too: a neuron that was zero may have come back since
                layer.mask = (row_norms(self.neurons.parts(layer)) > 0).to(layer.mask.device)
            elif prox.dead is not None:
                dead = prox.dead.to(layer.mask.device) & layer.mask
                if bool(dead.any()):
                    self.neurons.zero_({name: dead.nonzero().flatten()})
        self._clear_on_devices_(launched)
        self._looked_at.clear()
        for name, prox in found.items():
            if prox.kept_by_force:
                self._warn_of_force(name, prox.beta)

    def forget(self) -> None:
        """Another state is loaded: what was found of this one holds no more."""
        self._found, self._launched, self._unheard, self._alive = {}, {}, [], {}
        for layer in self.neurons:
            layer.ask_first(None)
        self.forget_copies()

    def forget_copies(self) -> None:
        """What mirrors the parameters has changed, as when momentum has come."""
        self._generation += 1
        self._looked_at.clear()

    def lethal_factors(self, layer: NeuronLayer, *, beta: float, alpha: float, t: float) -> Tensor:
        """By what beta would have to be multiplied at least for a proximal step to take each neuron to zero, (num_neurons,) float64 on the CPU: 0 of the
        dead, inf of those that nothing kills, as of the strongest, as many as `min_alive` keeps."""
        parts, metric = self.neurons.parts(layer), None if self.metric_of is None else self.metric_of(layer)
        mask, is_one_group = layer.mask.cpu(), self._is_one_group(layer)
        if layer.num_neurons == 0 or (metric is not None and not metric):
            return torch.where(mask, math.inf, 0.0).double()
        groups, metrics = ([part.unsqueeze(0) for part in each] if each and is_one_group else each for each in (parts, metric))
        size = layer.group_size * layer.starting_neurons if is_one_group else layer.group_size
        found = lethal_factors(groups or (), t=t, beta=beta, alpha=alpha, group_size=size, metric=metrics).double().cpu().expand(layer.num_neurons).clone()
        found[~mask] = 0.0
        kept = min(self._min_alive_of(layer), int(mask.sum()))
        found[found.topk(kept).indices] = math.inf
        return found

    def _is_one_group(self, layer: NeuronLayer) -> bool:
        return self.branches_are_groups and layer.bypassed and self.depth

    def _min_alive_of(self, layer: NeuronLayer) -> int:
        return 0 if self.depth and layer.bypassed else self.min_alive

    def _due(self, layer: NeuronLayer, step: int, t: float) -> _Due:
        is_one_group = self._is_one_group(layer)
        layout = self._layouts.get(layer.name)
        if layout is None or not layout.is_current():
            rows = [piece.of(self.neurons.parameter(piece.tensor)) for piece in layer.producers]
            if is_one_group:
                rows = [replace(each, index=each.index.view(1, -1)) for each in rows]
            layout = self._layouts[layer.name] = Layout(rows, 1 if is_one_group else layer.num_neurons)
        size = layer.group_size * layer.starting_neurons if is_one_group else layer.group_size
        cut, threshold, beta = self.penalty.limits(layer.name, step, t=t, group_size=size)
        return _Due(layer, layout, step, t, size, cut, threshold, beta, self._min_alive_of(layer), is_one_group)

    # --- on the host

    def _by_torch_(self, due: _Due) -> None:
        layer, parts = due.layer, self.neurons.parts(due.layer)
        metric = None if self.metric_of is None else self.metric_of(layer)
        if metric is not None and not metric:
            self._found[layer.name] = Prox(dead=None, kept_by_force=False, beta=due.beta)
            return
        groups, metrics = ([part.unsqueeze(0) for part in each] if each and due.is_one_group else each for each in (parts, metric))
        prox = self.penalty.prox_(
            groups or (), layer=layer.name, step=due.step, t=due.t, group_size=due.group_size, min_alive=due.min_alive, metric=metrics
        )
        self._keep(due, prox)
        for piece, rows in zip(layer.producers, parts, strict=True):
            piece.write_(self.neurons.parameter(piece.tensor), rows)

    def _in_cpp_(self, dues: Sequence[_Due]) -> None:
        found = kernels.cpu.shrink_(
            [due.layout for due in dues], cuts=[due.cut for due in dues], thresholds=[due.threshold for due in dues],
            min_alive=[due.min_alive for due in dues],
        )  # fmt: skip
        for due, (factors, num_zero) in zip(dues, found, strict=True):
            dead, kept = None, None
            if num_zero > 0 and len(factors) - num_zero >= due.min_alive:
                dead = factors == 0
            elif num_zero > 0:
                parts = self.neurons.parts(due.layer)
                dead, kept = dying(parts, factors, min_alive=due.min_alive)
                for piece, rows in zip(due.layer.producers, parts, strict=True):
                    piece.write_(self.neurons.parameter(piece.tensor), rows.index_fill_(0, dead.nonzero().flatten(), 0))
            self._keep(due, Prox(dead=dead, kept_by_force=kept is not None, beta=due.beta))

    def _keep(self, due: _Due, prox: Prox) -> None:
        if due.is_one_group and prox.dead is not None:
            prox = prox._replace(dead=prox.dead.expand(due.layer.num_neurons))
        self._found[due.layer.name] = prox

    # --- on a device

    def _kind_of(self, due: _Due) -> Kind:
        if self.metric_of is not None:
            return Kind.TORCH
        kind = kernels.kind_of(due.layout)
        if kind is not Kind.GPU:
            return kind
        # One program takes one group. Where gradients are masked before every step, the host must hear of deaths at once.
        if due.is_one_group or (not self.revive and any(piece.absorber is not None for piece in due.layer.readers)):
            return Kind.TORCH
        cleared = [] if self.revive else self._cleared_with(due.layer)
        alike = all(layout.parts is not None and (layout.dtype, layout.device) == (due.layout.dtype, due.layout.device) for layout in cleared)
        return kind if alike else Kind.TORCH

    def _on_device_(self, dues: Sequence[_Due]) -> None:
        from dist_gsl.kernels import gpu

        dues = sorted(dues, key=lambda due: due.layer.name)  # layers of several buckets come in any order
        names = tuple(due.layer.name for due in dues)
        shrink = self._shrinks.get(names)
        if shrink is None or not _are_same(shrink.layouts, [due.layout for due in dues]):
            shrink = self._shrinks[names] = gpu.Shrink([due.layout for due in dues])
        shrink(cuts=[due.cut for due in dues], thresholds=[due.threshold for due in dues])
        self._launched[names] = shrink, dues

    def _clear_on_devices_(self, launched: Mapping[tuple[str, ...], tuple[gpu.Shrink, list[_Due]]]) -> None:
        """The second launch, one for all layers of a type and device."""
        together: dict[tuple[torch.dtype, torch.device], list[tuple[str, ...]]] = {}
        for names in sorted(launched):  # threads end in any order
            shrink = launched[names][0]
            together.setdefault((shrink.dtype, shrink.device), []).append(names)
        for keys in together.values():
            shrinks = [launched[names][0] for names in keys]
            dues = [due for names in keys for due in launched[names][1]]
            also = [[] if self.revive else self._cleared_with(due.layer) for due in dues]
            alive = [self._alive_on_device(due) for due in dues]
            clear = self._clears.get(tuple(keys))
            is_known = clear is not None and _are_same(
                [*clear.shrinks, *clear.alive, *(layout for layouts in clear.also for layout in layouts)],
                [*shrinks, *alive, *(layout for layouts in also for layout in layouts)],
            )
            if clear is None or not is_known:
                from dist_gsl.kernels import gpu

                clear = self._clears[tuple(keys)] = gpu.Clear(
                    shrinks, also=also, min_alive=[due.min_alive for due in dues], alive=alive, for_good=not self.revive
                )
            clear()
            versions = [due.layer.mask_version for due in dues]
            self._unheard = [each for each in self._unheard if each[0] is not clear] + [(clear, dues, versions)]
            for due in dues:
                due.layer.ask_first(self._hear)

    def _alive_on_device(self, due: _Due) -> Tensor:
        layer = due.layer
        known = self._alive.get(layer.name)
        if known is None or known[0] != layer.mask_version:
            known = self._alive[layer.name] = layer.mask_version, layer.mask.to(torch.uint8).to(due.layout.device)
        return known[1]

    def _cleared_with(self, layer: NeuronLayer) -> list[Layout]:
        """What a death of the layer's neurons clears besides their own parameters."""
        known = self._cleared.get(layer.name)
        if known is not None and layer.name in self._looked_at:
            return known[1]
        key = self._generation + self.neurons.num_copies  # both only grow
        if known is None or known[0] != key or not all(layout.is_current() for layout in known[1]):
            rows = [
                piece.of(tensors[piece.tensor])
                for is_model, tensors in self.neurons.everywhere()
                for piece in (layer.readers if is_model else (*layer.producers, *layer.readers))
                if piece.tensor in tensors
            ]
            known = self._cleared[layer.name] = key, [Layout([each], layer.num_neurons) for each in rows]
        self._looked_at.add(layer.name)
        return known[1]

    def _hear(self) -> None:
        """What the device knows of deaths and the host does not; waits for it.

        What died is zero on the device already, and what a branch without neurons leaves without readers adds nothing to any gradient: so this
        may come between forward and backward, which must not take it for a change.
        """
        heard, self._unheard = self._unheard, []
        for layer in self.neurons:
            layer.ask_first(None)
        model = self.neurons.model
        try:
            with torch.autograd._unsafe_preserve_version_counter((*model.parameters(), *model.buffers())):
                forced = [due for clear, dues, versions in heard for due in self._heard_of(clear, dues, versions)]
        except BaseException:  # it is all there still, for who asks again
            self._unheard = heard + self._unheard
            for _, dues, _ in heard:
                for due in dues:
                    due.layer.ask_first(self._hear)
            raise
        for due in forced:
            self._warn_of_force(due.layer.name, due.beta)

    def _heard_of(self, clear: gpu.Clear, dues: Sequence[_Due], versions: Sequence[int]) -> list[_Due]:
        """Takes over who is dead. Returns of which layers neurons were kept by force."""
        forced = []
        for due, version, (mask, is_forced) in zip(dues, versions, clear.heard(), strict=True):
            layer = due.layer
            if is_forced:
                forced.append(due)
            if layer.mask_version != version:  # somebody assigned another one
                continue
            if self.revive:
                layer.mask[:] = mask
            elif bool((layer.mask & ~mask).any()):
                self.neurons.zero_({layer.name: (layer.mask & ~mask).nonzero().flatten()})
        return forced

    def _warn_of_force(self, name: str, beta: float) -> None:
        if name not in self.warned:
            self.warned.add(name)
            warnings.warn(
                f"layer {name!r}: beta {beta:.4g} would kill every neuron; the strongest "
                f"stay, {self.min_alive} in all (min_alive). Lower beta for this layer or start it later",
                stacklevel=2,
            )


def _are_same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
