"""One call of the attack: what it needs, batch by batch, and what becomes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ce_plugin.detection.adaptive.ball import Ball
from ce_plugin.detection.adaptive.checks import Array, norm_name, whole_labels
from ce_plugin.detection.adaptive.others import Others
from ce_plugin.detection.adaptive.plan import Batch, Plan
from ce_plugin.detection.adaptive.results import AdaptiveReport, Best, Curves, distances
from ce_plugin.detection.adaptive.search import search
from ce_plugin.detection.adaptive.victim import Victim
from ce_plugin.errors import AttackError, expected

if TYPE_CHECKING:
    from ce_plugin.detection.adaptive.attack import AdaptiveEvasion

__all__ = ["Job"]


class Job:
    """One call of ``generate``, with everything checked that can be checked without running the network."""

    def __init__(
        self,
        attack: AdaptiveEvasion,
        victim: Victim,
        clip: tuple[float, float],
        images: Array,
        starts: Array | None,
        pool: Array | None,
        ids: list[int],
    ) -> None:
        self.attack = attack
        self.victim = victim
        self.clip = clip
        self.images = images
        self.starts = starts
        self.ids = ids
        self.device = torch.device(attack.estimator.device)
        self.plan = Plan(
            losses=tuple(attack.losses),
            restarts=attack.restarts,
            width=attack.width,
            steps=attack.steps,
            step=attack.eps_step,
            seed=attack.seed,
            threshold=attack.threshold,
        )
        self.curves = Curves(self.plan.losses, attack.restarts, attack.steps)
        self.others = None if pool is None else Others(victim, self._tensor(pool), attack.batch_size)

    def run(self, y: Array | None) -> tuple[Array, AdaptiveReport]:
        """Attack all images, batch by batch."""
        size, n = max(1, self.attack.batch_size // self.plan.width), len(self.images)
        slices = [slice(begin, min(begin + size, n)) for begin in range(0, n, size)]
        logits = torch.cat([self.victim.predict(self._tensor(self.images[rows])) for rows in slices])
        labels = whole_labels(y, logits.argmax(dim=1).cpu().numpy(), logits.shape[1])
        balls = [self._ball(rows) for rows in slices]
        ticks = len(slices) * self.plan.restarts * len(self.plan.losses)
        parts = []
        with tqdm(total=ticks, desc="AdaptiveEvasion", disable=not self.attack.verbose) as bar:
            for rows, ball in zip(slices, balls, strict=True):
                whole = torch.from_numpy(labels[rows]).to(self.device)
                parts.append(self._attack(ball, whole, logits[rows], rows, bar))
        found = np.concatenate([part[0] for part in parts])
        columns = {key: np.concatenate([part[1][key] for part in parts]) for key in parts[0][1]}
        return found, AdaptiveReport(**columns, curves=self.curves.means(), threshold=self.plan.threshold)

    def _tensor(self, images: Array) -> Tensor:
        like = np.float64 if self.images.dtype == np.float64 else np.float32
        return torch.from_numpy(np.ascontiguousarray(images, dtype=like)).to(self.device).clamp(*self.clip)

    def _ball(self, rows: slice) -> Ball:
        norm = norm_name(self.attack.norm)
        ball = Ball(self._tensor(self.images[rows]), float(self.attack.eps), norm, self.clip, self.attack.levels)
        if ball.is_frozen or not ball.contains(ball.store(ball.clean)).all():
            step = (self.clip[1] - self.clip[0]) / ((self.attack.levels or 2) - 1)
            todo = "Allow more, or pass `levels=None`."
            raise AttackError(expected("eps", f"large enough for one level, {step:.4g}", self.attack.eps, todo))
        return ball

    def _attack(
        self, ball: Ball, labels: Tensor, logits: Tensor, rows: slice, bar: Any
    ) -> tuple[Array, dict[str, Array]]:
        stored = ball.store(ball.clean)
        best = Best(stored, self.victim.judge(stored, labels), "clean")
        everything = torch.arange(len(stored), device=self.device)
        if self.starts is not None:
            stored = ball.store(ball.project(self._tensor(self.starts[rows])))
            best.offer(stored, self.victim.judge(stored, labels), everything, ("start", -1))
        ids = self.ids[rows]
        none = ball.clean[:, None][:, :0]
        others = none if self.others is None else self.others.near(ball, labels, ids, self.plan, best)
        search(self.victim, Batch(ball, labels, ids, logits, others), self.plan, best, self.curves, bar.update)
        judged = self.victim.judge(best.images, labels)
        columns = {
            "success": best.success.cpu().numpy(),
            "score": judged.score.double().cpu().numpy(),
            "margin": judged.margin.double().cpu().numpy(),
            "norm": distances(ball.clean, best.images, ball.norm),
            "prediction": judged.predicted.cpu().numpy(),
            "loss": np.array([name for name, _ in best.origin], dtype=object),
            "restart": np.array([restart for _, restart in best.origin]),
        }
        return best.images.cpu().numpy().astype(self.images.dtype), columns
