"""The three problems: images by part, which do not depend on the seed, and the classifier of a seed.

    part      for                                              Fashion-MNIST       MNIST-5k   photographs
    (train)   the classifier                                   train[0:50000]          2000             -
    fit       fitting and calibrating detectors                train[50000:56000]      1500           450
    select    choices made during development; never reported  train[56000:60000]       500           100
    test      what is reported                                 the test split          1000           350

Photographs are `imagenet-samples`, one for each of 900 classes. Seeds 0, 1 and 2 are reported; 100 is for development.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from benchmarks.detection._classifiers import (
    Array,
    Labels,
    cache_folder,
    imagenet_classifier,
    predictions,
    small_classifier,
)
from ce_plugin.datasets import fashion_mnist, read_image
from ce_plugin.datasets.mnist import mnist_5k
from ce_plugin.models import Framing, as_batch
from ce_plugin.randomness import numpy_generator

__all__ = [
    "PARTS",
    "PROBLEMS",
    "SEEDS",
    "Problem",
    "cache_folder",
    "check_problems",
    "load",
    "predictions",
    "train_split",
]

PROBLEMS = ("fashion", "mnist", "imagenet")
PARTS = ("fit", "select", "test")
SEEDS = {"fashion": (0, 1, 2), "mnist": (0, 1, 2), "imagenet": (0,)}
DEVELOPMENT_SEED = 100
MNIST_COUNTS = {"train": 200, "fit": 150, "select": 50, "test": 100}  # of each digit
PHOTOGRAPH_COUNTS = {"fit": 450, "select": 100, "test": 350}

Split = dict[str, tuple[Array, Labels]]


@dataclass(frozen=True)
class Problem:
    """A classifier and the images that detectors are fitted to and evaluated on.

    Args:
        name: one of `PROBLEMS`.
        seed: the classifier's; photographs have one classifier only.
        network: images in [0, 1] to logits, in eval mode.
        images: part -> (N, C, H, W), float32, multiples of 1/255 in [0, 1].
        labels: part -> (N,), int64, the true classes.
        n_classes: number of the network's outputs.
    """

    name: str
    seed: int
    network: nn.Module = field(repr=False)
    images: dict[str, Array] = field(repr=False)
    labels: dict[str, Labels] = field(repr=False)
    n_classes: int

    def correct(self, part: str) -> npt.NDArray[np.bool_]:
        """Which images of a part the network classifies correctly, (N,)."""
        return predictions(self.network, self.images[part]) == self.labels[part]


def load(name: str, seed: int = 0, cache: str | Path | None = None) -> Problem:
    """A problem with the classifier of this seed, which is trained if it is not in the cache."""
    split = _split(name)
    train = split.pop("train", None)
    network = imagenet_classifier() if train is None else small_classifier(name, seed, *train, cache)
    images = {part: pair[0] for part, pair in split.items()}
    labels = {part: pair[1] for part, pair in split.items()}
    return Problem(name, seed, network, images, labels, 1000 if train is None else 10)


def train_split(name: str) -> tuple[Array, Labels]:
    """Images and labels that the classifier of `fashion` or `mnist` was trained on; they are in no other part."""
    return _split(name)["train"]


def check_problems(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Exit with a usage message if one of these problems does not exist."""
    unknown = set(names) - set(PROBLEMS)
    if unknown:
        parser.error(f"no problem called {', '.join(sorted(unknown))}; there are {', '.join(PROBLEMS)}")


def data_folder(name: str) -> Path:
    """A data set in the folder CE_PLUGIN_DATA (an environment variable)."""
    if not os.environ.get("CE_PLUGIN_DATA"):
        raise SystemExit(f"Set CE_PLUGIN_DATA to the folder that holds {name}/.")
    return Path(os.environ["CE_PLUGIN_DATA"]) / name


def _split(name: str) -> Split:
    return {"fashion": _fashion, "mnist": _mnist, "imagenet": _photographs}[name]()


def _fashion() -> Split:
    folder = data_folder("fashion-mnist")
    x, y = (tensor.numpy() for tensor in fashion_mnist(folder, "train"))
    test_x, test_y = (tensor.numpy() for tensor in fashion_mnist(folder, "test"))
    bounds = {"train": slice(0, 50000), "fit": slice(50000, 56000), "select": slice(56000, 60000)}
    return {part: (x[rows], y[rows]) for part, rows in bounds.items()} | {"test": (test_x, test_y)}


def _mnist() -> Split:
    x, y = (tensor.numpy() for tensor in mnist_5k())
    draw = numpy_generator(0, "mnist-5k")
    rows: dict[str, list[npt.NDArray[np.int64]]] = {part: [] for part in MNIST_COUNTS}
    for digit in range(10):
        order = draw.permutation(np.flatnonzero(y == digit))
        for part, chosen in zip(
            MNIST_COUNTS, np.split(order, np.cumsum(list(MNIST_COUNTS.values()))[:-1]), strict=True
        ):
            rows[part].append(chosen)
    mixed = {part: draw.permutation(np.concatenate(chosen)) for part, chosen in rows.items()}
    return {part: (x[chosen], y[chosen]) for part, chosen in mixed.items()}


def _photographs() -> Split:
    files = sorted(data_folder("imagenet-samples").glob("*.jpg"))
    # They are 224 x 224 already and not resampled, so that every value is a multiple of 1/255.
    x = as_batch([read_image(file) for file in files], Framing(224)).numpy()
    y = np.array([int(file.name.split("_")[0]) for file in files], dtype=np.int64)
    order = numpy_generator(0, "imagenet-samples").permutation(len(files))
    parts = np.split(order, np.cumsum(list(PHOTOGRAPH_COUNTS.values()))[:-1])
    return {part: (x[rows], y[rows]) for part, rows in zip(PHOTOGRAPH_COUNTS, parts, strict=True)}
