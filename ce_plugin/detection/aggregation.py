"""From one distance per group to one score."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ce_plugin.errors import unknown_name

__all__ = ["AGGREGATES", "aggregate", "fit_weights"]

AGGREGATES = ("soft_square", "sum", "max")


def aggregate(deviations: Tensor, how: str = "soft_square", weights: Tensor | None = None) -> Tensor:
    """One score from the groups' standardised distances.

    ============= ======================================== ===========================================================
    how           score of z_1 ... z_G
    ============= ======================================== ===========================================================
    "soft_square" sum_g w_g softplus(z_g)^2                a group that sees nothing unusual says nothing
    "sum"         sum_g w_g z_g                            one that finds an image very usual makes up for another
    "max"         max_g w_g z_g                            the most suspicious group decides
    ============= ======================================== ===========================================================

    Args:
        deviations: z, (N, G): distances, centred and scaled on clean images.
        how: a name of the table.
        weights: w, (G,), 0 or more; None: all 1.

    Returns:
        (N,); greater means more adversarial.

    Raises:
        UnknownNameError: another name.

    Example:
        >>> z = torch.tensor([[0.0, 0.0], [-9.0, 4.0]])
        >>> [round(value, 2) for value in aggregate(z).tolist()]
        [0.96, 16.15]
        >>> aggregate(z, "max").tolist()
        [0.0, 4.0]
    """
    if how not in AGGREGATES:
        raise unknown_name("aggregate", how, AGGREGATES)
    ones = deviations.new_ones(deviations.shape[1]) if weights is None else weights.to(deviations)
    if how == "soft_square":
        return (F.softplus(deviations).square() * ones).sum(1)
    weighted = deviations * ones
    return weighted.sum(1) if how == "sum" else weighted.amax(1)


def fit_weights(clean: Tensor, adversarial: Tensor, how: str, penalty: float = 0.05) -> Tensor:
    """Weights of the groups that tell adversarial images from clean ones best, never negative.

    They minimise the balanced logistic loss of the weighted score plus ``penalty`` times the squared distance from
    equal weights. A weight below zero would say that an unusual effect speaks *for* an image, which one attack may
    teach and the next one punish.

    Args:
        clean: standardised distances of clean images, (N, G).
        adversarial: those of attacked ones, (M, G).
        how: as for :func:`aggregate`; "max" is weighted like "sum".
        penalty: how strongly weights are drawn to each other.

    Returns:
        (G,), float64, 0 or more, mean 1.

    Example:
        >>> noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> weights = fit_weights(noise[:100], noise[100:] + torch.tensor([3.0, 0.0]), "sum")
        >>> bool(weights[0] > weights[1])
        True
    """
    from scipy.optimize import minimize

    parts = [F.softplus(z).square() if how == "soft_square" else z for z in (clean.double(), adversarial.double())]
    everything = torch.cat(parts).numpy()
    signs = np.r_[-np.ones(len(clean)), np.ones(len(adversarial))]
    share = np.r_[np.full(len(clean), 0.5 / len(clean)), np.full(len(adversarial), 0.5 / len(adversarial))]
    size = max(float(everything.std()), 1e-9)
    columns = everything / size
    n_groups = columns.shape[1]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, offset = parameters[:-1], parameters[-1]
        score = signs * (columns @ weights + offset)
        pull = weights - weights.mean()
        value = float((share * np.logaddexp(0, -score)).sum() + penalty * (pull @ pull))
        slope = -share * signs / (1 + np.exp(np.clip(score, -500, 500)))
        return value, np.r_[columns.T @ slope + 2 * penalty * pull, slope.sum()]

    start = np.r_[np.full(n_groups, 1 / n_groups), 0.0]
    bounds = [(0.0, 1e3)] * n_groups + [(None, None)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x[:-1]
    total = found.sum()
    # No group tells the two apart: equal weights, as without labels.
    return torch.as_tensor(found * n_groups / total if total > 0 else np.ones(n_groups))
