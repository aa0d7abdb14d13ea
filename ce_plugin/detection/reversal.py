"""How much more than on clean images an intervention takes from the predicted class."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ce_plugin.detection.view import FEW, leading_logits
from ce_plugin.errors import InputError, expected

__all__ = ["Reversal"]

# Ridge penalty in units of one image's weight, and how many images a class's own terms have to outweigh.
_PENALTY = 1.0
_PRIOR = 20.0


@dataclass(frozen=True)
class Reversal:
    """The margin that is left under an intervention, held against what the idle run promises.

    With m the margin of the predicted class under do(...) and z the idle logits, arsinh(m / s) of clean images is
    predicted linearly from z, its largest entries and the predicted class; r is what is left, and -r, centred and
    scaled by class, says how much more than usual the intervention takes away. It is one-sided: an image whose answer
    an intervention does *not* shake is no reason for an alarm.

    Args:
        unit: s, the typical margin, a scalar tensor.
        coefficients: of the linear prediction, (P, S), S interventions.
        spread: standard deviation of r in each predicted class, shrunk to everyone's, (K, S).

    Example:
        >>> from ce_plugin.detection.view import margin_under
        >>> random = torch.Generator().manual_seed(0)
        >>> logits = torch.randn(300, 3, generator=random).double() * 3
        >>> do = logits + 0.1 * torch.randn(300, 3, generator=random).double()
        >>> reversal = Reversal.fit(margin_under(do[:, None], logits), logits)
        >>> usual = reversal(margin_under(do[:, None], logits), logits)
        >>> turned = reversal(torch.full((1, 1), -5.0), logits[:1])
        >>> bool(turned > usual.max())
        True
    """

    unit: Tensor
    coefficients: Tensor
    spread: Tensor

    @classmethod
    def fit(cls, margins: Tensor, idle: Tensor) -> Reversal:
        """Learn from clean images.

        Args:
            margins: of the predicted class under each intervention, (N, S).
            idle: logits of the idle run, (N, K).

        Raises:
            InputError: logits that are not finite.
        """
        margins, idle = margins.detach().double().cpu(), idle.detach().double().cpu()
        if not bool(margins.isfinite().all() and idle.isfinite().all()):
            todo = "The network's logits overflow or are NaN under an intervention; run it in float32."
            raise InputError(expected("x", "images with finite logits", "NaN or infinity", todo))
        unit = margins.abs().median().clamp_min(1e-9)
        predicted = idle.argmax(1)
        x, wanted = _explaining(idle), (margins / unit).asinh()
        gram = x.T @ x + _PENALTY * torch.eye(x.shape[1], dtype=torch.float64)
        coefficients = torch.linalg.solve(gram, x.T @ wanted)
        squares = (wanted - x @ coefficients).square()
        counts = torch.bincount(predicted, minlength=idle.shape[1]).double()[:, None]
        sums = torch.zeros(idle.shape[1], squares.shape[1], dtype=torch.float64).index_add(0, predicted, squares)
        spread = ((sums + _PRIOR * squares.mean(0)) / (counts + _PRIOR)).sqrt().clamp_min(1e-9)
        return cls(unit, coefficients, spread)

    def __call__(self, margins: Tensor, idle: Tensor) -> Tensor:
        """-r over its spread, (N, S), float64; greater means that more than usual was taken away."""
        margins, idle = margins.to(self.coefficients), idle.to(self.coefficients)
        left = (margins / self.unit).asinh() - _explaining(idle) @ self.coefficients
        return -left / self.spread[idle.detach().argmax(1)]

    def to(self, device: torch.device) -> Reversal:
        """The same on another device."""
        return Reversal(*(getattr(self, one.name).to(device) for one in fields(self)))

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored: the constructor's arguments."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def _explaining(idle: Tensor) -> Tensor:
    """What the margin is predicted from, (N, P): a constant, the largest logits, and with few classes everything."""
    top = leading_logits(idle) if idle.shape[1] > FEW else idle.topk(min(3, idle.shape[1]), dim=1).values
    columns = [torch.ones_like(top[:, :1]), top]
    if idle.shape[1] <= FEW:
        own = torch.nn.functional.one_hot(idle.detach().argmax(1), idle.shape[1]).to(idle)
        columns += [own, idle, own * top[:, :1]]
    return torch.cat(columns, 1)
