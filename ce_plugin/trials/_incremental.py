"""Trials that each change little at a site, run through the suffix: each value is known as far as it differs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ce_plugin.networks.forward import OutputSelector, select_heads
from ce_plugin.networks.graph import Suffix, SuffixConstants, flops_of
from ce_plugin.networks.tracing import Untraceable, traced
from ce_plugin.trials._channels import follow_channels, mixes
from ce_plugin.trials._operations import Cat, Conv, Norm, Operation, Pointwise, Pool, resolve
from ce_plugin.trials._states import Channel, Clean, CleanMap, Dense, State, Window, as_dense, is_state, nbytes, select
from ce_plugin.trials._windows import follow_windows, window_of
from ce_plugin.trials.batches import TrialBatch, TrialSpec, Values

# Rows of a batch whose values fill this much memory run fastest on CPUs: more of them fall out of the caches.
_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# Rows of the first batch, which shows how much memory a row takes; fewer where so many times what the site's value
# takes would not fit into the budget.
_FIRST, _GUESS = 8, 16
# How often a row's outputs are held at once on their way from the network to the outcomes.
_COPIES = 6
# What rows take at the peak, measured, in multiples of what is counted: blocks are gathered, unfolded and pasted, and
# the allocator keeps the gaps between blocks of many sizes. Clean values that are kept make such gaps, too.
_HELD = {"window differences": 5.0, "channel differences": 2.5}
_KEPT = 2
_MOST = 8192


class IncrementalTrials:
    """Runs batches of trials that each set one unit of a site.

    Args:
        suffix: the network from the site on.
        captured: a clean pass of the examples.
        output: which part of the network's output is explained.
    """

    def __init__(self, suffix: Suffix, captured: SuffixConstants, output: OutputSelector) -> None:
        self.forward, self.output = IncrementalForward(suffix, captured), output
        self.route = "suffix"
        self._output_bytes = 0

    def reference(self, n: int) -> dict[str, Tensor]:
        """The clean outputs of N examples: the very numbers that a row in which nothing differs has."""
        parts: dict[str, list[Tensor]] = {}
        for example in range(n):
            with torch.inference_mode(), traced():
                heads = select_heads(self.forward.clean_output(example), self.output)
            for name, head in heads.items():
                parts.setdefault(name, []).append(head.clone())
            self._output_bytes = nbytes(heads)
        with traced():
            return {name: torch.cat(part) for name, part in parts.items()}

    def __call__(self, spec: TrialSpec, rows: TrialBatch, values: Values) -> dict[str, Tensor]:
        """The heads' outputs of one batch of rows, (B, ...) each."""
        (masks,) = spec.units.masks(rows.assignments, rows.examples)
        groups: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(rows.examples.tolist(), rows.variants.tolist(), strict=True)):
            groups.setdefault(key, []).append(row)
        parts: dict[str, list[Tensor]] = {}
        order: list[int] = []
        for (example, variant), members in groups.items():
            here = masks if len(groups) == 1 else masks[members]
            with torch.inference_mode(), traced():
                heads = select_heads(self.forward(example, values[example][variant][0], here), self.output)
                with_rows(heads, len(members))
            self.route = self.forward.route
            for name, head in heads.items():
                parts.setdefault(name, []).append(head.to(spec.device).clone())
            order += members
        if len(groups) == 1:
            return {name: part[0] for name, part in parts.items()}
        back = torch.tensor(order).argsort().to(spec.device)
        return {name: torch.cat(part)[back] for name, part in parts.items()}

    def rows(self, budget: int, device: torch.device) -> tuple[int, int]:
        """How many rows a batch should have, and how many the memory budget allows."""
        if not self.forward.bytes_per_row:
            site = self.forward.captured.site
            guess = max(1, min(_FIRST, budget // max(_GUESS * site[:1].numel() * site.element_size(), 1)))
            return guess, guess
        each = self.forward.bytes_per_row + _COPIES * self._output_bytes
        room = budget - self.kept_bytes
        held = each * _HELD.get(self.route, 1.0)
        limit = max(1, min(int(room // held), _MOST))
        return max(1, min(max(_BYTES.get(device.type, _BYTES["cuda"]) // each, 4), limit)), limit

    @property
    def kept_bytes(self) -> int:
        """Bytes that the clean values take that are kept from one batch to the next."""
        return _KEPT * nbytes(self.forward.clean_value.kept)

    @property
    def pass_bytes(self) -> int:
        """Bytes that one row takes beside a pass through the whole network, as far as rows have shown."""
        return self.kept_bytes + int(self.forward.bytes_per_row * _HELD.get(self.route, 1.0))

    def kind(self, spec: TrialSpec) -> str:
        """How flips of the site's units start: as a "channel", as a "window", or "" where neither."""
        site, masks = self._sample(spec)
        start = initial(site, site + 1, masks)
        return "channel" if isinstance(start, Channel) else "window" if isinstance(start, Window) else ""

    def area(self, spec: TrialSpec) -> int:
        """How many elements three of the units have."""
        return int(self._sample(spec)[1].sum())

    def cost(self, spec: TrialSpec) -> float:
        """What a row costs, in forward passes of the whole network, counted on three rows of the first example."""
        site, masks = self._sample(spec)
        found = self.forward.cost(site + 1, masks)
        self.route = self.forward.route
        return found

    @staticmethod
    def _sample(spec: TrialSpec) -> tuple[Tensor, Tensor]:
        n_units = int(spec.units.n_units[0])
        chosen = sorted({n_units // 4, n_units // 2, 3 * n_units // 4})
        assignments = torch.nn.functional.one_hot(torch.tensor(chosen), spec.units.width).bool()
        site = spec.inputs[0][:1]
        (masks,) = spec.units.masks(assignments, torch.zeros(len(chosen), dtype=torch.int64))
        return site, masks.to(site.device)


def with_rows(heads: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The heads of a traced part, which must have a value for each row.

    Raises:
        Untraceable: they have not; whether the network has is for a pass through the whole to say.
    """
    # For one row "a value per row" and "a value per batch" are the same.
    if rows > 1 and any(head.dim() == 0 or len(head) != rows for head in heads.values()):
        raise Untraceable("its traced part returns another number of rows than it is given")
    return heads


class IncrementalForward:
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
        last_uses: by operation, the values that are not needed after it.

    Example:
        >>> from ce_plugin.networks.graph import HookPoint
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)).eval()
        >>> x = torch.rand(1, 1, 3, 3)
        >>> suffix = Suffix(network, HookPoint(network[0]))
        >>> forward = IncrementalForward(suffix, suffix.capture((x,)))
        >>> channels = torch.eye(4, dtype=torch.bool).view(4, 4, 1, 1)
        >>> forward(0, torch.zeros(1, 4, 3, 3), channels).shape
        torch.Size([4, 2, 3, 3])
    """

    def __init__(self, suffix: Suffix, captured: SuffixConstants) -> None:
        self.suffix, self.captured = suffix, captured
        self.bytes_per_row = 0
        self.route = "dense"
        self.last_uses = suffix.graph.last_uses(suffix.nodes, suffix.graph.outputs)
        self.clean_value = CleanValues(suffix, captured, self.last_uses)

    def __call__(self, example: int, do: Tensor, masks: Tensor) -> Any:
        """The network's raw output for every row.

        Args:
            example: which example is explained.
            do: the values that trials set, (1, ...), of the site's shape.
            masks: what each row sets, bool (B, ...), broadcastable to the site.
        """
        self.clean_value.start(example)
        site = self.clean_value.site
        start = initial(site, do.to(site), masks.to(site.device))
        self.route = {Channel: "channel differences", Window: "window differences"}.get(type(start), "dense")
        return IncrementalPass(self, start, len(masks)).output()

    def clean_output(self, example: int) -> Any:
        """The network's raw output for an example as it is: what rows in which nothing differs get."""
        self.clean_value.start(example)
        values = self.suffix.constants(self.captured, 1, torch.tensor([example]))
        for node in self.suffix.graph.outputs:
            if node in self.suffix.dependent:
                values[node] = self.clean_value(node)
        return self.suffix.graph.returned(values.__getitem__)

    def cost(self, do: Tensor, masks: Tensor, example: int = 0) -> float:
        """Floating-point operations of a row, in units of a full clean pass; measured on a few rows.

        Args:
            do: as in :meth:`__call__`.
            masks: a sample of rows, as in :meth:`__call__`.
            example: which example.
        """
        with torch.inference_mode():
            self(example, do, masks)  # the clean values are not a row's
        total = flops_of(lambda: self(example, do, masks))
        return total / max(len(masks), 1) / max(self.suffix.full_flops(self.captured), 1)


class CleanValues:
    """Runs the suffix on the clean site, operation by operation, as far as its values are asked for.

    A batch asks for them in the suffix's own order, so that the clean pass runs in step with the first one and nothing
    has to be kept for later. What was asked for once is kept for the batches that follow; the values of a whole network
    would not fit into a small budget. Most operations only ask what shape a value has, which a first pass shows.

    Args:
        suffix: of the network.
        captured: a clean pass of the examples.
        last_uses: for each node those of its arguments that no later one uses.

    Attributes:
        kept: the values that were asked for.
    """

    def __init__(self, suffix: Suffix, captured: SuffixConstants, last_uses: dict[fx.Node, list[fx.Node]]) -> None:
        self.suffix, self.captured, self._last_uses = suffix, captured, last_uses
        self.example, self.site = -1, captured.site
        self._asked: set[fx.Node] = set(suffix.graph.outputs)
        self.kept: dict[fx.Node, Any] = {}
        self._maps: dict[fx.Node, CleanMap] = {}
        self._passing: dict[fx.Node, Any] = {}
        self._next = self._furthest = 0

    def start(self, example: int) -> None:
        """From now on the values are those of this example."""
        self._drop_last()
        if example != self.example:
            self.example, self.site = example, self.captured.site[example : example + 1]
            self.kept.clear()
            self._restart()

    def __call__(self, node: fx.Node) -> Any:
        """The clean value of a node that depends on the site."""
        self._asked.add(node)
        if node is self.suffix.graph.site:
            return self.site
        if node not in self.kept and node in self._passing:
            self.kept[node] = self._passing[node]
        while node not in self.kept:
            if self._next == len(self.suffix.nodes):
                self._restart()  # it was not needed before, and is gone
            self._step()
        return self.kept[node]

    def map_of(self, node: fx.Node) -> CleanMap | None:
        """The shape of a node's clean value, (1, ...), and the way to the value; None where it is no tensor."""
        if self._furthest < len(self.suffix.nodes):
            self._restart()
            while self._next < len(self.suffix.nodes):
                self._step()
            self._restart()
        return self._maps.get(node)

    def _restart(self) -> None:
        self._next = 0
        self._passing = self.suffix.constants(self.captured, 1, torch.tensor([self.example]))
        self._passing[self.suffix.graph.site] = self.site

    def _step(self) -> None:
        self._drop_last()
        node = self.suffix.nodes[self._next]
        self._next += 1
        self._furthest = max(self._furthest, self._next)
        args = map_arg(node.args, self._passing.__getitem__)
        kwargs = map_arg(node.kwargs, self._passing.__getitem__)
        value = self._passing[node] = self.suffix.graph.call(node, args, kwargs)
        if isinstance(value, Tensor) and node not in self._maps:
            self._maps[node] = CleanMap(value.shape, value.dtype, value.device, partial(self, node))
        if node in self._asked:
            self.kept[node] = value

    def _drop_last(self) -> None:
        """Forget what the last operation needed; not before the next one, since a batch may ask for it until then."""
        if self._next:
            for arg in self._last_uses[self.suffix.nodes[self._next - 1]]:
                self._passing.pop(arg, None)
        if self._next == len(self.suffix.nodes):
            self._passing = {}


class IncrementalPass:
    """One batch on its way through the suffix.

    Args:
        forward: of which this is one call.
        start: the site's state.
        rows: of the batch.

    Attributes:
        alive: which of the rows still differ from the clean pass, and ``rows`` how many.
        unchanged: which rows do not differ although they are carried on.
    """

    def __init__(self, forward: IncrementalForward, start: State, rows: int) -> None:
        self.forward, self.suffix, self.graph = forward, forward.suffix, forward.suffix.graph
        self.total = self.rows = rows
        self.alive, self.unchanged = torch.arange(rows), torch.zeros(rows, dtype=torch.bool)
        self.values: dict[fx.Node, Any] = {self.graph.site: start}
        self.constants = self.suffix.constants(forward.captured, rows, torch.tensor([forward.clean_value.example]))
        for node in forward.captured.rows:
            self.constants[node] = tree_map_only(Tensor, lambda x: Clean(x[:1]), self.constants[node])
        self.peak, self._scratch, self._at_front = 0.0, 0, True

    def output(self) -> Any:
        """Run to the end; the network's raw output for all rows."""
        self._drop_unchanged()
        for node in self.suffix.nodes:
            if not self.rows:
                break
            self._scratch = 0
            self.values[node] = self._followed(node)
            taken = sum(map(nbytes, self.values.values())) + self._scratch
            self.peak = max(self.peak, taken / max(self.rows, 1))
            for arg in self.forward.last_uses[node]:
                self.values.pop(arg, None)
        self.forward.bytes_per_row = max(int(self.peak), self.forward.bytes_per_row, 1)
        return self.graph.returned(self._output_of)

    def _output_of(self, node: fx.Node) -> Any:
        if self.rows == self.total and not bool(self.unchanged.any()):
            return tree_map(partial(as_dense, rows=self.rows), self._value(node))
        if node in self.suffix.dependent:
            clean = self.forward.clean_value(node)
        else:
            clean = tree_map_only(Clean, attrgetter("clean"), self.constants[node])
        full = tree_map_only(Tensor, lambda x: x.expand(self.total, *x.shape[1:]).clone(), clean)
        if self.rows:
            tree_map(self._fill, full, self._value(node))
        return full

    def _fill(self, full: Any, value: Any) -> None:
        """Put the values of the rows that differ into all rows."""
        if isinstance(full, Tensor):
            differ = ~self.unchanged[self.alive]
            full[self.alive[differ].to(full.device)] = as_dense(value, self.rows)[differ.to(full.device)]

    def _value(self, node: fx.Node) -> Any:
        return self.values[node] if node in self.values else self.constants[node]

    def _followed(self, node: fx.Node) -> Any:
        """What a node returns: as a difference where that can be followed, else dense."""
        args, kwargs = map_arg(node.args, self._value), map_arg(node.kwargs, self._value)
        states = list(filter(is_state, tree_leaves((args, kwargs))))
        if not states:
            return self.graph.call(node, args, kwargs)
        answer = _answer_of_query(node, args, self.rows)
        if answer is not None:
            return answer
        kinds = set(map(type, states))
        if kinds == {Clean} and node in self.suffix.dependent:
            return tree_map_only(Tensor, Clean, self.forward.clean_value(node))
        if not kinds <= {Clean, Dense}:
            operation = resolve(node, self.graph.module(node), args, kwargs)
            if self._at_front and not isinstance(operation, (Pointwise, Norm, Cat)):
                # What has not changed by now never does, but for rounding.
                self._at_front = False
                if self._drop_unchanged():
                    return self._followed(node) if self.rows else None
            mixed = operation is not None and mixes(operation) and isinstance(operation.source, Channel)
            state = None if mixed else self._difference(node, operation)
            # From here on rows are dense, and a row that need not be run is worth most.
            if state is None and self._drop_unchanged():
                return self._followed(node) if self.rows else None
            if mixed:
                state = self._difference(node, operation)
            if state is not None:
                return state
        for state in states:
            if isinstance(state, (Channel, Window)):
                self._scratch += self.rows * state.clean.nbytes
        args, kwargs = tree_map(partial(as_dense, rows=self.rows), (args, kwargs))
        return tree_map_only(Tensor, Dense, self.graph.call(node, args, kwargs))

    def _difference(self, node: fx.Node, operation: Operation | None) -> State | None:
        """The state after an operation, or None where it cannot be followed."""
        if operation is None:
            return None
        sources = operation.source if isinstance(operation.source, tuple) else (operation.source,)
        kinds, clean = set(map(type, sources)), self.forward.clean_value.map_of(node)
        if clean is None or {Channel, Window} <= kinds:
            return None
        in_channels = Channel in kinds
        state = follow_channels(operation, clean, self.rows) if in_channels else follow_windows(operation, clean)
        if state is not None:
            self._scratch = scratch(operation, state)
        return state

    def _drop_unchanged(self) -> bool:
        """Leave out rows in which no state differs from the clean pass; only possible while nothing is dense.

        Where a number is known that may be that of the rows, they are carried on, and only marked.
        """
        changed, numbers = torch.zeros(self.rows, dtype=torch.bool), False
        for part in tree_leaves(list(self.values.values())):
            if isinstance(part, (Channel, Window)):
                changed |= (part.difference() != 0).flatten(1).any(1).cpu()
            elif isinstance(part, (Dense, Tensor)):
                return False
            elif not isinstance(part, Clean):
                numbers = True
        if bool(changed.all()):
            return False
        if numbers:
            self.unchanged[self.alive[~changed]] = True
            return False
        index = changed.nonzero()[:, 0]
        self.alive, self.rows = self.alive[index], len(index)
        here = index.to(self.forward.captured.site.device)
        for node, value in self.values.items():
            self.values[node] = select(value, here)
        for node in self.forward.captured.shapes:
            self.constants[node] = self.constants[node][: len(index)]
        return True


def initial(site: Tensor, do: Tensor, masks: Tensor) -> State:
    """The smallest state that holds what each row sets."""
    if site.dim() >= 2 and masks.dim() == site.dim():
        window = window_of(site, do, masks)
        if window is not None:
            return window
        if masks.shape[1] == site.shape[1] > 1:
            channels = masks.flatten(2).any(2) if masks.dim() > 2 else masks
            if bool((channels.sum(1) <= 1).all()):
                start, rows = channels.int().argmax(1), torch.arange(len(masks), device=masks.device)
                state = Channel(CleanMap.of(site), start, site.new_empty((len(masks), 1, *site.shape[2:])))
                own = masks[rows[:, None], start[:, None]]
                return replace(state, value=torch.where(own, state.taken(do), state.taken(site)))
    return Dense(torch.where(masks, do, site))


def scratch(operation: Operation, result: State) -> int:
    """Bytes that following an operation takes for a moment, beside its result."""
    if isinstance(result, Window):
        if isinstance(operation, (Pointwise, Cat)):
            return nbytes(result)
        if isinstance(operation, (Conv, Pool)):
            (height, width), (k, s, d) = result.size, (operation.kernel, operation.stride, operation.dilation)
            size = ((height - 1) * s[0] + (k[0] - 1) * d[0] + 1, (width - 1) * s[1] + (k[1] - 1) * d[1] + 1)
            cells = len(result.top) * size[0] * size[1]
            return int(cells * (operation.source.clean.shape[1] * result.crop.element_size() + 16))
    if isinstance(operation, Conv) and isinstance(operation.source, Channel) and isinstance(result, Dense):
        rows, out, height, width = result.value.shape
        entries = operation.source.value.shape[1] * operation.kernel[0] * operation.kernel[1]
        return int(rows * entries * (height * width + out) * result.value.element_size())
    return 0


def _answer_of_query(node: fx.Node, args: Any, rows: int) -> Any:
    """What a node asks of a state's shape or type, answered without its values."""
    state = args[0] if args else None
    if not isinstance(state, (Clean, Dense, Channel, Window)):
        return None
    clean = state.value if isinstance(state, Dense) else state.clean
    name = node.args[1] if node.target is getattr else node.target if node.op == "call_method" else ""
    # Rows that are dense may have been folded with windows or patches by then.
    shape = clean.shape if isinstance(state, Dense) else torch.Size((rows, *clean.shape[1:]))
    if name == "shape" or name == "size":
        return shape[args[1]] if name == "size" and len(args) > 1 else shape
    if name in ("dim", "ndimension", "ndim"):
        return clean.dim()
    return getattr(clean, name) if node.target is getattr and name in ("dtype", "device") else None
