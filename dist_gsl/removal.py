"""Cutting tensors and modules: which positions go when neurons go, and modules that work without any channel.

Tensors are cut by name, whatever they are: parameters, running statistics, momentum, moving averages. Imports torch alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_gsl.attention import fit_heads
from dist_gsl.neurons import Draw, NeuronLayer, Neurons, Slice

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Removal:
    """Which positions of which tensors go when the dead neurons go."""

    def __init__(self, neurons: Neurons, keep: Mapping[str, Tensor] | None = None, *, multiple_of: int = 1) -> None:
        """keep: {layer name: bool (num_neurons,)}; None: the masks, with so many of the dead that widths are multiples of `multiple_of`
        where there are enough. `ValueError` for a layer that would be empty."""
        masks = {layer.name: padded(layer.mask, multiple_of) for layer in neurons} if keep is None else dict(keep)
        for name, mask in masks.items():
            if not mask.any() and not neurons[name].bypassed:
                raise ValueError(f"layer {name!r} has no neuron alive: the network's output would be constant; "
                                 "train with min_alive=1 or a smaller beta")
        self._gone: dict[tuple[str, int], list[Tensor]] = {}
        for name, mask in masks.items():
            layer = neurons[name]
            for piece in (*layer.producers, *layer.buffers, *layer.readers):
                self._gone.setdefault((piece.tensor, piece.dim), []).append(piece.index[~mask].flatten())
        self._drawn: dict[str, tuple[int, Tensor]] = {}
        for name, mask in masks.items():
            for draw in neurons[name].draws:
                _, kept = self._drawn.setdefault(draw.module, (draw.dim, torch.ones(draw.size, dtype=torch.bool)))
                kept[draw.index[~mask].flatten()] = False
        self._masks, self._resizers = masks, neurons.resizers
        self._model = neurons.model
        self._first_names = _first_names(neurons.model)

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """A smaller copy; memory format kept. Other dimensions of the tensor may be cut too."""
        name = self._first_names.get(name, name)
        # A filter of 1 x 1 is contiguous in both ways, and stays so.
        channels_last = tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
        for dim in range(tensor.dim()):
            if (name, dim) in self._gone:
                tensor = tensor.index_select(dim, self._kept(name, dim, tensor.shape[dim]).to(tensor.device))
        return tensor.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.tensor(name, tensor) for name, tensor in tensors.items()}

    def whole(self, name: str, tensor: Tensor, *, blank: Tensor) -> Tensor:
        """The inverse of `tensor`: what was cut, back in its place in a copy of `blank`, which is of the size before."""
        name = self._first_names.get(name, name)
        if not any((name, dim) in self._gone for dim in range(blank.dim())):
            return tensor.clone()
        where = [self._kept(name, dim, size) for dim, size in enumerate(blank.shape)]
        whole = blank.clone()
        whole[torch.meshgrid(*where, indexing="ij")] = tensor
        return whole

    def num_parameters(self) -> int:
        """Entries of all parameters that stay."""
        return sum(self.num_kept(name, parameter.shape) for name, parameter in self._model.named_parameters())

    def neurons(self, neurons: Neurons, model: nn.Module) -> Neurons:
        """The neurons that remain, bound to the smaller model."""
        sizes = neurons.model.state_dict(keep_vars=True)  # under all of their names, shared ones too

        def moved(piece: Slice, mask: Tensor) -> Slice:
            size = sizes[piece.tensor].shape[piece.dim]
            position = torch.full((size,), -1)
            kept = self._kept(piece.tensor, piece.dim, size)
            position[kept] = torch.arange(len(kept))
            constant = None if piece.constant is None else piece.constant[mask]
            return Slice(piece.tensor, piece.dim, position[piece.index[mask]], constant, piece.absorber)

        def moved_draw(draw: Draw, mask: Tensor) -> Draw:
            _, kept = self._drawn[draw.module]
            position = torch.cumsum(kept, 0) - 1
            return Draw(draw.module, draw.dim, int(kept.sum()), position[draw.index[mask]])

        def smaller(layer: NeuronLayer) -> NeuronLayer:
            mask = self._masks.get(layer.name, torch.ones(layer.num_neurons, dtype=torch.bool))
            return replace(
                layer, mask=layer.mask[mask].clone(), indices=layer.indices[mask].clone(),
                producers=tuple(moved(piece, mask) for piece in layer.producers),
                buffers=tuple(moved(piece, mask) for piece in layer.buffers),
                readers=tuple(moved(piece, mask) for piece in layer.readers),
                draws=tuple(moved_draw(draw, mask) for draw in layer.draws if draw.module in self._drawn),
            )  # fmt: skip

        layers = [smaller(layer) for layer in neurons.all_layers]
        return Neurons(model, layers, input_shape=neurons.input_shape, resizers=neurons.resizers)

    def model(self, model: nn.Module) -> nn.Module:
        """A smaller copy of the model."""
        affected = {name for name, _ in self._gone}

        def cut(name: str, tensor: Tensor) -> Tensor:
            return self.tensor(name, tensor.detach()) if name in affected else tensor.detach().clone()

        smaller = copied(model, cut)
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
        for prefix, module in smaller.named_modules():
            names = [f"{prefix}.{name}" if prefix else name for store in (module._parameters, module._buffers) for name in store]
            if any(self._first_names.get(name, name) in affected for name in names):
                set_sizes(module, self._resizers, self._rows_kept(model, prefix, module))
            if prefix in self._drawn:
                draw_for_whole_(module, *self._drawn[prefix], device=device)
        return smaller

    def _rows_kept(self, model: nn.Module, prefix: str, module: nn.Module) -> Tensor | None:
        """Of the weight of a module that has to know which are left, not only how many."""
        weight = "weight" if isinstance(module, Convolution) else "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else None
        if weight is None or getattr(module, weight) is None:
            return None
        name = f"{prefix}.{weight}" if prefix else weight
        return self._kept(self._first_names[name], 0, model.get_parameter(name).shape[0])

    def num_kept(self, name: str, shape: Sequence[int]) -> int:
        return math.prod(len(self._kept(name, dim, size)) if (name, dim) in self._gone else size for dim, size in enumerate(shape))

    def _kept(self, name: str, dim: int, size: int) -> Tensor:
        kept = torch.ones(size, dtype=torch.bool)
        for gone in self._gone.get((name, dim), []):
            kept[gone] = False
        return kept.nonzero().flatten()


def padded(mask: Tensor, multiple_of: int) -> Tensor:
    """The mask with the first dead neurons kept, up to the next multiple; none where none is alive."""
    missing = -int(mask.sum()) % multiple_of
    kept = mask.clone()
    kept[(~mask).nonzero().flatten()[:missing]] = True
    return kept


def keeping(neurons: Neurons, indices: Mapping[str, Tensor]) -> Removal:
    """The removal that leaves the given neurons of each layer, {layer name: int64 indices}."""
    keep = {}
    for layer in neurons:
        keep[layer.name] = torch.zeros(layer.num_neurons, dtype=torch.bool)
        keep[layer.name][indices[layer.name]] = True
    return Removal(neurons, keep)


def set_widths(model: nn.Module, neurons: Neurons, indices: Mapping[str, Tensor]) -> tuple[nn.Module, Neurons]:
    """A network cut to the given neurons of each layer: what a checkpoint loads into."""
    removal = keeping(neurons, indices)
    smaller = removal.model(model)
    return smaller, removal.neurons(neurons, smaller)


def copied(model: nn.Module, change: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A copy of a model with what `change` makes of each of its tensors; those that are shared stay shared, and none is copied twice.

    change: (name, tensor) -> tensor. A parameter of no entries takes no gradient: no forward pass has it, and DDP would wait.
    """
    changed: dict[int, Any] = {}
    held = ((f"{prefix}.{name}", value) for prefix, module in model.named_modules() for name, value in vars(module).items())
    plain = [(name, value) for name, value in held if isinstance(value, Tensor)]
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *plain]:
        new = change(name, tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        changed[id(tensor)] = nn.Parameter(new, tensor.requires_grad and new.numel() > 0) if is_parameter else new
    return copy.deepcopy(model, changed)


def _first_names(model: nn.Module) -> dict[str, str]:
    """{name of a parameter or buffer: the first name that it has}."""
    first: dict[int, str] = {}
    names = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names[name] = first.setdefault(id(tensor), name)
    return names


def set_sizes(
    module: nn.Module, resizers: Mapping[type[nn.Module], Callable[[nn.Module], None]], rows: Tensor | None = None
) -> None:
    """Makes a module's size attributes say what its tensors are; one without channels gets the class that can do without. A module that
    only holds parameters has none.

    rows: int64, those of a convolution's or attention's weight that are left. A convolution's group without any is gone: depthwise ones lose
    whole groups, others the same position of each.
    """
    for kind, resize in resizers.items():
        if isinstance(module, kind):
            resize(module)
            return
    if isinstance(module, Convolution):
        if module.groups > 1 and rows is not None:
            module.groups = len(torch.unique(rows // (module.out_channels // module.groups)))
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
        if module.weight.numel() == 0:
            _become(module, EMPTY_CONVOLUTION)
    elif isinstance(module, Transposed):
        module.out_channels, module.in_channels = module.weight.shape[1] * module.groups, module.weight.shape[0]
        if module.weight.numel() == 0:
            raise RuntimeError("a transposed convolution cannot be left without channels")
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, BatchNorm):
        module.num_features = module.weight.shape[0]
        if module.num_features == 0:
            _become(module, EMPTY_BATCH_NORM)
    elif isinstance(module, nn.MultiheadAttention):
        assert rows is not None
        fit_heads(module, rows)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]


def _become(module: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    module.__class__ = next(empty for plain, empty in classes.items() if isinstance(module, plain))


class _EmptyConvolution(nn.modules.conv._ConvNd):
    """A convolution that reads no channel or makes none: what it gives is its bias, in the shape that the input leads to."""

    def forward(self, input: Tensor) -> Tensor:
        output = input.new_zeros((input.shape[0], self.out_channels, *self._spatial(input.shape[2:])))
        if input.requires_grad:  # what comes before takes part, with a gradient of 0, as it does in the whole network
            output = output + input[:, :0].sum()
        return output if self.bias is None else output + self.bias.view(-1, *[1] * len(self.kernel_size))

    def _spatial(self, sizes: Sequence[int]) -> list[int]:
        if self.padding == "same":
            return list(sizes)
        padding: Sequence[Any] = [0] * len(sizes) if self.padding == "valid" else self.padding
        return [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(sizes, padding, self.dilation, self.kernel_size, self.stride, strict=True)
        ]


class EmptyConv1d(_EmptyConvolution, nn.Conv1d):
    pass


class EmptyConv2d(_EmptyConvolution, nn.Conv2d):
    pass


class EmptyConv3d(_EmptyConvolution, nn.Conv3d):
    pass


class _EmptyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Of no channel: gives what it gets."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class EmptyBatchNorm1d(_EmptyBatchNorm, nn.BatchNorm1d):
    pass


class EmptyBatchNorm2d(_EmptyBatchNorm, nn.BatchNorm2d):
    pass


class EmptyBatchNorm3d(_EmptyBatchNorm, nn.BatchNorm3d):
    pass


class EmptySyncBatchNorm(_EmptyBatchNorm, nn.SyncBatchNorm):
    pass


def is_empty(module: nn.Module) -> bool:
    """Whether it is one of those below, which work without a channel."""
    return isinstance(module, (_EmptyConvolution, _EmptyBatchNorm))


EMPTY_CONVOLUTION: dict[type[nn.Module], type[nn.Module]] = {nn.Conv1d: EmptyConv1d, nn.Conv2d: EmptyConv2d, nn.Conv3d: EmptyConv3d}
EMPTY_BATCH_NORM: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: EmptyBatchNorm1d, nn.BatchNorm2d: EmptyBatchNorm2d, nn.BatchNorm3d: EmptyBatchNorm3d, nn.SyncBatchNorm: EmptySyncBatchNorm,
}  # fmt: skip


# --- dropout that draws for the removed too


def draw_for_whole_(module: nn.Module, dim: int, kept: Tensor, *, device: torch.device | None) -> None:
    """Makes a dropout module whose input lost positions draw as if it had them all still.

    kept: bool (positions along `dim` of its input before,).
    """
    if bool(kept.all()):
        return
    if not isinstance(module, _WholeDropout):
        module.__class__ = WHOLE_DROPOUT[type(module)]
        assert isinstance(module, _WholeDropout)
        module.dim, module.starting_size = dim, len(kept)
        module.register_buffer("positions", torch.arange(len(kept), device=device), persistent=False)
    module.positions = module.positions.index_select(0, kept.nonzero().flatten().to(module.positions.device))


class _WholeDropout(nn.modules.dropout._DropoutNd):
    """Dropout of a part of the positions, drawn as it is for all of them: after removal the same neurons are dropped in the same steps."""

    dim: int
    starting_size: int
    positions: Tensor
    """int64: those of its input, among the starting network's."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        shape = list(input.shape)
        shape[self.dim] = self.starting_size
        factors: Tensor = super().forward(input.new_ones(shape))
        return input * factors.index_select(self.dim, self.positions)


class WholeDropout(_WholeDropout, nn.Dropout):
    pass


class WholeDropout1d(_WholeDropout, nn.Dropout1d):
    pass


class WholeDropout2d(_WholeDropout, nn.Dropout2d):
    pass


class WholeDropout3d(_WholeDropout, nn.Dropout3d):
    pass


WHOLE_DROPOUT: dict[type[nn.Module], type[nn.Module]] = {
    nn.Dropout: WholeDropout, nn.Dropout1d: WholeDropout1d, nn.Dropout2d: WholeDropout2d, nn.Dropout3d: WholeDropout3d,
}  # fmt: skip
