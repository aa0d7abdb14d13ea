"""The detectors of the Adversarial Robustness Toolbox (ART) that are trained on attacked images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.detectors.base import DifferentiablePeer, Peer
from benchmarks.detectors.layers import LayerReader
from ce_plugin.detection.protocol import Array
from ce_plugin.errors import ArgumentError, expected
from ce_plugin.networks.forward import load_art
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import derived_seed

__all__ = ["Activations", "BinaryActivation", "BinaryInput"]

_WIDTHS = (16, 32, 64, 64, 64)
LAYER = "layer"


class Activations:
    """What ART's detectors ask of a classifier: the names of its layers, and activations.

    ART's own classifier knows the layers of a Sequential only, and leaves a hook behind at every call.
    """

    layer_names = (LAYER,)

    def __init__(self, peer: Peer, reader: LayerReader) -> None:
        self.peer, self.reader = peer, reader

    def get_activations(self, x: Array, layer: str, batch_size: int, framework: bool = False) -> Array:
        """Activations (N, D) of numpy images, as ART calls it."""
        with state_guard(self.peer.network), torch.no_grad():
            parts = [self.reader(batch)[1][0].float().cpu().numpy() for batch in self.peer._batches(x, batch_size)]
        found: Array = np.concatenate(parts)
        return found


class _Trained(DifferentiablePeer):
    """A small network, trained by ART to tell clean from attacked; the score is the log odds that it gives.

    Args:
        network: the classifier that is watched.
        epochs: of training; 20 is ART's default.
        batch_size: 128 is ART's default.
        rate: of Adam.
        seed: of the weights and of the order of images.
    """

    needs_labels = True

    def __init__(
        self, network: nn.Module, *, epochs: int = 20, batch_size: int = 128, rate: float = 1e-3, seed: int = 0
    ) -> None:
        super().__init__(network)
        for name, value in (("epochs", epochs), ("batch_size", batch_size), ("rate", rate)):
            if not value > 0:
                raise ArgumentError(expected(name, "a positive number", value))
        self.epochs, self.batch_size, self.rate, self.seed = epochs, batch_size, rate, seed
        self.detector: Any = None
        self.watcher: nn.Module = nn.Identity()

    def _train(self, x: Array, shape: tuple[int, ...], labels: Array, make: Callable[[Any], Any]) -> None:
        """Build the watching network and let ART's detector, which ``make`` makes of it, learn from x."""
        from art.estimators.classification import PyTorchClassifier

        device = self._on_network(torch.zeros(1)).device
        cuda = device.type == "cuda"
        with state_guard(seed=derived_seed(self.seed, self.name)), torch.cuda.device(device) if cuda else nullcontext():
            self.watcher = _watcher(shape)
            estimator = PyTorchClassifier(
                self.watcher,
                loss=nn.CrossEntropyLoss(),
                input_shape=shape,
                nb_classes=2,
                optimizer=torch.optim.Adam(self.watcher.parameters(), lr=self.rate),
                device_type="gpu" if cuda else "cpu",
            )
            self.detector = make(estimator)
            one_hot = np.eye(2, dtype=np.float32)[labels]
            self.detector.fit(x.astype(np.float32), one_hot, batch_size=self.batch_size, nb_epochs=self.epochs)
        self.watcher.eval()

    def _odds(self, values: Tensor) -> Tensor:
        like = next(self.watcher.parameters())
        logits: Tensor = self.watcher(values.to(like.device, like.dtype))
        return logits[:, 1] - logits[:, 0]


class BinaryInput(_Trained):
    """ART's BinaryInputDetector: a network learns to tell attacked images from clean ones.

    ART leaves the network to the user; here it is as many convolutions (16 to 64 filters, ReLU, pooling) as bring the
    image to 8 pixels or fewer, at least one, and a linear layer. It needs attacked images.

    Args:
        network: the classifier; not run.
        epochs: of training; 20 is ART's default.
        batch_size: 128 is ART's default.
        rate: of Adam.
        seed: of the weights and of the order of images.

    Attributes:
        detector: ART's detector, after ``fit``.
        passes: 0: the classifier is not run.

    Raises:
        ArgumentError: a setting that is not positive.

    Example:
        >>> images = np.random.default_rng(0).random((32, 1, 8, 8), dtype=np.float32)
        >>> detector = BinaryInput(nn.Flatten(), epochs=1)
        >>> detector.fit(images, np.arange(32) % 2)
        >>> detector.score(images).shape
        (32,)

    Source: Metzen, Genewein, Fischer, Bischoff, ICLR 2017 (arXiv 1702.04267); Gong, Wang, Ku 2017 (arXiv 1704.04960);
        ``art.defences.detector.evasion.BinaryInputDetector``. Tests hold the score against ART's own report.
    """

    name = "ART BinaryInput"
    passes = 0.0

    def _fit(self, images: Array, labels: npt.NDArray[np.int64] | None) -> None:
        load_art()
        from art.defences.detector.evasion import BinaryInputDetector

        self._train(images, images.shape[1:], cast(Array, labels), BinaryInputDetector)

    def _scores(self, images: Tensor) -> Tensor:
        return self._odds(images)


class BinaryActivation(_Trained):
    """ART's BinaryActivationDetector: a network learns to tell them apart by the activations of a layer.

    ART leaves the network to the user; here it has one hidden layer of 128. It needs attacked images.

    Args:
        network: images (N, C, H, W) in image units to logits.
        layer: a module or its dotted name; None means the last one that has a map or is dense, before the logits.
        epochs: of training; 20 is ART's default.
        batch_size: 128 is ART's default.
        rate: of Adam.
        seed: of the weights and of the order of images.

    Attributes:
        detector: ART's detector, after ``fit``.

    Raises:
        ArgumentError: a setting that is not positive.

    Example:
        >>> images = np.random.default_rng(0).random((32, 1, 4, 4), dtype=np.float32)
        >>> detector = BinaryActivation(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(16, 2)), epochs=1)
        >>> detector.fit(images, np.arange(32) % 2)
        >>> detector.score(images).shape
        (32,)

    Source: Metzen et al., ICLR 2017 (arXiv 1702.04267); ``art.defences.detector.evasion.BinaryActivationDetector``.
        Tests hold the score against ART's own report.
    """

    name = "ART BinaryActivation"

    def __init__(
        self,
        network: nn.Module,
        *,
        layer: nn.Module | str | None = None,
        epochs: int = 20,
        batch_size: int = 128,
        rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(network, epochs=epochs, batch_size=batch_size, rate=rate, seed=seed)
        self.reader = LayerReader(network, None if layer is None else [layer], pool=None, most=1)

    def _fit(self, images: Array, labels: npt.NDArray[np.int64] | None) -> None:
        load_art()
        from art.defences.detector.evasion import BinaryActivationDetector

        source = Activations(self, self.reader)
        shape = source.get_activations(images[:1], LAYER, 1).shape[1:]
        self._train(images, shape, cast(Array, labels), lambda net: BinaryActivationDetector(source, net, LAYER))

    def _scores(self, images: Tensor) -> Tensor:
        return self._odds(self.reader(images)[1][0])


def _watcher(shape: tuple[int, ...]) -> nn.Sequential:
    """The small network that tells clean from attacked: of images (C, H, W), or of vectors (D,)."""
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(shape[0], 128), nn.ReLU(), nn.Linear(128, 2))
    layers: list[nn.Module] = []
    channels, height, width = shape
    for filters in _WIDTHS:
        if (layers and max(height, width) <= 8) or min(height, width) < 2:
            break
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels, height, width = filters, height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, 2))
