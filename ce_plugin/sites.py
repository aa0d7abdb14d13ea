"""Sites: which variables can be set, and the units into which they are grouped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Union, cast

import torch
from torch import Tensor

from ce_plugin.designs import RandomMask
from ce_plugin.errors import UnitError, expected
from ce_plugin.interventions.base import Intervention
from ce_plugin.randomness import derived_seed

if TYPE_CHECKING:
    from typing import TypeAlias

__all__ = ["Evidence", "InputSite", "MaskUnits", "Units", "WindowUnits", "patch_grid"]

Masks: TypeAlias = "Tensor | tuple[Tensor, ...] | None"
Windows: TypeAlias = "tuple[int, ...] | tuple[tuple[int, ...], ...] | None"
Strides: TypeAlias = "int | tuple[int | tuple[int, ...], ...] | None"


class Units(ABC):
    """The units of a site for N examples: how an assignment becomes a mask, and unit values become a map.

    Attributes:
        n_units: number of units of each example, int64 (N,).
        labels: a name for each unit; one list for all examples, or one per example where they differ.
        grid: (rows, columns) where the units are the cells of a grid, row by row; else None.
    """

    n_units: Tensor
    labels: list[str] | list[list[str]]
    grid: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        """The largest number of units that an example has: U of the tensors that hold all examples."""
        return int(self.n_units.max())

    @abstractmethod
    def masks(self, assignments: Tensor, examples: Tensor) -> tuple[Tensor, ...]:
        """What each trial sets.

        Args:
            assignments: bool (B, U).
            examples: index of each trial's example, int64 (B,).

        Returns:
            For each input a bool tensor (B, ...) that broadcasts to the input's rows; True where x' goes.
        """

    @abstractmethod
    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        """Maps in the shape of the inputs.

        Args:
            values: one value per unit, (N, U).

        Returns:
            For each input a tensor (N, ...) of its shape (with one row where the values have one): a unit's value
            wherever the unit is; the mean over the units where they overlap; 0 where there is none.
        """


class MaskUnits(Units):
    """Units given by a feature mask: equal ids are one unit, over all inputs of a tuple.

    Args:
        inputs: the tensors of the site, (N, ...) each.
        masks: for each input an integer tensor that broadcasts to it; the leading dimension is 1 (all examples
            share the units) or N.
        grid: see :class:`Units`.

    Raises:
        UnitError: as many masks as inputs were expected; a shape that does not broadcast; fractional ids.
    """

    def __init__(
        self, inputs: tuple[Tensor, ...], masks: tuple[Tensor, ...], grid: tuple[int, int] | None = None
    ) -> None:
        checked = _checked_masks(inputs, masks)
        n = len(inputs[0])
        self.shapes = [tuple(x.shape) for x in inputs]
        self.grid = grid
        rows = n if any(len(mask) > 1 for mask in checked) else 1
        names: list[Tensor] = []
        ids: list[list[Tensor]] = []
        for row in range(rows):
            flat = [mask[row if len(mask) > 1 else 0] for mask in checked]
            name, index = torch.unique(torch.cat([mask.reshape(-1) for mask in flat]), return_inverse=True)
            names.append(name)
            parts = index.split([mask.numel() for mask in flat])
            ids.append([part.reshape(mask.shape) for part, mask in zip(parts, flat, strict=True)])
        self.ids = tuple(torch.stack(column) for column in zip(*ids, strict=True))
        self.n_units = torch.tensor([len(name) for name in names]).expand(n)
        every = [[str(int(value)) for value in name] for name in names]
        self.labels = every[0] if all(one == every[0] for one in every) else every

    def masks(self, assignments: Tensor, examples: Tensor) -> tuple[Tensor, ...]:
        out = []
        for ids in self.ids:
            flat = ids.flatten(1)
            if len(flat) == 1:
                chosen = assignments[:, flat[0]]
            else:
                chosen = assignments.gather(1, flat[examples.to(flat.device)])
            out.append(chosen.reshape(len(assignments), *ids.shape[1:]))
        return tuple(out)

    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        out = []
        for ids, shape in zip(self.ids, self.shapes, strict=True):
            flat = ids.flatten(1).to(values.device)
            chosen = values[:, flat[0]] if len(flat) == 1 else values.gather(1, flat)
            out.append(chosen.reshape(len(values), *ids.shape[1:]).expand(-1, *shape[1:]).clone())
        return tuple(out)


class WindowUnits(Units):
    """Units given by windows that slide over the inputs, as in Captum's Occlusion; they may overlap.

    Args:
        inputs: the tensors of the site, (N, ...) each.
        windows: for each input the window's size in each dimension but the first.
        strides: for each input the step in each dimension, or one step for all; not larger than the window.

    Raises:
        UnitError: a window larger than the input, a stride larger than the window, or values that are not positive.
    """

    def __init__(
        self, inputs: tuple[Tensor, ...], windows: tuple[tuple[int, ...], ...], strides: tuple[tuple[int, ...], ...]
    ) -> None:
        self.shapes = [tuple(x.shape) for x in inputs]
        self.starts: list[list[tuple[int, ...]]] = []
        self.windows = windows
        labels: list[str] = []
        for position, (x, window, stride) in enumerate(zip(inputs, windows, strides, strict=True)):
            counts = [-(-(size - w) // s) + 1 for size, w, s in zip(x.shape[1:], window, stride, strict=True)]
            index = torch.cartesian_prod(*[torch.arange(c) for c in counts]).reshape(-1, len(counts))
            starts = [tuple(row) for row in (index * torch.tensor(stride)).tolist()]
            self.starts.append(starts)
            prefix = f"{position}:" if len(inputs) > 1 else ""
            labels += [prefix + ",".join(map(str, start)) for start in starts]
        self.labels = labels
        self.n_units = torch.tensor(len(labels)).expand(len(inputs[0]))

    def _slices(self, position: int, unit: int) -> tuple[slice, ...]:
        start, window = self.starts[position][unit], self.windows[position]
        return tuple(slice(a, a + w) for a, w in zip(start, window, strict=True))

    def masks(self, assignments: Tensor, examples: Tensor) -> tuple[Tensor, ...]:
        out = []
        offset = 0
        for position, shape in enumerate(self.shapes):
            # Dimensions that every window covers whole (the channels, mostly) stay of size 1 and broadcast.
            size = [1 if w >= s else s for w, s in zip(self.windows[position], shape[1:], strict=True)]
            mask = torch.zeros(len(assignments), *size, dtype=torch.bool)
            here = assignments[:, offset : offset + len(self.starts[position])]
            for row, unit in here.nonzero().tolist():
                mask[row][self._slices(position, unit)] = True
            out.append(mask)
            offset += len(self.starts[position])
        return tuple(out)

    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        out = []
        offset = 0
        for position, shape in enumerate(self.shapes):
            total, count = values.new_zeros((len(values), *shape[1:])), values.new_zeros((1, *shape[1:]))
            for unit in range(len(self.starts[position])):
                slices = (slice(None), *self._slices(position, unit))
                total[slices] += values[:, offset + unit].reshape(-1, *[1] * (len(shape) - 1))
                count[slices] += 1
            out.append(total / count.clamp(min=1))
            offset += len(self.starts[position])
        return tuple(out)


def patch_grid(height: int, width: int, cells: int = 14) -> Tensor:
    """A feature mask that cuts an image into a grid of at most ``cells`` x ``cells`` patches of nearly equal size.

    Args:
        height, width: of the image in pixels.
        cells: largest number of rows and columns.

    Returns:
        int64 (1, 1, height, width).

    Example:
        >>> patch_grid(2, 4, cells=2)[0, 0].tolist()
        [[0, 0, 1, 1], [2, 2, 3, 3]]
    """
    rows, columns = min(height, cells), min(width, cells)
    row = torch.arange(height) * rows // height
    column = torch.arange(width) * columns // width
    return (row[:, None] * columns + column[None, :])[None, None]


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
        >>> site.units((torch.zeros(1, 3, 224, 224),)).grid
        (14, 14)
        >>> site.units((torch.zeros(1, 5),)).labels
        ['0', '1', '2', '3', '4']
    """

    feature_mask: Masks = None
    sliding_window_shapes: Windows = None
    strides: Strides = None
    cells: int = 14

    def is_grid(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether the units are the cells of a grid: one tensor of images (N, C, H, W), no mask and no windows."""
        plain = self.feature_mask is None and self.sliding_window_shapes is None
        return plain and len(inputs) == 1 and inputs[0].dim() == 4

    def units(self, inputs: tuple[Tensor, ...]) -> Units:
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


@dataclass(frozen=True)
class Evidence:
    """An intervention that holds in all trials and in the reference.

    Args:
        intervention: what is set.
        site: where; the input by default.
        units: which units are set: ``"all"``, indices, or a :class:`RandomMask` whose ``n_trials`` draws the result
            is averaged over.

    Raises:
        UnitError: ``units`` is none of these.

    Example:
        >>> from ce_plugin.interventions import PixelMask
        >>> Evidence(PixelMask("mean"), units=[0, 1]).units
        (0, 1)
    """

    intervention: Intervention
    site: InputSite = InputSite()
    units: Union[Literal["all"], tuple[int, ...], Sequence[int], RandomMask] = "all"

    def __post_init__(self) -> None:
        if isinstance(self.units, str) and self.units != "all":
            raise UnitError(expected("units", "'all', unit indices or a RandomMask", repr(self.units)))
        if not isinstance(self.units, (str, RandomMask)):
            object.__setattr__(self, "units", tuple(int(u) for u in self.units))

    @property
    def is_random(self) -> bool:
        """Whether the units are drawn."""
        return isinstance(self.units, RandomMask)

    @property
    def n_draws(self) -> int:
        """How many random evidences the result is averaged over; 1 where nothing is random."""
        return self.units.n_trials if isinstance(self.units, RandomMask) else 1

    def assignment(self, n_units: int, example: int, draw: int, order: int = 0) -> Tensor:
        """Which units hold the evidence, bool (U,), in one draw for the example of this id.

        Several random evidences, told apart by their ``order``, and the trials of a design are drawn independently of
        each other, also where their seeds are equal.
        """
        if isinstance(self.units, RandomMask):
            own = self.units.reseeded(derived_seed(self.units.seed, "evidence", order))
            return own.assignments(n_units, example=example)[draw]
        chosen = torch.zeros(n_units, dtype=torch.bool)
        if isinstance(self.units, str):
            return ~chosen
        if self.units and not 0 <= min(self.units) <= max(self.units) < n_units:
            raise UnitError(expected("units", f"indices of the site's {n_units} units", self.units))
        chosen[list(self.units)] = True
        return chosen


def _checked_masks(inputs: tuple[Tensor, ...], masks: tuple[Tensor, ...]) -> list[Tensor]:
    if len(masks) != len(inputs):
        raise UnitError(expected("feature_mask", f"{len(inputs)} mask(s), one per input", f"{len(masks)}"))
    out = []
    for x, mask in zip(inputs, masks, strict=True):
        if not isinstance(mask, Tensor):
            raise UnitError(expected("feature_mask", "a tensor, or a tuple of tensors", type(mask).__name__))
        if mask.is_floating_point() and not bool((mask == mask.round()).logical_and(mask.isfinite()).all()):
            raise UnitError(expected("feature_mask", "integer ids", "fractional ones", "Write `mask.long()`."))
        if mask.is_complex():
            raise UnitError(expected("feature_mask", "integer ids", "complex ones"))
        full = mask.detach().to("cpu", torch.int64).reshape([1] * (x.dim() - mask.dim()) + list(mask.shape))
        fits = full.dim() == x.dim() and all(m in (1, s) for m, s in zip(full.shape, x.shape, strict=True))
        if not fits:
            wanted = f"a mask that broadcasts to the input's shape {tuple(x.shape)}"
            raise UnitError(expected("feature_mask", wanted, f"shape {tuple(mask.shape)}"))
        out.append(full)
    return out


def _window_units(inputs: tuple[Tensor, ...], windows: Windows, strides: Strides) -> WindowUnits:
    one_shape = not windows or not isinstance(windows[0], (tuple, list))
    nested = cast("tuple[tuple[int, ...], ...]", (windows,) if one_shape else windows)
    if len(nested) != len(inputs):
        raise UnitError(expected("sliding_window_shapes", f"{len(inputs)} shape(s), one per input", windows))
    one_stride = strides is None or isinstance(strides, int)
    if not one_stride and len(inputs) == 1 and not isinstance(cast("tuple[object, ...]", strides)[0], (tuple, list)):
        strides = (cast("tuple[int, ...]", strides),)
    steps = cast("tuple[int | tuple[int, ...] | None, ...]", (strides,) * len(inputs) if one_stride else strides)
    if len(steps) != len(inputs):
        raise UnitError(expected("strides", f"{len(inputs)} stride(s), one per input", strides))
    all_windows, all_strides = [], []
    for x, window, step in zip(inputs, nested, steps, strict=True):
        n = x.dim() - 1
        sizes = tuple(int(w) for w in window)
        stride = tuple(int(s) for s in step) if isinstance(step, (tuple, list)) else (step or 1,) * n
        if len(sizes) != n or not all(0 < w <= s for w, s in zip(sizes, x.shape[1:], strict=True)):
            wanted = f"sizes from 1 to the input's {tuple(x.shape[1:])}"
            raise UnitError(expected("sliding_window_shapes", wanted, sizes))
        if len(stride) != n or not all(0 < s <= w for s, w in zip(stride, sizes, strict=True)):
            todo = "Larger strides would leave parts of the input without a unit."
            raise UnitError(expected("strides", f"steps from 1 to the window's {sizes}", stride, todo))
        all_windows.append(sizes)
        all_strides.append(stride)
    return WindowUnits(inputs, tuple(all_windows), tuple(all_strides))
