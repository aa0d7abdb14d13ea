"""Natural scene statistics: samples of known distributions, scipy's filters, and what the detector finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from sklearn.svm import SVC
from torch import nn

from benchmarks.detectors.nss import (
    NSS,
    _Machine,
    asymmetric_parameters,
    mscn,
    scene_statistics,
    symmetric_parameters,
)
from ce_plugin.detection.protocol import Detector, DifferentiableDetector
from ce_plugin.errors import InputError


def scenes(n: int = 60, seed: int = 0, channels: int = 1) -> np.ndarray:
    """Smooth random pictures with values in [0, 1]."""
    noise = np.random.default_rng(seed).normal(size=(n, channels, 20, 20))
    smooth = ndimage.gaussian_filter(noise, (0, 0, 2, 2))
    return np.clip(0.5 + smooth, 0, 1)


@pytest.mark.parametrize("shape", [0.7, 1.0, 2.0, 4.0])
def test_shape_of_a_generalised_gaussian_is_found(shape: float) -> None:
    values = stats.gennorm(shape, scale=1.5).rvs((1, 200_000), random_state=0)
    found, variance = symmetric_parameters(torch.as_tensor(values))[0].tolist()
    assert found == pytest.approx(shape, rel=0.03)
    assert variance == pytest.approx(stats.gennorm(shape, scale=1.5).var(), rel=0.03)


@pytest.mark.parametrize("shape", [0.8, 2.0])
def test_both_sides_of_an_asymmetric_one_are_found(shape: float) -> None:
    """Left of zero twice as wide as right of it; each side has as much of the mass as it is wide."""
    rng = np.random.default_rng(0)
    size = np.abs(stats.gennorm(shape).rvs(300_000, random_state=1))
    values = np.where(rng.random(300_000) < 2 / 3, -2 * size, size)
    mean, found, left, right = asymmetric_parameters(torch.as_tensor(values)[None])[0].tolist()
    one = stats.gennorm(shape).var()
    assert (found, left, right) == pytest.approx((shape, 4 * one, one), rel=0.04)
    assert mean == pytest.approx(values.mean(), rel=0.04)


def test_mscn_is_that_of_scipys_filter() -> None:
    (image,) = scenes(1)[:, 0]

    def blur(x: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(x, 7 / 6, mode="nearest", radius=3)

    spread = np.sqrt(np.maximum(blur(image**2) - blur(image) ** 2, 0))
    np.testing.assert_allclose(mscn(torch.tensor(image)[None, None])[0], (image - blur(image)) / (spread + 1 / 255))


def test_colours_are_made_grey() -> None:
    colour = torch.tensor(scenes(2, channels=3))
    grey = 0.299 * colour[:, :1] + 0.587 * colour[:, 1:2] + 0.114 * colour[:, 2:]
    torch.testing.assert_close(mscn(colour), mscn(grey))


def test_statistics_do_not_depend_on_direction_where_the_picture_does_not() -> None:
    """Turned over the diagonal, horizontal and vertical statistics change places; the rest stays."""
    x = torch.tensor(scenes(3))
    plain, turned = scene_statistics(x), scene_statistics(x.transpose(2, 3))
    order = [0, 1, *range(6, 10), *range(2, 6), *range(10, 18)]
    np.testing.assert_allclose(turned[:, order], plain, rtol=1e-9, atol=1e-12)


def fitted(labelled: bool) -> tuple[NSS, np.ndarray]:
    """A detector fitted to 120 pictures, or to as many noisy ones too, and all 240."""
    x = scenes(240)
    x[120:] += 0.1 * np.sign(np.random.default_rng(1).normal(size=x[120:].shape))
    detector = NSS(nn.Identity())
    detector.fit(x if labelled else x[:120], np.repeat([0, 1], 120) if labelled else None)
    return detector, x


@pytest.mark.parametrize("labelled", [False, True])
def test_noisy_pictures_are_found(labelled: bool) -> None:
    detector, _ = fitted(labelled)
    new = np.concatenate([scenes(30, 7), scenes(30, 8) + 0.1 * np.sign(scenes(30, 9) - 0.5)])
    score = detector.score(new)
    assert np.mean(score[30:, None] > score[None, :30]) > 0.95
    np.testing.assert_allclose(detector.score(new, batch_size=7), score, atol=1e-9)


def test_flat_pictures_are_finite() -> None:
    detector = NSS(nn.Identity())
    assert isinstance(detector, Detector)
    detector.fit(np.concatenate([scenes(20), np.zeros((5, 1, 20, 20))]))
    assert np.isfinite(detector.score(np.ones((2, 1, 20, 20)))).all()
    half = torch.cat([torch.ones(1, 1, 20, 10), torch.tensor(scenes(1, 3))[..., 10:]], -1).requires_grad_()
    for image in (torch.ones(1, 1, 20, 20, requires_grad=True), half):
        (gradient,) = torch.autograd.grad(detector.score_tensor(image).sum(), image)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("labelled", [False, True])
def test_the_score_falls_as_its_gradient_says(labelled: bool) -> None:
    detector, x = fitted(labelled)
    assert isinstance(detector, DifferentiableDetector)
    image = torch.tensor(x[130:131], requires_grad=True)
    (gradient,) = torch.autograd.grad(detector.score_tensor(image).sum(), image)
    step = 1e-6 * gradient / gradient.norm()
    with torch.no_grad():
        rise = detector.score_tensor(image + step) - detector.score_tensor(image - step)
    assert rise.item() == pytest.approx(2e-6 * gradient.norm().item(), rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_with_labels_it_is_scikit_learns_decision_function(scale: float) -> None:
    """With a scale of 0 all pictures are alike."""
    z = np.random.default_rng(0).normal(size=(80, 5))
    labels = (z[:, 0] + 0.5 * z[:, 1] ** 2 > 0.3).astype(np.int64)
    z *= scale
    found = _Machine.fitted(z, labels, seed=0)(torch.as_tensor(z)).numpy()
    known = [SVC(C=penalty).fit(z, labels).decision_function(z) for penalty in (0.1, 1.0, 10.0, 100.0)]
    assert min(np.abs(found - one).max() for one in known) < 1e-9


def test_the_network_is_not_run() -> None:
    class Never(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("run")

    detector = NSS(Never())
    detector.fit(scenes(20))
    assert detector.passes == 0


def test_errors() -> None:
    with pytest.raises(InputError, match="at least 2 pixels each way"):
        NSS(nn.Identity()).fit(np.zeros((20, 1, 1, 9)))
    with pytest.raises(InputError, match="at least 20 clean images for NSS"):
        NSS(nn.Identity()).fit(scenes(19))
