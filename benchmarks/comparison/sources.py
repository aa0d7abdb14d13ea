"""Photographs and networks of the comparison of methods, for ``ce-plugin compare``.

    ce-plugin compare benchmarks.comparison.sources:reported --model benchmarks.comparison.sources:mobilenet_v2 \\
        --methods all --images 100 --out FOLDER

Photographs are under the folder that the environment variable CE_PLUGIN_DATA names. Those whose index is a multiple of
ten are reported; nothing was chosen by them.
"""

from __future__ import annotations

from benchmarks.faithfulness._references import data, vision_model
from ce_plugin.datasets import ImageFiles, XRays, chest_xray14, imagenet_samples
from ce_plugin.models import VisionModel, pneumonia_cnn


def reported() -> ImageFiles:
    """The 100 photographs whose class index is a multiple of ten."""
    return _photographs(multiple_of_ten=True)


def choosing() -> ImageFiles:
    """The others."""
    return _photographs(multiple_of_ten=False)


def _photographs(*, multiple_of_ten: bool) -> ImageFiles:
    every = imagenet_samples(data() / "imagenet-samples")
    return every.subset(i for i, label in enumerate(every.labels.tolist()) if (label % 10 == 0) == multiple_of_ten)


def xrays() -> XRays:
    """The 36 X-rays of NIH at up to 512 pixels, some with boxes."""
    return chest_xray14(data() / "chest-xray", images="nih")


def efficientnet_lite0() -> VisionModel:
    """EfficientNet-lite0, trained on ImageNet."""
    return vision_model("EfficientNet-lite0")


def mobilenet_v2() -> VisionModel:
    """MobileNet v2, trained on ImageNet."""
    return vision_model("MobileNet v2")


def pneumonia() -> VisionModel:
    """The small network for pneumonia, with one sigmoid."""
    return pneumonia_cnn(data() / "cxr-pneumonia-cnn" / "pneumonia_cnn64.npz")
