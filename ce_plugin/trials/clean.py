"""The clean values of one example along the suffix, computed when they are asked for and kept where they are needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ce_plugin.trials.graph import nodes_of
from ce_plugin.trials.states import nbytes
from ce_plugin.trials.suffix import Captured, Suffix

__all__ = ["CleanValues"]


class CleanValues:
    """Runs the suffix on the clean site, operation by operation, as far as its values are asked for.

    A batch asks for them in the suffix's own order, so that a first one walks beside it and nothing has to be kept for
    later. What was asked for once is kept for the batches that follow; the values of a whole network would not fit
    into a small budget.

    Args:
        suffix: of the network.
        captured: a clean pass of the examples.
        last_uses: for each node those of its arguments that no later one uses.
    """

    def __init__(self, suffix: Suffix, captured: Captured, last_uses: dict[fx.Node, list[fx.Node]]) -> None:
        self.suffix, self.captured, self._last_uses = suffix, captured, last_uses
        self.example = -1
        self._outputs = set(nodes_of(suffix.graph.output))
        self._asked: set[fx.Node] = set()
        self._kept: dict[fx.Node, Any] = {}
        self._passing: dict[fx.Node, Any] = {}
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return nbytes(list(self._kept.values()))

    def start(self, example: int) -> None:
        """From now on the values are those of this example."""
        if example != self.example:
            self.example, self._kept = example, {}
            self._restart()

    def __call__(self, node: fx.Node) -> Any:
        """The clean value of a node that depends on the site."""
        self._asked.add(node)
        if node is self.suffix.graph.site:
            return self._site
        if node not in self._kept and node in self._passing:
            self._kept[node] = self._passing[node]
        while node not in self._kept:
            if self._next == len(self.suffix.nodes):
                self._restart()  # it was not needed before, and is gone
            self._step()
        return self._kept[node]

    @property
    def _site(self) -> Tensor:
        return self.captured.site[self.example : self.example + 1]

    def _restart(self) -> None:
        self._next = 0
        self._passing = self.suffix.constants(self.captured, 1, torch.tensor([self.example]))
        self._passing[self.suffix.graph.site] = self._site

    def _step(self) -> None:
        node = self.suffix.nodes[self._next]
        self._next += 1
        args, kwargs = (map_arg(part, self._passing.__getitem__) for part in (node.args, node.kwargs))
        value = self._passing[node] = self.suffix.graph.call(node, args, kwargs)
        if node in self._asked or node in self._outputs:
            self._kept[node] = value
        for arg in self._last_uses[node]:
            self._passing.pop(arg, None)
        if self._next == len(self.suffix.nodes):
            self._passing = {}
