"""Residual networks for CIFAR-10, and small ones that were trained against attacks."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from ce_plugin.errors import ArgumentError, FileError, expected, unknown_name
from ce_plugin.interventions.base import Normalization
from ce_plugin.models.vision import Framing, VisionModel, load_state, read_weights, with_weights
from ce_plugin.networks.guard import state_guard

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Shortcut(nn.Module):
    """He et al.'s option A: every second row and column, and channels of zeros on both sides.

    Example:
        >>> import torch
        >>> Shortcut(8)(torch.ones(1, 4, 4, 4)).shape
        torch.Size([1, 8, 2, 2])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, channels, h / 2, w / 2)."""
        more = (self.channels - x.shape[1]) // 2
        return pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more))


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3 with batch norm around which the input passes."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if inputs == channels else Shortcut(channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, channels, h / stride, w / stride)."""
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(inner + self.shortcut(x))
        return out


class CifarResNet(nn.Module):
    """He et al.'s residual network for pictures of 32 x 32: 16, 32 and 64 channels, ``depth = 6 n + 2`` layers.

    Args:
        depth: 20, 32, 44, 56 ...

    Raises:
        ArgumentError: another depth.

    Example:
        >>> import torch
        >>> CifarResNet(20).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Source: He et al. 2016 (arXiv 1512.03385), section 4.2.
    """

    def __init__(self, depth: int = 20) -> None:
        super().__init__()
        n, rest = divmod(depth - 2, 6)
        if n < 1 or rest:
            raise ArgumentError(expected("depth", "6 n + 2, such as 20, 32 or 56", depth))
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(BasicBlock(c if k else max(16, c // 2), c, 1 if k or c == 16 else 2) for k in range(n)))
            for c in (16, 32, 64)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, 32, 32), in model units, to logits (N, 10)."""
        planes = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(images))))))
        logits: Tensor = self.linear(self.pool(planes).flatten(1))
        return logits


def cifar_resnet(depth: int = 20, weights: str | PathLike[str] | None = None) -> VisionModel:
    """A residual network for CIFAR-10 with its preparation of pictures.

    Args:
        depth: 20, 32, 44, 56 ...
        weights: a state dictionary (names conv1, bn1, layer1.0.conv1 ... linear); None: untrained.

    Raises:
        ArgumentError: another depth.
        FileError, ModelError: as :func:`~ce_plugin.models.load_weights`.

    Example:
        >>> cifar_resnet(20).normalization.mean
        (0.485, 0.456, 0.406)
    """
    return VisionModel(
        with_weights(lambda: CifarResNet(depth), weights),
        name=f"ResNet-{depth}{'' if weights is not None else ' (untrained)'}",
        framing=Framing(32),
        normalization=_IMAGENET,
        class_names=_CLASSES,
    )


class PlainBlock(nn.Module):
    """Two convolutions of 3 x 3 without batch norm; a convolution of 1 x 1 where the shape changes."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        same = stride == 1 and inputs == channels
        self.shortcut = nn.Sequential() if same else nn.Sequential(nn.Conv2d(inputs, channels, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, channels, h / stride, w / stride)."""
        return relu(self.conv2(relu(self.conv1(x))) + self.shortcut(x))


class PlainResNet(nn.Module):
    """A small residual network without batch norm for pictures of 32 x 32.

    Args:
        widths: channels of the first convolution and of each stage, which halves the sides and has two blocks.

    Example:
        >>> import torch
        >>> PlainResNet((8, 16))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Source: the models of alpha-beta-CROWN (Wang et al. 2021, arXiv 2103.06624).
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 2, padding=1)
        self.stages = [f"layer{k}" for k in range(1, len(widths))]
        for k, name in enumerate(self.stages, 1):
            setattr(
                self,
                name,
                nn.Sequential(PlainBlock(widths[k - 1], widths[k], 2), PlainBlock(widths[k], widths[k], 1)),
            )
        side = 32 >> len(widths)
        self.linear1, self.linear2 = nn.Linear(widths[-1] * side**2, 100), nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, 32, 32), in model units, to logits (N, 10)."""
        x = relu(self.conv1(images))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.linear2(relu(self.linear1(x.flatten(1))))
        return logits


def small_cnn(channels: int = 1, side: int = 28) -> nn.Sequential:
    """Two convolutions of 4 x 4 and stride 2, and two linear layers.

    Example:
        >>> import torch
        >>> small_cnn(3, 32)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])

    Source: Wong and Kolter 2018 (arXiv 1711.00851).
    """
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, 2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


_MEAN = (0.4914, 0.4822, 0.4465)
_DIGITS = tuple("0123456789")
# How the networks' names begin -> normalisation and classes.
_ROBUST: dict[str, tuple[Normalization, tuple[str, ...]]] = {
    "cifar_resnet": (Normalization(_MEAN, (0.2471, 0.2435, 0.2616)), _CLASSES),
    "cifar_cnn": (Normalization(_MEAN, (0.2023, 0.1994, 0.2010)), _CLASSES),
    "mnist": (Normalization(), _DIGITS),
    "fashion": (Normalization(), _FASHION),
}


def load_robust(file: str | PathLike[str]) -> VisionModel:
    """A network trained against attacks or with a certificate, from a file of its weights.

    Args:
        file: named as in public collections: ``cifar_resnet2b_adv2.npz``, ``cifar_resnet4b_adv2.npz``,
            ``cifar_cnn_a_adv2.npz``, ``mnist_cnn_a_adv.npz``, ``mnist_certified_0.1.npz``,
            ``fashion_certified_0.1.npz`` ...; the name says pictures and normalisation, the shapes the layers.

    Raises:
        UnknownNameError: a name that begins otherwise.
        FileError, ModelError: as :func:`~ce_plugin.models.load_weights`.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "mnist_cnn_a_adv.npz")
        ...     np.savez(file, **{name: value.numpy() for name, value in small_cnn().state_dict().items()})
        ...     load_robust(file).grayscale
        True

    Source: Wong and Kolter 2018 (arXiv 1711.00851); alpha-beta-CROWN (Wang et al. 2021, arXiv 2103.06624).
    """
    path = Path(file)
    kind = next((kind for kind in _ROBUST if path.name.startswith(kind)), None)
    if kind is None:
        raise unknown_name("file", path.name, _ROBUST)
    normalization, classes = _ROBUST[kind]
    state = read_weights(path)
    color = kind.startswith("cifar")
    try:
        with state_guard():
            model = _architecture(state, color)
    except (KeyError, IndexError) as error:
        wanted = "the weights of one of these networks"
        raise FileError(expected("file", wanted, f"{path.name!r} without {error}")) from error
    load_state(model, state)
    return VisionModel(
        model.eval(),
        name=path.stem,
        framing=Framing(32 if color else 28),
        normalization=normalization,
        class_names=classes,
        grayscale=not color,
    )


def _architecture(state: dict[str, Tensor], color: bool) -> nn.Module:
    """The network whose first convolution and stages have the widths of these weights."""
    if "conv1.weight" not in state:
        return small_cnn(state["0.weight"].shape[1], 32 if color else 28)
    widths = [len(state["conv1.weight"])]
    while f"layer{len(widths)}.0.conv1.weight" in state:
        widths.append(len(state[f"layer{len(widths)}.0.conv1.weight"]))
    return PlainResNet(tuple(widths))
