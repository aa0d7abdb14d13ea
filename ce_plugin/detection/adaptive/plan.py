"""What is attacked together, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ce_plugin.detection.adaptive.ball import Ball

__all__ = ["Batch", "Plan"]


@dataclass(frozen=True)
class Plan:
    """How the search is run.

    Attributes:
        losses: names of :data:`LOSSES`.
        restarts: runs of each loss.
        width: points that a run starts from at once.
        steps: steps of each run.
        step: first step as a share of the ball's radius.
        seed: seed of everything random.
        threshold: score at which an image is left alone; None never leaves one alone.
    """

    losses: Sequence[str]
    restarts: int
    width: int
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
