"""Feature squeezing: does the prediction change when the image is simplified?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.detectors.base import DifferentiablePeer
from ce_plugin.detection.protocol import Array
from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.interventions import Smooth

__all__ = ["FeatureSqueezing", "NonLocalMeans", "paper_squeezers"]

_CACHED = 2**18  # values

Squeezer = Callable[[Tensor], Tensor]


class NonLocalMeans:
    """Each pixel becomes the mean of the pixels around it, weighted by the similarity of their patches.

    ``s(x)_i = sum_j w_ij x_j / sum_j w_ij`` over a window around i, ``w_ij = exp(-d_ij / h^2)``, d_ij the mean squared
    difference of the patches around i and j, all channels together; edges are reflected.

    Args:
        window: side of the window, odd.
        patch: side of a patch, odd.
        strength: h, in steps of 1/255.

    Raises:
        ArgumentError: an even or negative side, or a strength that is not positive.

    Example:
        >>> flat = torch.full((1, 3, 16, 16), 0.25)
        >>> bool(torch.allclose(NonLocalMeans(11, 3, 4)(flat), flat))
        True

    Source: Buades, Coll, Morel, CVPR 2005; "11-3-4" of Xu et al. 2018, who use OpenCV's version, which filters
        brightness and colour separately; this one filters the channels together and is differentiable.
    """

    def __init__(self, window: int = 11, patch: int = 3, strength: float = 4.0) -> None:
        for name, value in (("window", window), ("patch", patch)):
            if value < 1 or value % 2 == 0:
                raise ArgumentError(expected(name, "an odd number of pixels", value))
        if not strength > 0:
            raise ArgumentError(expected("strength", "a positive number, in steps of 1/255", strength))
        self.window, self.patch, self.strength = window, patch, strength

    def __repr__(self) -> str:
        return f"NonLocalMeans({self.window}, {self.patch}, {self.strength})"

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) with values in [0, 1], filtered.

        Raises:
            InputError: images too small for the window and a patch.
        """
        reach, border = self.window // 2, self.patch // 2
        height, width = images.shape[2:]
        if min(height, width) <= reach + border:
            wanted = f"images of more than {reach + border} pixels each way for {self!r}"
            raise InputError(expected("x", wanted, f"{height} x {width}"))
        # In chunks that fit into the processor's cache: each is read once for every position in the window.
        few = max(1, _CACHED // images[0].numel())
        return torch.cat([self._filtered(images[k : k + few]) for k in range(0, len(images), few)])

    def _filtered(self, images: Tensor) -> Tensor:
        reach, border = self.window // 2, self.patch // 2
        height, width = images.shape[2:]
        wide = F.pad(images, [reach + border] * 4, mode="reflect")
        centre = wide[:, :, reach : wide.shape[2] - reach, reach : wide.shape[3] - reach]
        steepness = (255 / self.strength) ** 2 / (self.patch**2 * images.shape[1])
        total, weights = torch.zeros_like(images), torch.zeros_like(images[:, :1])
        for dy in range(self.window):
            for dx in range(self.window):
                other = wide[:, :, dy : dy + height + 2 * border, dx : dx + width + 2 * border]
                weight = torch.exp(-self._of_patches((other - centre).square().sum(1, keepdim=True)) * steepness)
                total = total + weight * other[:, :, border : border + height, border : border + width]
                weights = weights + weight
        return total / weights

    def _of_patches(self, values: Tensor) -> Tensor:
        """Sums over patches, rows first; several times faster than pooling."""
        for dim in (2, 3):
            size = values.shape[dim] - self.patch + 1
            values = sum((values.narrow(dim, k, size) for k in range(1, self.patch)), start=values.narrow(dim, 0, size))
        return values


def paper_squeezers(channels: int) -> tuple[Squeezer, ...]:
    """The paper's combination: for MNIST 1 bit and median 2 x 2; for colour 5 bit, median 2 x 2 and 11-3-4.

    Args:
        channels: number of channels; 1 gives the squeezers for MNIST, more those for CIFAR-10 and ImageNet.

    Example:
        >>> len(paper_squeezers(1)), len(paper_squeezers(3))
        (2, 3)

    Source: Xu et al. 2018, table IV: "best joint detection".
    """
    if channels == 1:
        return Smooth.bits(1).perturb, Smooth.median(2).perturb
    return Smooth.bits(5).perturb, Smooth.median(2).perturb, NonLocalMeans(11, 3, 4.0)


class FeatureSqueezing(DifferentiablePeer):
    """Change of the prediction when the image is squeezed, the largest over squeezers.

    ``score(x) = max_j || softmax f(x) - softmax f(s_j(x)) ||_1``, in [0, 2]. There is nothing to fit: the paper sets a
    threshold on clean images, and so does the harness. Rounding passes the gradient straight through.

    Args:
        network: images (N, C, H, W) with values in [0, 1] to logits.
        squeezers: functions from images to images; None means :func:`paper_squeezers`.

    Raises:
        ArgumentError: no squeezers, or one that is not a function.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> images = np.random.default_rng(0).random((4, 1, 8, 8), dtype=np.float32)
        >>> FeatureSqueezing(net).score(images).shape
        (4,)

    Source: Xu, Evans, Qi, NDSS 2018 (arXiv 1704.01155), section V-A. Tests hold it against the formula with scipy's
        median filter and rounding by hand.
    """

    name = "feature squeezing"

    def __init__(self, network: nn.Module, *, squeezers: Sequence[Squeezer] | None = None) -> None:
        super().__init__(network)
        if squeezers is not None and (len(squeezers) == 0 or not all(callable(s) for s in squeezers)):
            raise ArgumentError(expected("squeezers", "None or functions from images to images", squeezers))
        self.squeezers = None if squeezers is None else tuple(squeezers)
        self.passes = 1.0 + (2 if squeezers is None else len(squeezers))
        self._fitted = True

    def _fit(self, images: Array, labels: npt.NDArray[np.int64] | None) -> None:
        """There is nothing to fit."""

    def _scores(self, images: Tensor) -> Tensor:
        squeezers = paper_squeezers(images.shape[1]) if self.squeezers is None else self.squeezers
        self.passes = 1.0 + len(squeezers)
        plain = self._probabilities(images)
        moved = [(plain - self._probabilities(squeeze(images))).abs().sum(1) for squeeze in squeezers]
        return torch.stack(moved, 1).amax(1)

    def _probabilities(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits.double().softmax(1)
