"""False alarms at calibrated thresholds: on clean images, and on images that were altered without an attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ce_plugin.detection.calibration import Rate, rate
from ce_plugin.evaluation.detection.records import Sheet

__all__ = ["Alarms", "false_alarms"]

RATES = (0.01, 0.05)


@dataclass(frozen=True)
class Alarms:
    """How often images that are not attacked are flagged.

    Args:
        rates: set of images -> one :class:`~ce_plugin.detection.calibration.Rate` for each nominal rate.
        due: the interval in which the rate on all clean images is to lie, for each nominal rate: what the number of
            calibration and of test images allow.
        n_calibration: number of calibration images.
    """

    rates: Mapping[str, tuple[Rate, ...]]
    due: tuple[tuple[float, float] | None, ...]
    n_calibration: int

    def held(self) -> tuple[bool | None, ...]:
        """Whether the rate on all clean images lies where it should, for each nominal rate."""
        shares = [one.share for one in self.rates["clean"]]
        return tuple(
            None if ends is None else ends[0] <= share <= ends[1] for share, ends in zip(shares, self.due, strict=True)
        )


def false_alarms(sheet: Sheet, *, level: float = 0.95) -> Alarms:
    """Realised false-alarm rates at the calibrated thresholds of 1 % and 5 %.

    Args:
        sheet: scores; "other misclassified" counts among all clean images, which is what was calibrated on.
        level: coverage of the intervals.

    Example:
        >>> from ce_plugin.detection.calibration import Calibration
        >>> from ce_plugin.evaluation.detection.records import Scored
        >>> sets = {"clean": Scored(np.arange(100), np.arange(100.0)), "other noise": Scored(np.arange(9), np.ones(9))}
        >>> found = false_alarms(Sheet(Calibration(np.arange(999.0) / 10), sets))
        >>> print(found.rates["clean"][1], found.held())
        5.0% [1.6%, 11.3%] of 100 (True, True)
    """
    calibration = sheet.calibration
    right = sheet.sets["clean"].scores
    others = {name.removeprefix("other "): one.scores for name, one in sheet.sets.items() if name.startswith("other ")}
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
