"""What is left of detectors before an attacker who knows them, beside what they do against those who do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.detection._adaptive_means import attacked
from benchmarks.detection._detectors import label, least_taught
from benchmarks.detection._results import TITLES, Outcome
from benchmarks.detection._text_table import Table, number, percent

FILE = "detection_adaptive.json"
_WORDS = (
    "AUROC of the images that end misclassified, and the share of all attacked images that do and are not flagged at "
    "5 %, by the L-inf bound eps, mean over the classifiers that were attacked; beside them the worst AUROC over the "
    "attacks above, which know no detector. Detectors without a gradient were not attacked. Intervals, how hard the "
    "attack tried and what else it found: `detection_adaptive.md`."
)


def knowing(outcome: Outcome, results: Path) -> Table:
    """The figures of the adaptive attack, from what `adaptive.py` wrote; words alone where it has not been run."""
    title, file = "Against an attacker who knows the detector", results / FILE
    found: list[dict[str, Any]] = json.loads(file.read_text())["means"] if file.is_file() else []
    if not found:
        return Table(title, ["Not run yet."])
    bounds = sorted({one["eps"] for one in found}, key=float)
    rows = []
    for problem, detector in dict.fromkeys((one["problem"], one["detector"]) for one in found):
        mine = {one["eps"]: one for one in found if (one["problem"], one["detector"]) == (problem, detector)}
        cells = [_cell(mine[eps]) if eps in mine else "-" for eps in bounds]
        images = attacked(one["n"] for one in mine.values())
        rows.append([TITLES[problem], label(detector), images, _worst(outcome, problem, detector), *cells])
    header = ["problem", "detector", "images of each classifier", "static worst", *(f"eps {eps}" for eps in bounds)]
    return Table(title, [_WORDS], header, rows)


def _cell(one: dict[str, Any]) -> str:
    return f"{number(one['auroc'][0] if one['auroc'] else None)} / {percent(one['evades'])}"


def _worst(outcome: Outcome, problem: str, detector: str) -> str:
    evaluation = outcome.pooled(problem, least_taught(detector)).get(detector)
    return number(None if evaluation is None or evaluation.worst is None else evaluation.worst.value)
