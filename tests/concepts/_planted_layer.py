"""A network whose one layer is a mixture of known sources, each sparse in space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SOURCES, CHANNELS, SIZE, CLASSES = 3, 9, 8, 5


def sources(n: int, seed: int = 0) -> Tensor:
    """Blobs at random places: (n, SOURCES, SIZE, SIZE), zero nearly everywhere."""
    g = torch.Generator().manual_seed(seed)
    shape = (n, SOURCES, SIZE, SIZE)
    spikes = (torch.rand(shape, generator=g) < 0.03) * torch.rand(shape, generator=g)
    bell = torch.tensor([[0.25, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 0.25]])
    return F.conv2d(spikes, bell.expand(SOURCES, 1, 3, 3), padding=1, groups=SOURCES)


class Mixture(nn.Module):
    """``mix``: CHANNELS mixtures of the sources, then the mean over positions and a linear head."""

    def __init__(self, seed: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.mix = nn.Conv2d(SOURCES, CHANNELS, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(CHANNELS, CLASSES)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = 4 * self.head(self.drop(self.mix(x)).mean((2, 3)))
        return logits


def matched_correlations(code: Tensor, truth: Tensor) -> Tensor:
    """Correlation of each source with the concept that the best one-to-one matching gives it."""
    from scipy.optimize import linear_sum_assignment

    rows = [x.transpose(0, 1).flatten(1).double() for x in (truth, code)]
    table = torch.corrcoef(torch.cat(rows))[: len(rows[0]), len(rows[0]) :].nan_to_num()
    one, other = linear_sum_assignment(-table.numpy())
    return table[one, other]
