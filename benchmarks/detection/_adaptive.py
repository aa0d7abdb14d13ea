"""The adaptive attack on one detector of one classifier, chunk by chunk, kept in the cache."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from attacks import attack_file, specs

from benchmarks.detection._data import Problem, cache_folder
from benchmarks.detection._detectors import LIMITS, build, least_taught, needs_labels
from benchmarks.detection._scores import setting
from benchmarks.harness import Attacked, CleanScores, ImageDraws, fit_detector, plan
from benchmarks.harness.attacks import attack_key
from ce_plugin.detection.adaptive import AdaptiveEvasion
from ce_plugin.detection.protocol import DifferentiableDetector
from ce_plugin.errors import FileError
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
        seed: of everything random.
    """

    losses: tuple[str, ...] = ("lagrangian", "targeted", "selective")
    steps: int = 40
    restarts: int = 6
    width: int = 4
    seed: int = 0

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Effort:
        """What `asdict` gave."""
        return cls(**{**stored, "losses": tuple(stored["losses"])})

    @property
    def evaluations(self) -> int:
        """The most forward and backward passes that one image takes."""
        return (self.steps + 1) * self.restarts * self.width * len(self.losses)

    @property
    def folder(self) -> str:
        """Name of a folder for what was found with it."""
        return f"{'-'.join(self.losses)}-{self.restarts}x{self.width}x{self.steps}-{self.seed}"

    def __str__(self) -> str:
        return f"{len(self.losses)} x {self.restarts} x {self.width} x {self.steps}"


@dataclass(frozen=True)
class Chunk:
    """What was found for some images at one eps.

    Args:
        images: (n, C, H, W), eight bits.
        success: misclassified, (n,).
        score: the detector's, (n,).
        late: by how much the last tenth of the steps lowered the score, mean over losses; NaN where none fooled.
        seconds: time for one image.
    """

    images: np.ndarray = field(repr=False)
    success: np.ndarray
    score: np.ndarray
    late: float
    seconds: float


@dataclass(frozen=True)
class Victims:
    """One classifier with one fitted detector, and the images to attack.

    Args:
        problem: classifier and images.
        name: the detector's.
        detector: fitted.
        index: the correctly classified test images, (n,).
        clean: the detector's scores of the first 1500 of them.
        probe: scores that tell whether a chunk belongs to this detector.
        folder: of the cache.
        nearest: test image -> L-inf distance at which Carlini and Wagner's attack, which minimises it, turned it over.
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
    def ready(cls, problem: Problem, name: str, cache: str | None) -> Victims:
        """Fit the detector, or take it from the cache, and score the clean images."""
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
        """The scores of a chunk's clean images, (n,)."""
        rows = self.rows(number)
        known = self.clean[number * CHUNK : (number + 1) * CHUNK]
        return known if len(known) == len(rows) else self.detector.score(self.problem.images["test"][rows])

    def resampled(self, score: np.ndarray, rows: np.ndarray) -> npt.NDArray[np.float64]:
        """AUROC of attacked versions of these test images in bootstrap samples that all classifiers share, (B,)."""
        draws = _draws(len(self.problem.images["test"]))
        return CleanScores(self.clean, self.index[:CLEAN], draws).against(score, rows).auroc

    def chunk(self, number: int, eps: float, effort: Effort, starts: np.ndarray | None, *, make: bool) -> Chunk | None:
        """What was found for a chunk of images: from the cache, or found now; None where it is not to be made."""
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
        """All with which the cache holds something, in no order."""
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
            # Below the score of every clean image there is nothing left to win, in no figure.
            threshold=float(self.clean.min()),
            candidates=self.problem.images["fit"][:CANDIDATES],
        )


@functools.lru_cache(maxsize=1)
def _draws(n_images: int) -> ImageDraws:
    return ImageDraws(n_images)


def _nearest(problem: Problem, cache: str | None) -> dict[int, float]:
    """What is known of the boundary's distance; nothing where the attack has not been made on this network."""
    images, labels = problem.images["test"], problem.labels["test"]
    (spec,) = (one for one in specs(problem.name, "test") if one.name == "cw-linf")
    file = attack_file(problem.name, problem.seed, "test", spec.name, cache)
    try:
        made = Attacked.load(file, attack_key(spec, problem.network, images, labels, problem.seed))
    except FileError:
        return {}
    return dict(zip(made.sources().tolist(), made.linf[made.success].tolist(), strict=True))


def _fitted(problem: Problem, name: str, cache: str | None) -> DifferentiableDetector:
    """The detector, fitted on the fitting part, on clean images if these are enough for it."""
    detector: Any = build(name, problem, cache)
    if needs_labels(name):
        material = setting(problem, cache).material
        (task,) = plan(least_taught(name), material)
        fit_detector(detector, task, material)
    else:
        detector.fit(problem.images["fit"][: LIMITS.get(name)])
    return detector  # type: ignore[no-any-return]


def chunks(victims: Victims, eps: float, numbers: Sequence[int]) -> tuple[Effort, list[tuple[int, Chunk]]] | None:
    """What the cache holds, (number, chunk): with the effort that attacked most images, of such with the greatest."""
    known = []
    for effort in victims.efforts(eps):
        found = [(number, victims.chunk(number, eps, effort, None, make=False)) for number in numbers]
        known.append((effort, [(number, chunk) for number, chunk in found if chunk is not None]))
    known = [one for one in known if one[1]]
    return max(known, key=lambda one: (len(one[1]), one[0].evaluations), default=None)
