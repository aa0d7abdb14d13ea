"""From scores to tables: each attack, mean and worst, and the worst case per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.harness.protocols import Task
from benchmarks.harness.resampling import CleanScores, ImageDraws
from benchmarks.harness.scores import Scored, ScoreTable
from ce_plugin.errors import InputError, expected
from ce_plugin.evaluation.detectors import (
    RATES,
    Figures,
    Interval,
    Resampled,
    auroc,
    tpr_at_fpr,
)

__all__ = ["DetectionResult", "Evaluation", "WorstCase", "evaluate", "pooled", "worst_case_scores"]

Floats = npt.NDArray[np.float64]
WORST_CASE = "worst case per image"


class WorstCase(NamedTuple):
    """The attacked version of each image with the lowest score.

    Attributes:
        ids: ids of the images with at least one successful attack, ascending, (M,).
        scores: (M,).
        attacks: name of the attack with the lowest score, for each image.
    """

    ids: npt.NDArray[Any]
    scores: Floats
    attacks: tuple[str, ...]


def worst_case_scores(scores_by_attack: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]) -> WorstCase:
    """For each image the lowest score over the attacks that succeeded on it, since a detector must detect all of them.

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
    # By id, then by score; of equal scores the attack that comes first.
    order = np.lexsort((which, scores, ids))
    first = order[np.flatnonzero(np.r_[True, ids[order][1:] != ids[order][:-1]])] if len(order) else order
    return WorstCase(ids[first], scores[first], tuple(names[i] for i in which[first]))


@dataclass(frozen=True)
class DetectionResult:
    """One detector against one attack.

    Args:
        figures: with intervals; their values are None if there are too few images.
        samples: the same for every bootstrap sample; None if there are too few images.
        excluded: whether the attack is left out of means.
    """

    figures: Figures
    samples: Resampled | None = field(default=None, repr=False)
    excluded: bool = False


@dataclass(frozen=True)
class Evaluation:
    """One detector on one problem by one protocol: of one classifier, or the mean over several.

    Args:
        attacks: attack -> figures.
        worst_case: for each image the attack with the lowest score; None if the protocol has no such figure.
        mean: AUROC, mean over the attacks that were evaluated and are not excluded; None if there are none.
        worst: the lowest of these, with that attack's interval.
        worst_attack: name of that attack.
        tpr_1, tpr_5: detection at 1 % and 5 % false alarms, mean over the same attacks.
        mean_samples: ``mean`` in every bootstrap sample.
        n_seeds: number of classifiers.
    """

    attacks: Mapping[str, DetectionResult]
    worst_case: DetectionResult | None
    mean: Interval | None = None
    worst: Interval | None = None
    worst_attack: str | None = None
    tpr_1: Interval | None = None
    tpr_5: Interval | None = None
    mean_samples: Floats | None = field(default=None, repr=False)
    n_seeds: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The entry in a JSON file."""
        whole = {name: getattr(self, name) for name in ("mean", "worst", "worst_attack", "tpr_1", "tpr_5", "n_seeds")}
        rows = [one.figures.to_dict() | {"excluded": one.excluded} for one in self.attacks.values()]
        least = None if self.worst_case is None else self.worst_case.figures.to_dict()
        return {**whole, "attacks": rows, "worst_case": least}


def evaluate(
    tasks: Sequence[Task],
    score_tables: Mapping[str, ScoreTable],
    draws: ImageDraws,
    *,
    detector: str,
    needed: int = 200,
    excluded: Sequence[str] = (),
    worst_case: bool = True,
    among: npt.NDArray[np.int64] | None = None,
    level: float = 0.95,
) -> Evaluation:
    """The figures of one detector for one classifier.

    If a protocol has several fits, whose scores are on different scales, each score is replaced by the share of clean
    images with a lower score under the same fit.

    Args:
        tasks: tasks of the protocol.
        score_tables: key of the task -> scores.
        draws: the bootstrap samples, of all test images.
        detector: name of the detector.
        needed: least number of successes, and of clean images, for an attack to be evaluated.
        excluded: attacks left out of means and of the worst case.
        worst_case: whether to compute the worst case per image.
        among: ids of the images that every attack was run on, to which the worst case is restricted; None means all.
            An image that few attacks were run on would look easier than it is.
        level: coverage of the intervals.

    Raises:
        InputError: no scores of a task.

    Example:
        >>> from ce_plugin.detection.calibration import Calibration
        >>> task = Task("all", (), "pool", ("fgsm", "jsma"))
        >>> ids, scores = np.arange(100), np.arange(100.0)
        >>> sets = {"clean": Scored(ids, scores), "attack fgsm": Scored(ids, scores + 50)}
        >>> table = ScoreTable(Calibration(scores), {**sets, "attack jsma": Scored(ids[:3], scores[:3])})
        >>> found = evaluate((task,), {"all": table}, ImageDraws(100), detector="margin", needed=50)
        >>> print(found.attacks["fgsm"].figures)
        margin, fgsm: AUROC 0.875 [0.847, 0.905], 51.0% at 1 %, 55.0% at 5 % false alarms
        >>> print(found.attacks["jsma"].figures)
        margin, jsma: not evaluated (3 successful attacks)
        >>> found.worst_attack, round(found.mean.value, 3)
        ('fgsm', 0.875)
    """
    missing = [task.key for task in tasks if task.key not in score_tables]
    if missing or not tasks:
        raise InputError(expected("score_tables", "scores of each task of the protocol", f"none of {missing or 'any'}"))
    names = list(dict.fromkeys(name for task in tasks for name in task.tries))
    sides: dict[tuple[str, ...], tuple[CleanScores, int]] = {}
    results, attacked = {}, {}
    for name in names:
        mine = [task for task in tasks if name in task.tries]
        keys = tuple(task.key for task in mine)
        ranked = len(tasks) > 1
        clean, attacked[name] = _of_tasks([score_tables[key] for key in keys], name, ranked)
        if keys not in sides:
            sides[keys] = CleanScores(clean.scores, clean.ids, draws, RATES), len(clean.ids)
        results[name] = _result(detector, name, sides[keys][0], attacked[name], needed, level, name in excluded)
    counted = {name: one for name, one in attacked.items() if name not in excluded}
    least = None
    if worst_case and any(len(_among(one, among)[0]) for one in counted.values()):
        found = worst_case_scores({name: _among(one, among) for name, one in counted.items()})
        side = next(iter(sides.values()))[0]
        least = _result(detector, WORST_CASE, side, Scored(found.ids, found.scores), needed, level, False)
    return _summed(results, least, level)


def pooled(evaluations: Sequence[Evaluation], *, level: float = 0.95) -> Evaluation:
    """The mean over classifiers with the same test images and the same draws.

    An attack counts for those classifiers on which it had enough successes; the number attacked is the sum. Intervals
    are those of the mean over classifiers: the same images are drawn for all of them, classifiers are not resampled.

    Raises:
        InputError: no evaluations.

    Example:
        >>> from ce_plugin.detection.calibration import Calibration
        >>> ids, scores = np.arange(100), np.arange(100.0)
        >>> sets = {"clean": Scored(ids, scores), "attack a": Scored(ids, scores + 50)}
        >>> table = ScoreTable(Calibration(scores), sets)
        >>> task = Task("all", (), "pool", ("a",))
        >>> one = evaluate((task,), {"all": table}, ImageDraws(100), detector="margin", needed=50)
        >>> pooled([one, one]).mean == one.mean
        True
    """
    if not evaluations:
        raise InputError(expected("evaluations", "at least one", "none"))
    names = list(dict.fromkeys(name for one in evaluations for name in one.attacks))
    results = {name: _mean([one.attacks[name] for one in evaluations if name in one.attacks], level) for name in names}
    least = [one.worst_case for one in evaluations if one.worst_case is not None]
    return _summed(results, _mean(least, level) if least else None, level, len(evaluations))


def _of_tasks(score_tables: Sequence[ScoreTable], name: str, ranked: bool) -> tuple[Scored, Scored]:
    """Clean and attacked scores of an attack, for all folds together."""
    clean, attacked = [], []
    for table in score_tables:
        below, above = table.sets["clean"], table.sets[f"attack {name}"]
        if ranked:
            order = np.sort(below.scores)
            clean.append(Scored(below.ids, _share_below(order, below.scores)))
            attacked.append(Scored(above.ids, _share_below(order, above.scores)))
        else:
            clean.append(below)
            attacked.append(above)
    return _joined(clean), _joined(attacked)


def _among(one: Scored, ids: npt.NDArray[np.int64] | None) -> tuple[npt.NDArray[np.int64], Floats]:
    """Ids and scores of some of the images."""
    rows = np.ones(len(one.ids), bool) if ids is None else np.isin(one.ids, ids)
    return one.ids[rows], one.scores[rows]


def _share_below(order: Floats, scores: Floats) -> Floats:
    """Share of clean scores below, equal ones counting one half."""
    twice = np.searchsorted(order, scores, "left") + np.searchsorted(order, scores, "right")
    share: Floats = twice / (2 * len(order))
    return share


def _joined(parts: Sequence[Scored]) -> Scored:
    return Scored(np.concatenate([one.ids for one in parts]), np.concatenate([one.scores for one in parts]))


def _result(
    detector: str, attack: str, clean: CleanScores, attacked: Scored, needed: int, level: float, excluded: bool
) -> DetectionResult:
    n, m = len(clean.scores), len(attacked.ids)
    if min(n, m) < needed:
        return DetectionResult(Figures(detector, attack, n, m), excluded=excluded)
    samples = clean.against(attacked.scores, attacked.ids)
    values = (auroc(clean.scores, attacked.scores), *(tpr_at_fpr(clean.scores, attacked.scores, f) for f in RATES))
    ends = [samples.interval(one, level) for one in (samples.auroc, *samples.tpr)]
    three = [Interval(value, *end) for value, end in zip(values, ends, strict=True)]
    return DetectionResult(Figures(detector, attack, n, m, *three), samples, excluded)


def _average(known: Sequence[DetectionResult], level: float) -> tuple[list[Interval], Resampled]:
    """Mean AUROC and detection rates of what was evaluated, with the intervals of the means."""
    resampled = [one.samples for one in known if one.samples is not None]
    samples = Resampled(
        np.mean([one.auroc for one in resampled], axis=0), np.mean([one.tpr for one in resampled], axis=0)
    )
    three = [
        Interval(float(np.mean([getattr(one.figures, name).value for one in known])), *samples.interval(which, level))
        for name, which in zip(("auroc", "tpr_1", "tpr_5"), (samples.auroc, *samples.tpr), strict=True)
    ]
    return three, samples


def _mean(results: Sequence[DetectionResult], level: float) -> DetectionResult:
    """The mean over classifiers, with the interval of the mean."""
    first = results[0].figures
    n, m = (sum(getattr(one.figures, name) for one in results) for name in ("n_clean", "n_attacked"))
    known = [one for one in results if one.samples is not None]
    if not known:
        return DetectionResult(Figures(first.detector, first.attack, n, m), excluded=results[0].excluded)
    three, samples = _average(known, level)
    return DetectionResult(Figures(first.detector, first.attack, n, m, *three), samples, results[0].excluded)


def _summed(
    results: Mapping[str, DetectionResult], least: DetectionResult | None, level: float, n_seeds: int = 1
) -> Evaluation:
    """Mean and worst over the attacks that count."""
    counted = {name: one for name, one in results.items() if not one.excluded and one.samples is not None}
    values = {name: one.figures.auroc.value for name, one in counted.items() if one.figures.auroc is not None}
    if not values:
        return Evaluation(results, least, n_seeds=n_seeds)
    attack = min(values, key=lambda name: values[name])
    (mean, tpr_1, tpr_5), samples = _average(list(counted.values()), level)
    return Evaluation(results, least, mean, results[attack].figures.auroc, attack, tpr_1, tpr_5, samples.auroc, n_seeds)
