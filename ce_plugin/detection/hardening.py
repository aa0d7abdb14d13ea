"""Images within a bound that lead a network furthest away from an answer: what a denoiser is hardened against."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["worst_nearby"]

_STEPS = 4
# All steps together reach two and a half times as far as the bound.
_REACH = 2.5


def worst_nearby(
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    answers: Tensor,
    bounds: Tensor,
    value_range: tuple[float, float],
    random: torch.Generator,
) -> Tensor:
    """Of each image a neighbour whose answer is as unlikely as a few projected steps make it.

    From a uniformly random start, four steps along the sign of the gradient of -log p(answer).

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
