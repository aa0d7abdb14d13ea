"""Readers: where images come from. Nothing here knows about effects."""

from ce_plugin.datasets.images import Framing, as_batch, read_image, sample_photographs

__all__ = ["Framing", "as_batch", "read_image", "sample_photographs"]
