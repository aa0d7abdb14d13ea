"""Which dimension of a value holds the channels: decided by the modules that produce or take it, not by its rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import batchnorm, conv, pooling

# Siblings of a projection that show it to be the one which mixes an attention's heads.
_QUERIES = {"qkv", "q", "query", "q_proj", "to_q", "to_qkv", "c_attn", "in_proj", "query_key_value"}
_PROJECTIONS = {"proj", "out_proj", "o_proj", "c_proj", "to_out", "project"}
_RANKS = {"1d": 3, "2d": 4, "3d": 5}


class Convention(NamedTuple):
    """How a module lays its value out.

    Args:
        dim: of the channels, 1 or -1; None where the module's type does not tell.
        channels: how many there are; None where the module does not know.
        rank: of the values that it is made for; None for any.
        source: name of its type, for messages.
    """

    dim: int | None
    channels: int | None
    rank: int | None
    source: str

    def dim_for(self, shape: torch.Size) -> int | None:
        """The dimension by type, where the value has the rank that the module is made for."""
        return self.dim if self.rank in (None, len(shape)) else None


def convention(module: nn.Module, *, of_input: bool = False) -> Convention | None:
    """How a module lays out its output (or its input); None where it takes values of any layout.

    Example:
        >>> convention(nn.Conv2d(3, 8, 3))
        Convention(dim=1, channels=8, rank=4, source='Conv2d')
    """
    source = type(module).__name__
    kinds = [kind.__name__[-2:] for kind in type(module).__mro__]
    rank = next((_RANKS[end] for end in kinds if end in _RANKS), None)
    if isinstance(module, conv._ConvNd):
        return Convention(1, module.in_channels if of_input else module.out_channels, rank, source)
    if isinstance(module, batchnorm._NormBase):
        return Convention(1, module.num_features, None if rank == 3 else rank, source)
    if isinstance(module, nn.GroupNorm):
        return Convention(1, module.num_channels, None, source)
    if isinstance(module, _POOLS):
        return Convention(1, None, rank, source)
    if isinstance(module, _LAYER_NORMS):
        sizes = module.normalized_shape
        # Several networks derive a norm over dimension 1 from it, so that only the class itself shows the dimension.
        dim = -1 if type(module) in _LAYER_NORMS else None
        return Convention(dim, sizes[0], None, source) if len(sizes) == 1 else None
    if isinstance(module, nn.Linear):
        return Convention(-1, module.in_features if of_input else module.out_features, None, source)
    if isinstance(module, nn.MultiheadAttention):
        return Convention(-1, module.embed_dim, None, source)
    if isinstance(module, nn.Embedding):
        return None if of_input else Convention(-1, module.embedding_dim, None, source)
    if isinstance(module, nn.RNNBase):
        outputs = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
        return Convention(-1, module.input_size if of_input else outputs, None, source)
    return None


# Where the activations and dropouts of torch are, which leave every value in its place.
_ELEMENTWISE = ("torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.linear")
_POOLS = (pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveMaxPoolNd, pooling._AdaptiveAvgPoolNd)
_LAYER_NORMS = tuple(getattr(nn, name) for name in ("LayerNorm", "RMSNorm") if hasattr(nn, name))


def channel_dim(
    networks: Sequence[nn.Module], module: nn.Module, shape: torch.Size, *, at_input: bool = False
) -> tuple[int, str] | None:
    """The dimension of the channels in a module's value, and the type of the module that decides it.

    The last module inside it that lays out its output decides; where there is none (an activation), the last one
    before it; where there is none either, the first one after it. Its type says which dimension it fills, its number of
    channels which dimension has that size. Where types differ the number decides, which sees through permutations.
    Where all types agree and the number contradicts them, nothing is decided: a permutation and a concatenation look
    alike.

    Args:
        networks: that hold the module.
        module: whose value it is.
        shape: of the value, (N, ...), of two dimensions or more.
        at_input: it is the module's input.

    Returns:
        1 or the last dimension, counted from 0; None where the modules do not tell.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU())
        >>> channel_dim([net], net[1], torch.Size([1, 8, 60]))
        (1, 'Conv1d')
    """
    last = len(shape) - 1
    if last == 1:
        return 1, type(module).__name__
    inside = _conventions(module.modules(), of_input=at_input)
    if inside:
        return _decided(inside[0] if at_input else inside[-1], inside, shape)
    for root in networks:
        every = list(root.modules())
        place = next((k for k, other in enumerate(every) if other is module), None)
        if place is None:
            continue
        if before := _conventions(every[:place]):
            return _decided(before[-1], before, shape, moved=type(module).__module__ not in _ELEMENTWISE)
        if after := _conventions(every[place + 1 :], of_input=True):
            return _decided(after[0], after, shape, moved=True)
    return None


def input_channel_dim(networks: Sequence[nn.Module], shape: torch.Size) -> tuple[int, str] | None:
    """The dimension of the channels in a network's input, by its first module that takes a layout.

    Args, Returns: as for :func:`channel_dim`; None also where its number of channels is found in neither dimension, or
        may be that of a flattened input.

    Example:
        >>> input_channel_dim([nn.LSTM(6, 8, batch_first=True)], torch.Size([1, 40, 6]))
        (2, 'LSTM')
    """
    for root in networks:
        first = next(iter(_conventions(root.modules(), of_input=True)), None)
        if first is None or first.channels not in (shape[1], shape[-1]):
            continue
        flattened = first.rank is None and (len(shape) > 3 or first.channels == shape[1:].numel())
        if first.rank in (None, len(shape)) and not flattened:
            return _decided(first, [first], shape, moved=True)
    return None


def _conventions(modules: Iterable[nn.Module], *, of_input: bool = False) -> list[Convention]:
    found = [convention(module, of_input=of_input) for module in modules]
    return [one for one in found if one is not None]


def _decided(
    one: Convention, every: list[Convention], shape: torch.Size, *, moved: bool = False
) -> tuple[int, str] | None:
    """What the convention of ``one`` says, unless another of ``every`` contradicts it.

    Args:
        one: of the nearest module.
        every: of all modules that are asked.
        shape: of the value.
        moved: whether something between may move dimensions.
    """
    last = len(shape) - 1
    fits = [dim for dim in (1, last) if one.channels is not None and shape[dim] == one.channels]
    dims = {other.dim_for(shape) for other in every if other.rank in (None, len(shape))}
    own = one.dim_for(shape)
    dim = own % len(shape) if own is not None and len(dims) == 1 else None
    if len(fits) == 1 and (moved or dim in (None, fits[0])):
        return fits[0], one.source
    return None if dim is None or len(fits) == 1 else (dim, one.source)


def mixes_heads(networks: Sequence[nn.Module], module: nn.Module) -> str | None:
    """What mixes the heads of an attention before a module returns: a name to show; None where nothing is known to.

    Example:
        >>> mixes_heads([], nn.MultiheadAttention(4, 2))
        'MultiheadAttention'
    """
    if isinstance(module, nn.MultiheadAttention):
        return type(module).__name__
    for root in networks:
        for path, parent in root.named_modules():
            children = dict(parent.named_children())
            mixing = _PROJECTIONS & children.keys() if _QUERIES & children.keys() else set()
            if mixing and (parent is module or any(children[name] is module for name in mixing)):
                return ".".join(filter(None, (path, min(mixing))))
    return None


def misfit(networks: Sequence[nn.Module], inputs: Sequence[torch.Tensor]) -> tuple[str, str, str] | None:
    """Why a network cannot take its inputs, where its first module shows that: what it wants, what came, and a hint.

    Only for inputs with which a pass has failed: a network may well change what its first module gets.

    Example:
        >>> misfit([nn.Conv2d(3, 8, 3)], [torch.zeros(3, 9, 9)])
        ('a batch (N, 3, ...)', 'shape (3, 9, 9)', 'Write `x[None]` for a single example.')
    """
    parameters = [p for root in networks for p in root.parameters() if p.is_floating_point()]
    x, types, devices = inputs[0], {p.dtype for p in parameters}, {p.device for p in parameters}
    if len(types) == 1 and x.dtype not in types:
        (dtype,) = types
        return f"of the network's type {dtype}", str(x.dtype), f"Write `x.to({dtype})`."
    if len(devices) == 1 and x.device not in devices:
        (device,) = devices
        return f"on the network's device {device}", str(x.device), f'Write `x.to("{device}")`.'
    for root in networks:
        one = next(iter(_conventions(root.modules(), of_input=True)), None)
        if one is not None and one.channels is not None:
            return _wrong_shape(one, one.channels, x.shape)
    return None


def _wrong_shape(one: Convention, channels: int, shape: torch.Size) -> tuple[str, str, str] | None:
    got = f"shape {tuple(shape)}"
    if one.rank is None:
        dim = len(shape) - 1
        if shape[-1] == channels or shape[1:].numel() == channels:
            return (f"a batch (N, {channels})", got, "Write `x[None]` for a single example.") if dim == 0 else None
        return f"of {channels} values in the last dimension", got, f"`{one.source}` takes that many."
    if len(shape) == one.rank - 1 and channels in (shape[0], shape[-1]):
        move = "" if shape[0] == channels else ".movedim(-1, 0)"
        return f"a batch (N, {channels}, ...)", got, f"Write `x{move}[None]` for a single example."
    if len(shape) == one.rank and shape[1] != channels:
        hint = "Write `x.movedim(-1, 1)`." if shape[-1] == channels else f"`{one.source}` takes that many."
        return f"with {channels} channels in dimension 1", got, hint
    if len(shape) != one.rank:
        return f"of {one.rank} dimensions, (N, {channels}, ...)", got, f"`{one.source}` takes that many."
    return None
