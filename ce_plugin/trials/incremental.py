"""A batch of trials on its way through the suffix, each value known as far as it differs from the clean one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_map

from ce_plugin.networks.forward import select_heads
from ce_plugin.networks.graph import Suffix, SuffixConstants, flops_of
from ce_plugin.trials.batches import TrialBatch, TrialSpec, Values
from ce_plugin.trials.channels import follow_channels, mixes
from ce_plugin.trials.downstream import ForwardFromSite
from ce_plugin.trials.operations import Cat, Conv, Operation, Pointwise, Pool, resolve
from ce_plugin.trials.states import Channel, Clean, Dense, State, Window, as_dense, is_state, nbytes, select
from ce_plugin.trials.windows import follow_windows, window_of

__all__ = [
    "CleanValues",
    "IncrementalForward",
    "IncrementalPass",
    "IncrementalTrials",
    "scratch",
]


class IncrementalPass:
    """One batch on its way through the suffix."""

    def __init__(self, local: IncrementalForward, start: State, rows: int) -> None:
        self.local, self.total = local, rows
        self.graph = local.suffix.graph
        self.alive = torch.arange(rows)
        self.values: dict[fx.Node, Any] = {self.graph.site: start}
        self.constants = local.suffix.constants(local.captured, rows, torch.tensor([local.example]))
        for node in local.captured.rows:
            self.constants[node] = tree_map(_first_row, self.constants[node])
        self.peak, self._scratch = 0.0, 0

    @property
    def rows(self) -> int:
        """Rows that still differ from the clean pass."""
        return len(self.alive)

    def output(self) -> Any:
        """Run to the end."""
        self._drop_unchanged()
        for node in self.local.suffix.nodes:
            if not self.rows:
                break
            self._step(node)
        self.local.bytes_per_row = max(int(self.peak), self.local.bytes_per_row, 1)
        return map_arg(self.graph.output, self._output_of)

    def _output_of(self, node: fx.Node) -> Any:
        local = self.local
        if self.rows < self.total:
            clean = local.clean_value(node) if node in local.suffix.dependent else _plain(self.constants[node])
            if not self.rows:
                return tree_map(lambda x: _expanded(x, self.total), clean)
            values = tree_map(lambda x: as_dense(x, self.rows), self._value(node), is_leaf=is_state)
            return tree_map(self._scattered, clean, values)
        return tree_map(lambda x: as_dense(x, self.rows), self._value(node), is_leaf=is_state)

    def _scattered(self, clean: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        full = clean.expand(self.total, *clean.shape[1:]).clone()
        full[self.alive.to(full.device)] = value
        return full

    def _value(self, node: fx.Node) -> Any:
        return self.values[node] if node in self.values else self.constants[node]

    def _step(self, node: fx.Node) -> None:
        args = map_arg(node.args, self._value)
        kwargs = map_arg(node.kwargs, self._value)
        self._scratch = 0
        self.values[node] = self._followed(node, args, kwargs)
        held = sum(map(nbytes, self.values.values())) + self._scratch
        self.peak = max(self.peak, held / max(self.rows, 1))
        for arg in self.local.last_uses[node]:
            self.values.pop(arg, None)

    def _followed(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        states = [part for part in tree_flatten((args, kwargs), is_leaf=is_state)[0] if is_state(part)]
        if not states:
            return self.graph.call(node, args, kwargs)
        queried = _queried(node, args, self.rows)
        if queried is not None:
            return queried
        if all(isinstance(state, Clean) for state in states) and node in self.local.suffix.dependent:
            return tree_map(_as_clean, self.local.clean_value(node))
        if not all(isinstance(state, (Clean, Dense)) for state in states):
            module = self.graph.module(node)
            operation = resolve(node, module, args, kwargs)
            mixed = operation is not None and mixes(operation) and isinstance(operation.source, Channel)
            state = None if mixed else self._local(node, operation)
            if state is not None:
                return state
            # From here on rows are dense, and a row that need not be run is worth most.
            if self._drop_unchanged():
                again = (map_arg(node.args, self._value), map_arg(node.kwargs, self._value))
                return self._followed(node, *again) if self.rows else None
            state = self._local(node, operation) if mixed else None
            if state is not None:
                return state
        copied = [state for state in states if isinstance(state, (Channel, Window))]
        self._scratch = sum(self.rows * nbytes(state.clean) for state in copied)
        args, kwargs = tree_map(lambda part: as_dense(part, self.rows), (args, kwargs), is_leaf=is_state)
        return tree_map(_as_dense_state, self.graph.call(node, args, kwargs))

    def _local(self, node: fx.Node, operation: Operation | None) -> State | None:
        if operation is None:
            return None
        sources = operation.source if isinstance(operation.source, tuple) else (operation.source,)
        kinds = {type(source) for source in sources if is_state(source)}
        if Channel in kinds and Window in kinds:
            return None

        def clean() -> Tensor:
            value = self.local.clean_value(node)
            return value if isinstance(value, Tensor) else torch.empty(0)

        follows_channels = Channel in kinds
        state = follow_channels(operation, clean, self.rows) if follows_channels else follow_windows(operation, clean)
        if state is not None:
            self._scratch = scratch(operation, state)
        return state

    def _drop_unchanged(self) -> bool:
        """Leave out rows in which no state differs from the clean pass; only possible while nothing is dense."""
        states = []
        for value in self.values.values():
            parts = tree_flatten(value, is_leaf=is_state)[0]
            if not all(isinstance(part, (Clean, Channel, Window)) for part in parts):
                return False
            states += [part for part in parts if not isinstance(part, Clean)]
        changed = torch.zeros(self.rows, dtype=torch.bool)
        for state in states:
            changed |= (state.difference() != 0).flatten(1).any(1).cpu()
        if bool(changed.all()):
            return False
        index = changed.nonzero()[:, 0]
        self.alive = self.alive[index]
        here = index.to(self.local.captured.site.device)
        self.values = {node: select(value, here) for node, value in self.values.items()}
        for node in self.local.captured.shapes:
            self.constants[node] = self.constants[node][: len(index)]
        return True


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


def _first_row(value: Any) -> Any:
    return Clean(value[:1]) if isinstance(value, Tensor) else value


def _as_clean(value: Any) -> Any:
    return Clean(value) if isinstance(value, Tensor) else value


def _as_dense_state(value: Any) -> Any:
    return Dense(value) if isinstance(value, Tensor) else value


def _plain(value: Any) -> Any:
    return tree_map(lambda x: x.clean if isinstance(x, Clean) else x, value, is_leaf=is_state)


def _expanded(value: Any, rows: int) -> Any:
    return value.expand(rows, *value.shape[1:]).clone() if isinstance(value, Tensor) else value


def _queried(node: fx.Node, args: Any, rows: int) -> Any:
    """What a node asks of a state's shape or type, answered without its values."""
    state = args[0] if args else None
    if not isinstance(state, (Clean, Dense, Channel, Window)):
        return None
    clean = state.value if isinstance(state, Dense) else state.clean
    name = node.args[1] if node.target is getattr else node.target if node.op == "call_method" else ""
    shape = torch.Size((rows, *clean.shape[1:]))
    if name == "shape" or name == "size":
        return shape[args[1]] if name == "size" and len(args) > 1 else shape
    if name in ("dim", "ndimension", "ndim"):
        return clean.dim()
    return getattr(clean, name) if node.target is getattr and name in ("dtype", "device") else None


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

    def __init__(self, suffix: Suffix, captured: SuffixConstants, last_uses: dict[fx.Node, list[fx.Node]]) -> None:
        self.suffix, self.captured, self._last_uses = suffix, captured, last_uses
        self.example = -1
        self._outputs = set(suffix.graph.outputs)
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
        example: whose clean values are held.
        last_uses: by operation, the values that are not needed after it.

    Example:
        >>> from ce_plugin.networks.graph import HookPoint
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)).eval()
        >>> x = torch.rand(1, 1, 3, 3)
        >>> suffix = Suffix(network, HookPoint(network[0]))
        >>> local = IncrementalForward(suffix, suffix.capture((x,)))
        >>> channels = torch.eye(4, dtype=torch.bool).view(4, 4, 1, 1)
        >>> local(0, torch.zeros(1, 4, 3, 3), channels).shape
        torch.Size([4, 2, 3, 3])
    """

    def __init__(self, suffix: Suffix, captured: SuffixConstants) -> None:
        self.suffix, self.captured = suffix, captured
        self.bytes_per_row = 0
        self.route = "dense"
        nodes = suffix.nodes
        last = {arg: node for node in nodes for arg in node.all_input_nodes}
        outputs = set(suffix.graph.outputs)
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
        return IncrementalPass(self, start, len(masks)).output()

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


# Rows of a batch whose values fill this much memory run fastest on CPUs: more of them fall out of the caches.
_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# Rows of the first batch, which shows how much memory a row takes; fewer where so many times what the site's value
# takes would not fit into the budget.
_FIRST, _GUESS = 8, 16
# How often a row's outputs are held at once on their way from the network to the outcomes.
_COPIES = 6
_MOST = 8192


class IncrementalTrials:
    """Runs trials that each set one unit of a site.

    Args:
        downstream: the network from the site on, cut out.
    """

    def __init__(self, downstream: ForwardFromSite) -> None:
        if downstream.suffix is None or downstream.captured is None:
            raise TypeError("differences are followed through a suffix")
        self.forward = downstream.forward
        self.local = IncrementalForward(downstream.suffix, downstream.captured)
        self.route = "suffix"
        self._output_bytes = 0

    def reference(self, n: int) -> dict[str, Tensor]:
        """The clean outputs of N examples: the very numbers that a row in which nothing differs has."""
        parts = []
        for example in range(n):
            with torch.inference_mode():
                raw = self.local.clean_output(example)
                heads = select_heads(raw, self.forward.output)
            parts.append({name: head.clone() for name, head in heads.items()})
            self._output_bytes = sum(head.numel() * head.element_size() for head in heads.values())
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def __call__(self, spec: TrialSpec, rows: TrialBatch, values: Values) -> dict[str, Tensor]:
        """The heads' outputs of one batch of rows, (B, ...) each."""
        (masks,) = spec.units.masks(rows.assignments, rows.examples)
        groups: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(rows.examples.tolist(), rows.variants.tolist(), strict=True)):
            groups.setdefault(key, []).append(row)
        parts, order = [], []
        for (example, variant), members in groups.items():
            here = masks if len(groups) == 1 else masks[members]
            with torch.inference_mode():
                heads = select_heads(self.local(example, values[example][variant][0], here), self.forward.output)
            self.route = self.local.route
            parts.append({name: head.to(spec.device).clone() for name, head in heads.items()})
            order += members
        if len(parts) == 1:
            return parts[0]
        back = torch.tensor(order).argsort().to(spec.device)
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def rows(self, budget: int, device: torch.device) -> tuple[int, int]:
        """How many rows a batch should have, and how many the memory budget allows."""
        if not self.local.bytes_per_row:
            site = self.local.captured.site
            guess = max(1, min(_FIRST, budget // max(_GUESS * site[:1].numel() * site.element_size(), 1)))
            return guess, guess
        each = self.local.bytes_per_row + _COPIES * self._output_bytes
        limit = max(1, min((budget - self.local.fixed_bytes) // each, _MOST))
        return max(1, min(max(_BYTES.get(device.type, _BYTES["cuda"]) // each, 4), limit)), limit

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
        found = self.local.cost(site + 1, masks)
        self.route = self.local.route
        return found

    @staticmethod
    def _sample(spec: TrialSpec) -> tuple[Tensor, Tensor]:
        n_units = int(spec.units.n_units[0])
        chosen = sorted({n_units // 4, n_units // 2, 3 * n_units // 4})
        assignments = torch.nn.functional.one_hot(torch.tensor(chosen), spec.units.width).bool()
        site = spec.inputs[0][:1]
        (masks,) = spec.units.masks(assignments, torch.zeros(len(chosen), dtype=torch.int64))
        return site, masks.to(site.device)
