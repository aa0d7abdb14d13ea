"""The detectors of the Adversarial Robustness Toolbox (ART) that need no attacked images."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.detectors.base import Peer
from benchmarks.detectors.layers import LayerReader
from benchmarks.detectors.toolbox import LAYER, Activations
from ce_plugin.detection.protocol import Array
from ce_plugin.errors import ArgumentError, expected, unknown_name
from ce_plugin.networks.forward import load_art
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import numpy_generator

__all__ = ["Beyond", "SubsetScanning"]

_SCORING = ("BerkJones", "HigherCriticism", "KolmarovSmirnov")  # ART's spelling


class SubsetScanning(Peer):
    """ART's SubsetScanningDetector: the most surprising subset of a layer's activations, by their p-values.

    p-values are of clean images, the background; attacked images, where there are labels, are not used.

    Args:
        network: images (N, C, H, W) in image units to logits.
        layer: a module or its dotted name; None means the last one that has a map or is dense, before the logits.
        scoring: ``"BerkJones"``, ``"HigherCriticism"`` or ``"KolmarovSmirnov"``, in ART's spelling.
        background: clean images that p-values come from, at most.
        seed: draws the background.

    Raises:
        ArgumentError: a background below 2.
        UnknownNameError: another scoring.

    Example:
        >>> images = np.random.default_rng(0).random((32, 1, 4, 4), dtype=np.float32)
        >>> detector = SubsetScanning(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(16, 2)))
        >>> detector.fit(images)
        >>> bool(detector.score(images + 1).mean() > detector.score(images).mean())
        True

    Source: McFowland, Speakman, Neill, JMLR 2013; Cintas et al., IJCAI 2020;
        ``art.defences.detector.evasion.SubsetScanningDetector``.
    """

    name = "ART SubsetScanning"
    least = 20

    def __init__(
        self,
        network: nn.Module,
        *,
        layer: nn.Module | str | None = None,
        scoring: str = "BerkJones",
        background: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(network)
        if scoring not in _SCORING:
            raise unknown_name("scoring", scoring, _SCORING)
        if background < 2:
            raise ArgumentError(expected("background", "at least 2 clean images", background))
        self.reader = LayerReader(network, None if layer is None else [layer], pool=None, most=1)
        self.scoring, self.background, self.seed = scoring, background, seed
        self.detector: Any = None

    def _fit(self, images: Array, labels: npt.NDArray[np.int64] | None) -> None:
        load_art()
        from art.defences.detector.evasion import SubsetScanningDetector

        clean = images if labels is None else images[labels == 0]
        some = np.sort(numpy_generator(self.seed, "background").permutation(len(clean))[: self.background])
        source = Activations(self, self.reader)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.detector = SubsetScanningDetector(source, clean[some], LAYER, self.scoring, verbose=False)

    def _scores(self, images: Tensor) -> Tensor:
        with np.errstate(divide="ignore", invalid="ignore"):
            report, _ = self.detector.detect(images.cpu().numpy(), batch_size=len(images))
        return torch.as_tensor(np.asarray(report["scores"], dtype=np.float64))


class Beyond(Peer):
    """ART's BeyondDetectorPyTorch: do the neighbours that augmentation makes agree with the image?

    It needs a network trained by self-supervision on images like these, which nothing here can make: without one this
    is an error, and it is not among the peers that run by default. ART's class compares that network with itself and
    never runs the classifier that it protects.

    Args:
        network: the classifier; not run.
        ssl_model: a module with the modules ``backbone``, ``classifier`` and ``projector``.
        augmentations: from images (N, C, H, W) to augmented ones; random ones are seeded, the same for every image.
        n_augmentations: neighbours of each image; 50 is ART's default.
        seed: of the augmentations.

    Raises:
        ArgumentError: no such network, or no augmentations.

    Example:
        >>> Beyond(nn.Flatten())
        Traceback (most recent call last):
        ...
        ce_plugin.errors.ArgumentError: Expected argument `ssl_model` to be a self-supervised network with the modules
        `backbone`, `classifier` and `projector`, but got None. BEYOND cannot run without one; leave it out.

    Source: He, Zhang, Chen, et al., ICML 2024 (openreview S4LqI6CcJ3);
        ``art.defences.detector.evasion.BeyondDetectorPyTorch``.
    """

    name = "ART BEYOND"
    passes = 0.0

    def __init__(
        self,
        network: nn.Module,
        *,
        ssl_model: nn.Module | None = None,
        augmentations: Callable[[Tensor], Tensor] | None = None,
        n_augmentations: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__(network)
        if not all(hasattr(ssl_model, part) for part in ("backbone", "classifier", "projector")):
            wanted = "a self-supervised network with the modules `backbone`, `classifier` and `projector`"
            got = None if ssl_model is None else type(ssl_model).__name__
            raise ArgumentError(expected("ssl_model", wanted, got, "BEYOND cannot run without one; leave it out."))
        if not callable(augmentations):
            raise ArgumentError(expected("augmentations", "a function from images to images", augmentations))
        self.ssl_model, self.augmentations = ssl_model, augmentations
        self.n_augmentations, self.seed = n_augmentations, seed
        self.detector: Any = None

    def _fit(self, images: Array, labels: npt.NDArray[np.int64] | None) -> None:
        load_art()
        from art.defences.detector.evasion import BeyondDetectorPyTorch

        clean = images if labels is None else images[labels == 0]
        target, ssl = SimpleNamespace(model=nn.Identity()), SimpleNamespace(model=self.ssl_model)
        nearest = min(20, self.n_augmentations)
        with state_guard(self.ssl_model, seed=self.seed):
            self.detector = BeyondDetectorPyTorch(
                target, ssl, self.augmentations, aug_num=self.n_augmentations, var_K=nearest
            )
            self.detector.fit(clean.astype(np.float32), None)

    def _scores(self, images: Tensor) -> Tensor:
        similarity = []
        for image in images.cpu().numpy().astype(np.float32):
            # One by one from the same seed: an image's neighbours do not depend on the others.
            with state_guard(self.ssl_model, seed=self.seed):
                similarity.append(float(self.detector.detect(image[None])[0][0]))
        return -torch.tensor(similarity, dtype=torch.float64)
