"""Labels: which neuron each element of an activation belongs to, and what it is when that neuron is dead.

Every position along a dimension of a parameter is an atom; atoms that must go together are one neuron. An activation carries for each
element the atom it belongs to (`NONE`: to none) and its value when the whole neuron is zero. Both are the same along most dimensions,
where they are kept once (stride 0), so that following a network costs next to nothing. Imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NONE = -1


def thin(tensor: Tensor) -> Tensor:
    """The same values, dimensions along which nothing changes cut to one position."""
    for dim, size in enumerate(tensor.shape):
        if size > 1 and (tensor.stride(dim) == 0 or bool((tensor == tensor.narrow(dim, 0, 1)).all())):
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


@dataclass(frozen=True)
class Value:
    """An activation: both tensors can be broadcast to its shape, and vary only where they must."""

    labels: Tensor
    """int64: the atom of each element."""
    dead: Tensor
    """float64: the element where its neuron is dead."""
    cause: str = ""
    """What made `dead` other than zero."""

    @property
    def has_neurons(self) -> bool:
        return bool((self.labels != NONE).any())

    @property
    def varying(self) -> list[int]:
        """Dimensions along which the labels vary."""
        return [dim for dim, size in enumerate(self.labels.shape) if size > 1]

    def vector(self, dim: int, size: int) -> Tensor | None:
        """The label of each position along `dim`, (size,), where it depends on that position alone."""
        if any(other != dim for other in self.varying):
            return None
        labels = self.labels.movedim(dim, 0).reshape(self.labels.shape[dim], -1)[:, 0]
        return labels.expand(size)

    def moved(self, shape: tuple[int, ...], operation: Callable[[Tensor], Any]) -> list[Value]:
        """What an operation that only moves elements makes of an activation of this shape, one for each of its results."""
        labels, dead = operation(self.labels.expand(shape)), operation(self.dead.expand(shape))
        if isinstance(labels, Tensor):
            labels, dead = [labels], [dead]
        return [Value(thin(a), thin(b), self.cause) for a, b in zip(labels, dead, strict=True)]


class Atoms:
    """Atoms, each a position along a dimension of a tensor, and which of them go together."""

    def __init__(self) -> None:
        self.places: dict[tuple[str, int], Tensor] = {}
        """The atoms of a tensor's dimension, in its order."""
        self.count = 0
        self._edges: list[Tensor] = []
        self.pins: list[tuple[Tensor, str]] = []

    def of(self, tensor: str, dim: int, size: int) -> Tensor:
        """The atoms of a dimension, new ones where it has none yet."""
        if (tensor, dim) not in self.places:
            self.places[tensor, dim] = torch.arange(self.count, self.count + size)
            self.count += size
        return self.places[tensor, dim]

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Element by element; those of no neuron tie nothing."""
        a, b = torch.broadcast_tensors(a, b)
        both = (a != NONE) & (b != NONE) & (a != b)
        if bool(both.any()):
            self._edges.append(torch.unique(torch.stack([a[both], b[both]]), dim=1))

    def pin(self, labels: Tensor, reason: str) -> None:
        atoms = torch.unique(labels[labels != NONE])
        if len(atoms):
            self.pins.append((atoms, reason))

    def classes(self) -> Tensor:
        """For each atom the smallest one that goes together with it."""
        root = torch.arange(self.count)
        if not self._edges:
            return root
        a, b = torch.cat(self._edges, dim=1)
        while True:
            low = torch.minimum(root[a], root[b])
            smaller = root.clone()
            for end in (a, b):
                smaller.scatter_reduce_(0, root[end], low, "amin")
                smaller.scatter_reduce_(0, end, low, "amin")
            smaller = smaller[smaller]
            if torch.equal(smaller, root):
                return root
            root = smaller
