"""What a page shows of a detector: words, numbers and pictures, ready for the templates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ce_plugin.report.detector_findings import AlarmShown, AttackTried, DetectorTrial
from ce_plugin.report.words import cell, percent, probability, signed
from ce_plugin.visualization import data_uri, magnify, overlay, plot_roc, plot_scores

if TYPE_CHECKING:
    from ce_plugin.detection import Alarm, Rate, UnusualEffect
    from ce_plugin.evaluation import Interval

__all__ = ["alarm", "evaluation_section", "verdict_words"]

_VERDICTS, _EFFECTS = 5, 4
ClassName = Callable[[int], str]


def evaluation_section(trial: DetectorTrial, class_name: ClassName) -> dict[str, Any]:
    """A detector's figures, curves and examples."""
    scores = {one.attack: one.scores for one in trial.tried if len(one.scores)}
    pictures = []
    if scores:
        roc = plot_roc(trial.clean[trial.right], scores, fpr=trial.fpr, title="Detected at each false-alarm rate")
        histogram = plot_scores(trial.calibration.scores, trial.threshold, scores, title="Scores")
        pictures = [
            {"uri": data_uri(roc), "alt": "ROC curves"},
            {"uri": data_uri(histogram), "alt": "histogram of scores with the threshold"},
        ]
    low, high = trial.due
    return {
        "n_pictures": len(trial.right),
        "n_right": int(sum(trial.right)),
        "truth_known": trial.truth_known,
        "fpr": percent(trial.fpr),
        "threshold": f"{trial.threshold:.3g}",
        "n_calibration": trial.calibration.n,
        "false_alarms": _rate(trial.false_alarms),
        "due": f"{percent(low)} to {percent(high)}",
        "held": low <= trial.false_alarms.share <= high,
        "passes": f"{trial.passes:g}",
        "milliseconds": f"{1000 * trial.seconds:.3g}",
        "adaptive": any(one.attack.startswith("adaptive") for one in trial.tried),
        "rows": [_row(one) for one in trial.tried],
        "pictures": pictures,
        "examples": [
            {**alarm(shown, class_name), "attack": one.attack.upper()} for one in trial.tried for shown in one.shown
        ],
    }


def _row(one: AttackTried) -> dict[str, Any]:
    found = one.figures
    return {
        "attack": one.attack.upper(),
        "words": one.words,
        "tried": one.n_tried,
        "successes": len(one.scores),
        "auroc": _number(found.auroc),
        "tpr_1": _share(found.tpr_1),
        "tpr_5": _share(found.tpr_5),
        "flagged": "—" if one.flagged is None else _rate(one.flagged),
    }


def _number(figure: Interval | None) -> str:
    return "not evaluated" if figure is None else f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def _share(figure: Interval | None) -> str:
    return "—" if figure is None else f"{percent(figure.value)} [{100 * figure.low:.0f}, {100 * figure.high:.0f}]"


def _rate(found: Rate) -> str:
    return f"{percent(found.share)} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def alarm(shown: AlarmShown, class_name: ClassName) -> dict[str, Any]:
    """One judged picture: what it is taken for, and why it raised the alarm."""
    row = shown.screened
    said = f"answers “{class_name(row.predicted)}”"
    if shown.truth is not None:
        said = f"“{class_name(shown.truth)}” before, now {said}"
    found: dict[str, Any] = {
        "attack": "",
        "name": shown.name,
        "said": said,
        "score": f"{row.score:.3g}",
        "p": probability(row.p_value),
        "flagged": row.flagged,
        "cells": _cells(shown),
        "turned": "",
        "verdicts": _bars(row.verdicts),
        "effects": [],
        "channels": "",
    }
    if shown.alarm is not None:
        found["turned"] = _turned(shown.alarm, row.predicted, class_name)
        found["effects"] = [_effect(one) for one in _distinct(shown.alarm.effects)]
        found["channels"] = ", ".join(f"{unit} ({signed(value)})" for unit, value in shown.alarm.channels.items())
    return found


def _cells(shown: AlarmShown) -> list[dict[str, Any]]:
    picture = shown.picture
    cells = []
    if shown.before is not None:
        cells.append(cell("Before", f"{shown.name} before the attack", shown.before))
    cells.append(cell("The picture" if shown.before is None else "After the attack", shown.name, picture))
    if shown.before is not None:
        change, factor = magnify(picture - shown.before)
        cells.append(cell("What changed", "the attack's change", change, caption=f"times {factor:g}, on gray"))
    regions: Tensor | None = None if shown.alarm is None else shown.alarm.regions
    if regions is not None:
        largest = float(regions.abs().max())
        caption = f"full colour: {largest:.2g} of the margin" if largest else "smoothing changes nothing"
        cells.append(cell("What smoothing takes away", "where smoothing moves the answer", _map(regions, picture),
                          caption=caption))  # fmt: skip
    return cells


def _map(regions: Tensor, picture: Tensor) -> Any:
    return overlay(regions, picture)


def _bars(verdicts: Any) -> list[dict[str, Any]]:
    """The most unusual verdicts; a distance of 8 fills the bar."""
    order = sorted(verdicts.items(), key=lambda one: -one[1])[:_VERDICTS]
    return [
        {
            "name": verdict_words(name),
            "value": f"{value:+.1f}".replace("-", "−"),
            "width": f"{100 * min(max(value, 0.0) / 8, 1.0):.0f}",
        }
        for name, value in order
    ]


def verdict_words(name: str) -> str:
    """A verdict's name in words: a group's distance, or what one of its interventions leaves of the margin.

    Example:
        >>> verdict_words("filters"), verdict_words("filters: Smooth.median(2)")
        ('effects of filters', 'margin under Smooth.median(2)')
    """
    group, separator, what = name.partition(": ")
    return f"margin under {what}" if separator else f"effects of {group}"


def _turned(found: Alarm, predicted: int, class_name: ClassName) -> str:
    if found.turned_to == predicted:
        return f"No intervention changes the answer; {found.intervention} leaves the least of it."
    return f"Under {found.intervention} the network answers “{class_name(found.turned_to)}”."


def _distinct(effects: tuple[UnusualEffect, ...]) -> list[UnusualEffect]:
    """The most unusual effects, those that are finite."""
    return [one for one in effects if math.isfinite(one.deviations)][:_EFFECTS]


def _effect(one: UnusualEffect) -> dict[str, str]:
    return {
        "what": one.what,
        "effect": f"{one.effect:+.3g}".replace("-", "−"),
        "usual": f"{one.usual:+.3g}".replace("-", "−"),
        "away": f"{one.deviations:+.1f}".replace("-", "−"),
    }
