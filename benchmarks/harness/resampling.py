"""One bootstrap for all detectors, attacks and classifiers: test images are drawn with all their versions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.evaluation.detectors import Resampled, allowed, checked_scores
from ce_plugin.randomness import numpy_generator

__all__ = ["CleanScores", "ImageDraws"]

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


class ImageDraws:
    """How often each test image is drawn in each bootstrap sample.

    Figures computed from the same draws can be averaged, subtracted and compared sample by sample: over attacks, over
    classifiers with the same test images, and between detectors.

    Args:
        n_images: number of test images; their ids are 0 ... n_images - 1.
        n_resamples: number B of samples.
        seed: seed of the draws.

    Attributes:
        counts: (B, n_images), uint16.

    Raises:
        ArgumentError: no images or no samples.

    Example:
        >>> draws = ImageDraws(50, n_resamples=3)
        >>> draws.counts.sum(1).tolist()
        [50, 50, 50]
    """

    def __init__(self, n_images: int, n_resamples: int = 1000, seed: int = 0) -> None:
        for name, value in (("n_images", n_images), ("n_resamples", n_resamples)):
            if value < 1:
                raise ArgumentError(expected(name, "1 or more", value))
        random = numpy_generator(seed, "images drawn")
        self.counts = np.empty((n_resamples, n_images), np.uint16)
        for row in self.counts:
            row[:] = np.bincount(random.integers(0, n_images, n_images), minlength=n_images)

    def of(self, ids: Ids) -> npt.NDArray[np.int64]:
        """How often these images are drawn, (B, len(ids))."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.counts.shape[1]:
            got = f"{ids.min()} to {ids.max()}"
            raise InputError(expected("ids", f"numbers of the {self.counts.shape[1]} test images", got))
        return self.counts[:, ids].astype(np.int64)


class CleanScores:
    """Scores of clean images, with which those of any number of attacks are compared.

    Args:
        scores: (n,), greater means more adversarial.
        ids: (n,), ids of the images.
        draws: the bootstrap samples.
        fprs: false-alarm rates for the detection rates.

    Raises:
        InputError: no scores, NaN, or ids that are not one per score.
        ArgumentError: a rate outside [0, 1).

    Example:
        >>> clean = CleanScores(np.arange(100.0), np.arange(100), ImageDraws(100))
        >>> sample = clean.against(np.arange(50.0, 150.0), np.arange(100))
        >>> sample.auroc.shape, sample.tpr.shape, round(float(sample.auroc.mean()), 2)
        ((1000,), (2, 1000), 0.88)

    Source: Efron, Tibshirani 1993, ch. 13 (percentile interval).
    """

    def __init__(
        self, scores: npt.ArrayLike, ids: Ids, draws: ImageDraws, fprs: Sequence[float] = (0.01, 0.05)
    ) -> None:
        given = _matched("scores", scores, ids)
        order = np.argsort(given, kind="stable")
        self.scores, self.draws = given[order], draws
        counts = draws.of(ids[order])
        # Column i: how many of the drawn scores lie among the i lowest.
        self._up_to = np.concatenate([np.zeros((len(counts), 1), np.int64), counts.cumsum(1)], 1)
        n = self._up_to[:, -1]
        places = [(self._up_to[:, 1:] < (n - allowed(n, fpr))[:, None]).sum(1) for fpr in fprs]
        self._thresholds = [self.scores[np.minimum(place, len(self.scores) - 1)] for place in places]

    def against(self, scores: npt.ArrayLike, ids: Ids) -> Resampled:
        """Figures of an attack in every sample: scores (m,) of attacked images, and the images they were made from.

        NaN for samples without clean or without attacked images.

        Raises:
            InputError: no scores, NaN, or ids that are not one per score.
        """
        above = _matched("scores", scores, ids)
        counts = self.draws.of(ids)
        n, m = self._up_to[:, -1], counts.sum(1)
        left, right = np.searchsorted(self.scores, above, "left"), np.searchsorted(self.scores, above, "right")
        beaten = self._up_to[:, left] + self._up_to[:, right]
        with np.errstate(divide="ignore", invalid="ignore"):
            area = (beaten * counts).sum(1) / (2.0 * n * m)
            shares = [(counts * (above > t[:, None])).sum(1) / m for t in self._thresholds]
        return Resampled(area, np.stack([np.where(n > 0, share, np.nan) for share in shares]))


def _matched(name: str, scores: npt.ArrayLike, ids: Ids) -> Floats:
    given = checked_scores(name, scores)
    if np.shape(ids) != given.shape:
        raise InputError(expected("ids", f"one id for each score, {given.shape}", f"shape {np.shape(ids)}"))
    return given
