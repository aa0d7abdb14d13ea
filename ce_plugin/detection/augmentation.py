"""Harmless alterations of clean images, which a detector should not take for attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, check_integer, check_number, check_range, expected
from ce_plugin.interventions import Smooth
from ce_plugin.interventions.base import Context
from ce_plugin.randomness import generator

# Up to this many pixels on the shorter side an image counts as a small one.
SMALL = 64

_KINDS = ("gauss", "gauss", "sign", "sign", "shift", "contrast")


@dataclass(frozen=True)
class Augmentation:
    """Random harmless alterations: sensor noise, sign noise, a shift by a pixel, less contrast.

    A detector that is fitted to clean images alone flags most images with a little noise, for no clean image had
    any. Fitted to clean images and to as many altered ones, it learns in which directions harmless changes move the
    effects, and detects attacks by the other directions. One kind is drawn for each image, at a random strength
    from none to the full one.

    Args:
        noise: greatest standard deviation of Gaussian noise, and greatest amplitude of sign noise (each value goes up
            or down by it), in image units.
        shift: greatest shift in either direction, in pixels.
        contrast: greatest loss of contrast, a share.
        value_range: least and greatest value of an image.

    Example:
        >>> images = torch.full((4, 1, 6, 6), 0.5)
        >>> altered = Augmentation(noise=0.1)(images, ids=[10, 11, 12, 13], seed=0)
        >>> altered.shape, bool((altered != images).any())
        (torch.Size([4, 1, 6, 6]), True)
        >>> bool((Augmentation(noise=0.1)(images[2:], ids=[12, 13], seed=0) == altered[2:]).all())
        True
    """

    noise: float = 0.15
    shift: int = 1
    contrast: float = 0.3
    value_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if check_number("noise", self.noise, "a number in image units, 0 or more") < 0:
            raise ArgumentError(expected("noise", "a number in image units, 0 or more", self.noise))
        check_integer("shift", self.shift, "a number of pixels, 0 or more", least=0)
        if not 0 <= check_number("contrast", self.contrast, "a share in [0, 1]") <= 1:
            raise ArgumentError(expected("contrast", "a share in [0, 1]", self.contrast))
        check_range("value_range", self.value_range)

    @classmethod
    def of(cls, shape: Sequence[int], value_range: tuple[float, float] = (0.0, 1.0)) -> Augmentation:
        """The default for images of a shape (C, H, W): photographs bear less noise than small pictures."""
        unit = value_range[1] - value_range[0]
        return cls(noise=(0.15 if min(shape[-2:]) <= SMALL else 0.06) * unit, value_range=value_range)

    def __call__(self, images: Tensor, ids: list[int], seed: int) -> Tensor:
        """Every image altered, (N, C, H, W), stored in 256 levels as a file would.

        Args:
            images: (N, C, H, W), image units.
            ids: one id per image: what is drawn depends on it and on the seed, not on the place in the batch.
            seed: of the draws.
        """
        low, high = self.value_range
        altered = []
        for image, i in zip(images, ids, strict=True):
            altered.append(self._one(image, generator(seed, i, "benign")))
        levels = (torch.stack(altered).clamp(low, high) - low) / (high - low) * 255
        return levels.round() / 255 * (high - low) + low

    def _one(self, image: Tensor, random: torch.Generator) -> Tensor:
        kind = _KINDS[int(torch.randint(len(_KINDS), (1,), generator=random))]
        strength = float(torch.rand(1, generator=random))
        if kind == "shift":
            dx, dy = torch.randint(-self.shift, self.shift + 1, (2,), generator=random).tolist()
            return Smooth.shift(dx, dy, value_range=self.value_range).values(image[None], Context(ids=(0,)))[0]
        if kind == "contrast":
            low = self.value_range[0]
            return low + (image - low) * (1 - self.contrast * strength)
        noise = torch.randn(image.shape, generator=random)
        noise = noise.sign() if kind == "sign" else noise
        return image + self.noise * strength * noise.to(image)
