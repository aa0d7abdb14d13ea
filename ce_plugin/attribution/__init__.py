"""The Captum face: attribution classes."""

from ce_plugin.attribution.causal_effect import CausalEffect

__all__ = ["CausalEffect"]
