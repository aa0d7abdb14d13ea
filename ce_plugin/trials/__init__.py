"""The run: trials of the network, in batches, with nothing of the user's changed."""

from ce_plugin.trials.forward import Forward
from ce_plugin.trials.runner import Runner
from ce_plugin.trials.setting import Cost, Setting

__all__ = ["Cost", "Forward", "Runner", "Setting"]
