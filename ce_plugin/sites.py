"""Sites: which variables can be set, and the units into which they are grouped."""

from __future__ import annotations

import logging
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, Union, cast

import torch
from torch import Tensor, nn

from ce_plugin.concepts import ConceptAutoencoder
from ce_plugin.designs import RandomMask
from ce_plugin.errors import ArgumentError, InputError, UnitError, check_integer, expected, unknown_name
from ce_plugin.interventions.base import Intervention
from ce_plugin.networks.layers import find_layer
from ce_plugin.networks.layout import channel_dim, mixes_heads
from ce_plugin.randomness import derived_seed

__all__ = [
    "ConceptSite",
    "Evidence",
    "InputSite",
    "LayerSite",
    "MaskUnits",
    "Units",
    "WindowUnits",
    "patch_grid",
]

logger = logging.getLogger("ce_plugin")


class Units(ABC):
    """The units of a site for N examples: turns assignments into masks, and values of units into maps.

    Attributes:
        n_units: number of units of each example, int64 (N,).
        labels: a name for each unit; one list for all examples, or one per example if they differ.
        grid: the number of cells along each dimension ((rows, columns) for images) if the units are the cells of a
            grid, the last dimension running fastest; else None.
    """

    n_units: Tensor
    labels: list[str] | list[list[str]]
    grid: tuple[int, ...] | None = None

    @property
    def width(self) -> int:
        """The largest number of units of an example: U in tensors that hold all examples."""
        return int(self.n_units.max())

    @abstractmethod
    def masks(self, assignments: Tensor, examples: Tensor) -> tuple[Tensor, ...]:
        """Which values each trial sets.

        Args:
            assignments: bool (B, U).
            examples: index of each trial's example, int64 (B,).

        Returns:
            For each input a bool tensor (B, ...) that broadcasts to the input's rows; True where x' is used.
        """

    @abstractmethod
    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        """Maps in the shape of the inputs.

        Args:
            values: one value per unit, (N, U).

        Returns:
            For each input a tensor (N, ...) of its shape (with one row if the values have one): the value of the unit
            at each position; the mean over the units where they overlap; 0 where there is none.
        """


class MaskUnits(Units):
    """Units given by a feature mask: equal ids are one unit, over all inputs of a tuple.

    Args:
        inputs: the tensors of the site, (N, ...) each.
        masks: for each input an integer tensor that broadcasts to it; the leading dimension is 1 (all examples
            share the units) or N.
        grid: see :class:`Units`.
        none: an id for values that belong to no unit and are never set.
        labels: names of the units in the order of their ids; None names them by their ids.

    Raises:
        UnitError: not one mask per input; a shape that does not broadcast; fractional ids.

    Example:
        >>> units = MaskUnits((torch.zeros(1, 4),), (torch.tensor([[7, 7, 9, 9]]),))
        >>> units.labels, units.spread(torch.tensor([[1.0, 2.0]]))
        (['7', '9'], (tensor([[1., 1., 2., 2.]]),))
    """

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        grid: tuple[int, ...] | None = None,
        *,
        none: int | None = None,
        labels: list[str] | None = None,
    ) -> None:
        checked = _checked_masks(inputs, masks)
        n = len(inputs[0])
        self.shapes = [tuple(x.shape) for x in inputs]
        self.grid = grid
        self.open = False
        rows = max(map(len, checked))
        # Equal ids are one unit, even in different inputs.
        flat = torch.cat([mask.expand(rows, *mask.shape[1:]).reshape(rows, -1) for mask in checked], dim=1)
        names: list[list[int]] = []
        numbers = []
        for row in flat:
            name, number = torch.unique(row, return_inverse=True)
            if none is not None and bool((name == none).any()):
                # Values of no unit get the index after the last unit, the column that `masks` and `spread` append.
                place = int((name == none).nonzero())
                name = name[name != none]
                number = torch.where(number == place, len(name), number - (number > place).long())
                self.open = True
            names.append(name.tolist())
            numbers.append(number)
        columns = torch.split(torch.stack(numbers), [mask[0].numel() for mask in checked], dim=1)
        self.ids = tuple(own.reshape(rows, *mask.shape[1:]) for own, mask in zip(columns, checked, strict=True))
        self.n_units = torch.tensor(list(map(len, names))).expand(n)
        if labels is not None:
            self.labels = labels
            return
        every = [list(map(str, name)) for name in names]
        self.labels = every[0] if every.count(every[0]) == len(every) else every

    def masks(self, assignments: Tensor, examples: Tensor) -> tuple[Tensor, ...]:
        out = []
        if self.open:
            assignments = torch.nn.functional.pad(assignments, (0, 1))
        for ids in self.ids:
            flat = ids.reshape(len(ids), -1)
            if torch.equal(flat[0], torch.arange(assignments.shape[1])) and len(flat) == 1:
                chosen = assignments  # one value per unit, as for channels: no copy is needed
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
        UnitError: a window larger than the input, a stride larger than the window, or a size that is not positive.

    Example:
        >>> units = WindowUnits((torch.zeros(1, 3),), ((2,),), ((1,),))
        >>> units.spread(torch.tensor([[1.0, 2.0]]))  # the middle value is in both windows
        (tensor([[1.0000, 1.5000, 2.0000]]),)
    """

    def __init__(
        self, inputs: tuple[Tensor, ...], windows: tuple[tuple[int, ...], ...], strides: tuple[tuple[int, ...], ...]
    ) -> None:
        self.shapes = [tuple(x.shape) for x in inputs]
        labels: list[str] = []
        # For each input the index of its first unit, and the slices that make up each unit.
        self.parts: list[tuple[int, list[tuple[slice, ...]]]] = []
        for position, (x, window, stride) in enumerate(zip(inputs, windows, strides, strict=True)):
            counts = [-(-(size - w) // s) + 1 for size, w, s in zip(x.shape[1:], window, stride, strict=True)]
            index = torch.cartesian_prod(*[torch.arange(c) for c in counts]).reshape(-1, len(counts))
            starts = (index * torch.tensor(stride)).tolist()
            slices = [tuple(slice(a, a + w) for a, w in zip(start, window, strict=True)) for start in starts]
            self.parts.append((len(labels), slices))
            prefix = f"{position}:" if len(inputs) > 1 else ""
            labels += [prefix + ",".join(map(str, start)) for start in starts]
        self.windows, self.labels = windows, labels
        self.n_units = torch.tensor(len(labels)).expand(len(inputs[0]))

    def masks(self, assignments: Tensor, examples: Tensor) -> tuple[Tensor, ...]:
        out = []
        for (first, parts), window, shape in zip(self.parts, self.windows, self.shapes, strict=True):
            # Dimensions that every window covers completely (usually the channels) keep size 1 and broadcast.
            size = [1 if w >= s else s for w, s in zip(window, shape[1:], strict=True)]
            mask = torch.zeros(len(assignments), *size, dtype=torch.bool)
            for row, unit in assignments[:, first : first + len(parts)].nonzero().tolist():
                mask[row][parts[unit]] = True
            out.append(mask)
        return tuple(out)

    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        out = []
        for (first, parts), shape in zip(self.parts, self.shapes, strict=True):
            total, count = values.new_zeros((len(values), *shape[1:])), values.new_zeros((1, *shape[1:]))
            for unit, part in enumerate(parts, first):
                where = (slice(None), *part)
                total[where] += values[:, unit].reshape(-1, *[1] * (len(shape) - 1))
                count[where] += 1
            out.append(total / count.clamp(min=1))
        return tuple(out)


def patch_grid(height: int, width: int, cells: int = 14) -> Tensor:
    """A feature mask that divides an image into a grid of at most ``cells`` x ``cells`` patches of nearly equal size.

    Args:
        height, width: size of the image in pixels.
        cells: largest number of rows and of columns.

    Returns:
        int64 (1, 1, height, width).

    Example:
        >>> patch_grid(2, 4, cells=2)[0, 0].tolist()
        [[0, 0, 1, 1], [2, 2, 3, 3]]
    """
    check_integer("cells", cells, least=1, error=UnitError)
    return _cells((height, width), cells)[None, None]


def _cells(sizes: Sequence[int], cells: int) -> Tensor:
    """The cell of each position of a grid with at most ``cells`` cells along each dimension."""
    index = torch.zeros((), dtype=torch.int64)
    for size in sizes:
        count = min(size, cells)
        index = index[..., None] * count + torch.arange(size) * count // size
    return index


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
        try:
            full.expand(x.shape)
        except RuntimeError as error:
            wanted = f"a mask that broadcasts to the input's shape {tuple(x.shape)}"
            raise UnitError(expected("feature_mask", wanted, f"shape {tuple(mask.shape)}")) from error
        out.append(full)
    return out


Masks: TypeAlias = "Tensor | tuple[Tensor, ...] | None"
Windows: TypeAlias = "tuple[int, ...] | tuple[tuple[int, ...], ...] | None"
Strides: TypeAlias = "int | tuple[int | tuple[int, ...], ...] | None"


# Cells along each dimension of the default grid, by the number of dimensions: about as many regions of the default
# design fit into each of them.
_CELLS = {1: 64, 2: 14, 3: 8}


@dataclass(frozen=True)
class InputSite:
    """The network's input as the site: its units are cells of a grid, scalars, a feature mask's regions, or windows.

    The default grid has 14 x 14 cells over an image (N, C, H, W), 8 x 8 x 8 over a volume or video (N, C, D, H, W), and
    64 along a signal (N, C, L) or sequence (N, L, C), where ``channel_dim`` says which of the two it is; fewer where
    there are fewer values. All channels of a cell are one unit. For anything else each scalar is a unit.

    Args:
        feature_mask: see :class:`MaskUnits`; a tensor, or a tuple with one per input.
        sliding_window_shapes: see :class:`WindowUnits`; for one input a tuple of sizes, else a tuple of such tuples.
        strides: strides of the windows; None means 1.
        cells: largest number of cells along each dimension of the default grid, see :func:`patch_grid`; None for the
            numbers above.
        channel_dim: dimension of the channels of the default grid, 1 or -1; None means 1 for images and volumes, and
            that nothing is known of inputs of three dimensions: (N, C, L) or (N, L, C).

    Raises:
        UnitError: ``cells`` or ``channel_dim`` is no such number; masks, windows or strides that do not fit.

    Example:
        >>> site = InputSite()
        >>> site.units_of((torch.zeros(1, 3, 224, 224),)).grid
        (14, 14)
        >>> InputSite(channel_dim=1).units_of((torch.zeros(1, 2, 1000),)).grid
        (64,)
        >>> site.units_of((torch.zeros(1, 5),)).labels
        ['0', '1', '2', '3', '4']
    """

    feature_mask: Masks = None
    sliding_window_shapes: Windows = None
    strides: Strides = None
    cells: int | None = None
    channel_dim: int | None = None

    def __post_init__(self) -> None:
        if self.cells is not None:
            check_integer("cells", self.cells, least=1, error=UnitError)
        if self.channel_dim is not None:
            _check_channel_dim(self.channel_dim)

    def __repr__(self) -> str:
        given: dict[str, object] = {"feature_mask": self.feature_mask}
        given |= {"sliding_window_shapes": self.sliding_window_shapes, "strides": self.strides, "cells": self.cells}
        given["channel_dim"] = self.channel_dim
        shown = []
        for name, value in given.items():
            if value is not None:
                shown.append(f"{name}={_shown(value)}")
        return f"InputSite({', '.join(shown)})"

    def is_grid(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether the units are the cells of a grid: one tensor of signals, images or volumes, no mask, no windows."""
        plain = self.feature_mask is None and self.sliding_window_shapes is None
        return plain and len(inputs) == 1 and bool(self.sizes(inputs[0]))

    def sizes(self, x: Tensor) -> tuple[int, ...]:
        """The sizes of the dimensions that the default grid divides; none where each scalar is a unit."""
        if x.dim() - 2 not in _CELLS or (x.dim() == 3 and self.channel_dim is None):
            return ()
        dim = _dim(self.channel_dim or 1, x)
        return tuple(size for k, size in enumerate(x.shape) if k not in (0, dim))

    def units_of(self, inputs: tuple[Tensor, ...]) -> Units:
        """The units of these inputs: the cells of a grid, or each scalar of inputs that have no positions."""
        if self.sliding_window_shapes is not None:
            if self.feature_mask is not None:
                raise UnitError(expected("feature_mask", "None when sliding windows are the units", "a mask"))
            return _window_units(inputs, self.sliding_window_shapes, self.strides)
        if self.strides is not None:
            raise UnitError(expected("strides", "None without `sliding_window_shapes`", self.strides))
        if self.feature_mask is not None:
            given = self.feature_mask if isinstance(self.feature_mask, tuple) else (self.feature_mask,)
            return MaskUnits(inputs, given)
        masks, offset, grid = [], 0, None
        for x in inputs:
            sizes = self.sizes(x)
            if sizes:
                cells = self.cells or _CELLS[len(sizes)]
                mask = _cells(sizes, cells)[None].unsqueeze(_dim(self.channel_dim or 1, x))
                grid = tuple(min(size, cells) for size in sizes)
            else:
                mask = torch.arange(x[0].numel()).reshape(1, *x.shape[1:])
            masks.append(mask + offset)
            offset += int(mask.max()) + 1 if mask.numel() else 0
        return MaskUnits(inputs, tuple(masks), grid if self.is_grid(inputs) else None)


def _window_units(inputs: tuple[Tensor, ...], windows: Windows, strides: Strides) -> WindowUnits:
    if not isinstance(windows, (tuple, list)):
        hint = "Write (3, 15, 15) for images with three channels, for example."
        raise UnitError(expected("sliding_window_shapes", "a tuple of sizes, or a tuple of such", windows, hint))
    one_shape = not windows or not isinstance(windows[0], (tuple, list))
    nested = cast("tuple[tuple[int, ...], ...]", (windows,) if one_shape else windows)
    if len(nested) != len(inputs):
        raise UnitError(expected("sliding_window_shapes", f"{len(inputs)} shape(s), one per input", windows))
    steps: tuple[Any, ...]
    if strides is None or isinstance(strides, int):
        steps = (1 if strides is None else strides,) * len(inputs)
    elif not isinstance(strides, (tuple, list)):
        raise UnitError(expected("strides", "None, a number of steps, or a tuple of them", strides))
    elif len(inputs) == 1 and not any(isinstance(step, (tuple, list)) for step in strides):
        steps = (tuple(strides),)
    else:
        steps = tuple(strides)
    if len(steps) != len(inputs):
        raise UnitError(expected("strides", f"{len(inputs)} stride(s), one per input", strides))
    all_windows, all_strides = [], []
    for x, window, step in zip(inputs, nested, steps, strict=True):
        n = x.dim() - 1
        sizes = _whole("sliding_window_shapes", window)
        stride = _whole("strides", step if isinstance(step, (tuple, list)) else (step,) * n)
        if len(sizes) != n or not all(0 < w <= s for w, s in zip(sizes, x.shape[1:], strict=True)):
            wanted = f"sizes from 1 to the input's {tuple(x.shape[1:])}"
            raise UnitError(expected("sliding_window_shapes", wanted, sizes))
        if len(stride) != n or not all(0 < s <= w for s, w in zip(stride, sizes, strict=True)):
            hint = "Larger strides would leave parts of the input without a unit."
            raise UnitError(expected("strides", f"steps from 1 to the window's {sizes}", stride, hint))
        all_windows.append(sizes)
        all_strides.append(stride)
    return WindowUnits(inputs, tuple(all_windows), tuple(all_strides))


def _shown(value: object) -> str:
    """Tensors shown by their shape, to keep the settings stored with an estimate readable."""
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    return f"({', '.join(map(_shown, value))})" if isinstance(value, tuple) else repr(value)


def _whole(name: str, numbers: Sequence[int]) -> tuple[int, ...]:
    """The numbers as ints; numbers that would need rounding are an error."""
    try:
        return tuple(operator.index(number) for number in numbers)
    except TypeError as error:
        raise UnitError(expected(name, "whole numbers", numbers)) from error


_KINDS = ("channels", "tokens", "positions", "heads")


@dataclass(frozen=True)
class LayerSite:
    """The output (or the input) of a layer as the site.

    Args:
        layer: a module of the network, or its dotted name.
        units: what is set together: ``"channels"``; ``"tokens"`` of a transformer (N, T, D); ``"positions"`` of
            a map (N, C, h, w); ``"heads"``, equal blocks of channels.
        layer_mask: integer ids that broadcast to the value; equal ids are one unit. Replaces ``units``.
        at_input: use the layer's input instead of its output.
        element: which element, if the layer returns a tuple (or takes several arguments); indices, such as (1, 0), for
            one of a tuple inside it. A layer that returns several tensors is asked for it: an LSTM returns
            (output, (h, c)), and its states h and c, (layers, N, H), are seen as (N, layers, H).
        call: which call, counted from 0, if the network calls the layer several times.
        channel_dim: dimension of the channels; None asks the module that produces the value: 1 for convolutions and
            batch normalisation, the last for linear layers, layer normalisation, embeddings and recurrent ones (so
            that Swin's maps (N, h, w, C) are understood). Where the modules do not tell you are asked.
        n_heads: number of blocks for ``units="heads"``: equal blocks of channels, where an attention's heads still lie
            side by side (the *input* of its projection).
        reshape_transform: from the layer's value to a map (N, C, h, w), as pytorch-grad-cam takes it for
            transformers; units are then those of the map, and values that it drops (a class token) belong to none.

    Raises:
        ArgumentError: ``layer`` is neither a module nor a name; ``units`` is unknown; ``n_heads`` is missing for heads.
        UnitError: ``channel_dim`` is no dimension, or 0, that of the examples.

    Example:
        >>> site = LayerSite("0", units="positions", channel_dim=1)
        >>> site.units_of((torch.zeros(1, 8, 2, 2),)).labels
        ['0,0', '0,1', '1,0', '1,1']
    """

    layer: nn.Module | str
    units: Literal["channels", "tokens", "positions", "heads"] = "channels"
    layer_mask: Tensor | None = None
    at_input: bool = False
    element: int | tuple[int, ...] | None = None
    call: int | None = None
    channel_dim: int | None = None
    n_heads: int | None = None
    reshape_transform: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        layer: object = self.layer
        if not isinstance(layer, (str, nn.Module)):
            raise ArgumentError(expected("layer", "a module of the network or its dotted name", type(layer).__name__))
        if not isinstance(self.units, str) or self.units not in _KINDS:
            raise unknown_name("units", self.units, _KINDS)
        if self.units == "heads" or self.n_heads is not None:
            check_integer("n_heads", self.n_heads, "the number of heads for units='heads'", least=1)
        if self.channel_dim is not None:
            _check_channel_dim(self.channel_dim)
        mask: object = self.layer_mask
        if not isinstance(mask, (Tensor, type(None))):
            raise ArgumentError(expected("layer_mask", "None or a tensor of unit ids", type(mask).__name__))
        transform: object = self.reshape_transform
        if transform is not None and not callable(transform):
            raise ArgumentError(expected("reshape_transform", "None or a callable", type(transform).__name__))
        at_input: object = self.at_input
        if not isinstance(at_input, bool):
            raise ArgumentError(expected("at_input", "True or False", repr(self.at_input)))
        path = self.element if isinstance(self.element, tuple) and self.element else (self.element,)
        if self.element is not None and not all(isinstance(index, int) and index >= 0 for index in path):
            raise ArgumentError(expected("element", "None, an index from 0, or a tuple of such", repr(self.element)))
        if self.call is not None and (not isinstance(self.call, int) or self.call < 0):
            raise ArgumentError(expected("call", "None or an index from 0", self.call))

    def __repr__(self) -> str:
        shown = [repr(self.layer) if isinstance(self.layer, str) else type(self.layer).__name__]
        for name, default in (("units", "channels"), ("at_input", False), ("element", None), ("call", None)):
            if getattr(self, name) != default:
                shown.append(f"{name}={getattr(self, name)!r}")
        if self.layer_mask is not None:
            shown.append(f"layer_mask=tensor{tuple(self.layer_mask.shape)}")
        return f"LayerSite({', '.join(shown)})"

    def module(self, networks: Sequence[nn.Module]) -> tuple[str, nn.Module]:
        """The layer's dotted name and the layer, looked up in the networks that the forward function runs.

        Raises:
            ModelError: no network was found in the forward function, or it does not contain this module.
            UnknownNameError: there is no layer of this name.
        """
        return find_layer(networks, self.layer)

    def laid_out(self, value: Tensor, networks: Sequence[nn.Module], *, maps: bool = False) -> LayerSite:
        """The site with its ``channel_dim`` decided, for values like this one of these networks.

        Args:
            value: of the layer, (N, ...).
            networks: that hold the layer.
            maps: whether :meth:`map` will be asked for.

        Raises:
            UnitError: heads that are mixed there.
            InputError: no maps, or tokens of which nothing says how they lie.
        """
        name, module = self.module(networks)
        if self.units == "heads" and not self.at_input and self.layer_mask is None:
            mixing = mixes_heads(networks, module)
            if mixing is not None:
                whole = isinstance(module, nn.MultiheadAttention)
                hint = f"Take what goes into it: LayerSite({mixing!r}, units='heads', n_heads=..., at_input=True)."
                hint = (
                    "Take a network whose attention has its projection as a layer, as timm's have." if whole else hint
                )
                got = f"{name!r}, where {mixing} has mixed them"
                raise UnitError(expected("layer", "one where the heads lie side by side", got, hint))
        site = self
        if self.channel_dim is None and self.reshape_transform is None and value.dim() > 2:
            found = channel_dim(networks, module, value.shape, at_input=self.at_input)
            if found is not None:
                dim, source = found
                logger.info("%s %s: dimension %d holds the channels, as %s has it", name, _shape(value), dim, source)
                site = replace(self, channel_dim=dim)
            if maps and value.dim() == 3 and site.channel_dim == 2:
                hint = "For transformers pass `reshape_transform=`, from (N, T, D) to (N, D, h, w); for a map along a "
                hint += "sequence `channel_dim=-1`."
                raise InputError(expected("layer", "one with maps (N, C, h, w)", f"values {_shape(value)}", hint))
        if maps:
            site.map(value[:1])
        return site

    def units_of(self, values: tuple[Tensor, ...]) -> MaskUnits:
        """The units of the layer's value, a tuple of one tensor (N, ...).

        Raises:
            UnitError: the value has no such units (no positions, channels that cannot be divided into the heads ...),
                or nothing says which dimension holds the channels.
        """
        (value,) = values
        if value.dim() < 2:
            raise UnitError(expected("layer", "one with a value (N, ...) of two dimensions or more", _shape(value)))
        if self.layer_mask is not None:
            return MaskUnits(values, (self.layer_mask,))
        if self.reshape_transform is not None:
            ids, labels = self._reshaped(value)
            return MaskUnits(values, (ids,), none=-1, labels=labels)
        ids, labels = self._ids(value[:1], self.channel_dim)
        return MaskUnits(values, (ids,), labels=labels)

    def _ids(self, value: Tensor, channel_dim: int | None) -> tuple[Tensor, list[str] | None]:
        """Each element's unit, in a shape that broadcasts to the value; and names, if they are not just numbers."""
        dim = self._channels(value, channel_dim)
        ones = [1] * value.dim()
        if self.units == "channels":
            return torch.arange(value.shape[dim]).reshape(*ones[:dim], -1, *ones[dim + 1 :]), None
        if self.units == "heads":
            heads, channels = self.n_heads or 1, value.shape[dim]
            if channels % heads:
                raise UnitError(expected("n_heads", f"a divisor of the {channels} channels", heads))
            ids = torch.arange(channels) // (channels // heads)
            return ids.reshape(*ones[:dim], -1, *ones[dim + 1 :]), None
        places = [k for k in range(1, value.dim()) if k != dim]
        if self.units == "tokens" and len(places) != 1:
            raise UnitError(expected("units", "tokens of a value (N, T, D)", f"a layer with values {_shape(value)}"))
        if not places:
            raise UnitError(expected("units", "positions of a map", f"a layer with values {_shape(value)}"))
        sizes = [value.shape[k] for k in places]
        shape = [value.shape[k] if k in places else 1 for k in range(value.dim())]
        index = torch.cartesian_prod(*[torch.arange(size) for size in sizes]).reshape(-1, len(sizes))
        labels = [",".join(map(str, row)) for row in index.tolist()]
        return torch.arange(len(labels)).reshape(shape), labels

    def _channels(self, value: Tensor, channel_dim: int | None) -> int:
        """The dimension of the channels, counted from 0."""
        if channel_dim is not None:
            return _dim(channel_dim, value)
        if value.dim() > 2:
            name = self.layer if isinstance(self.layer, str) else type(self.layer).__name__
            got = f"{name!r} with values {_shape(value)}"
            hint = "Say which: `LayerSite(layer, channel_dim=1)` for (N, C, ...), `channel_dim=-1` for (N, ..., C)."
            raise UnitError(expected("layer", "one whose modules show which dimension holds the channels", got, hint))
        return 1

    def _reshaped(self, value: Tensor) -> tuple[Tensor, list[str] | None]:
        """Units of the map that ``reshape_transform`` returns, found by passing element indices through it."""
        numbers = torch.arange(1, value[0].numel() + 1, dtype=torch.float64).reshape(1, *value.shape[1:])
        places = (self.map(numbers)[0] - 1).round().long().reshape(-1)
        ids, labels = self._ids(self.map(numbers), 1)
        unit = ids.expand(1, *self.map(numbers).shape[1:]).reshape(-1)
        out = torch.full((value[0].numel(),), -1)
        if bool(((places < 0) | (places >= len(out))).any()) or len(set(places.tolist())) != len(places):
            hint = "Average or pad after the explanation instead."
            raise ArgumentError(expected("reshape_transform", "one that only moves or drops elements", "another", hint))
        out[places] = unit
        return out.reshape(1, *value.shape[1:]), labels

    def map(self, value: Tensor) -> Tensor:
        """The layer's value as maps: (N, C, h, w), (N, C, l) or (N, C, d, h, w).

        Raises:
            InputError: it has no positions, or they are a transformer's tokens and there is no ``reshape_transform``.
        """
        if self.reshape_transform is not None:
            maps = self.reshape_transform(value)
            if not isinstance(maps, Tensor) or maps.dim() - 2 not in _CELLS or len(maps) != len(value):
                got = _shape(maps) if isinstance(maps, Tensor) else type(maps).__name__
                raise ArgumentError(expected("reshape_transform", "one that returns maps (N, C, h, w)", got))
            return maps
        if value.dim() - 2 not in _CELLS:
            hint = "Take a layer before the pooling, whose values have positions."
            raise InputError(expected("layer", "one with maps (N, C, h, w)", f"values {_shape(value)}", hint))
        return value.movedim(self._channels(value, self.channel_dim), 1)


def _shape(value: Tensor) -> str:
    return f"of shape {tuple(value.shape)}"


def _check_channel_dim(dim: object) -> None:
    check_integer("channel_dim", dim, "a dimension other than 0, that of the examples", error=UnitError)
    if dim == 0:
        hint = "Write 1 for (N, C, ...), -1 for (N, ..., C)."
        raise UnitError(expected("channel_dim", "a dimension other than 0, that of the examples", dim, hint))


def _dim(channel_dim: int, value: Tensor) -> int:
    """The dimension of the channels counted from 0; an error where the value has no such dimension."""
    if not -value.dim() < channel_dim < value.dim():
        wanted = f"from 1 to {value.dim() - 1}, or -1 to {1 - value.dim()}, for values {_shape(value)}"
        raise UnitError(expected("channel_dim", wanted, channel_dim))
    return channel_dim % value.dim()


@dataclass(frozen=True)
class ConceptSite:
    """The innermost code of an autoencoder that is inserted at a layer; its channels are the concepts.

    The reference is then the network *with* the autoencoder inserted.

    Args:
        layer: a module of the network, its dotted name, or a :class:`LayerSite`.
        autoencoder: trained on this layer of this network.

    Attributes:
        place: the :class:`LayerSite` where the autoencoder is inserted.

    Raises:
        ArgumentError: ``autoencoder`` is not a concept autoencoder.

    Example:
        >>> site = ConceptSite("features.3", ConceptAutoencoder(8, 2))
        >>> site
        ConceptSite('features.3', 2 concepts)

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), section 3.2; Harradon et al. 2018 (arXiv 1802.00541).
    """

    layer: nn.Module | str | LayerSite
    autoencoder: ConceptAutoencoder
    place: LayerSite = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given: object = self.autoencoder
        if not isinstance(given, ConceptAutoencoder):
            raise ArgumentError(expected("autoencoder", "a ConceptAutoencoder", type(given).__name__))
        layer = self.layer if isinstance(self.layer, LayerSite) else LayerSite(self.layer)
        object.__setattr__(self, "place", layer)

    def __repr__(self) -> str:
        shown = repr(self.layer) if isinstance(self.layer, (str, LayerSite)) else type(self.layer).__name__
        return f"ConceptSite({shown}, {self.autoencoder.concepts} concepts)"

    def module(self, networks: Sequence[nn.Module]) -> tuple[str, nn.Module]:
        """The layer's dotted name and the layer; see :meth:`LayerSite.module`."""
        return self.place.module(networks)

    def units_of(self, values: tuple[Tensor, ...]) -> MaskUnits:
        """The channels of the code."""
        return LayerSite("code", channel_dim=1).units_of(values)

    def map(self, value: Tensor) -> Tensor:
        """The code is a map already, (N, K, h, w)."""
        return value


@dataclass(frozen=True)
class Evidence:
    """An intervention that holds in all trials and in the reference.

    Args:
        intervention: the intervention.
        site: the input by default, or a layer, or the concepts of a layer.
        units: which units are set: ``"all"``, indices, or a :class:`RandomMask`, over whose ``n_trials`` draws the
            result is averaged.

    Raises:
        ArgumentError: ``intervention`` is not an intervention.
        UnitError: ``units`` is none of these.

    Example:
        >>> from ce_plugin.interventions import PixelMask
        >>> Evidence(PixelMask("mean"), units=[0, 1]).units
        (0, 1)
    """

    intervention: Intervention
    site: InputSite | LayerSite | ConceptSite = field(default_factory=InputSite)
    units: Union[Literal["all"], tuple[int, ...], Sequence[int], RandomMask] = "all"

    def __post_init__(self) -> None:
        given: object = self.intervention
        if not isinstance(given, Intervention):
            raise ArgumentError(expected("intervention", "an Intervention", type(given).__name__))
        if isinstance(self.units, str) and self.units != "all":
            raise UnitError(expected("units", "'all', unit indices or a RandomMask", repr(self.units)))
        if not isinstance(self.units, (str, RandomMask)):
            try:
                chosen = tuple(operator.index(u) for u in self.units)
            except TypeError as error:
                wanted = "'all', unit indices or a RandomMask"
                raise UnitError(expected("units", wanted, repr(self.units))) from error
            object.__setattr__(self, "units", chosen)

    def __repr__(self) -> str:
        units = "" if self.units == "all" else f", units={self.units!r}"
        site = "" if repr(self.site) == "InputSite()" else f", site={self.site!r}"
        return f"Evidence({self.intervention!r}{site}{units})"

    @property
    def is_random(self) -> bool:
        """Whether the units are drawn at random."""
        return isinstance(self.units, RandomMask)

    @property
    def n_draws(self) -> int:
        """Number of random draws that the result is averaged over; 1 if nothing is random."""
        return self.units.n_trials if isinstance(self.units, RandomMask) else 1

    def assignment(self, n_units: int, example: int, draw: int, order: int = 0) -> Tensor:
        """Which units are set, bool (U,), in one draw for the example with this id.

        Several random evidences, distinguished by ``order``, and the trials of a design are drawn independently of
        each other, even if their seeds are equal.
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
