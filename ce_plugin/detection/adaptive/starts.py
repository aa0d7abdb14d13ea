"""Where runs start: several points for each image, so that a run explores more than one valley."""

from __future__ import annotations

import torch
from torch import Tensor

from ce_plugin.detection.adaptive.ball import Ball, per_image
from ce_plugin.detection.adaptive.plan import Batch, Plan
from ce_plugin.detection.adaptive.pool import Pool
from ce_plugin.detection.adaptive.results import Best
from ce_plugin.detection.adaptive.victim import Victim
from ce_plugin.randomness import generator

__all__ = ["Starts", "kind_of"]

_KINDS = ("clean", "candidate", "clean")
# Share of the values that differ from the clean image at the start. Few do in what is found in the end.
_DENSITIES = (0.1, 0.02, 0.2, 0.05, 1.0)
# How far a start lies on the way from the best to another find.
_WAYS = (0.1, 0.3, 0.05, 0.5, 0.2)


def kind_of(restart: int) -> str:
    """What a restart starts from: after the first ones always the best so far."""
    return _KINDS[restart] if restart < len(_KINDS) else "best"


class Starts:
    """The points that runs start from, and the classes that they aim at.

    Args:
        victim: classifier and detector.
        batch: the images.
        plan: how the search is run.
        best: what was found so far.
        pool: finds of different runs.
    """

    def __init__(self, victim: Victim, batch: Batch, plan: Plan, best: Best, pool: Pool) -> None:
        self.victim = victim
        self.batch = batch
        self.plan = plan
        self.best = best
        self.pool = pool
        # The least unlikely class first.
        likely = batch.logits.scatter(1, batch.labels[:, None], -torch.inf)
        self.classes = likely.argsort(dim=1, descending=True, stable=True)[:, : likely.shape[1] - 1]

    def __call__(self, loss: str, restart: int, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Points (n * width, ...) for some images (n,), each image's side by side, and the classes (n * width,)."""
        kind = kind_of(restart)
        if kind == "candidate" and not self.batch.others.shape[1]:
            kind = "clean"
        ball, width = self.batch.ball.select(rows), range(self.plan.width)
        points = [self._points(kind, loss, restart, copy, rows, ball) for copy in width]
        if loss != "targeted":
            return torch.stack(points, 1).flatten(0, 1), None
        aims = [self._aims(kind, restart, copy, rows, point) for copy, point in zip(width, points, strict=True)]
        return torch.stack(points, 1).flatten(0, 1), torch.stack(aims, 1).flatten()

    def _points(self, kind: str, loss: str, restart: int, copy: int, rows: Tensor, ball: Ball) -> Tensor:
        """One point for each image, (n, ...)."""
        number = self.plan.losses.index(loss)
        if kind == "candidate":
            others = self.batch.others[rows]
            return others[:, (number * self.plan.width + copy) % others.shape[1]]
        turn = restart * self.plan.width + copy + number
        names = [self.batch.ids[row] for row in rows.tolist()]
        draws = [generator(self.plan.seed, name, "start", loss, restart, copy) for name in names]
        point = ball.random(draws)
        if kind == "clean":
            place = torch.stack([torch.rand(ball.clean.shape[1:], generator=draw) for draw in draws]).to(point.device)
            return ball.project(torch.where(place < _DENSITIES[turn % len(_DENSITIES)], point, ball.clean))
        share = torch.stack([torch.rand((), generator=draw) for draw in draws]).to(point.device)
        found = self.best.images[rows]
        way = _WAYS[turn % len(_WAYS)] * (self.pool.partners(rows, share, point) - found)
        return torch.where(per_image(self.best.success[rows], found), found + way, point)

    def _aims(self, kind: str, restart: int, copy: int, rows: Tensor, points: Tensor) -> Tensor:
        """The class that each image is to reach, (n,): the one that a point shows, and else one after another."""
        aims = self.classes[rows][:, (restart * self.plan.width + copy) % self.classes.shape[1]]
        if kind not in ("candidate", "best"):
            return aims
        shown = self.victim.predict(points).argmax(dim=1)
        return torch.where(shown == self.batch.labels[rows], aims, shown)
