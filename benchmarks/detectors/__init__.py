"""Published detectors with a common interface, for comparison in one harness."""

from benchmarks.detectors.base import DifferentiablePeer, Peer, StatisticsPeer
from benchmarks.detectors.confidence import Entropy, Margin, MaxSoftmax
from benchmarks.detectors.density import KernelDensity
from benchmarks.detectors.filters import FilterEffects
from benchmarks.detectors.layers import LayerReader, default_layers
from benchmarks.detectors.lid import LID
from benchmarks.detectors.mahalanobis import Mahalanobis
from benchmarks.detectors.mlloo import MLLOO
from benchmarks.detectors.nss import NSS
from benchmarks.detectors.registry import PEERS, peers
from benchmarks.detectors.squeezing import FeatureSqueezing, NonLocalMeans, paper_squeezers
from benchmarks.detectors.toolbox import Beyond, BinaryActivation, BinaryInput, SubsetScanning

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
