"""Finding the neurons of a network: follows every channel from what produces it to what reads it.

Chains are understood: convolution or linear, BatchNorm, activation, pooling, flatten, dropout. Whatever else touches a
channel pins the layer that produces it, by name and with the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dist_gsl.neurons import NeuronLayer, Neurons, Slice

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OUTPUTS = "its neurons are the network's outputs"
"""Why the last layer is pinned."""

BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# Entry by entry with f(0) = 0: what is zero before is zero after.
ZERO_PRESERVING_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Softsign,
    nn.Hardswish, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
ZERO_PRESERVING_FUNCTIONS = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softsign, F.hardswish, F.tanh,
    F.dropout, F.dropout2d, torch.relu, torch.tanh, torch.selu,
}  # fmt: skip
# The same over windows of the last so many dimensions.
POOLED_DIMS: dict[object, int] = {
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d), 1),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), 2),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d), 3),
    **dict.fromkeys((F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d, torch.max_pool1d), 1),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.max_pool2d), 2),
    **dict.fromkeys((F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d, torch.max_pool3d), 3),
}
ZERO_PRESERVING_METHODS = {"relu", "relu_", "tanh", "tanh_", "contiguous"}
# Read the shape of a value and not the value.
SHAPE_ONLY = {"size", "dim", "numel"}


@dataclass
class _Draft:
    """A layer while its channels are followed."""

    name: str
    kind: str
    num_neurons: int
    producers: list[Slice] = field(default_factory=list)
    buffers: list[Slice] = field(default_factory=list)
    readers: list[Slice] = field(default_factory=list)
    pinned: str | None = None

    def pin(self, reason: str) -> None:
        self.pinned = self.pinned or reason


@dataclass(frozen=True)
class _Channels:
    """A value whose dimension `dim` holds the layer's neurons, `size` consecutive positions each."""

    layer: _Draft
    dim: int
    size: int = 1


def find_neurons(model: nn.Module, example_inputs: Tensor) -> Neurons:
    """The neurons of a model, found by following it symbolically; the model is left as it is.

    example_inputs: one batch of the shape that the model takes. Call it before DDP wraps the model. `ValueError` if the
    model cannot be traced or does not take the inputs, or holds parameters in bfloat16 or float16 (a shrink of 0.1 %
    rounds away there for ever).
    """
    check_precision(model)
    try:
        graph = fx.symbolic_trace(model)
    except Exception as error:
        raise ValueError(
            f"find_neurons: {type(model).__name__} cannot be traced by torch.fx ({error}); "
            "make its control flow independent of values, or wrap the part in a leaf module"
        ) from error
    shapes = _shapes(graph, model, example_inputs)
    return Neurons(model, _Tracer(model, graph, shapes).run(), input_shape=tuple(example_inputs.shape))


def check_precision(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}: a shrink of 0.1 % rounds away there for ever; "
                "keep parameters in float32 and use autocast for speed"
            )


def _shapes(graph: fx.GraphModule, model: nn.Module, example_inputs: Tensor) -> dict[str, tuple[int, ...]]:
    """Shape of each node's value, without computing one."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    training = {module: module.training for module in model.modules()}
    model.eval()  # BatchNorm refuses a batch of one otherwise
    graph.eval()
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        FakeTensorProp(graph, mode).propagate(example_inputs)
    except Exception as error:
        raise ValueError(
            f"find_neurons: {type(model).__name__} does not take example_inputs of shape {tuple(example_inputs.shape)} "
            f"and {example_inputs.dtype}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        for module, was_training in training.items():
            module.training = was_training
    shapes = {}
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            shapes[node.name] = tuple(value.shape)
    return shapes


class _Tracer:
    def __init__(self, model: nn.Module, graph: fx.GraphModule, shapes: dict[str, tuple[int, ...]]) -> None:
        self.modules = dict(model.named_modules())
        self.graph, self.shapes = graph, shapes
        self.values: dict[fx.Node, _Channels] = {}
        self.layers: dict[str, _Draft] = {}
        self.calls = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
        self.read_directly = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
        self.owners = Counter(id(p) for module in self.modules.values() for p in module.parameters(recurse=False))

    def run(self) -> list[NeuronLayer]:
        for node in self.graph.graph.nodes:
            if node.op == "call_module":
                self._module(node, self.modules[str(node.target)])
            elif node.op == "call_function":
                self._function(node)
            elif node.op == "call_method":
                self._method(node)
            elif node.op == "output":
                self._pin_inputs(node, OUTPUTS)
        return [self._finish(draft) for draft in self.layers.values()]

    def _finish(self, draft: _Draft) -> NeuronLayer:
        parameters: dict[str, Tensor] = {
            f"{prefix}.{name}" if prefix else name: p
            for prefix, module in self.modules.items()
            for name, p in module.named_parameters(recurse=False)
        }
        size = sum(
            parameters[piece.tensor].numel() // parameters[piece.tensor].shape[piece.dim] * piece.index.shape[1]
            for piece in draft.producers
        )
        if not draft.readers:
            draft.pin("nothing reads it")
        return NeuronLayer(
            name=draft.name, kind=draft.kind, producers=tuple(draft.producers), buffers=tuple(draft.buffers),
            readers=tuple(draft.readers), group_size=size, starting_neurons=draft.num_neurons,
            indices=torch.arange(draft.num_neurons), mask=torch.ones(draft.num_neurons, dtype=torch.bool),
            pinned=draft.pinned,
        )  # fmt: skip

    # --- operations

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        name = str(node.target)
        shared = self.calls[name] > 1 or any(
            self.owners[id(p)] > 1 or f"{name}.{key}" in self.read_directly for key, p in module.named_parameters()
        )
        if isinstance(module, (*Convolution, nn.Linear)):
            self._weighted(node, name, module, shared)
        elif isinstance(module, BatchNorm):
            self._batch_norm(node, name, module, shared)
        elif isinstance(module, nn.Flatten):
            self._flatten(node, module.start_dim, module.end_dim)
        elif isinstance(module, ZERO_PRESERVING_MODULES) or (
            isinstance(module, nn.Hardtanh) and float(module.min_val) <= 0 <= float(module.max_val)
        ):
            self._pass(node)
        elif type(module) in POOLED_DIMS:
            self._pool(node, POOLED_DIMS[type(module)])
        else:
            self._pin_inputs(node, f"read by {type(module).__name__} {name!r}")

    def _function(self, node: fx.Node) -> None:
        if node.target in ZERO_PRESERVING_FUNCTIONS:
            self._pass(node)
        elif node.target in POOLED_DIMS:
            self._pool(node, POOLED_DIMS[node.target])
        elif node.target is torch.flatten:
            self._flatten(node, *_flatten_dims(node))
        elif node.target is torch.mean:
            self._mean(node)
        elif node.target is getattr and len(node.args) > 1 and node.args[1] == "shape":
            pass
        else:
            self._pin_inputs(node, f"read by {getattr(node.target, '__name__', node.target)} ({node.name})")

    def _method(self, node: fx.Node) -> None:
        if node.target in ZERO_PRESERVING_METHODS:
            self._pass(node)
        elif node.target == "flatten":
            self._flatten(node, *_flatten_dims(node))
        elif node.target == "mean":
            self._mean(node)
        elif node.target not in SHAPE_ONLY:
            self._pin_inputs(node, f"read by .{node.target}() ({node.name})")

    def _weighted(self, node: fx.Node, name: str, module: nn.Module, shared: bool) -> None:
        """Convolution or linear layer: reads the channels before it and starts channels of its own."""
        assert isinstance(module, (*Convolution, nn.Linear))
        is_convolution = isinstance(module, Convolution)
        grouped = isinstance(module, Convolution) and module.groups > 1
        rank = len(self.shapes[node.name])
        dim = rank - module.weight.dim() + 1 if is_convolution else rank - 1
        source = self._input(node)
        plain = {p for p, _ in module.named_parameters()} <= {"weight", "bias"}
        if source is not None:
            if shared:
                source.layer.pin(f"read by {name!r}, whose weights are shared")
            elif not plain:
                source.layer.pin(f"read by {name!r}, whose weight is parametrized")
            elif grouped:
                source.layer.pin(f"read by grouped convolution {name!r}")
            elif source.dim != dim:
                source.layer.pin(f"read by {name!r} along another dimension")
            else:
                reader = Slice.block(f"{name}.weight", 1, source.layer.num_neurons, size=source.size)
                source.layer.readers.append(reader)
        if name in self.layers:  # called again: already pinned as shared
            self.values[node] = _Channels(self.layers[name], dim)
            return
        num_neurons = module.weight.shape[0]
        draft = _Draft(name, "conv" if is_convolution else "linear", num_neurons)
        draft.producers += [Slice.block(f"{name}.{p}", 0, num_neurons) for p, _ in module.named_parameters()]
        if shared:
            draft.pin("its weights are shared")
        elif grouped:
            draft.pin("grouped convolution")
        elif not plain:
            draft.pin("its weight is parametrized")
        self.layers[name] = draft
        self.values[node] = _Channels(draft, dim)

    def _batch_norm(self, node: fx.Node, name: str, module: nn.Module, shared: bool) -> None:
        assert isinstance(module, BatchNorm)
        source = self._pass(node)
        if source is None:
            return
        if not module.affine:
            source.layer.pin(f"BatchNorm {name!r} has no scale and shift: it makes a zero channel non-zero")
        if shared:
            source.layer.pin(f"BatchNorm {name!r} is shared")
        num_neurons = source.layer.num_neurons
        if source.dim != 1:
            source.layer.pin(f"read by {name!r} along another dimension")
            return
        for tensor, _ in module.named_parameters():
            source.layer.producers.append(Slice.block(f"{name}.{tensor}", 0, num_neurons, size=source.size))
        for tensor, buffer in module.named_buffers():
            if buffer.dim() == 1:
                source.layer.buffers.append(Slice.block(f"{name}.{tensor}", 0, num_neurons, size=source.size))

    def _flatten(self, node: fx.Node, start: int, end: int) -> None:
        source = self._input(node)
        if source is None:
            return
        shape = self.shapes[node.all_input_nodes[0].name]
        start, end = start % len(shape), end % len(shape)
        if end < source.dim or start > source.dim:
            source.layer.pin(f"read by {node.name} along another dimension")
        elif start < source.dim:
            source.layer.pin(f"flattened together with what comes before it ({node.name})")
        else:
            self.values[node] = _Channels(source.layer, source.dim, source.size * math.prod(shape[start + 1 : end + 1]))

    def _pool(self, node: fx.Node, num_dims: int) -> None:
        source = self._pass(node)
        if source is not None and source.dim >= len(self.shapes[node.all_input_nodes[0].name]) - num_dims:
            source.layer.pin(f"pooled over its own dimension ({node.name})")

    def _mean(self, node: fx.Node) -> None:
        """A mean over positions is a pooling; over channels it mixes them."""
        source = self._input(node)
        if source is None:
            return
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        rank = len(self.shapes[node.all_input_nodes[0].name])
        positions = [dims] if isinstance(dims, int) else dims
        if isinstance(positions, (list, tuple)) and all(
            isinstance(d, int) and d % rank > source.dim for d in positions
        ):
            self.values[node] = source
        else:
            source.layer.pin(f"read by mean over other dimensions ({node.name})")

    # --- helpers

    def _input(self, node: fx.Node) -> _Channels | None:
        return self.values.get(node.all_input_nodes[0]) if node.all_input_nodes else None

    def _pass(self, node: fx.Node) -> _Channels | None:
        source = self._input(node)
        if len(node.all_input_nodes) > 1:
            self._pin_inputs(node, f"read by {node.name} with other values")
        elif source is not None:
            self.values[node] = source
        return source

    def _pin_inputs(self, node: fx.Node, reason: str) -> None:
        for source in node.all_input_nodes:
            if source in self.values:
                self.values[source].layer.pin(reason)


def _flatten_dims(node: fx.Node) -> tuple[int, int]:
    def argument(position: int, name: str, default: int) -> int:
        value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
        return value if isinstance(value, int) else default

    return argument(1, "start_dim", 0), argument(2, "end_dim", -1)
