"""Detectors of adversarial examples, and the attack on them: the face to the Adversarial Robustness Toolbox."""

# ruff: noqa: E402
from ce_plugin._lazy import deprecated_names
from ce_plugin.networks.forward import load_art

load_art()  # Before the modules that name ART's classes: importing it moves the global random state.

from ce_plugin.detection.adaptive import AdaptiveEvasion, AdaptiveReport
from ce_plugin.detection.augmentation import Augmentation
from ce_plugin.detection.calibration import Calibration, Rate, rate, realised_interval
from ce_plugin.detection.detector import CausalEffectDetector
from ce_plugin.detection.explanation import Alarm, UnusualEffect
from ce_plugin.detection.probes import (
    CounterAttack,
    Denoising,
    Interchange,
    NodeZeroing,
    PixelMasking,
    Probe,
    Response,
    Smoothing,
    View,
    effect_labels,
)
from ce_plugin.detection.protocol import Detector, DifferentiableDetector
from ce_plugin.detection.signature import Signature

__all__ = [
    "AdaptiveEvasion",
    "AdaptiveReport",
    "Alarm",
    "Augmentation",
    "Calibration",
    "CausalEffectDetector",
    "CounterAttack",
    "Denoising",
    "Detector",
    "DifferentiableDetector",
    "Interchange",
    "NodeZeroing",
    "PixelMasking",
    "Probe",
    "Rate",
    "Response",
    "Signature",
    "Smoothing",
    "UnusualEffect",
    "View",
    "effect_labels",
    "rate",
    "realised_interval",
]
__getattr__ = deprecated_names(__name__, {"Benign": "ce_plugin.detection.Augmentation"})
