"""The adaptive attack on one detector of one classifier: run in chunks, cached, and compared by effort."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.detection._detectors import LIMITS, build, least_protocol, needs_labels
from benchmarks.detection._problems import Problem, cache_folder
from benchmarks.detection._scores import setting
from benchmarks.detection._text_table import Table, number
from benchmarks.detection.attacks import attack_file, specs
from benchmarks.harness import Attacked, CleanScores, ImageDraws, fit_detector, plan
from benchmarks.harness.attacks import attack_key
from ce_plugin.detection.adaptive import AdaptiveEvasion
from ce_plugin.detection.protocol import DifferentiableDetector
from ce_plugin.errors import FileError
from ce_plugin.evaluation import Interval, auroc
from ce_plugin.files import written_whole
from ce_plugin.networks.art import build_classifier

CHUNK = 10
CLEAN = 1500
CANDIDATES = 1500
ATTACK = 2
"""Raised by hand when the attack changes: what an older one found is not used."""
_PROBED = 16


@dataclass(frozen=True)
class Effort:
    """How hard the attack tries.

    Args:
        losses, steps, restarts, width: of :class:`AdaptiveEvasion`.
        seed: seed of all random numbers.
    """

    losses: tuple[str, ...] = ("lagrangian", "targeted", "selective")
    steps: int = 40
    restarts: int = 6
    width: int = 4
    seed: int = 0

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Effort:
        """From the result of `asdict`."""
        return cls(**{**stored, "losses": tuple(stored["losses"])})

    @property
    def evaluations(self) -> int:
        """Largest number of forward and backward passes per image."""
        return (self.steps + 1) * self.restarts * self.width * len(self.losses)

    @property
    def folder(self) -> str:
        """Name of the folder for results with this effort."""
        return f"{'-'.join(self.losses)}-{self.restarts}x{self.width}x{self.steps}-{self.seed}"

    def __str__(self) -> str:
        return f"{len(self.losses)} x {self.restarts} x {self.width} x {self.steps}"


@dataclass(frozen=True)
class Chunk:
    """Results for some images at one eps.

    Args:
        images: attacked images, (n, C, H, W), eight bits.
        success: whether each is misclassified, (n,).
        score: scores of the detector, (n,).
        late: decrease of the score in the last tenth of the steps, mean over losses; NaN if no loss succeeded.
        seconds: time per image.
    """

    images: np.ndarray = field(repr=False)
    success: np.ndarray
    score: np.ndarray
    late: float
    seconds: float


@dataclass(frozen=True)
class TargetModel:
    """One classifier with one fitted detector, and the images to attack.

    Args:
        problem: classifier and images.
        name: name of the detector.
        detector: the fitted detector.
        index: indices of the correctly classified test images, (n,).
        clean: the detector's scores of the first 1500 of them.
        probe: scores that identify the fitted detector, to check that a cached chunk belongs to it.
        folder: folder of the cache.
        nearest: test image -> L-inf distance of the adversarial example found by Carlini and Wagner's attack.
    """

    problem: Problem
    name: str
    detector: DifferentiableDetector
    index: np.ndarray = field(repr=False)
    clean: np.ndarray = field(repr=False)
    probe: np.ndarray = field(repr=False)
    folder: Path
    nearest: dict[int, float] = field(repr=False)

    @classmethod
    def ready(cls, problem: Problem, name: str, cache: str | None) -> TargetModel:
        """Fit the detector or load it from the cache, and score the clean images."""
        detector = _fitted(problem, name, cache)
        index = np.flatnonzero(problem.correct("test"))
        clean = detector.score(problem.images["test"][index[:CLEAN]])
        probe = detector.score(problem.images["fit"][:_PROBED])
        folder = cache_folder(cache) / "adaptive" / f"{problem.name}-{problem.seed}" / name
        return cls(problem, name, detector, index, clean, probe, folder, _nearest(problem, cache))

    def rows(self, number: int) -> np.ndarray:
        """The test images of a chunk, (n,)."""
        return self.index[number * CHUNK : (number + 1) * CHUNK]

    def own(self, number: int) -> np.ndarray:
        """Scores of the clean images of a chunk, (n,)."""
        rows = self.rows(number)
        known = self.clean[number * CHUNK : (number + 1) * CHUNK]
        return known if len(known) == len(rows) else self.detector.score(self.problem.images["test"][rows])

    def resampled(self, score: np.ndarray, rows: np.ndarray) -> npt.NDArray[np.float64]:
        """AUROC of attacked versions of these test images in bootstrap samples that all classifiers share, (B,)."""
        draws = _draws(len(self.problem.images["test"]))
        return CleanScores(self.clean, self.index[:CLEAN], draws).against(score, rows).auroc

    def chunk(self, number: int, eps: float, effort: Effort, starts: np.ndarray | None, *, make: bool) -> Chunk | None:
        """Results for a chunk of images, cached or computed now; None if missing and not to be computed."""
        rows = self.rows(number)
        file = self.folder / f"eps-{eps:g}" / effort.folder / f"{number:04d}.npz"
        key = json.dumps({"attack": ATTACK, "effort": asdict(effort), "images": rows.tolist()})
        known = self._read(file, key)
        if known is not None or not make or not len(rows):
            return known
        found = self._attack(rows, eps, effort, starts)
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as stream:
            np.savez_compressed(stream, key=np.array(key), probe=self.probe, **asdict(found))
        return found

    def efforts(self, eps: float) -> list[Effort]:
        """All efforts with results in the cache, in no particular order."""
        found = {}
        for folder in sorted((self.folder / f"eps-{eps:g}").glob("*/")):
            for file in sorted(folder.glob("????.npz"))[:1]:
                with np.load(file) as stored:
                    found[folder.name] = Effort.of(json.loads(str(stored["key"]))["effort"])
        return list(found.values())

    def _read(self, file: Path, key: str) -> Chunk | None:
        if not file.is_file():
            return None
        with np.load(file) as stored:
            if str(stored["key"]) != key or not np.allclose(stored["probe"], self.probe, rtol=1e-3, atol=1e-3):
                return None
            late, seconds = float(stored["late"]), float(stored["seconds"])
            return Chunk(stored["images"], stored["success"], stored["score"], late, seconds)

    def _attack(self, rows: np.ndarray, eps: float, effort: Effort, starts: np.ndarray | None) -> Chunk:
        x, y = self.problem.images["test"][rows], self.problem.labels["test"][rows]
        given = None if starts is None else starts.astype(np.float32) / 255
        begin = time.perf_counter()
        evasion = self._evasion(eps, effort)
        found = evasion.generate(x, y, starts=given, ids=rows.tolist())
        report = evasion.report
        late = [gain for gain in report.late_gain().values() if np.isfinite(gain)]
        seconds = (time.perf_counter() - begin) / len(rows)
        images = np.rint(found * 255).astype(np.uint8)
        return Chunk(images, report.success, report.score, float(np.mean(late)) if late else float("nan"), seconds)

    def _evasion(self, eps: float, effort: Effort) -> AdaptiveEvasion:
        shape = self.problem.images["test"].shape[1:]
        classifier = build_classifier(
            self.problem.network, shape, self.problem.n_classes, (0.0, 1.0), torch.device("cpu")
        )
        return AdaptiveEvasion(
            classifier,
            self.detector,
            eps=eps,
            losses=effort.losses,
            steps=effort.steps,
            restarts=effort.restarts,
            width=effort.width,
            seed=effort.seed,
            batch_size=16 if self.problem.name == "imagenet" else CHUNK * 8,
            # Below the lowest score of the clean images, no figure changes any more.
            threshold=float(self.clean.min()),
            candidates=self.problem.images["fit"][:CANDIDATES],
        )


@functools.lru_cache(maxsize=1)
def _draws(n_images: int) -> ImageDraws:
    return ImageDraws(n_images)


def _nearest(problem: Problem, cache: str | None) -> dict[int, float]:
    """Known distances to the decision boundary; empty if the attack has not been run on this network."""
    images, labels = problem.images["test"], problem.labels["test"]
    (spec,) = (one for one in specs(problem.name, "test") if one.name == "cw-linf")
    file = attack_file(problem.name, problem.seed, "test", spec.name, cache)
    try:
        made = Attacked.load(file, attack_key(spec, problem.network, images, labels, problem.seed))
    except FileError:
        return {}
    return dict(zip(made.sources().tolist(), made.linf[made.success].tolist(), strict=True))


def _fitted(problem: Problem, name: str, cache: str | None) -> DifferentiableDetector:
    """The detector, fitted on the fitting part; on clean images only, if it does not need others."""
    detector: Any = build(name, problem, cache)
    if needs_labels(name):
        data = setting(problem, cache).data
        (task,) = plan(least_protocol(name), data)
        fit_detector(detector, task, data)
    else:
        detector.fit(problem.images["fit"][: LIMITS.get(name)])
    return detector  # type: ignore[no-any-return]


def chunks(target: TargetModel, eps: float, numbers: Sequence[int]) -> tuple[Effort, list[tuple[int, Chunk]]] | None:
    """Cached (number, chunk) pairs of the effort with the most images; of several, the greatest effort."""
    known = []
    for effort in target.efforts(eps):
        found = [(number, target.chunk(number, eps, effort, None, make=False)) for number in numbers]
        known.append((effort, [(number, chunk) for number, chunk in found if chunk is not None]))
    known = [one for one in known if one[1]]
    return max(known, key=lambda one: (len(one[1]), one[0].evaluations), default=None)


_MORE_WORDS = (
    "Some images were attacked once more with greater effort. AUROC of those that end misclassified with the effort of "
    "the tables above and with the greater one, and the difference with its paired interval. What it still falls by is "
    "what the figures above may be too high by, at the least."
)


@dataclass(frozen=True)
class Comparison:
    """The same images attacked with less and with more effort.

    Args:
        less, more: efforts.
        n: number of images.
        auroc: of the successes, with less and with more effort.
        gain: second minus first.
    """

    less: Effort
    more: Effort
    n: int
    auroc: tuple[float, float]
    gain: Interval

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Comparison:
        """From the result of :meth:`to_dict`."""
        less, more = Effort.of(stored["less"]), Effort.of(stored["more"])
        first, second = stored["auroc"]
        return cls(less, more, stored["n"], (first, second), Interval(*stored["gain"]))

    def cells(self) -> list[str]:
        """Cells of a table row, after the names."""
        less, more = map(number, self.auroc)
        gain = f"{self.gain.value:+.3f} [{self.gain.low:+.3f}, {self.gain.high:+.3f}]"
        return [str(self.n), f"{less} ({self.less})", f"{more} ({self.more})", gain]

    def to_dict(self) -> dict[str, Any]:
        """The entry in the JSON file."""
        figures = {"auroc": [round(one, 5) for one in self.auroc], "gain": [round(one, 5) for one in self.gain]}
        return {"less": asdict(self.less), "more": asdict(self.more), "n": self.n, **figures}


def compared(target: TargetModel, eps: float, less: Effort, found: Sequence[tuple[int, Chunk]]) -> list[Comparison]:
    """Comparisons with greater efforts in the cache, for chunks of one effort."""
    comparisons = []
    for more in target.efforts(eps):
        if more.evaluations <= less.evaluations:
            continue
        again = {number: target.chunk(number, eps, more, None, make=False) for number, _ in found}
        pairs = [(number, one, other) for number, one in found if (other := again[number]) is not None]
        if all(any(pair[which].success.any() for pair in pairs) for which in (1, 2)):
            comparisons.append(_comparison(target, less, more, pairs))
    return comparisons


def _comparison(
    target: TargetModel, less: Effort, more: Effort, pairs: Sequence[tuple[int, Chunk, Chunk]]
) -> Comparison:
    rows = np.concatenate([target.rows(number) for number, *_ in pairs])
    values, samples = [], []
    for which in (1, 2):
        chunks = [pair[which] for pair in pairs]
        success = np.concatenate([chunk.success for chunk in chunks])
        score = np.concatenate([chunk.score for chunk in chunks])[success]
        values.append(auroc(target.clean, score))
        samples.append(target.resampled(score, rows[success]))
    low, high = np.nanquantile(samples[1] - samples[0], [0.025, 0.975])
    gain = Interval(values[1] - values[0], float(low), float(high))
    return Comparison(less, more, len(rows), (values[0], values[1]), gain)


def more_effort(named: Sequence[tuple[list[str], Comparison]]) -> Table:
    """All comparisons, each after its problem, detector, seed and eps."""
    header = ["problem", "detector", "seed", "eps", "images", "less (losses x restarts x starts x steps)", "more"]
    rows = [[*names, *one.cells()] for names, one in named]
    return Table("More effort", [_MORE_WORDS if rows else "Not tried."], [*header, "difference"], rows)


# Scores of a detector that was fitted again on another processor differed by up to 0.7 % here, by rounding.
_NEAR = 1e-2


@dataclass(frozen=True)
class Kept:
    """Earlier results for some images at one eps.

    Args:
        effort: effort of the attack.
        found: (number, chunk), without the images.
        more: comparisons with greater efforts.
    """

    effort: Effort
    found: list[tuple[int, Chunk]] = field(repr=False)
    more: list[Comparison] = field(repr=False)


def kept(target: TargetModel, eps: float, results: Path, numbers: Sequence[int]) -> Kept | None:
    """From `detection_adaptive.json`, if the clean images still have the same scores; else None."""
    row = _row(target, eps, results)
    if row is None:
        return None
    success, score = np.array(row["images"]["success"], dtype=bool), np.array(row["images"]["score"], dtype=float)
    low, high = np.quantile(target.clean, [0.05, 0.95])
    late = math.nan if row["late"] is None else float(row["late"]) * float(high - low)
    found = []
    for place in numbers:
        part = slice(place * CHUNK, (place + 1) * CHUNK)
        then = np.array(row["images"]["clean"][part], dtype=float)
        if not len(then):
            break
        if not np.allclose(target.own(place)[: len(then)], then, rtol=_NEAR, atol=_NEAR):
            return None
        found.append((place, Chunk(np.empty(0), success[part], score[part], late, float(row["seconds"]))))
    return Kept(Effort.of(row["effort"]), found, [Comparison.of(one) for one in row["more"]]) if found else None


def _row(target: TargetModel, eps: float, results: Path) -> dict[str, Any] | None:
    if not results.is_file():
        return None
    which = (target.problem.name, target.problem.seed, target.name, f"{eps:g}")
    rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"]
    return next(
        (row for row in rows if tuple(row[key] for key in ("problem", "seed", "detector", "eps")) == which), None
    )
