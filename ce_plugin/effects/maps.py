"""Causal effect maps as pure functions: contributions of units, laid where the units are."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["activation_weights", "change_weights", "effect_map"]


def change_weights(change: Tensor, unit_of: Tensor, n_units: int) -> Tensor:
    """Where each unit changes, as shares that sum to one: |d_u(s)| / sum_s' |d_u(s')|.

    Args:
        change: d, the value under ``do`` minus the clean one, (N, K, h, w).
        unit_of: the unit of each element, int64 (1 or N, K, h, w); ``n_units`` means none.
        n_units: number of units U.

    Returns:
        (N, U, h, w); 0 for a unit that does not change.

    Example:
        >>> change = torch.tensor([[[[1.0, -3.0]], [[0.0, 0.0]]]])
        >>> change_weights(change, torch.tensor([[[[0, 0]], [[1, 1]]]]), 2).squeeze().tolist()
        [[0.25, 0.75], [0.0, 0.0]]
    """
    mass = _by_unit(change.abs(), unit_of, n_units)
    return mass / mass.sum((2, 3), keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)


def activation_weights(clean: Tensor, unit_of: Tensor, n_units: int) -> Tensor:
    """The clean activation of each unit at each position, (N, U, h, w); arguments as in :func:`change_weights`.

    Example:
        >>> activation_weights(torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1, dtype=torch.long), 1).item()
        2.0
    """
    return _by_unit(clean, unit_of, n_units)


def effect_map(contribution: Tensor, weights: Tensor) -> Tensor:
    """CEM_c(s) = sum_u contribution_{u,c} weight_u(s).

    Args:
        contribution: (N, U, C).
        weights: (N, U, h, w).

    Returns:
        (N, C, h, w).

    Example:
        >>> effect_map(torch.tensor([[[2.0], [-1.0]]]), torch.tensor([[[[1.0, 0.0]], [[0.5, 0.5]]]])).squeeze().tolist()
        [1.5, -0.5]

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Figure 3 (II).
    """
    n, _, height, width = weights.shape
    found = contribution.to(weights).transpose(1, 2) @ weights.reshape(n, weights.shape[1], -1)
    return found.reshape(n, contribution.shape[2], height, width)


def _by_unit(values: Tensor, unit_of: Tensor, n_units: int) -> Tensor:
    """Sums over the elements of each unit at each position, (N, U, h, w)."""
    n, channels, height, width = values.shape
    alone = torch.arange(channels, device=unit_of.device).reshape(1, -1, 1, 1)
    if n_units == channels and bool((unit_of == alone).all()):
        return values
    index = unit_of.to(values.device).expand_as(values)
    # One row more, for what belongs to no unit.
    return values.new_zeros(n, n_units + 1, height, width).scatter_add_(1, index, values)[:, :n_units]
