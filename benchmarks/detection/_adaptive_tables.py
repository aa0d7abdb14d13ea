"""The tables of the adaptive attack."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.detection._adaptive_effort import more_effort
from benchmarks.detection._adaptive_means import asked, means, over_classifiers
from benchmarks.detection._adaptive_row import FEW, Row
from benchmarks.detection._detectors import least_taught
from benchmarks.detection._results import TITLES
from benchmarks.detection._text_table import Table, number

WANTED = 200

_WORDS = (
    "**successes**: AUROC of the images that end misclassified, against clean ones; a robust classifier leaves few of "
    "them, and with little room to look clean. **all**: AUROC of all attacked images, where one that could not be "
    "turned over counts with the score of its clean self: it neither evades nor is detected. **evades**: share of all "
    "attacked images that are misclassified and not flagged, at the threshold that flags 5 % of the clean images. "
    "**late gain**: by how much the last tenth of the steps lowered the score, mean over runs, as a share of the "
    "distance between the 5 % and 95 % quantiles of clean scores; near 0: the curves were flat; scores "
    "far above all clean ones may lose many such distances and still be far above (see below, more effort). "
    "**static worst**: the least AUROC over the attacks that do not know the detector. What the attack found bounds "
    "the least AUROC from above; nothing proves that there is nothing lower. Brackets: 95 % bootstrap intervals."
)
_ROOM = (
    "AUROC of the images that end misclassified (and their number), by how far away the classifier's boundary is from "
    "the clean image: the L-inf distance at which Carlini and Wagner's attack, which knows no detector, turned it "
    f"over, as a share of eps. What is left of eps is the room to look clean in. A dash: fewer than {FEW} images."
)


def tables(rows: Sequence[Row], results: Path) -> list[Table]:
    """Introduction, the means over classifiers, and one table for each problem."""
    losses = "; ".join(dict.fromkeys(", ".join(row.effort.losses) for row in rows))
    tried = (
        "`AdaptiveEvasion` (L-inf, stored in eight bits) on correctly classified test images, in their order; of each "
        f"image the best of all losses ({losses}), restarts, starts and steps (**runs** says how many of each), as "
        "long as it does not score below all clean images. Each step is at most one forward and one backward "
        "pass of classifier and detector. Each eps starts from what a smaller one found. Detectors are fitted on clean "
        "images (P3), those that need attacked ones on FGSM as well (P2); the attacker knows all of them."
    )
    over = means(rows)
    found = [Table("What was tried", [tried, _WORDS]), over_classifiers(over), asked(over)]
    for problem in dict.fromkeys(row.problem for row in rows):
        own = [row for row in rows if row.problem == problem]
        enough = min(row.n for row in own) >= WANTED
        words = [] if enough else [f"Asked: {WANTED} images. Where fewer were attacked, the intervals say it."]
        header = ["detector", "seed", "eps", "images", "misclassified", "successes", "all", "evades", "late gain"]
        header += ["static worst", "runs", "s an image"]
        cells = [row.cells(_static(results, row)) for row in own]
        found.append(Table(TITLES[problem], words, header, cells))
    found.append(more_effort([(row.names(), one) for row in rows for one in row.more]))
    cells = [[*row.names(), *row.room] for row in rows if np.isfinite(row.eps)]
    header = ["problem", "detector", "seed", "eps", "up to a third", "to a half", "to two thirds", "beyond"]
    return [*found, Table("How much room there is", [_ROOM], header, cells)]


def _static(results: Path, row: Row) -> str:
    """The worst AUROC over static attacks of the same classifier, where the other benchmark has been run."""
    protocol = least_taught(row.detector)
    for classifier in _static_figures(results):
        if (classifier["problem"], classifier["seed"]) == (row.problem, row.seed):
            for one in classifier["results"]:
                if (one["detector"], one["protocol"]) == (row.detector, protocol) and one.get("worst"):
                    worst = one["worst"]
                    return number(float(worst[0] if isinstance(worst, list) else worst))
    return "not run"


@functools.cache
def _static_figures(results: Path) -> list[dict[str, Any]]:
    """What `evaluate.py` found on each classifier, those in the tables of all detectors first."""
    files = [results / f"{name}.json" for name in ("detection", "detection_additions")]
    return [one for file in files if file.is_file() for one in json.loads(file.read_text())["classifiers"]]
