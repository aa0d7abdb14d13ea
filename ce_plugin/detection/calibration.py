"""Split-conformal calibration: from scores to p-values and to a threshold that holds its false-alarm rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ce_plugin.errors import ArgumentError, InputError, check_integer, check_number, expected

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """The scores of clean images that the detector was not fitted on: new scores are compared with them.

    For a clean image exchangeable with these n, the p-value (1 + #{calibration >= s}) / (n + 1) is at most a with
    probability at most a, whatever the scores' distribution; with equal scores it is conservative.

    Args:
        scores: (n,), finite, greater means more adversarial. Kept sorted, float64, and not writable.

    Raises:
        InputError: no scores, not one per image, or not finite.

    Example:
        >>> calibration = Calibration(np.arange(99.0))
        >>> calibration.p_values(np.array([98.5, 98.0, -1.0])).tolist()
        [0.01, 0.02, 1.0]
        >>> calibration.threshold(0.05), calibration.smallest_fpr
        (94.0, 0.01)

    Source: Vovk, Gammerman, Shafer 2005, ch. 2 (inductive conformal prediction); as a test of outliers Bates, Candes,
    Lei, Romano, Sesia, Annals of Statistics 51(1), 2023, Eq. 1.
    """

    scores: Scores

    def __post_init__(self) -> None:
        scores = _numbers(self.scores)
        if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
            got = f"shape {scores.shape}" if scores.ndim != 1 or not scores.size else "NaN or infinity"
            raise InputError(expected("scores", "one finite number for each calibration image, (n,), n >= 1", got))
        scores.sort()
        scores.flags.writeable = False
        object.__setattr__(self, "scores", scores)

    @property
    def n(self) -> int:
        """Number of calibration images."""
        return len(self.scores)

    @property
    def smallest_fpr(self) -> float:
        """The smallest false-alarm rate that these images can resolve, 1 / (n + 1)."""
        return 1 / (self.n + 1)

    def p_values(self, scores: npt.ArrayLike) -> Scores:
        """(1 + #{calibration >= s}) / (n + 1), in [1 / (n + 1), 1].

        Args:
            scores: (N,); infinity is a score, NaN is none.

        Returns:
            (N,).

        Raises:
            InputError: NaN.
        """
        given = _numbers(scores)
        if np.isnan(given).any():
            raise InputError(expected("scores", "numbers", "NaN"))
        at_least = self.n - np.searchsorted(self.scores, given, side="left")
        p: Scores = (1 + at_least) / (self.n + 1)
        return p

    def threshold(self, fpr: float) -> float:
        """The score above which, strictly, an image is flagged: ``score > threshold`` is ``p_value <= fpr``.

        It is the calibration score of rank k from above, k = floor(fpr (n + 1)).

        Args:
            fpr: false-alarm rate on clean images, in (0, 1).

        Raises:
            ArgumentError: not in (0, 1), or smaller than the calibration images can resolve.
        """
        return float(self.scores[self.n - _rank(self.n, fpr)])

    def realised_interval(self, fpr: float, level: float = 0.95, *, n_test: int | None = None) -> tuple[float, float]:
        """Interval of the false-alarm rate of :meth:`threshold`: see :func:`realised_interval`."""
        return realised_interval(self.n, fpr, level, n_test=n_test)

    def __repr__(self) -> str:
        return f"Calibration({self.n} scores, smallest_fpr={self.smallest_fpr:.2g})"


def realised_interval(n: int, fpr: float, level: float = 0.95, *, n_test: int | None = None) -> tuple[float, float]:
    """Central interval of the false-alarm rate that a threshold calibrated on n images turns out to have.

    The threshold is an order statistic of n scores; with continuous scores its true rate is Beta(k, n + 1 - k),
    k = floor(fpr (n + 1)), whatever their distribution; with equal scores it is no greater. Among ``n_test`` new clean
    images the number flagged is beta-binomial.

    Args:
        n: number of calibration images.
        fpr: nominal false-alarm rate, in (0, 1).
        level: probability of the interval, in (0, 1).
        n_test: number of test images on which the rate is measured; None gives the interval of the true rate.

    Returns:
        (low, high): rates.

    Raises:
        ArgumentError: see :meth:`Calibration.threshold`; a level outside (0, 1); no test images.

    Example:
        >>> [round(end, 3) for end in realised_interval(500, 0.05)]
        [0.033, 0.071]
        >>> [round(end, 3) for end in realised_interval(500, 0.05, n_test=200)]
        [0.02, 0.09]

    Source: Vovk, ACML 2012 (arXiv 1209.2673), Prop. 2a and 2b.
    """
    check_integer("n", n, "a number of images", least=0)
    rank, tail = _rank(n, fpr), (1 - _level(level)) / 2
    if n_test is not None:
        check_integer("n_test", n_test, "a number of images, 1 or more, or None", least=1)
    from scipy import stats

    if n_test is None:
        law = stats.beta(rank, n + 1 - rank)
        return float(law.ppf(tail)), float(law.ppf(1 - tail))
    count = stats.betabinom(n_test, rank, n + 1 - rank)
    return float(count.ppf(tail)) / n_test, float(count.ppf(1 - tail)) / n_test


@dataclass(frozen=True)
class Rate:
    """A share of images, with its interval.

    Attributes:
        share: flagged / n.
        low: lower end of the Clopper-Pearson interval.
        high: upper end.
        n_flagged: number of images that were flagged.
        n: number of images.
        level: coverage of the interval.
    """

    share: float
    low: float
    high: float
    n_flagged: int
    n: int
    level: float

    def to_dict(self) -> dict[str, Any]:
        """What a table or a JSON file holds."""
        return dict(vars(self))

    def __str__(self) -> str:
        return f"{self.share:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.n}"


def rate(flags: npt.ArrayLike, level: float = 0.95) -> Rate:
    """Share of flagged images with its Clopper-Pearson interval, which covers at least at its level.

    Args:
        flags: (N,), bool, N >= 1.
        level: coverage, in (0, 1).

    Raises:
        InputError: no flags, or not boolean.
        ArgumentError: a level outside (0, 1).

    Example:
        >>> print(rate([True, False, False, False]))
        25.0% [0.6%, 80.6%] of 4

    Source: Clopper, Pearson, Biometrika 26(4), 1934.
    """
    flagged = np.asarray(flags)
    if flagged.ndim != 1 or not flagged.size or flagged.dtype != np.bool_:
        got = f"shape {flagged.shape} of {flagged.dtype}"
        raise InputError(expected("flags", "one boolean for each image, (N,), N >= 1", got))
    _level(level)
    from scipy import stats

    n, k = int(flagged.size), int(flagged.sum())
    interval = stats.binomtest(k, n).proportion_ci(level, method="exact")
    return Rate(share=k / n, low=float(interval.low), high=float(interval.high), n_flagged=k, n=n, level=level)


def _numbers(scores: npt.ArrayLike) -> Scores:
    try:
        return np.array(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(expected("scores", "numbers", type(scores).__name__)) from error


def _level(level: float) -> float:
    return check_number("level", level, "a probability in (0, 1)", above=0, below=1, hint="Write 0.95 for 95 %.")


def _rank(n: int, fpr: float) -> int:
    """The greatest k with k / (n + 1) <= fpr, in the arithmetic in which p-values are compared with it."""
    check_number("fpr", fpr, "a rate in (0, 1)", above=0, below=1, hint="Write 0.05 for 5 %.")
    rank = math.floor(fpr * (n + 1))
    if (rank + 1) / (n + 1) <= fpr:
        rank += 1
    elif rank / (n + 1) > fpr:
        rank -= 1
    if rank < 1:
        needed = math.ceil(1 / fpr) - 1
        raise ArgumentError(
            expected(
                "fpr",
                f"at least 1 / {n + 1}, which is what {n} calibration images can resolve",
                fpr,
                f"It takes {max(needed, n + 1)} calibration images.",
            )
        )
    return min(rank, n)
