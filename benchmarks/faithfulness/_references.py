"""The photographs, what pixels are replaced by, and the score: insertion minus deletion.

References that methods fill with themselves are *shared*: a method that masks with a blur knows what the network makes
of blurred regions. *Unshared* are those that no method uses: the next photograph in the fixed order, and noise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ce_plugin.datasets import read_image
from ce_plugin.evaluation import insertion_deletion, reference_images
from ce_plugin.models import as_batch, efficientnet_lite0, load_mobilenet
from ce_plugin.models.vision import VisionModel
from ce_plugin.randomness import generator

SHARED = ("blur", "mean", "zero")
UNSHARED = ("next", "noise")
NOISE = (127.0, 64.0)
STEPS = 14
LEARNING = 25
"""So many of the first photographs for choosing taught the default what to expect; comparisons take those after."""
NETWORKS = ("EfficientNet-lite0", "MobileNet v2")


def images(multiple_of_ten: bool) -> list[Path]:
    """The reported images (index a multiple of ten), or those for choosing, in a fixed random order."""
    files = sorted((data() / "imagenet-samples").glob("*.jpg"))
    files = [file for file in files if (index_of(file) % 10 == 0) == multiple_of_ten]
    return [files[i] for i in np.random.default_rng(2026).permutation(len(files))]


def index_of(file: Path) -> int:
    """The class index, with which file names begin."""
    return int(file.name.split("_")[0])


def data() -> Path:
    """The folder of data sets."""
    if not os.environ.get("CE_PLUGIN_DATA"):
        raise SystemExit("Set CE_PLUGIN_DATA to the folder that holds imagenet-samples/.")
    return Path(os.environ["CE_PLUGIN_DATA"])


def vision_model(name: str) -> VisionModel:
    """A trained network with its preprocessing."""
    if name == "MobileNet v2":
        return load_mobilenet(data() / "mobilenet" / "mobilenet_v2_1.0_224_quant.npz")
    return efficientnet_lite0()


def prepared(file: Path, model: VisionModel) -> Tensor:
    """(1, 3, 224, 224) in model units."""
    x: Tensor = model.normalization.to_model(as_batch([read_image(file)], value_range=(0, 255)))
    return x


def references(files: list[Path], k: int, model: VisionModel) -> dict[str, Tensor]:
    """The five references of the k-th photograph, each (1, 3, 224, 224) in model units."""
    x = prepared(files[k], model)
    draw = generator(0, index_of(files[k]), "reference")
    mean, deviation = NOISE
    noise = (mean + deviation * torch.randn(x.shape, generator=draw)).clamp(0, 255)
    return {
        **reference_images(x, SHARED, normalization=model.normalization),
        "next": prepared(files[(k + 1) % len(files)], model),
        "noise": model.normalization.to_model(noise),
    }


def insertion_minus_deletion(
    probabilities: Callable[[Tensor], Tensor], x: Tensor, maps: Tensor, target: int, replaced_by: dict[str, Tensor]
) -> Tensor:
    """Scores (M, R) of maps (M, H, W) of one photograph, 14 steps."""
    several = x.expand(len(maps), -1, -1, -1)
    by = {name: image.expand_as(several) for name, image in replaced_by.items()}
    return insertion_deletion(probabilities, several, maps, target, by, STEPS).score
