"""Images of other classes, brought into the ball: as starts, and as results where nothing betters them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ce_plugin.detection.adaptive.ball import Ball
from ce_plugin.detection.adaptive.plan import Plan
from ce_plugin.detection.adaptive.results import Best
from ce_plugin.detection.adaptive.victim import Judgement, Victim
from ce_plugin.randomness import numpy_generator

__all__ = ["Others"]

_TRIED = 128
_KEPT = 16


class Others:
    """The candidates, with what the classifier takes them for.

    Args:
        victim: classifier and detector.
        images: (M, ...).
        batch_size: images judged together.
    """

    def __init__(self, victim: Victim, images: Tensor, batch_size: int) -> None:
        self.victim = victim
        self.images = images
        self.batch_size = batch_size
        parts = [victim.predict(part).argmax(dim=1) for part in torch.split(images, batch_size)]
        self.predicted = torch.cat(parts).cpu().numpy()

    def near(self, ball: Ball, labels: Tensor, ids: Sequence[int], plan: Plan, best: Best) -> Tensor:
        """Some candidates of each image in its ball, the most promising first, (N, K, ...).

        First come those that are misclassified, by their score, then the others, by their margin. The first of all is
        offered to ``best``.
        """
        rows = []
        for row, name in enumerate(ids):
            usable = (self.predicted != int(labels[row])).nonzero()[0]
            if not len(usable):
                rows.append(ball.clean[row].expand(_KEPT, *ball.clean.shape[1:]))
                continue
            order = numpy_generator(plan.seed, name, "candidates").permutation(len(usable))[:_TRIED]
            chosen = self.images[torch.from_numpy(usable[order]).to(self.images.device)]
            some = torch.full((len(chosen),), row, device=chosen.device)
            near = ball.select(some)
            stored = near.store(near.project(chosen))
            judged = self._judge(stored, labels[some])
            ranks = _ranks(judged)
            rows.append(stored[ranks[torch.arange(_KEPT, device=ranks.device) % len(ranks)]])
            first = ranks[:1]
            best.offer(stored[first], judged.select(first), some[:1], ("candidate", -1))
        return torch.stack(rows)

    def _judge(self, images: Tensor, labels: Tensor) -> Judgement:
        parts = zip(torch.split(images, self.batch_size), torch.split(labels, self.batch_size), strict=True)
        judged = [self.victim.judge(some, own) for some, own in parts]
        return Judgement(
            *(torch.cat([getattr(j, f) for j in judged]) for f in ("margin", "wrong", "score", "predicted"))
        )


def _ranks(judged: Judgement) -> Tensor:
    """Positions, the most promising first."""
    by_margin = judged.margin.argsort(descending=True, stable=True)
    key = torch.where(judged.wrong, judged.score, torch.inf)[by_margin]
    return by_margin[key.argsort(stable=True)]
