"""Trials that each flip one unit: what differs is carried as one channel or one window for as long as it stays so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ce_plugin.trials.clean import CleanValues
from ce_plugin.trials.flops import flops_of
from ce_plugin.trials.graph import nodes_of
from ce_plugin.trials.propagation import Propagation
from ce_plugin.trials.states import Channel, Dense, State, Window
from ce_plugin.trials.suffix import Captured, Suffix
from ce_plugin.trials.windows import window_of

__all__ = ["Local"]


class Local:
    """Runs trials of one example that each set one unit of a site, and computes only what differs.

    Flipping a channel changes one channel; operations that treat channels separately keep it so, and the first that
    mixes them is linear in most networks: W(h + d) = W h + W d, where W h is known. Flipping a small rectangle changes
    a rectangle that grows with every kernel. From where neither holds, rows are run in full. Rows in which nothing
    differs any more have the clean output, exactly.

    Args:
        suffix: of the network.
        captured: a clean pass of the examples.

    Attributes:
        bytes_per_row: growth of memory at its peak, per row that is not found to be clean; the largest so far.
        route: how the latest run's rows began: "channel differences", "window differences" or "dense".
        example: whose clean values are held.
        last_uses: by operation, the values that are not needed after it.

    Example:
        >>> from ce_plugin.trials.suffix import Point
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)).eval()
        >>> x = torch.rand(1, 1, 3, 3)
        >>> suffix = Suffix(network, Point(network[0]))
        >>> local = Local(suffix, suffix.capture((x,)))
        >>> channels = torch.eye(4, dtype=torch.bool).view(4, 4, 1, 1)
        >>> local(0, torch.zeros(1, 4, 3, 3), channels).shape
        torch.Size([4, 2, 3, 3])
    """

    def __init__(self, suffix: Suffix, captured: Captured) -> None:
        self.suffix, self.captured = suffix, captured
        self.bytes_per_row = 0
        self.route = "dense"
        nodes = suffix.nodes
        last = {arg: node for node in nodes for arg in node.all_input_nodes}
        outputs = set(nodes_of(suffix.graph.output))
        self.last_uses = {
            node: [arg for arg in node.all_input_nodes if last[arg] is node and arg not in outputs] for node in nodes
        }
        self.clean_value = CleanValues(suffix, captured, self.last_uses)

    @property
    def example(self) -> int:
        """Which example is explained now."""
        return self.clean_value.example

    @property
    def fixed_bytes(self) -> int:
        """Memory that an example's clean values take."""
        return self.clean_value.nbytes

    def __call__(self, example: int, do: Tensor, masks: Tensor) -> Any:
        """The network's raw output for every row.

        Args:
            example: which example is explained.
            do: the values that trials set, (1, ...), of the site's shape.
            masks: what each row sets, bool (B, ...), broadcastable to the site.
        """
        self.clean_value.start(example)
        site = self.captured.site[example : example + 1]
        start = initial(site, do.to(site), masks.to(site.device))
        self.route = {Channel: "channel differences", Window: "window differences"}.get(type(start), "dense")
        return Propagation(self, start, len(masks)).output()

    def clean_output(self, example: int) -> Any:
        """The network's raw output for an example as it is: what rows in which nothing differs get."""
        self.clean_value.start(example)
        return map_arg(self.suffix.graph.output, self._clean_or_constant)

    def _clean_or_constant(self, node: fx.Node) -> Any:
        if node in self.suffix.dependent:
            return self.clean_value(node)
        return self.suffix.constants(self.captured, 1, torch.tensor([self.example]))[node]

    def cost(self, do: Tensor, masks: Tensor, example: int = 0) -> float:
        """Floating-point operations of a row, in units of a full clean pass; measured on a few rows.

        Args:
            do: as in :meth:`__call__`.
            masks: a sample of rows, as in :meth:`__call__`.
            example: which example.
        """
        self(example, do, masks)  # the clean values are not a row's
        total = flops_of(lambda: self(example, do, masks))
        return total / max(len(masks), 1) / max(self.suffix.full_flops(self.captured), 1)


def initial(site: Tensor, do: Tensor, masks: Tensor) -> State:
    """The smallest state that holds what each row sets."""
    if site.dim() >= 2 and masks.dim() == site.dim():
        window = window_of(site, do, masks)
        if window is not None:
            return window
        if masks.shape[1] == site.shape[1] > 1:
            channels = masks.flatten(2).any(2) if masks.dim() > 2 else masks
            if bool((channels.sum(1) <= 1).all()):
                return _channel_of(site, do, masks, channels.int().argmax(1))
    return Dense(torch.where(masks, do, site))


def _channel_of(site: Tensor, do: Tensor, masks: Tensor, start: Tensor) -> Channel:
    state = Channel(site, start, site.new_empty((len(start), 1, *site.shape[2:])))
    rows = torch.arange(len(start), device=start.device)
    value = torch.where(masks[rows[:, None], start[:, None]], state.taken(do), state.taken(site))
    return Channel(site, start, value)
