"""Differences that stay in one window: it grows by each kernel's reach, shrinks at each stride, and only it is run.

Outside the window a map is clean; what a kernel needs from there is gathered from the clean map. Inputs
``[top, top + h)`` reach the outputs from ``ceil((top + p - (k - 1) d) / s)`` to ``floor((top + h - 1 + p) / s)``
(kernel k, stride s, padding p, dilation d); these are computed without padding. A batch's windows have one size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ce_plugin.trials._operations import Cat, Conv, Norm, Operation, Pointwise, Pool, Separable
from ce_plugin.trials._states import Clean, CleanMap, Dense, State, Window, gathered

# Windows that cover more of a map are run in full: gathering then costs more than it saves.
_LARGEST_SHARE = 0.75


def window_of(site: Tensor, do: Tensor, masks: Tensor) -> Window | None:
    """The smallest rectangles that hold what each row sets; None where they are no small part of a map."""
    if site.dim() != 4 or masks.shape[2:] != site.shape[2:]:
        return None
    where = masks.any(1)
    top, height = _extent(where.any(2))
    left, width = _extent(where.any(1))
    # One channel of a map that is set in a large part is better followed as a channel.
    share = _LARGEST_SHARE if site.shape[1] == 1 or masks.shape[1] == 1 else _LARGEST_SHARE / 2
    if height * width > share * site.shape[2] * site.shape[3]:
        return None
    size = (height, width)
    chosen = gathered(masks, top, left, size, own=True)
    crop = torch.where(chosen, gathered(do, top, left, size), gathered(site, top, left, size))
    return Window(CleanMap.of(site), top, left, crop)


def _extent(covered: Tensor) -> tuple[Tensor, int]:
    """Where each row's run of covered positions starts, and the length of the longest; all stay inside."""
    length = covered.shape[1]
    first = covered.int().argmax(1)
    last = length - 1 - covered.flip(1).int().argmax(1)
    longest = int(torch.where(covered.any(1), last - first + 1, 1).max())
    return first.clamp(max=length - longest), longest


def follow_windows(operation: Operation, clean: CleanMap) -> State | None:
    """The state after an operation on states with one differing window; None where that cannot be followed.

    Args:
        operation: its sources are states.
        clean: the operation's clean result, (1, C, H, W).
    """
    if isinstance(operation, Pointwise):
        return _pointwise(operation, clean)
    if isinstance(operation, Cat):
        return _cat(operation, clean)
    source = operation.source
    if not isinstance(source, Window):
        return None
    if isinstance(operation, Norm):
        return replace(source, clean=clean, crop=operation.apply(source.crop))
    if isinstance(operation, Conv):
        return _convolved(operation, source, clean)
    if isinstance(operation, Pool):
        return _pooled(operation, source, clean)
    if isinstance(operation, Separable) and operation.spatial == "mean":
        cells = source.clean.shape[2] * source.clean.shape[3]
        change = source.difference().sum((2, 3)) / cells
        return Dense(clean.value + change.view(len(change), *clean.shape[1:]))
    if isinstance(operation, Separable) and operation.spatial is not None:
        left, _, top, _ = operation.spatial
        return Window(clean, source.top + top, source.left + left, source.crop)
    if isinstance(operation, Separable) and clean.shape == source.clean.shape and _keeps(operation, source.clean.value):
        return source
    return None


def _keeps(operation: Separable, clean: Tensor) -> bool:
    """Whether an operation returns what it is given, as pooling to the size that a map has does."""
    return torch.equal(operation.apply(clean), clean)


def _pointwise(operation: Pointwise, clean: CleanMap) -> State | None:
    operands = operation.source
    if any(isinstance(operand, Dense) for operand in operands):
        return None
    windows = [operand for operand in operands if isinstance(operand, Window)]
    if any(window.clean.shape[2:] != clean.shape[2:] for window in windows):
        return None
    union = _union(windows)
    if _is_large(union.size, clean) or not all(_fits(operand, clean) for operand in operands):
        return None
    crops = [_cropped(operand, union, clean) for operand in operands]
    return Window(clean, union.top, union.left, operation.apply(*crops))


def _is_large(size: tuple[int, int], clean: CleanMap) -> bool:
    return size[0] * size[1] > _LARGEST_SHARE * clean.shape[2] * clean.shape[3]


def _fits(operand: Any, clean: CleanMap) -> bool:
    """Whether an operand's part in a window can be taken."""
    if isinstance(operand, Window):
        return True
    tensor = operand.clean if isinstance(operand, Clean) else operand
    if not isinstance(tensor, Tensor):
        return isinstance(tensor, (int, float, bool, type(None)))
    sizes = zip(reversed(tensor.shape), reversed(clean.shape), strict=False)
    return tensor.dim() <= clean.dim() and all(a in (1, b) for a, b in sizes)


def _cropped(operand: Any, union: Window, clean: CleanMap) -> Any:
    """An operand in a window, or as it is where its map has one cell."""
    if isinstance(operand, Window):
        return _enlarged(operand, union.top, union.left, union.size)
    tensor = operand.clean if isinstance(operand, Clean) else operand
    if not isinstance(tensor, Tensor) or tensor.numel() == 1:
        return tensor.reshape(()) if isinstance(tensor, Tensor) else tensor
    tensor = tensor.reshape(*[1] * (4 - tensor.dim()), *tensor.shape)
    if tensor.shape[2:] == (1, 1):
        return tensor
    return gathered(tensor.expand(-1, -1, *clean.shape[2:]), union.top, union.left, union.size)


def _union(windows: list[Window]) -> Window:
    """Position and size of the rectangles that hold all windows of a row; only these are meant."""
    first = windows[0]
    top, left = first.top, first.left
    bottom, right = top + first.size[0], left + first.size[1]
    for other in windows[1:]:
        top, left = torch.minimum(top, other.top), torch.minimum(left, other.left)
        bottom = torch.maximum(bottom, other.top + other.size[0])
        right = torch.maximum(right, other.left + other.size[1])
    height, width = int((bottom - top).max()), int((right - left).max())
    top = top.clamp(max=first.clean.shape[2] - height)
    left = left.clamp(max=first.clean.shape[3] - width)
    return Window(first.clean, top, left, first.crop[:, :1, :1, :1].expand(-1, 1, height, width))


def _cat(operation: Cat, clean: CleanMap) -> State | None:
    parts = operation.source
    if clean.dim() != 4 or operation.dim % 4 != 1 or not all(isinstance(part, (Clean, Window)) for part in parts):
        return None
    union = _union([part for part in parts if isinstance(part, Window)])
    if _is_large(union.size, clean):
        return None
    crops = [
        gathered(part.clean, union.top, union.left, union.size)
        if isinstance(part, Clean)
        else _enlarged(part, union.top, union.left, union.size)
        for part in parts
    ]
    return Window(clean, union.top, union.left, torch.cat(crops, 1))


def _enlarged(window: Window, top: Tensor, left: Tensor, size: tuple[int, int], fill: float = 0.0) -> Tensor:
    """Rectangles at other positions, in which ``fill`` stands outside the map and clean values outside the window."""
    if size == window.size and torch.equal(top, window.top) and torch.equal(left, window.left):
        return window.crop
    rows, (_, channels, height, width) = len(top), window.clean.shape
    before = (max(0, -int(top.min())), max(0, -int(left.min())))
    after = (max(0, int(top.max()) + size[0] - height), max(0, int(left.max()) + size[1] - width))
    around = window.clean.value
    if any(before + after):
        around = F.pad(around, (before[1], after[1], before[0], after[0]), value=fill)
    result = gathered(around, top + before[0], left + before[1], size).permute(0, 2, 3, 1)
    crop = window.crop.permute(0, 2, 3, 1)
    down, right = window.top - top, window.left - left
    inside = _steady(down, window.size[0], size[0]) and _steady(right, window.size[1], size[1])
    if inside:
        r, c = int(down[0]), int(right[0])
        result[:, r : r + window.size[0], c : c + window.size[1]] = crop
        return result.permute(0, 3, 1, 2)
    y = down[:, None] + torch.arange(window.size[0], device=top.device)
    x = right[:, None] + torch.arange(window.size[1], device=top.device)
    here = ((y >= 0) & (y < size[0]))[:, :, None] & ((x >= 0) & (x < size[1]))[:, None, :]
    row = torch.arange(rows, device=top.device)[:, None, None] * (size[0] * size[1])
    cells = (row + y[:, :, None] * size[1] + x[:, None, :])[here]
    result.view(-1, channels).index_copy_(0, cells, crop[here])
    return result.permute(0, 3, 1, 2)


def _steady(offset: Tensor, length: int, room: int) -> bool:
    """Whether all rows' windows lie at one place, inside."""
    first = int(offset[0])
    return bool((offset == first).all()) and first >= 0 and first + length <= room


def _reached(top: Tensor, length: int, reach: tuple[int, int, int, int], out: int) -> tuple[Tensor, int]:
    """First output row that a window reaches, and how many, for a kernel, stride, padding and dilation.

    As many as a window may reach wherever it lies: each new size of a window makes kernels that stay in memory.
    """
    k, s, p, d = reach
    low = torch.div(top + p - (k - 1) * d + s - 1, s, rounding_mode="floor").clamp(0, out - 1)
    longest = min((length - 1 + (k - 1) * d) // s + 1, out)
    return low.clamp(max=out - longest), longest


def _needed(operation: Conv | Pool, source: Window, clean: CleanMap, fill: float) -> tuple[Window, Tensor] | None:
    """The outputs that a window reaches (without their values), and the inputs that these need."""
    k, s, p, d = operation.kernel, operation.stride, operation.padding, operation.dilation
    top, height = _reached(source.top, source.size[0], (k[0], s[0], p[0], d[0]), clean.shape[2])
    left, width = _reached(source.left, source.size[1], (k[1], s[1], p[1], d[1]), clean.shape[3])
    if _is_large((height, width), clean):
        return None
    size = ((height - 1) * s[0] + (k[0] - 1) * d[0] + 1, (width - 1) * s[1] + (k[1] - 1) * d[1] + 1)
    inputs = _enlarged(source, top * s[0] - p[0], left * s[1] - p[1], size, fill)
    return Window(clean, top, left, source.crop[:, :1, :1, :1].expand(-1, 1, height, width)), inputs


def _convolved(operation: Conv, source: Window, clean: CleanMap) -> State | None:
    found = _needed(operation, source, clean, 0.0)
    if found is None:
        return None
    place, inputs = found
    options = (operation.stride, 0, operation.dilation, operation.groups)
    return replace(place, crop=F.conv2d(inputs, operation.weight, operation.bias, *options))


def _pooled(operation: Pool, source: Window, clean: CleanMap) -> State | None:
    largest = operation.form == "max"
    found = _needed(operation, source, clean, -torch.inf if largest else 0.0)
    if found is None:
        return None
    place, inputs = found
    if largest:
        return replace(place, crop=F.max_pool2d(inputs, operation.kernel, operation.stride, 0, operation.dilation))
    sums = F.avg_pool2d(inputs, operation.kernel, operation.stride, 0, divisor_override=1)
    return replace(place, crop=sums * gathered(_weights(operation, source), place.top, place.left, place.size))


def _weights(operation: Pool, source: Window) -> Tensor:
    """One over what the sum of each pooling window is divided by, (1, 1, H, W): it differs at the borders."""
    ones = source.crop.new_ones((1, 1, *source.clean.shape[2:]))
    count = F.avg_pool2d(ones, operation.kernel, operation.stride, operation.padding, operation.ceil, True, 1)
    weights: Tensor = operation.apply(ones) / count
    return weights
