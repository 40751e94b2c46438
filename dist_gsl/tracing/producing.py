"""Modules with parameters of channels: what they read, make, carry, and what of f(0) they take up. Imports torch alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from dist_gsl.attention import heads_of
from dist_gsl.neurons import Absorber
from dist_gsl.tracing import operations as ops
from dist_gsl.tracing.following import Attention, Following, ModuleRule
from dist_gsl.tracing.labels import NONE, Value


class Producing(Following):
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
        self._reads((weight, in_dim), labels, name)

    def _reads(self, place: tuple[str, int], labels: Tensor, name: str) -> None:
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
            return Absorber(self.names[id(module.bias)], 1) if self._is_its_own(module.bias) else None
        users = list(node.users)
        after = self.modules.get(str(users[0].target)) if len(users) == 1 and users[0].op == "call_module" else None
        along_channels = self._channel_dim(node, module) == 1
        if along_channels and isinstance(after, ops.BatchNorm) and after.running_mean is not None and self._is_its_own(after.running_mean):
            return Absorber(self.names[id(after.running_mean)], -1)
        return None

    def _is_its_own(self, tensor: Tensor) -> bool:
        """Whether one call of one module is all that uses it."""
        return self.uses[id(tensor)] == 1 and id(tensor) not in self.by_hand

    def _channel_dim(self, node: fx.Node, module: Any) -> int:
        rank = len(self._shape(node))
        return rank - 1 if isinstance(module, nn.Linear) else rank - module.weight.dim() + 1

    def _attention(self, node: fx.Node, name: str, module: nn.MultiheadAttention) -> None:
        """A channel of queries and the same of keys are one neuron, which only their products read; a channel of values is one, which the
        projection after it reads. Channels that it gets and makes are as those of a linear layer."""
        weight, out = self.names.get(id(module.in_proj_weight)), module.out_proj
        given = dict(zip(("query", "key", "value"), node.args, strict=False)) | node.kwargs
        sources: list[Any] = [given[key] for key in ("query", "key", "value")]
        odd = (
            "whose keys or values have a width of their own" if module.in_proj_weight is None
            else "which adds a key and a value" if module.bias_k is not None or module.add_zero_attn
            else "which has hooks" if any(m._forward_hooks or m._forward_pre_hooks for m in (module, out))
            else "whose weights are parametrized" if weight is None or id(out.weight) not in self.names or type(out).forward is not nn.Linear.forward
            else "which is given something else than activations" if not all(isinstance(source, fx.Node) for source in sources)
            else None
        )  # fmt: skip
        if odd is not None or weight is None:
            self._give_up(node, module, f"read by MultiheadAttention {name!r}, {odd}")
            return
        for other in node.all_input_nodes:
            if other not in sources and (value := self._value(other)) is not None:
                self.atoms.pin(value.labels, f"a mask of MultiheadAttention {name!r}")
        width = module.in_proj_weight.shape[1]
        for source in dict.fromkeys(sources):
            value = self._value(source)
            labels = None if value is None else value.vector(len(self._shape(source)) - 1, width)
            if value is not None and labels is None:
                self.atoms.pin(value.labels, f"read by {name!r} along another dimension")
            elif value is not None and bool((value.dead != 0).any()):
                self.atoms.pin(value.labels, f"read by {value.cause}, and then by MultiheadAttention {name!r}")
            self._reads((weight, 1), torch.full((width,), NONE) if labels is None else labels, name)
        query_key, values = (len(heads) for heads in heads_of(module))
        rows = self.atoms.of(weight, 0, 2 * query_key + values)
        q, k, v = rows.split([query_key, query_key, values])
        self.atoms.tie(q, k)
        if module.in_proj_bias is not None:
            self.atoms.tie(self.atoms.of(self.names[id(module.in_proj_bias)], 0, len(rows)), rows)
        self.read_inside.append(q)
        self._reads((self.names[id(out.weight)], 1), v, f"{name}.out_proj")
        made = self.atoms.of(self.names[id(out.weight)], 0, out.weight.shape[0])
        if out.bias is not None:
            self.atoms.tie(self.atoms.of(self.names[id(out.bias)], 0, len(made)), made)
        self.kinds.update({weight: "linear", self.names[id(out.weight)]: "linear"})
        self.titles += [(q, f"{name}.query_key"), (v, f"{name}.value")]
        self.attentions[node] = Attention(q, v, *sources)
        zero = torch.zeros([1] * len(self._shape(sources[0])), dtype=torch.float64)
        nothing = Value(torch.full([1], NONE), zero)
        self.values[node] = [Value(made.view(*zero.shape[:-1], -1), zero), nothing]

    def _declared(self, node: fx.Node, name: str, module: nn.Module, rule: ModuleRule) -> None:
        source, shape = self._value(node.args[0]), self._shape(node)
        dim = rule.channel_dim % len(shape)
        for other in node.all_input_nodes:
            value = self._value(other)
            if other is not node.args[0] and value is not None:
                self.atoms.pin(value.labels, f"a second input of {type(module).__name__} {name!r}")
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
            if made is not None:
                self.atoms.tie(atoms, made)
            made = atoms if made is None else made
        for key, along in rule.reads.items():
            if labels is not None:
                self._reads((self.names[id(tensors[key])], along), labels, name)
        if not rule.produces and not rule.reads:
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


def _pads(module: Any) -> bool:
    """Whether a convolution puts zeros around what it reads."""
    if isinstance(module.padding, str):
        return module.padding == "same" and any(size > 1 for size in module.kernel_size)
    return any(module.padding)


def _number(dead: Tensor) -> str:
    values = torch.unique(dead[dead != 0])
    return f"{float(values[0]):.4g}" if len(values) == 1 else "something else"
