"""ML-LOO: dispersion of the effects of leaving out single pixels, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.detectors.base import StatisticsPeer
from benchmarks.detectors.layers import LayerReader, Layers
from ce_plugin.errors import ArgumentError, InputError, expected, unknown_name

__all__ = ["MLLOO", "dispersion"]

_CHUNK = 256  # changed images in one pass of the network
_LARGE = 32  # larger images than this are blanked in cells instead of pixels
_GRID = 14


def dispersion(values: Tensor, kind: str) -> Tensor:
    """Dispersion of the columns of (d, K): ``"iqr"``, ``"std"`` or ``"mad"``; (K,).

    ``iqr`` is the distance of the quartiles, ``mad`` the median distance from the median.

    Raises:
        UnknownNameError: an unknown kind.

    Example:
        >>> dispersion(torch.tensor([[0.0], [1.0], [2.0], [3.0], [9.0]]), "iqr")
        tensor([2.])

    Source: Yang et al. 2020, section 3.2.
    """
    if kind == "std":
        return values.std(0, correction=0)
    if kind == "iqr":
        return values.quantile(0.75, dim=0) - values.quantile(0.25, dim=0)
    if kind == "mad":
        # Use quantile, because torch's median takes the lower of the two middle values.
        return (values - values.quantile(0.5, dim=0)).abs().quantile(0.5, dim=0)
    raise unknown_name("dispersions", kind, ("iqr", "std", "mad"))


class MLLOO(StatisticsPeer):
    """Dispersion of leave-one-out attributions of every neuron of several layers.

    ``phi_ij = h_j(x) - h_j(x with pixel i blanked)`` for the neurons h_j: channels of chosen layers, averaged over
    space, and the probabilities of all classes. For each neuron the statistic is the dispersion of phi_ij over i. With
    labels the score is a logistic regression on all of them; without, which the paper does not have, the sum of their
    squared deviations from clean images, since attacked images can have a higher or a lower dispersion.

    A pixel is blanked in all channels at once. Images of more than 32 pixels a side are blanked in cells of a 14 x 14
    grid, which is ours, as the paper has no images larger than those of CIFAR-10. Dispersions do not depend
    on h_j(x), so d passes suffice.

    Args:
        network: images (N, C, H, W) in image units to logits.
        layers: modules or dotted names; None means the ends of the last five stages.
        dispersions: which ones, of ``"iqr"``, ``"std"`` and ``"mad"``; the paper's results are those of iqr.
        cell: side of a blanked cell, in pixels; None means 1, or a fourteenth of a large image.
        fill: value of blanked pixels, in image units; the paper's reference is 0.
        seed: seed of the folds of the regression.

    Attributes:
        passes: d, the number of cells (cells that are blank already are not run); known after the first image, 784
            until then.

    Raises:
        ArgumentError: a cell below 1, or no dispersion.
        UnknownNameError: an unknown dispersion.

    Example:
        >>> import numpy as np
        >>> net = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(16, 2))
        >>> images = np.random.default_rng(0).random((40, 1, 4, 4), dtype=np.float32)
        >>> detector = MLLOO(net)
        >>> detector.fit(images)
        >>> detector.score(images[:5]).shape, detector.passes
        ((5,), 16.0)

    Source: Yang, Chen, Hsieh, Wang, Jordan, AAAI 2020 (arXiv 1906.03499), section 3 and the authors' code (pooling,
        probabilities, iqr). Tests hold it against closed forms of linear networks.
    """

    name = "ML-LOO"
    two_sided = True

    def __init__(
        self,
        network: nn.Module,
        *,
        layers: Layers = None,
        dispersions: Sequence[str] = ("iqr",),
        cell: int | None = None,
        fill: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(network, seed=seed)
        if len(dispersions) == 0 or isinstance(dispersions, str):
            raise ArgumentError(expected("dispersions", "a sequence such as ('iqr', 'std')", repr(dispersions)))
        for kind in dispersions:
            dispersion(torch.zeros(1, 1), kind)
        if cell is not None and cell < 1:
            raise ArgumentError(expected("cell", "None or a positive number of pixels", cell))
        self.reader = LayerReader(network, layers)
        self.dispersions, self.cell, self.fill = tuple(dispersions), cell, fill
        self.passes = 784.0

    def _extract(self, images: Tensor) -> tuple[Tensor, ...]:
        masks = self._masks(images)
        self.passes = float(len(masks))
        return (torch.stack([self._of_image(image, masks) for image in images]),)

    def _learn(self, read: tuple[Tensor, ...]) -> None:
        """No reference is needed: the dispersions are the statistics."""

    def _statistics(self, images: Tensor, read: tuple[Tensor, ...], reference: None) -> Tensor:
        return read[0]

    def _of_image(self, image: Tensor, masks: Tensor) -> Tensor:
        """All dispersions of one image (C, H, W); ``masks`` (d, 1, H, W) are True where each cell is.

        Cells that are blank already, on digits most of them, have no effect and are not run.
        """
        changing = (masks & (image != self.fill)).flatten(1).any(1)
        runs = torch.cat([image[None], image.masked_fill(masks[changing], self.fill)])
        rows = []
        for some in runs.split(_CHUNK):  # type: ignore[no-untyped-call]
            logits, features = self.reader(some)
            rows.append(torch.cat([*features, logits.softmax(1)], 1).double())
        found = torch.cat(rows)
        values = found[0].repeat(len(masks), 1)
        values[changing] = found[1:]
        return torch.cat([dispersion(values, kind) for kind in self.dispersions])

    def _masks(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        cell = self.cell or (1 if max(height, width) <= _LARGE else -(-max(height, width) // _GRID))
        if cell > min(height, width):
            raise InputError(expected("x", f"images of at least {cell} pixels each way", f"{height} x {width}"))
        down, right = (torch.arange(size, device=images.device) // cell for size in (height, width))
        ids = down[:, None] * (int(right[-1]) + 1) + right
        return ids == torch.arange(int(ids[-1, -1]) + 1, device=images.device)[:, None, None, None]
