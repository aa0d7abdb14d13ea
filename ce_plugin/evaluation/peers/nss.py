"""Natural scene statistics: does the picture itself, whatever the network says, look like the clean ones?"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ce_plugin.detection.protocol import Array
from ce_plugin.errors import InputError, expected
from ce_plugin.evaluation.peers.base import Peer
from ce_plugin.evaluation.peers.mahalanobis import TiedGaussians

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

    mu and sigma are local, with Gaussian weights of 7/6 pixels over 7 x 7, edges repeated.

    Args:
        images: (N, C, H, W) with values in [0, 1]; colours are made grey first.

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
    spread = (local(grey.square()) - mean.square()).clamp_min(0).sqrt()
    return ((grey - mean) / (spread + _CONSTANT))[:, 0]


def symmetric_parameters(values: Array) -> Array:
    """Shape and variance of a generalised Gaussian with mean zero, fitted to each row by its moments.

    Args:
        values: (N, d).

    Returns:
        (N, 2): shape in [0.2, 10] (2 is a Gaussian, 1 a Laplacian), and variance.

    Example:
        >>> values = np.random.default_rng(0).normal(size=(1, 100_000))
        >>> symmetric_parameters(values).round(1)
        array([[2., 1.]])

    Source: Sharifi and Leon-Garcia 1995; BRISQUE, equation 4.
    """
    from scipy.special import gamma

    square, absolute = (values**2).mean(1), np.abs(values).mean(1)
    ratio = square / (absolute**2 + _TINY)
    curve = gamma(1 / _SHAPES) * gamma(3 / _SHAPES) / gamma(2 / _SHAPES) ** 2  # falls with the shape
    shape = np.interp(ratio, curve[::-1], _SHAPES[::-1])
    return np.stack([shape, square], 1)


def asymmetric_parameters(values: Array) -> Array:
    """Mean, shape and the two variances of an asymmetric generalised Gaussian, fitted to each row by its moments.

    Args:
        values: (N, d).

    Returns:
        (N, 4): mean, shape in [0.2, 10], variance on the left and on the right of zero.

    Example:
        >>> values = np.random.default_rng(0).normal(size=(1, 200_000))
        >>> np.abs(asymmetric_parameters(values) - [0, 2, 1, 1]).max() < 0.05
        np.True_

    Source: Lasmar, Stitou, Berthoumieu 2009; BRISQUE, equations 8 to 11.
    """
    from scipy.special import gamma

    left, right = values < 0, values > 0
    left_variance = (values**2 * left).sum(1) / np.maximum(left.sum(1), 1)
    right_variance = (values**2 * right).sum(1) / np.maximum(right.sum(1), 1)
    quotient = np.sqrt(left_variance + _TINY) / np.sqrt(right_variance + _TINY)
    plain = np.abs(values).mean(1) ** 2 / ((values**2).mean(1) + _TINY)
    ratio = plain * (quotient**3 + 1) * (quotient + 1) / (quotient**2 + 1) ** 2
    curve = gamma(2 / _SHAPES) ** 2 / (gamma(1 / _SHAPES) * gamma(3 / _SHAPES))  # rises with the shape
    shape = np.interp(ratio, curve, _SHAPES)
    width = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    mean = (np.sqrt(right_variance) - np.sqrt(left_variance)) * width * gamma(2 / shape) / gamma(1 / shape)
    return np.stack([mean, shape, left_variance, right_variance], 1)


def scene_statistics(images: Tensor) -> Array:
    """The 18 statistics of a picture: two of its MSCN values, four of the products of neighbours in each of four ways.

    Args:
        images: (N, C, H, W) with values in [0, 1], more than one pixel each way.

    Returns:
        (N, 18), float64.

    Example:
        >>> scene_statistics(torch.rand(2, 3, 16, 16)).shape
        (2, 18)

    Source: BRISQUE, table I, at one scale; Kherchouche et al. 2020, section III.
    """
    values = mscn(images.double()).cpu()
    neighbours = (
        values[:, :, :-1] * values[:, :, 1:],
        values[:, :-1] * values[:, 1:],
        values[:, :-1, :-1] * values[:, 1:, 1:],
        values[:, :-1, 1:] * values[:, 1:, :-1],
    )
    products = [asymmetric_parameters(product.flatten(1).numpy()) for product in neighbours]
    return np.concatenate([symmetric_parameters(values.flatten(1).numpy()), *products], 1)


class NSS(Peer):
    """A detector of unnatural pictures: a support vector machine on the parameters of natural scene statistics.

    With labels the score is the decision function of a support vector machine with a Gaussian kernel on the 18
    standardised statistics, its penalty chosen by cross-validation. Without, which the paper does not have, it is the
    Mahalanobis distance of the statistics from those of the clean images (Ledoit and Wolf's covariance).

    Args:
        network: not run; it is there so that all peers are made alike.
        seed: draws the folds of the cross-validation.

    Example:
        >>> images = np.random.default_rng(0).random((30, 1, 16, 16), dtype=np.float32)
        >>> detector = NSS(nn.Identity())
        >>> detector.fit(images)
        >>> bool(detector.score(0.1 * images).mean() > detector.score(images).mean())
        True

    Source: Kherchouche, Fezza, Hamidouche, Deforges, IJCNN 2020; statistics of Mittal, Moorthy, Bovik, IEEE
        Transactions on Image Processing 2012. Tests hold the fits against samples of scipy's distributions.
    """

    name = "NSS"
    passes = 0.0
    least = 20

    def __init__(self, network: nn.Module, *, seed: int = 0) -> None:
        super().__init__(network)
        self.seed = seed
        self.mean: Array = np.zeros(0)
        self.scale: Array = np.ones(0)
        self.machine: Any = None
        self.gaussian: TiedGaussians | None = None

    def _fit(self, images: Array, labels: npt.NDArray[np.int64] | None) -> None:
        if min(images.shape[2:]) < 2:
            raise InputError(expected("x", "images of at least 2 pixels each way", images.shape))
        statistics = np.concatenate([scene_statistics(batch) for batch in self._batches(images)])
        deviation = statistics.std(0)
        self.mean, self.scale = statistics.mean(0), np.where(deviation > _TINY, deviation, 1.0)
        z = (statistics - self.mean) / self.scale
        self.machine, self.gaussian = None, None
        if labels is None:
            one_class = torch.zeros(len(z), dtype=torch.long)
            self.gaussian = TiedGaussians.fitted(torch.as_tensor(z), one_class, None)
        else:
            self.machine = _machine(z, labels, self.seed)

    def _scores(self, images: Tensor) -> Tensor:
        z = (scene_statistics(images) - self.mean) / self.scale
        if self.gaussian is not None:
            return self.gaussian.distance(torch.as_tensor(z))
        return torch.as_tensor(self.machine.decision_function(z))


def _machine(z: Array, labels: npt.NDArray[np.int64], seed: int) -> Any:
    """A support vector machine with a Gaussian kernel; the penalty is chosen on 2000 images where there are more."""
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.svm import SVC

    penalty = 1.0
    if min(np.bincount(labels)) >= _FEW:
        folds = StratifiedKFold(5, shuffle=True, random_state=seed % 2**32)
        some = np.linspace(0, len(z) - 1, min(len(z), _MOST_FOR_CHOICE)).astype(int)
        grid = {"C": [0.1, 1.0, 10.0, 100.0]}
        penalty = GridSearchCV(SVC(), grid, cv=folds).fit(z[some], labels[some]).best_params_["C"]
    return SVC(C=penalty).fit(z, labels)
