"""Tables of the adaptive attack: per detector and classifier, over classifiers, and compared with static attacks."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.detection._adaptive_attack import CLEAN, Chunk, Comparison, Effort, TargetModel, more_effort
from benchmarks.detection._detectors import LAST_LAYER, label, least_protocol, version
from benchmarks.detection._results import TITLES, Findings
from benchmarks.detection._text_table import Table, interval, met, number, percent
from ce_plugin.evaluation import Figures, Interval, auroc, figures

SHARES = (0.0, 1 / 3, 1 / 2, 2 / 3, math.inf)
FEW = 10


@dataclass(frozen=True)
class Row:
    """One detector of one classifier at one eps.

    Args:
        problem, seed, detector, eps: what was attacked.
        effort: effort of the attack.
        n: number of images attacked.
        success: share that was misclassified.
        over_successes: figures over the successes.
        over_all: AUROC over all images.
        evades: share of all images that evades the detector.
        late: late gain, as a share of the spread of clean scores.
        seconds: time per image.
        code: checksum of the detector's code.
        images: scores of attacked and clean images, which ones are successes, and distances to the decision boundary.
        room: AUROC by distance to the decision boundary.
        sample: AUROC of the successes in bootstrap samples that all classifiers share, (B,); None without successes.
        more: results of greater efforts on some of the images.
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
        target: TargetModel,
        eps: float,
        effort: Effort,
        found: Sequence[tuple[int, Chunk]],
        more: Sequence[Comparison] = (),
    ) -> Row:
        """A row from some chunks, with the results of greater efforts on them."""
        success = np.concatenate([chunk.success for _, chunk in found])
        score = np.concatenate([chunk.score for _, chunk in found])
        own = np.concatenate([target.own(number)[: len(chunk.score)] for number, chunk in found])
        rows = np.concatenate([target.rows(number)[: len(chunk.score)] for number, chunk in found])
        nearest = np.array([target.nearest.get(row, np.nan) for row in rows.tolist()])
        counted = np.where(success, score, own)
        problem, clean = target.problem, target.clean
        ids = target.index[:CLEAN], rows[success]
        what = figures(clean, score[success], detector=target.name, attack=f"adaptive-{eps:g}", ids=ids)
        detected = 1.0 if what.tpr_5 is None else what.tpr_5.value
        low, high = np.quantile(clean, [0.05, 0.95])
        late = [chunk.late for _, chunk in found if np.isfinite(chunk.late)]
        return cls(
            problem.name,
            problem.seed,
            target.name,
            eps,
            effort,
            len(success),
            float(success.mean()),
            what,
            auroc(clean, counted),
            float(success.mean()) * (1 - detected),
            float(np.mean(late) / (high - low)) if late else float("nan"),
            float(np.mean([chunk.seconds for _, chunk in found])),
            version(target.detector),
            {
                "score": score.tolist(),
                "clean": own.tolist(),
                "success": success.tolist(),
                "nearest": nearest.tolist(),
            },
            _by_room(clean, score[success], nearest[success] / eps),
            target.resampled(score[success], rows[success]) if success.any() else None,
            list(more),
        )

    def names(self) -> list[str]:
        """Names of what was attacked, for a table of several problems."""
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
    """AUROC and number of images, for ranges of the distance to the decision boundary as a share of eps."""
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


BARS = {0.1: 0.65, 0.3: 0.05}
"""eps -> AUROC that the attack is to reach against Mahalanobis on MNIST, written before anything was measured."""
AGAINST = ("mahalanobis", LAST_LAYER)
_MEANS_WORDS = (
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
        problem, detector, eps: what was attacked.
        seeds: seeds of the classifiers.
        n: number of images attacked on each.
        auroc: over the successes, mean over the classifiers that have some; None if none has.
        evades: share of the attacked images that evades the detector, mean over classifiers.
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
        cells = [_mean_cell(mine[eps]) if eps in mine else "-" for eps in bounds]
        rows.append([TITLES[problem], label(detector), images, *cells])
    header = ["problem", "detector", "images", *(f"eps {eps:g}" for eps in bounds)]
    return Table("Over classifiers", [_MEANS_WORDS], header, rows)


def asked(found: Sequence[Mean]) -> Table:
    """The targets that were set for the attack, and whether it reaches them."""
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
    """Number of images attacked on each classifier (the fewest, if it varies with eps): "200, 100, 100"."""
    return ", ".join(map(str, min(counts, key=sum)))


def _mean_cell(one: Mean) -> str:
    return f"{interval(one.auroc)} / {percent(one.evades)}"


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
    """The worst AUROC over static attacks on the same classifier, if that benchmark has been run."""
    protocol = least_protocol(row.detector)
    for classifier in _static_figures(results):
        if (classifier["problem"], classifier["seed"]) == (row.problem, row.seed):
            for one in classifier["results"]:
                if (one["detector"], one["protocol"]) == (row.detector, protocol) and one.get("worst"):
                    worst = one["worst"]
                    return number(float(worst[0] if isinstance(worst, list) else worst))
    return "not run"


@functools.cache
def _static_figures(results: Path) -> list[dict[str, Any]]:
    """Results of `evaluate.py` on each classifier, those in the tables of all detectors first."""
    files = [results / f"{name}.json" for name in ("detection", "detection_additions")]
    return [one for file in files if file.is_file() for one in json.loads(file.read_text())["classifiers"]]


FILE = "detection_adaptive.json"
_COMPARISON_WORDS = (
    "AUROC of the images that end misclassified, and the share of all attacked images that do and are not flagged at "
    "5 %, by the L-inf bound eps, mean over the classifiers that were attacked; beside them the worst AUROC over the "
    "attacks above, which know no detector. Detectors without a gradient were not attacked. Intervals, how hard the "
    "attack tried and what else it found: `detection_adaptive.md`."
)


def knowing(findings: Findings, results: Path) -> Table:
    """A section with the results of `adaptive.py`; a sentence if it has not been run."""
    title, file = "Against an attacker who knows the detector", results / FILE
    found: list[dict[str, Any]] = json.loads(file.read_text())["means"] if file.is_file() else []
    if not found:
        return Table(title, ["Not run yet."])
    bounds = sorted({one["eps"] for one in found}, key=float)
    rows = []
    for problem, detector in dict.fromkeys((one["problem"], one["detector"]) for one in found):
        mine = {one["eps"]: one for one in found if (one["problem"], one["detector"]) == (problem, detector)}
        cells = [_comparison_cell(mine[eps]) if eps in mine else "-" for eps in bounds]
        images = attacked(one["n"] for one in mine.values())
        rows.append([TITLES[problem], label(detector), images, _worst(findings, problem, detector), *cells])
    header = ["problem", "detector", "images of each classifier", "static worst", *(f"eps {eps}" for eps in bounds)]
    return Table(title, [_COMPARISON_WORDS], header, rows)


def _comparison_cell(one: dict[str, Any]) -> str:
    return f"{number(one['auroc'][0] if one['auroc'] else None)} / {percent(one['evades'])}"


def _worst(findings: Findings, problem: str, detector: str) -> str:
    evaluation = findings.pooled(problem, least_protocol(detector)).get(detector)
    return number(None if evaluation is None or evaluation.worst is None else evaluation.worst.value)
