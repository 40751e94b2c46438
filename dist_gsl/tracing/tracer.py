"""Following every channel of a network from what produces it to what reads it.

What a residual sum, a product, a depthwise convolution or shared weights tie together is one neuron; concatenation, splitting and
reshaping move channels. What is left of a dead neuron, f(0), is followed too: it is folded into the bias of what reads it where that is
exact. An operation that mixes channels in a way that leaves no exact removal pins them, by name and with the reason. Imports torch alone.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dist_gsl.neurons import OUTPUTS, Absorber
from dist_gsl.tracing import operations as ops
from dist_gsl.tracing.labels import NONE, Atoms, Value, thin


@dataclass(frozen=True)
class ModuleRule:
    """What `find_neurons` is told of a module that it cannot see through. Parameters are named as in the module, each with the dimension
    along which its channels lie.

    A module either passes channels on (`carries`: what of its parameters belongs to each; output channel c depends on input channel c alone
    and is 0 where that and its parameters are 0), or reads them and produces others (`reads`, `produces`; what it makes of a channel is
    multiplied by the slice of `reads`, and an output channel is 0 where its slices of `produces` are).
    """

    channel_dim: int = 1
    """Where the channels of input and output lie; the batch is dimension 0."""
    carries: Mapping[str, int] = field(default_factory=dict)
    reads: Mapping[str, int] = field(default_factory=dict)
    produces: Mapping[str, int] = field(default_factory=dict)
    resize: Callable[[nn.Module], None] | None = None
    """Called after its parameters were cut, to make its size attributes say what they are."""


class Tracer:
    """Follows the channels of one network. `model`, `graph` and `results` may be on the meta device: no value of a parameter is read."""

    def __init__(
        self, model: nn.Module, graph: fx.GraphModule, results: dict[fx.Node, Any], rules: Mapping[type[nn.Module], ModuleRule]
    ) -> None:
        self.model, self.graph, self.results, self.rules = model, graph, results, rules
        self.modules = dict(model.named_modules())
        self.values: dict[fx.Node, Value | list[Value]] = {}
        self.atoms = Atoms()
        self.readers: dict[tuple[str, int], Tensor] = {}
        """The label that each position along a tensor's dimension multiplies."""
        self.constants: dict[tuple[str, int], tuple[Tensor, Absorber]] = {}
        """What each position along a tensor's dimension multiplies when the neuron is dead, and what takes the product."""
        self.owners: dict[fx.Node, list[tuple[str, int]]] = {}
        """Places whose neurons a node's output consists of, of nodes that make neurons."""
        self.buffers: list[tuple[str, Tensor]] = []
        self.kinds: dict[str, str] = {}
        self.understood: set[tuple[fx.Node, fx.Node]] = set()
        """Uses of parameters outside of their modules that became part of neurons."""
        # A parameter under several names is one.
        self.names: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
            self.names.setdefault(id(tensor), name)
        self.uses: Counter[int] = Counter()
        """How often the graph calls a module with that parameter."""
        for node in graph.graph.nodes:
            if node.op == "call_module":
                self.uses.update(id(p) for p in self.modules[str(node.target)].parameters())

    def run(self) -> None:
        for node in self.graph.graph.nodes:
            if node.op == "call_module":
                self._module(node, str(node.target), self.modules[str(node.target)])
            elif node.op in ("call_function", "call_method"):
                self._call(node)
            elif node.op == "output":
                self._pin_inputs(node, OUTPUTS)
        self._pin_used_by_hand()

    # --- operations

    def _module(self, node: fx.Node, name: str, module: nn.Module) -> None:
        plain = not any("parametrizations" in key for key, _ in module.named_parameters())
        rule = next((rule for kind, rule in self.rules.items() if isinstance(module, kind)), None)
        if rule is not None:
            self._declared(node, name, module, rule)
        elif isinstance(module, (*ops.Convolution, *ops.Transposed, nn.Linear)):
            self._weighted(node, name, module, plain)
        elif isinstance(module, ops.BatchNorm):
            self._batch_norm(node, name, module)
        elif isinstance(module, nn.PReLU):
            self._prelu(node, name, module)
        elif isinstance(module, nn.Flatten):
            self._move(node, lambda t: t.flatten(module.start_dim, module.end_dim))
        elif isinstance(module, nn.Unflatten):
            self._pin_inputs(node, f"read by Unflatten {name!r}")
        elif isinstance(module, ops.ELEMENTWISE_MODULES):
            self._elementwise(node, module, f"{type(module).__name__} {name!r}", in_place=getattr(module, "inplace", False))
        elif type(module) in ops.POOLED_DIMS:
            self._spatial(node, ops.POOLED_DIMS[type(module)], module, f"{type(module).__name__} {name!r}")
        else:
            self._pin_inputs(node, f"read by {type(module).__name__} {name!r}{_line(node)}")

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        is_method = node.op == "call_method"
        in_place = is_method and target.endswith("_") and not target.endswith("__")
        what = f".{target}() ({node.name})" if is_method else f"{getattr(target, '__name__', target)} ({node.name})"
        if in_place:
            target = target[:-1]
        if not any(self._has_neurons(source) for source in node.all_input_nodes):
            return
        if target in ops.SHAPE_ONLY or target is getattr or not _has_tensor(self.results[node]):
            return
        operation: Callable[..., Any] = getattr(Tensor, target) if is_method else target
        if target in ops.ELEMENTWISE_FUNCTIONS or target in ops.ELEMENTWISE_METHODS:
            in_place = in_place or bool(node.kwargs.get("inplace", False))
            self._elementwise(node, lambda *values: operation(*values, **self._plain(node.kwargs)), what, in_place=in_place)
        elif target in ops.SUMS or target in ops.PRODUCTS:
            self._binary(node, operation, what, is_sum=target in ops.SUMS, in_place=in_place or target in ops.IN_PLACE)
        elif target in ops.POOLED_DIMS:
            self._spatial(node, ops.POOLED_DIMS[target], lambda t: operation(t, *self._plain(node.args[1:]), **self._plain(node.kwargs)), what)
        elif target in (torch.mean, "mean", torch.sum, "sum", torch.amax, "amax"):
            self._reduced(node, operation, what)
        elif target in ops.MOVES:
            self._move(node, lambda t: operation(t, *self._plain(node.args[1:]), **self._plain(node.kwargs)))
        elif target in ops.RESHAPES:
            self._reshape(node, operation, what)
        elif target in ops.CHUNKS:
            self._chunk(node, operation, what)
        elif target in ops.SPLITS:
            self._split(node, operation, what)
        elif target in (torch.cat, torch.concat):
            self._cat(node, what)
        elif target is operator.getitem:
            self._getitem(node, what)
        elif getattr(target, "__name__", "") == "stochastic_depth":
            self._elementwise(node, lambda t, *rest: t, what, in_place=False)
        elif target is F.interpolate:
            self._spatial(node, len(self._shape(node)) - 2, lambda t: t, what)
        else:
            self._pin_inputs(node, f"read by {what}{_line(node)}")

    def _weighted(self, node: fx.Node, name: str, module: Any, plain: bool) -> None:
        """Convolution or linear layer: reads the channels before it and makes channels of its own."""
        is_linear, is_transposed = isinstance(module, nn.Linear), isinstance(module, ops.Transposed)
        shape = self._shape(node)
        dim = len(shape) - 1 if is_linear else len(shape) - module.weight.dim() + 1
        groups = 1 if is_linear else module.groups
        weight = self.names.get(id(module.weight)) if plain else None
        if weight is None:
            self._pin_inputs(node, f"read by {name!r}, whose weight is parametrized")
            self._own(node, name, module, dim)
            self.atoms.pin(self.atoms.places[self._first_parameter(name, module), 0], "its weight is parametrized")
            return
        out_dim, in_dim = (1, 0) if is_transposed else (0, 1)
        num_out = module.weight.shape[out_dim]
        is_depthwise = groups > 1 and module.weight.numel() > 0 and module.weight.shape[in_dim if not is_transposed else out_dim] == 1
        rows = self.atoms.of(weight, out_dim, num_out)
        self.owners[node] = [(weight, out_dim)]
        self.kinds.setdefault(weight, "linear" if is_linear else "conv")
        source = self._value(node.args[0]) if module.weight.numel() else None  # one of no channels reads none
        labels = source.vector(dim, module.weight.shape[in_dim] * (1 if is_transposed else groups)) if source is not None else None
        if is_transposed and groups > 1:
            if source is not None:
                self.atoms.pin(source.labels, f"read by grouped convolution {name!r}")
            self.atoms.pin(rows, "grouped convolution")
            out = rows.repeat(groups)
        elif is_depthwise:
            out = rows
            if source is not None and labels is None:
                self.atoms.pin(source.labels, f"read by {name!r} along another dimension")
                self.atoms.pin(rows, f"{name!r} reads channels along another dimension")
            elif labels is not None:
                per_channel = num_out // groups
                self.atoms.tie(rows, labels.repeat_interleave(per_channel))
                self.atoms.pin(rows[labels.repeat_interleave(per_channel) == NONE], "depthwise convolution of values that belong to no neuron")
                # What is zero stays zero since its filter and bias are zero too.
            else:
                self.atoms.pin(rows, "depthwise convolution of values that belong to no neuron")
        else:
            out = rows
            if groups > 1 and module.weight.numel():  # as many of each group must stay: the same position in each is one neuron
                self.atoms.tie(rows.view(groups, -1), rows.view(groups, -1)[:1])
            if source is not None:
                self._read(node, source, labels, weight, in_dim, groups, module)
        if module.bias is not None:
            bias = self.atoms.of(self.names[id(module.bias)], 0, module.bias.shape[0])
            self.atoms.tie(bias, out)
        view = [1] * len(shape)
        view[dim] = -1
        self.values[node] = Value(out.view(view), torch.zeros([1] * len(shape), dtype=torch.float64))

    def _read(self, node: fx.Node, source: Value, labels: Tensor | None, weight: str, in_dim: int, groups: int, module: Any) -> None:
        name, dim = str(node.target), self._channel_dim(node, module)
        if labels is None:
            self.atoms.pin(source.labels, f"read by {name!r} along another dimension")
            return
        if groups > 1:
            by_group = labels.view(groups, -1)
            self.atoms.tie(by_group, by_group[:1])
            labels = by_group[0]
        if bool((source.dead != 0).any()):
            self._fold(node, source, weight, in_dim, dim, groups, module)
        place = (weight, in_dim)
        if place in self.readers:  # the same weights read again
            self.atoms.tie(self.readers[place], labels)
            unknown = (self.readers[place] == NONE) | (labels == NONE)
            for each in (self.readers[place], labels):
                self.atoms.pin(each[unknown], f"read by {name!r}, whose weights are shared with values that belong to no neuron")
        else:
            self.readers[place] = labels

    def _fold(self, node: fx.Node, source: Value, weight: str, in_dim: int, dim: int, groups: int, module: Any) -> None:
        """What a dead neuron leaves, f(0), times the weights that read it goes into a bias, or into the mean of the BatchNorm that follows."""
        reason = f"read by {source.cause}, which makes a zero {_number(source.dead)}, and then by {str(node.target)!r}"
        size = module.weight.shape[in_dim] * groups
        constant = [d for d, extent in enumerate(source.dead.shape) if extent > 1]
        if isinstance(module, ops.Transposed):
            self.atoms.pin(source.labels, f"{reason}, a transposed convolution")
        elif any(d != dim for d in constant) or not bool(source.dead.isfinite().all()):
            self.atoms.pin(source.labels, f"{reason}, not the same everywhere")
        elif not isinstance(module, nn.Linear) and module.padding_mode == "zeros" and _pads(module):
            self.atoms.pin(source.labels, f"{reason}, with zeros around it")
        elif self.uses[id(module.weight)] > 1:
            self.atoms.pin(source.labels, f"{reason}, whose weights are used more than once")
        elif (absorber := self._absorber(node, module)) is None:
            self.atoms.pin(source.labels, f"{reason}, which has no bias of its own to take that up")
        else:
            values = source.dead.movedim(dim, 0).reshape(-1).expand(size).view(groups, -1)
            if bool((values != values[:1]).any()):
                self.atoms.pin(source.labels, f"{reason}, whose groups see different values")
            self.constants[weight, in_dim] = values[0].clone(), absorber

    def _absorber(self, node: fx.Node, module: Any) -> Absorber | None:
        if module.bias is not None:
            return Absorber(self.names[id(module.bias)], 1) if self.uses[id(module.bias)] == 1 else None
        users = list(node.users)
        after = self.modules.get(str(users[0].target)) if len(users) == 1 and users[0].op == "call_module" else None
        if isinstance(after, ops.BatchNorm) and after.running_mean is not None and self.uses[id(after.weight)] == 1:
            return Absorber(self.names[id(after.running_mean)], -1)
        return None

    def _channel_dim(self, node: fx.Node, module: Any) -> int:
        rank = len(self._shape(node))
        return rank - 1 if isinstance(module, nn.Linear) else rank - module.weight.dim() + 1

    def _declared(self, node: fx.Node, name: str, module: nn.Module, rule: ModuleRule) -> None:
        source, shape, dim = self._value(node.args[0]), self._shape(node), rule.channel_dim
        tensors = dict(module.named_parameters(remove_duplicate=False))
        unknown = sorted({*rule.carries, *rule.reads, *rule.produces} - set(tensors))
        if unknown:
            raise ValueError(f"find_neurons: the rule for {type(module).__name__} names parameter {unknown[0]!r}, {name!r} has {sorted(tensors)}")
        labels = None
        if source is not None:
            before = self._shape(node.all_input_nodes[0])
            labels = source.vector(dim, before[dim])
            if labels is None:
                self.atoms.pin(source.labels, f"read by {name!r} along another dimension")
            if bool((source.dead != 0).any()):
                self.atoms.pin(source.labels, f"read by {source.cause}, and then by {type(module).__name__} {name!r}")
        made = None
        for key, along in rule.produces.items():
            tensor = self.names[id(tensors[key])]
            atoms = self.atoms.of(tensor, along, tensors[key].shape[along])
            self.kinds.setdefault(tensor, "conv" if tensors[key].dim() > 2 else "linear")
            self.owners.setdefault(node, []).append((tensor, along))
            if made is not None:
                self.atoms.tie(atoms, made)
            made = atoms if made is None else made
        for key, along in rule.reads.items():
            if labels is not None:
                self.readers[self.names[id(tensors[key])], along] = labels
        if not rule.produces:
            made = labels
            for key, along in rule.carries.items():
                if labels is not None:
                    self.atoms.tie(self.atoms.of(self.names[id(tensors[key])], along, tensors[key].shape[along]), labels)
        if made is not None:
            view = [1] * len(shape)
            view[dim] = -1
            self.values[node] = Value(made.view(view), torch.zeros([1] * len(shape), dtype=torch.float64))

    def _prelu(self, node: fx.Node, name: str, module: nn.PReLU) -> None:
        source = self._value(node.args[0])
        if source is None:
            return
        if bool((source.dead != 0).any()):
            self.atoms.pin(source.labels, f"read by {source.cause}, and then by PReLU {name!r}")
        if module.num_parameters > 1:
            labels = source.vector(1, module.num_parameters)
            if labels is None:
                self.atoms.pin(source.labels, f"read by {name!r} along another dimension")
                return
            self.atoms.tie(self.atoms.of(self.names[id(module.weight)], 0, module.num_parameters), labels)
        self.values[node] = source

    def _own(self, node: fx.Node, name: str, module: Any, dim: int) -> None:
        """Channels of a layer that nothing is known of."""
        shape = self._shape(node)
        first = self._first_parameter(name, module)
        self.kinds.setdefault(first, "linear" if isinstance(module, nn.Linear) else "conv")
        view = [1] * len(shape)
        view[dim] = -1
        self.values[node] = Value(self.atoms.of(first, 0, shape[dim]).view(view), torch.zeros([1] * len(shape), dtype=torch.float64))

    def _first_parameter(self, name: str, module: nn.Module) -> str:
        return f"{name}.{next(key for key, _ in module.named_parameters())}"

    def _batch_norm(self, node: fx.Node, name: str, module: Any) -> None:
        source = self._value(node.args[0])
        if source is None:
            return
        if not module.affine:
            self.atoms.pin(source.labels, f"BatchNorm {name!r} has no scale and shift: it makes a zero channel non-zero")
        labels = source.vector(1, module.num_features)
        if labels is None:
            self.atoms.pin(source.labels, f"read by {name!r} along another dimension")
            return
        for tensor in module.parameters():
            atoms = self.atoms.of(self.names[id(tensor)], 0, module.num_features)
            self.atoms.tie(atoms, labels)
        for key, buffer in module.named_buffers():
            if buffer.dim() == 1:
                self.buffers.append((self.names.get(id(buffer), f"{name}.{key}"), labels))
        self.values[node] = Value(source.labels, torch.zeros([1] * source.labels.dim(), dtype=torch.float64))

    def _elementwise(self, node: fx.Node, operation: Callable[..., Any], what: str, *, in_place: bool) -> None:
        source = self._value(node.args[0])
        if source is None or len(node.all_input_nodes) > 1:
            self._pin_inputs(node, f"read by {what} with other values")
            return
        rest = self._plain(node.args[1:]) if node.op != "call_module" else ()
        dead = _evaluated(operation, source.dead, *rest)
        self._set(node, Value(source.labels, dead, source.cause if torch.equal(dead, source.dead) else what), in_place=in_place)

    def _binary(self, node: fx.Node, operation: Callable[..., Any], what: str, *, is_sum: bool, in_place: bool) -> None:
        if len(node.args) != 2 or node.kwargs:
            self._pin_inputs(node, f"read by {what}")
            return
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or not all(isinstance(self.results[n], Tensor) for n in (a, b)):
            # With a number.
            source = next(v for v in (self._value(a), self._value(b)) if v is not None)
            plain = [source.dead if self._value(x) is source else self._plain(x) for x in (a, b)]
            dead = operation(*plain).to(torch.float64)
            self._set(node, Value(source.labels, dead, source.cause if torch.equal(dead, source.dead) else what), in_place=in_place)
            return
        x, y = self._value(a), self._value(b)
        shape = self._shape(node)
        if x is None or y is None:
            known, other = (x, b) if x is not None else (y, a)
            assert known is not None
            self._with_foreign(node, known, other, what, is_sum=is_sum, in_place=in_place)
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

    def _with_foreign(self, node: fx.Node, known: Value, other: fx.Node, what: str, *, is_sum: bool, in_place: bool) -> None:
        """A sum or product with a value of no neuron: a parameter's elements become part of the neurons."""
        rank, shape = len(self._shape(node)), self._shape(other)
        known = _aligned(known, rank)
        varying = known.varying
        tensor = self.names.get(id(_attribute(self.model, str(other.target)))) if other.op == "get_attr" else None
        if tensor is not None and len(varying) == 1 and isinstance(_attribute(self.model, str(other.target)), nn.Parameter):
            dim = varying[0] - rank + len(shape)
            if 0 <= dim < len(shape) and shape[dim] == known.labels.shape[varying[0]]:
                labels = known.labels.flatten()
                self.atoms.tie(self.atoms.of(tensor, dim, shape[dim]), labels)
                self.understood.add((other, node))
                self._set(node, known, in_place=in_place)
                return
        if not is_sum and all(_size_at(shape, dim, rank) == 1 for dim in varying) and not bool((known.dead != 0).any()):
            self._set(node, known, in_place=in_place)  # zero times anything
            return
        self.atoms.pin(known.labels, f"read by {what} with other values")

    def _spatial(self, node: fx.Node, num_dims: int, operation: Callable[..., Any], what: str) -> None:
        source = self._value(node.args[0] if node.args else node.kwargs["input"])
        if source is None:
            return
        shape = self._shape(node.all_input_nodes[0])
        if any(dim >= len(shape) - num_dims for dim in source.varying):
            self.atoms.pin(source.labels, f"pooled over its own dimension ({node.name})")
            return
        dead = source.dead
        if bool((dead != 0).any()):  # padding may make the rim another value
            dead = thin(_evaluated(operation, dead.expand(*dead.shape[: len(shape) - num_dims], *shape[len(shape) - num_dims :])))
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
            self.atoms.pin(source.labels, f"read by {what} over other dimensions{_line(node)}")
            return
        dead = source.dead.expand([shape[d] if d in reduced else extent for d, extent in enumerate(source.dead.shape)])
        labels, dead = source.labels, thin(_evaluated(lambda t: operation(t, *self._plain(node.args[1:]), **self._plain(node.kwargs)), dead))
        if len(self._shape(node)) < rank:
            for d in sorted(reduced, reverse=True):
                labels = labels.squeeze(d)
        self.values[node] = Value(labels, dead, source.cause or what)

    def _move(self, node: fx.Node, operation: Callable[[Tensor], Any]) -> None:
        source = self._value(node.args[0])
        if source is None:
            return
        moved = source.moved(self._shape(node.all_input_nodes[0]), operation)
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
            assert isinstance(index, int)
            self.values[node] = value[index]
            return
        if value is None:
            return
        plain = self._plain(index)
        indices = plain if isinstance(plain, tuple) else (plain,)
        if any(not isinstance(i, (int, slice, type(None), type(Ellipsis))) for i in indices):
            self.atoms.pin(value.labels, f"read by {what}")
            return
        shape = self._shape(node.all_input_nodes[0])
        before = {int(n) for n in torch.unique(value.labels)}
        [moved] = value.moved(shape, lambda t: t[plain])
        after = {int(n) for n in torch.unique(moved.labels)}
        if before != after:
            self.atoms.pin(value.labels, f"read by {what} in part")
        self.values[node] = moved

    # --- helpers

    def _value(self, node: Any) -> Value | None:
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        return value if isinstance(value, Value) and value.has_neurons else None

    def _has_neurons(self, node: fx.Node) -> bool:
        value = self.values.get(node)
        return any(v.has_neurons for v in (value if isinstance(value, list) else [value]) if v is not None)

    def _shape(self, node: Any) -> tuple[int, ...]:
        return tuple(self.results[node].shape)

    def _plain(self, argument: Any) -> Any:
        """Arguments with numbers and shapes in the place of the nodes that give them."""
        return fx.map_arg(argument, lambda node: self.results[node])

    def _set(self, node: fx.Node, value: Value, *, in_place: bool) -> None:
        self.values[node] = value
        if in_place:
            self.values[node.all_input_nodes[0]] = value

    def _pin_used_by_hand(self) -> None:
        for node in self.graph.graph.nodes:
            if node.op != "get_attr" or all((node, user) in self.understood for user in node.users):
                continue
            tensor = self.names.get(id(_attribute(self.model, str(node.target))))
            for known in (self.atoms.places, self.readers):
                for (name, _), labels in known.items():
                    if name == tensor:
                        self.atoms.pin(labels, f"{name!r} is used by hand too ({', '.join(user.name for user in node.users)})")

    def _pin_inputs(self, node: fx.Node, reason: str) -> None:
        for source in node.all_input_nodes:
            value = self.values.get(source)
            for each in value if isinstance(value, list) else [value]:
                if each is not None:
                    self.atoms.pin(each.labels, reason)


def _first_of_each(values: Tensor) -> tuple[Tensor, Tensor]:
    """The different values and where each is first."""
    kinds, which = torch.unique(values, return_inverse=True)
    first = torch.full((len(kinds),), len(values)).scatter_reduce_(0, which, torch.arange(len(values)), "amin")
    return kinds, first


def _evaluated(operation: Callable[..., Any], dead: Tensor, *rest: Any) -> Tensor:
    training = operation.training if isinstance(operation, nn.Module) else None
    if isinstance(operation, nn.Module):
        operation.training = False
    try:
        with torch.no_grad():
            result: Tensor = operation(dead.clone(), *rest)
    finally:
        if isinstance(operation, nn.Module) and training is not None:
            operation.training = training
    return result.to(torch.float64)


def _aligned(value: Value, rank: int) -> Value:
    missing = (1,) * (rank - value.labels.dim())
    return Value(value.labels.reshape(*missing, *value.labels.shape), value.dead.reshape(*missing, *value.dead.shape), value.cause)


def _size_at(shape: tuple[int, ...], dim: int, rank: int) -> int:
    place = dim - rank + len(shape)
    return shape[place] if place >= 0 else 1


def _has_tensor(result: Any) -> bool:
    return isinstance(result, Tensor) or (isinstance(result, (list, tuple)) and any(isinstance(r, Tensor) for r in result))


def _attribute(model: nn.Module, target: str) -> Any:
    for part in target.split("."):
        model = getattr(model, part)
    return model


def _pads(module: Any) -> bool:
    """Whether a convolution puts zeros around what it reads."""
    if isinstance(module.padding, str):
        return module.padding == "same" and any(size > 1 for size in module.kernel_size)
    return any(module.padding)


def _number(dead: Tensor) -> str:
    values = torch.unique(dead[dead != 0])
    return f"{float(values[0]):.4g}" if len(values) == 1 else "something else"


def _line(node: fx.Node) -> str:
    """Where in the network's source the operation stands, for reasons."""
    frames = [f for f in re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "") if "/torch/" not in f[0] and not f[0].startswith("<")]
    return f" at {frames[-1][0].rpartition('/')[2]}:{frames[-1][1]}" if frames else ""
