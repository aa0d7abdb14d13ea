"""Several statistics of an image made into one score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ce_plugin.detection.protocol import Array

__all__ = ["Combination"]

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)
_STEPS = 2000
_FEW = 10  # images of a kind below which the strength of the penalty is not chosen by cross-validation


@dataclass(frozen=True)
class Combination:
    """A score from statistics s, (N, K): b + sum_k w_k z_k with z = (s - mean) / scale, or the sum of z_k squared.

    Args:
        mean: (K,).
        scale: (K,), positive.
        weight: (K,), w.
        bias: b.
        two_sided: the sum of squares is taken: what is too small is as odd as what is too large.

    Example:
        >>> sum_of_two = Combination.of_clean(np.array([[0.0, 10.0], [2.0, 30.0]]))
        >>> sum_of_two(torch.tensor([[1.0, 20.0], [2.0, 20.0]])).tolist()
        [0.0, 1.0]
    """

    mean: Array
    scale: Array
    weight: Array
    bias: float = 0.0
    two_sided: bool = False

    @classmethod
    def of_clean(cls, statistics: Array, *, two_sided: bool = False) -> Combination:
        """The sum of statistics standardised on clean images (N, K)."""
        mean, scale = _moments(statistics)
        return cls(mean, scale, np.ones(len(mean)), 0.0, two_sided)

    @classmethod
    def of_labels(cls, statistics: Array, labels: Array, *, seed: int = 0) -> Combination:
        """The log odds of a logistic regression on standardised statistics (N, K); labels (N,), 0 or 1.

        The strength of its penalty is chosen by cross-validation of the log loss, as the papers' code does with
        scikit-learn's LogisticRegressionCV.
        """
        from sklearn.linear_model import LogisticRegression

        mean, scale = _moments(statistics)
        z = (statistics - mean) / scale
        few = min(np.bincount(labels, minlength=2)) < _FEW
        strength = 1.0 if few else _chosen_strength(z, labels, seed)
        model = LogisticRegression(C=strength, max_iter=_STEPS).fit(z, labels)
        return cls(mean, scale, model.coef_[0].astype(float), float(model.intercept_[0]))

    def __call__(self, statistics: Tensor) -> Tensor:
        """Statistics (N, K) to scores (N,), float64, with a gradient."""
        values = statistics.double()
        mean, scale, weight = (torch.as_tensor(a).to(values) for a in (self.mean, self.scale, self.weight))
        z = (values - mean) / scale
        return z.square().sum(1) if self.two_sided else z @ weight + self.bias


def _chosen_strength(z: Array, labels: Array, seed: int) -> float:
    """The inverse strength C of the penalty with the least log loss on images that were left out, in five folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    loss = np.zeros(len(_STRENGTHS))
    for fit, held in StratifiedKFold(5, shuffle=True, random_state=seed % 2**32).split(z, labels):
        # From the strongest penalty on, each fit starts where the last one ended.
        model = LogisticRegression(max_iter=_STEPS, warm_start=True)
        for k, strength in enumerate(_STRENGTHS):
            odds = model.set_params(C=strength).fit(z[fit], labels[fit]).decision_function(z[held])
            loss[k] += np.logaddexp(0, np.where(labels[held] == 1, -odds, odds)).sum()
    return _STRENGTHS[int(loss.argmin())]


def _moments(statistics: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each column; a column that never varies has scale 1."""
    mean, scale = statistics.mean(0), statistics.std(0)
    # Rounding alone makes the deviation of a constant a little more than zero.
    return mean, np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, 1.0)
