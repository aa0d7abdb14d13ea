"""Means and co-moments of many images' effects: computed in parts, in any order, and merged (Chan et al.)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Values whose products are computed together: bounds the memory of large layers.
_CHUNK = 1 << 22
# In front of a packed state: number of images, of series, of classes, and of the series that are no units.
_HEADER = 4


@dataclass(frozen=True)
class Moments:
    """Of the values of n images: their means, and the sums of products of what deviates from them.

    The series are the units, then ``extras`` more: the reference's outcome, and what inserting an autoencoder does.

    Attributes:
        n: number of images, or the sum of their weights.
        mean: (E, S, C), float64: of each evidence, series and class.
        comoment: (E, E, S, C), sum over images of (x_e - mean_e) (x_f - mean_f).
        extras: how many of the last series are no units.
    """

    n: float
    mean: Tensor
    comoment: Tensor
    extras: int

    @property
    def covariance(self) -> Tensor:
        """Of the means of the evidences, (E, E, S, C): that between images over n; NaN for a single image."""
        spread = self.comoment / (self.n - 1) if self.n > 1 else torch.full_like(self.comoment, torch.nan)
        return spread / self.n

    def to(self, device: torch.device | str) -> Moments:
        """The same on another device."""
        return Moments(self.n, self.mean.to(device), self.comoment.to(device), self.extras)


def moments_of(values: Tensor, extras: int = 1, weights: Tensor | None = None) -> Moments:
    """Moments of the images of one batch, in float64.

    Args:
        values: (N, E, S, C), one value for each image, evidence, series and class.
        extras: how many of the last series are no units.
        weights: (N,), such as how often a bootstrap drew each image; None for one each.

    Example:
        >>> found = moments_of(torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1), extras=0)
        >>> found.n, found.mean.item(), found.comoment.item()
        (2.0, 2.0, 2.0)
    """
    n, evidences, series, classes = values.shape
    weight = torch.ones(n, dtype=torch.float64) if weights is None else weights.double()
    weight = weight.to(values.device)
    total = float(weight.sum())
    share = (weight / total if total else weight).reshape(n, 1, 1)
    flat = values.reshape(n, evidences, series * classes)
    mean, comoment = [], []
    step = max(1, _CHUNK // max(1, n * evidences))
    for part in torch.split(flat, step, dim=2):
        wide = part.double()
        mean.append((wide * share).sum(0))
        apart = wide - mean[-1]
        comoment.append(torch.einsum("n,nek,nfk->efk", weight, apart, apart))
    whole = torch.cat(mean, 1).reshape(evidences, series, classes)
    return Moments(total, whole, torch.cat(comoment, 2).reshape(evidences, evidences, series, classes), extras)


def merged(parts: Sequence[Moments]) -> Moments | None:
    """The moments of all images of several parts; None where no part has an image.

    n = a + b, mean = mean_a + d b / n, comoment = comoment_a + comoment_b + d d' a b / n, with d = mean_b - mean_a.

    Example:
        >>> values = torch.arange(6.0).reshape(6, 1, 1, 1)
        >>> found = merged([moments_of(values[:2]), moments_of(values[2:])])
        >>> found.mean.item(), round(found.comoment.item(), 12)
        (2.5, 17.5)

    Source: Chan, Golub, LeVeque 1983.
    """
    found: Moments | None = None
    for part in parts:
        if not part.n:
            continue
        if found is None:
            found = part
            continue
        n = found.n + part.n
        apart = part.mean - found.mean
        between = torch.einsum("esc,fsc->efsc", apart, apart) * (found.n * part.n / n)
        mean = found.mean + apart * (part.n / n)
        found = Moments(n, mean, found.comoment + part.comoment + between, found.extras)
    return found


def packed(moments: Moments | None, like: Tensor | None = None) -> Tensor:
    """Moments as one float64 vector: a header, the means, the co-moments. No images are a header of zeros.

    Example:
        >>> packed(None).tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    if moments is None:
        device = None if like is None else like.device
        return torch.zeros(_HEADER, dtype=torch.float64, device=device)
    _, series, classes = moments.mean.shape
    header = torch.tensor([moments.n, series, classes, moments.extras], dtype=torch.float64)
    return torch.cat([header.to(moments.mean.device), moments.mean.flatten(), moments.comoment.flatten()])


def unpacked(state: Tensor, evidences: int) -> Moments | None:
    """What :func:`packed` made, whatever zeros follow it; None where there are no images.

    Example:
        >>> found = moments_of(torch.rand(3, 2, 4, 5))
        >>> bool((unpacked(packed(found), 2).comoment == found.comoment).all())
        True
    """
    n, series, classes, extras = state[:_HEADER].tolist()
    if not n:
        return None
    shape = (evidences, int(series), int(classes))
    size = shape[0] * shape[1] * shape[2]
    mean = state[_HEADER : _HEADER + size].reshape(shape)
    rest = state[_HEADER + size : _HEADER + size * (1 + evidences)]
    return Moments(n, mean, rest.reshape(evidences, *shape), int(extras))
