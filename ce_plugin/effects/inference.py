"""Intervals, p-values and the false discovery rate: pure functions on plain tensors.

All results are on the device of the effects, in float64, or in float32 where the device has none. NaN (padding of
ragged units) goes in and comes out.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ce_plugin.errors import check_number
from ce_plugin.networks.forward import double, widest

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


def half_width(std_error: Tensor, dof: Tensor | None, level: float = 0.95) -> Tensor:
    """Half the width of the t interval: the quantile of t at (1 + level) / 2, times the standard error.

    Args:
        std_error: any shape.
        dof: degrees of freedom, broadcastable to it; None takes the normal quantile.
        level: in (0, 1).

    Returns:
        A tensor of the shape of ``std_error``.

    Raises:
        ArgumentError: for a level outside (0, 1).

    Example:
        >>> import torch
        >>> half_width(torch.tensor([2.0]), None).round(decimals=2)
        tensor([3.9200], dtype=torch.float64)
    """
    check_number("level", level, "in (0, 1)", above=0, below=1, hint="Write 0.95 for 95 per cent.")
    error = _array(std_error)
    quantile = _quantile((1 + level) / 2, dof, error)
    return _tensor(quantile * error, std_error)


def t_interval(effect: Tensor, std_error: Tensor, dof: Tensor | None, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """The two-sided t interval, effect -/+ half width.

    Args:
        effect: any shape.
        std_error: of the same shape.
        dof: degrees of freedom, broadcastable; None takes the normal quantile.
        level: in (0, 1).

    Returns:
        (low, high), each of the shape of ``effect``.

    Raises:
        ArgumentError: for a level outside (0, 1).

    Example:
        >>> import torch
        >>> low, high = t_interval(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([2.0]))
        >>> round(low.item(), 3), round(high.item(), 3)
        (-3.303, 5.303)

    Source: Student 1908.
    """
    half = half_width(std_error, dof, level)
    centre = effect.to(half.dtype)
    return centre - half, centre + half


def p_values(effect: Tensor, std_error: Tensor, dof: Tensor | None) -> Tensor:
    """Two-sided p-values of "this effect is zero": P(|t| >= |effect| / std_error).

    Where the standard error is 0 there is nothing to estimate: an effect of 0 has p = 1, any other has p = 0.

    Args:
        effect: any shape.
        std_error: of the same shape.
        dof: degrees of freedom, broadcastable; None takes the normal distribution.

    Returns:
        A tensor of the shape of ``effect``.

    Example:
        >>> import torch
        >>> p_values(torch.tensor([0.0, 0.5, 1.96]), torch.tensor([0.0, 0.0, 1.0]), None).round(decimals=3)
        tensor([1.0000, 0.0000, 0.0500], dtype=torch.float64)
    """
    from scipy import stats  # takes a second to load, and importing the plugin must not

    value, error = _array(effect), _array(std_error)
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.abs(value) / error
    statistic = np.where((error == 0) & (value == 0), 0.0, statistic)
    tail = stats.norm.sf(statistic) if dof is None else stats.t.sf(statistic, _array(dof))
    return _tensor(np.asarray(2 * tail), effect)


def benjamini_hochberg(p: Tensor, axis: int = -1) -> Tensor:
    """Benjamini-Hochberg adjusted p-values along one axis: those at most q are discoveries at false discovery rate q.

    adjusted_(i) = min over j >= i of p_(j) m / j, with m the number of units that are not NaN.

    Args:
        p: p-values, any shape, NaN where there is no unit.
        axis: the axis of the units, which are tested together.

    Returns:
        A tensor of the shape of ``p``, NaN where ``p`` is.

    Example:
        >>> import torch
        >>> benjamini_hochberg(torch.tensor([0.01, 0.04, 0.03, float("nan")])).round(decimals=3)
        tensor([0.0300, 0.0400, 0.0400,    nan], dtype=torch.float64)

    Source: Benjamini and Hochberg 1995, through ``scipy.stats.false_discovery_control``.
    """
    from scipy import stats

    values = np.moveaxis(_array(p), axis, -1)
    families = values.reshape(-1, values.shape[-1])
    there = ~np.isnan(families)
    out = np.full_like(families, np.nan)
    # Families with the same units are adjusted in one call.
    patterns, group = np.unique(there, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows = np.flatnonzero(group.reshape(-1) == number)
        if pattern.any():
            cells = np.ix_(rows, np.flatnonzero(pattern))
            out[cells] = stats.false_discovery_control(families[cells], axis=1, method="bh")
    return _tensor(np.moveaxis(out.reshape(values.shape), -1, axis), p)


def _quantile(q: float, dof: Tensor | None, like: Array) -> Array:
    """Quantile of t, computed once where all degrees of freedom are the same (they are in most designs)."""
    from scipy import stats

    if dof is None:
        return np.asarray(stats.norm.ppf(q))
    nu = _array(dof)
    known = nu[~np.isnan(nu)]
    if known.size and known.min() == known.max():
        return np.where(np.isnan(nu), np.nan, stats.t.ppf(q, known[0]))
    return np.asarray(stats.t.ppf(q, np.broadcast_to(nu, np.broadcast_shapes(nu.shape, like.shape))))


def _array(x: Tensor) -> Array:
    """A float64 array of the tensor's values."""
    return double(x.detach()).numpy()


def _tensor(x: Array, like: Tensor) -> Tensor:
    """A tensor on the device of ``like``."""
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)).to(widest(like.device)).to(like.device)
