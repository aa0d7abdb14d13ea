"""What is left of detectors before an attacker who knows them, beside what they do against those who do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _detectors import label
from _outcome import TITLES, Outcome
from _table import Table, number, percent

FILE = "detection_adaptive.json"
_WORDS = (
    "AUROC of the images that end misclassified, and the share of all attacked images that do and are not flagged at "
    "5 %, by the L-inf bound eps; beside them the worst AUROC over the attacks above, which know no detector. "
    "Intervals, how hard the attack tried and what else it found: `detection_adaptive.md`."
)


def knowing(outcome: Outcome, results: Path) -> Table:
    """The figures of the adaptive attack, from what `adaptive.py` wrote; words alone where it has not been run."""
    title, file = "Against an attacker who knows the detector", results / FILE
    found: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.is_file() else []
    if not found:
        return Table(title, ["Not run yet."])
    bounds = sorted({row["eps"] for row in found}, key=float)
    rows = []
    for problem, detector, seed in dict.fromkeys(map(_of, found)):
        mine = {row["eps"]: row for row in found if _of(row) == (problem, detector, seed)}
        cells = [_cell(mine[eps]) if eps in mine else "-" for eps in bounds]
        images = str(min(row["n"] for row in mine.values()))
        worst = _worst(outcome, problem, detector, seed)
        rows.append([TITLES[problem], label(detector), str(seed), images, worst, *cells])
    header = ["problem", "detector", "classifier", "images", "static worst", *(f"eps {eps}" for eps in bounds)]
    return Table(title, [_WORDS], header, rows)


def _cell(row: dict[str, Any]) -> str:
    return f"{number(row['over_successes']['auroc'])} / {percent(row['evades'])}"


def _of(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["problem"], row["detector"], row["seed"]


def _worst(outcome: Outcome, problem: str, detector: str, seed: int) -> str:
    for one in outcome.results(problem, "P3").get(detector, []):
        if one.seed == seed and one.evaluation is not None and one.evaluation.worst is not None:
            return number(one.evaluation.worst.value)
    return "-"
