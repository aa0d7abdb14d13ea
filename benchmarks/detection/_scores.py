"""Scores of every detector on every set of images, from the cache or computed now."""

from __future__ import annotations

import functools
import json
import time
import traceback
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.detection._classifiers import checksum
from benchmarks.detection._detectors import CLEAN_ONLY, LIMITS, OWN, build, needs_labels, version
from benchmarks.detection._problems import Problem, cache_folder, predictions
from benchmarks.detection.attacks import attack_file, specs
from benchmarks.harness import (
    Attacked,
    Evaluation,
    ImageDraws,
    ImageSet,
    ProtocolData,
    ScoreTable,
    Task,
    evaluate,
    plan,
    score_task,
    sets_of,
)
from benchmarks.harness.attacks import attack_key
from benchmarks.harness.distortions import DISTORTIONS, distorted
from ce_plugin.errors import FileError
from ce_plugin.evaluation import Alarms, false_alarms

CLEAN = 1500
ALTERED = 500
NEEDED = {"fashion": 200, "mnist": 200, "imagenet": 50}
NOISE = {"fashion": 0.1, "mnist": 0.1, "imagenet": 8 / 255}
FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class TrialSpec:
    """A problem with all images that detectors are evaluated on.

    Args:
        problem: name and seed, classifier.
        data: images for the protocols.
        missing: attacks that have not been run, or were run with other settings.
        tried: attack -> ids of the images that were attacked.
        accuracy: of the classifier on the test images.
        keep: altered set -> share of images that keep their class.
    """

    problem: Problem
    data: ProtocolData
    missing: tuple[str, ...]
    tried: Mapping[str, np.ndarray]
    accuracy: float
    keep: Mapping[str, float]

    def among(self) -> np.ndarray:
        """Images that every attack was run on, except excluded attacks."""
        known = [ids for name, ids in self.tried.items() if not self.data.attacks[name].excluded]
        return functools.reduce(np.intersect1d, known)


@dataclass(frozen=True)
class Result:
    """One detector on one problem, classifier and protocol.

    Args:
        problem, seed, protocol, detector: names.
        evaluation: figures; None if it failed.
        alarms: false alarms, for protocols with one fit.
        passes: forward passes per image.
        seconds: time per image.
        score_tables: task -> scores.
        among: ids of the images that every attack was run on.
        error: why it failed.
    """

    problem: str
    seed: int
    protocol: str
    detector: str
    evaluation: Evaluation | None = None
    alarms: Alarms | None = None
    passes: float | None = None
    seconds: float | None = None
    score_tables: Mapping[str, ScoreTable] = field(default_factory=dict, repr=False)
    among: np.ndarray = field(default_factory=lambda: np.arange(0), repr=False)
    error: str = ""


def setting(problem: Problem, cache: str | None) -> TrialSpec:
    """All images of a problem: the first 1500 correctly classified test images, and misclassified ones up to there."""
    images, labels = problem.images["test"], problem.labels["test"]
    right = predictions(problem.network, images) == labels
    chosen = np.flatnonzero(right)[:CLEAN]
    wrong = np.flatnonzero(~right[: chosen[-1] + 1])
    attacks, missing, tried = _attacks(problem, "test", cache)
    training_attacks, _, _ = _attacks(problem, "fit", cache)
    others = {"misclassified": ImageSet("misclassified", _bytes(images[wrong]), wrong)}
    keep = {}
    for kind in DISTORTIONS:
        some = chosen[:ALTERED]
        altered = distorted(images[some], kind, problem.seed, size=NOISE[problem.name])
        keep[kind] = float((predictions(problem.network, altered) == labels[some]).mean())
        others[kind] = ImageSet(kind, _bytes(altered), some)
    clean = ImageSet("clean", _bytes(images[chosen]), chosen)
    data = ProtocolData(problem.images["fit"], training_attacks, clean, attacks, others)
    return TrialSpec(problem, data, missing, tried, float(right.mean()), keep)


def _attacks(
    problem: Problem, part: str, cache: str | None
) -> tuple[dict[str, ImageSet], tuple[str, ...], dict[str, np.ndarray]]:
    images, labels = problem.images[part], problem.labels[part]
    found, missing, tried = {}, [], {}
    for spec in specs(problem.name, part):
        file = attack_file(problem.name, problem.seed, part, spec.name, cache)
        try:
            made = Attacked.load(file, attack_key(spec, problem.network, images, labels, problem.seed))
        except FileError:
            missing.append(spec.name)
            continue
        tried[spec.name] = made.index
        pictures = made.images[made.success]
        found[spec.name] = ImageSet(spec.name, pictures, made.sources(), spec.family, spec.excluded)
    return found, tuple(missing), tried


def result(
    setting: TrialSpec, protocol: str, name: str, draws: ImageDraws, cache: str | None, *, make: bool
) -> Result | None:
    """Scores and figures; None if there are none and they must not be computed."""
    problem, data = setting.problem, setting.data
    about = (problem.name, problem.seed, protocol, name)
    if protocol == "P3" and needs_labels(name):
        return None
    try:
        tasks, score_tables = plan(protocol, data), {}
        for task in tasks:
            table = _score_table(setting, protocol, name, task, cache, make)
            if table is None:
                return None
            score_tables[task.key] = table
    except FAILURES as error:
        if make:
            traceback.print_exc()
        return Result(*about, error=f"{type(error).__name__}: {error}".splitlines()[0]) if make else None
    if not tasks or not data.attacks:
        return None
    figures = evaluate(
        tasks,
        score_tables,
        draws,
        detector=name,
        needed=NEEDED[problem.name],
        excluded=[one.name for one in data.attacks.values() if one.excluded],
        worst_case=protocol != "P1",
        among=setting.among(),
    )
    one = score_tables[tasks[0].key]
    alarms = false_alarms(one.calibration, one.unattacked) if tasks[0].alarms else None
    return Result(*about, figures, alarms, one.passes, one.seconds, score_tables, setting.among())


def _score_table(
    setting: TrialSpec, protocol: str, name: str, task: Task, cache: str | None, make: bool
) -> ScoreTable | None:
    problem, data = setting.problem, setting.data
    folder = "P3" if protocol == "P2" and name in CLEAN_ONLY else protocol
    file = cache_folder(cache) / "scores" / f"{problem.name}-{problem.seed}" / folder / name / f"{task.key}.npz"
    if not make and not file.is_file():
        return None  # before anything is built, because building may include training
    detector = build(name, problem, cache)
    key = f"{version(detector)} {_fitted_on(data, task, problem, name)}"
    known = _known(file, key)
    wanted = sets_of(task, data)
    if known is not None and all(n in known.sets and known.sets[n].checksum == s.checksum() for n, s in wanted.items()):
        return score_task(detector, task, data, known=known)
    if not make:
        return None
    start = time.perf_counter()
    table = score_task(detector, task, data, known=known, limit=LIMITS.get(name), batch_size=_batch(problem))
    table.save(file, key)
    took = time.perf_counter() - start
    now = time.strftime("%H:%M:%S", time.gmtime())
    print(f"{now} {problem.name}-{problem.seed} {protocol} {name} {task.key}: {took:.0f} s", flush=True)
    return table


def _known(file: Path, key: str) -> ScoreTable | None:
    try:
        return ScoreTable.load(file, key)
    except FileError:
        return None


def _batch(problem: Problem) -> int:
    return 16 if problem.name == "imagenet" else 128


def _fitted_on(data: ProtocolData, task: Task, problem: Problem, name: str) -> str:
    """A checksum of everything that a fit depends on, except the detector's code."""
    learnt = data.training_attacks if task.trained_on == "pool" else data.attacks
    words = [(one, learnt[one].checksum()) for one in task.learns if name not in CLEAN_ONLY]
    start = zlib.crc32(json.dumps([words, task.fold, data.seed, LIMITS.get(name)]).encode())
    return f"{zlib.crc32(np.ascontiguousarray(data.pool).tobytes(), checksum(problem.network, start)):08x}"


def _bytes(images: np.ndarray) -> np.ndarray:
    return np.rint(images * 255).astype(np.uint8)


def order(names: Sequence[str]) -> list[str]:
    """Detectors in the order of scoring: ours first, slow ones last."""
    return sorted(names, key=lambda name: (name not in OWN, name in LIMITS))
