"""How good is a detector? AUROC and detection rates with bootstrap intervals, and realised false-alarm rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ce_plugin.detection.calibration import Calibration, Rate, rate
from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import numpy_generator

# The false-alarm rates that are reported.
RATES = (0.01, 0.05)


Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

# Weights of bootstrap samples held in memory at a time, about.
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
        """Percentile interval, without the samples that hold no clean or no attacked images (their values are NaN)."""
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
    """AUROC and detection rates in bootstrap samples of the images; the threshold is computed again in each sample.

    Args:
        clean: scores, (n,).
        attacked: scores, (m,).
        fprs: false-alarm rates.
        ids: ids of the clean images, (n,), and of the images that were attacked, (m,): an image is then drawn
            together with all its attacked versions. None draws clean and attacked images separately.
        n_resamples: number B of samples.
        seed: seed of the draws. The order of the images does not matter.

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
    # scipy.stats.bootstrap resamples the two sets independently, or in pairs. Here an image is drawn together with any
    # number of attacked versions, and one threshold per sample serves all the statistics.
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
    """Index of each score's image, with the scores in ascending order, when both sets are drawn together."""
    names = [np.asarray(one) for one in ids]
    for name, order in zip(names, (first, second), strict=True):
        if name.shape != order.shape:
            raise InputError(expected("ids", f"one id for each score, {order.shape}", f"shape {name.shape}"))
    unique, places = np.unique(np.concatenate([names[0][first], names[1][second]]), return_inverse=True)
    return [places[: len(first)], places[len(first) :]], [len(unique)]


def _weights(
    images: list[Whole], sizes: list[int], n_resamples: int, generator: np.random.Generator
) -> Iterator[tuple[Whole, Whole]]:
    """How often each clean and each attacked score was drawn, (b, n) and (b, m), a few samples at a time."""
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
    """Statistics when each image counts as often as it was drawn; scores in ascending order."""
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
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN where a sample holds no attacked image
        area = (beaten * attacked_weights).sum(1) / (2.0 * n * m)
        for row, fpr in enumerate(fprs):
            place = (clean_up_to[:, 1:] < (n - allowed(n, fpr))[:, None]).sum(1)
            missed = attacked_up_to[np.arange(rows), higher[np.minimum(place, len(below) - 1)]]
            tpr[row] = np.where(n > 0, (m - missed) / m, np.nan)
    return Resampled(area, tpr)


def checked_scores(name: str, scores: npt.ArrayLike) -> Floats:
    """The scores as float64, (n,)."""
    checked = np.asarray(scores, dtype=np.float64)
    if checked.ndim != 1 or not checked.size or np.isnan(checked).any():
        got = "NaN" if checked.ndim == 1 and checked.size else f"shape {checked.shape}"
        raise InputError(expected(name, "one number for each image, (N,), N >= 1", got))
    return checked


def allowed(n: Whole, fpr: float) -> Whole:
    """The greatest j < n with j / n <= fpr: so many of n clean images may be flagged."""
    if not 0 <= fpr < 1:
        raise ArgumentError(expected("fpr", "a rate in [0, 1)", fpr, "Write 0.05 for 5 %."))
    j = np.floor(fpr * n).astype(np.int64)
    exact: Whole = j + ((j + 1) / np.maximum(n, 1) <= fpr) - (j / np.maximum(n, 1) > fpr)
    return exact


class Interval(NamedTuple):
    """A value with the ends of its confidence interval."""

    value: float
    low: float
    high: float


def auroc(clean: npt.ArrayLike, attacked: npt.ArrayLike) -> float:
    """Probability that an attacked image scores higher than a clean one; equal scores count one half.

    Args:
        clean: scores, (n,), greater means more adversarial; infinity is allowed, NaN is not.
        attacked: scores, (m,).

    Returns:
        In [0, 1]; 0.5 is chance.

    Raises:
        InputError: no scores, or NaN.

    Example:
        >>> auroc([0.0, 1.0, 2.0], [1.0, 3.0])
        0.75

    Source: Hanley, McNeil, Radiology 143(1), 1982.
    """
    with state_guard():  # its first import moves the global random state
        from sklearn.metrics import roc_auc_score

    below, above = checked_scores("clean", clean), checked_scores("attacked", attacked)
    # Ranks instead of scores: scikit-learn raises an error on infinity.
    places = np.unique(np.concatenate([below, above]), return_inverse=True)[1]
    return float(roc_auc_score(np.repeat([0, 1], [len(below), len(above)]), places))


def tpr_at_fpr(clean: npt.ArrayLike, attacked: npt.ArrayLike, fpr: float) -> float:
    """Share of attacked images that are detected when at most a share ``fpr`` of the clean images is flagged.

    Tied clean scores make the realised rate lower, never higher; with ``fpr`` below 1 / n no clean image is flagged.

    Args:
        clean: scores, (n,).
        attacked: scores, (m,).
        fpr: in [0, 1).

    Returns:
        In [0, 1].

    Raises:
        InputError: no scores, or NaN.
        ArgumentError: a rate outside [0, 1).

    Example:
        >>> tpr_at_fpr([1.0, 2.0, 3.0, 4.0], [3.0, 3.5, 9.0], 0.25)
        0.6666666666666666
    """
    below = np.sort(checked_scores("clean", clean))
    threshold = below[len(below) - 1 - int(allowed(np.array([len(below)]), fpr)[0])]
    return float((checked_scores("attacked", attacked) > threshold).mean())


@dataclass(frozen=True)
class Figures:
    """Results of one detector on one attack.

    Attributes:
        detector: name of the detector.
        attack: name of the attack.
        n_clean: number of clean images.
        n_attacked: number of successful attacks.
        auroc: with its interval; None if there are fewer attacks or clean images than ``needed``.
        tpr_1: share detected at 1 % false alarms, with its interval; None likewise.
        tpr_5: share detected at 5 % false alarms, with its interval; None likewise.
    """

    detector: str
    attack: str
    n_clean: int
    n_attacked: int
    auroc: Interval | None = None
    tpr_1: Interval | None = None
    tpr_5: Interval | None = None

    @property
    def evaluated(self) -> bool:
        """Whether there were enough images."""
        return self.auroc is not None

    def to_dict(self) -> dict[str, Any]:
        """One row of a table: ``auroc``, ``auroc_low``, ``auroc_high`` ..., None where not evaluated."""
        row: dict[str, Any] = {
            "detector": self.detector,
            "attack": self.attack,
            "n_clean": self.n_clean,
            "n_attacked": self.n_attacked,
            "evaluated": self.evaluated,
        }
        for name in ("auroc", "tpr_1", "tpr_5"):
            figure = getattr(self, name)
            ends = figure if figure is not None else (None, None, None)
            row.update(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        return row

    def __str__(self) -> str:
        if self.auroc is None or self.tpr_1 is None or self.tpr_5 is None:
            return f"{self.detector}, {self.attack}: not evaluated ({self.n_attacked} successful attacks)"
        value, low, high = self.auroc
        return (
            f"{self.detector}, {self.attack}: AUROC {value:.3f} [{low:.3f}, {high:.3f}], "
            f"{self.tpr_1.value:.1%} at 1 %, {self.tpr_5.value:.1%} at 5 % false alarms"
        )


def figures(
    clean: npt.ArrayLike,
    attacked: npt.ArrayLike,
    *,
    detector: str,
    attack: str,
    ids: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    needed: int = 1,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Figures:
    """Results of one detector on one attack, with bootstrap intervals.

    Args:
        clean: scores of clean images, (n,).
        attacked: scores of successful attacks, (m,).
        detector: name of the detector.
        attack: name of the attack.
        ids: see :func:`bootstrapped`.
        needed: least number of attacks, and of clean images; with fewer nothing is evaluated.
        level: coverage of the intervals, in (0, 1).
        n_resamples: number of bootstrap samples.
        seed: seed of the samples.

    Raises:
        InputError: NaN, or ids that are not one per score.
        ArgumentError: a level outside (0, 1), or ``needed`` or ``n_resamples`` below 1.

    Example:
        >>> print(figures(np.arange(100.0), np.arange(50.0, 150.0), detector="margin", attack="fgsm"))
        margin, fgsm: AUROC 0.875 [0.828, 0.917], 51.0% at 1 %, 55.0% at 5 % false alarms
        >>> print(figures(np.arange(100.0), np.arange(3.0), detector="margin", attack="jsma", needed=200))
        margin, jsma: not evaluated (3 successful attacks)
    """
    n, m = np.size(clean), np.size(attacked)
    if not 0 < level < 1:
        raise ArgumentError(expected("level", "a probability in (0, 1)", level, "Write 0.95 for 95 %."))
    if needed < 1:
        raise ArgumentError(expected("needed", "a number of images, 1 or more", needed))
    if min(n, m) < needed:
        return Figures(detector, attack, n, m)
    sample = bootstrapped(clean, attacked, RATES, ids=ids, n_resamples=n_resamples, seed=seed)
    return Figures(
        detector,
        attack,
        n,
        m,
        auroc=Interval(auroc(clean, attacked), *sample.interval(sample.auroc, level)),
        tpr_1=Interval(tpr_at_fpr(clean, attacked, 0.01), *sample.interval(sample.tpr[0], level)),
        tpr_5=Interval(tpr_at_fpr(clean, attacked, 0.05), *sample.interval(sample.tpr[1], level)),
    )


@dataclass(frozen=True)
class Alarms:
    """How often images that are not attacked are flagged.

    Args:
        rates: set of images -> one :class:`~ce_plugin.detection.calibration.Rate` for each nominal rate.
        due: for each nominal rate, the interval in which the rate on all clean images should lie, given the numbers of
            calibration and of test images.
        n_calibration: number of calibration images.
    """

    rates: Mapping[str, tuple[Rate, ...]]
    due: tuple[tuple[float, float] | None, ...]
    n_calibration: int

    def held(self) -> tuple[bool | None, ...]:
        """Whether the rate on all clean images is inside ``due``, for each nominal rate."""
        shares = [one.share for one in self.rates["clean"]]
        return tuple(
            None if ends is None else ends[0] <= share <= ends[1] for share, ends in zip(shares, self.due, strict=True)
        )


def false_alarms(calibration: Calibration, scores: Mapping[str, Floats], *, level: float = 0.95) -> Alarms:
    """Realised false-alarm rates at the calibrated thresholds of 1 % and 5 %.

    Args:
        calibration: scores of clean images that the detector was not fitted on.
        scores: of images that are not attacked, by set: "clean" are those that the classifier gets right;
            "misclassified" ones count as clean images too, since calibration includes them; other sets by their names.
        level: coverage of the intervals.

    Example:
        >>> from ce_plugin.detection import Calibration
        >>> scores = {"clean": np.arange(100.0), "noise": np.ones(9)}
        >>> found = false_alarms(Calibration(np.arange(999.0) / 10), scores)
        >>> print(found.rates["clean"][1], found.held())
        5.0% [1.6%, 11.3%] of 100 (True, True)
    """
    right, others = scores["clean"], {name: one for name, one in scores.items() if name != "clean"}
    wrong = others.get("misclassified", np.zeros(0))
    sets = {"clean": np.concatenate([right, wrong]), "correct": right, **others}
    resolved = [calibration.smallest_fpr <= nominal for nominal in RATES]
    thresholds = [calibration.threshold(nominal) if ok else np.inf for nominal, ok in zip(RATES, resolved, strict=True)]
    rates = {
        name: tuple(rate(scores > threshold, level) for threshold in thresholds)
        for name, scores in sets.items()
        if len(scores)
    }
    n = len(sets["clean"])
    due = tuple(
        calibration.realised_interval(nominal, level, n_test=n) if ok else None
        for nominal, ok in zip(RATES, resolved, strict=True)
    )
    return Alarms(rates, due, calibration.n)
