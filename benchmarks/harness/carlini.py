"""The attacks of Carlini and Wagner, on a whole batch at a time, with Adam and bisection of the constant.

ART's own versions use line search from an image whose black and white values are 1e-6 from the end of the hyperbolic
tangent, where gradients vanish: on digits they need perturbations twice as large as these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

__all__ = ["CarliniL2", "CarliniLInf"]

Array = npt.NDArray[Any]
# Share of the hyperbolic tangent's range that images use, because its gradient vanishes at the ends.
_RANGE = 0.99


def _to_free(images: Tensor) -> Tensor:
    return torch.atanh((2 * images - 1) * _RANGE)


def _to_images(free: Tensor) -> Tensor:
    """From w to images; values can exceed [0, 1] by 0.005, and results are clipped."""
    return (torch.tanh(free) / _RANGE + 1) / 2


def _margin(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Logit of the true class minus the largest other logit, (N,)."""
    scores = network(images)
    own = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, labels[:, None], True)
    margin: Tensor = scores[own] - scores.masked_fill(own, -torch.inf).amax(1)
    return margin


@dataclass(frozen=True)
class CarliniL2:
    """The image nearest in Euclidean distance that is misclassified with a margin of ``confidence`` logits.

    min over w of |x'(w) - x|^2 + c max(0, margin(x') + confidence), x' = (tanh w + 1) / 2; c is bisected for each
    image: lower after a success, higher after a failure.

    Args:
        network: images (N, ...) in [0, 1] to logits.
        confidence: by how much another logit must lead.
        steps: number of values of c.
        max_iter: steps of Adam for each.
        rate: learning rate of Adam, falling to a tenth.
        initial: the first c.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = net[1].weight.copy_(torch.eye(2))
        >>> x = np.array([[[[0.7, 0.3]]]], np.float32)
        >>> found = CarliniL2(net, steps=6, initial=2.0).generate(x, np.array([[1.0, 0.0]]))
        >>> bool(abs(np.linalg.norm(found - x) - 0.4 / 2**0.5) < 0.01)  # the closed form: margin / |gradient|
        True

    Source: Carlini and Wagner, 2017 (arXiv 1608.04644), section VI.
    """

    network: nn.Module
    confidence: float = 0.0
    steps: int = 5
    max_iter: int = 60
    rate: float = 0.1
    initial: float = 4.0

    def generate(self, x: Array, y: Array) -> Array:
        """The images found, (N, ...), float32; where none was found, the image itself.

        Args:
            x: images in [0, 1].
            y: true classes, one-hot, (N, C).
        """
        clean, labels = torch.from_numpy(x), torch.from_numpy(np.asarray(y).argmax(1))
        count = len(clean)
        low, high = torch.zeros(count), torch.full((count,), torch.inf)
        weight = torch.full((count,), self.initial)
        nearest, best = torch.full((count,), torch.inf), clean.clone()
        for _ in range(self.steps):
            found = self._descend(clean, labels, weight, nearest, best)
            high = torch.where(found, torch.minimum(high, weight), high)
            low = torch.where(found, low, torch.maximum(low, weight))
            between = torch.where(low > 0, (low * high).sqrt(), high / 4)
            weight = torch.where(high.isinf(), weight * 4, between)
        return best.numpy()

    def _descend(self, clean: Tensor, labels: Tensor, weight: Tensor, nearest: Tensor, best: Tensor) -> Tensor:
        """One descent for each image; updates ``nearest`` and ``best``, and returns which images succeeded."""
        free = _to_free(clean).requires_grad_()
        adam = torch.optim.Adam([free], lr=self.rate)
        found = torch.zeros(len(clean), dtype=torch.bool)
        for step in range(self.max_iter):
            adam.param_groups[0]["lr"] = self.rate * (1 - 0.9 * step / self.max_iter)
            images = _to_images(free)
            margin = _margin(self.network, images, labels)
            square = (images - clean).flatten(1).square().sum(1)
            better = (margin <= -self.confidence) & (square < nearest)
            found |= margin.detach() <= -self.confidence
            nearest[better] = square.detach()[better]
            best[better] = images.detach()[better].clamp(0, 1)
            loss = (square + weight * (margin + self.confidence).clamp_min(0)).sum()
            (free.grad,) = torch.autograd.grad(loss, free)
            adam.step()
        return found


@dataclass(frozen=True)
class CarliniLInf:
    """A misclassified image whose largest change is small: changes above a limit are penalised, and the limit lowered.

    min over w of sum max(0, |x'(w) - x| - tau) + c max(0, margin(x')); after a success, tau becomes ``shrink`` times
    the largest change; after a failure, c is increased, up to ``largest``.

    Args:
        network: images (N, ...) in [0, 1] to logits.
        rounds: number of values of (tau, c).
        max_iter: steps of Adam for each; every round starts from the last success.
        rate: learning rate of Adam in the first round, falling to a tenth in the last.
        shrink: the new limit, as a share of the change found.
        initial: the first c.
        largest: the last c.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = net[1].weight.copy_(torch.eye(2))
        >>> x = np.array([[[[0.7, 0.3]]]], np.float32)
        >>> found = CarliniLInf(net).generate(x, np.array([[1.0, 0.0]]))
        >>> bool(abs(np.abs(found - x).max() - 0.2) < 0.02)  # the closed form: margin / sum of |gradient|
        True

    Source: Carlini and Wagner, 2017 (arXiv 1608.04644), section VI.
    """

    network: nn.Module
    rounds: int = 24
    max_iter: int = 20
    rate: float = 0.1
    shrink: float = 0.8
    initial: float = 1.0
    largest: float = 1000.0

    def generate(self, x: Array, y: Array) -> Array:
        """The images found, (N, ...), float32; where none was found, the image itself; see :class:`CarliniL2`."""
        clean, labels = torch.from_numpy(x), torch.from_numpy(np.asarray(y).argmax(1))
        count = len(clean)
        limit, weight = torch.full((count,), 0.5), torch.full((count,), self.initial)
        nearest, best, start = torch.full((count,), torch.inf), clean.clone(), _to_free(clean)
        for turn in range(self.rounds):
            free = start.clone().requires_grad_()
            # Late rounds make small changes; large steps would jump across the limit.
            adam = torch.optim.Adam([free], lr=self.rate * (1 - 0.9 * turn / self.rounds))
            before = nearest.clone()
            for _ in range(self.max_iter):
                images = _to_images(free)
                margin = _margin(self.network, images, labels)
                change = (images - clean).abs().flatten(1)
                better = (margin < 0) & (change.amax(1) < nearest)
                nearest[better] = change.detach().amax(1)[better]
                best[better], start[better] = images.detach()[better].clamp(0, 1), free.detach()[better]
                beyond = (change - limit[:, None]).clamp_min(0).sum(1)
                loss = (beyond + weight * margin.clamp_min(0)).sum()
                (free.grad,) = torch.autograd.grad(loss, free)
                adam.step()
            found = nearest < before
            # Until the first success each round continues from the end of the previous one.
            never = nearest.isinf()
            start[never] = free.detach()[never]
            limit = torch.where(found, self.shrink * torch.minimum(limit, nearest), limit)
            weight = torch.where(found, weight, (weight * 4).clamp_max(self.largest))
        return best.numpy()
