"""Networks to explain, each with its input size, normalisation and class names."""

from ce_plugin.models.digits import DigitsCNN
from ce_plugin.models.fashion import FashionCNN
from ce_plugin.models.imagenet import efficientnet_lite0, imagenet_classes
from ce_plugin.models.mobilenet import MobileNet, load_mobilenet
from ce_plugin.models.vision import Framing, VisionModel, as_batch, load_model, load_weights

__all__ = [
    "DigitsCNN",
    "FashionCNN",
    "Framing",
    "MobileNet",
    "VisionModel",
    "as_batch",
    "efficientnet_lite0",
    "imagenet_classes",
    "load_mobilenet",
    "load_model",
    "load_weights",
]
