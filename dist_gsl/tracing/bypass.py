"""Which layers may lose all of their neurons: those that a way from the input to the output leads around. Imports torch alone."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from dist_gsl.neurons import NeuronLayer
from dist_gsl.tracing.following import Attention
from dist_gsl.tracing.labels import NONE
from dist_gsl.tracing.tracer import Tracer, has_tensor


def with_bypasses(trace: Tracer, layers: list[NeuronLayer]) -> list[NeuronLayer]:
    """The layers, `bypassed` set where all of them together may vanish and every output still depends on the input.

    In forward order, each that may go beside those before it: of branches that run side by side without a shortcut, the last one stays.
    """
    owner = torch.full((trace.atoms.count,), -1)  # the layer that an atom belongs to
    for number, layer in enumerate(layers):
        for piece in layer.producers:
            owner[trace.atoms.places[piece.tensor, piece.dim][piece.index]] = number
    inside = {
        node: Inside(_owners(owner, attention.query_key), _owners(owner, attention.value), attention)
        for node, attention in trace.attentions.items()
    }
    layers = _with_partners(layers, inside)
    made_of = {node: _layers_in(trace, node, owner) for node in trace.graph.graph.nodes}
    gone: set[int] = set()
    for number, layer in enumerate(layers):
        if layer.pinned is None and _reaches(trace, made_of, inside, gone | {number}):
            gone.add(number)
    return [replace(layer, bypassed=number in gone) for number, layer in enumerate(layers)]


@dataclass(frozen=True)
class Inside:
    """The layers inside of a call of attention."""

    query_key: set[int]
    value: set[int]
    attention: Attention

    def live_parts(self, gone: set[int], live: set[fx.Node]) -> tuple[bool, bool]:
        """Whether what it gives, and its weights, depend on the input."""
        weights = not self.query_key <= gone and (self.attention.query in live or self.attention.key in live)
        return not self.value <= gone and (weights or self.attention.values in live), weights


def _owners(owner: Tensor, atoms: Tensor) -> set[int]:
    return set(torch.unique(owner[atoms]).tolist())


def _with_partners(layers: list[NeuronLayer], inside: dict[fx.Node, Inside]) -> list[NeuronLayer]:
    """Queries and keys are read by values, unless the network takes the weights of attention for something else."""
    partners: dict[int, set[int] | None] = {}
    for node, each in inside.items():
        for number in each.query_key:
            before = partners.get(number, set())
            partners[number] = before | each.value if before is not None and all(_part(user) == 0 for user in node.users) else None
    return [
        replace(layer, partners=tuple(layers[n].name for n in sorted(partners.get(number) or ()))) for number, layer in enumerate(layers)
    ]


def _part(node: fx.Node) -> int | None:
    """Which part of a tuple it takes."""
    return node.args[1] if node.target is operator.getitem and isinstance(node.args[1], int) else None


def _is_dead_part(node: fx.Node, inside: dict[fx.Node, Inside], gone: set[int], live: set[fx.Node]) -> bool:
    """Whether it takes something of attention that does not depend on the input."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source not in inside:
        return False
    parts = inside[source].live_parts(gone, live)
    which = _part(node)
    return not parts[which] if which in (0, 1) else not all(parts)


def _layers_in(trace: Tracer, node: fx.Node, owner: Tensor) -> set[int] | None:
    """The layers whose neurons make up what a node gives; None if other values are part of it."""
    value = trace.values.get(node)
    if value is None:
        return None
    labels = torch.cat([torch.unique(part.labels) for part in (value if isinstance(value, list) else [value])])
    return None if bool((labels == NONE).any()) else set(torch.unique(owner[labels]).tolist())


def _reaches(trace: Tracer, made_of: dict[fx.Node, set[int] | None], inside: dict[fx.Node, Inside], gone: set[int]) -> bool:
    """Whether every output depends on the input where the layers `gone` have no neuron."""
    live: set[fx.Node] = set()
    for node in trace.graph.graph.nodes:
        if node.op == "placeholder":
            live.add(node)
        elif node.op == "output":
            return all(source in live for source in node.all_input_nodes)
        elif has_tensor(trace.results[node]) and any(source in live for source in node.all_input_nodes):
            layers = made_of[node]
            if _is_dead_part(node, inside, gone, live):
                continue
            if layers is None or not layers <= gone:
                live.add(node)
    return False
