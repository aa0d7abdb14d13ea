"""The run: trials of the network, in batches, with nothing of the user's changed."""

from ce_plugin.networks.forward import Forward
from ce_plugin.trials.batches import Cost, TrialSpec
from ce_plugin.trials.runner import Runner

__all__ = ["Cost", "Forward", "Runner", "TrialSpec"]
