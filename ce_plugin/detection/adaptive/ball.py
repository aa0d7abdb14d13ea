"""Where the attack may go: within eps of the images, inside the clip values, and at values that a file can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Ball", "flat_norm", "per_image"]

# Share of a level, and of eps, by which rounding of the arithmetic may miss.
_TOLERANCE = 1e-3
_SLACK = 1e-6


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Values (N,) shaped to multiply images (N, ...)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def flat_norm(images: Tensor) -> Tensor:
    """Euclidean norm of each image, (N,)."""
    norms: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return norms


class Ball:
    """The images within eps of the clean ones that lie inside the clip values.

    Args:
        clean: (N, ...), in image units, inside the clip values.
        eps: radius in image units; ``math.inf``: everything inside the clip values.
        norm: "inf" or "2".
        clip: lowest and highest value of an image.
        levels: how many values a stored pixel can take, equally spaced over the clip values; None is no rounding.
    """

    def __init__(self, clean: Tensor, eps: float, norm: str, clip: tuple[float, float], levels: int | None) -> None:
        self.clean = clean
        self.eps = eps
        self.norm = norm
        self.is_box = norm == "inf" or math.isinf(eps)
        self.clip = clip
        self.levels = levels
        self._steps = 1 if levels is None else levels - 1
        reach = eps if norm == "inf" else math.inf
        self.low = (clean - reach).clamp_min(clip[0])
        self.high = (clean + reach).clamp_max(clip[1])

    def select(self, rows: Tensor) -> Ball:
        """The ball of some of the images."""
        return Ball(self.clean[rows], self.eps, self.norm, self.clip, self.levels)

    @property
    def radius(self) -> float:
        """What a step is measured by: eps, but no more than the ball leaves room for."""
        span = self.clip[1] - self.clip[0]
        if self.is_box:
            return min(self.eps, span)
        return min(self.eps, span * math.sqrt(self.clean[0].numel()))

    @property
    def is_frozen(self) -> bool:
        """Whether rounding leaves no room for any change."""
        return self.levels is not None and self.eps * (self._steps + _TOLERANCE) < self.clip[1] - self.clip[0]

    def project(self, images: Tensor) -> Tensor:
        """The images brought into the ball: for both norms no farther from the clean ones than they were."""
        if self.is_box:
            return torch.minimum(torch.maximum(images, self.low), self.high)
        change = images - self.clean
        shrunk = self.clean + change * per_image((self.eps / flat_norm(change).clamp_min(1e-30)).clamp_max(1), change)
        return shrunk.clamp(*self.clip)

    def contains(self, images: Tensor) -> Tensor:
        """Whether each image lies inside, but for the rounding of the arithmetic, (N,)."""
        slack = _SLACK * (self.clip[1] - self.clip[0])
        inside = ((images >= self.low - slack) & (images <= self.high + slack)).flatten(1).all(dim=1)
        return inside if self.is_box else inside & (flat_norm(images - self.clean) <= self.eps * (1 + _SLACK) + slack)

    def store(self, images: Tensor) -> Tensor:
        """Images of the ball as a file would hold them: the nearest level that lies in the ball."""
        if self.levels is None:
            return images
        place = self._place(images)
        if self.is_box:
            lowest = (self._place(self.low) - _TOLERANCE).ceil()
            highest = (self._place(self.high) + _TOLERANCE).floor()
            return self._value(torch.minimum(torch.maximum(place.round(), lowest), highest))
        near = self._value(place.round())
        # Rounding up may leave a Euclidean ball; rounding towards the clean image does not.
        inward = torch.where(images >= self.clean, (place + _TOLERANCE).floor(), (place - _TOLERANCE).ceil())
        return torch.where(per_image(self.contains(near), near), near, self._value(inward))

    def random(self, generators: Sequence[torch.Generator]) -> Tensor:
        """A random point for each image: uniform in the box, or in direction and length in a Euclidean ball."""
        clean = self.clean
        shape = clean.shape[1:]
        if self.is_box:
            share = torch.stack([torch.rand(shape, generator=g, dtype=clean.dtype) for g in generators])
            return self.low + (self.high - self.low) * share.to(clean.device)
        noise = torch.stack([torch.randn(shape, generator=g, dtype=clean.dtype) for g in generators]).to(clean.device)
        length = torch.stack([torch.rand((), generator=g, dtype=clean.dtype) for g in generators]).to(clean.device)
        return self.project(clean + noise * per_image(self.radius * length / flat_norm(noise), noise))

    def _place(self, images: Tensor) -> Tensor:
        """Position on the scale of levels, 0 to levels - 1, not rounded."""
        return (images - self.clip[0]) * self._steps / (self.clip[1] - self.clip[0])

    def _value(self, place: Tensor) -> Tensor:
        """The value at a level: for clip values (0, 1) exactly level / (levels - 1)."""
        return place.clamp(0, self._steps) * (self.clip[1] - self.clip[0]) / self._steps + self.clip[0]
