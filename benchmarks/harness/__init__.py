"""Evaluation of detectors of adversarial examples: attacks, protocols, scores, tables."""

from benchmarks.harness.attacks import Attacked, AttackSpec, attack_images, cached_attack
from benchmarks.harness.protocols import PROTOCOLS, ImageSet, ProtocolData, Task, fit_detector, fold_of, plan
from benchmarks.harness.resampling import CleanScores, ImageDraws
from benchmarks.harness.scores import Scored, ScoreTable, score_task, sets_of
from benchmarks.harness.suites import fit_suite, suite
from benchmarks.harness.tables import DetectionResult, Evaluation, evaluate, pooled

__all__ = [
    "PROTOCOLS",
    "AttackSpec",
    "Attacked",
    "CleanScores",
    "DetectionResult",
    "Evaluation",
    "ImageDraws",
    "ImageSet",
    "ProtocolData",
    "ScoreTable",
    "Scored",
    "Task",
    "attack_images",
    "cached_attack",
    "evaluate",
    "fit_detector",
    "fit_suite",
    "fold_of",
    "plan",
    "pooled",
    "score_task",
    "sets_of",
    "suite",
]
