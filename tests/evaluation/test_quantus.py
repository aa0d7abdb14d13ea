"""Quantus: our methods in its metrics, its metrics in our comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import Saliency
from torch import nn

from ce_plugin.evaluation import MEASURES, METHODS, Case, Scene, compare, quantus_explain_func, quantus_measure

SIDE = 12


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        ).eval()


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_a_method_is_what_quantus_calls() -> None:
    net, x = network(), images(3)
    targets = np.array([0, 2, 1])
    found = quantus_explain_func("saliency")(model=net, inputs=x.numpy(), targets=targets, method="x", device="cpu")
    right = Saliency(net).attribute(x.clone().requires_grad_(), torch.from_numpy(targets)).amax(1, keepdim=True)
    assert found.dtype == np.float32
    assert np.allclose(found, right.detach().numpy())
    twice = [quantus_explain_func("causal-effect", passes=20)(net, x.numpy(), targets) for _ in range(2)]
    assert bool((twice[0] == twice[1]).all())


def test_methods_run_in_a_metric_of_quantus() -> None:
    quantus: Any = pytest.importorskip("quantus")
    net, x = network(), images(2)
    metric = quantus.RandomLogit(
        num_classes=3, seed=0, disable_warnings=True, display_progressbar=False, return_aggregate=False
    )
    scores = metric(
        model=net, x_batch=x.numpy(), y_batch=np.array([0, 1]), a_batch=None, device="cpu",
        explain_func=quantus_explain_func("input-x-gradient"), explain_func_kwargs={},
    )  # fmt: skip
    assert len(scores) == 2
    assert all(np.isfinite(scores))


def test_a_metric_of_quantus_is_a_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    quantus: Any = pytest.importorskip("quantus")
    metric = quantus.FaithfulnessCorrelation(
        nr_runs=40, subset_size=24, perturb_baseline="black", return_aggregate=False, disable_warnings=True,
        display_progressbar=False,
    )  # fmt: skip
    monkeypatch.setitem(MEASURES, "correlation", quantus_measure(metric, "faithfulness correlation", larger=True))
    cases = [Case(Scene(row[None], 1, network(), ident=i), str(i)) for i, row in enumerate(images(3))]
    np.random.seed(0)  # noqa: NPY002 # Quantus draws from it
    found = compare(cases, ["integrated-gradients"], ["correlation"]).table()
    means = found[found.measure == "faithfulness correlation"].set_index("method")["mean"]
    assert set(means.index) == {METHODS[name].name for name in ("integrated-gradients", "random", "centre")}
    assert means.between(-1, 1).all()
