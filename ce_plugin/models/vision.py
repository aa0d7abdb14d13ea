"""A network with the preparation of its inputs: size, image units, normalisation; and the names of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, InputError, TargetError, expected, unknown_name
from ce_plugin.interventions.base import Normalization

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Framing:
    """How a photograph of any size becomes a square input: resize the shorter side, crop the centre.

    Args:
        size: height and width of the square, in pixels.
        resize: what the shorter side is resized to before the crop; at least ``size``. None means ``size``.
        interpolation: ``"bilinear"``, ``"bicubic"`` or ``"nearest"``; antialiased.

    Raises:
        ArgumentError: a size below 1, a resize below the size, or an unknown interpolation.

    Example:
        >>> Framing(224, resize=256)(torch.zeros(3, 427, 640, dtype=torch.uint8)).shape
        torch.Size([3, 224, 224])
    """

    size: int = 224
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ArgumentError(expected("size", "a positive number of pixels", self.size))
        if self.resize is not None and self.resize < self.size:
            raise ArgumentError(
                expected("resize", f"None or at least size = {self.size}", self.resize, "A crop cannot be larger.")
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise ArgumentError(expected("interpolation", f"one of {_INTERPOLATIONS}", repr(self.interpolation)))

    def __call__(self, image: Tensor) -> Tensor:
        """Resize and crop one image.

        Args:
            image: (C, H, W), integers or floats.

        Returns:
            (C, size, size), of the same dtype.

        Raises:
            InputError: the image does not have the shape (C, H, W).
        """
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as transform

        if image.dim() != 3 or 0 in image.shape:
            raise InputError(expected("image", "of shape (C, H, W)", tuple(image.shape)))
        resized = transform.resize(
            image, [self.resize or self.size], interpolation=InterpolationMode(self.interpolation), antialias=True
        )
        framed: Tensor = transform.center_crop(resized, [self.size, self.size])
        return framed


def as_batch(
    images: Sequence[Tensor], framing: Framing | None = None, *, value_range: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """8-bit images of any sizes as one float batch in image units.

    Args:
        images: images as :func:`ce_plugin.datasets.read_image` returns them, each (3, H, W), uint8.
        framing: how each is resized and cropped; None means 224 x 224.
        value_range: the values, in image units, that 0 and 255 become.

    Returns:
        (N, 3, size, size), float32, within ``value_range``.

    Raises:
        InputError: no images, or one that is not uint8.
        ArgumentError: the range is empty.

    Example:
        >>> as_batch([torch.full((3, 8, 10), 255, dtype=torch.uint8)], Framing(4), value_range=(0, 255)).max()
        tensor(255.)
    """
    low, high = value_range
    if not low < high:
        raise ArgumentError(expected("value_range", "(low, high) with low < high", value_range))
    if len(images) == 0:
        raise InputError(expected("images", "at least one picture", "none"))
    frame = framing or Framing()
    framed = []
    for image in images:
        if image.dtype != torch.uint8:
            raise InputError(expected("images", "of type uint8, values 0 to 255", image.dtype, "Use `read_image`."))
        framed.append(frame(image))
    return torch.stack(framed).float() / 255.0 * (high - low) + low


@dataclass(frozen=True)
class VisionModel:
    """An image classifier with the preparation of its inputs.

    Args:
        model: the network: (N, 3, H, W) in model units to (N, C).
        name: its name in reports.
        framing: input size, and how a photograph is resized and cropped to it.
        normalization: normalisation of the image before the network, in image units.
        value_range: lowest and highest value of a pixel in image units: (0, 1), or (0, 255).
        class_names: one per output, or None.

    Raises:
        ArgumentError: ``model`` is not a module, or ``value_range`` is empty.

    Example:
        >>> net = VisionModel(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), framing=Framing(8), class_names=("a", "b"))
        >>> net.inputs([torch.zeros(3, 20, 30, dtype=torch.uint8)]).shape
        torch.Size([1, 3, 8, 8])
        >>> net.class_index("b")
        1
    """

    model: nn.Module = field(repr=False)
    name: str = "model"
    framing: Framing = field(default_factory=Framing)
    normalization: Normalization = field(default_factory=Normalization)
    value_range: tuple[float, float] = (0.0, 1.0)
    class_names: tuple[str, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ArgumentError(expected("model", "a torch.nn.Module", type(self.model).__name__))
        if not self.value_range[0] < self.value_range[1]:
            raise ArgumentError(expected("value_range", "(low, high) with low < high", self.value_range))

    def inputs(self, images: Sequence[Tensor]) -> Tensor:
        """Prepare photographs for the network.

        Args:
            images: each (3, H, W), uint8, as :func:`ce_plugin.datasets.read_image` returns them.

        Returns:
            (N, 3, size, size), float32, in model units, on the device of the network's first parameter.
        """
        batch = as_batch(images, self.framing, value_range=self.value_range)
        return self.normalization.to_model(batch).to(self.device)

    def pictures(self, inputs: Tensor) -> Tensor:
        """Inputs (N, C, H, W) in model units back to images with values in [0, 1], on the CPU, for display."""
        low, high = self.value_range
        return ((self.normalization.to_image(inputs.detach()) - low) / (high - low)).clamp(0, 1).float().cpu()

    @property
    def device(self) -> torch.device:
        """Device of the network's first parameter."""
        first = next(self.model.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def class_name(self, index: int) -> str:
        """The name of a class, or ``"class 7"`` if it has none."""
        if self.class_names is None or not 0 <= index < len(self.class_names):
            return f"class {index}"
        return self.class_names[index]

    def class_index(self, target: int | str) -> int:
        """The index of a class given by its index or its name (case does not matter).

        Raises:
            UnknownNameError: no class has this name.
            TargetError: several classes have this name, or the classes have no names.
        """
        if isinstance(target, int) or target.strip().lstrip("-").isdigit():
            return int(target)
        if self.class_names is None:
            hint = "The classes of this network have no names."
            raise TargetError(expected("target", "the index of a class", repr(target), hint))
        wanted = target.strip().casefold()
        found = [i for i, name in enumerate(self.class_names) if name.casefold() == wanted]
        if not found:
            raise unknown_name("target", target.strip(), set(self.class_names))
        if len(found) > 1:
            raise TargetError(expected("target", "a class", f"{target!r}, which names {found}", "Write the index."))
        return found[0]
