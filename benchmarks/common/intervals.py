"""Bootstrap intervals over images, and their format in tables."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import bootstrap

Array = np.ndarray[Any, np.dtype[np.float64]]

_OPTIONS: dict[str, Any] = {"n_resamples": 10_000, "vectorized": True, "method": "percentile"}


def interval(values: Array) -> list[float]:
    """95 % percentile bootstrap interval of a mean over images."""
    found = bootstrap((values,), np.mean, rng=0, **_OPTIONS).confidence_interval
    return [float(found.low), float(found.high)]


def ratio_interval(ours: Array, other: Array) -> list[float]:
    """The same for the ratio of two means; both are computed on the same bootstrap sample of images."""

    def ratio(one: Array, two: Array, axis: int) -> Any:
        return one.mean(axis) / two.mean(axis)

    found = bootstrap((ours, other), ratio, paired=True, rng=0, **_OPTIONS).confidence_interval
    return [float(found.low), float(found.high)]


def bounds(low_high: list[float]) -> str:
    """Format an interval for tables."""
    return f"{low_high[0]:+.3f} to {low_high[1]:+.3f}"
