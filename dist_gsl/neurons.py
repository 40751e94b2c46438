"""Neurons: which slices of which parameters make up one, which of them are alive, and killing them for good.

A neuron is all the slices of all the parameters that produce one channel (filter, bias, BatchNorm scale and shift).
Its readers are the slices of later parameters that multiply its output. Imports torch alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from dist_gsl.kernels import Rows

OUTPUTS = "its neurons are the network's outputs"
"""Why the last layer is pinned."""


class Absorber(NamedTuple):
    """What takes up f(0) times the weights that read it when a neuron dies: a bias, or a BatchNorm's running mean."""

    tensor: str
    sign: int
    """1: added (bias), -1: subtracted (running mean)."""


@dataclass(frozen=True)
class Slice:
    """What the neurons of a layer own of one tensor: neuron n owns the positions `index[n]` along dimension `dim`."""

    tensor: str
    """Name of the parameter or buffer in the model."""
    dim: int
    index: Tensor
    """int64 (num_neurons, k): k = 1 for a filter, height x width for what reads a flattened feature map."""
    constant: Tensor | None = None
    """float64, as `index`: what a reader's position multiplies when the neuron is dead, f(0); None: 0."""
    absorber: Absorber | None = None
    """Where `constant` goes when the neuron dies."""
    is_block: bool = field(init=False)
    """The positions are one contiguous run in neuron order, so that rows() is a view."""

    def __post_init__(self) -> None:
        flat = self.index.flatten()
        run = len(flat) > 0 and bool((flat == torch.arange(len(flat)) + flat[0]).all())
        object.__setattr__(self, "is_block", run)

    @classmethod
    def block(cls, tensor: str, dim: int, num_neurons: int, *, size: int = 1, start: int = 0) -> Slice:
        return cls(tensor, dim, torch.arange(start, start + num_neurons * size).view(num_neurons, size))

    def rows(self, tensor: Tensor) -> Tensor:
        """(num_neurons, k, ...) in neuron order; a view of `tensor` where `is_block`, else a copy."""
        front = tensor.movedim(self.dim, 0)
        if self.is_block:
            block = front.narrow(0, int(self.index[0, 0]), self.index.numel())
        else:
            block = front.index_select(0, self.index.flatten().to(tensor.device))
        return block if self.index.shape[1] == 1 else block.unflatten(0, tuple(self.index.shape))

    def of(self, tensor: Tensor) -> Rows:
        """The same of a tensor, as the kernels take it."""
        return Rows(tensor, self.dim, self.index, self.is_block)

    def write_(self, tensor: Tensor, rows: Tensor) -> None:
        """Writes back rows that were a copy."""
        if not self.is_block:
            flat = rows if self.index.shape[1] == 1 else rows.flatten(0, 1)
            tensor.movedim(self.dim, 0).index_copy_(0, self.index.flatten().to(tensor.device), flat)

    def absorb_(self, tensor: Tensor, absorber: Tensor, neurons: Tensor) -> None:
        """Adds what the given neurons (int64 indices) give when they are dead to what takes it up; `clear_` comes after."""
        assert self.constant is not None
        assert self.absorber is not None
        which = self.index[neurons.cpu()].flatten().to(tensor.device)
        read = tensor.movedim(self.dim, 0).index_select(0, which).double()  # (neurons k, outputs, positions of the filter)
        constant = self.constant[neurons.cpu()].flatten().to(tensor.device)
        given = (read.flatten(2).sum(2) if read.dim() > 2 else read) * constant.unsqueeze(1)
        absorber.copy_(absorber.double() + self.absorber.sign * given.sum(0))

    def clear_(self, tensor: Tensor, neurons: Tensor) -> None:
        """Sets to zero what the given neurons (int64 indices) own."""
        tensor.index_fill_(self.dim, self.index[neurons.cpu()].flatten().to(tensor.device), 0)


@dataclass(frozen=True)
class Draw:
    """Where a dropout module meets the neurons of a layer: neuron n has the positions `index[n]` of dimension `dim` of what it is given."""

    module: str
    dim: int
    size: int
    """Positions along that dimension."""
    index: Tensor
    """int64 (num_neurons, k)."""


class _Mask:
    """A layer's mask. Where a device has killed neurons that the host has not heard of, who reads it waits for that."""

    @overload
    def __get__(self, layer: None, owner: type) -> _Mask: ...
    @overload
    def __get__(self, layer: NeuronLayer, owner: type) -> Tensor: ...
    def __get__(self, layer: NeuronLayer | None, owner: type) -> Tensor | _Mask:
        if layer is None:
            raise AttributeError("mask")  # which tells dataclass that there is no default
        if (ask := layer.__dict__.get("_ask")) is not None:
            ask()
        mask: Tensor = layer.__dict__["_mask"]
        return mask

    def __set__(self, layer: NeuronLayer, mask: Tensor) -> None:
        """What a device said before holds no more."""
        layer.__dict__.update(_mask=mask, _ask=None, _version=layer.mask_version + 1)


@dataclass
class NeuronLayer:
    """The neurons of one layer, and what of the model belongs to them."""

    name: str
    """The first producer's module name."""
    kind: str
    """"conv" or "linear": the first producer's kind."""
    producers: tuple[Slice, ...]
    """Parameters; together one neuron's group theta_l^n."""
    buffers: tuple[Slice, ...]
    """Running statistics that go with the neuron but are not trained."""
    readers: tuple[Slice, ...]
    """Parameters that multiply the neuron's output and nothing else."""
    group_size: int
    """P_l: entries of one group in the starting network; it stays when neurons before this layer are removed."""
    starting_neurons: int
    """Neurons in the starting network."""
    indices: Tensor
    """int64 (num_neurons,): each neuron's number in the starting network."""
    mask: _Mask = _Mask()
    """bool (num_neurons,), a tensor on the CPU: True is alive. Death is this mask, never inferred from zeros. Who makes neurons live again
    assigns another one."""
    pinned: str | None = None
    """Why these neurons cannot be removed; None: they can."""
    partners: tuple[str, ...] = ()
    """Layers that read this one inside of a module, as attention's values read its queries and keys."""
    draws: tuple[Draw, ...] = ()
    """Dropout that these neurons pass: it goes on drawing for those that are gone, so that what is left is trained as it would have been."""
    bypassed: bool = False
    """A way from the network's input to its output leads around these neurons, so that all of them may die: what is left of a residual
    branch is a constant then."""

    @property
    def num_neurons(self) -> int:
        return len(self.indices)

    @property
    def mask_version(self) -> int:
        """How often a mask was assigned."""
        version: int = self.__dict__.get("_version", 0)
        return version

    def ask_first(self, ask: Callable[[], None] | None) -> None:
        """`ask` is called before somebody reads the mask; None: nothing is to be asked any more."""
        self.__dict__["_ask"] = ask

    def __getstate__(self) -> dict[str, Any]:
        """Copies know what a device knew, and nothing of the device."""
        return {**self.__dict__, "_mask": self.mask, "_ask": None}

    def alive(self) -> Tensor:
        """bool (num_neurons,), a copy."""
        return self.mask.clone()

    def in_starting_network(self, values: Tensor) -> Tensor:
        """One value a neuron, (num_neurons,), in the places of the starting network, (starting_neurons,), with zeros for what was removed."""
        whole = values.new_zeros(self.starting_neurons)
        whole[self.indices.to(values.device)] = values
        return whole

    @property
    def num_dead(self) -> int:
        """Neurons of the starting network that are dead, removed ones included."""
        return self.starting_neurons - int(self.mask.sum())


Copies = Callable[[], Iterable[Mapping[str, Tensor]]]


class Neurons:
    """The removable neurons of a model, layer by layer in forward order; `pinned` holds the others with the reason.

    Iterating gives the removable layers. The model is referred to, not copied.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[NeuronLayer], *, input_shape: tuple[int, ...] = (),
        resizers: Mapping[type[nn.Module], Callable[[nn.Module], None]] | None = None,
    ) -> None:
        self.model = model
        self.resizers = dict(resizers or {})
        """What makes modules of the user's own fit their cut parameters."""
        self.all_layers = list(layers)
        self.input_shape = input_shape
        """Shape of the example input, batch first; what proofs on random inputs use."""
        self._layers = {layer.name: layer for layer in self.all_layers if layer.pinned is None}
        self._parameters = dict(model.named_parameters())
        self._copies: list[Copies] = []
        self._models: list[Copies] = [lambda: [{**self._parameters, **dict(model.named_buffers())}]]
        self._readers_of = self._layers_by_reading()

    def __iter__(self) -> Iterator[NeuronLayer]:
        return iter(self._layers.values())

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, name: str) -> NeuronLayer:
        if name not in self._layers:
            reason = self.pinned.get(name)
            raise KeyError(f"layer {name!r} is pinned: {reason}" if reason else
                           f"no layer {name!r} with neurons; layers: {', '.join(self._layers)}")
        return self._layers[name]

    @property
    def pinned(self) -> dict[str, str]:
        """Layers whose neurons stay, with the reason."""
        return {layer.name: layer.pinned for layer in self.all_layers if layer.pinned is not None}

    def parameter(self, name: str) -> nn.Parameter:
        return self._parameters[name]

    def parts(self, layer: NeuronLayer) -> list[Tensor]:
        """The layer's groups as tensors (num_neurons, ...), one a producing slice; views where the slice is a block."""
        return [piece.rows(self._parameters[piece.tensor]) for piece in layer.producers]

    def register_copy(self, tensors: Copies, *, is_model: bool = False) -> None:
        """Adds tensors that mirror the parameters (momentum, moving averages) by name: a death clears them too. Whenever it is called,
        `tensors` gives the same ones, changed in place.

        is_model: they compute outputs as the parameters do (a moving average, not momentum), running statistics included, so that f(0) of
        the dead is folded into their biases too.
        """
        (self._models if is_model else self._copies).append(tensors)

    @property
    def num_copies(self) -> int:
        """How many were registered."""
        return len(self._copies) + len(self._models)

    def everywhere(self) -> Iterator[tuple[bool, Mapping[str, Tensor]]]:
        """(is it the model itself, tensors by name) of all that a death clears."""
        yield True, self._parameters
        for copies in (*self._models[1:], *self._copies):
            for tensors in copies():
                yield False, tensors

    @torch.no_grad()
    def zero_(self, neurons: Mapping[str, Iterable[int] | Tensor]) -> None:
        """Kills neurons, {layer name: indices}: their group, the weights that read them, the same in every registered
        copy and in the gradients; and marks them dead. Nothing brings them back. `IndexError` if there is no such one.

        What a dead neuron still gives where its activation makes a zero something else, f(0), goes into the bias of what read it, so that
        clearing the weights changes nothing. A layer whose readers are all dead dies with them.
        """
        emptied = []
        for name, indices in neurons.items():
            layer = self[name]
            which = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices), device="cpu")
            if which.dtype == torch.bool:
                raise IndexError(f"layer {name!r}: got a mask, needs indices; write mask.nonzero().flatten()")
            which = which.to(torch.int64)
            if len(which) and (int(which.min()) < 0 or int(which.max()) >= layer.num_neurons):
                raise IndexError(f"layer {name!r} has neurons 0 to {layer.num_neurons - 1}, got {which.tolist()}")
            layer.mask[which] = False
            which = torch.unique(which)  # or f(0) would be folded twice
            models = [tensors for copies in self._models for tensors in copies()]
            for piece in layer.readers:
                if piece.absorber is not None:
                    for tensors in models:
                        piece.absorb_(tensors[piece.tensor], tensors[piece.absorber.tensor], which)
            gradients = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
            everything = [*models, gradients, *(tensors for copies in self._copies for tensors in copies())]
            for tensors in everything:
                for piece in (*layer.producers, *layer.readers):
                    if piece.tensor in tensors:
                        piece.clear_(tensors[piece.tensor], which)
            if layer.bypassed and not layer.mask.any():
                emptied.append(layer)
        for layer in emptied:
            for feeder in self._feeders(layer):
                if feeder.mask.any() and all(not reader.mask.any() for reader in self._readers_of[feeder.name]):
                    self.zero_({feeder.name: feeder.mask.nonzero().flatten()})

    def settle_(self) -> None:
        """Makes final what is dead now: neurons that were masked while they might come back leave their f(0) in their readers' biases,
        and those readers are cleared. What died for good stays as it is."""
        self.zero_({layer.name: (~layer.mask).nonzero().flatten() for layer in self if not layer.mask.all()})

    def _layers_by_reading(self) -> dict[str, list[NeuronLayer]]:
        """{layer: the layers that the weights which read it produce}."""
        producers: dict[str, list[NeuronLayer]] = {}
        for layer in self.all_layers:
            for piece in layer.producers:
                producers.setdefault(piece.tensor, []).append(layer)
        found = {}
        for layer in self:
            reading = {id(r): r for piece in layer.readers for r in producers.get(piece.tensor, [])}
            inside = [other for other in self.all_layers if other.name in layer.partners]
            # What no layer produces may be read by anything, and so may what no weight reads.
            known = bool(layer.readers or inside) and all(piece.tensor in producers for piece in layer.readers)
            found[layer.name] = [*reading.values(), *inside] if known else [layer]
        return found

    def _feeders(self, layer: NeuronLayer) -> list[NeuronLayer]:
        """The layers that may all die and that this one reads."""
        return [other for other in self if other.bypassed and other is not layer and any(r is layer for r in self._readers_of[other.name])]

    def explain(self) -> str:
        """A table of the layers in forward order: neurons, entries of each one's group, what is tied into it, and why it stays if it does."""
        rows = [("layer", "neurons", "alive", "entries", "tied", "")]
        for layer in self.all_layers:
            own = (layer.name.partition("#")[0], layer.name.rpartition(".")[0])
            tied = [name for name in dict.fromkeys(_module_of(piece.tensor) for piece in layer.producers) if name not in own]
            note = f"stays: {layer.pinned}" if layer.pinned is not None else "may vanish, there is a way around it" if layer.bypassed else ""
            shown = ", ".join(tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
            rows.append((layer.name, str(layer.num_neurons), str(int(layer.mask.sum())), str(layer.group_size), shown, note))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        is_number = (False, True, True, True, False)
        lines = [
            "  ".join(f"{text:>{width}}" if right else f"{text:<{width}}" for text, width, right in zip(row[:5], widths, is_number, strict=True))
            + f"  {row[5]}"
            for row in rows
        ]
        removable = sum(layer.num_neurons for layer in self)
        hidden = sum(layer.num_neurons for layer in self.all_layers if layer.pinned != OUTPUTS)
        lines.append(f"{removable:,} of {hidden:,} hidden neurons can be removed, in {len(self)} layers")
        return "\n".join(line.rstrip() for line in lines)

    def state_dict(self) -> dict[str, Any]:
        """Mask, indices in the starting network, P_l: tensors and numbers alone, safe for `weights_only` loading."""
        return {layer.name: {"mask": layer.mask.clone(), "indices": layer.indices.clone(),
                             "group_size": layer.group_size, "starting_neurons": layer.starting_neurons}
                for layer in self}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """`ValueError` unless the state is of a network with the same layers and widths."""
        if set(state) != set(self._layers):
            odd = sorted(set(state) ^ set(self._layers))[0]
            raise ValueError(f"neurons: layer {odd!r} is in only one of state and network; load into the same network")
        for name, values in state.items():
            layer = self._layers[name]
            if len(values["mask"]) != layer.num_neurons:
                raise ValueError(f"neurons: layer {name!r} has {layer.num_neurons} neurons, the state "
                                 f"{len(values['mask'])}; set the network's widths first")
        for name, values in state.items():
            layer = self._layers[name]
            layer.mask = values["mask"].bool().clone()
            layer.indices = values["indices"].clone()
            layer.group_size, layer.starting_neurons = int(values["group_size"]), int(values["starting_neurons"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Neurons:
        """Of a copy of the model; what was registered stays with this one."""
        return self.bound_to(copy.deepcopy(self.model, memo))

    def bound_to(self, model: nn.Module) -> Neurons:
        """The same neurons, masks copied, of another model of the same shapes."""
        layers = [replace(layer, mask=layer.mask.clone(), indices=layer.indices.clone()) for layer in self.all_layers]
        return Neurons(model, layers, input_shape=self.input_shape, resizers=self.resizers)


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor
