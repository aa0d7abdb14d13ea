"""A report that a person would rather look at than read: one HTML file, and the manifest that reproduces it."""

from ce_plugin.report.experiment import study
from ce_plugin.report.findings import ATTACKS, OUTCOMES, Answer, Case, ClassMaps, Plan, Study
from ce_plugin.report.manifest import build_manifest, file_sha256, state_sha256, tensor_sha256
from ce_plugin.report.page import check_out, render, save_report
from ce_plugin.report.peers import grad_cam, last_conv_layer, named_layer, saliency

__all__ = [
    "ATTACKS",
    "OUTCOMES",
    "Answer",
    "Case",
    "ClassMaps",
    "Plan",
    "Study",
    "build_manifest",
    "check_out",
    "file_sha256",
    "grad_cam",
    "last_conv_layer",
    "named_layer",
    "render",
    "saliency",
    "save_report",
    "state_sha256",
    "study",
    "tensor_sha256",
]
