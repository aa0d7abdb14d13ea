"""Causal effects of interventions on vision networks, for Captum and the Adversarial Robustness Toolbox.

Every attribution is an experiment: an *intervention* says which value ``do`` sets, a *design* which units are set in
each trial, the *engine* runs the trials on the network, an *estimator* turns their outcomes into effects with standard
errors, and thin faces hand these to Captum.
"""

from ce_plugin._version import __version__
from ce_plugin.attribution import CausalEffect, CausalEffectMap, CausalMediation, ConceptCausalEffect, LayerCausalEffect
from ce_plugin.effects import Estimate
from ce_plugin.sites import ConceptSite, Evidence, InputSite, LayerSite

__all__ = [
    "CausalEffect",
    "CausalEffectMap",
    "CausalMediation",
    "ConceptCausalEffect",
    "ConceptSite",
    "Estimate",
    "Evidence",
    "InputSite",
    "LayerCausalEffect",
    "LayerSite",
    "__version__",
]
