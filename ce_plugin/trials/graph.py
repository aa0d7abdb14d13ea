"""A network as a graph of operations, with the place where experiments are made marked in it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ce_plugin.trials.batching import is_opaque
from ce_plugin.trials.mutation import ChangedInPlaceError, out_of_place, without_changes_in_place

__all__ = ["Graph", "Point", "Untraceable", "ancestors", "nodes_of"]

# What tracing raises where a network looks at values, or does with its symbolic inputs what only tensors can do.
_FAILURES = (
    fx.proxy.TraceError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    AssertionError,
    LookupError,
    NameError,
    ArithmeticError,
)


@dataclass(frozen=True)
class Point:
    """Where in a network an experiment sets a value.

    Args:
        module: the module whose output is set; None: the network's first tensor input.
        at_input: the module's input instead of its output.
        element: which element of a tuple output, or which of the positional inputs.
        call: which call, of a module that the network calls several times.

    Example:
        >>> Point(nn.ReLU(), at_input=True)
        Point(module=ReLU(), at_input=True, element=None, call=0)
    """

    module: nn.Module | None = None
    at_input: bool = False
    element: int | None = None
    call: int = 0


class Untraceable(Exception):  # noqa: N818 - not an error of the user's: the run takes another way
    """The network cannot be cut at this point; the one-line reason is the message."""


def site(value: Any) -> Any:
    """Marks the value that experiments set."""
    return value


def spliced(values: Any, value: Any, index: int) -> Any:
    """A tuple with one element replaced."""
    parts = [*values[:index], value, *values[index + 1 :]]
    return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)


class _Root(nn.Module):
    """The network, the decoder beside it, and which arguments are tensors."""

    def __init__(self, network: nn.Module, decoder: nn.Module | None, point: Point, args: tuple[object, ...]) -> None:
        super().__init__()
        self.network, self.decoder, self.point, self.args = network, decoder, point, args

    def forward(self, given: Any) -> Any:
        args, tensors = list(self.args), 0
        for position, arg in enumerate(args):
            if isinstance(arg, Tensor) or arg is _INPUT:
                args[position], tensors = given[tensors], tensors + 1
        if self.point.module is None:
            element = self.point.element or 0
            args[element] = _mark(args[element], self.decoder)
        return self.network(*args)


_INPUT, _FAILED = object(), object()


def _mark(value: Any, decoder: nn.Module | None) -> Any:
    marked = value.tracer.create_proxy("call_function", site, (value,), {})
    return marked if decoder is None else decoder(marked)


class _Tracer(fx.Tracer):
    """Marks the point; a part of the network that cannot be traced, and does not hold the point, stays whole."""

    def __init__(self, point: Point, decoder: nn.Module | None) -> None:
        super().__init__(autowrap_functions=())
        self.point, self.decoder, self.calls = point, decoder, 0

    def _holds_point(self, module: nn.Module) -> bool:
        inside = self.point.module
        return module is not inside and any(part is inside for part in module.modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_opaque(m):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not self._holds_point(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        here = m is self.point.module
        if here:
            self.calls += 1
            here = self.calls == self.point.call + 1
        if here and self.point.at_input:
            args, kwargs = self._with_marked_input(args, kwargs)
        output = self._called(m, forward, args, kwargs)
        return self._with_marked_output(output) if here and not self.point.at_input else output

    def _called(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        # A user's hook may look at values. What is traced without it is held against the network before it is used.
        ways = [forward, m.forward] if m._forward_hooks or m._forward_pre_hooks else [forward]
        must = self._holds_point(m) or path == "network"
        for way in ways:
            output = self._tried(way, args, kwargs, must=must and way is ways[-1])
            if output is not _FAILED:
                return output
        return self.create_proxy("call_module", path, args, kwargs)

    def _tried(self, way: Callable[..., Any], args: Any, kwargs: Any, must: bool) -> Any:
        """The output; or, where it cannot be traced and need not be, a mark, and a graph as before."""
        before, calls = set(self.graph.nodes), self.calls
        try:
            return way(*args, **kwargs)
        except _FAILURES:
            if must:
                raise
        self.calls = calls
        # Parameters' nodes stay, because the tracer keeps them for later uses.
        for node in reversed([node for node in self.graph.nodes if node not in before and node.op != "get_attr"]):
            self.graph.erase_node(node)
        return _FAILED

    def _with_marked_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        values, names = [*args, *kwargs.values()], list(kwargs)
        element = self.point.element or 0
        values[element] = _mark(values[element], self.decoder)
        return tuple(values[: len(args)]), dict(zip(names, values[len(args) :], strict=True))

    def _with_marked_output(self, output: Any) -> Any:
        element = self.point.element
        if element is None:
            return _mark(output, self.decoder)
        marked = _mark(output[element], self.decoder)
        if isinstance(output, fx.Proxy):
            return self.create_proxy("call_function", spliced, (output, marked, element), {})
        return spliced(output, marked, element)


class Graph:
    """The operations of a network in order, none of which changes a value in place.

    Args:
        network: in eval mode.
        point: where the mark is put.
        decoder: what stands between the mark and the rest.
        n_inputs: number of input tensors.
        args: additional forward arguments: tensors may vary, everything else is taken as it is here.

    Raises:
        Untraceable: the network looks at values, the point is not reached, or a tensor is changed in place while
            a view of it is used.

    Attributes:
        nodes: what the output needs, in order.
        given: the node of all tensor arguments, a tuple.
        site: the node of the mark.
        output: what the network returns, with nodes for its tensors.
    """

    def __init__(
        self, network: nn.Module, point: Point, decoder: nn.Module | None, n_inputs: int, args: tuple[object, ...]
    ) -> None:
        tracer = _Tracer(point, decoder)
        self._root = _Root(network, decoder, point, (*[_INPUT] * n_inputs, *args))
        self.n_inputs = n_inputs
        try:
            graph = tracer.trace(self._root)
            _without_splices(graph)
            without_changes_in_place(graph, self._root)
        except ChangedInPlaceError as error:
            raise Untraceable(str(error)) from error
        except _FAILURES as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise Untraceable(f"{type(error).__name__}: {first}"[:200]) from error
        last = next(node for node in graph.nodes if node.op == "output")
        self.output = last.args[0]
        live = ancestors(last.all_input_nodes)
        self.nodes = [node for node in graph.nodes if node in live]
        self.given = next(node for node in graph.nodes if node.op == "placeholder")
        marks = [node for node in self.nodes if node.target is site]
        if len(marks) != 1:
            raise Untraceable("the layer is not reached, or its output is not used")
        self.site = marks[0]

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self._root.get_submodule(cast(str, node.target))

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one operation; none of its arguments is changed."""
        if node.op == "call_module":
            return out_of_place(self.module(node), args, kwargs)
        if node.op == "call_function":
            return cast(Callable[..., Any], node.target)(*args, **kwargs)
        if node.op == "call_method":
            name = cast(str, node.target)
            if name.endswith("_") and not name.endswith("__"):
                return getattr(args[0].clone(), name)(*args[1:], **kwargs)
            return getattr(args[0], name)(*args[1:], **kwargs)
        return operator.attrgetter(cast(str, node.target))(self._root)

    def evaluate(self, nodes: Iterable[fx.Node], values: dict[fx.Node, Any], keep: Iterable[Any] = ()) -> None:
        """Run operations in order; a value is dropped after its last use, unless it is in ``keep``."""
        nodes = list(nodes)
        last = {arg: node for node in nodes for arg in node.all_input_nodes}
        kept = set(keep)
        for node in nodes:
            if node not in values:
                args = map_arg(node.args, values.__getitem__)
                values[node] = self.call(node, args, map_arg(node.kwargs, values.__getitem__))
                del args
            for arg in node.all_input_nodes:
                if last[arg] is node and arg not in kept:
                    values.pop(arg, None)


def nodes_of(value: Any) -> list[fx.Node]:
    """The nodes in an argument, which may be nested."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    map_arg(value, note)
    return found


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Some nodes and all that they are computed from."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _without_splices(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is operator.getitem and getattr(node.args[0], "target", None) is spliced:
            values, value, index = cast(fx.Node, node.args[0]).args
            if node.args[1] == index:
                node.replace_all_uses_with(cast(fx.Node, value))
                graph.erase_node(node)
            else:
                node.args = (values, node.args[1])
