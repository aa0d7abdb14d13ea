"""The figures of the adaptive attack on one detector of one classifier at one eps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.detection._adaptive_attack import CLEAN, Chunk, Effort, Victims
from benchmarks.detection._adaptive_effort import Comparison
from benchmarks.detection._detectors import label, version
from benchmarks.detection._results import TITLES
from benchmarks.detection._text_table import interval, number, percent
from ce_plugin.evaluation import Figures, auroc, figures

SHARES = (0.0, 1 / 3, 1 / 2, 2 / 3, math.inf)
FEW = 10


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
    def of(
        cls,
        victims: Victims,
        eps: float,
        effort: Effort,
        found: Sequence[tuple[int, Chunk]],
        more: Sequence[Comparison] = (),
    ) -> Row:
        """The figures of some chunks, and what greater efforts found on them."""
        success = np.concatenate([chunk.success for _, chunk in found])
        score = np.concatenate([chunk.score for _, chunk in found])
        own = np.concatenate([victims.own(number)[: len(chunk.score)] for number, chunk in found])
        rows = np.concatenate([victims.rows(number)[: len(chunk.score)] for number, chunk in found])
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
            list(more),
        )

    def names(self) -> list[str]:
        """What was attacked, for a table of several problems."""
        return [TITLES[self.problem], label(self.detector), str(self.seed), f"{self.eps:g}"]

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


def _by_room(clean: np.ndarray, score: np.ndarray, share: np.ndarray) -> list[str]:
    """For each range of the boundary's distance, as a share of eps: AUROC and number of images."""
    cells = []
    for low, high in pairwise(SHARES):
        some = score[(share > low) & (share <= high)]
        cells.append(f"{number(auroc(clean, some)) if len(some) >= FEW else '-'} ({len(some)})")
    return cells


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _round(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_round(one) for one in value]
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 5)
    return value
