"""From a photograph of any size to the batch of squares that a network sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, expected

__all__ = ["Framing", "as_batch"]

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Framing:
    """How a photograph of any size becomes the square that a network sees: resize the shorter side, crop the centre.

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
            InputError: the image is not of the form (C, H, W).
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
    """Eight-bit pictures of any sizes as one float batch in image units.

    Args:
        images: pictures as :func:`ce_plugin.datasets.read_image` returns them, each (3, H, W), uint8.
        framing: how each is resized and cropped; None means 224 x 224.
        value_range: image units: what 0 and 255 become.

    Returns:
        (N, 3, size, size), float32, within ``value_range``.

    Raises:
        InputError: no image, or one that is not uint8.
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
