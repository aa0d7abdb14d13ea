"""Networks, each with what must be known to feed it. Nothing here knows about effects."""

from ce_plugin.models.digits import DigitsCNN
from ce_plugin.models.fashion import FashionCNN
from ce_plugin.models.imagenet import efficientnet_lite0, imagenet_classes
from ce_plugin.models.vision import Framing, VisionModel, as_batch, load_model, load_weights

__all__ = [
    "DigitsCNN",
    "FashionCNN",
    "Framing",
    "VisionModel",
    "as_batch",
    "efficientnet_lite0",
    "imagenet_classes",
    "load_model",
    "load_weights",
]
