"""Detectors of adversarial examples, and the attack on them: the face to the Adversarial Robustness Toolbox."""

from ce_plugin.detection.adaptive import AdaptiveEvasion, AdaptiveReport
from ce_plugin.detection.benign import Benign
from ce_plugin.detection.calibration import Calibration, Rate, rate, realised_interval
from ce_plugin.detection.detector import CausalEffectDetector
from ce_plugin.detection.explanation import Alarm, UnusualEffect
from ce_plugin.detection.probes import CounterAttack, Denoising, Interchange, NodeZeroing, PixelMasking, Smoothing
from ce_plugin.detection.protocol import Detector, DifferentiableDetector
from ce_plugin.detection.signature import Signature

__all__ = [
    "AdaptiveEvasion",
    "AdaptiveReport",
    "Alarm",
    "Benign",
    "Calibration",
    "CausalEffectDetector",
    "CounterAttack",
    "Denoising",
    "Detector",
    "DifferentiableDetector",
    "Interchange",
    "NodeZeroing",
    "PixelMasking",
    "Rate",
    "Signature",
    "Smoothing",
    "UnusualEffect",
    "rate",
    "realised_interval",
]
