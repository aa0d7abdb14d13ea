"""All peers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from benchmarks.detectors.base import Peer
from benchmarks.detectors.confidence import Entropy, Margin, MaxSoftmax
from benchmarks.detectors.density import KernelDensity
from benchmarks.detectors.filters import FilterEffects
from benchmarks.detectors.lid import LID
from benchmarks.detectors.mahalanobis import Mahalanobis
from benchmarks.detectors.mlloo import MLLOO
from benchmarks.detectors.nss import NSS
from benchmarks.detectors.squeezing import FeatureSqueezing
from benchmarks.detectors.toolbox import BinaryActivation, BinaryInput, SubsetScanning
from ce_plugin.errors import unknown_name

__all__ = ["PEERS", "peers"]

PEERS: dict[str, Callable[[nn.Module], Peer]] = {
    "max-softmax": MaxSoftmax,
    "entropy": Entropy,
    "margin": Margin,
    "feature-squeezing": FeatureSqueezing,
    "mahalanobis": Mahalanobis,
    "lid": LID,
    "ml-loo": MLLOO,
    "kernel-density": KernelDensity,
    "nss": NSS,
    "filter-effects": FilterEffects,
    "art-binary-input": BinaryInput,
    "art-binary-activation": BinaryActivation,
    "art-subset-scanning": SubsetScanning,
}
"""Peers that run on any network, as their papers set them. BEYOND is none: it needs a self-supervised network."""


def peers(network: nn.Module, names: Iterable[str] | None = None, *, labels: bool = True) -> list[Peer]:
    """Peers for a network, not yet fitted.

    Args:
        network: images (N, C, H, W) in image units to logits.
        names: which of :data:`PEERS`; None means all.
        labels: whether there will be labels; if not, peers that need them are left out.

    Raises:
        UnknownNameError: there is no peer of this name.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> [peer.name for peer in peers(net, ["margin", "lid", "art-binary-input"], labels=False)]
        ['margin', 'LID']
    """
    wanted = list(PEERS) if names is None else list(names)
    for name in wanted:
        if name not in PEERS:
            raise unknown_name("names", name, PEERS)
    found = [PEERS[name](network) for name in wanted]
    return [peer for peer in found if labels or not peer.needs_labels]
