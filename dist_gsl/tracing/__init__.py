"""Finding the neurons of a network: every channel is followed from what produces it to what reads it. Imports torch alone."""

from __future__ import annotations

import operator
import random
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from dist_gsl.neurons import OUTPUTS, NeuronLayer, Neurons
from dist_gsl.removal import BatchNorm, Convolution, Removal, Transposed, copied
from dist_gsl.tracing.bypass import with_bypasses
from dist_gsl.tracing.following import ModuleRule
from dist_gsl.tracing.grouping import layers_of
from dist_gsl.tracing.tracer import Tracer

__all__ = ["OUTPUTS", "ModuleRule", "check_precision", "find_neurons"]


def find_neurons(model: nn.Module, example_inputs: Tensor, *, rules: Mapping[type[nn.Module], ModuleRule] | None = None) -> Neurons:
    """The neurons of a model, found by following it symbolically; the model is left as it is.

    example_inputs: one batch of the shape that the model takes. Call it before DDP wraps the model. Shapes alone are followed, with no
    tensor's contents, unless the model asks for a value.
    rules: for modules that tracing cannot see through, `{MyModule: ModuleRule(...)}`; any other that is not understood pins the
    neurons which it reads. `neurons.explain()` tells what was found.

    `ValueError`, naming the operation and the line, if the model cannot be traced or does not take the inputs, or holds parameters in
    bfloat16 or float16 (a shrink of 0.1 % rounds away there for ever).
    """
    check_precision(model)
    rules = dict(rules or {})
    if rules:  # their modules may look at values
        return _find(model, example_inputs, rules, on_values=True)
    try:
        return _find(model, example_inputs, rules, on_values=False)
    except ValueError:  # whoever asks for a value in forward gets one, at the price of running it
        return _find(model, example_inputs, rules, on_values=True)


def _find(model: nn.Module, example_inputs: Tensor, rules: dict[type[nn.Module], ModuleRule], *, on_values: bool) -> Neurons:
    outline = copied(model, lambda _, t: t.detach().clone() if on_values else torch.empty_like(t, device="meta")).eval()
    x = example_inputs if on_values else torch.empty_like(example_inputs, device="meta")
    try:
        graph = fx.GraphModule(outline, _traced(outline, tuple(rules)))
        for name, constant in graph._buffers.items():  # made in forward, or held by it
            if constant is not None and constant.device != x.device:
                graph._buffers[name] = constant.to(x.device)
    except Exception as error:
        raise ValueError(
            f"find_neurons: {type(model).__name__} cannot be traced by torch.fx ({_first_line(error)}{_where(error)}); make its control flow "
            "independent of values, or give a rule for the module that holds it (rules={Module: ModuleRule(...)})"
        ) from error
    trace = Tracer(outline, graph, _results(graph, model, x), rules)
    trace.run()
    layers = with_bypasses(trace, layers_of(trace, dict(outline.named_parameters(remove_duplicate=False))))
    resizers = {kind: rule.resize for kind, rule in rules.items() if rule.resize is not None}
    shape = tuple(example_inputs.shape) if example_inputs.is_floating_point() else ()  # random indices would be out of range
    layers = _tried(Neurons(outline, layers, input_shape=shape, resizers=resizers), x)
    return Neurons(model, layers, input_shape=shape, resizers=resizers)


def check_precision(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}: a shrink of 0.1 % rounds away there for ever; "
                "keep parameters in float32 and use autocast for speed"
            )


def _traced(model: nn.Module, leaves: tuple[type[nn.Module], ...]) -> fx.Graph:
    try:
        return _FxTracer(leaves, sees_buffers=True).trace(model)
    except Exception:  # its control flow depends on a buffer, which is a constant then
        return _FxTracer(leaves, sees_buffers=False).trace(model)


class _FxTracer(fx.Tracer):
    """Modules with a rule stay whole; every node knows its line."""

    def __init__(self, leaves: tuple[type[nn.Module], ...], *, sees_buffers: bool) -> None:
        super().__init__()
        self._leaves = leaves
        self.proxy_buffer_attributes = sees_buffers

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.stack_trace = _place()  # torch's own record of it imports its whole compiler, three seconds
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*self._leaves, *Convolution, *Transposed, *BatchNorm, nn.Linear, nn.MultiheadAttention)) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _place() -> str | None:
    """The line of the network's own source that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and not file.startswith("<") and file != __file__:
            return f'File "{file}", line {frame.f_lineno}'
        frame = frame.f_back
    return None


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is; torch.fx takes it for x = x + y, and the other names of x would be followed as they were."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


def _results(graph: fx.GraphModule, model: nn.Module, example_inputs: Tensor) -> dict[fx.Node, Any]:
    """What each node gives: a tensor without contents, a number, a shape."""
    found: dict[fx.Node, Any] = {}

    class Kept(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = result = super().run_node(n)
            return result

    try:
        with torch.no_grad(), example_inputs.device:
            Kept(graph, garbage_collect_values=False).run(example_inputs)
    except Exception as error:
        raise ValueError(
            f"find_neurons: {type(model).__name__} does not take example_inputs of shape {tuple(example_inputs.shape)} "
            f"and {example_inputs.dtype}: {_first_line(error)}"
        ) from error
    return found


def _tried(neurons: Neurons, x: Tensor) -> list[NeuronLayer]:
    """The layers, those pinned without which the network does not run: a size may be fixed in its code where tracing does not see it."""
    layers = neurons.all_layers

    def error_without(few: list[NeuronLayer], lost: Callable[[NeuronLayer], int], *, training: bool) -> str | None:
        """What running fails with where each of these layers has lost so many neurons."""
        keep = {layer.name: torch.ones(layer.num_neurons, dtype=torch.bool) for layer in layers if layer.pinned is None}
        for layer in few:
            keep[layer.name][: lost(layer)] = False
        try:
            smaller = Removal(neurons, keep).model(neurons.model).train(training)
            with torch.no_grad(), x.device:
                smaller(batch if training else x)
        except Exception as error:  # whatever a network of the user's own raises
            return f"{_first_line(error)}{_where(error)}"
        return None

    def failing(few: list[NeuronLayer], lost: Callable[[NeuronLayer], int], *, training: bool = False) -> dict[str, str]:
        """{layer: error}, by halves."""
        error = error_without(few, lost, training=training) if few else None
        if error is None:
            return {}
        if len(few) == 1:
            return {few[0].name: error}
        middle = len(few) // 2
        return {**failing(few[:middle], lost, training=training), **failing(few[middle:], lost, training=training)}

    batch = torch.cat([x, x])  # BatchNorm refuses to train on one value
    whole = error_without([], lambda _: 0, training=False)
    if whole is not None:
        raise ValueError(f"find_neurons: {type(neurons.model).__name__} does not run: {whole}")
    some = [layer for layer in layers if layer.pinned is None and layer.num_neurons > 1]
    trains = error_without([], lambda _: 0, training=True) is None
    fixed = failing(some, lambda _: 1, training=trains)  # auxiliary classifiers are there in training alone
    # What fails alone may fit when all go together: a random part of the layers, and nearly all of their neurons.
    choice = random.Random(0)
    for _ in range(3):
        part = [layer for layer in some if layer.name not in fixed and choice.random() < 0.5]
        fixed.update(failing(part, lambda layer: choice.randrange(1, layer.num_neurons)))
    fixed.update(failing([layer for layer in some if layer.name not in fixed], lambda layer: layer.num_neurons - 1))
    reasons = {name: f"the network does not run without one of them: {error}" for name, error in fixed.items()}
    layers = [replace(layer, pinned=reasons[layer.name]) if layer.name in reasons else layer for layer in layers]
    neurons = Neurons(neurons.model, layers, input_shape=neurons.input_shape, resizers=neurons.resizers)
    empty = failing([layer for layer in neurons if layer.bypassed], lambda layer: layer.num_neurons)
    return [replace(layer, bypassed=layer.bypassed and layer.name not in empty and layer.pinned is None) for layer in layers]


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _where(error: BaseException) -> str:
    """The line of the network's own code at which it was raised."""
    import torch as library

    inside = library.__path__[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((inside, "<", __file__))]
    return f", {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
