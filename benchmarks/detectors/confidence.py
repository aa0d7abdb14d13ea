"""Uncertainty of the network: baselines that any detector has to beat."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.detectors.base import DifferentiablePeer
from ce_plugin.detection.protocol import Array
from ce_plugin.errors import ModelError, expected

__all__ = ["Entropy", "Margin", "MaxSoftmax"]


class _OfLogits(DifferentiablePeer):
    """A score computed from the logits; there is nothing to fit."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self._fitted = True

    def _fit(self, images: Array, labels: npt.NDArray[np.int64] | None) -> None:
        """There is nothing to fit."""

    def _scores(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(expected("network", "one that returns logits (N, classes) of two or more", got))
        return self._of(logits.double())

    @abstractmethod
    def _of(self, logits: Tensor) -> Tensor:
        """The score (N,) of logits (N, C), float64."""


class MaxSoftmax(_OfLogits):
    """Log odds of the largest probability, log(1 - p_max) - log(p_max), which ranks images like 1 - p_max.

    1 - p_max itself rounds to zero for most images of a confident network.

    Args:
        network: images (N, C, H, W) in image units to logits.

    Example:
        >>> net = nn.Flatten()  # pixels are the logits
        >>> MaxSoftmax(net).score(np.array([[[[0.0, 0.0]]], [[[0.0, 2.0]]]], dtype=np.float32)).tolist()
        [0.0, -2.0]

    Source: Hendrycks and Gimpel, ICLR 2017 (arXiv 1610.02136).
    """

    name = "max softmax"

    def _of(self, logits: Tensor) -> Tensor:
        top, others = _largest(logits)
        return torch.logsumexp(others, 1) - top


class Entropy(_OfLogits):
    """The entropy of the softmax, ``-sum_c p_c log p_c``, in nats.

    Args:
        network: images (N, C, H, W) in image units to logits.

    Example:
        >>> net = nn.Flatten()
        >>> Entropy(net).score(np.zeros((1, 1, 1, 2), dtype=np.float32)).round(4).tolist()  # log 2
        [0.6931]

    Source: the standard measure of uncertainty; a baseline in Feinman et al. 2017 (arXiv 1703.00410).
    """

    name = "entropy"

    def _of(self, logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(1)
        return -(log_p.exp() * log_p).sum(1)


class Margin(_OfLogits):
    """The negative margin: minus (the largest logit minus the second largest).

    Args:
        network: images (N, C, H, W) in image units to logits.

    Example:
        >>> net = nn.Flatten()
        >>> Margin(net).score(np.array([[[[1.0, 3.0, 0.0]]]], dtype=np.float32)).tolist()
        [-2.0]

    Source: the criterion that minimal attacks (DeepFool, Carlini and Wagner) drive to zero.
    """

    name = "margin"

    def _of(self, logits: Tensor) -> Tensor:
        top, others = _largest(logits)
        return others.amax(1) - top


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit (N,) and the others (N, C - 1)."""
    top, best = logits.max(1)
    keep = torch.ones_like(logits, dtype=torch.bool).scatter(1, best[:, None], False)
    return top, logits[keep].reshape(len(logits), -1)
