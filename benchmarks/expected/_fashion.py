"""Fashion-MNIST and its classifier, for the benchmarks of runs over data sets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.detection._classifiers import small_classifier
from ce_plugin import Evidence, LayerCausalEffect
from ce_plugin.datasets import fashion_mnist
from ce_plugin.designs import RandomMask
from ce_plugin.expected import Sample
from ce_plugin.interventions import Adversarial, PixelMask

LAYER = "features.4"
HOW = (
    "FashionCNN (two convolutional layers), all 64 channels of its last ReLU (`features.4`), each set to zero; images"
    " of Fashion-MNIST's test set."
)


def folder() -> Path:
    """Where Fashion-MNIST lies."""
    if not os.environ.get("CE_PLUGIN_DATA"):
        raise SystemExit("Set CE_PLUGIN_DATA to the folder that holds fashion-mnist/.")
    return Path(os.environ["CE_PLUGIN_DATA"]) / "fashion-mnist"


def classifier() -> nn.Module:
    """The network, from the cache, or trained now."""
    images, labels = fashion_mnist(folder(), "train")
    network = small_classifier("fashion", 0, images.numpy(), labels.numpy())
    return network.to(memory_format=torch.contiguous_format)  # as users have it


class TestSet:
    """The test set's images, one by one, as often as it takes to have so many.

    Args:
        n: number of images.
    """

    def __init__(self, n: int = 10_000) -> None:
        self.images, self.labels = fashion_mnist(folder(), "test")
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index % 10_000], int(self.labels[index % 10_000]), f"test:{index}")


def explainer(network: nn.Module, outcome: str = "log_odds") -> LayerCausalEffect:
    """Effects of the channels."""
    return LayerCausalEffect(network, LAYER, outcome=outcome)


def evidences(network: nn.Module) -> dict[str, Any]:
    """Clean, masked at random (10 %, two draws), FGSM and PGD, as in the paper."""
    return {
        "clean": None,
        "PWM": Evidence(PixelMask("zero"), units=RandomMask(0.1, n_trials=2)),
        "FGSM": Adversarial.fgsm(network, eps=0.3),
        "PGD": Adversarial.pgd(network, eps=0.3),
    }
