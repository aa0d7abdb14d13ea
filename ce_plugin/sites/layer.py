"""The value of a layer as a site: its units are channels, tokens, heads, positions, or a mask's regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, InputError, ModelError, UnitError, expected, unknown_name
from ce_plugin.sites.units import MaskUnits

__all__ = ["LayerSite"]

_KINDS = ("channels", "tokens", "positions", "heads")


@dataclass(frozen=True)
class LayerSite:
    """What a layer returns (or takes) as the site.

    Args:
        layer: a module of the network, or its dotted name.
        units: what is set together: ``"channels"``; ``"tokens"`` of a transformer (N, T, D); ``"positions"`` of a map
            (N, C, h, w); ``"heads"``, equal blocks of channels.
        layer_mask: integer ids that broadcast to the value; equal ids are one unit. Replaces ``units``.
        at_input: the layer's input is the site, not its output.
        element: which element, where the layer returns a tuple (or which argument it takes).
        call: which call, counted from 0, of a layer that the network passes through several times.
        channel_dim: where the channels are; None means dimension 1 of (N, C), (N, C, h, w) and longer ones, and the
            last of (N, T, D). Swin's maps (N, h, w, C) need ``channel_dim=-1``.
        n_heads: number of blocks for ``units="heads"``.
        reshape_transform: from the layer's value to a map (N, C, h, w), as pytorch-grad-cam takes it for
            transformers; units are then those of the map, and what it drops (a class token) belongs to none.

    Raises:
        ArgumentError: a layer that is neither a module nor a name; ``units`` of unknown kind; no ``n_heads`` for heads.

    Example:
        >>> site = LayerSite("0", units="positions")
        >>> site.units_of((torch.zeros(1, 8, 2, 2),)).labels
        ['0,0', '0,1', '1,0', '1,1']
    """

    layer: nn.Module | str
    units: Literal["channels", "tokens", "positions", "heads"] = "channels"
    layer_mask: Tensor | None = None
    at_input: bool = False
    element: int | None = None
    call: int | None = None
    channel_dim: int | None = None
    n_heads: int | None = None
    reshape_transform: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        layer: object = self.layer
        if not isinstance(layer, (str, nn.Module)):
            raise ArgumentError(expected("layer", "a module of the network or its dotted name", type(layer).__name__))
        if self.units not in _KINDS:
            raise unknown_name("units", self.units, _KINDS)
        if self.units == "heads" and (self.n_heads is None or self.n_heads < 1):
            raise ArgumentError(expected("n_heads", "the number of heads for units='heads'", self.n_heads))
        for name in ("element", "call"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ArgumentError(expected(name, "None or an index from 0", value))

    def __repr__(self) -> str:
        shown = [repr(self.layer) if isinstance(self.layer, str) else type(self.layer).__name__]
        for name, default in (("units", "channels"), ("at_input", False), ("element", None), ("call", None)):
            if getattr(self, name) != default:
                shown.append(f"{name}={getattr(self, name)!r}")
        if self.layer_mask is not None:
            shown.append(f"layer_mask=tensor{tuple(self.layer_mask.shape)}")
        return f"LayerSite({', '.join(shown)})"

    def module(self, networks: Sequence[nn.Module]) -> tuple[str, nn.Module]:
        """The layer's dotted name and the layer itself, found in the networks that the forward function runs.

        Raises:
            ModelError: no network was found in the forward function, or it does not hold this module.
            UnknownNameError: no layer of this name.
        """
        if not networks:
            todo = "Pass the nn.Module itself, or a function that refers to it."
            raise ModelError(expected("forward_func", "a network, or a function that runs one", "none found", todo))
        for network in networks:
            for name, module in network.named_modules(remove_duplicate=False):
                if module is self.layer or (name == self.layer and name):
                    return name, module
        if isinstance(self.layer, str):
            raise unknown_name("layer", self.layer, [n for net in networks for n, _ in net.named_modules() if n])
        todo = "Take a module of the very object that is explained, or its dotted name."
        raise ModelError(expected("layer", "a module of the network", f"another {type(self.layer).__name__}", todo))

    def units_of(self, values: tuple[Tensor, ...]) -> MaskUnits:
        """The units of the layer's value, a tuple of one tensor (N, ...).

        Raises:
            UnitError: the value has no such units (no positions, channels that the heads do not divide ...).
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
        """Each element's unit, in a shape that broadcasts to the value; names where these are no numbers."""
        dim = (2 if value.dim() == 3 else 1) if channel_dim is None else channel_dim % value.dim()
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

    def _reshaped(self, value: Tensor) -> tuple[Tensor, list[str] | None]:
        """Units of the map that ``reshape_transform`` makes: element numbers are sent through it and found again."""
        numbers = torch.arange(1, value[0].numel() + 1, dtype=torch.float64).reshape(1, *value.shape[1:])
        places = (self.map(numbers)[0] - 1).round().long().reshape(-1)
        ids, labels = self._ids(self.map(numbers), 1)
        unit = ids.expand(1, *self.map(numbers).shape[1:]).reshape(-1)
        out = torch.full((value[0].numel(),), -1)
        if bool(((places < 0) | (places >= len(out))).any()) or len(set(places.tolist())) != len(places):
            todo = "Average or pad after the explanation instead."
            raise ArgumentError(expected("reshape_transform", "one that only moves or drops elements", "another", todo))
        out[places] = unit
        return out.reshape(1, *value.shape[1:]), labels

    def map(self, value: Tensor) -> Tensor:
        """The layer's value as maps (N, C, h, w).

        Raises:
            InputError: it has no positions, and no ``reshape_transform`` was given.
        """
        if self.reshape_transform is not None:
            maps = self.reshape_transform(value)
            if not isinstance(maps, Tensor) or maps.dim() != 4 or len(maps) != len(value):
                got = _shape(maps) if isinstance(maps, Tensor) else type(maps).__name__
                raise ArgumentError(expected("reshape_transform", "one that returns maps (N, C, h, w)", got))
            return maps
        if value.dim() != 4:
            todo = "For transformers pass `reshape_transform=`, from (N, T, D) to (N, D, h, w)."
            raise InputError(expected("layer", "one with maps (N, C, h, w)", f"values {_shape(value)}", todo))
        return value if self.channel_dim is None else value.movedim(self.channel_dim, 1)


def _shape(value: Tensor) -> str:
    return f"of shape {tuple(value.shape)}"
