"""Figures of a detector: AUROC, detection at a false-alarm rate, their intervals, and the worst case over attacks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.evaluation.detection.bootstrap import allowed, bootstrapped, checked_scores

__all__ = [
    "Figures",
    "Interval",
    "Summary",
    "WorstCase",
    "auroc",
    "enough",
    "figures",
    "mean_and_worst",
    "tpr_at_fpr",
    "worst_case_scores",
]

Floats = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """A figure with the ends of its interval."""

    value: float
    low: float
    high: float


def auroc(clean: npt.ArrayLike, attacked: npt.ArrayLike) -> float:
    """Probability that an attacked image scores higher than a clean one; equal scores count one half.

    Args:
        clean: scores, (n,), greater means more adversarial; infinity is a score, NaN is none.
        attacked: scores, (m,).

    Returns:
        In [0, 1]; 0.5 says nothing.

    Raises:
        InputError: no scores, or NaN.

    Example:
        >>> auroc([0.0, 1.0, 2.0], [1.0, 3.0])
        0.75

    Source: Hanley, McNeil, Radiology 143(1), 1982.
    """
    below, attacked = np.sort(checked_scores("clean", clean)), checked_scores("attacked", attacked)
    twice = np.searchsorted(below, attacked, "left") + np.searchsorted(below, attacked, "right")
    return float(twice.mean()) / (2 * len(below))


def tpr_at_fpr(clean: npt.ArrayLike, attacked: npt.ArrayLike, fpr: float) -> float:
    """Share of attacked images above the least clean score that no more than ``fpr`` of the clean images exceed.

    With equal scores fewer clean images are flagged, never more; with ``fpr`` below 1 / n none.

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
    """What a table says of one detector and one attack.

    Attributes:
        detector: its name.
        attack: its name.
        n_clean: number of clean images.
        n_attacked: number of successful attacks.
        auroc: with its interval; None where there are fewer attacks than were asked for.
        tpr_1: share detected at 1 % false alarms; likewise.
        tpr_5: share detected at 5 % false alarms; likewise.
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
        """Whether there were images enough."""
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
    """The figures of one detector and one attack, with bootstrap intervals.

    Args:
        clean: scores of clean images, (n,).
        attacked: scores of successful attacks, (m,); fewer than ``needed`` are not evaluated.
        detector: its name.
        attack: its name.
        ids: see :func:`bootstrapped`.
        needed: how many attacks, and how many clean images, it takes.
        level: coverage of the intervals, in (0, 1).
        n_resamples: number of bootstrap samples.
        seed: of the samples.

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
    if not (enough(n, needed) and enough(m, needed)):
        return Figures(detector, attack, n, m)
    sample = bootstrapped(clean, attacked, (0.01, 0.05), ids=ids, n_resamples=n_resamples, seed=seed)
    return Figures(
        detector,
        attack,
        n,
        m,
        auroc=Interval(auroc(clean, attacked), *sample.interval(sample.auroc, level)),
        tpr_1=Interval(tpr_at_fpr(clean, attacked, 0.01), *sample.interval(sample.tpr[0], level)),
        tpr_5=Interval(tpr_at_fpr(clean, attacked, 0.05), *sample.interval(sample.tpr[1], level)),
    )


def enough(n: int, needed: int) -> bool:
    """Whether n images will do; what has fewer is called "not evaluated", and stays in the table.

    Example:
        >>> enough(199, 200)
        False
    """
    if needed < 1:
        raise ArgumentError(expected("needed", "a number of images, 1 or more", needed))
    return n >= needed


class WorstCase(NamedTuple):
    """The attacked version of each image that is detected least.

    Attributes:
        ids: of the images that some attack was successful on, rising, (M,).
        scores: (M,).
        attacks: name of the attack that is detected least, for each image.
    """

    ids: npt.NDArray[Any]
    scores: Floats
    attacks: tuple[str, ...]


def worst_case_scores(scores_by_attack: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]) -> WorstCase:
    """Per image the least score over the attacks that were successful on it: a detector has to detect all of them.

    Args:
        scores_by_attack: name of the attack: ids of the images that it was successful on, and their scores, (m,) each,
            all by one and the same fitted detector. An attack without success is left empty.

    Raises:
        InputError: no attacks, ids and scores of unequal length, NaN, or an image twice in one attack.

    Example:
        >>> worst_case_scores({"fgsm": ([1, 2], [5.0, 6.0]), "pgd": ([2, 3], [4.0, 9.0])})
        WorstCase(ids=array([1, 2, 3]), scores=array([5., 4., 9.]), attacks=('fgsm', 'pgd', 'pgd'))

    Source: MEAD, Granese et al., ECML-PKDD 2022 (arXiv 2206.15415), section 3.
    """
    if not scores_by_attack:
        raise InputError(expected("scores_by_attack", "scores of at least one attack", "none"))
    names = list(scores_by_attack)
    all_ids, all_scores = [], []
    for name, (given_ids, given_scores) in scores_by_attack.items():
        ids, scores = np.asarray(given_ids), np.asarray(given_scores, dtype=np.float64)
        if ids.ndim != 1 or ids.shape != scores.shape or np.isnan(scores).any():
            got = "NaN" if ids.shape == scores.shape and ids.ndim == 1 else f"shapes {ids.shape} and {scores.shape}"
            raise InputError(expected("scores_by_attack", f"one id and one number for each image of {name!r}", got))
        if len(np.unique(ids)) < len(ids):
            raise InputError(expected("scores_by_attack", f"each image once in {name!r}", "an image twice"))
        all_ids.append(ids)
        all_scores.append(scores)
    filled = [ids for ids in all_ids if len(ids)]
    ids, scores = np.concatenate(filled or all_ids), np.concatenate(all_scores)
    which = np.repeat(np.arange(len(names)), [len(one) for one in all_ids])
    # By id, and within one by score; of equal scores the attack that was named first.
    order = np.lexsort((which, scores, ids))
    first = order[np.flatnonzero(np.r_[True, ids[order][1:] != ids[order][:-1]])] if len(order) else order
    return WorstCase(ids[first], scores[first], tuple(names[i] for i in which[first]))


@dataclass(frozen=True)
class Summary:
    """Mean and worst over attacks.

    Attributes:
        mean: over the attacks that were evaluated; None where none was.
        worst: the least of them.
        worst_attack: which one; the first of equals.
        n_evaluated: number of attacks.
        not_evaluated: names of those that were not.
    """

    mean: float | None
    worst: float | None
    worst_attack: str | None
    n_evaluated: int
    not_evaluated: tuple[str, ...] = ()


def mean_and_worst(values: Mapping[str, float | None]) -> Summary:
    """Mean and least figure over attacks; those that were not evaluated are named and not counted.

    Args:
        values: name of the attack: its figure; None or NaN where it was not evaluated.

    Raises:
        InputError: no attacks.

    Example:
        >>> mean_and_worst({"fgsm": 1.0, "pgd": 0.75, "jsma": None})
        Summary(mean=0.875, worst=0.75, worst_attack='pgd', n_evaluated=2, not_evaluated=('jsma',))
    """
    if not values:
        raise InputError(expected("values", "figures of at least one attack", "none"))
    known = {name: float(value) for name, value in values.items() if value is not None and not math.isnan(value)}
    missing = tuple(name for name in values if name not in known)
    if not known:
        return Summary(None, None, None, 0, missing)
    worst = min(known, key=lambda name: known[name])
    return Summary(sum(known.values()) / len(known), known[worst], worst, len(known), missing)
