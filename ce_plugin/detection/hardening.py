"""What a denoiser is hardened against: images within a bound that lead a network furthest away from its answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Bounds", "worst_nearby"]

_STEPS = 2
# All steps together reach two and a half times as far as the bound.
_REACH = 2.5
_RUNGS = 15


class Bounds:
    """How far each image is moved while something is hardened: farther after its answer held, less far after it fell.

    Some images lie next to another class, and what is asked of all would be too much for these and too little for the
    others.

    Args:
        n: images.
        greatest: no bound is greater, in image units; it is reached in 15 steps.

    Example:
        >>> bounds = Bounds(3, 0.3)
        >>> bounds.learn(torch.tensor([0, 1]), torch.tensor([True, False]))
        >>> bounds.of(torch.tensor([0, 1, 2]))
        tensor([0.0400, 0.0000, 0.0200])

    Source: the idea is that of instance-adaptive adversarial training, Balaji, Goldstein, Hoffman 2019
    (arXiv 1910.08051), section 3.
    """

    def __init__(self, n: int, greatest: float) -> None:
        self.greatest, self._rung = greatest, greatest / _RUNGS
        self._bounds = torch.full((n,), self._rung)

    def of(self, rows: Tensor) -> Tensor:
        """Those of some images, (n,)."""
        return self._bounds[rows]

    def learn(self, rows: Tensor, held: Tensor) -> None:
        """Which of some images kept their answers when they were moved as far as they may be, (n,)."""
        change = torch.where(held.cpu(), self._rung, -self._rung)
        # An image may be among them twice.
        self._bounds = self._bounds.index_add(0, rows, change).clamp(0, self.greatest)


def worst_nearby(
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    answers: Tensor,
    bounds: Tensor,
    value_range: tuple[float, float],
    random: torch.Generator,
) -> Tensor:
    """Of each image a neighbour whose answer is as unlikely as a few projected steps make it.

    From a uniformly random start, two steps along the sign of the gradient of -log p(answer).

    Args:
        run: images (N, C, H, W) to logits (N, K).
        images: (N, C, H, W), inside the range of values.
        answers: classes, (N,).
        bounds: greatest change of a value of each image, (N,), in image units.
        value_range: least and greatest value of an image.
        random: draws the starts, on the CPU.

    Returns:
        (N, C, H, W), without a gradient.

    Example:
        >>> images, answers = torch.full((2, 1, 1, 2), 0.5), torch.tensor([0, 1])
        >>> bounds, random = torch.tensor([0.1, 0.2]), torch.Generator().manual_seed(0)
        >>> worst_nearby(torch.nn.Flatten(), images, answers, bounds, (0.0, 1.0), random).flatten(1)
        tensor([[0.4000, 0.6000],
                [0.7000, 0.3000]])

    Source: projected gradient descent, Madry et al., ICLR 2018 (arXiv 1706.06083), section 2.1.
    """
    bound = bounds.to(images).reshape(-1, *[1] * (images.dim() - 1))
    least, greatest = value_range
    low, high = (images - bound).clamp_min(least), (images + bound).clamp_max(greatest)
    start = torch.rand(images.shape, generator=random).to(images)
    moved = low + (high - low) * start
    for _ in range(_STEPS):
        leaf = moved.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(run(leaf), answers, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
        step = _REACH / _STEPS * bound * gradient.sign()
        moved = torch.minimum(torch.maximum(leaf.detach() + step, low), high)
    return moved
