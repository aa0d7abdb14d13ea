"""Readers: where images come from. Nothing here knows about effects."""

from ce_plugin.datasets.fashion import FASHION_CLASSES, fashion_mnist
from ce_plugin.datasets.images import read_image, sample_photographs

__all__ = ["FASHION_CLASSES", "fashion_mnist", "read_image", "sample_photographs"]
