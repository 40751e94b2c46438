"""What moves channels and changes none: shapes, slices, concatenation. Imports torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dist_gsl.tracing.following import Following
from dist_gsl.tracing.labels import NONE, Value, thin


class Moving(Following):
    def _move(self, node: fx.Node, operation: Callable[[Tensor], Any]) -> None:
        source = self._value(node.args[0])
        if source is None:
            return
        moved = source.moved(self._shape(node.all_input_nodes[0]), operation)
        if any(not torch.equal(*torch.broadcast_tensors(part.labels, moved[0].labels)) for part in moved[1:]):
            self.atoms.pin(source.labels, f"taken apart by {node.name}")
        if node.target in (torch.squeeze, "squeeze") and len(node.args) == 1 and not node.kwargs:
            self.atoms.pin(source.labels, f"read by {node.name}, which takes a single channel for none")
        self.values[node] = moved[0] if isinstance(self.results[node], Tensor) else moved
        if isinstance(self.results[node], Tensor) and 0 in moved[0].varying:
            self.atoms.pin(moved[0].labels, f"flattened together with what comes before it ({node.name})")

    def _reshape(self, node: fx.Node, operation: Callable[..., Any], what: str) -> None:
        source = self._value(node.args[0])
        if source is None or node.kwargs:
            self._pin_inputs(node, f"read by {what}")
            return
        given: Any = node.args[1:]
        if len(given) == 1 and isinstance(given[0], (list, tuple)):
            given = given[0]
        sizes = self._plain(given)
        out_shape = self._shape(node)
        shape = self._shape(node.all_input_nodes[0])
        method = torch.Tensor.reshape if operation in (Tensor.view, Tensor.reshape, torch.reshape) else operation
        [moved] = source.moved(shape, lambda t: method(t, *sizes) if operation is not torch.reshape else t.reshape(*sizes))
        if operation in (torch.unflatten, Tensor.unflatten):
            self.atoms.pin(source.labels, f"read by {what}")
            return
        for dim in moved.varying:
            if dim < len(given) and isinstance(given[dim], int) and given[dim] != -1:  # a size that will not change
                if len(moved.varying) == 1:
                    self.atoms.pin(moved.labels, f"read by {what}, which fixes their number to {out_shape[dim]}")
                else:
                    self.atoms.tie(moved.labels, moved.labels.narrow(dim, 0, 1))
        if 0 in moved.varying:
            self.atoms.pin(moved.labels, f"flattened together with what comes before it ({node.name})")
        self.values[node] = moved

    def _chunk(self, node: fx.Node, operation: Callable[..., Any], what: str) -> None:
        source = self._value(node.args[0])
        if source is None:
            return
        moved = source.moved(
            self._shape(node.all_input_nodes[0]), lambda t: operation(t, *self._plain(node.args[1:]), **self._plain(node.kwargs))
        )
        shapes = {tuple(r.shape) for r in self.results[node]}
        if len(shapes) != 1:
            self.atoms.pin(source.labels, f"read by {what} into unequal parts")
        for part in moved[1:]:  # parts stay equal if the same position goes from each
            if any(a != b for a, b in zip(part.labels.shape, moved[0].labels.shape, strict=True)):
                self.atoms.pin(source.labels, f"read by {what}")
                break
            self.atoms.tie(part.labels, moved[0].labels)
        self.values[node] = moved

    def _split(self, node: fx.Node, operation: Callable[..., Any], what: str) -> None:
        source = self._value(node.args[0])
        if source is None:
            return
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        rank = len(self._shape(node.all_input_nodes[0]))
        if not isinstance(dim, int) or dim % rank in source.varying:
            self.atoms.pin(source.labels, f"read by {what}, which fixes the sizes of its parts")
        self.values[node] = source.moved(
            self._shape(node.all_input_nodes[0]), lambda t: operation(t, *self._plain(node.args[1:]), **self._plain(node.kwargs))
        )

    def _cat(self, node: fx.Node, what: str) -> None:
        parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        rank = len(self._shape(node))
        labels, dead, cause = [], [], ""
        if not isinstance(dim, int) or not isinstance(parts, (list, tuple)):
            self._pin_inputs(node, f"read by {what}")
            return
        for part in parts:
            value, shape = self._value(part), self._shape(part)
            if value is None:
                labels.append(torch.full([1] * rank, NONE).expand(shape))
                dead.append(torch.zeros([1] * rank, dtype=torch.float64).expand(shape))
            else:
                labels.append(value.labels.expand(shape))
                dead.append(value.dead.expand(shape))
                cause = cause or value.cause
        keep = [d for d in range(rank) if d != dim % rank]
        for part in labels[1:]:  # along other dimensions all parts keep the same
            for each, other in ((part, labels[0]), (labels[0], part)):
                if any(each.stride(d) != 0 and each.shape[d] > 1 for d in keep):
                    front, other_front = each.narrow(dim, 0, 1), other.narrow(dim, 0, 1)
                    self.atoms.tie(front, other_front)
                    self.atoms.tie(each, front)
                    self.atoms.pin(front[(front == NONE) != (other_front == NONE)], f"read by {what} with other values")
                    self.atoms.pin(other_front[(front == NONE) != (other_front == NONE)], f"read by {what} with other values")

        def joined(tensors: list[Tensor]) -> Tensor:
            for d in keep:  # dimensions along which none varies
                if all(t.stride(d) == 0 or t.shape[d] == 1 for t in tensors):
                    tensors = [t.narrow(d, 0, 1) for t in tensors]
            return thin(torch.cat(tensors, dim))

        value = Value(joined(labels), joined(dead), cause)
        if dim % rank == 0:
            self.atoms.pin(value.labels, f"read by {what}")
        self.values[node] = value

    def _getitem(self, node: fx.Node, what: str) -> None:
        container, index = node.args[0], node.args[1]
        value = self.values.get(container) if isinstance(container, fx.Node) else None
        if isinstance(value, list):
            self.values[node] = value[self._plain(index)]
            return
        if value is None:
            return
        plain = self._plain(index)
        indices = plain if isinstance(plain, tuple) else (plain,)
        if any(not isinstance(i, (int, slice, type(None), type(Ellipsis))) for i in indices):
            self.atoms.pin(value.labels, f"read by {what}")
            return
        shape = self._shape(node.all_input_nodes[0])
        [moved] = value.moved(shape, lambda t: t[plain])
        if moved.labels.numel() != thin(value.labels).numel():  # which are taken depends on how many there are
            self.atoms.pin(value.labels, f"read by {what} in part")
        self.values[node] = moved
