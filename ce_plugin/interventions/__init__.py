"""Interventions: the values that ``do`` sets."""

from ce_plugin.interventions.adversarial import Adversarial
from ce_plugin.interventions.base import Context, Intervention, Normalization
from ce_plugin.interventions.blending import Blend
from ce_plugin.interventions.crafting import AttackResult
from ce_plugin.interventions.generation import ClassCounterfactual, ClassInfill, infer_latents
from ce_plugin.interventions.masking import PixelMask
from ce_plugin.interventions.nodes import MeanOut, Patch, Resample, ZeroOut
from ce_plugin.interventions.smoothing import Denoise, Smooth
from ce_plugin.interventions.synthesis import ClassVisualization

__all__ = [
    "Adversarial",
    "AttackResult",
    "Blend",
    "ClassCounterfactual",
    "ClassInfill",
    "ClassVisualization",
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
    "infer_latents",
]
