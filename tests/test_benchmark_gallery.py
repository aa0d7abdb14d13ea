"""What pages of the gallery quote: the measures of a conditional generator's pictures."""

from __future__ import annotations

import math

import torch
from torch import nn

from benchmarks.gallery.cdcgan import agreement, spread, variety
from ce_plugin.interventions import Normalization
from ce_plugin.models import VisionModel


def pictures(n: int, width: float = 1.0, seed: int = 0) -> torch.Tensor:
    return width * torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_spread_is_the_mean_over_pairs() -> None:
    x = pictures(12)
    found, _ = spread(x)
    pairs = [float((x[i] - x[j]).norm()) for i in range(12) for j in range(i)]
    assert math.isclose(found, sum(pairs) / len(pairs), rel_tol=1e-12)


def test_the_error_of_the_spread_is_that_of_repeated_samples() -> None:
    """Over 400 samples of 60 pictures the means scatter as their errors say."""
    found = [spread(pictures(60, seed=seed)) for seed in range(400)]
    means, errors = (torch.tensor(column) for column in zip(*found, strict=True))
    assert 0.85 < float(errors.mean() / means.std()) < 1.15


def test_variety_is_the_ratio_of_spreads_and_its_interval_holds_it() -> None:
    real = torch.stack([pictures(80, seed=c) for c in range(3)])
    made = torch.stack([pictures(80, 0.7, seed=10 + c) for c in range(3)])
    ratio, low, high = variety(made, real)
    assert low < 0.7 < high
    assert high - low < 0.1
    assert variety(real, real)[0] == 1
    assert variety(real[:, :1].expand(-1, 80, -1, -1, -1), real)[0] < 1e-6
    assert low < ratio < high


def test_agreement_counts_answers() -> None:
    network = VisionModel(nn.Flatten(), normalization=Normalization(0.5, 0.5))
    x = torch.eye(4)[:, None, None]
    share, low, high = agreement(network, x, torch.tensor([0, 1, 2, 0]))
    assert share == 0.75
    assert low < share < high
