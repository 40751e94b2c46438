"""From atoms to layers: neurons that own as many positions of the same tensors, and share their fate, are a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from dist_gsl.neurons import Draw, NeuronLayer, Slice
from dist_gsl.tracing.labels import NONE
from dist_gsl.tracing.tracer import Tracer


def layers_of(trace: Tracer, parameters: Mapping[str, Tensor]) -> list[NeuronLayer]:
    """The layers of a traced network in forward order, pinned ones with the reason."""
    root = trace.atoms.classes()
    reasons: list[str | None] = [None]
    pinned = torch.zeros(len(root), dtype=torch.int64)  # the number of a reason
    for atoms, reason in trace.atoms.pins:
        mine = torch.unique(root[atoms])
        reasons.append(reason)
        pinned[mine] = torch.where(pinned[mine] == 0, len(reasons) - 1, pinned[mine])
    places = [
        *(("producer", tensor, dim, atoms) for (tensor, dim), atoms in trace.atoms.places.items()),
        *(("buffer", tensor, 0, labels) for tensor, labels in trace.buffers),
        *(("reader", tensor, dim, labels) for (tensor, dim), labels in trace.readers.items()),
    ]
    # What a class owns, as a number that is the same for those that own as much of the same places.
    owned = pinned.clone()
    pieces: list[tuple[Tensor, Tensor, Tensor]] = []  # of a place: classes, their counts, positions in the order of the classes
    numbers: dict[tuple[int, int, int], int] = {}
    came_from: dict[int, tuple[int, int]] = {}
    for number, (_, _, _, labels) in enumerate(places):
        positions = (labels != NONE).nonzero().flatten()
        of = root[labels[positions]]
        order = torch.argsort(of, stable=True)
        classes, counts = torch.unique_consecutive(of[order], return_counts=True)
        pieces.append((classes, counts, positions[order]))
        pairs, which = torch.unique(torch.stack([owned[classes], counts]), dim=1, return_inverse=True)
        new = [numbers.setdefault((number, *pair), len(reasons) + len(numbers)) for pair in pairs.T.tolist()]
        came_from.update((to, (pair[0], number)) for to, pair in zip(new, pairs.T.tolist(), strict=True))
        owned[classes] = torch.tensor(new, dtype=torch.int64)[which]
    names: Counter[str] = Counter()
    titles = {int(member): title for atoms, title in reversed(trace.titles) for member in torch.unique(root[atoms])}
    read_inside = torch.zeros(len(root), dtype=torch.bool)
    for atoms in trace.read_inside:
        read_inside[root[atoms]] = True
    found = []
    of_each = {module: torch.where(labels == NONE, NONE, root[labels]) for module, _, labels in trace.draws}
    roots = torch.unique(root)
    kinds, first = _first_of_each(owned[roots])
    for kind in kinds[torch.argsort(first)].tolist():
        members = roots[owned[roots] == kind]
        slices: dict[str, list[Slice]] = {"producer": [], "buffer": [], "reader": []}
        mine = []
        while kind in came_from:
            kind, number = came_from[kind]
            mine.append(number)
        for number in reversed(mine):
            (role, tensor, dim, _), (classes, counts, positions) = places[number], pieces[number]
            at = torch.searchsorted(classes, members)
            starts = torch.cumsum(counts, 0) - counts
            index = positions[starts[at].unsqueeze(1) + torch.arange(int(counts[at[0]]))]
            constants, absorber = trace.constants.get((tensor, dim), (None, None))
            taken = constants is not None and bool(constants[index].any())
            slices[role].append(Slice(tensor, dim, index, constants[index], absorber) if role == "reader" and taken and constants is not None
                                else Slice(tensor, dim, index))
        draws = []
        for module, dim, labels in trace.draws:
            at = torch.searchsorted(members, of_each[module]).clamp(max=len(members) - 1)
            positions = (members[at] == of_each[module]).nonzero().flatten()
            counts = torch.bincount(at[positions], minlength=len(members))
            if len(positions) and bool((counts == counts[0]).all()):
                order = torch.argsort(at[positions], stable=True)
                draws.append(Draw(module, dim, len(labels), positions[order].view(len(members), -1)))
        owner = next((piece.tensor for piece in slices["producer"] if piece.tensor in trace.kinds), slices["producer"][0].tensor)
        name = titles.get(int(members[0])) or owner.rpartition(".")[0] or owner
        names[name] += 1
        size = sum(
            parameters[piece.tensor].numel() // parameters[piece.tensor].shape[piece.dim] * piece.index.shape[1] for piece in slices["producer"]
        )
        found.append(
            NeuronLayer(
                name=name if names[name] == 1 else f"{name}#{names[name]}", kind=trace.kinds.get(owner, "conv"),
                producers=tuple(slices["producer"]), buffers=tuple(slices["buffer"]), readers=tuple(slices["reader"]),
                draws=tuple(draws), group_size=size,
                starting_neurons=len(members), indices=torch.arange(len(members)), mask=torch.ones(len(members), dtype=torch.bool),
                pinned=reasons[int(pinned[members[0]])] or (None if slices["reader"] or read_inside[members].all() else "nothing reads it"),
            )
        )  # fmt: skip
    return found


def _first_of_each(values: Tensor) -> tuple[Tensor, Tensor]:
    """The different values and where each is first."""
    kinds, which = torch.unique(values, return_inverse=True)
    first = torch.full((len(kinds),), len(values)).scatter_reduce_(0, which, torch.arange(len(values)), "amin")
    return kinds, first
