"""Images and data sets to explain."""

from ce_plugin.datasets.digits import digits
from ce_plugin.datasets.fashion import FASHION_CLASSES, fashion_mnist
from ce_plugin.datasets.images import read_image, sample_photographs
from ce_plugin.datasets.mnist import mnist_5k

__all__ = ["FASHION_CLASSES", "digits", "fashion_mnist", "mnist_5k", "read_image", "sample_photographs"]
