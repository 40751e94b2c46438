"""Element by element, sums and products, pooling and means. Imports torch alone."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dist_gsl.tracing import operations as ops
from dist_gsl.tracing.following import Following, attribute, evaluated, has_finite_slope, line
from dist_gsl.tracing.labels import NONE, Value, thin

OUT_OF_PLACE: dict[Any, Any] = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul, operator.itruediv: operator.truediv}


class Arithmetic(Following):
    def _elementwise(self, node: fx.Node, operation: Callable[..., Any], what: str, *, in_place: bool) -> None:
        source = self._value(node.args[0])
        if source is None or len(node.all_input_nodes) > 1:
            self._pin_inputs(node, f"read by {what} with other values")
            return
        rest = self._plain(node.args[1:]) if node.op != "call_module" else ()
        if not has_finite_slope(operation, source.dead, *rest):
            self.atoms.pin(source.labels, f"read by {what}, whose slope at what the dead give is not finite")
        dead = evaluated(operation, source.dead, *rest)
        self._set(node, Value(source.labels, dead, source.cause if torch.equal(dead, source.dead) else what), in_place=in_place)

    def _dropout_module(self, node: fx.Node, name: str, module: nn.Module) -> None:
        """Which neurons each position is, where that depends on one dimension alone and nobody else calls the module."""
        source = self._value(node.args[0])
        if source is None or len(source.varying) > 1 or sum(other.target == node.target for other in self.graph.graph.nodes) > 1:
            return
        dim = source.varying[0] if source.varying else 1
        labels = source.vector(dim, self._shape(node)[dim])
        if labels is not None:
            self.draws.append((name, dim, labels))

    def _dropout(self, node: fx.Node, what: str) -> None:
        """Nothing in evaluation; where it is always on, a constant would be dropped at random too."""
        source = self._value(node.args[0])
        if source is None:
            return
        options = dict(zip(("p", "training", "inplace"), node.args[1:], strict=False)) | node.kwargs
        if bool((source.dead != 0).any()) and options.get("training", True):
            self.atoms.pin(source.labels, f"read by {source.cause}, and then by {what}, which is always on")
        self._set(node, source, in_place=bool(options.get("inplace", False)))

    def _binary(self, node: fx.Node, operation: Callable[..., Any], what: str, *, is_sum: bool, in_place: bool) -> None:
        if len(node.args) != 2 or node.kwargs:
            self._pin_inputs(node, f"read by {what}")
            return
        operation = OUT_OF_PLACE.get(operation, operation)
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or not all(isinstance(self.results[n], Tensor) for n in (a, b)):
            # With a number.
            source = next(v for v in (self._value(a), self._value(b)) if v is not None)
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):  # a number from shapes: it may be the number of channels
                self.atoms.pin(source.labels, f"read by {what} with a number that the network computes")
            plain = [source.dead if self._value(x) is source else self._plain(x) for x in (a, b)]
            dead = operation(*plain).to(torch.float64)
            self._set(node, Value(source.labels, dead, source.cause if torch.equal(dead, source.dead) else what), in_place=in_place)
            return
        x, y = self._value(a), self._value(b)
        shape = self._shape(node)
        if x is None or y is None:
            known, other = (x, b) if x is not None else (y, a)
            assert known is not None
            self._with_foreign(node, operation, known, other, what, is_sum=is_sum, in_place=in_place)
            return
        rank = len(shape)
        left, right = (_aligned(v, rank) for v in (x, y))
        labels_a, labels_b = torch.broadcast_tensors(left.labels, right.labels)
        foreign = (labels_a == NONE) != (labels_b == NONE)
        if bool(foreign.any()):
            for each in (labels_a, labels_b):
                self.atoms.pin(each[foreign], f"{'added to' if is_sum else 'multiplied by'} values that belong to no neuron ({node.name})")
        self.atoms.tie(labels_a, labels_b)
        dead = operation(left.dead, right.dead)
        cause = left.cause or right.cause
        self._set(node, Value(thin(torch.maximum(labels_a, labels_b)), thin(dead), cause), in_place=in_place)

    def _with_foreign(
        self, node: fx.Node, operation: Callable[..., Any], known: Value, other: fx.Node, what: str, *, is_sum: bool, in_place: bool
    ) -> None:
        """A sum or product with a value of no neuron: a parameter's elements become part of the neurons."""
        rank, shape = len(self._shape(node)), self._shape(other)
        is_first = self._value(node.args[0]) is known
        known = _aligned(known, rank)
        varying = known.varying
        tensor = self.names.get(id(attribute(self.model, str(other.target)))) if other.op == "get_attr" else None
        if tensor is not None and len(varying) == 1 and isinstance(attribute(self.model, str(other.target)), nn.Parameter):
            dim = varying[0] - rank + len(shape)
            if 0 <= dim < len(shape) and shape[dim] == known.labels.shape[varying[0]]:
                labels = known.labels.flatten()
                self.atoms.tie(self.atoms.of(tensor, dim, shape[dim]), labels)
                self.understood.add((other, node))
                zero = torch.zeros((), dtype=torch.float64)  # the parameter's entry, which dies with the neuron
                dead = operation(known.dead, zero) if is_first else operation(zero.expand_as(known.dead), known.dead)
                self._set(node, Value(known.labels, dead, known.cause), in_place=in_place)
                return
        is_divisor = node.target in ops.QUOTIENTS and not is_first
        if not is_sum and not is_divisor and all(_size_at(shape, dim, rank) == 1 for dim in varying) and not bool((known.dead != 0).any()):
            self._set(node, known, in_place=in_place)  # zero times anything
            return
        self.atoms.pin(known.labels, f"read by {what} with other values")

    def _spatial(self, node: fx.Node, num_dims: int, operation: Callable[..., Any], what: str, *, resamples: bool = False) -> None:
        source = self._value(node.args[0])
        if source is None:
            return
        if not isinstance(self.results[node], Tensor):
            self.atoms.pin(source.labels, f"read by {what}, which gives indices too")
            return
        shape = self._shape(node.all_input_nodes[0])
        if any(dim >= len(shape) - num_dims for dim in source.varying):
            self.atoms.pin(source.labels, f"pooled over its own dimension ({node.name})")
            return
        dead = source.dead
        if resamples and any(dead.shape[dim] > 1 for dim in range(len(shape) - num_dims, dead.dim())):
            self.atoms.pin(source.labels, f"read by {source.cause}, not the same everywhere, and then by {what}")
            return
        if bool((dead != 0).any()):  # padding may make the rim another value
            dead = thin(evaluated(operation, dead.expand(*dead.shape[: len(shape) - num_dims], *shape[len(shape) - num_dims :])))
        self.values[node] = Value(source.labels, dead, source.cause)

    def _reduced(self, node: fx.Node, operation: Callable[..., Any], what: str) -> None:
        """A mean over positions is a pooling; over channels it mixes them."""
        source = self._value(node.args[0])
        if source is None:
            return
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        shape = self._shape(node.all_input_nodes[0])
        rank = len(shape)
        given = [dims] if isinstance(dims, int) else dims
        reduced = [d % rank for d in given] if isinstance(given, (list, tuple)) else None
        if reduced is None or 0 in reduced or any(d in source.varying for d in reduced):
            self.atoms.pin(source.labels, f"read by {what} over other dimensions{line(node)}")
            return
        dead = source.dead.expand([shape[d] if d in reduced else extent for d, extent in enumerate(source.dead.shape)])
        labels, dead = source.labels, thin(evaluated(lambda t: operation(t, *self._plain(node.args[1:]), **self._plain(node.kwargs)), dead))
        if len(self._shape(node)) < rank:
            for d in sorted(reduced, reverse=True):
                labels = labels.squeeze(d)
        self.values[node] = Value(labels, dead, source.cause or what)


def _aligned(value: Value, rank: int) -> Value:
    missing = (1,) * (rank - value.labels.dim())
    return Value(value.labels.reshape(*missing, *value.labels.shape), value.dead.reshape(*missing, *value.dead.shape), value.cause)


def _size_at(shape: tuple[int, ...], dim: int, rank: int) -> int:
    place = dim - rank + len(shape)
    return shape[place] if place >= 0 else 1
