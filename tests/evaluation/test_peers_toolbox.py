"""Adapters of ART's detectors: their scores are those of ART's own reports."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.detectors.base import Peer
from benchmarks.detectors.toolbox import Beyond, BinaryActivation, BinaryInput, SubsetScanning
from ce_plugin.detection.protocol import Detector, DifferentiableDetector
from ce_plugin.errors import ArgumentError, InputError, UnknownNameError


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def images(n: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 1, 8, 8), dtype=np.float32)


def labelled(n: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Attacked images are brighter."""
    return np.concatenate([images(n), images(n, 1) * 0.5 + 0.5]), np.repeat([0, 1], n)


def auroc(score: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(score[labels == 1][:, None] > score[labels == 0]))


@pytest.mark.parametrize("peer", [BinaryInput, BinaryActivation])
def test_trained_detectors_learn_and_score_as_art_does(peer: type) -> None:
    x, y = labelled()
    detector = peer(network(), epochs=12, rate=1e-2)
    detector.fit(x, y)
    assert isinstance(detector, DifferentiableDetector)
    score = detector.score(x)
    assert auroc(score, y) > 0.95
    report, adversarial = detector.detector.detect(x)
    np.testing.assert_allclose(score, report["predictions"][:, 1] - report["predictions"][:, 0], atol=1e-4)
    assert np.array_equal(adversarial, score > 0)


@pytest.mark.parametrize("peer", [BinaryInput, BinaryActivation])
def test_gradients_batches_and_repetition(peer: type) -> None:
    x, y = labelled(32)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = peer(network(), epochs=1), peer(network(), epochs=1)
    first.fit(x, y)
    second.fit(x, y)
    np.testing.assert_allclose(first.score(x), second.score(x, batch_size=5), atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    point = torch.as_tensor(images(1, 9)).requires_grad_()
    (gradient,) = torch.autograd.grad(first.score_tensor(point).sum(), point)
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        rise = first.score_tensor(point + step) - first.score_tensor(point - step)
    assert rise.item() == pytest.approx(2e-3 * gradient.norm().item(), rel=0.05)


def test_subset_scanning_scores_as_art_does_and_needs_no_labels() -> None:
    x, y = labelled(40)
    net = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(64, 3)).train()
    detector = SubsetScanning(net, layer="1", background=30)
    assert isinstance(detector, Detector)
    detector.fit(x[:40])
    score = detector.score(x)
    assert auroc(score, y) > 0.95
    np.testing.assert_allclose(detector.score(x, batch_size=7), score, rtol=1e-6)
    report, _ = detector.detector.detect(x)
    np.testing.assert_allclose(score, report["scores"], rtol=1e-6)
    assert detector.detector.bgd_data.shape == (30, 1, 8, 8)
    assert net.training
    assert not net[1]._forward_hooks
    detector.fit(x, y)
    assert {image.tobytes() for image in detector.detector.bgd_data} <= {image.tobytes() for image in x[:40]}


class SelfSupervised(nn.Module):
    """A network as BEYOND wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Flatten()
        self.classifier, self.projector = nn.Linear(64, 3), nn.Linear(64, 5)


def test_beyond_runs_where_there_is_a_network_for_it() -> None:
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.randn_like(x)

    detector = Beyond(nn.Flatten(), ssl_model=SelfSupervised(), augmentations=noisy, n_augmentations=8)
    detector.fit(images(20))
    score = detector.score(images(6))
    assert score.shape == (6,)
    np.testing.assert_allclose(detector.score(images(6), batch_size=2)[::-1], detector.score(images(6)[::-1].copy()))
    assert len(set(score.tolist())) == 6


@pytest.mark.parametrize("peer", [BinaryInput, BinaryActivation])
def test_without_labels_they_cannot_learn(peer: type) -> None:
    detector: Peer = peer(network())
    assert detector.needs_labels
    with pytest.raises(InputError, match=r"cannot be fitted on clean ones alone"):
        detector.fit(images())


def test_errors() -> None:
    with pytest.raises(ArgumentError, match="Expected argument `epochs`"):
        BinaryInput(network(), epochs=0)
    with pytest.raises(UnknownNameError, match="Expected argument `scoring`"):
        SubsetScanning(network(), scoring="berk")
    with pytest.raises(ArgumentError, match="Expected argument `background`"):
        SubsetScanning(network(), background=1)
    with pytest.raises(ArgumentError, match="BEYOND cannot run without one; leave it out"):
        Beyond(network())
    with pytest.raises(ArgumentError, match="Expected argument `augmentations`"):
        Beyond(network(), ssl_model=SelfSupervised())
