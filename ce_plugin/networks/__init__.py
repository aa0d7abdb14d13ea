"""Calling a network: forward and outputs, layers and hooks, the graph and its cut, the state guard, ART classifiers."""

from ce_plugin.networks.forward import Forward, OutputSelector
from ce_plugin.networks.guard import modules_of, state_guard
from ce_plugin.networks.layers import find_layer, fingerprint, inserted, last_conv_layer, read_layer
from ce_plugin.networks.scikit import SklearnHead

__all__ = [
    "Forward",
    "OutputSelector",
    "SklearnHead",
    "find_layer",
    "fingerprint",
    "inserted",
    "last_conv_layer",
    "modules_of",
    "read_layer",
    "state_guard",
]
