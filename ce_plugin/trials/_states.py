"""What a batch of trials knows of one value in the network: clean, one channel differs, one window differs, dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map


@dataclass(frozen=True)
class CleanMap:
    """A clean value, (1, ...), of which the shape is known; it is run, and kept, only where its elements are needed.

    Args:
        shape, dtype, device: of the value.
        get: returns it.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    get: Callable[[], Tensor]

    @classmethod
    def of(cls, value: Tensor) -> CleanMap:
        """A value that is there."""
        return cls(value.shape, value.dtype, value.device, lambda: value)

    @property
    def value(self) -> Tensor:
        """The value."""
        return self.get()

    @property
    def nbytes(self) -> int:
        """Bytes that the value takes, also while it is not there."""
        return self.shape.numel() * self.dtype.itemsize

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


@dataclass(frozen=True)
class Clean:
    """No row differs from the clean value, (1, ...)."""

    clean: Tensor


@dataclass(frozen=True)
class Dense:
    """Every row may differ everywhere: values (B, ...)."""

    value: Tensor


@dataclass(frozen=True)
class Channel:
    """A row differs from the clean value in one block of consecutive channels (dimension 1).

    Args:
        clean: (1, C, ...).
        start: first channel of each row's block, int64 (B,).
        value: the block's values, (B, m, ...).
    """

    clean: CleanMap
    start: Tensor
    value: Tensor

    @property
    def channels(self) -> Tensor:
        """Which channels differ, int64 (B, m)."""
        return self.start[:, None] + torch.arange(self.value.shape[1], device=self.start.device)

    def taken(self, full: Tensor) -> Tensor:
        """Each row's block of a full value, which has one row or B, (B, m, ...)."""
        rows = torch.arange(len(self.start), device=self.start.device) % len(full)
        return full[rows[:, None], self.channels]

    def difference(self) -> Tensor:
        """Value minus clean value, (B, m, ...)."""
        return self.value - self.taken(self.clean.value)


@dataclass(frozen=True)
class Window:
    """A row differs from the clean map in one rectangle.

    Args:
        clean: (1, C, H, W).
        top: first row of the rectangle, int64 (B,).
        left: its first column.
        crop: the values in it, (B, C, h, w).
    """

    clean: CleanMap
    top: Tensor
    left: Tensor
    crop: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the rectangle."""
        return self.crop.shape[2], self.crop.shape[3]

    def difference(self) -> Tensor:
        """Value minus clean value, (B, C, h, w)."""
        return self.crop - gathered(self.clean.value, self.top, self.left, self.size)


State: TypeAlias = "Clean | Dense | Channel | Window"


def as_dense(state: Any, rows: int) -> Any:
    """All rows in full; a clean value is only expanded."""
    if isinstance(state, Dense):
        return state.value
    if isinstance(state, Clean):
        return state.clean.expand(rows, *state.clean.shape[1:])
    if isinstance(state, Channel):
        full = _repeated(state.clean.value, rows)
        full[torch.arange(rows, device=full.device)[:, None], state.channels] = state.value
        return full
    if isinstance(state, Window):
        return overlaid(state.clean.value, state)
    return state


def _repeated(clean: Tensor, rows: int) -> Tensor:
    """Copies of one row, in its own memory format."""
    full = clean.new_empty((rows, *clean.shape[1:]))
    if clean.dim() == 4 and clean.is_contiguous(memory_format=torch.channels_last):
        full = full.to(memory_format=torch.channels_last)
    return full.copy_(clean.expand_as(full))


def _cells(top: Tensor, left: Tensor, size: tuple[int, int], width: int) -> Tensor:
    """Positions in a flattened map of the cells of each row's rectangle, (B * h * w,)."""
    rows = top[:, None] + torch.arange(size[0], device=top.device)
    columns = left[:, None] + torch.arange(size[1], device=left.device)
    return (rows[:, :, None] * width + columns[:, None, :]).flatten()


def gathered(maps: Tensor, top: Tensor, left: Tensor, size: tuple[int, int], *, own: bool = False) -> Tensor:
    """A rectangle for each row, (B, C, h, w), channels last in memory.

    Args:
        maps: one map for all rows, (1, C, H, W), or with ``own`` each row's, (B, C, H, W).
        top, left: first row and column, int64 (B,).
        size: height and width.
    """
    _, channels, height, width = maps.shape
    cells = _cells(top, left, size, width)
    if own:
        first = torch.arange(len(top), device=top.device) * (height * width)
        cells = (cells.view(len(top), -1) + first[:, None]).flatten()
    table = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    return table.index_select(0, cells).view(len(top), *size, channels).permute(0, 3, 1, 2)


def overlaid(clean: Tensor, window: Window) -> Tensor:
    """The full map of each row, (B, C, H, W), channels last in memory."""
    rows, (_, channels, height, width) = len(window.top), clean.shape
    # Always a copy: of one row `contiguous` would return the clean map itself, which is then written to.
    own = clean[0].permute(1, 2, 0).expand(rows, height, width, channels)
    full = own.clone(memory_format=torch.contiguous_format)
    cells = _cells(window.top, window.left, window.size, width).view(rows, -1)
    cells = cells + torch.arange(rows, device=cells.device)[:, None] * (height * width)
    crop = window.crop.permute(0, 2, 3, 1).reshape(-1, channels)
    full.view(-1, channels).index_copy_(0, cells.flatten(), crop)
    return full.permute(0, 3, 1, 2)


def select(state: Any, index: Tensor) -> Any:
    """Some rows of a state."""
    if isinstance(state, Dense):
        return Dense(state.value[index])
    if isinstance(state, Channel):
        return replace(state, start=state.start[index], value=state.value[index])
    if isinstance(state, Window):
        return replace(state, top=state.top[index], left=state.left[index], crop=state.crop[index])
    if isinstance(state, (tuple, list, dict)):
        return tree_map(lambda part: select(part, index), state, is_leaf=is_state)
    return state


def is_state(value: object) -> bool:
    """Whether a value in the network is a tensor that batches follow."""
    return isinstance(value, (Clean, Dense, Channel, Window))


def nbytes(value: Any) -> int:
    """Bytes that the rows of a state take."""
    total = 0
    for part in tree_flatten(value, is_leaf=is_state)[0]:
        held = part
        if isinstance(part, (Dense, Channel)):
            held = part.value
        elif isinstance(part, Window):
            held = part.crop
        if isinstance(held, Tensor):
            total += held.numel() * held.element_size()
    return total
