"""Following every channel of a network from what produces it to what reads it.

What a residual sum, a product, a depthwise convolution or shared weights tie together is one neuron; concatenation, splitting and
reshaping move channels. What is left of a dead neuron, f(0), is followed too: it is folded into the bias of what reads it where that is
exact. An operation that mixes channels in a way that leaves no exact removal pins them, by name and with the reason. Imports torch alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dist_gsl.neurons import OUTPUTS
from dist_gsl.removal import is_empty
from dist_gsl.tracing import operations as ops
from dist_gsl.tracing.arithmetic import Arithmetic
from dist_gsl.tracing.following import attribute, line
from dist_gsl.tracing.moving import Moving
from dist_gsl.tracing.producing import Producing


class Tracer(Producing, Arithmetic, Moving):
    """Follows the channels of one network, node by node."""

    def run(self) -> None:
        for node in self.graph.graph.nodes:
            if node.op == "call_module":
                self._module(node, str(node.target), self.modules[str(node.target)])
            elif node.op in ("call_function", "call_method"):
                self._call(node)
            elif node.op == "output":
                self._pin_inputs(node, OUTPUTS)
        self._pin_used_by_hand()

    def _module(self, node: fx.Node, name: str, module: nn.Module) -> None:
        plain = not any("parametrizations" in key for key, _ in module.named_parameters())
        if isinstance(module, nn.MultiheadAttention) and type(module) in ops.ATTENTION and type(module) not in self.rules:
            self._attention(node, name, module)
        elif not node.args or not isinstance(self.results[node], Tensor):
            self._give_up(node, module, f"read by {type(module).__name__} {name!r}, called with keywords or of several results")
        elif (rule := next((rule for kind, rule in self.rules.items() if isinstance(module, kind)), None)) is not None:
            self._declared(node, name, module, rule)
        elif isinstance(module, (*ops.Convolution, *ops.Transposed, nn.Linear, *ops.BatchNorm)) and not is_plain(module):
            self._give_up(node, module, f"read by {type(module).__name__} {name!r}, whose forward is its own")
        elif module._forward_hooks or module._forward_pre_hooks:
            self._give_up(node, module, f"read by {name!r}, which has hooks")
        elif isinstance(module, (*ops.Convolution, *ops.Transposed, nn.Linear)):
            self._weighted(node, name, module, plain)
        elif isinstance(module, ops.BatchNorm):
            self._batch_norm(node, name, module)
        elif isinstance(module, nn.PReLU):
            self._prelu(node, name, module)
        elif isinstance(module, nn.Flatten):
            self._move(node, lambda t: t.flatten(module.start_dim, module.end_dim))
        elif isinstance(module, nn.Unflatten):
            self._give_up(node, module, f"read by Unflatten {name!r}")
        elif isinstance(module, ops.ELEMENTWISE_MODULES):
            self._elementwise(node, module, f"{type(module).__name__} {name!r}", in_place=getattr(module, "inplace", False))
            if isinstance(module, ops.DROPOUT_MODULES):
                self._dropout_module(node, name, module)
        elif type(module) in ops.POOLED_DIMS:
            self._spatial(node, ops.POOLED_DIMS[type(module)], module, f"{type(module).__name__} {name!r}")
        else:
            self._give_up(node, module, f"read by {type(module).__name__} {name!r}{line(node)}")

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        is_method = node.op == "call_method"
        in_place = is_method and target.endswith("_") and not target.endswith("__")
        what = f".{target}() ({node.name})" if is_method else f"{getattr(target, '__name__', target)} ({node.name})"
        if in_place:
            target = target[:-1]
        if not any(self._has_neurons(source) for source in node.all_input_nodes):
            return
        if target in ops.SHAPE_ONLY or not has_tensor(self.results[node]):
            return
        if not node.args:
            self._pin_inputs(node, f"read by {what}, called with keywords alone")
            return
        operation: Callable[..., Any] = getattr(Tensor, target) if is_method else target
        if target in ops.DROPOUTS:
            self._dropout(node, what)
        elif target in ops.ELEMENTWISE_FUNCTIONS or target in ops.ELEMENTWISE_METHODS:
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
            self._spatial(node, len(self._shape(node)) - 2, lambda t: t, what, resamples=True)
        else:
            self._pin_inputs(node, f"read by {what}{line(node)}")

    def _pin_used_by_hand(self) -> None:
        for name, labels in self._all_places():
            if (reason := self.opaque.get(self.ids[name])) is not None:
                self.atoms.pin(labels, reason)
        for place, (_, absorber) in self.constants.items():
            if (reason := self.opaque.get(self.ids[absorber.tensor])) is not None:
                self.atoms.pin(self.readers[place], f"the bias that would take up its constant is shared: {reason}")
        for node in self.graph.graph.nodes:
            if node.op != "get_attr" or all((node, user) in self.understood for user in node.users):
                continue
            tensor = self.names.get(id(attribute(self.model, str(node.target))))
            module, _, last = str(tensor).rpartition(".")
            if last == "weight" and isinstance(self.modules.get(module), nn.Linear) and (tensor, 0) not in self.atoms.places:
                assert tensor is not None  # its channels are neurons too
                self.atoms.of(tensor, 0, self.results[node].shape[0])
                self.kinds.setdefault(tensor, "linear")
            for name, labels in self._all_places():
                if name == tensor:
                    self.atoms.pin(labels, f"{name!r} is used by hand too ({', '.join(user.name for user in node.users)})")

    def _all_places(self) -> list[tuple[str, Tensor]]:
        """Tensors and whose their positions are."""
        return [*((name, labels) for known in (self.atoms.places, self.readers) for (name, _), labels in known.items()), *self.buffers]


def is_plain(module: nn.Module) -> bool:
    """Whether it computes what torch's own class of its kind does."""
    own = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules"))
    methods = ("forward", "_conv_forward")
    return is_empty(module) or all(getattr(type(module), m, None) is getattr(own, m, None) for m in methods)


def has_tensor(result: Any) -> bool:
    return isinstance(result, Tensor) or (isinstance(result, (list, tuple)) and any(isinstance(r, Tensor) for r in result))
