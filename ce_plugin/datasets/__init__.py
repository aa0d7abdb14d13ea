"""Images and data sets to explain."""

from ce_plugin.datasets.cifar import CIFAR10_CLASSES, cifar10_sheets
from ce_plugin.datasets.digits import digits
from ce_plugin.datasets.fashion import FASHION_CLASSES, fashion_mnist
from ce_plugin.datasets.images import read_image, sample_photographs
from ce_plugin.datasets.labelled import ImageFiles, birds, class_folders, cub200, imagenet_samples
from ce_plugin.datasets.mnist import mnist, mnist_5k, usps
from ce_plugin.datasets.sources import (
    DatasetImages,
    FolderImages,
    ImageSource,
    ParquetImages,
    data_folder,
    labels_for,
    matched_classes,
    open_source,
)
from ce_plugin.datasets.xrays import FINDINGS, Box, XRays, box_mask, chest_xray14, pneumonia_xrays

__all__ = [
    "CIFAR10_CLASSES",
    "FASHION_CLASSES",
    "FINDINGS",
    "Box",
    "DatasetImages",
    "FolderImages",
    "ImageFiles",
    "ImageSource",
    "ParquetImages",
    "XRays",
    "birds",
    "box_mask",
    "chest_xray14",
    "cifar10_sheets",
    "class_folders",
    "cub200",
    "data_folder",
    "digits",
    "fashion_mnist",
    "imagenet_samples",
    "labels_for",
    "matched_classes",
    "mnist",
    "mnist_5k",
    "open_source",
    "pneumonia_xrays",
    "read_image",
    "sample_photographs",
    "usps",
]
