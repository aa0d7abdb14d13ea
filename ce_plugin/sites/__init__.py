"""Sites: which variables can be set, and the units into which they are grouped."""

from ce_plugin.sites.concept import ConceptSite
from ce_plugin.sites.evidence import Evidence
from ce_plugin.sites.input import InputSite, Masks, Strides, Windows
from ce_plugin.sites.layer import LayerSite
from ce_plugin.sites.units import MaskUnits, Units, WindowUnits, patch_grid

__all__ = [
    "ConceptSite",
    "Evidence",
    "InputSite",
    "LayerSite",
    "MaskUnits",
    "Masks",
    "Strides",
    "Units",
    "WindowUnits",
    "Windows",
    "patch_grid",
]
