"""Scores of a fitted detector on every set of images, cached in files so that nothing is scored twice."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple, Union

import numpy as np
import numpy.typing as npt

from benchmarks.harness.archives import Arrays, read_archive, write_archive
from benchmarks.harness.protocols import ImageSet, ProtocolData, Task, fit_detector
from ce_plugin.detection.calibration import Calibration
from ce_plugin.detection.protocol import Detector
from ce_plugin.errors import FileError, expected

__all__ = ["ScoreTable", "Scored", "score_task", "sets_of"]

FilePath = Union[str, "PathLike[str]"]
_TIMED = 200  # images
_ROUNDS = 5
_PATIENCE = 4.0  # seconds


class Scored(NamedTuple):
    """Scores of a set of images.

    Attributes:
        ids: of the images, (N,).
        scores: (N,), float64.
        checksum: of the set that was scored.
    """

    ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    checksum: str = ""


@dataclass(frozen=True)
class ScoreTable:
    """Scores from one fit of a detector.

    Args:
        calibration: scores of clean images that it was not fitted on.
        sets: set -> scores: "clean", "attack NAME", "other NAME".
        passes: forward passes of the classifier per image; None if the detector does not say.
        seconds: time per image, measured on the first 200 clean test images.

    Example:
        >>> table = ScoreTable(Calibration(np.arange(99.0)), {"clean": Scored(np.arange(3), np.ones(3))}, 1.0, 0.001)
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table.save(f"{folder}/table.npz", key="margin 1")
        ...     ScoreTable.load(f"{folder}/table.npz", key="margin 1").sets["clean"].scores.tolist()
        [1.0, 1.0, 1.0]
    """

    calibration: Calibration
    sets: Mapping[str, Scored] = field(repr=False)
    passes: float | None = None
    seconds: float | None = None

    @property
    def unattacked(self) -> dict[str, npt.NDArray[np.float64]]:
        """Scores of the images that are not attacked: "clean", and the others by their names."""
        others = (name for name in self.sets if name.startswith("other "))
        return {"clean": self.sets["clean"].scores, **{name[6:]: self.sets[name].scores for name in others}}

    def save(self, file: FilePath, key: str = "") -> None:
        """Write everything to one file, atomically."""
        names = list(self.sets)
        checksums = [self.sets[name].checksum for name in names]
        about = {"key": key, "sets": names, "checksums": checksums, "passes": self.passes, "seconds": self.seconds}
        arrays: dict[str, Any] = {f"ids{i}": self.sets[name].ids for i, name in enumerate(names)}
        arrays |= {f"scores{i}": self.sets[name].scores for i, name in enumerate(names)}
        write_archive(file, about, {**arrays, "calibration": self.calibration.scores})

    @classmethod
    def load(cls, file: FilePath, key: str | None = None) -> ScoreTable:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileError: there is none, it is damaged, or it was written under another key.
        """

        def read(about: Any, stored: Arrays) -> tuple[Calibration, dict[str, Scored]]:
            rows = enumerate(zip(about["sets"], about["checksums"], strict=True))
            sets = {name: Scored(stored[f"ids{i}"], stored[f"scores{i}"], check) for i, (name, check) in rows}
            return Calibration(stored["calibration"]), sets

        about, (calibration, sets) = read_archive(file, read, wanted="a file of scores", hint="Score again.")
        if key is not None and about["key"] != key:
            hint = "The detector or what it was fitted on has changed: score again."
            raise FileError(expected("file", f"one written under the key {key}", about["key"], hint))
        return cls(calibration, sets, about["passes"], about["seconds"])


def sets_of(task: Task, data: ProtocolData) -> dict[str, ImageSet]:
    """All sets of images that a task scores, by their names in a :class:`ScoreTable`.

    Example:
        >>> from benchmarks.harness.protocols import plan
        >>> one = np.zeros((4, 1, 2, 2), np.uint8)
        >>> clean, fgsm = (ImageSet(name, one, np.arange(4)) for name in ("clean", "fgsm"))
        >>> data = ProtocolData(one, {}, clean, {"fgsm": fgsm}, {"noise": clean})
        >>> list(sets_of(plan("P3", data)[0], data))
        ['clean', 'attack fgsm', 'other noise']
    """
    sets = {"clean": data.clean.of_fold(task.fold)}
    sets |= {f"attack {name}": data.attacks[name].of_fold(task.fold) for name in task.tries}
    if task.alarms:
        sets |= {f"other {name}": one for name, one in data.others.items()}
    return sets


def score_task(
    detector: Detector,
    task: Task,
    data: ProtocolData,
    *,
    known: ScoreTable | None = None,
    limit: int | None = None,
    batch_size: int = 128,
) -> ScoreTable:
    """Fit a detector for a task and score all its sets of images that have not been scored yet.

    Args:
        detector: the detector, which is fitted unless nothing is left to score.
        task: see :func:`~benchmarks.harness.plan`.
        data: the images.
        known: earlier scores by the same detector, fitted on the same images; reused for sets that have not changed.
        limit: see :func:`~benchmarks.harness.fit_detector`.
        batch_size: images at a time.

    Returns:
        Scores of all sets of the task, and of no other.

    Example:
        >>> from benchmarks.harness.protocols import plan
        >>> from benchmarks.detectors import Margin
        >>> import torch
        >>> images = np.random.default_rng(0).random((40, 1, 2, 2)).astype(np.float32)
        >>> data = ProtocolData(images, {}, ImageSet("clean", images, np.arange(40)), {})
        >>> table = score_task(Margin(torch.nn.Flatten()), plan("P3", data)[0], data)
        >>> table.calibration.n, table.sets["clean"].scores.shape, table.passes
        (12, (40,), 1.0)
    """
    wanted = sets_of(task, data)
    checksums = {name: one.checksum() for name, one in wanted.items()}
    old = {} if known is None else known.sets
    kept = {name: old[name] for name, checksum in checksums.items() if name in old and old[name].checksum == checksum}
    if known is not None and len(kept) == len(wanted):
        return ScoreTable(known.calibration, kept, known.passes, known.seconds)
    calibration = fit_detector(detector, task, data, limit=limit, batch_size=batch_size)
    sets = {}
    for name, one in wanted.items():
        if name in kept:
            sets[name] = kept[name]
            continue
        scores = detector.score(one.units(), batch_size=batch_size) if len(one) else np.zeros(0)
        sets[name] = Scored(one.ids, np.asarray(scores, np.float64), checksums[name])
    seconds = _seconds(detector, data.clean, batch_size) if known is None else known.seconds
    passes = getattr(detector, "passes", None)
    return ScoreTable(calibration, sets, None if passes is None else float(passes), seconds)


def _seconds(detector: Detector, clean: ImageSet, batch_size: int) -> float | None:
    """Time per image: the shortest of several rounds, because other load on the machine can only add to it."""
    images = clean.select(np.arange(min(len(clean), _TIMED))).units()
    if not len(images):
        return None
    rounds: list[float] = []
    while not rounds or (len(rounds) < _ROUNDS and sum(rounds) < _PATIENCE):
        start = time.perf_counter()
        detector.score(images, batch_size=batch_size)
        rounds.append(time.perf_counter() - start)
    return min(rounds) / len(images)
