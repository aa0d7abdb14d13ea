"""A harness for detectors of adversarial examples: attacks, protocols, figures."""

from ce_plugin.evaluation.detection.alarms import Alarms, false_alarms
from ce_plugin.evaluation.detection.attacks import Attacked, AttackSpec, attack_images, cached_attack
from ce_plugin.evaluation.detection.bootstrap import Resampled, bootstrapped
from ce_plugin.evaluation.detection.metrics import (
    Figures,
    Interval,
    Summary,
    WorstCase,
    auroc,
    enough,
    figures,
    mean_and_worst,
    tpr_at_fpr,
    worst_case_scores,
)
from ce_plugin.evaluation.detection.protocols import PROTOCOLS, ImageSet, Material, Task, fit_detector, fold_of, plan
from ce_plugin.evaluation.detection.records import Scored, Sheet, score_task, sets_of
from ce_plugin.evaluation.detection.resampling import CleanScores, ImageDraws
from ce_plugin.evaluation.detection.suites import fit_suite, suite
from ce_plugin.evaluation.detection.tables import Evaluation, Tried, evaluate, pooled

__all__ = [
    "PROTOCOLS",
    "Alarms",
    "AttackSpec",
    "Attacked",
    "CleanScores",
    "Evaluation",
    "Figures",
    "ImageDraws",
    "ImageSet",
    "Interval",
    "Material",
    "Resampled",
    "Scored",
    "Sheet",
    "Summary",
    "Task",
    "Tried",
    "WorstCase",
    "attack_images",
    "auroc",
    "bootstrapped",
    "cached_attack",
    "enough",
    "evaluate",
    "false_alarms",
    "figures",
    "fit_detector",
    "fit_suite",
    "fold_of",
    "mean_and_worst",
    "plan",
    "pooled",
    "score_task",
    "sets_of",
    "suite",
    "tpr_at_fpr",
    "worst_case_scores",
]
