"""Mahalanobis distance of a network's features to the nearest class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.detectors.base import DifferentiablePeer, StatisticsPeer
from benchmarks.detectors.layers import LayerReader, Layers
from ce_plugin.errors import ArgumentError, expected

__all__ = ["Mahalanobis", "TiedGaussians"]

_LEAST_OF_CLASS = 5
_SMALLEST = 1e-10  # of the largest eigenvalue; directions without variance are left out


@dataclass(frozen=True)
class TiedGaussians:
    """Class-conditional Gaussians with one covariance for all classes.

    ``mu_c = mean of f over class c``, ``Sigma = 1/N sum_c sum_{i in c} (f_i - mu_c)(f_i - mu_c)^T`` (equation 1).

    Args:
        means: (K, D), of classes with enough images, and one for all other classes together, if any.
        whiten: (D, D'), W with ``W W^T = Sigma^-1`` (the pseudo-inverse where Sigma is singular).

    Source: Lee et al., NeurIPS 2018 (arXiv 1807.03888), section 2.1.
    """

    means: Tensor
    whiten: Tensor

    @classmethod
    def fitted(cls, features: Tensor, classes: Tensor, shrinkage: float | None) -> TiedGaussians:
        """Gaussians of features (N, D) and classes (N,); classes with fewer than five images share one mean."""
        f, labels = features.double(), classes.cpu().numpy()
        names, counts = np.unique(labels, return_counts=True)
        shared = np.where(np.isin(labels, names[counts >= _LEAST_OF_CLASS]), labels, -1)
        group = torch.as_tensor(np.unique(shared, return_inverse=True)[1]).to(f.device)
        means = torch.stack([f[group == k].mean(0) for k in range(int(group.max()) + 1)])
        centred = f - means[group]
        covariance = _covariance(centred, shrinkage)
        values, vectors = torch.linalg.eigh(covariance)
        kept = values > _SMALLEST * values.max().clamp_min(1e-300)
        return cls(means, vectors[:, kept] / values[kept].sqrt())

    def distance(self, features: Tensor) -> Tensor:
        """``min_c (f - mu_c)^T Sigma^-1 (f - mu_c)`` (minus equation 2) of features (N, D): (N,), float64."""
        f, means = features.double() @ self.whiten, self.means @ self.whiten
        squared = (f.square().sum(1, keepdim=True) - 2 * f @ means.T + means.square().sum(1)).clamp_min(0)
        return squared.amin(1)


class Mahalanobis(DifferentiablePeer, StatisticsPeer):
    """Distance of each layer's features to the nearest class-conditional Gaussian, combined over layers.

    ``M_l(x) = -min_c (f_l(x) - mu_lc)^T Sigma_l^-1 (f_l(x) - mu_lc)``; with labels the score is a logistic regression
    on -M_l, without the sum of the standardised -M_l. Features are averaged over space. With a
    ``magnitude``, M_l is that of x + magnitude * sign(grad_x M_l), the paper's input pre-processing.

    Differences from the paper: classes are the predicted ones (fitting images are assumed to be classified correctly);
    classes with fewer than five images share one mean; the combination is fitted to out-of-fold distances; the
    covariance may be shrunk. The gradient treats the pre-processing step as fixed.

    Args:
        network: images (N, C, H, W) in image units to logits.
        layers: modules or dotted names; None means the ends of the last five stages.
        magnitude: of the input pre-processing, in image units; 0 leaves it out. The paper chooses it on attacked
            images, which a fit to clean images does not have.
        shrinkage: towards a multiple of the identity, in [0, 1]: 0 is the paper's empirical covariance; None takes
            Ledoit and Wolf's, which vanishes for many images and is needed if there are fewer than features.
        seed: seed of the folds of the combination.

    Raises:
        ArgumentError: a negative magnitude, or a shrinkage outside [0, 1].

    Example:
        >>> import numpy as np
        >>> net = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 2))
        >>> images = np.random.default_rng(0).random((40, 1, 2, 2), dtype=np.float32)
        >>> detector = Mahalanobis(net)
        >>> detector.fit(images)
        >>> odd = detector.score(10 * images)
        >>> odd.shape, bool((odd > detector.score(images)).all())
        ((40,), True)

    Source: Lee, Lee, Lee, Shin, NeurIPS 2018 (arXiv 1807.03888), equations 1 and 2, algorithm 1. Tests hold it against
        the formulas in numpy.
    """

    name = "Mahalanobis"

    def __init__(
        self,
        network: nn.Module,
        *,
        layers: Layers = None,
        magnitude: float = 0.0,
        shrinkage: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(network, seed=seed)
        if magnitude < 0:
            raise ArgumentError(expected("magnitude", "0 or a positive step in image units", magnitude))
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise ArgumentError(expected("shrinkage", "None or in [0, 1]", shrinkage))
        self.reader = LayerReader(network, layers)
        self.magnitude = magnitude
        self.shrinkage = shrinkage

    def _extract(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, features = self.reader(images)
        return (*features, logits.argmax(1))

    def _learn(self, read: tuple[Tensor, ...]) -> list[TiedGaussians]:
        *features, classes = read
        # A forward and a backward pass (about two more), and one forward pass, for each layer.
        self.passes = 1.0 if self.magnitude == 0 else 1.0 + 4.0 * len(features)
        return [TiedGaussians.fitted(f, classes, self.shrinkage) for f in features]

    def _statistics(self, images: Tensor, read: tuple[Tensor, ...], reference: list[TiedGaussians]) -> Tensor:
        *features, _ = read
        if self.magnitude > 0:
            features = [self._after_step(images, layer, gaussians) for layer, gaussians in enumerate(reference)]
        return torch.stack([g.distance(f) for g, f in zip(reference, features, strict=True)], 1)

    def _after_step(self, images: Tensor, layer: int, gaussians: TiedGaussians) -> Tensor:
        """A layer's features after moving each image by one signed step towards its nearest class."""
        with torch.enable_grad():
            moved = images.detach().requires_grad_()
            distance = gaussians.distance(self.reader(moved)[1][layer])
            (gradient,) = torch.autograd.grad(distance.sum(), moved)
        return self.reader(images - self.magnitude * gradient.sign())[1][layer]


def _covariance(centred: Tensor, shrinkage: float | None) -> Tensor:
    """``(1 - a) S + a tr(S) / D I`` of centred features (N, D); a by Ledoit and Wolf 2004 if None."""
    n, d = centred.shape
    empirical = centred.T @ centred / n
    scale = empirical.diagonal().mean()
    if shrinkage is None:
        squares = centred.square()
        noise = ((squares.T @ squares).sum() / n - empirical.square().sum()) / n
        spread = empirical.square().sum() - d * scale.square()
        shrinkage = float((noise / spread.clamp_min(1e-300)).clamp(0, 1))
    return (1 - shrinkage) * empirical + shrinkage * scale * torch.eye(d, dtype=centred.dtype, device=centred.device)
