"""Which layers may lose all of their neurons: those that a way from the input to the output leads around. Imports torch alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from dist_gsl.neurons import NeuronLayer
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
    inside = {node: set(torch.unique(owner[atoms]).tolist()) for node, atoms in trace.passes.items()}
    made_of = {node: _layers_in(trace, node, owner) for node in trace.graph.graph.nodes}
    gone: set[int] = set()
    for number, layer in enumerate(layers):
        if layer.pinned is None and _reaches(trace, made_of, inside, gone | {number}):
            gone.add(number)
    return [replace(layer, bypassed=number in gone) for number, layer in enumerate(layers)]


def _layers_in(trace: Tracer, node: fx.Node, owner: Tensor) -> set[int] | None:
    """The layers whose neurons make up what a node gives; None if other values are part of it."""
    value = trace.values.get(node)
    if value is None:
        return None
    labels = torch.cat([torch.unique(part.labels) for part in (value if isinstance(value, list) else [value])])
    return None if bool((labels == NONE).any()) else set(torch.unique(owner[labels]).tolist())


def _reaches(trace: Tracer, made_of: dict[fx.Node, set[int] | None], inside: dict[fx.Node, set[int]], gone: set[int]) -> bool:
    """Whether every output depends on the input where the layers `gone` have no neuron."""
    live: set[fx.Node] = set()
    for node in trace.graph.graph.nodes:
        if node.op == "placeholder":
            live.add(node)
        elif node.op == "output":
            return all(source in live for source in node.all_input_nodes)
        elif has_tensor(trace.results[node]) and any(source in live for source in node.all_input_nodes):
            layers = made_of[node]
            is_cut = node in inside and inside[node] <= gone
            if not is_cut and (layers is None or not layers <= gone):
                live.add(node)
    return False
