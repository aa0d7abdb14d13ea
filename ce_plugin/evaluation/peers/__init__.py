"""Detectors that others have published, in one form, to be compared with in one harness."""

from ce_plugin.evaluation.peers.mahalanobis import Mahalanobis

__all__ = ["Mahalanobis"]
