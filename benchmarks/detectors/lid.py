"""Local intrinsic dimensionality: how fast the number of neighbours grows with distance, in a network's layers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.detectors.base import Combination, DifferentiablePeer
from benchmarks.detectors.layers import LayerReader, Layers
from ce_plugin.detection.protocol import Array
from ce_plugin.errors import ArgumentError, expected
from ce_plugin.randomness import numpy_generator

__all__ = ["LID", "lid_of_distances"]

_MOST_LAYERS = 20
_NEAREST = 5e-3  # of r_k: the distance of an image to itself is rounding, and its logarithm would be noise
_FLATTEST = 1e-6  # of the mean log ratio: equal distances to all neighbours would give infinity


def lid_of_distances(distances: Tensor, k: int) -> Tensor:
    """The maximum-likelihood estimate from distances to a sample, ``-(1/k sum_i log(r_i / r_k))^-1``.

    Args:
        distances: (N, B), to the images of a minibatch; not ordered.
        k: number of nearest neighbours, at most B.

    Returns:
        (N,): the estimate; r_1 to r_k are the k smallest distances, those below 0.5 % of r_k taken as that.

    Example:
        >>> distances = torch.tensor([[1.0, 2.0, 4.0, 9.0]])
        >>> round(lid_of_distances(distances, 3).item() * (3 * torch.log(torch.tensor(2.0))).item(), 4)
        3.0

    Source: Ma et al., ICLR 2018 (arXiv 1801.02613), equation 4.
    """
    nearest = distances.topk(k, dim=1, largest=False).values
    ratios = (nearest / nearest[:, -1:].clamp_min(1e-12)).clamp_min(_NEAREST)
    return 1 / (-ratios.log().mean(1)).clamp_min(_FLATTEST)


class LID(DifferentiablePeer):
    """Local intrinsic dimensionality in each layer, estimated from minibatches of clean images.

    With labels the score is a logistic regression on the layers' estimates; without, their standardised sum, because
    adversarial images tend to have a higher dimensionality.

    The paper draws a minibatch for every image; here estimates are averaged over a few fixed ones, so that scores do
    not depend on the batch. A fitting image is not its own neighbour. In the paper the regression also gets noisy
    images labelled clean; here it is fitted to the labels that are passed.

    Args:
        network: images (N, C, H, W) in image units to logits.
        layers: modules or dotted names; None means all, including the logits, as in the paper; if there are more
            than twenty, that many, evenly spread.
        k: number of neighbours; the paper takes 20 on MNIST and CIFAR-10.
        minibatch: clean images in a minibatch; the paper takes 100.
        n_minibatches: number of minibatches; fewer if there are too few clean images.
        pool: average maps over space first, as Lee et al. do when they compare with LID. The paper takes all values,
            and so does None, up to 32768 in a layer.
        seed: seed of the minibatches.

    Raises:
        ArgumentError: ``k`` below 2 or not below ``minibatch``.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(16, 2))
        >>> images = np.random.default_rng(0).random((120, 1, 4, 4), dtype=np.float32)
        >>> detector = LID(net)
        >>> detector.fit(images)
        >>> detector.score(images[:5]).shape
        (5,)

    Source: Ma et al., ICLR 2018 (arXiv 1801.02613), equation 4, algorithm 1. Tests hold it against samples of known
        dimension and the formula in numpy.
    """

    name = "LID"

    def __init__(
        self,
        network: nn.Module,
        *,
        layers: Layers = None,
        k: int = 20,
        minibatch: int = 100,
        n_minibatches: int = 5,
        pool: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(network)
        if not 2 <= k < minibatch:
            raise ArgumentError(expected("k", f"a number of neighbours from 2 to minibatch - 1 = {minibatch - 1}", k))
        if n_minibatches < 1:
            raise ArgumentError(expected("n_minibatches", "at least 1", n_minibatches))
        self.reader = LayerReader(network, layers, pool=pool, most=_MOST_LAYERS, every=True)
        self.k, self.minibatch, self.n_minibatches, self.seed = k, minibatch, n_minibatches, seed
        self.least = k + 2
        self.reference: list[Tensor] = []
        self.combination: Combination | None = None

    def _fit(self, images: Array, labels: npt.NDArray[np.int64] | None) -> None:
        clean = np.arange(len(images)) if labels is None else np.flatnonzero(labels == 0)
        size = min(self.minibatch, len(clean))
        count = min(self.n_minibatches, len(clean) // size)
        rows = numpy_generator(self.seed, "minibatches").permutation(clean)[: size * count]
        place = np.full(len(images), -1)
        place[rows] = np.arange(len(rows))
        with torch.no_grad():
            read = [self.reader(batch)[1] for batch in self._batches(images[rows])]
            features = [torch.cat(parts) for parts in zip(*read, strict=True)]
            self.reference = [f.reshape(count, size, -1) for f in features]
            parts, start = [], 0
            for batch in self._batches(images):
                own = torch.as_tensor(place[start : start + len(batch)], device=batch.device)
                parts.append(self._statistics(batch, own).cpu().numpy())
                start += len(batch)
        statistics = np.concatenate(parts)
        self.combination = (
            Combination.of_clean(statistics)
            if labels is None
            else Combination.of_labels(statistics, labels, seed=self.seed)
        )

    def _statistics(self, images: Tensor, own: Tensor | None = None) -> Tensor:
        """Estimates (N, layers), averaged over minibatches; ``own`` (N,) is an image's place among them, or -1."""
        _, features = self.reader(images)
        return torch.stack([self._of_layer(f, r, own) for f, r in zip(features, self.reference, strict=True)], 1)

    def _of_layer(self, features: Tensor, reference: Tensor, own: Tensor | None) -> Tensor:
        count, size, _ = reference.shape
        # The mean is subtracted first, which loses less precision.
        mean = reference.mean((0, 1))
        a, b = features - mean, (reference - mean).flatten(0, 1)
        squared = a.square().sum(1, keepdim=True).double() - 2 * (a @ b.T).double() + b.square().sum(1).double()
        distances = squared.clamp_min(1e-24).sqrt()
        if own is not None:
            itself = own[:, None] == torch.arange(count * size, device=own.device)
            distances = distances.masked_fill(itself, torch.inf)
        estimates = lid_of_distances(distances.reshape(-1, size), self.k)
        return estimates.reshape(-1, count).mean(1)

    def _scores(self, images: Tensor) -> Tensor:
        if self.combination is None:
            raise ArgumentError(expected("detector", "a fitted one", repr(self), "Call `fit` first."))
        return self.combination(self._statistics(images))
