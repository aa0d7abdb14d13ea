"""Scores of the logits against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import nn

from benchmarks.detectors.confidence import Entropy, Margin, MaxSoftmax
from ce_plugin.detection.protocol import DifferentiableDetector
from ce_plugin.errors import ArgumentError, ModelError

PEERS = (MaxSoftmax, Entropy, Margin)
LOGITS = np.random.default_rng(0).normal(size=(30, 5)) * 3


def as_images(logits: np.ndarray) -> np.ndarray:
    """Images whose pixels a flattening network returns as logits."""
    return logits[:, None, None]


def score(peer: type, logits: np.ndarray) -> np.ndarray:
    return peer(nn.Flatten()).score(as_images(logits))


def test_values_are_those_of_the_formulas() -> None:
    p = special.softmax(LOGITS, 1)
    np.testing.assert_allclose(score(MaxSoftmax, LOGITS), special.logit(1 - p.max(1)), rtol=1e-9)
    np.testing.assert_allclose(score(Entropy, LOGITS), stats.entropy(p, axis=1), rtol=1e-9)
    top = np.sort(LOGITS, 1)
    np.testing.assert_allclose(score(Margin, LOGITS), top[:, -2] - top[:, -1], rtol=1e-9)


def test_images_that_the_network_is_sure_of_are_still_ordered() -> None:
    """1 - p_max is zero for both in float32, and 1e-44 and 1e-53 apart in float64."""
    logits = np.array([[0.0, 100.0], [0.0, 120.0]])
    for peer in PEERS:
        first, second = score(peer, logits)
        assert first > second


def test_ties_have_no_margin_and_shifts_change_nothing() -> None:
    assert score(Margin, np.array([[2.0, 2.0, 1.0]])).tolist() == [0.0]
    for peer in PEERS:
        np.testing.assert_allclose(score(peer, LOGITS + 7), score(peer, LOGITS), atol=1e-9)


@pytest.mark.parametrize("peer", PEERS)
def test_gradients_and_protocol(peer: type) -> None:
    detector = peer(nn.Flatten())
    assert isinstance(detector, DifferentiableDetector)
    x = torch.tensor(as_images(LOGITS[:4])).requires_grad_()
    assert torch.autograd.gradcheck(detector.score_tensor, x)
    np.testing.assert_allclose(detector.score_tensor(x).detach(), detector.score(as_images(LOGITS[:4])), rtol=1e-12)
    detector.fit(as_images(LOGITS))
    detector.fit(as_images(LOGITS), np.arange(30) % 2)
    assert not detector.needs_labels
    assert detector.passes == 1


@pytest.mark.parametrize("peer", PEERS)
def test_batches_and_modes(peer: type) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(5, 3)).double().train()
    detector = peer(net)
    whole = detector.score(as_images(LOGITS))
    np.testing.assert_allclose(detector.score(as_images(LOGITS), batch_size=4), whole, atol=1e-12)
    assert all(module.training for module in net.modules())


def test_errors() -> None:
    with pytest.raises(ModelError, match="one that returns logits"):
        MaxSoftmax(nn.Identity()).score(as_images(LOGITS))
    with pytest.raises(ModelError, match="of two or more"):
        Margin(nn.Flatten()).score(as_images(LOGITS[:, :1]))
    with pytest.raises(ArgumentError, match="Expected argument `network`"):
        Entropy(None)  # type: ignore[arg-type]
