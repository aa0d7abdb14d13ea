"""The part of the network that depends on a site: given the site's value, it returns the network's output."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_map

from ce_plugin.trials.flops import flops_of
from ce_plugin.trials.graph import Graph, Point, Untraceable, ancestors, nodes_of

__all__ = ["Captured", "Point", "Suffix", "Untraceable"]

_QUERIES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad"}
_QUERY_METHODS = {"size", "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous", "is_floating_point"}
# Operations that take views with repeated rows without copying them first.
_BROADCASTING = {"add", "sub", "mul", "truediv", "cat", "concat"}


@dataclass
class Captured:
    """What the suffix needs of a clean pass.

    Args:
        site: the site's clean value, (N, ...).
        rows: by-passing values, N rows each.
        fixed: values that no input has a part in.
        shapes: values of which only the shape matters, one row each.
        inputs: the inputs and tensor arguments of the clean pass.
    """

    site: Tensor
    rows: dict[fx.Node, Any] = field(default_factory=dict)
    fixed: dict[fx.Node, Any] = field(default_factory=dict)
    shapes: dict[fx.Node, Tensor] = field(default_factory=dict)
    inputs: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.site)


class Suffix:
    """The part of a network that depends on a point in it.

    By-passing connections (values that the suffix uses but that do not depend on the point) are constants, taken from
    a clean pass row by row. Nothing of the network changes, and no value that is passed in.

    Args:
        network: in eval mode.
        point: the site.
        decoder: a module between site and network: the site is then its input, the code of an autoencoder, and its
            output stands for the layer's value.
        n_inputs: number of input tensors.
        args: additional forward arguments as they will come: tensors may change, everything else must not.

    Raises:
        Untraceable: ``torch.fx`` cannot follow the network, or not to this point.

    Attributes:
        is_cut: whether nothing by-passes the site, so that its value decides the output.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).eval()
        >>> x = torch.randn(5, 3)
        >>> suffix = Suffix(network, Point(network[0]))
        >>> captured = suffix.capture((x,))
        >>> suffix.is_cut, captured.site.shape
        (True, torch.Size([5, 4]))
        >>> torch.equal(suffix.run(captured, captured.site, torch.arange(5)), network(x))
        True
    """

    def __init__(
        self,
        network: nn.Module,
        point: Point,
        *,
        decoder: nn.Module | None = None,
        n_inputs: int = 1,
        args: tuple[object, ...] = (),
    ) -> None:
        self.network, self.point, self.decoder = network, point, decoder
        self.graph = Graph(network, point, decoder, n_inputs, args)
        self._args = args
        self._plan()

    def _plan(self) -> None:
        graph = self.graph
        self.dependent = _descendants(graph, [graph.site])
        self._inputs = _descendants(graph, [node for node in graph.nodes if _is_input(graph, node)])
        from_given = _descendants(graph, [graph.given]) - self.dependent
        self._about_shape = _about_shape(graph, from_given)
        again = [node for node in graph.nodes if node in self.dependent and node is not graph.site]
        # What follows from shapes alone is computed again, so that a batch of B rows finds B and not N.
        included = set(again)
        waiting = list(again)
        while waiting:
            for arg in waiting.pop().all_input_nodes:
                if arg in self._about_shape and arg not in included:
                    included.add(arg)
                    waiting.append(arg)
        self.nodes = [node for node in graph.nodes if node in included]
        boundary = {arg for node in self.nodes for arg in node.all_input_nodes} | set(nodes_of(graph.output))
        boundary -= included | {graph.site}
        self._fixed = [node for node in graph.nodes if node in boundary and node not in from_given]
        self._shapes: list[fx.Node] = []
        self._rows: list[fx.Node] = []
        for node in graph.nodes:
            if node in boundary and node in from_given:
                users = [user for user in node.users if user in included]
                only_shape = users and all(_is_query(user) for user in users) and node not in nodes_of(graph.output)
                (self._shapes if only_shape else self._rows).append(node)
        self.is_cut = not self._rows

    def capture(
        self, inputs: tuple[Tensor, ...], args: tuple[object, ...] = (), site: Tensor | None = None
    ) -> Captured:
        """Take what by-passes the site from clean inputs.

        Args:
            inputs: (N, ...) each.
            args: additional forward arguments; tensors with N rows go with their example.
            site: the site's clean value, where it is known; with a decoder it must be given. Where the site is a cut
                nothing is then run.

        Raises:
            Untraceable: something that by-passes the site has no row per example, or the arguments are others than
                those that the network was traced with.
        """
        given = (*inputs, *self._tensors_of(args))
        if self.decoder is not None and site is None:
            raise ValueError("with a decoder the code must be given as `site`")
        wanted = [*self._rows, *self._fixed, *self._shapes]
        source = self.graph.site.args[0]
        if site is None and isinstance(source, fx.Node):
            wanted.append(source)
        needed = ancestors(wanted)
        values: dict[fx.Node, Any] = {self.graph.given: given}
        self.graph.evaluate([node for node in self.graph.nodes if node in needed], values, wanted)
        n = len(inputs[0])
        value = values[source] if site is None and isinstance(source, fx.Node) else site
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != n:
            raise Untraceable("the site's value is not a tensor with one row per example")
        rows = {node: self._checked(node, values[node], n) for node in self._rows}
        shapes = {node: self._checked(node, values[node], n)[:1] for node in self._shapes}
        fixed = {node: values[node] for node in self._fixed}
        for node in [node for node in rows if rows[node] is None]:
            fixed[node] = values[node]
            del rows[node]
        return Captured(value, rows, fixed, shapes, given)

    def _tensors_of(self, args: tuple[object, ...]) -> tuple[Tensor, ...]:
        if len(args) != len(self._args):
            raise Untraceable(f"traced with {len(self._args)} additional arguments, called with {len(args)}")
        for now, then in zip(args, self._args, strict=True):
            if isinstance(now, Tensor) != isinstance(then, Tensor) or not (now is then or _is_same(now, then)):
                raise Untraceable("called with other additional arguments than it was traced with")
        return tuple(arg for arg in args if isinstance(arg, Tensor))

    def _checked(self, node: fx.Node, value: Any, n: int) -> Any:
        """A by-passing value; None where it belongs to all rows alike."""
        tensors = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
        if tensors and all(tensor.dim() and len(tensor) == n for tensor in tensors):
            return value
        if node in self._inputs:
            raise Untraceable(f"`{node.name}` by-passes the site and has no row per example")
        return None

    def run(self, captured: Captured, values: Tensor, examples: Tensor) -> Any:
        """The network's raw output with the site set.

        Args:
            captured: from :meth:`capture`.
            values: of the site, (B, ...); gradients flow back to them.
            examples: which example each row belongs to, int64 (B,).

        Returns:
            Whatever the network returns, for B rows.
        """
        here = self.constants(captured, len(values), examples)
        here[self.graph.site] = values
        outputs = list(nodes_of(self.graph.output))
        self.graph.evaluate(self.nodes, here, outputs)
        return map_arg(self.graph.output, here.__getitem__)

    def constants(self, captured: Captured, rows: int, examples: Tensor | None = None) -> dict[fx.Node, Any]:
        """The constants of a batch; without ``examples`` those of one example stand for all rows."""
        here: dict[fx.Node, Any] = {node: _usable(value) for node, value in captured.fixed.items()}
        one = examples is None or len(captured) == 1 or bool((examples == examples[0]).all())
        for node, value in captured.shapes.items():
            here[node] = value.expand(rows, *value.shape[1:])
        for node, value in captured.rows.items():
            if one and all(_broadcasts(user) for user in node.users if user in self.dependent):
                first = 0 if examples is None or len(captured) == 1 else int(examples[0])
                taken = tree_map(lambda x, k=first: x[k : k + 1].expand(rows, *x.shape[1:]), value)
            else:
                index = examples if examples is not None else torch.zeros(rows, dtype=torch.int64)
                taken = tree_map(lambda x, index=index: x[index.to(x.device)], value)
            here[node] = tree_map(_usable, taken)
        return here

    def share(self, captured: Captured) -> float:
        """Floating-point operations of the suffix, as a share of those of one full pass."""
        return self.flops(captured) / max(self.full_flops(captured), 1)

    def flops(self, captured: Captured) -> int:
        """Floating-point operations of the suffix for one example."""
        return flops_of(lambda: self.run(captured, captured.site[:1], torch.zeros(1, dtype=torch.int64)))

    def full_flops(self, captured: Captured) -> int:
        """Floating-point operations of the whole network for one example."""
        n = len(captured)
        given = tuple(x[:1] if x.dim() and len(x) == n else x for x in captured.inputs)
        wanted = ancestors([*nodes_of(self.graph.output)])
        nodes = [node for node in self.graph.nodes if node in wanted]
        values: dict[fx.Node, Any] = {self.graph.given: given}
        if self.decoder is not None:
            values[self.graph.site] = captured.site[:1]
        return flops_of(lambda: self.graph.evaluate(nodes, dict(values)))


def _descendants(graph: Graph, roots: list[fx.Node]) -> set[fx.Node]:
    found = set(roots)
    for node in graph.nodes:
        if any(arg in found for arg in node.all_input_nodes):
            found.add(node)
    return found


def _is_input(graph: Graph, node: fx.Node) -> bool:
    taken = node.target is operator.getitem and node.args[0] is graph.given
    return taken and isinstance(node.args[1], int) and node.args[1] < graph.n_inputs


def _is_query(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _QUERY_METHODS
    return node.target is getattr and node.args[1] in _QUERIES


def _about_shape(graph: Graph, of: set[fx.Node]) -> set[fx.Node]:
    """Values that depend on the inputs through their shapes alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in of and node is not graph.given:
            dependent = [arg for arg in node.all_input_nodes if arg in of]
            if _is_query(node) or (dependent and all(arg in found for arg in dependent)):
                found.add(node)
    return found


def _broadcasts(node: fx.Node) -> bool:
    return node.op != "call_module" and getattr(node.target, "__name__", node.target) in _BROADCASTING


def _is_same(now: object, then: object) -> bool:
    return isinstance(now, Tensor) or bool(now == then)


def _usable(value: Any) -> Any:
    """A value captured in inference mode may not be saved for a gradient; a copy may."""
    if isinstance(value, Tensor) and value.is_inference() and torch.is_grad_enabled():
        return value.clone()
    return value
