"""The search: restarts times losses of projected steps on one batch of images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ce_plugin.detection.adaptive.ball import flat_norm, per_image
from ce_plugin.detection.adaptive.directions import Course
from ce_plugin.detection.adaptive.plan import Batch, Plan
from ce_plugin.detection.adaptive.pool import Pool
from ce_plugin.detection.adaptive.results import Best, Curves
from ce_plugin.detection.adaptive.starts import Starts, kind_of
from ce_plugin.detection.adaptive.victim import Victim, margin_of
from ce_plugin.randomness import generator

__all__ = ["search"]

# The lead that is asked for at first, as a share of the clean image's; points differ in where they trade it for the
# score. A negative one lets the score fall first. From the best so far the way to the boundary is short already.
_KAPPAS = (0.1, -0.5, 0.3, -0.25, 0.0)
_KAPPAS_OF_BEST = (0.0, 0.1, -0.25)
_PACE_OF_BEST = 0.5
_MOMENTUM = 0.5
_LAST = 0.005
_SOFT = 0.1


def search(victim: Victim, batch: Batch, plan: Plan, best: Best, curves: Curves, tick: Callable[[], None]) -> None:
    """Better ``best`` by every loss from every start; a restart knows only of the restarts before it."""
    pool = Pool(batch.ball.clean)
    starts = Starts(victim, batch, plan, best, pool)
    for restart in range(plan.restarts):
        for loss in plan.losses:
            rows = best.open(plan.threshold)
            if len(rows):
                run = _Run(victim, batch, plan, loss, restart, rows)
                curves.add(loss, restart, run(*starts(loss, restart, rows), best, pool))
            tick()


class _Run:
    """One loss from one start, or from several at once, of each image."""

    def __init__(self, victim: Victim, batch: Batch, plan: Plan, loss: str, restart: int, rows: Tensor) -> None:
        self.victim = victim
        self.plan = plan
        self.loss = loss
        self.restart = restart
        self.rows = rows
        many = rows.repeat_interleave(plan.width)
        self.ball = batch.ball.select(many)
        self.labels = batch.labels[many]
        self.names = [(batch.ids[row], copy) for row in rows.tolist() for copy in range(plan.width)]
        is_best = kind_of(restart) == "best"
        self.pace = _PACE_OF_BEST if is_best else 1.0
        shares = _KAPPAS_OF_BEST if is_best else _KAPPAS
        first = restart * plan.width + plan.losses.index(loss)
        some = [shares[(first + copy) % len(shares)] for copy in range(plan.width)]
        clean = margin_of(batch.logits[many], self.labels).abs()
        self.course = Course(loss, clean * torch.tensor(some, dtype=clean.dtype).repeat(len(rows)).to(clean.device))

    def __call__(self, start: Tensor, targets: Tensor | None, best: Best, pool: Pool) -> Tensor:
        """Run, offer the best image of every point to ``best`` and ``pool``, and return scores (steps + 1, n)."""
        x, speed, width = start, torch.zeros_like(start), self.plan.width
        points = torch.arange(len(start), device=start.device)
        found = Best.nothing(start)
        scores = []
        for step in range(self.plan.steps + 1):
            self.course.move_to(step / self.plan.steps)
            stored = self.ball.store(x)
            at = self.victim.differentiate(stored, self.labels, targets, self.course.selective)
            found.offer(stored, at.judged, points, (self.loss, self.restart))
            scores.append(found.score.reshape(-1, width).amin(dim=1))
            speed = _MOMENTUM * speed + (1 - _MOMENTUM) * self._moving(self.course.direction(at), step)
            x = self.ball.project(x + self._length(step) * self._shape(speed))
        judged = found.judgement()
        first = judged.foremost(width)
        best.offer(found.images[first], judged.select(first), self.rows, (self.loss, self.restart))
        pool.offer(found.images.reshape(-1, width, *start.shape[1:]), found.score.reshape(-1, width), self.rows)
        return torch.stack(scores)

    def _length(self, step: int) -> float:
        """From the first step's length down to a small part of it, along a half cosine."""
        falling = (1 + math.cos(math.pi * step / self.plan.steps)) / 2
        return self.pace * self.plan.step * self.ball.radius * (_LAST + (1 - _LAST) * falling)

    def _shape(self, speed: Tensor) -> Tensor:
        """Nearly one unit for each value in the box, the image by one unit in a Euclidean ball.

        Plain signs would step as far where the gradient hardly points anywhere, and never settle.
        """
        size = per_image(flat_norm(speed).clamp_min(1e-30), speed)
        if not self.ball.is_box:
            return speed / size
        return speed / (speed.abs() + _SOFT * size / math.sqrt(speed[0].numel()))

    def _moving(self, direction: Tensor, step: int) -> Tensor:
        """Random directions in the place of those that are zero, so that a plateau can be left."""
        stuck = flat_norm(direction) == 0
        for row in stuck.nonzero().flatten().tolist():
            draw = generator(self.plan.seed, *self.names[row], "direction", self.loss, self.restart, step)
            noise = torch.randn(direction.shape[1:], generator=draw, dtype=direction.dtype).to(direction.device)
            direction[row] = noise / noise.norm()
        return direction
