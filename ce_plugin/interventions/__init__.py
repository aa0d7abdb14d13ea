"""Interventions: what ``do`` sets."""

from ce_plugin.interventions.adversarial import Adversarial
from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.interventions.masking import PixelMask
from ce_plugin.interventions.normalization import Normalization

__all__ = ["Adversarial", "Context", "Intervention", "Normalization", "PixelMask"]
