"""Bootstrap of the figures of a detector: from ranks, many samples at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.randomness import numpy_generator

__all__ = ["Resampled", "allowed", "bootstrapped", "checked_scores"]

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

# About so many weights are held at a time.
_BLOCK = 1 << 22


class Resampled(NamedTuple):
    """Figures of bootstrap samples.

    Attributes:
        auroc: (B,).
        tpr: (F, B), one row for each false-alarm rate.
    """

    auroc: Floats
    tpr: Floats

    def interval(self, which: Floats, level: float) -> tuple[float, float]:
        """Percentile interval; samples without clean or without attacked images, which have no figure, are left out."""
        low, high = np.nanquantile(which, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def bootstrapped(
    clean: npt.ArrayLike,
    attacked: npt.ArrayLike,
    fprs: Sequence[float] = (0.01, 0.05),
    *,
    ids: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Resampled:
    """AUROC and detection rates of samples of the images, drawn with replacement; the threshold is found anew in each.

    Args:
        clean: scores, (n,).
        attacked: scores, (m,).
        fprs: false-alarm rates.
        ids: ids of the clean images, (n,), and of the images that were attacked, (m,): an image is then drawn with all
            that was made of it. None draws clean and attacked images separately.
        n_resamples: number B of samples.
        seed: of the draws. The order of the images does not matter.

    Raises:
        InputError: no scores, NaN, or ids that are not one per score.
        ArgumentError: a rate outside [0, 1), or no samples.

    Example:
        >>> sample = bootstrapped(np.arange(100.0), np.arange(50.0, 150.0), seed=1)
        >>> sample.auroc.shape, sample.tpr.shape
        ((1000,), (2, 1000))
        >>> [round(end, 1) for end in sample.interval(sample.auroc, 0.95)]
        [0.8, 0.9]

    Source: Efron, Tibshirani 1993, ch. 13 (percentile interval).
    """
    below, above = checked_scores("clean", clean), checked_scores("attacked", attacked)
    if n_resamples < 1:
        raise ArgumentError(expected("n_resamples", "a number of samples, 1 or more", n_resamples))
    first, second = np.argsort(below, kind="stable"), np.argsort(above, kind="stable")
    below, above = below[first], above[second]
    if ids is None:
        images = [np.arange(len(below)), np.arange(len(above))]
        sizes = [len(below), len(above)]
    else:
        images, sizes = _shared(ids, first, second)
    parts = [
        _of_weights(below, above, fprs, *weights)
        for weights in _weights(images, sizes, n_resamples, numpy_generator(seed, "bootstrap"))
    ]
    return Resampled(np.concatenate([part.auroc for part in parts]), np.concatenate([part.tpr for part in parts], 1))


def _shared(ids: tuple[npt.ArrayLike, npt.ArrayLike], first: Whole, second: Whole) -> tuple[list[Whole], list[int]]:
    """The number of each score's image, scores in rising order; both sets take theirs from one draw."""
    names = [np.asarray(one) for one in ids]
    for name, order in zip(names, (first, second), strict=True):
        if name.shape != order.shape:
            raise InputError(expected("ids", f"one id for each score, {order.shape}", f"shape {name.shape}"))
    unique, places = np.unique(np.concatenate([names[0][first], names[1][second]]), return_inverse=True)
    return [places[: len(first)], places[len(first) :]], [len(unique)]


def _weights(
    images: list[Whole], sizes: list[int], n_resamples: int, generator: np.random.Generator
) -> Iterator[tuple[Whole, Whole]]:
    """How often each clean and each attacked score was drawn, (b, n) and (b, m), some samples at a time."""
    each = max(1, _BLOCK // sum(sizes))
    for start in range(0, n_resamples, each):
        rows = min(each, n_resamples - start)
        counts = []
        for size in sizes:
            drawn = generator.integers(0, size, (rows, size)) + np.arange(rows)[:, None] * size
            counts.append(np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size))
        yield counts[0][:, images[0]], counts[-1][:, images[1]]


def _of_weights(
    below: Floats, above: Floats, fprs: Sequence[float], clean_weights: Whole, attacked_weights: Whole
) -> Resampled:
    """Figures of images counted so many times; scores in rising order."""
    rows = len(clean_weights)
    start = np.zeros((rows, 1), dtype=np.int64)
    # Column i: how many of the drawn scores lie among the i lowest.
    clean_up_to = np.concatenate([start, clean_weights.cumsum(1)], 1)
    attacked_up_to = np.concatenate([start, attacked_weights.cumsum(1)], 1)
    n, m = clean_up_to[:, -1], attacked_up_to[:, -1]
    beaten = (
        clean_up_to[:, np.searchsorted(below, above, "left")] + clean_up_to[:, np.searchsorted(below, above, "right")]
    )
    higher = np.searchsorted(above, below, "right")
    tpr = np.empty((len(fprs), rows))
    with np.errstate(divide="ignore", invalid="ignore"):  # a sample may hold no attacked image at all: NaN
        area = (beaten * attacked_weights).sum(1) / (2.0 * n * m)
        for row, fpr in enumerate(fprs):
            place = (clean_up_to[:, 1:] < (n - allowed(n, fpr))[:, None]).sum(1)
            missed = attacked_up_to[np.arange(rows), higher[np.minimum(place, len(below) - 1)]]
            tpr[row] = np.where(n > 0, (m - missed) / m, np.nan)
    return Resampled(area, tpr)


def checked_scores(name: str, scores: npt.ArrayLike) -> Floats:
    """As float64, one number for each image."""
    checked = np.asarray(scores, dtype=np.float64)
    if checked.ndim != 1 or not checked.size or np.isnan(checked).any():
        got = "NaN" if checked.ndim == 1 and checked.size else f"shape {checked.shape}"
        raise InputError(expected(name, "one number for each image, (N,), N >= 1", got))
    return checked


def allowed(n: Whole, fpr: float) -> Whole:
    """The greatest j with j / n <= fpr, and so below n."""
    if not 0 <= fpr < 1:
        raise ArgumentError(expected("fpr", "a rate in [0, 1)", fpr, "Write 0.05 for 5 %."))
    j = np.floor(fpr * n).astype(np.int64)
    exact: Whole = j + ((j + 1) / np.maximum(n, 1) <= fpr) - (j / np.maximum(n, 1) > fpr)
    return exact
