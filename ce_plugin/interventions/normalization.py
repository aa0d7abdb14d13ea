"""From the units of the picture to those of the model and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Union

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, expected

__all__ = ["Normalization", "NormalizationLike"]

Numbers = Union[float, Sequence[float]]


@dataclass(frozen=True)
class Normalization:
    """What was done to the image before the model: ``model = (image - mean) / std``, per channel (dimension 1).

    Args:
        mean: one number, or one per channel, in image units.
        std: likewise; positive.

    Raises:
        ArgumentError: std is not positive, a number is not finite, or the two have different lengths.

    Example:
        >>> n = Normalization(127.0, 128.0)
        >>> float(n.to_model(torch.tensor([[255.0]])))
        1.0
        >>> float(n.to_image(torch.tensor([[1.0]])))
        255.0
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __init__(self, mean: Numbers = 0.0, std: Numbers = 1.0) -> None:
        for name, value in (("mean", mean), ("std", std)):
            try:
                numbers = [float(value)] if isinstance(value, Real) else [float(v) for v in value]  # type: ignore[union-attr]
            except (TypeError, ValueError):
                numbers = []
            if not numbers or not all(map(math.isfinite, numbers)):
                raise ArgumentError(expected("normalization", "a pair (mean, std) of finite numbers", (mean, std)))
            object.__setattr__(self, name, tuple(numbers))
        if min(self.std) <= 0:
            raise ArgumentError(expected("normalization", "a pair (mean, std) with positive std", (mean, std)))
        if 1 not in (len(self.mean), len(self.std)) and len(self.mean) != len(self.std):
            raise ArgumentError(expected("normalization", "a mean and a std of equal lengths", (mean, std)))

    @classmethod
    def of(cls, value: NormalizationLike) -> Normalization:
        """Read ``None``, a pair ``(mean, std)`` or a Normalization."""
        if value is None:
            return cls()
        if isinstance(value, Normalization):
            return value
        if isinstance(value, (tuple, list)) and len(value) == 2:
            return cls(*value)
        raise ArgumentError(
            expected("normalization", "None or a pair (mean, std)", repr(value), "Write (127.0, 128.0), for example.")
        )

    @property
    def is_identity(self) -> bool:
        """Whether image and model units are the same."""
        return set(self.mean) == {0.0} and set(self.std) == {1.0}

    def _shaped(self, numbers: tuple[float, ...], like: Tensor) -> Tensor:
        if len(numbers) > 1 and (like.dim() < 2 or like.shape[1] != len(numbers)):
            raise ArgumentError(
                expected("normalization", f"of one number or one per channel of {tuple(like.shape)}", f"{len(numbers)}")
            )
        shape = [1, len(numbers)] + [1] * max(like.dim() - 2, 0)
        return torch.tensor(numbers, dtype=like.dtype, device=like.device).reshape(shape[: max(like.dim(), 1)])

    def to_model(self, image: Tensor) -> Tensor:
        """Image units to model units, (N, C, ...)."""
        if self.is_identity:
            return image
        return (image - self._shaped(self.mean, image)) / self._shaped(self.std, image)

    def to_image(self, model: Tensor) -> Tensor:
        """Model units to image units, (N, C, ...)."""
        if self.is_identity:
            return model
        return model * self._shaped(self.std, model) + self._shaped(self.mean, model)


NormalizationLike = Union[Normalization, "tuple[Numbers, Numbers]", None]
