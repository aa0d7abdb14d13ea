"""The table of the adaptive attack."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _adaptive import CLEAN, Chunk, Effort, Victims
from _adaptive_effort import Comparison, compared, more_effort
from _adaptive_means import asked, means, over_classifiers
from _detectors import label, least_taught, version
from _outcome import TITLES
from _table import Table, interval, number, percent

from ce_plugin.evaluation.detection import Figures, auroc, figures

WANTED = 200
_SHARES = (0.0, 1 / 3, 1 / 2, 2 / 3, math.inf)
_FEW = 10

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
    f"over, as a share of eps. What is left of eps is the room to look clean in. A dash: fewer than {_FEW} images."
)


@dataclass(frozen=True)
class Row:
    """One detector of one classifier at one eps.

    Args:
        problem, seed, detector, eps: which.
        effort: how hard the attack tried.
        n: images attacked.
        success: share that was misclassified.
        over_successes: figures of those.
        over_all: AUROC of all.
        evades: share of all.
        late: late gain, as a share of the spread of clean scores.
        seconds: time for one image.
        code: checksum of the detector's code.
        images: scores found and of the clean selves, which are successes, and how far away another class is.
        room: AUROC by how far away it is.
        sample: AUROC of the successes in bootstrap samples that all classifiers share, (B,); None where there are none.
        more: what greater efforts found on some of the images.
    """

    problem: str
    seed: int
    detector: str
    eps: float
    effort: Effort
    n: int
    success: float
    over_successes: Figures
    over_all: float
    evades: float
    late: float
    seconds: float
    code: str
    images: dict[str, list[Any]] = field(repr=False)
    room: list[str] = field(repr=False)
    sample: npt.NDArray[np.float64] | None = field(repr=False)
    more: list[Comparison] = field(repr=False)

    @classmethod
    def of(cls, victims: Victims, eps: float, effort: Effort, found: Sequence[tuple[int, Chunk]]) -> Row:
        """The figures of some chunks."""
        success = np.concatenate([chunk.success for _, chunk in found])
        score = np.concatenate([chunk.score for _, chunk in found])
        own = np.concatenate([victims.own(number) for number, _ in found])
        rows = np.concatenate([victims.rows(number) for number, _ in found])
        nearest = np.array([victims.nearest.get(row, np.nan) for row in rows.tolist()])
        counted = np.where(success, score, own)
        problem, clean = victims.problem, victims.clean
        ids = victims.index[:CLEAN], rows[success]
        what = figures(clean, score[success], detector=victims.name, attack=f"adaptive-{eps:g}", ids=ids)
        detected = 1.0 if what.tpr_5 is None else what.tpr_5.value
        low, high = np.quantile(clean, [0.05, 0.95])
        late = [chunk.late for _, chunk in found if np.isfinite(chunk.late)]
        return cls(
            problem.name,
            problem.seed,
            victims.name,
            eps,
            effort,
            len(success),
            float(success.mean()),
            what,
            auroc(clean, counted),
            float(success.mean()) * (1 - detected),
            float(np.mean(late) / (high - low)) if late else float("nan"),
            float(np.mean([chunk.seconds for _, chunk in found])),
            version(victims.detector),
            {
                "score": score.tolist(),
                "clean": own.tolist(),
                "success": success.tolist(),
                "nearest": nearest.tolist(),
            },
            _by_room(clean, score[success], nearest[success] / eps),
            victims.resampled(score[success], rows[success]) if success.any() else None,
            compared(victims, eps, effort, found),
        )

    def cells(self, static: str) -> list[str]:
        """A row of the table."""
        late = "-" if np.isnan(self.late) else f"{self.late:.3f}"
        return [
            label(self.detector),
            str(self.seed),
            f"{self.eps:g}",
            str(self.n),
            percent(self.success),
            interval(self.over_successes.auroc),
            number(self.over_all),
            percent(self.evades),
            late,
            static,
            str(self.effort),
            f"{self.seconds:.0f}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds; an unbounded eps is "inf"."""
        names = ("problem", "seed", "detector", "n", "success", "over_all", "evades", "late", "seconds", "code")
        row = {name: _round(getattr(self, name)) for name in names}
        images = {name: _round(values) for name, values in self.images.items()}
        found = _round(self.over_successes.to_dict())
        effort = asdict(self.effort)
        about = {**row, "effort": effort, "eps": f"{self.eps:g}", "more": [one.to_dict() for one in self.more]}
        return {**about, "over_successes": found, "images": images}


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
        few = min(row.n for row in own)
        words = [] if few >= WANTED else [f"Asked: {WANTED} images; attacked so far: {few}. The intervals say it."]
        header = ["detector", "seed", "eps", "images", "misclassified", "successes", "all", "evades", "late gain"]
        header += ["static worst", "runs", "s an image"]
        cells = [row.cells(_static(results, row)) for row in own]
        found.append(Table(TITLES[problem], words, header, cells))
    found.append(more_effort([(_names(row), one) for row in rows for one in row.more]))
    cells = [[*_names(row), *row.room] for row in rows if np.isfinite(row.eps)]
    header = ["problem", "detector", "seed", "eps", "up to a third", "to a half", "to two thirds", "beyond"]
    return [*found, Table("How much room there is", [_ROOM], header, cells)]


def _names(row: Row) -> list[str]:
    return [TITLES[row.problem], label(row.detector), str(row.seed), f"{row.eps:g}"]


def _by_room(clean: np.ndarray, score: np.ndarray, share: np.ndarray) -> list[str]:
    """For each range of the boundary's distance, as a share of eps: AUROC and number of images."""
    cells = []
    for low, high in pairwise(_SHARES):
        some = score[(share > low) & (share <= high)]
        cells.append(f"{number(auroc(clean, some)) if len(some) >= _FEW else '-'} ({len(some)})")
    return cells


def _static(results: Path, row: Row) -> str:
    """The worst AUROC over static attacks of the same classifier, where the other benchmark has been run."""
    file, protocol = results / "detection.json", least_taught(row.detector)
    if not file.is_file():
        return "not run"
    for classifier in json.loads(file.read_text()).get("classifiers", []):
        if (classifier["problem"], classifier["seed"]) == (row.problem, row.seed):
            for one in classifier["results"]:
                if (one["detector"], one["protocol"]) == (row.detector, protocol) and one.get("worst"):
                    worst = one["worst"]
                    return number(float(worst[0] if isinstance(worst, list) else worst))
    return "not run"


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _round(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_round(one) for one in value]
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 5)
    return value
