"""A batch of trials on its way through the suffix, each value known as far as it differs from the clean one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_map

from ce_plugin.trials.channels import follow_channels, mixes
from ce_plugin.trials.operations import Cat, Conv, Operation, Pointwise, Pool
from ce_plugin.trials.resolution import resolve
from ce_plugin.trials.states import Channel, Clean, Dense, State, Window, as_dense, is_state, nbytes, select
from ce_plugin.trials.windows import follow_windows

if TYPE_CHECKING:
    from ce_plugin.trials.local import Local

__all__ = ["Propagation", "scratch"]


class Propagation:
    """One batch on its way through the suffix."""

    def __init__(self, local: Local, start: State, rows: int) -> None:
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
            module = self.graph.module(node) if node.op == "call_module" else None
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
