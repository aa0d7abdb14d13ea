"""LID: samples of known dimension, the formula in numpy, and that an image is no neighbour of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.detectors.layers import every_layer
from benchmarks.detectors.lid import LID, lid_of_distances
from ce_plugin.detection.protocol import DifferentiableDetector
from ce_plugin.errors import ArgumentError, InputError


def pixels(smooth: bool = False) -> nn.Sequential:
    """A network whose hidden layer holds the pixels."""
    return nn.Sequential(nn.Flatten(), nn.Softplus() if smooth else nn.ReLU(), nn.Linear(16, 2)).double()


def images(n: int = 130, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 1, 4, 4))


def by_hand(x: np.ndarray, sample: np.ndarray, k: int) -> float:
    r = np.sort(np.linalg.norm(sample - x, axis=1))[:k]
    return -1 / np.mean(np.log(r / r[-1]))


@pytest.mark.parametrize("dimension", [2, 5, 11])
def test_estimates_the_dimension_of_a_ball(dimension: int) -> None:
    """Around the centre of a uniform ball, distances follow r^(d-1): the estimate is d up to its error d/sqrt(k)."""
    rng = np.random.default_rng(0)
    radius = rng.random((400, 1000)) ** (1 / dimension)
    estimate = lid_of_distances(torch.tensor(radius), 100).mean().item()
    assert estimate == pytest.approx(dimension, rel=0.05)


def test_order_and_scale_of_distances_do_not_matter() -> None:
    distances = torch.tensor(np.random.default_rng(0).random((5, 40)))
    wanted = lid_of_distances(distances, 10)
    torch.testing.assert_close(lid_of_distances(7 * distances.flip(1), 10), wanted)


def test_neighbours_that_are_all_equally_far_or_at_zero_stay_finite() -> None:
    assert torch.isfinite(lid_of_distances(torch.ones(1, 9), 4)).all()
    assert torch.isfinite(lid_of_distances(torch.zeros(1, 9), 4)).all()


def test_score_is_the_standardised_estimate() -> None:
    net, x, test = pixels(), images(), images(7, 1)
    detector = LID(net, layers=["1"], k=10, n_minibatches=1)
    detector.fit(x)
    assert detector.combination is not None
    sample = detector.reference[0][0].numpy()
    wanted = np.array([by_hand(t, sample, 10) for t in test.reshape(7, 16)])
    wanted = (wanted - detector.combination.mean) / detector.combination.scale
    np.testing.assert_allclose(detector.score(test), wanted, rtol=1e-6)


def test_fitting_images_are_no_neighbours_of_their_own() -> None:
    """Mean and scale are those of estimates that leave the image itself out of its minibatch."""
    x = images(100)
    detector = LID(pixels(), layers=["1"], k=10, minibatch=100)
    detector.fit(x)
    flat = x.reshape(100, 16)
    left_out = [by_hand(flat[i], np.delete(flat, i, 0), 10) for i in range(100)]
    assert detector.combination is not None
    np.testing.assert_allclose(detector.combination.mean, np.mean(left_out), rtol=1e-6)
    np.testing.assert_allclose(detector.combination.scale, np.std(left_out), rtol=1e-6)


def test_minibatches_are_disjoint_clean_and_averaged() -> None:
    x, labels = images(260), np.repeat([0, 1], 130)
    detector = LID(pixels(), k=5, minibatch=50)
    detector.fit(x, labels)
    reference = detector.reference[0]
    assert reference.shape == (2, 50, 16)
    rows = [tuple(row) for row in reference.reshape(100, 16).tolist()]
    assert len(set(rows)) == 100
    assert set(rows) <= {tuple(row) for row in x[:130].reshape(130, 16).tolist()}


def test_labels_and_clean_only_tell_images_off_the_surface() -> None:
    """Clean images lie on a plane of two dimensions; attacked ones are moved off it in all sixteen."""
    rng = np.random.default_rng(0)
    basis = rng.random((2, 16))
    clean = rng.random((300, 2)) @ basis
    moved = clean + 0.05 * rng.normal(size=clean.shape)
    x = np.concatenate([clean, moved]).reshape(600, 1, 4, 4)
    labels = np.repeat([0, 1], 300)
    for fit_on in ((x[:300], None), (x, labels)):
        detector = LID(pixels(), layers=["1"])
        detector.fit(*fit_on)
        score = detector.score(x)
        assert np.mean(score[300:, None] > score[None, :300]) > 0.9


@pytest.mark.parametrize("pool", [False, True])
def test_batches_order_and_state(pool: bool) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)).double()
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    detector = LID(net, layers=["2"], pool=pool)
    detector.fit(images(), np.arange(130) % 2)
    score = detector.score(images())
    np.testing.assert_allclose(detector.score(images(), batch_size=11), score, atol=1e-8)
    np.testing.assert_allclose(detector.score(images()[::-1].copy())[::-1], score, atol=1e-8)
    assert detector.reference[0].shape[2] == (3 if pool else 27)
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_gradient_is_that_of_finite_differences() -> None:
    detector = LID(pixels(smooth=True))
    detector.fit(images())
    assert isinstance(detector, DifferentiableDetector)
    x = torch.tensor(images(2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(detector.score_tensor, x, atol=1e-4)


def test_errors() -> None:
    with pytest.raises(ArgumentError, match="a number of neighbours from 2 to minibatch - 1 = 99, but got 100"):
        LID(pixels(), k=100)
    with pytest.raises(ArgumentError, match="Expected argument `n_minibatches`"):
        LID(pixels(), n_minibatches=0)
    with pytest.raises(InputError, match="at least 22 clean images for LID, but got 21"):
        LID(pixels()).fit(images(21))
    with pytest.raises(ArgumentError, match="a fitted one"):
        LID(pixels()).score(images(3))


def test_all_layers_are_read_unless_told_and_large_ones_are_averaged() -> None:
    net = nn.Sequential(nn.Conv2d(1, 32, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 3)).double()
    detector = LID(net, k=5, minibatch=20)
    detector.fit(images(40))
    assert [r.shape[2] for r in detector.reference] == [512, 512, 128, 3]
    wide = nn.Sequential(nn.Upsample(33), nn.Conv2d(1, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))
    detector = LID(wide.double(), k=5, minibatch=20)
    detector.fit(images(40))
    assert [r.shape[2] for r in detector.reference] == [1089, 32, 32, 2]  # 32 x 33 x 33 are more than 32768


def test_of_many_layers_twenty_are_read_with_the_logits() -> None:
    deep = nn.Sequential(nn.Flatten(), *[nn.Linear(16, 16) for _ in range(49)])
    chosen = every_layer(deep, torch.zeros(1, 1, 4, 4))
    assert len(set(chosen)) == 20
    assert chosen[-1] is deep[-1]
