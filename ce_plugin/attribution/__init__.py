"""The Captum face: attribution classes."""

from ce_plugin.attribution.causal_effect import CausalEffect
from ce_plugin.attribution.effect_map import CausalEffectMap
from ce_plugin.attribution.layer_effect import ConceptCausalEffect, LayerCausalEffect

__all__ = ["CausalEffect", "CausalEffectMap", "ConceptCausalEffect", "LayerCausalEffect"]
