"""The Captum face: attribution classes."""

from ce_plugin.attribution.causal_effect import CausalEffect
from ce_plugin.attribution.effect_map import CausalEffectMap
from ce_plugin.attribution.layer_effect import ConceptCausalEffect, LayerCausalEffect
from ce_plugin.attribution.mediation import CausalMediation

__all__ = ["CausalEffect", "CausalEffectMap", "CausalMediation", "ConceptCausalEffect", "LayerCausalEffect"]
