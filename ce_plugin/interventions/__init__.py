"""Interventions: what ``do`` sets."""

from ce_plugin.interventions.adversarial import Adversarial
from ce_plugin.interventions.attacks import AttackResult
from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.interventions.denoising import Denoise
from ce_plugin.interventions.masking import PixelMask
from ce_plugin.interventions.nodes import MeanOut, Patch, Resample, ZeroOut
from ce_plugin.interventions.normalization import Normalization
from ce_plugin.interventions.smoothing import Smooth

__all__ = [
    "Adversarial",
    "AttackResult",
    "Context",
    "Denoise",
    "Intervention",
    "MeanOut",
    "Normalization",
    "Patch",
    "PixelMask",
    "Resample",
    "Smooth",
    "ZeroOut",
]
