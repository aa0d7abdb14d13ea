"""Whether a network gives the same for the same row: whenever it is passed, and whatever rows are passed with it.

What depends on a row's place before a layer is not looked for where all examples pass alone, as one or two do: a third
row would have to pass again, and the layer's values are those of each example by itself, which trials then start from.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ce_plugin.errors import ModelError, expected

# From a head's name to its outputs, one for each row.
Heads: TypeAlias = dict[str, Tensor]
# The smallest difference that counts, as a share of the range of the outputs that were seen: effects are differences of
# outputs, and their errors then stay below what is ever printed.
_SHARE = 1e-5
# Rounding of one pass, in multiples of the largest output. Kernels round differently for other numbers of rows.
_ROUNDING = {torch.float64: 1e-12, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# Rounding between two ways of computing the same outputs, in multiples of the largest output.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_TOLERANCE_TF32 = 5e-3
# What other rows in a batch may change of a row's outputs, as a share of the differences between the rows.
_MIXED = 1e-3
# How often rows are passed again where a pass draws random numbers: what is dropped with probability 1/2 goes unnoticed
# in 1 of 2 pairs, and in 1 of 256 such sets.
_COPIES = 8


def random_marks(device: torch.device) -> tuple[object, ...]:
    """What changes when random numbers are drawn from a global generator of torch, numpy or python."""
    numbers = np.random.get_state()  # noqa: NPY002 - the global state is what networks draw from
    marks = [torch.get_rng_state().numpy().tobytes(), random.getstate(), numbers[1].tobytes(), numbers[2]]  # type: ignore[index]
    if device.type == "cuda":
        marks.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return tuple(marks)


def check_repeated(first: Heads, again: Callable[[], Heads], seen: Heads, drawn: bool = False) -> None:
    """That rows give the same when they are passed again, at another place of another batch.

    Equal means within 1e-5 of the range of the outputs that were seen, and within rounding. Where the rows differ, the
    second pass is run once more: what then changes is random; what does not is due to the other rows in the batch. That
    may still be rounding, since kernels for other numbers of rows round differently, and counts from 1e-3 of what
    rows differ by.

    Args:
        first: (1, ...) by head.
        again: passes the same row again, (1, ...) by head.
        seen: outputs of any rows.
        drawn: whether a pass draws random numbers; the row is then passed eight times.

    Raises:
        ModelError: the network is random, or mixes the rows of a batch.
    """
    for _ in range(_COPIES if drawn else 1):
        found = again()
        if not _equal(first, found, seen):
            if drawn or not _equal(found, again(), seen):
                check_deterministic(first, found, exact=True)
            _check_unmixed(first, found, seen)


def _check_unmixed(first: Heads, again: Heads, seen: Heads) -> None:
    """That outputs differ by no more than rounding, where a row was passed with other rows."""
    for name, head in again.items():
        others = seen[name].float()
        spread = _finite(others.amax(0) - others.amin(0)).amax()
        allowed = _MIXED * spread + _rounding_between_ways(head) * _finite(others).abs().amax()
        gap = float(_gap(first[name], head))
        if gap > float(allowed):
            hint = "Fix what is computed over the batch: batch normalisation runs in eval mode (`training=False`)."
            got = f"outputs that change by {gap:.2g} with the other rows of the batch"
            wanted = "a model whose outputs for an example depend on that example alone"
            raise ModelError(expected("forward_func", wanted, got, hint))


def check_deterministic(first: Heads, second: Heads, exact: bool = False) -> None:
    """That two passes of the same input give the same outputs.

    Args:
        first, second: the outputs.
        exact: whether any difference is one, and not only more than rounding between two ways of computing the same.

    Raises:
        ModelError: they do not.
    """
    if not exact and close(first, second):
        return
    gap = max(float(_gap(first[name], second[name])) for name in first)
    hint = "Seed or switch off what is random (dropout that ignores eval mode, random transforms)."
    got = f"outputs that differ by {gap:.2g} between two passes of the same input"
    raise ModelError(expected("forward_func", "a deterministic model", got, hint))


def close(a: Heads, b: Heads) -> bool:
    """Whether two ways of computing the same outputs agree up to rounding."""
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        return False
    for name, head in a.items():
        tolerance = _TOLERANCE.get(head.dtype, 1e-4) * float(head.abs().max().clamp(min=1e-12))
        if not float(_gap(head, b[name])) <= tolerance:
            return False
    return True


def _equal(first: Heads, again: Heads, seen: Heads) -> bool:
    for name, head in again.items():
        if not head.numel():
            continue
        others = _finite(seen[name].float())
        lowest, highest = float(others.amin()), float(others.amax())
        largest = max(abs(lowest), abs(highest))
        allowed = _SHARE * (highest - lowest) + _ROUNDING.get(head.dtype, _SHARE) * largest
        if not float(_gap(first[name], head)) <= allowed:
            return False
    return True


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference; values that are not finite must be the same."""
    if not a.is_floating_point():
        a, b = a.float(), b.float()
    difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    return difference.nan_to_num(torch.inf, torch.inf).amax() if difference.numel() else torch.zeros(())


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(0.0, 0.0, 0.0)


def _rounding_between_ways(head: Tensor) -> float:
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if head.dtype == torch.float32 and head.device.type == "cuda" and tf32:
        return _TOLERANCE_TF32
    return _TOLERANCE.get(head.dtype, 1e-4)
