"""The run: trials of the network, in batches, with nothing of the user's changed."""

from ce_plugin._lazy import deprecated_names
from ce_plugin.trials.batches import Cost

__all__ = ["Cost"]

__getattr__ = deprecated_names(
    __name__,
    {
        "Forward": "ce_plugin.networks.Forward",
        "Runner": "ce_plugin.trials._runner.Runner",
        "TrialSpec": "ce_plugin.trials.batches.TrialSpec",
    },
)
