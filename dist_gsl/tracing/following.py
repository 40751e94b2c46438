"""What following channels needs everywhere: the values of nodes, their atoms, ties and pins. Imports torch alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from dist_gsl.neurons import Absorber
from dist_gsl.tracing.labels import Atoms, Value


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


@dataclass(frozen=True)
class Attention:
    """What a call of attention gives depends on its query and key through `query_key` alone, and through `value` on all that it is given."""

    query_key: Tensor
    """Atoms."""
    value: Tensor
    query: fx.Node
    key: fx.Node
    values: fx.Node


class Following:
    """The state of following one network. `model`, `graph` and `results` may be on the meta device: no value of a parameter is read."""

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
        self.buffers: list[tuple[str, Tensor]] = []
        self.draws: list[tuple[str, int, Tensor]] = []
        """Dropout modules, the dimension along which what they are given has labels, and these."""
        self.kinds: dict[str, str] = {}
        self.titles: list[tuple[Tensor, str]] = []
        """Atoms, and what their layer is called where the module's name does not say it."""
        self.read_inside: list[Tensor] = []
        """Atoms that the module which makes them reads itself."""
        self.attentions: dict[fx.Node, Attention] = {}
        self.opaque: dict[int, str] = {}
        """Parameters and buffers of modules that are not understood, and what they are."""
        self.understood: set[tuple[fx.Node, fx.Node]] = set()
        """Uses of parameters outside of their modules that became part of neurons."""
        # A parameter under several names is one.
        self.names: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
            self.names.setdefault(id(tensor), name)
        self.ids = {name: id(t) for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]}
        self.uses: Counter[int] = Counter()
        """How often the graph calls a module with that parameter."""
        self.by_hand: set[int] = set()
        """Parameters and buffers that the graph takes outside of their modules."""
        self.order = {node: place for place, node in enumerate(graph.graph.nodes)}
        for node in graph.graph.nodes:
            if node.op == "call_module":
                module = self.modules[str(node.target)]
                self.uses.update(id(t) for t in [*module.parameters(), *module.buffers()])
            elif node.op == "get_attr":
                self.by_hand.add(id(attribute(model, str(node.target))))
            first = next((key for key in ("input", "tensors") if key in node.kwargs), None)
            if first is not None and not node.args:  # f(input=x) is f(x)
                node.args, node.kwargs = (node.kwargs[first],), {key: value for key, value in node.kwargs.items() if key != first}

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
        if not bool(value.dead.isfinite().all()):
            self.atoms.pin(value.labels, f"{node.name} makes a zero infinite or no number")
            value = Value(value.labels, torch.zeros_like(value.dead), value.cause)
        self.values[node] = value
        if in_place:
            source = node.all_input_nodes[0]
            before = self._value(source)
            if before is None or not torch.equal(*torch.broadcast_tensors(before.dead, value.dead)):
                self._pin_aliases(node, source, value)
            self.values[source] = value

    def _pin_aliases(self, node: fx.Node, source: fx.Node, value: Value) -> None:
        """What changes in place changes under its other names too, which are followed as they were."""
        memory = _memory(self.results[source])
        for other, result in self.results.items():
            read_later = any(self.order[user] > self.order[node] for user in other.users)
            if other not in (node, source) and self.order[other] < self.order[node] and read_later and _memory(result) == memory:
                self.atoms.pin(value.labels, f"changed in place by {node.name} and read as {other.name}")

    def _give_up(self, node: fx.Node, module: nn.Module, reason: str) -> None:
        """A module that is not understood: what it reads stays, and so does what shares its parameters."""
        self._pin_inputs(node, reason)
        self.opaque.update((id(t), f"{str(node.target)!r} uses it too") for t in [*module.parameters(), *module.buffers()])

    def _pin_inputs(self, node: fx.Node, reason: str) -> None:
        for source in node.all_input_nodes:
            value = self.values.get(source)
            for each in value if isinstance(value, list) else [value]:
                if each is not None:
                    self.atoms.pin(each.labels, reason)


def evaluated(operation: Callable[..., Any], dead: Tensor, *rest: Any) -> Tensor:
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


def has_finite_slope(operation: Callable[..., Any], dead: Tensor, *rest: Any) -> bool:
    """Whether a gradient of 0 stays 0 on its way to a dead neuron: 0 times an infinite slope is no number."""
    with torch.enable_grad():
        x = dead.detach().clone().requires_grad_()
        result = operation(x * 1, *rest)  # times 1: some work in place
        if not isinstance(result, Tensor) or not result.requires_grad:
            return True
        (slope,) = torch.autograd.grad(result.sum(), x, allow_unused=True)
    return slope is None or bool(slope.isfinite().all())


def _memory(result: Any) -> int | None:
    return result.untyped_storage()._cdata if isinstance(result, Tensor) else None


def attribute(model: nn.Module, target: str) -> Any:
    for part in target.split("."):
        model = getattr(model, part)
    return model


def line(node: fx.Node) -> str:
    """Where in the network's source the operation stands, for reasons."""
    frames = [f for f in re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "") if "/torch/" not in f[0] and not f[0].startswith("<")]
    return f" at {frames[-1][0].rpartition('/')[2]}:{frames[-1][1]}" if frames else ""
