"""Detectors that others have published, in one form, to be compared with in one harness."""

from ce_plugin.evaluation.peers.base import DifferentiablePeer, Peer, StatisticsPeer
from ce_plugin.evaluation.peers.confidence import Entropy, Margin, MaxSoftmax
from ce_plugin.evaluation.peers.density import KernelDensity
from ce_plugin.evaluation.peers.filters import FilterEffects
from ce_plugin.evaluation.peers.layers import LayerReader, default_layers
from ce_plugin.evaluation.peers.lid import LID
from ce_plugin.evaluation.peers.mahalanobis import Mahalanobis
from ce_plugin.evaluation.peers.mlloo import MLLOO
from ce_plugin.evaluation.peers.nss import NSS
from ce_plugin.evaluation.peers.registry import PEERS, peers
from ce_plugin.evaluation.peers.squeezing import FeatureSqueezing, NonLocalMeans, paper_squeezers
from ce_plugin.evaluation.peers.toolbox import BinaryActivation, BinaryInput
from ce_plugin.evaluation.peers.toolbox_scans import Beyond, SubsetScanning

__all__ = [
    "LID",
    "MLLOO",
    "NSS",
    "PEERS",
    "Beyond",
    "BinaryActivation",
    "BinaryInput",
    "DifferentiablePeer",
    "Entropy",
    "FeatureSqueezing",
    "FilterEffects",
    "KernelDensity",
    "LayerReader",
    "Mahalanobis",
    "Margin",
    "MaxSoftmax",
    "NonLocalMeans",
    "Peer",
    "StatisticsPeer",
    "SubsetScanning",
    "default_layers",
    "paper_squeezers",
    "peers",
]
