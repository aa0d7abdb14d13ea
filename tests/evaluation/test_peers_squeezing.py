"""Feature squeezing by hand: scipy's median, rounding, non-local means in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage, special
from torch import nn

from benchmarks.detectors.squeezing import FeatureSqueezing, NonLocalMeans, paper_squeezers
from ce_plugin.detection.protocol import DifferentiableDetector
from ce_plugin.errors import ArgumentError, InputError


def linear(channels: int, size: int) -> tuple[nn.Sequential, np.ndarray]:
    """A linear network in float64 and its weights."""
    weight = np.random.default_rng(1).normal(size=(3, channels * size * size))
    net = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 3, bias=False).double())
    net[1].weight.data = torch.tensor(weight)
    return net, weight


def probabilities(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    return special.softmax(x.reshape(len(x), -1) @ weight.T, 1)


def images(channels: int, n: int = 6, size: int = 9) -> np.ndarray:
    return np.random.default_rng(0).random((n, channels, size, size))


def nonlocal_loops(image: np.ndarray, window: int, patch: int, strength: float) -> np.ndarray:
    """Non-local means of one image (C, H, W) by its definition, pixel by pixel."""
    r, p = window // 2, patch // 2
    wide = np.pad(image, ((0, 0), (r + p, r + p), (r + p, r + p)), mode="reflect")
    out = np.zeros_like(image)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            at = wide[:, y + r : y + r + patch, x + r : x + r + patch]
            total, norm = np.zeros(len(image)), 0.0
            for v in range(y, y + window):
                for u in range(x, x + window):
                    there = wide[:, v : v + patch, u : u + patch]
                    weight = np.exp(-np.mean((at - there) ** 2) / (strength / 255) ** 2)
                    total, norm = total + weight * wide[:, v + p, u + p], norm + weight
            out[:, y, x] = total / norm
    return out


def test_grayscale_is_one_bit_and_the_median_of_two_by_two() -> None:
    net, weight = linear(1, 9)
    x = images(1)
    median = np.stack([ndimage.median_filter(image[0], 2, mode="reflect")[None] for image in x])
    plain = probabilities(weight, x)
    wanted = np.maximum(*(np.abs(plain - probabilities(weight, s)).sum(1) for s in (np.round(x), median)))
    detector = FeatureSqueezing(net)
    np.testing.assert_allclose(detector.score(x), wanted, rtol=1e-9)
    assert detector.passes == 3


def test_colour_is_five_bits_median_and_non_local_means() -> None:
    net, weight = linear(3, 9)
    x = np.clip(images(3, 2) * 0.05 + 0.4, 0, 1)
    squeezed = (
        np.round(x * 31) / 31,
        np.stack([[ndimage.median_filter(c, 2, mode="reflect") for c in image] for image in x]),
        np.stack([nonlocal_loops(image, 11, 3, 4.0) for image in x]),
    )
    distances = [np.abs(probabilities(weight, x) - probabilities(weight, s)).sum(1) for s in squeezed]
    detector = FeatureSqueezing(net)
    np.testing.assert_allclose(detector.score(x), np.max(distances, 0), rtol=1e-9)
    assert detector.passes == 4
    for squeeze, wanted in zip(paper_squeezers(3), squeezed, strict=True):
        np.testing.assert_allclose(squeeze(torch.tensor(x)), wanted, atol=1e-12)


def test_an_image_that_no_squeezer_changes_scores_zero() -> None:
    net, _ = linear(1, 9)
    assert FeatureSqueezing(net).score(np.zeros((2, 1, 9, 9))).tolist() == [0.0, 0.0]


def test_the_score_is_the_largest_over_squeezers() -> None:
    net, _ = linear(1, 9)
    x = images(1)
    one, two = (FeatureSqueezing(net, squeezers=[s]).score(x) for s in paper_squeezers(1))
    assert np.array_equal(FeatureSqueezing(net).score(x), np.maximum(one, two))


def test_gradient_of_smooth_squeezers_is_that_of_finite_differences() -> None:
    net, _ = linear(1, 9)
    detector = FeatureSqueezing(net, squeezers=[lambda x: x * 0.8, NonLocalMeans(3, 3, 60.0)])
    assert isinstance(detector, DifferentiableDetector)
    x = torch.tensor(images(1, 2)).requires_grad_()
    assert torch.autograd.gradcheck(detector.score_tensor, x)


def test_rounding_passes_the_gradient_straight_through() -> None:
    """With rounding as the identity in the backward pass, the gradient is that of p(s + x - x) by the chain rule."""
    net, weight = linear(1, 9)
    detector = FeatureSqueezing(net, squeezers=paper_squeezers(1)[:1])
    x = torch.tensor(images(1, 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(detector.score_tensor(x).sum(), x)

    def jacobian(at: np.ndarray) -> np.ndarray:
        (p,) = probabilities(weight, at)
        return (np.diag(p) - np.outer(p, p)) @ weight

    before, after = x.detach().numpy(), np.round(x.detach().numpy())
    sign = np.sign(probabilities(weight, before) - probabilities(weight, after))[0]
    wanted = sign @ (jacobian(before) - jacobian(after))
    np.testing.assert_allclose(gradient.flatten(), wanted, atol=1e-9)


def test_batches_and_the_network_stay() -> None:
    net, _ = linear(1, 9)
    net.train()
    x = images(1, 12)
    detector = FeatureSqueezing(net)
    detector.fit(x, np.arange(12) % 2)
    np.testing.assert_allclose(detector.score(x, batch_size=5), detector.score(x), atol=1e-12)
    assert net.training
    assert not detector.needs_labels


def test_errors() -> None:
    net, _ = linear(3, 5)
    with pytest.raises(ArgumentError, match="Expected argument `squeezers`"):
        FeatureSqueezing(net, squeezers=[])
    with pytest.raises(ArgumentError, match="Expected argument `window` to be an odd number"):
        NonLocalMeans(10)
    with pytest.raises(ArgumentError, match="Expected argument `strength`"):
        NonLocalMeans(strength=0)
    with pytest.raises(InputError, match="more than 6 pixels each way"):
        FeatureSqueezing(net).score(images(3, 1, 5))
