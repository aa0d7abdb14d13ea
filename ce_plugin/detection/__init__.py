"""Detectors of adversarial examples, and the attack on them: the face to the Adversarial Robustness Toolbox."""

from ce_plugin.detection.protocol import Detector, DifferentiableDetector

__all__ = ["Detector", "DifferentiableDetector"]
