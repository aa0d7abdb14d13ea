"""A report that a person would rather look at than read: one HTML file, and the manifest that reproduces it."""

from ce_plugin.report.attacks import evidence_name, planned_attack
from ce_plugin.report.carriers import carried_by
from ce_plugin.report.concept_page import save_concepts
from ce_plugin.report.concepts import Concept, ConceptStudy, Example, concept_study
from ce_plugin.report.detection import screen, try_detector
from ce_plugin.report.detection_page import save_evaluation, save_screening
from ce_plugin.report.detector_attacks import DETECTOR_ATTACKS, DetectorAttack, attack_to_learn, detector_attack
from ce_plugin.report.detector_findings import AlarmShown, AttackTried, DetectorTrial, Screened, Screening
from ce_plugin.report.digits import digits_trial
from ce_plugin.report.experiment import check_class, study
from ce_plugin.report.findings import (
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
)
from ce_plugin.report.manifest import build_manifest, file_sha256, state_sha256, tensor_sha256
from ce_plugin.report.page import check_out, render, save_report
from ce_plugin.report.peers import grad_cam, last_conv_layer, named_layer, saliency
from ce_plugin.report.record import carried_record, record, trial_record

__all__ = [
    "ATTACKS",
    "DETECTOR_ATTACKS",
    "OUTCOMES",
    "AlarmShown",
    "Answer",
    "AttackTried",
    "Carried",
    "Case",
    "ClassMaps",
    "Concept",
    "ConceptStudy",
    "DetectorAttack",
    "DetectorTrial",
    "Example",
    "LayerCase",
    "LayerStudy",
    "Plan",
    "Screened",
    "Screening",
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
    "evidence_name",
    "file_sha256",
    "grad_cam",
    "last_conv_layer",
    "named_layer",
    "planned_attack",
    "record",
    "render",
    "saliency",
    "save_concepts",
    "save_evaluation",
    "save_report",
    "save_screening",
    "screen",
    "state_sha256",
    "study",
    "tensor_sha256",
    "trial_record",
    "try_detector",
]
