"""The adaptive attack over all classifiers, and what was asked of it in advance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.detection._adaptive_row import Row
from benchmarks.detection._detectors import LAST_LAYER, label
from benchmarks.detection._results import TITLES
from benchmarks.detection._text_table import Table, interval, met, number, percent
from ce_plugin.evaluation import Interval

BARS = {0.1: 0.65, 0.3: 0.05}
"""eps -> AUROC that the attack is to reach against Mahalanobis on MNIST, written before anything was measured."""
AGAINST = ("mahalanobis", LAST_LAYER)
_WORDS = (
    "Mean over classifiers of the figures below, with the interval of the mean: a test image is drawn for all "
    "classifiers that it was attacked on."
)
_ASKED = (
    "The bar is on the attack, not on a detector. The detector's paper measures the distance in several layers; much "
    "code measures it in the last one. Both are attacked."
)


@dataclass(frozen=True)
class Mean:
    """One detector at one eps, over the classifiers that it was attacked on.

    Args:
        problem, detector, eps: which.
        seeds: the classifiers.
        n: images attacked on each.
        auroc: of the images that end misclassified, mean over classifiers where there are any; None: nowhere.
        evades: share of the attacked images, mean over classifiers.
    """

    problem: str
    detector: str
    eps: float
    seeds: tuple[int, ...]
    n: tuple[int, ...]
    auroc: Interval | None
    evades: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Mean:
        """The mean of some rows, one for each classifier, of one detector at one eps."""
        figures = [row.over_successes.auroc for row in rows]
        values = [figure.value for figure in figures if figure is not None]
        samples = [row.sample for row in rows if row.sample is not None]
        found = None
        if samples:
            low, high = np.nanquantile(np.mean(samples, axis=0), [0.025, 0.975])
            found = Interval(float(np.mean(values)), float(low), float(high))
        first, evades = rows[0], float(np.mean([row.evades for row in rows]))
        seeds, n = tuple(row.seed for row in rows), tuple(row.n for row in rows)
        return cls(first.problem, first.detector, first.eps, seeds, n, found, evades)

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds; an unbounded eps is "inf"."""
        found = None if self.auroc is None else [round(value, 5) for value in self.auroc]
        about = {"problem": self.problem, "detector": self.detector, "eps": f"{self.eps:g}"}
        return about | {"seeds": self.seeds, "n": self.n, "auroc": found, "evades": round(self.evades, 5)}


def means(rows: Iterable[Row]) -> list[Mean]:
    """One for each problem, detector and eps, in the order of the rows."""
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.problem, row.detector, row.eps), []).append(row)
    return [Mean.of(group) for group in groups.values()]


def over_classifiers(found: Sequence[Mean]) -> Table:
    """The means, one row for each detector."""
    bounds = sorted({one.eps for one in found})
    rows = []
    for problem, detector in dict.fromkeys((one.problem, one.detector) for one in found):
        mine = {one.eps: one for one in found if (one.problem, one.detector) == (problem, detector)}
        images = attacked(one.n for one in mine.values())
        cells = [_cell(mine[eps]) if eps in mine else "-" for eps in bounds]
        rows.append([TITLES[problem], label(detector), images, *cells])
    header = ["problem", "detector", "images", *(f"eps {eps:g}" for eps in bounds)]
    return Table("Over classifiers", [_WORDS], header, rows)


def asked(found: Sequence[Mean]) -> Table:
    """The bar of the issue, and whether the attack clears it."""
    rows = []
    for detector in AGAINST:
        for eps, most in BARS.items():
            for one in found:
                if (one.problem, one.detector) == ("mnist", detector) and math.isclose(one.eps, eps):
                    reached = one.auroc is not None and one.auroc.value <= most
                    cells = [f"{eps:g}", f"at most {number(most)}", interval(one.auroc), met(reached)]
                    rows.append([label(detector), *cells])
    words = [_ASKED] if rows else ["Mahalanobis has not been attacked on MNIST yet."]
    return Table("What was asked for in advance", words, ["against", "eps", "AUROC asked", "found", ""], rows)


def attacked(counts: Iterable[Sequence[int]]) -> str:
    """Images attacked on each classifier, where eps differ the fewest: "200, 100, 100"."""
    return ", ".join(map(str, min(counts, key=sum)))


def _cell(one: Mean) -> str:
    return f"{interval(one.auroc)} / {percent(one.evades)}"
