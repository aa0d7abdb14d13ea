"""Which way to go: how each loss weighs the classifier's gradient against the detector's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ce_plugin.detection.adaptive.ball import flat_norm, per_image
from ce_plugin.detection.adaptive.victim import Gradients

__all__ = ["LOSSES", "Course"]

_HARDER, _SOFTER = 1.3, 0.8
_TRADED = 0.5
_LIGHTEST, _HEAVIEST = 1e-2, 1e2


def _unit(gradient: Tensor) -> Tensor:
    return gradient / per_image(flat_norm(gradient).clamp_min(1e-30), gradient)


def _without(vector: Tensor, other: Tensor) -> Tensor:
    """Unit vectors (N, ...) without their component along other unit vectors."""
    along = (vector * other).flatten(1).sum(dim=1)
    return vector - per_image(along, other) * other


class Course:
    """The direction of one run's steps on a batch; it keeps what a loss adapts on the way.

    Args:
        loss: a name of :data:`LOSSES`.
        kappa: lead that the classifier's side is asked for at first, (N,); it falls to 0 over the first half of the
            steps, and is traded for a lower score.
    """

    def __init__(self, loss: str, kappa: Tensor) -> None:
        self.loss = loss
        self.first = kappa
        self.kappa = kappa
        self.weight = torch.ones_like(kappa)

    def move_to(self, share: float) -> None:
        """Set the lead that is asked for after this share of the steps."""
        self.kappa = self.first * max(0.0, 1 - share / _TRADED)

    @property
    def selective(self) -> Tensor | None:
        """Leads above which the detector's gradient is needed; None where it always is."""
        return self.kappa if self.loss == "selective" else None

    def direction(self, at: Gradients) -> Tensor:
        """Unit directions (N, ...) that lead to a wrong class and a low score; zero where both gradients are."""
        return _unit(LOSSES[self.loss](self, at))

    def _reached(self, at: Gradients) -> Tensor:
        return per_image(at.lead > self.kappa, at.classifier)

    def _selective(self, at: Gradients) -> Tensor:
        return torch.where(self._reached(at), -at.detector, at.classifier)

    def _orthogonal(self, at: Gradients) -> Tensor:
        climb, descent = _unit(at.classifier), -_unit(at.detector)
        return torch.where(self._reached(at), _without(descent, climb), _without(climb, descent))

    def _lagrangian(self, at: Gradients) -> Tensor:
        reached = at.lead > self.kappa
        self.weight = (self.weight * torch.where(reached, _SOFTER, _HARDER)).clamp(_LIGHTEST, _HEAVIEST)
        hinge = torch.where(reached, 0.0, self.weight)
        return per_image(hinge, at.classifier) * _unit(at.classifier) - _unit(at.detector)


LOSSES: dict[str, Callable[[Course, Gradients], Tensor]] = {
    "selective": Course._selective,
    "orthogonal": Course._orthogonal,
    "lagrangian": Course._lagrangian,
    "targeted": Course._lagrangian,
}
