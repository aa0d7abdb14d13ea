"""SklearnHead: what scikit-learn computes, with gradients where that can be; effects equal brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, Normalizer, RobustScaler, StandardScaler
from sklearn.svm import SVC, LinearSVC
from torch import nn

from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.designs import OneAtATime
from ce_plugin.errors import InputError, ModelError
from ce_plugin.networks import SklearnHead

RNG = np.random.default_rng(0)
X = RNG.normal(size=(90, 6)) + 0.4 * np.arange(6)
THREE = (X[:, 0] > 0).astype(int) + (X[:, 1] > 0.5)
NEW = torch.tensor(RNG.normal(size=(20, 6)) + 0.4 * np.arange(6))


@pytest.mark.parametrize(
    "steps",
    [
        [LinearSVC()],
        [LogisticRegression()],
        [RidgeClassifier()],
        [LinearDiscriminantAnalysis()],
        *[[Normalizer(norm), LinearSVC()] for norm in ("l1", "l2", "max")],
        [StandardScaler(), PCA(4, whiten=True), LinearSVC()],
        [StandardScaler(with_mean=False), "passthrough", LinearSVC()],
        [RobustScaler(), TruncatedSVD(3), LogisticRegression()],
        [MinMaxScaler(clip=True), MaxAbsScaler(), PCA(), RidgeClassifier()],
    ],
    ids=lambda steps: "-".join(type(step).__name__ for step in steps),
)
@pytest.mark.parametrize("labels", [THREE, (THREE > 0).astype(int)], ids=["three classes", "two classes"])
def test_decision_values_and_gradients_are_those_of_the_estimator(steps: list[Any], labels: Any) -> None:
    pipeline = Pipeline([(str(k), step) for k, step in enumerate(steps)]).fit(X, labels)
    head = SklearnHead(pipeline)
    wanted = pipeline.decision_function(NEW.numpy()).reshape(len(NEW), -1)
    assert head.differentiable
    assert head.classes == tuple(range(len(set(labels))))
    np.testing.assert_allclose(head(NEW).numpy(), wanted, rtol=1e-9, atol=1e-9)
    if "MinMaxScaler" in repr(head):
        return  # clipped: finite differences may cross the edge
    x = NEW[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(head, (x,))


@pytest.mark.parametrize(
    ("estimator", "labels", "method"),
    [
        (SVC(), THREE, "decision_function"),
        (SVC(kernel="linear"), THREE, "decision_function"),
        (RandomForestClassifier(5, random_state=0), THREE, "predict_proba"),
        (make_pipeline(StandardScaler(), SVC()), (THREE > 0).astype(int), "decision_function"),
    ],
)
def test_what_has_no_conversion_is_called_as_it_is(estimator: Any, labels: Any, method: str) -> None:
    head = SklearnHead(estimator.fit(X, labels))
    wanted = getattr(estimator, method)(NEW.numpy()).reshape(len(NEW), -1)
    assert not head.differentiable
    np.testing.assert_allclose(head(NEW).numpy(), wanted, rtol=1e-9, atol=1e-9)


def test_regressors_and_searches() -> None:
    ridge = Ridge().fit(X, X @ np.arange(6))
    np.testing.assert_allclose(SklearnHead(ridge)(NEW)[:, 0].numpy(), ridge.predict(NEW.numpy()), rtol=1e-9)
    search = GridSearchCV(make_pipeline(Normalizer(), LinearSVC()), {"linearsvc__C": [0.1, 1.0]}, cv=2).fit(X, THREE)
    np.testing.assert_allclose(SklearnHead(search)(NEW).numpy(), search.decision_function(NEW.numpy()), rtol=1e-9)


@pytest.mark.parametrize("classifier", [LinearSVC(), SVC()], ids=["in torch", "in numpy"])
def test_effects_equal_brute_force_on_the_pipeline(classifier: Any) -> None:
    """Through network and pipeline as one model, at the input and at a layer, to 1e-6."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = torch.rand(90, 1, 8, 8)
    with torch.no_grad():
        features = network(images).numpy()
    labels = (features[:, 0] > np.median(features[:, 0])).astype(int) + (features[:, 1] > np.median(features[:, 1]))
    pipeline = make_pipeline(Normalizer(), classifier).fit(features, labels)
    model, x = nn.Sequential(network, SklearnHead(pipeline)).eval(), images[:3]

    def decided(some: torch.Tensor) -> Any:
        with torch.no_grad():
            return pipeline.decision_function(network(some).numpy())

    windows = torch.arange(4).reshape(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)[None, None]
    found = CausalEffect(model, design=OneAtATime(), outcome="logit").estimate(x, baselines=0.5, feature_mask=windows)
    for u in range(4):
        brute = decided(torch.where(windows == u, 0.5, x)) - decided(x)
        np.testing.assert_allclose(found.effect[:, u].numpy(), brute, atol=1e-6)

    at_layer = LayerCausalEffect(model, "0.1", outcome="logit").estimate(x)
    with torch.no_grad():
        maps = network[:2](x)
    for u in range(6):
        without = maps.clone()
        without[:, u] = 0
        brute = pipeline.decision_function(network[2:](without).detach().numpy()) - decided(x)
        np.testing.assert_allclose(at_layer.effect[:, u].numpy(), brute, atol=1e-6)


def test_errors() -> None:
    with pytest.raises(ModelError, match=r"`estimator` to be a fitted one, but got LinearSVC\. Call its fit"):
        SklearnHead(LinearSVC())
    with pytest.raises(ModelError, match="`estimator` to be a fitted scikit-learn estimator, but got int"):
        SklearnHead(3)
    with pytest.raises(ModelError, match=r"`estimator` to be a classifier with decision_function .* StandardScaler"):
        SklearnHead(StandardScaler().fit(X))
    head = SklearnHead(LinearSVC().fit(X, THREE))
    with pytest.raises(InputError, match=r"`features` to be of shape \(N, 6\), but got \(2, 5\)"):
        head(torch.zeros(2, 5))
