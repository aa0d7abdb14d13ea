"""Small networks for handwritten digits: one that trains in seconds, and one whose weights are read."""

from __future__ import annotations

from os import PathLike

import torch
from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.interventions.base import Normalization
from ce_plugin.models.vision import Framing, VisionModel, with_weights
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import derived_seed, generator


class DigitsCNN(nn.Module):
    """Two convolutional layers and a linear one, for small grayscale pictures in ten classes.

    Args:
        size: height and width of the pictures, even.

    Attributes:
        features: conv (16), ReLU, conv (32), ReLU, max pooling.
        head: the linear layer.

    Raises:
        ArgumentError: a size that is odd, or below 2.

    Example:
        >>> DigitsCNN(16)(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        if size < 2 or size % 2:
            raise ArgumentError(expected("size", "an even number of pixels, 2 or more", size))
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(32 * (size // 2) ** 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (N, 1, size, size), values in [0, 1], to logits (N, 10)."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits

    @classmethod
    def trained(cls, images: Tensor, labels: Tensor, *, epochs: int = 12, seed: int = 0) -> DigitsCNN:
        """Train a network with Adam at a learning rate of 3e-3 in batches of 50; this takes seconds.

        Args:
            images: (N, 1, size, size), values in [0, 1].
            labels: (N,), int64, 0 to 9.
            epochs: passes over the images.
            seed: seed of the weights and of the order of the images; the global random state is not changed.

        Returns:
            The network in eval mode.

        Raises:
            InputError: images of another shape, or not one label per image.

        Example:
            >>> from ce_plugin.datasets import digits
            >>> images, labels = digits()
            >>> network = DigitsCNN.trained(images[:400], labels[:400], epochs=4)
            >>> bool((network(images[400:500]).argmax(1) == labels[400:500]).float().mean() > 0.5)
            True
        """
        if images.dim() != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3]:
            raise InputError(expected("images", "of shape (N, 1, size, size)", tuple(images.shape)))
        if len(labels) != len(images):
            raise InputError(expected("labels", f"one for each of {len(images)} images", len(labels)))
        order = generator(seed, "order")
        with state_guard(seed=derived_seed(seed, "weights")), torch.enable_grad():
            network = cls(images.shape[-1])
            optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
            for _ in range(epochs):
                for rows in torch.split(torch.randperm(len(images), generator=order), 50):
                    optimizer.zero_grad()
                    torch.autograd.backward(nn.functional.cross_entropy(network(images[rows]), labels[rows]))
                    optimizer.step()
        return network.eval()


class MnistCNN(nn.Module):
    """Two convolutions of 3 x 3 (32, 64), each with ReLU and max pooling, and two linear layers, for 28 x 28.

    Example:
        >>> MnistCNN()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        first = (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        second = (nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.features = nn.Sequential(*first, *second)
        self.classifier = nn.Sequential(nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (N, 1, 28, 28), in model units, to logits (N, 10)."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def mnist_cnn(weights: str | PathLike[str] | None = None) -> VisionModel:
    """A network for MNIST with its preparation of pictures: values 0 to 1, mean 0.1307 and deviation 0.3081.

    Args:
        weights: a state dictionary or ``.npz`` archive, such as ``mnist_cnn.npz`` of the package ccexam, which is right
            on 99 % of MNIST's test digits; None: untrained, weights by a fixed seed.

    Raises:
        FileError, ModelError: as :func:`~ce_plugin.models.load_weights`.

    Example:
        >>> network = mnist_cnn()
        >>> network.model(network.normalization.to_model(torch.rand(2, 1, 28, 28))).shape
        torch.Size([2, 10])
    """
    return VisionModel(
        with_weights(MnistCNN, weights),
        name=f"MNIST CNN{'' if weights is not None else ' (untrained)'}",
        framing=Framing(28),
        normalization=Normalization(0.1307, 0.3081),
        class_names=tuple(map(str, range(10))),
        grayscale=True,
    )
