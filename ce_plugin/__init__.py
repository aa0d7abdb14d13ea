"""Causal effects of interventions on vision networks, for Captum and the Adversarial Robustness Toolbox.

Every attribution is an experiment: an *intervention* defines the value that ``do`` sets, a *design* which units are
set in each trial, the *engine* runs the trials on the network, an *estimator* turns their outcomes into effects with
standard errors, and the attribution classes return these through Captum's interface.
"""

from typing import TYPE_CHECKING

from ce_plugin._lazy import lazy_names
from ce_plugin._version import __version__

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

if TYPE_CHECKING:
    from ce_plugin.attribution import (
        CausalEffect,
        CausalEffectMap,
        CausalMediation,
        ConceptCausalEffect,
        LayerCausalEffect,
    )
    from ce_plugin.effects import Estimate
    from ce_plugin.expected import ExpectedCausalEffect as ExpectedCausalEffect
    from ce_plugin.sites import ConceptSite, Evidence, InputSite, LayerSite
else:
    # Imported on first use, so that the help of the command line need not wait for torch.
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "CausalEffect": "ce_plugin.attribution",
            "CausalEffectMap": "ce_plugin.attribution",
            "CausalMediation": "ce_plugin.attribution",
            "ConceptCausalEffect": "ce_plugin.attribution",
            "ConceptSite": "ce_plugin.sites",
            "Estimate": "ce_plugin.effects",
            "Evidence": "ce_plugin.sites",
            # Not in __all__: it needs the extra `data`.
            "ExpectedCausalEffect": "ce_plugin.expected",
            "InputSite": "ce_plugin.sites",
            "LayerCausalEffect": "ce_plugin.attribution",
            "LayerSite": "ce_plugin.sites",
        },
        submodules=(
            "attribution",
            "concepts",
            "designs",
            "effects",
            "errors",
            "expected",
            "interventions",
            "sites",
            "trials",
        ),
    )
