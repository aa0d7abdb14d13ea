"""A fitted scikit-learn classifier or pipeline as a module, so that network and classifier are one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ce_plugin.errors import InputError, ModelError, expected
from ce_plugin.randomness import generator

Array = npt.NDArray[np.float64]

# Rows on which a conversion must give what the estimator itself gives, and how closely.
_ROWS, _TOLERANCE = 8, 1e-9
_METHODS = ("decision_function", "predict_proba")


class SklearnHead(nn.Module):
    """A fitted scikit-learn classifier, or a pipeline that ends in one: features (N, D) to decision values (N, C).

        h(z) = decision_function(z), or predict_proba(z) where there is none; predict(z) of a regressor

    Put behind a network that gives features, the two are one model, whose effects, attacks and gradients are those of
    the whole: ``nn.Sequential(network, SklearnHead(pipeline))``. Of two classes there is one output, positive for the
    second (``outcome="logit"``, or None for the value as it is).

    Linear classifiers and regressors (``LinearSVC``, ``LogisticRegression``, ``RidgeClassifier`` ...), ``Normalizer``,
    ``StandardScaler``, ``MinMaxScaler``, ``MaxAbsScaler``, ``RobustScaler``, ``PCA`` and ``TruncatedSVD`` become torch
    operations with gradients. They are compared with the estimator when the module is made. Any other step is called
    as it is, in numpy: its effects are the same, but there is no gradient (:attr:`differentiable`).

    Args:
        estimator: fitted; of a search (``GridSearchCV``) the best estimator is taken.
        dtype: of the arithmetic; float64 is scikit-learn's own.

    Attributes:
        differentiable: whether gradients pass through.
        classes: the labels that the outputs stand for, in their order; empty for a regressor.

    Raises:
        ModelError: the estimator is not fitted, or gives no scores.
        InputError: at a call, features that are not (N, D).

    Example:
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import Normalizer
        >>> from sklearn.svm import LinearSVC
        >>> x, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
        >>> pipeline = make_pipeline(Normalizer(), LinearSVC()).fit(x, y)
        >>> head = SklearnHead(pipeline)
        >>> head, head(torch.zeros(2, 4)).shape, bool(np.allclose(head(torch.tensor(x)), pipeline.decision_function(x)))
        (SklearnHead(Normalizer, LinearSVC, differentiable=True), torch.Size([2, 3]), True)

    Source: scikit-learn (Pedregosa et al. 2011).
    """

    def __init__(self, estimator: Any, *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        estimator = getattr(estimator, "best_estimator_", estimator)
        method = _scores_of(estimator)
        steps = [
            step for _, step in getattr(estimator, "steps", [("", estimator)]) if step not in (None, "passthrough")
        ]
        self.features = int(getattr(estimator, "n_features_in_", 0) or getattr(steps[0], "n_features_in_", 0))
        self.classes = tuple(np.asarray(getattr(estimator, "classes_", ())).tolist())
        self.dtype = dtype
        converted: list[nn.Module] = []
        width = self.features
        for step in steps:
            call = getattr(step, method if step is steps[-1] else "transform")
            module, width = _converted(step, call, width)
            converted.append(module.to(dtype))
        self.steps = nn.Sequential(*converted)
        self._names = [type(step).__name__ for step in steps]

    @property
    def differentiable(self) -> bool:
        """Whether gradients pass through."""
        return not any(isinstance(step, _Opaque) for step in self.steps)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, D) to decision values (N, C), or (N, 1) of two classes and of regressors, in ``dtype``."""
        if features.dim() != 2 or features.shape[1] != self.features:
            hint = "Put nn.Flatten() between a network with maps and this module."
            raise InputError(expected("features", f"of shape (N, {self.features})", tuple(features.shape), hint))
        scores: Tensor = self.steps(features.to(self.dtype))
        return scores

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._names)}, differentiable={self.differentiable})"


class _Opaque(nn.Module):
    """A step that is called in numpy, row by row the same, without a gradient."""

    def __init__(self, call: Callable[[Array], Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, features: Tensor) -> Tensor:
        return torch.from_numpy(_columns(self.call(features.detach().cpu().double().numpy()))).to(features)


class _Affine(nn.Module):
    """``z @ weight.T + bias``, or ``z * weight + bias`` where the weight has one dimension."""

    def __init__(self, weight: Any, bias: Any, limits: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(np.array(weight, np.float64)))
        self.register_buffer("bias", torch.from_numpy(np.array(bias, np.float64)))
        self.limits = limits

    weight: Tensor
    bias: Tensor

    def forward(self, features: Tensor) -> Tensor:
        out = features @ self.weight.T if self.weight.dim() == 2 else features * self.weight
        out = out + self.bias
        return out if self.limits is None else out.clamp(*self.limits)


class _Norm(nn.Module):
    """Each row divided by its norm; a row of zeros stays."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.order = {"l1": 1.0, "l2": 2.0, "max": float("inf")}[norm]

    def forward(self, features: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(features, self.order, dim=1, keepdim=True)
        return features / torch.where(norms == 0, torch.ones_like(norms), norms)


def _scores_of(estimator: Any) -> str:
    """The method that gives the scores of a fitted estimator."""
    from sklearn.base import BaseEstimator, is_classifier, is_regressor
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    if not isinstance(estimator, BaseEstimator):
        raise ModelError(expected("estimator", "a fitted scikit-learn estimator", type(estimator).__name__))
    try:
        check_is_fitted(estimator)
    except NotFittedError as error:
        hint = "Call its fit(features, labels) first."
        raise ModelError(expected("estimator", "a fitted one", f"{type(estimator).__name__}", hint)) from error
    method = next((name for name in _METHODS if is_classifier(estimator) and hasattr(estimator, name)), "")
    method = method or ("predict" if is_regressor(estimator) else "")
    if not method:
        wanted = "a classifier with decision_function or predict_proba, or a regressor"
        raise ModelError(expected("estimator", wanted, type(estimator).__name__))
    return method


def _converted(step: Any, call: Callable[[Array], Any], width: int) -> tuple[nn.Module, int]:
    """A step as a module, and how many columns it gives: in torch where that reproduces it, else as it is."""
    rows = torch.randn(_ROWS, width, dtype=torch.float64, generator=generator(0, 0, "sklearn"))
    wanted = _columns(call(rows.numpy()))
    module = _CONVERSIONS.get(type(step).__name__, _linear)(step)
    if module is not None:
        found = module(rows).numpy()
        if found.shape == wanted.shape and np.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
            return module, wanted.shape[1]
    return _Opaque(call), wanted.shape[1]


def _columns(values: Any) -> Array:
    """(N, C), dense, in float64; one value a row becomes a column."""
    dense = values.toarray() if hasattr(values, "toarray") else np.asarray(values)
    table: Array = np.ascontiguousarray(dense.reshape(len(dense), -1), np.float64)
    return table


def _linear(step: Any) -> nn.Module | None:
    """Anything with coefficients and an intercept, and no more than that."""
    weight = getattr(step, "coef_", None)
    if not isinstance(weight, np.ndarray):
        return None
    weight = np.atleast_2d(weight)
    return _Affine(weight, np.broadcast_to(getattr(step, "intercept_", 0.0), len(weight)))


def _scaled(center: str, scale: str) -> Callable[[Any], nn.Module | None]:
    """``(z - center) / scale``, of which either may be missing."""

    def make(step: Any) -> nn.Module:
        ones = np.ones(step.n_features_in_)
        # A StandardScaler has learned a mean also where it does not take it away.
        middle = getattr(step, center, None) if getattr(step, "with_mean", True) else None
        size = getattr(step, scale, None)
        factor = ones / (ones if size is None else size)
        return _Affine(factor, 0 * ones if middle is None else -middle * factor)

    return make


def _minmax(step: Any) -> nn.Module:
    return _Affine(step.scale_, step.min_, tuple(step.feature_range) if step.clip else None)


def _components(step: Any) -> nn.Module:
    weight = step.components_
    if getattr(step, "whiten", False):
        weight = weight / np.sqrt(step.explained_variance_)[:, None]
    middle = getattr(step, "mean_", np.zeros(weight.shape[1]))
    return _Affine(weight, -weight @ middle)


_CONVERSIONS: dict[str, Callable[[Any], nn.Module | None]] = {
    "Normalizer": lambda step: _Norm(step.norm),
    "StandardScaler": _scaled("mean_", "scale_"),
    "RobustScaler": _scaled("center_", "scale_"),
    "MaxAbsScaler": _scaled("", "scale_"),
    "MinMaxScaler": _minmax,
    "PCA": _components,
    "TruncatedSVD": _components,
}
