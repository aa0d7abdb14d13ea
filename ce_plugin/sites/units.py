"""Units: the groups of variables of a site that are set together."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ce_plugin.errors import UnitError, expected

__all__ = ["MaskUnits", "Units", "WindowUnits", "patch_grid"]


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
        none: an id that belongs to no unit: what has it is never set.
        labels: names of the units in the order of their ids; None names them by their ids.

    Raises:
        UnitError: as many masks as inputs were expected; a shape that does not broadcast; fractional ids.

    Example:
        >>> units = MaskUnits((torch.zeros(1, 4),), (torch.tensor([[7, 7, 9, 9]]),))
        >>> units.labels, units.spread(torch.tensor([[1.0, 2.0]]))
        (['7', '9'], (tensor([[1., 1., 2., 2.]]),))
    """

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        grid: tuple[int, int] | None = None,
        *,
        none: int | None = None,
        labels: list[str] | None = None,
    ) -> None:
        checked = _checked_masks(inputs, masks)
        n = len(inputs[0])
        self.shapes = [tuple(x.shape) for x in inputs]
        self.grid = grid
        self.open = False
        rows = n if any(len(mask) > 1 for mask in checked) else 1
        names: list[Tensor] = []
        ids: list[list[Tensor]] = []
        for row in range(rows):
            flat = [mask[row if len(mask) > 1 else 0] for mask in checked]
            name, index = torch.unique(torch.cat([mask.reshape(-1) for mask in flat]), return_inverse=True)
            if none is not None and bool((name == none).any()):
                # What belongs to no unit points behind the last one, at the column that `masks` and `spread` append.
                place = int((name == none).nonzero())
                name = name[name != none]
                index = torch.where(index == place, len(name), index - (index > place).long())
                self.open = True
            names.append(name)
            parts = index.split([mask.numel() for mask in flat])
            ids.append([part.reshape(mask.shape) for part, mask in zip(parts, flat, strict=True)])
        self.ids = tuple(torch.stack(column) for column in zip(*ids, strict=True))
        self.n_units = torch.tensor([len(name) for name in names]).expand(n)
        if labels is not None:
            self.labels = labels
            return
        every = [[str(int(value)) for value in name] for name in names]
        self.labels = every[0] if all(one == every[0] for one in every) else every

    def masks(self, assignments: Tensor, examples: Tensor) -> tuple[Tensor, ...]:
        out = []
        if self.open:
            assignments = torch.nn.functional.pad(assignments, (0, 1))
        for ids in self.ids:
            flat = ids.reshape(len(ids), -1)
            if torch.equal(flat[0], torch.arange(assignments.shape[1])) and len(flat) == 1:
                chosen = assignments  # each unit is one entry, as channels are: nothing is to be copied
            elif len(flat) == 1:
                chosen = assignments[:, flat[0]]
            else:
                chosen = assignments.gather(1, flat[examples.to(flat.device)])
            out.append(chosen.reshape(len(assignments), *ids.shape[1:]))
        return tuple(out)

    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        out = []
        if self.open:
            values = torch.nn.functional.pad(values, (0, 1))
        for ids, shape in zip(self.ids, self.shapes, strict=True):
            flat = ids.reshape(len(ids), -1).to(values.device)
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

    Example:
        >>> units = WindowUnits((torch.zeros(1, 3),), ((2,),), ((1,),))
        >>> units.spread(torch.tensor([[1.0, 2.0]]))  # the middle is in both windows
        (tensor([[1.0000, 1.5000, 2.0000]]),)
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
