"""From one distance per group to one score."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ce_plugin.errors import unknown_name

__all__ = ["AGGREGATES", "aggregate"]

AGGREGATES = ("soft_square", "sum", "max")


def aggregate(deviations: Tensor, how: str = "soft_square") -> Tensor:
    """One score from the groups' standardised distances.

    ============= ================================== ===========================================================
    how           score of z_1 ... z_G
    ============= ================================== ===========================================================
    "soft_square" sum_g softplus(z_g)^2              a group that sees nothing unusual says nothing
    "sum"         sum_g z_g                          one that finds an image very usual makes up for another
    "max"         max_g z_g                          the most suspicious group decides
    ============= ================================== ===========================================================

    Args:
        deviations: z, (N, G): distances, centred and scaled on clean images.
        how: a name of the table.

    Returns:
        (N,); greater means more adversarial.

    Raises:
        UnknownNameError: another name.

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0, 0.0], [-9.0, 4.0]])
        >>> [round(value, 2) for value in aggregate(z).tolist()]
        [0.96, 16.15]
        >>> aggregate(z, "max").tolist()
        [0.0, 4.0]
    """
    if how not in AGGREGATES:
        raise unknown_name("aggregate", how, AGGREGATES)
    if how == "soft_square":
        return F.softplus(deviations).square().sum(1)
    return deviations.sum(1) if how == "sum" else deviations.amax(1)
