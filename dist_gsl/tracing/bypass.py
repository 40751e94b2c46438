"""Which layers may lose all of their neurons: those that a way from the input to the output leads around. Imports torch alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from dist_gsl.neurons import NeuronLayer
from dist_gsl.tracing.tracer import Tracer


def with_bypasses(trace: Tracer, layers: list[NeuronLayer]) -> list[NeuronLayer]:
    """The layers, `bypassed` set where all of them together may vanish and every output still depends on the input.

    In forward order, each that may go beside those before it: of branches that run side by side without a shortcut, the last one stays.
    """
    makers: dict[tuple[str, int], set[str]] = {}
    for layer in layers:
        for piece in layer.producers:
            makers.setdefault((piece.tensor, piece.dim), set()).add(layer.name)
    gone: set[str] = set()
    for layer in layers:
        if layer.pinned is None and _reaches(trace, makers, gone | {layer.name}):
            gone.add(layer.name)
    return [replace(layer, bypassed=layer.name in gone) for layer in layers]


def _reaches(trace: Tracer, makers: dict[tuple[str, int], set[str]], gone: Iterable[str]) -> bool:
    """Whether every output depends on the input where the layers `gone` have no neuron."""
    gone = set(gone)
    live: set[fx.Node] = set()
    for node in trace.graph.graph.nodes:
        if node.op == "placeholder":
            live.add(node)
        elif node.op == "output":
            return all(source in live for source in node.all_input_nodes)
        elif any(source in live for source in node.all_input_nodes):
            owners = trace.owners.get(node)
            if owners is None or not all(makers.get(place, {""}) <= gone for place in owners):
                live.add(node)
    return False
