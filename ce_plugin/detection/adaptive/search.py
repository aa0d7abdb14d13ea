"""The search: restarts times losses of projected steps on one batch of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ce_plugin.detection.adaptive.ball import Ball, flat_norm, per_image
from ce_plugin.detection.adaptive.directions import Course
from ce_plugin.detection.adaptive.results import Best, Curves
from ce_plugin.detection.adaptive.victim import Victim, margin_of
from ce_plugin.randomness import generator

__all__ = ["Batch", "Plan", "search"]

# Each restart starts elsewhere and trades the margin for the score in another place.
_STARTS = ("clean", "random", "best", "candidate", "best")
_KAPPAS = (0.1, 0.3, 0.03, 1.0, 0.0)
_MOMENTUM = 0.5
_LAST = 0.005
_SOFT = 0.3


@dataclass(frozen=True)
class Plan:
    """How the search is run.

    Attributes:
        losses: names of :data:`LOSSES`.
        restarts: runs of each loss.
        steps: steps of each run.
        step: first step as a share of the ball's radius.
        seed: seed of everything random.
        threshold: score at which an image is left alone; None never leaves one alone.
    """

    losses: Sequence[str]
    restarts: int
    steps: int
    step: float
    seed: int
    threshold: float | None


@dataclass(frozen=True)
class Batch:
    """What is attacked together; nothing in it depends on the others.

    Attributes:
        ball: where images may go.
        labels: classes to leave, (N,).
        ids: one for each image, which names its random numbers.
        logits: of the clean images, (N, C).
        others: candidates in the ball, the most promising first, (N, K, ...).
    """

    ball: Ball
    labels: Tensor
    ids: Sequence[int]
    logits: Tensor
    others: Tensor


def search(victim: Victim, batch: Batch, plan: Plan, best: Best, curves: Curves, tick: Callable[[], None]) -> None:
    """Better ``best`` by every loss from every start; a restart knows only of the restarts before it."""
    for restart in range(plan.restarts):
        for loss in plan.losses:
            rows = best.open(plan.threshold)
            if len(rows):
                start, targets = _start(victim, batch, plan, best, loss, restart)
                run = _Run(victim, batch, plan, loss, restart, rows)
                curves.add(loss, restart, run(start[rows], None if targets is None else targets[rows], best))
            tick()


def _start(
    victim: Victim, batch: Batch, plan: Plan, best: Best, loss: str, restart: int
) -> tuple[Tensor, Tensor | None]:
    """Where a run starts, (N, ...), and the classes that it is to reach, (N,), if it aims at one."""
    kind = _STARTS[restart % len(_STARTS)]
    clean = batch.ball.clean
    if kind == "candidate" and batch.others.shape[1]:
        start = batch.others[:, restart // len(_STARTS) % batch.others.shape[1]]
    elif kind == "clean" and restart == 0:
        start = clean
    else:
        start = batch.ball.random([generator(plan.seed, i, "start", restart) for i in batch.ids])
        if kind == "best":
            start = torch.where(per_image(best.success, start), best.images, start)
    if loss != "targeted":
        return start, None
    # Each restart aims at another class, the least unlikely first, unless it starts at an image of one.
    if kind == "best":
        start = clean
    there = victim.predict(start).argmax(dim=1)
    others = batch.logits.scatter(1, batch.labels[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
    aimed = others[:, restart % (others.shape[1] - 1)]
    return start, torch.where(there == batch.labels, aimed, there) if kind == "candidate" else aimed


class _Run:
    """One loss from one start."""

    def __init__(self, victim: Victim, batch: Batch, plan: Plan, loss: str, restart: int, rows: Tensor) -> None:
        self.victim = victim
        self.plan = plan
        self.loss = loss
        self.restart = restart
        self.rows = rows
        self.ball = batch.ball.select(rows)
        self.labels = batch.labels[rows]
        self.ids = [batch.ids[row] for row in rows.tolist()]
        clean = margin_of(batch.logits[rows], self.labels)
        self.course = Course(loss, _KAPPAS[restart % len(_KAPPAS)] * clean.abs())

    def __call__(self, start: Tensor, targets: Tensor | None, best: Best) -> Tensor:
        """Run, offer every image on the way to ``best``, and return the scores (steps + 1, n)."""
        x, speed = start, torch.zeros_like(start)
        scores = []
        for step in range(self.plan.steps + 1):
            self.course.move_to(step / self.plan.steps)
            stored = self.ball.store(x)
            at = self.victim.differentiate(stored, self.labels, targets, self.course.selective)
            best.offer(stored, at.judged, self.rows, (self.loss, self.restart))
            scores.append(torch.where(at.judged.wrong, at.judged.score, torch.inf))
            speed = _MOMENTUM * speed + (1 - _MOMENTUM) * self._moving(self.course.direction(at), step)
            x = self.ball.project(x + self._length(step) * self._shape(speed))
        return torch.stack(scores)

    def _length(self, step: int) -> float:
        """From the first step's length down to a small part of it, along a half cosine."""
        falling = (1 + math.cos(math.pi * step / self.plan.steps)) / 2
        return self.plan.step * self.ball.radius * (_LAST + (1 - _LAST) * falling)

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
            draw = generator(self.plan.seed, self.ids[row], "direction", self.loss, self.restart, step)
            noise = torch.randn(direction.shape[1:], generator=draw, dtype=direction.dtype).to(direction.device)
            direction[row] = noise / noise.norm()
        return direction
