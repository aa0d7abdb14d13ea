"""Natural scene statistics: does the image look like clean ones? The network is not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.detectors.base import DifferentiablePeer
from benchmarks.detectors.mahalanobis import TiedGaussians
from ce_plugin.detection.protocol import Array
from ce_plugin.errors import ArgumentError, InputError, expected

__all__ = ["NSS", "asymmetric_parameters", "mscn", "scene_statistics", "symmetric_parameters"]

_SIGMA = 7 / 6
_REACH = 3
_CONSTANT = 1 / 255
_SHAPES = np.arange(0.2, 10.001, 0.001)
_TINY = 1e-12
_GREY = (0.299, 0.587, 0.114)
_MOST_FOR_CHOICE = 2000
_FEW = 10


def mscn(images: Tensor) -> Tensor:
    """Mean-subtracted, contrast-normalised values, ``(x - mu) / (sigma + 1/255)``.

    mu and sigma are local, with Gaussian weights (sigma 7/6 pixels, 7 x 7 window), edges repeated.

    Args:
        images: (N, C, H, W) with values in [0, 1]; colour images are converted to grey.

    Returns:
        (N, H, W).

    Example:
        >>> mscn(torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64)).abs().max().item() < 1e-6
        True

    Source: Ruderman 1994; Mittal, Moorthy, Bovik 2012 (BRISQUE), equations 1 to 3.
    """
    if images.shape[1] == 3:
        grey = (images * images.new_tensor(_GREY).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
    else:
        grey = images.mean(1, keepdim=True)
    place = torch.arange(-_REACH, _REACH + 1, dtype=grey.dtype, device=grey.device)
    row = torch.exp(-place.square() / (2 * _SIGMA**2))
    kernel = (row[:, None] * row / row.sum().square())[None, None]

    def local(values: Tensor) -> Tensor:
        return F.conv2d(F.pad(values, [_REACH] * 4, mode="replicate"), kernel)

    mean = local(grey)
    spread = _root(local(grey.square()) - mean.square())
    return ((grey - mean) / (spread + _CONSTANT))[:, 0]


def symmetric_parameters(values: Tensor) -> Tensor:
    """Shape and variance of a generalised Gaussian with mean zero, fitted to each row by its moments.

    Args:
        values: (N, d), float64.

    Returns:
        (N, 2): shape in [0.2, 10] (2 is a Gaussian, 1 a Laplacian), and variance.

    Example:
        >>> values = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> [round(value, 1) for value in symmetric_parameters(values)[0].tolist()]
        [2.0, 1.0]

    Source: Sharifi and Leon-Garcia 1995; BRISQUE, equation 4.
    """
    square, absolute = values.square().mean(1), values.abs().mean(1)
    shapes = torch.as_tensor(_SHAPES)
    curve = _gamma(1 / shapes) * _gamma(3 / shapes) / _gamma(2 / shapes).square()  # falls with the shape
    shape = _interpolated(square / (absolute.square() + _TINY), curve.flip(0), shapes.flip(0))
    return torch.stack([shape, square], 1)


def asymmetric_parameters(values: Tensor) -> Tensor:
    """Mean, shape and the two variances of an asymmetric generalised Gaussian, fitted to each row by its moments.

    Args:
        values: (N, d), float64.

    Returns:
        (N, 4): mean, shape in [0.2, 10], variance on the left and on the right of zero.

    Example:
        >>> values = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> bool((asymmetric_parameters(values) - torch.tensor([0, 2, 1, 1])).abs().max() < 0.05)
        True

    Source: Lasmar, Stitou, Berthoumieu 2009; BRISQUE, equations 8 to 11.
    """
    left, right = values < 0, values > 0
    left_variance = (values.square() * left).sum(1) / left.sum(1).clamp_min(1)
    right_variance = (values.square() * right).sum(1) / right.sum(1).clamp_min(1)
    quotient = (left_variance + _TINY).sqrt() / (right_variance + _TINY).sqrt()
    plain = values.abs().mean(1).square() / (values.square().mean(1) + _TINY)
    ratio = plain * (quotient**3 + 1) * (quotient + 1) / (quotient.square() + 1).square()
    shapes = torch.as_tensor(_SHAPES)
    curve = _gamma(2 / shapes).square() / (_gamma(1 / shapes) * _gamma(3 / shapes))  # rises with the shape
    shape = _interpolated(ratio, curve, shapes)
    width = (_gamma(1 / shape) / _gamma(3 / shape)).sqrt()
    step = _root(right_variance) - _root(left_variance)
    mean = step * width * _gamma(2 / shape) / _gamma(1 / shape)
    return torch.stack([mean, shape, left_variance, right_variance], 1)


def scene_statistics(images: Tensor) -> Tensor:
    """The 18 statistics of an image: two of its MSCN values, four of products of neighbours in each of four directions.

    Args:
        images: (N, C, H, W) with values in [0, 1], at least 2 x 2 pixels.

    Returns:
        (N, 18), float64, on the CPU; with a gradient to the images, finite everywhere and 0 inside flat areas.

    Example:
        >>> scene_statistics(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 18])

    Source: BRISQUE, table I, at one scale; Kherchouche et al. 2020, section III.
    """
    values = mscn(images.double()).cpu()
    neighbours = (
        values[:, :, :-1] * values[:, :, 1:],
        values[:, :-1] * values[:, 1:],
        values[:, :-1, :-1] * values[:, 1:, 1:],
        values[:, :-1, 1:] * values[:, 1:, :-1],
    )
    products = [asymmetric_parameters(product.flatten(1)) for product in neighbours]
    return torch.cat([symmetric_parameters(values.flatten(1)), *products], 1)


def _root(values: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0, where that of sqrt is infinite."""
    positive = values > 0
    return torch.where(positive, values, 1.0).sqrt() * positive


def _gamma(values: Tensor) -> Tensor:
    return torch.lgamma(values).exp()


def _interpolated(x: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of the points (known, values), known ascending; constant beyond them."""
    inside = x.clamp(known[0], known[-1])
    above = torch.searchsorted(known, inside.detach()).clamp_min(1)
    share = (inside - known[above - 1]) / (known[above] - known[above - 1])
    return torch.lerp(values[above - 1], values[above], share)


class NSS(DifferentiablePeer):
    """A detector of unnatural images: a support vector machine on the parameters of natural scene statistics.

    With labels the score is the decision function of a support vector machine with a Gaussian kernel on the 18
    standardised statistics, its penalty chosen by cross-validation. Without, which the paper does not have, it is the
    Mahalanobis distance of the statistics from those of the clean images (Ledoit and Wolf's covariance).

    Args:
        network: not used; accepted so that all peers have the same constructor.
        seed: seed of the folds of the cross-validation.

    Example:
        >>> images = np.random.default_rng(0).random((30, 1, 16, 16), dtype=np.float32)
        >>> detector = NSS(nn.Identity())
        >>> detector.fit(images)
        >>> bool(detector.score(0.1 * images).mean() > detector.score(images).mean())
        True

    Source: Kherchouche, Fezza, Hamidouche, Deforges, IJCNN 2020; statistics of Mittal, Moorthy, Bovik, IEEE
        Transactions on Image Processing 2012. Tests hold the fits against samples of scipy's distributions, and the
        decision function against scikit-learn's.
    """

    name = "NSS"
    passes = 0.0
    least = 20

    def __init__(self, network: nn.Module, *, seed: int = 0) -> None:
        super().__init__(network)
        self.seed = seed
        self.mean, self.scale = torch.zeros(0), torch.ones(0)
        self.scorer: Callable[[Tensor], Tensor] | None = None

    def _fit(self, images: Array, labels: npt.NDArray[np.int64] | None) -> None:
        if min(images.shape[2:]) < 2:
            raise InputError(expected("x", "images of at least 2 pixels each way", images.shape))
        with torch.no_grad():
            statistics = torch.cat([scene_statistics(batch) for batch in self._batches(images)])
        deviation = statistics.std(0, correction=0)
        self.mean, self.scale = statistics.mean(0), torch.where(deviation > _TINY, deviation, 1.0)
        z = (statistics - self.mean) / self.scale
        if labels is None:
            self.scorer = TiedGaussians.fitted(z, torch.zeros(len(z), dtype=torch.long), None).distance
        else:
            self.scorer = _Machine.fitted(z.numpy(), labels, self.seed)

    def _scores(self, images: Tensor) -> Tensor:
        if self.scorer is None:
            raise ArgumentError(expected("detector", "a fitted one", repr(self), "Call `fit` first."))
        return self.scorer((scene_statistics(images) - self.mean) / self.scale)


@dataclass(frozen=True)
class _Machine:
    """A support vector machine with a Gaussian kernel: ``sum_i a_i exp(-gamma |z - v_i|^2) + b``.

    Args:
        vectors: v, (V, d).
        weights: a, (V,).
        gamma: of the kernel.
        offset: b.
    """

    vectors: Tensor
    weights: Tensor
    gamma: float
    offset: float

    @classmethod
    def fitted(cls, z: Array, labels: npt.NDArray[np.int64], seed: int) -> _Machine:
        """Fit to statistics (N, d) and labels (N,); the penalty is chosen on at most 2000 images."""
        from sklearn.model_selection import GridSearchCV, StratifiedKFold
        from sklearn.svm import SVC

        spread = z.var()
        penalty, gamma = 1.0, 1 / (z.shape[1] * spread) if spread > 0 else 1.0  # scikit-learn's "scale"
        if min(np.bincount(labels)) >= _FEW:
            folds = StratifiedKFold(5, shuffle=True, random_state=seed % 2**32)
            some = np.linspace(0, len(z) - 1, min(len(z), _MOST_FOR_CHOICE)).astype(int)
            grid = {"C": [0.1, 1.0, 10.0, 100.0]}
            penalty = GridSearchCV(SVC(), grid, cv=folds).fit(z[some], labels[some]).best_params_["C"]
        machine = SVC(C=penalty, gamma=gamma).fit(z, labels)
        vectors, weights = torch.as_tensor(machine.support_vectors_), torch.as_tensor(machine.dual_coef_[0])
        return cls(vectors, weights, float(gamma), float(machine.intercept_[0]))

    def __call__(self, z: Tensor) -> Tensor:
        squared = z.square().sum(1, keepdim=True) - 2 * z @ self.vectors.T + self.vectors.square().sum(1)
        return (-self.gamma * squared.clamp_min(0)).exp() @ self.weights + self.offset
