"""Causal effects of interventions on vision networks, for Captum and the Adversarial Robustness Toolbox."""

from ce_plugin._version import __version__

__all__ = ["__version__"]
