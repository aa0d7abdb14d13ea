"""Readers: where images come from. Nothing here knows about effects."""

from ce_plugin.datasets.images import read_image, sample_photographs

__all__ = ["read_image", "sample_photographs"]
