"""The network's input as a site."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from ce_plugin.errors import UnitError, expected
from ce_plugin.sites.units import MaskUnits, Units, WindowUnits, patch_grid

__all__ = ["InputSite", "Masks", "Strides", "Windows"]

Masks: TypeAlias = "Tensor | tuple[Tensor, ...] | None"
Windows: TypeAlias = "tuple[int, ...] | tuple[tuple[int, ...], ...] | None"
Strides: TypeAlias = "int | tuple[int | tuple[int, ...], ...] | None"


@dataclass(frozen=True)
class InputSite:
    """The network's input as the site: its units are patches, scalars, a feature mask's regions, or windows.

    Args:
        feature_mask: see :class:`MaskUnits`; a tensor, or a tuple as long as the inputs.
        sliding_window_shapes: see :class:`WindowUnits`; for one input a tuple of sizes, else a tuple of such.
        strides: of the windows; None means 1.
        cells: of the default grid for images, see :func:`patch_grid`.

    Example:
        >>> site = InputSite()
        >>> site.units_of((torch.zeros(1, 3, 224, 224),)).grid
        (14, 14)
        >>> site.units_of((torch.zeros(1, 5),)).labels
        ['0', '1', '2', '3', '4']
    """

    feature_mask: Masks = None
    sliding_window_shapes: Windows = None
    strides: Strides = None
    cells: int = 14

    def __repr__(self) -> str:
        given: list[tuple[str, object]] = [("feature_mask", self.feature_mask)]
        given += [("sliding_window_shapes", self.sliding_window_shapes)]
        given += [("strides", self.strides), ("cells", None if self.cells == 14 else self.cells)]
        return f"InputSite({', '.join(f'{name}={_shown(value)}' for name, value in given if value is not None)})"

    def is_grid(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether the units are the cells of a grid: one tensor of images (N, C, H, W), no mask and no windows."""
        plain = self.feature_mask is None and self.sliding_window_shapes is None
        return plain and len(inputs) == 1 and inputs[0].dim() == 4

    def units_of(self, inputs: tuple[Tensor, ...]) -> Units:
        """The units of these inputs: patches for images (N, C, H, W), each scalar for anything else."""
        if self.sliding_window_shapes is not None:
            if self.feature_mask is not None:
                raise UnitError(expected("feature_mask", "None when sliding windows are the units", "a mask"))
            return _window_units(inputs, self.sliding_window_shapes, self.strides)
        if self.strides is not None:
            raise UnitError(expected("strides", "None without `sliding_window_shapes`", self.strides))
        if self.feature_mask is not None:
            given = self.feature_mask if isinstance(self.feature_mask, tuple) else (self.feature_mask,)
            return MaskUnits(inputs, given)
        masks, offset = [], 0
        for x in inputs:
            if x.dim() == 4:
                mask = patch_grid(x.shape[2], x.shape[3], self.cells)
            else:
                mask = torch.arange(x[0].numel()).reshape(1, *x.shape[1:])
            masks.append(mask + offset)
            offset += int(mask.max()) + 1 if mask.numel() else 0
        grid = None
        if self.is_grid(inputs):
            grid = (min(inputs[0].shape[2], self.cells), min(inputs[0].shape[3], self.cells))
        return MaskUnits(inputs, tuple(masks), grid)


def _window_units(inputs: tuple[Tensor, ...], windows: Windows, strides: Strides) -> WindowUnits:
    if not isinstance(windows, (tuple, list)):
        todo = "Write (3, 15, 15) for images with three channels, for example."
        raise UnitError(expected("sliding_window_shapes", "a tuple of sizes, or a tuple of such", windows, todo))
    one_shape = not windows or not isinstance(windows[0], (tuple, list))
    nested = cast("tuple[tuple[int, ...], ...]", (windows,) if one_shape else windows)
    if len(nested) != len(inputs):
        raise UnitError(expected("sliding_window_shapes", f"{len(inputs)} shape(s), one per input", windows))
    one_stride = strides is None or isinstance(strides, int)
    if (
        isinstance(strides, (tuple, list))
        and len(inputs) == 1
        and not any(isinstance(s, (tuple, list)) for s in strides)
    ):
        strides = (cast("tuple[int, ...]", tuple(strides)),)
    elif not one_stride and not isinstance(strides, (tuple, list)):
        raise UnitError(expected("strides", "None, a number of steps, or a tuple of them", strides))
    steps = cast("tuple[int | tuple[int, ...] | None, ...]", (strides,) * len(inputs) if one_stride else strides)
    if len(steps) != len(inputs):
        raise UnitError(expected("strides", f"{len(inputs)} stride(s), one per input", strides))
    all_windows, all_strides = [], []
    for x, window, step in zip(inputs, nested, steps, strict=True):
        n = x.dim() - 1
        sizes = _whole("sliding_window_shapes", window)
        stride = _whole("strides", step if isinstance(step, (tuple, list)) else (1 if step is None else step,) * n)
        if len(sizes) != n or not all(0 < w <= s for w, s in zip(sizes, x.shape[1:], strict=True)):
            wanted = f"sizes from 1 to the input's {tuple(x.shape[1:])}"
            raise UnitError(expected("sliding_window_shapes", wanted, sizes))
        if len(stride) != n or not all(0 < s <= w for s, w in zip(stride, sizes, strict=True)):
            todo = "Larger strides would leave parts of the input without a unit."
            raise UnitError(expected("strides", f"steps from 1 to the window's {sizes}", stride, todo))
        all_windows.append(sizes)
        all_strides.append(stride)
    return WindowUnits(inputs, tuple(all_windows), tuple(all_strides))


def _shown(value: object) -> str:
    """A tensor by its shape: what an estimate notes about its evidence must stay readable."""
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    return f"({', '.join(map(_shown, value))})" if isinstance(value, tuple) else repr(value)


def _whole(name: str, numbers: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers of any kind, but nothing that would have to be rounded."""
    try:
        return tuple(operator.index(number) for number in numbers)
    except TypeError as error:
        raise UnitError(expected(name, "whole numbers", numbers)) from error
