"""The detectors of the Adversarial Robustness Toolbox (ART) that are trained on attacked images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.detectors.base import DifferentiablePeer, Peer
from benchmarks.detectors.layers import LayerReader
from ce_plugin.detection.protocol import Array
from ce_plugin.errors import ArgumentError, expected, unknown_name
from ce_plugin.networks.forward import load_art
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import derived_seed, numpy_generator

_WIDTHS = (16, 32, 64, 64, 64)
LAYER = "layer"


class Activations:
    """What ART's detectors need from a classifier: the names of its layers, and activations.

    ART's own classifier supports only the layers of a Sequential, and leaves a hook behind at every call.
    """

    layer_names = (LAYER,)

    def __init__(self, peer: Peer, reader: LayerReader) -> None:
        self.peer, self.reader = peer, reader

    def get_activations(self, x: Array, layer: str, batch_size: int, framework: bool = False) -> Array:
        """Activations (N, D) of numpy images, with ART's signature."""
        with state_guard(self.peer.network), torch.no_grad():
            parts = [self.reader(batch)[1][0].float().cpu().numpy() for batch in self.peer._batches(x, batch_size)]
        found: Array = np.concatenate(parts)
        return found


class _Trained(DifferentiablePeer):
    """A small network, trained by ART to distinguish clean from attacked images; its log odds are the score.

    Args:
        network: the classifier that is attacked.
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
        """Build the detecting network, wrap it by ``make`` in ART's detector, and train that on x."""
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
    """ART's BinaryInputDetector: a network trained to distinguish attacked images from clean ones.

    ART leaves the network to the user. Here it consists of convolutions (16 to 64 filters, ReLU, pooling) until the
    image has 8 pixels a side or fewer, at least one, and a linear layer. It needs attacked images.

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
    """ART's BinaryActivationDetector: a network trained to distinguish them by the activations of a layer.

    ART leaves the network to the user. Here it has one hidden layer of 128 units. It needs attacked images.

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
    """The small network that distinguishes clean from attacked: for images (C, H, W), or for vectors (D,)."""
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


_SCORING = ("BerkJones", "HigherCriticism", "KolmarovSmirnov")  # ART's spelling


class SubsetScanning(Peer):
    """ART's SubsetScanningDetector: the most surprising subset of a layer's activations, by their p-values.

    P-values are relative to clean images, the background; attacked images are not used.

    Args:
        network: images (N, C, H, W) in image units to logits.
        layer: a module or its dotted name; None means the last one that has a map or is dense, before the logits.
        scoring: ``"BerkJones"``, ``"HigherCriticism"`` or ``"KolmarovSmirnov"``, in ART's spelling.
        background: largest number of clean images for the p-values.
        seed: seed of the choice of the background.

    Raises:
        ArgumentError: a background below 2.
        UnknownNameError: an unknown scoring.

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
    """ART's BeyondDetectorPyTorch: do augmented versions of the image agree with it?

    It needs a network trained by self-supervision on similar images, which you must provide, and is therefore not among
    the peers that run by default. ART's class uses only that network and never runs the classifier.

    Args:
        network: the classifier; not run.
        ssl_model: a module with the modules ``backbone``, ``classifier`` and ``projector``.
        augmentations: from images (N, C, H, W) to augmented ones; random ones are seeded, the same for every image.
        n_augmentations: augmented versions of each image; 50 is ART's default.
        seed: seed of the augmentations.

    Raises:
        ArgumentError: no self-supervised network, or no augmentations.

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
            # One by one from the same seed, so that an image's augmentations do not depend on the others.
            with state_guard(self.ssl_model, seed=self.seed):
                similarity.append(float(self.detector.detect(image[None])[0][0]))
        return -torch.tensor(similarity, dtype=torch.float64)
