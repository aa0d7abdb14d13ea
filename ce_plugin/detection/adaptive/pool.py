"""The best finds of different runs, so that later ones can start on the way from one to another."""

from __future__ import annotations

import torch
from torch import Tensor

from ce_plugin.detection.adaptive.ball import per_image

__all__ = ["Pool"]

_KEPT = 8
# Finds nearer to each other than this share of their change are one and the same.
_SAME = 0.1


class Pool:
    """For each image of a batch the best finds so far that differ from each other.

    Args:
        clean: the images, (N, ...).
    """

    def __init__(self, clean: Tensor) -> None:
        self.clean = clean
        self.images = clean[:, None].repeat_interleave(_KEPT, dim=1)
        self.scores = torch.full((len(clean), _KEPT), torch.inf, dtype=torch.float64, device=clean.device)

    def offer(self, images: Tensor, scores: Tensor, rows: Tensor) -> None:
        """Take finds (n, W, ...) with scores (n, W), infinite where they are none, for some images (n,)."""
        scores, order = torch.cat([self.scores[rows], scores], 1).sort(dim=1, stable=True)
        images = _take(torch.cat([self.images[rows], images], 1), order)
        scores = torch.where(self._repeats(images, scores, rows), torch.inf, scores)
        scores, order = scores.sort(dim=1, stable=True)
        self.scores[rows] = scores[:, :_KEPT]
        self.images[rows] = _take(images, order[:, :_KEPT])

    def partners(self, rows: Tensor, share: Tensor, otherwise: Tensor) -> Tensor:
        """For some images a find other than the best, at a share (n,) of their list; ``otherwise`` where none is."""
        others = self.scores[rows].isfinite().sum(dim=1) - 1
        place = 1 + (share * others.clamp_min(0)).long()
        return torch.where(per_image(others > 0, otherwise), self.images[rows, place], otherwise)

    def _repeats(self, images: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
        """Which of the images (n, K, ...), best first, are nearly one before them, (n, K)."""
        flat = (images - self.clean[rows][:, None]).flatten(2)
        # The quicker way by products would round equal images apart.
        distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
        near = distance < _SAME * flat.norm(dim=2)[:, None]
        repeats = torch.zeros_like(scores, dtype=torch.bool)
        for place in range(1, scores.shape[1]):
            repeats[:, place] = (near[:, place, :place] & ~repeats[:, :place]).any(dim=1)
        return repeats


def _take(images: Tensor, order: Tensor) -> Tensor:
    """Images (n, K, ...) in another order, (n, K')."""
    return images[torch.arange(len(images), device=order.device)[:, None], order]
