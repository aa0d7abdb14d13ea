"""Differences that stay in one channel: carried through what treats channels separately, and mixed by superposition."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ce_plugin.trials._operations import Cat, Conv, Last, Linear, Norm, Operation, Pointwise, Separable, View
from ce_plugin.trials._states import Channel, Clean, CleanMap, Dense, State


def mixes(operation: Operation) -> bool:
    """Whether every channel of the result depends on all channels of the source."""
    if isinstance(operation, Conv):
        return operation.groups == 1
    return isinstance(operation, Linear) and operation.source.clean.dim() == 2


def follow_channels(operation: Operation, clean: CleanMap, rows: int) -> State | None:
    """The state after an operation on states with one differing channel; None where that cannot be followed.

    Args:
        operation: its sources are states.
        clean: the operation's clean result, (1, ...).
        rows: number of rows of the batch.
    """
    if isinstance(operation, Pointwise):
        return _pointwise(operation, clean, rows)
    if isinstance(operation, Cat):
        return _cat(operation, clean)
    source = operation.source
    if not isinstance(source, Channel):
        return None
    if isinstance(operation, Norm):
        return Channel(clean, source.start, _normalised(operation, source))
    if isinstance(operation, Separable):
        return Channel(clean, source.start, operation.apply(source.value)) if source.clean.dim() == 4 else None
    if isinstance(operation, View):
        return _view(source, clean)
    if isinstance(operation, Conv) and source.clean.dim() == 4:
        return _mixed(operation, source, clean) if operation.groups == 1 else _grouped(operation, source, clean)
    if isinstance(operation, Linear) and source.clean.dim() == 2:
        return Dense(_through_linear(operation, source, clean.value))
    dims = operation.dims if isinstance(operation, Last) else 1
    if isinstance(operation, (Last, Linear)) and source.clean.dim() >= 2 + dims:
        return Channel(clean, source.start, operation.apply(source.value))
    return None


def _pointwise(operation: Operation, clean: CleanMap, rows: int) -> State | None:
    operands = operation.source
    channels = [operand for operand in operands if isinstance(operand, Channel)]
    first = channels[0]
    slices = []
    for operand in operands:
        if not _fits(operand, first, clean):
            return None
        slices.append(_slice(operand, first, clean))
    value = operation.apply(*slices)
    if Dense not in map(type, operands):
        return Channel(clean, first.start, value)
    plain = [_plain(operand) for operand in operands]
    full = operation.apply(*plain)
    full[torch.arange(rows, device=full.device)[:, None], first.channels] = value
    return Dense(full)


def _plain(operand: Any) -> Any:
    """An operand's clean value, or what its rows are where they are dense."""
    if isinstance(operand, Channel):
        return operand.clean.value
    return operand.clean if isinstance(operand, Clean) else operand.value if isinstance(operand, Dense) else operand


def _fits(operand: Any, first: Channel, clean: CleanMap) -> bool:
    """Whether an operand's part in the block of channels can be taken."""
    if isinstance(operand, Channel):
        same = operand.start is first.start or torch.equal(operand.start, first.start)
        shapes = operand.clean.dim() == clean.dim() and operand.clean.shape[1] == clean.shape[1]
        return same and shapes and operand.value.shape[1] == first.value.shape[1]
    if isinstance(operand, Dense):
        return operand.value.dim() == clean.dim()
    tensor = operand.clean if isinstance(operand, Clean) else operand
    if not isinstance(tensor, Tensor):
        return isinstance(tensor, (int, float, bool, type(None)))
    sizes = zip(reversed(tensor.shape), reversed(clean.shape), strict=False)
    return tensor.dim() <= clean.dim() and all(a in (1, b) for a, b in sizes)


def _slice(operand: Any, first: Channel, clean: CleanMap) -> Any:
    if isinstance(operand, Channel):
        return operand.value
    if isinstance(operand, Dense):
        return first.taken(operand.value.expand(-1, *clean.shape[1:]))
    tensor = operand.clean if isinstance(operand, Clean) else operand
    if not isinstance(tensor, Tensor) or tensor.numel() == 1:
        return tensor if not isinstance(tensor, Tensor) or tensor.dim() == 0 else tensor.reshape(())
    return first.taken(tensor.expand(clean.shape))


def _cat(operation: Cat, clean: CleanMap) -> State | None:
    parts = operation.source
    channels = [part for part in parts if isinstance(part, Channel)]
    dim = operation.dim % clean.dim()
    if dim != 1 or len(channels) != 1 or not all(isinstance(part, (Clean, Channel)) for part in parts):
        return None
    offset = 0
    for part in parts:
        if isinstance(part, Channel):
            break
        offset += part.clean.shape[1]
    return Channel(clean, channels[0].start + offset, channels[0].value)


def _normalised(operation: Norm, source: Channel) -> Tensor:
    shape = (*source.value.shape[:2], *[1] * (source.value.dim() - 2))
    channels = source.channels
    scale = (operation.var[channels] + operation.eps).rsqrt()
    if operation.weight is not None:
        scale = scale * operation.weight[channels]
    value = (source.value - operation.mean[channels].view(shape)) * scale.view(shape)
    return value if operation.bias is None else value + operation.bias[channels].view(shape)


def _view(source: Channel, clean: CleanMap) -> State | None:
    """A block of channels is a run of consecutive elements; in the new shape it may again be a block."""
    if clean.dim() < 2 or clean.shape[0] != 1:
        return None
    before, after = math.prod(source.clean.shape[2:]), math.prod(clean.shape[2:])
    length = source.value.shape[1] * before
    if length % after or bool((source.start * before % after).any()):
        return None
    value = source.value.reshape(len(source.start), length // after, *clean.shape[2:])
    return Channel(clean, source.start * before // after, value)


def _grouped(operation: Conv, source: Channel, clean: CleanMap) -> State | None:
    """Channels of one group are mixed among themselves: what differs afterwards is that group's block."""
    inside, outside = operation.weight.shape[1], operation.weight.shape[0] // operation.groups
    block = source.value.shape[1]
    group = torch.div(source.start, inside, rounding_mode="floor")
    if bool((group != torch.div(source.start + block - 1, inside, rounding_mode="floor")).any()):
        return None
    start = group * outside
    result = Channel(clean, start, clean.value.new_empty((len(start), outside, *clean.shape[2:])))
    kernels = operation.weight[result.channels[:, :, None], (source.channels % inside)[:, None, :]]
    rows, options = len(start), (operation.stride, operation.padding, operation.dilation)
    difference = source.difference().reshape(1, rows * block, *source.value.shape[2:])
    changed = F.conv2d(difference, kernels.flatten(0, 1), None, *options, rows)
    return Channel(clean, start, result.taken(clean.value) + changed.view(rows, outside, *clean.shape[2:]))


def _mixed(operation: Conv, source: Channel, clean: CleanMap) -> State:
    """Convolution of all channels: the clean result plus the kernels of the differing channels on the difference."""
    difference = source.difference()
    rows = len(difference)
    out, size = clean.shape[1], clean.shape[2:]
    kernels = operation.weight.movedim(0, -1)[source.channels]  # (B, m, kh, kw, out)
    base = clean.value[0].permute(1, 2, 0).reshape(1, -1, out)
    if operation.kernel == (1, 1) and operation.padding == (0, 0):
        patches = difference[:, :, :: operation.stride[0], :: operation.stride[1]].flatten(2)
    else:
        patches = F.unfold(difference, operation.kernel, operation.dilation, operation.padding, operation.stride)
    kernels = kernels.reshape(rows, -1, out)
    if patches.shape[1] == 1:
        full = torch.addcmul(base, patches.transpose(1, 2), kernels)
    else:
        full = torch.baddbmm(base.expand(rows, -1, -1), patches.transpose(1, 2), kernels)
    return Dense(full.view(rows, *size, out).permute(0, 3, 1, 2))


def _through_linear(operation: Linear, source: Channel, clean: Tensor) -> Tensor:
    """A linear layer of all channels: the clean result plus the columns of the differing ones."""
    difference, weight = source.difference(), operation.weight
    block = difference.shape[1]
    if block == 1:
        return torch.addcmul(clean, difference, weight.t()[source.start])
    if _consecutive(source.start, block):
        begin = int(source.start[0])
        part = weight.t()[begin : begin + block * len(difference)].view(len(difference), block, -1)
        return clean + torch.bmm(difference[:, None], part)[:, 0]
    # One product per row reads each weight once; to copy the columns first would take ten times as long.
    # `matmul`, unlike `mv`, takes weights of another type inside autocast.
    starts = source.start.tolist()
    rows = [torch.matmul(weight[:, begin : begin + block], d) for begin, d in zip(starts, difference, strict=True)]
    return clean + torch.stack(rows)


def _consecutive(start: Tensor, block: int) -> bool:
    """Whether the blocks follow one another, so that no copy of the weights is needed."""
    return bool((start[1:] - start[:-1] == block).all())
