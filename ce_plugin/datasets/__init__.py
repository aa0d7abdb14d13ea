"""Images and data sets to explain."""

from ce_plugin.datasets.digits import digits
from ce_plugin.datasets.fashion import FASHION_CLASSES, fashion_mnist
from ce_plugin.datasets.images import read_image, sample_photographs
from ce_plugin.datasets.mnist import mnist_5k
from ce_plugin.datasets.sources import (
    DatasetImages,
    FolderImages,
    ImageSource,
    ParquetImages,
    labels_for,
    open_source,
)

__all__ = [
    "FASHION_CLASSES",
    "DatasetImages",
    "FolderImages",
    "ImageSource",
    "ParquetImages",
    "digits",
    "fashion_mnist",
    "labels_for",
    "mnist_5k",
    "open_source",
    "read_image",
    "sample_photographs",
]
