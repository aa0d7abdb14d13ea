"""Where runs start: several points for each image, so that a run explores more than one valley."""

from __future__ import annotations

import torch
from torch import Tensor

from ce_plugin.detection.adaptive.ball import Ball, per_image
from ce_plugin.detection.adaptive.plan import Batch, Plan
from ce_plugin.detection.adaptive.results import Best
from ce_plugin.detection.adaptive.victim import Victim
from ce_plugin.randomness import generator

__all__ = ["Starts"]

_KINDS = ("clean", "random", "best", "candidate", "best")
# How far points are drawn towards a random one. A short way finds the valley's floor, a long way the next valley.
_HOPS = (0.3, 0.1, 0.5, 0.05, 0.2, 0.7, 1.0)


class Starts:
    """The points that runs start from, and the classes that they aim at.

    Args:
        victim: classifier and detector.
        batch: the images.
        plan: how the search is run.
        best: what was found so far.
    """

    def __init__(self, victim: Victim, batch: Batch, plan: Plan, best: Best) -> None:
        self.victim = victim
        self.batch = batch
        self.plan = plan
        self.best = best
        # The least unlikely class first.
        likely = batch.logits.scatter(1, batch.labels[:, None], -torch.inf)
        self.classes = likely.argsort(dim=1, descending=True, stable=True)[:, : likely.shape[1] - 1]

    def __call__(self, loss: str, restart: int, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Points (n * width, ...) for some images (n,), each image's side by side, and the classes (n * width,)."""
        kind = _KINDS[restart % len(_KINDS)]
        if kind == "clean" and restart > 0:
            kind = "best"
        if kind == "candidate" and not self.batch.others.shape[1]:
            kind = "random"
        # The best so far shows a class already; what aims at one goes there from the clean image.
        if kind == "best" and loss == "targeted":
            kind = "clean"
        ball, width = self.batch.ball.select(rows), range(self.plan.width)
        points = [self._points(kind, loss, restart, copy, rows, ball) for copy in width]
        if loss != "targeted":
            return torch.stack(points, 1).flatten(0, 1), None
        aims = [self._aims(kind, restart, copy, rows, point) for copy, point in zip(width, points, strict=True)]
        return torch.stack(points, 1).flatten(0, 1), torch.stack(aims, 1).flatten()

    def _points(self, kind: str, loss: str, restart: int, copy: int, rows: Tensor, ball: Ball) -> Tensor:
        """One point for each image, (n, ...)."""
        if kind == "candidate":
            others = self.batch.others[rows]
            return others[:, (restart // len(_KINDS) * self.plan.width + copy) % others.shape[1]]
        share = 1.0 if kind == "random" else self._share(loss, restart, copy)
        if kind == "clean" and share == 0:
            return ball.clean
        names = [self.batch.ids[row] for row in rows.tolist()]
        point = ball.random([generator(self.plan.seed, name, "start", loss, restart, copy) for name in names])
        if kind == "clean":
            return ball.clean + share * (point - ball.clean)
        if kind == "random":
            return point
        found = self.best.images[rows]
        return torch.where(per_image(self.best.success[rows], found), found + share * (point - found), point)

    def _share(self, loss: str, restart: int, copy: int) -> float:
        """How far towards a random point: not at all for what differs already, and else another way each time."""
        turn = restart * self.plan.width + copy
        if turn < self.classes.shape[1] if loss == "targeted" else copy == 0:
            return 0.0
        return _HOPS[(turn + self.plan.losses.index(loss)) % len(_HOPS)]

    def _aims(self, kind: str, restart: int, copy: int, rows: Tensor, points: Tensor) -> Tensor:
        """The class that each image is to reach, (n,): the one that a candidate shows, and else one after another."""
        aims = self.classes[rows][:, (restart * self.plan.width + copy) % self.classes.shape[1]]
        if kind != "candidate":
            return aims
        shown = self.victim.predict(points).argmax(dim=1)
        return torch.where(shown == self.batch.labels[rows], aims, shown)
