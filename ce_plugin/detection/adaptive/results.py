"""Results of the adaptive attack: the best images so far while it runs, and the report afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ce_plugin.detection.adaptive.objective import Ball, Evaluation
from ce_plugin.networks.forward import double, widest

Floats = npt.NDArray[np.float64]


class Incumbent:
    """The best image so far of each image of a batch: misclassified, with the least score; failing that, with the
    greatest margin.

    Args:
        images: (N, ...), where the search stands before it starts.
        evaluated: the target model's outputs on them.
        origin: what they are called in the report.
    """

    def __init__(self, images: Tensor, evaluated: Evaluation, origin: str) -> None:
        self.images = images.clone()
        self.success = evaluated.wrong.clone()
        self.score = torch.where(evaluated.wrong, evaluated.score, torch.inf)
        self.margin = evaluated.margin.clone()
        self.predicted = evaluated.predicted.clone()
        self.origin = [(origin, -1)] * len(images)

    @classmethod
    def placeholder(cls, images: Tensor) -> Incumbent:
        """An incumbent that any image replaces."""
        margin = images.new_full((len(images),), -torch.inf)
        score = torch.full_like(margin, torch.inf, dtype=widest(margin.device))
        return cls(images, Evaluation(margin, margin > 0, score, torch.zeros_like(margin, dtype=torch.long)), "none")

    def offer(self, images: Tensor, evaluated: Evaluation, rows: Tensor, origin: tuple[str, int]) -> None:
        """Take over what is better.

        Args:
            images: (n, ...).
            evaluated: the target model's outputs on them.
            rows: which images of the batch these are, (n,).
            origin: loss and restart.
        """
        success, score, margin = self.success[rows], self.score[rows], self.margin[rows]
        # An infinite score is no score: the first misclassified image counts all the same.
        lower = evaluated.wrong & (~success | (evaluated.score < score))
        better = lower | (~evaluated.wrong & ~success & (evaluated.margin > margin))
        if not better.any():
            return
        take = rows[better]
        self.images[take] = images[better]
        self.success[take] = evaluated.wrong[better]
        self.score[take] = torch.where(evaluated.wrong, evaluated.score, torch.inf)[better]
        self.margin[take] = evaluated.margin[better]
        self.predicted[take] = evaluated.predicted[better]
        for row in take.tolist():
            self.origin[row] = origin

    def evaluation(self) -> Evaluation:
        """The target model's outputs on the best images."""
        return Evaluation(self.margin, self.success, self.score, self.predicted)

    def columns(self, evaluated: Evaluation, ball: Ball) -> dict[str, npt.NDArray[Any]]:
        """The columns of :class:`AdaptiveReport`, with the target model's outputs on the best images of a ball."""
        change = double((self.images - ball.clean).flatten(1))
        norm = change.abs().amax(dim=1) if ball.norm == "inf" else change.norm(dim=1)
        return {
            "success": self.success.cpu().numpy(),
            "score": double(evaluated.score).numpy(),
            "margin": double(evaluated.margin).numpy(),
            "norm": norm.numpy(),
            "prediction": evaluated.predicted.cpu().numpy(),
            "loss": np.array([name for name, _ in self.origin], dtype=object),
            "restart": np.array([restart for _, restart in self.origin]),
        }

    def open(self, threshold: float | None) -> Tensor:
        """Rows that are not misclassified at or below the threshold, (n,)."""
        is_low = self.score <= (-torch.inf if threshold is None else threshold)
        return (~(self.success & is_low)).nonzero().squeeze(1)


class Curves:
    """Mean over images of the best score so far, step by step, for each loss and restart."""

    def __init__(self, losses: Sequence[str], restarts: int, steps: int) -> None:
        self._sum = {loss: np.zeros((restarts, steps + 1)) for loss in losses}
        self._count = {loss: np.zeros((restarts, 1)) for loss in losses}

    def add(self, loss: str, restart: int, scores: Tensor) -> None:
        """Scores (steps + 1, n) at each step, infinite where an image was not misclassified."""
        best = double(scores).cummin(dim=0).values
        is_success = best[-1].isfinite()
        if not is_success.any():
            return
        best = best[:, is_success]
        # Before its first misclassification an image counts with the score that it had there.
        first = best.where(best.isfinite(), -torch.inf).amax(dim=0)
        self._sum[loss][restart] += best.minimum(first).sum(dim=1).numpy()
        self._count[loss][restart] += int(is_success.sum())

    def means(self) -> dict[str, Floats]:
        """For each loss (restarts, steps + 1); NaN where no image was misclassified."""
        with np.errstate(invalid="ignore"):
            return {loss: total / self._count[loss] for loss, total in self._sum.items()}


@dataclass(frozen=True)
class AdaptiveReport:
    """Results of an attack, image by image.

    Attributes:
        success: misclassified, as stored, (N,).
        score: the detector's score of what is returned, (N,).
        margin: best other logit minus that of the label, (N,).
        norm: distance from the clean image in the attack's norm, (N,).
        prediction: the predicted class, (N,).
        loss: the loss of the run that reached it; "clean", "start" or "candidate" where no run improved on these, (N,).
        restart: the restart that reached it; -1 where none did, (N,).
        curves: for each loss (restarts, steps + 1): mean over images of the least score so far in that run, from any
            of its starts, over the images that it fooled; before the first misclassification an image counts with its
            score there.
        threshold: score above which the detector raises an alarm, where that was given.

    Example:
        >>> report = AdaptiveReport(
        ...     success=np.array([True, True, False]), score=np.array([1.0, 3.0, 0.0]), margin=np.array([1.0, 1, -1]),
        ...     norm=np.array([0.1, 0.1, 0.1]), prediction=np.array([1, 1, 0]),
        ...     loss=np.array(["selective", "orthogonal", "clean"]), restart=np.array([0, 1, -1]),
        ...     curves={"selective": np.array([[9.0, 2.0, 1.0, 1.0, 1.0]])}, threshold=2.0,
        ... )
        >>> report
        AdaptiveReport(2 of 3 misclassified, 1 of 3 unnoticed, median score 2)
        >>> report.late_gain(share=0.75)
        {'selective': 1.0}
    """

    success: npt.NDArray[np.bool_]
    score: Floats
    margin: Floats
    norm: Floats
    prediction: npt.NDArray[np.int64]
    loss: npt.NDArray[Any]
    restart: npt.NDArray[np.int64]
    curves: dict[str, Floats] = field(default_factory=dict)
    threshold: float | None = None

    @property
    def unnoticed(self) -> npt.NDArray[np.bool_]:
        """Misclassified and not above the threshold, (N,)."""
        limit = np.inf if self.threshold is None else self.threshold
        return self.success & (self.score <= limit)

    def late_gain(self, share: float = 0.1) -> dict[str, float]:
        """How far from flat each loss's curves are at their end: by how much the last steps lowered the score.

        Args:
            share: which part of the steps is the end, in (0, 1).

        Returns:
            For each loss the mean over restarts, in units of the score; NaN where it fooled no image.
        """
        result = {}
        for loss, curves in self.curves.items():
            last = curves.shape[1] - 1
            gain = curves[:, last - max(1, round(share * last))] - curves[:, last]
            known = gain[np.isfinite(gain)]
            result[loss] = float(known.mean()) if len(known) else float("nan")
        return result

    def __repr__(self) -> str:
        n = len(self.success)
        parts = [f"{int(self.success.sum())} of {n} misclassified"]
        if self.threshold is not None:
            parts.append(f"{int(self.unnoticed.sum())} of {n} unnoticed")
        if self.success.any():
            parts.append(f"median score {np.median(self.score[self.success]):.3g}")
        return f"AdaptiveReport({', '.join(parts)})"
