"""A report that a person would rather look at than read: one HTML file, and the manifest that reproduces it.

:func:`study` runs the sections of a photograph, :func:`save_report` writes their page. A :class:`Section` of your own
joins them; see "Write your own".
"""

from ce_plugin._lazy import deprecated_names
from ce_plugin.files import check_out
from ce_plugin.report.alarms import AlarmShown, Screened, Screening, save_screening, screen
from ce_plugin.report.comparison import ComparisonStudy, save_comparison
from ce_plugin.report.concepts import Concept, ConceptStudy, Example, concept_study, save_concepts
from ce_plugin.report.evaluation import (
    AttackResult,
    DetectorAttack,
    DetectorTrial,
    attack_to_learn,
    detector_attack,
    digits_trial,
    save_evaluation,
    try_detector,
)
from ce_plugin.report.expected import ExpectedStudy, save_expected
from ce_plugin.report.layer import carried_by, carried_record
from ce_plugin.report.page import render, save_report, study
from ce_plugin.report.photograph import (
    ATTACKS,
    OUTCOMES,
    Answer,
    Carried,
    Case,
    ClassMaps,
    LayerCase,
    LayerStudy,
    Plan,
    Study,
    check_class,
    grad_cam,
    planned_attack,
    saliency,
)
from ce_plugin.report.sections import (
    Section,
    build_manifest,
    file_sha256,
    state_sha256,
    tensor_sha256,
)

__all__ = [
    "ATTACKS",
    "OUTCOMES",
    "AlarmShown",
    "Answer",
    "AttackResult",
    "Carried",
    "Case",
    "ClassMaps",
    "ComparisonStudy",
    "Concept",
    "ConceptStudy",
    "DetectorAttack",
    "DetectorTrial",
    "Example",
    "ExpectedStudy",
    "LayerCase",
    "LayerStudy",
    "Plan",
    "Screened",
    "Screening",
    "Section",
    "Study",
    "attack_to_learn",
    "build_manifest",
    "carried_by",
    "carried_record",
    "check_class",
    "check_out",
    "concept_study",
    "detector_attack",
    "digits_trial",
    "file_sha256",
    "grad_cam",
    "planned_attack",
    "render",
    "saliency",
    "save_comparison",
    "save_concepts",
    "save_evaluation",
    "save_expected",
    "save_report",
    "save_screening",
    "screen",
    "state_sha256",
    "study",
    "tensor_sha256",
    "try_detector",
]

__getattr__ = deprecated_names(
    __name__,
    {
        "AttackTried": "ce_plugin.report.AttackResult",
        "DETECTOR_ATTACKS": "ce_plugin.report.evaluation.DETECTOR_ATTACKS",
        "last_conv_layer": "ce_plugin.networks.last_conv_layer",
        "named_layer": "ce_plugin.networks.find_layer",
    },
)
