"""The part of a network that comes after a layer, so that training need not run what comes before it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Union

import torch
from torch import Tensor, fx, nn

from ce_plugin.networks.layers import OutputSelector, find_layer, read_layer, replaced, select

__all__ = ["Remainder", "split"]

# What tracing a forward that branches on its data, or uses what a symbol cannot do, is known to raise.
_UNTRACEABLE = (
    fx.proxy.TraceError,
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    NotImplementedError,
    LookupError,
    AssertionError,
)
_ROWS = "number of rows"
# One entry per value that by-passes the layer: None stands for a tensor with a row per image, to be handed in.
Fixed = Union[None, object]


class _Tracer(fx.Tracer):
    """Takes the layer as one step, whatever is inside."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = layer

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m is self._layer or super().is_leaf_module(m, module_qualified_name)


class Remainder:
    """From a layer's output to the logits, without what comes before the layer.

    Args:
        before: images to (the layer's output, *values that by-pass it).
        after: the same values to the network's output.
        fixed: which of the values that by-pass the layer are the same for all images; None for those that are not.
        output: which part of the output holds the logits.
    """

    def __init__(
        self, before: fx.GraphModule, after: fx.GraphModule, fixed: Sequence[Fixed], output: OutputSelector
    ) -> None:
        self._before, self._after, self._fixed, self._output = before, after, list(fixed), output

    def read(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The layer's output and the values that by-pass it and have a row per image."""
        site, *rest = self._before(images)
        kept = [value for value, fixed in zip(rest, self._fixed, strict=True) if fixed is None]
        return site, kept

    def run(self, site: Tensor, beside: Sequence[Tensor]) -> Tensor:
        """The logits from the layer's output, (N, C)."""
        rows = iter(beside)
        values = [
            next(rows).clone() if fixed is None else len(site) if fixed is _ROWS else fixed for fixed in self._fixed
        ]
        # What follows the layer may work in place.
        return select(self._after(site.clone(), *values), self._output)


def split(network: nn.Module, name: str, probe: Tensor, output: OutputSelector) -> Remainder | None:
    """Cut a network at a layer; None where it cannot be traced or the parts do not do what the whole does.

    Args:
        network: in eval mode.
        name: of the layer.
        probe: a few images, two or more, on which the parts are compared with the whole.
        output: which part of the output holds the logits.
    """
    _, layer = find_layer(network, name)
    if isinstance(network, torch.jit.ScriptModule) or len(probe) < 2:
        return None
    try:
        graph = _Tracer(layer).trace(network)
        sites = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
        if len(sites) != 1 or sum(node.op == "placeholder" and not node.args for node in graph.nodes) != 1:
            return None
        before, after = _cut(network, graph, sites[0])
        fixed = _fixed(before, probe)
        if fixed is None:
            return None
        remainder = Remainder(before, after, fixed, output)
        return remainder if _agrees(network, layer, name, remainder, probe, output) else None
    except _UNTRACEABLE:
        return None


def _cut(network: nn.Module, graph: fx.Graph, site: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph up to the layer and what by-passes it, and the graph from there."""
    later: set[fx.Node] = set()
    for node in graph.nodes:
        if any(source is site or source in later for source in node.all_input_nodes):
            later.add(node)
    inputs = [source for node in graph.nodes if node in later for source in node.all_input_nodes]
    beside = [node for node in dict.fromkeys(inputs) if node is not site and node not in later]
    first, old_to_new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node not in later and node.op != "output":
            old_to_new[node] = first.node_copy(node, lambda n: old_to_new[n])
    first.output(tuple(old_to_new[node] for node in (site, *beside)))
    second = fx.Graph()
    handed = {node: second.placeholder(f"value_{i}") for i, node in enumerate((site, *beside))}
    for node in graph.nodes:
        if node in later:
            handed[node] = second.node_copy(node, lambda n: handed[n])
    return fx.GraphModule(network, first), fx.GraphModule(network, second)


def _fixed(before: fx.GraphModule, probe: Tensor) -> list[Fixed] | None:
    """What each by-passing value depends on, from two batches of different lengths; None where that is not plain."""
    few, more = before(probe[:-1])[1:], before(probe)[1:]
    found: list[Fixed] = []
    for one, other in zip(few, more, strict=True):
        if isinstance(one, Tensor) and one.dim() > 0 and (len(one), len(other)) == (len(probe) - 1, len(probe)):
            found.append(None)
        elif isinstance(one, int) and (one, other) == (len(probe) - 1, len(probe)):
            found.append(_ROWS)
        elif _equal(one, other):
            found.append(one)
        else:
            return None
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    # None stands for "a row per image" here.
    return one is not None and type(one) is type(other) and bool(one == other)


def _agrees(
    network: nn.Module, layer: nn.Module, name: str, remainder: Remainder, probe: Tensor, output: OutputSelector
) -> bool:
    """Whether the parts answer as the whole, as it is and with the layer's output changed."""
    _, clean = read_layer(network, name, probe)
    with replaced(layer, _other):
        changed = network(probe)
    site, beside = remainder.read(probe)
    pairs = ((clean, site), (changed, _other(site)))
    for wanted, value in pairs:
        logits = select(wanted, output)
        error = (remainder.run(value, beside) - logits).abs().max()
        if not bool(error <= 1e-4 * logits.abs().max() + 1e-6):
            return False
    return True


def _other(site: Tensor) -> Tensor:
    """Other activations of the same size."""
    return site.roll(1, 1) + site.std()
