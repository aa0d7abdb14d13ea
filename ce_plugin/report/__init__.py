"""A report that a person would rather look at than read: one HTML file, and the manifest that reproduces it."""

from ce_plugin.report.attacks import evidence_name, planned_attack
from ce_plugin.report.carriers import carried_by
from ce_plugin.report.concept_page import save_concepts
from ce_plugin.report.concepts import Concept, ConceptStudy, Example, concept_study
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
from ce_plugin.report.record import carried_record, record

__all__ = [
    "ATTACKS",
    "OUTCOMES",
    "Answer",
    "Carried",
    "Case",
    "ClassMaps",
    "Concept",
    "ConceptStudy",
    "Example",
    "LayerCase",
    "LayerStudy",
    "Plan",
    "Study",
    "build_manifest",
    "carried_by",
    "carried_record",
    "check_class",
    "check_out",
    "concept_study",
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
    "save_report",
    "state_sha256",
    "study",
    "tensor_sha256",
]
