"""The ten networks of the engine's benchmarks, initialised so that their units have effects.

One has trained weights. With torchvision's own initialisation the logits of the others would hardly depend on the image
(ViT's head is zero, ConvNeXt's blocks are scaled by 1e-6), so that every engine would look exact on them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlock

from ce_plugin.datasets import read_image
from ce_plugin.interventions import Normalization
from ce_plugin.models import Framing, as_batch, efficientnet_lite0

HOW = (
    "EfficientNet-lite0 has its trained weights. The others are torchvision's architectures, all convolutions and"
    " linear layers drawn by He's rule (normal, fan in), biases and ViT's class token and positions from N(0, 0.1),"
    " ConvNeXt's layer scales 1, the head from N(0, 0.05); statistics of batch norm were re-estimated on 32"
    " photographs. Seeds are fixed."
)
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE = Normalization(127.0, 128.0)
STATISTICS = 32


@dataclass(frozen=True)
class Architecture:
    """How a network is built, and its early, middle and last layer: name -> dimension of the units."""

    build: Callable[[], nn.Module]
    layers: dict[str, int]
    head: str = ""
    size: int = 224


NETWORKS: dict[str, Architecture] = {
    "VGG-16": Architecture(
        lambda: models.vgg16(init_weights=False), {"features.4": 1, "features.16": 1, "features.29": 1}, "classifier.6"
    ),
    "ResNet-18": Architecture(models.resnet18, {"layer1": 1, "layer3": 1, "layer4": 1}, "fc"),
    "ResNet-50": Architecture(models.resnet50, {"layer1": 1, "layer3": 1, "layer4": 1}, "fc"),
    "DenseNet-121": Architecture(
        models.densenet121, {"features.pool0": 1, "features.transition2": 1, "features.norm5": 1}, "classifier"
    ),
    "MobileNetV3-small": Architecture(
        models.mobilenet_v3_small, {"features.0": 1, "features.6": 1, "features.12": 1}, "classifier.3"
    ),
    "EfficientNet-lite0": Architecture(lambda: efficientnet_lite0().model, {"_blocks.1": 1, "_blocks.8": 1, "_bn1": 1}),
    "Inception v3": Architecture(
        lambda: models.inception_v3(aux_logits=False, transform_input=False, init_weights=False),
        {"Conv2d_2b_3x3": 1, "Mixed_6b": 1, "Mixed_7c": 1},
        "fc",
        299,
    ),
    "ConvNeXt-tiny": Architecture(
        models.convnext_tiny, {"features.1": 1, "features.5": 1, "features.7": 1}, "classifier.2"
    ),
    "ViT-B/16": Architecture(
        models.vit_b_16,
        {f"encoder.layers.encoder_layer_{i}": 2 for i in (1, 6, 10)},
        "heads.head",
    ),
    "Swin-T": Architecture(models.swin_t, {"features.1": 3, "features.5": 3, "features.7": 3}, "head"),
}


def photographs(count: int, size: int = 224) -> Tensor:
    """Photographs of imagenet-samples in a fixed order, (count, 3, size, size), values 0 to 1."""
    files = image_files()
    chosen = [files[i] for i in np.random.default_rng(7).permutation(len(files))[:count]]
    return as_batch([read_image(file) for file in chosen], Framing(size, resize=round(size / 0.875)))


def image_files() -> list[Path]:
    """The photographs of imagenet-samples by class index, with which the file names begin."""
    if not os.environ.get("CE_PLUGIN_DATA"):
        raise SystemExit("Set CE_PLUGIN_DATA to the folder that holds imagenet-samples/.")
    return sorted((Path(os.environ["CE_PLUGIN_DATA"]) / "imagenet-samples").glob("*.jpg"))


def network(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A network in eval mode and one photograph, (1, 3, size, size), in model units."""
    config = NETWORKS[name]
    images = photographs(STATISTICS + 1, config.size)
    if not config.head:
        return config.build().eval().to(dtype), LITE.to_model(images[-1:] * 255).to(dtype)
    images = IMAGENET.to_model(images)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = config.build().eval()
        _draw(model, config.head)
    _estimate_statistics(model, images[:-1])
    return model.to(dtype), images[-1:].to(dtype)


def _draw(model: nn.Module, head: str) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.1)
        if isinstance(module, CNBlock):
            nn.init.ones_(module.layer_scale)
    for key, parameter in model.named_parameters():
        if key.endswith(("class_token", "pos_embedding")):
            nn.init.normal_(parameter, 0, 0.1)
    last: Any = model.get_submodule(head)
    nn.init.normal_(last.weight, 0, 0.05)


def _estimate_statistics(model: nn.Module, images: Tensor) -> None:
    """Set means and variances of every batch norm from these images; nothing else is in training mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    if norms:
        with torch.inference_mode():
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
