"""How much more than on clean images an intervention takes from the predicted class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    predicted linearly from z, its largest entries and the predicted class; r is what is left, and -r, over its
    spread in the class, says how much more than usual the intervention takes away. It is one-sided: an image whose
    answer an intervention does *not* shake is no reason for an alarm.

    Without the condition on z, -r says how near to another answer, or how far into it, the intervention brings an
    image, compared with clean ones of its predicted class: images that an attack left next to a boundary stand out.

    Args:
        unit: s, the typical margin, a scalar tensor.
        coefficients: of the linear prediction, (P, S), S interventions.
        spread: standard deviation of r in each predicted class, shrunk to everyone's, (K, S).
        conditional: whether z is held against it, or the predicted class only.

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
    conditional: bool = True

    @classmethod
    def fit(cls, margins: Tensor, idle: Tensor, *, conditional: bool = True) -> Reversal:
        """Learn from clean images.

        Args:
            margins: of the predicted class under each intervention, (N, S).
            idle: logits of the idle run, (N, K).
            conditional: whether the margin is held against what these logits promise.

        Raises:
            InputError: logits that are not finite.
        """
        margins, idle = margins.detach().double().cpu(), idle.detach().double().cpu()
        if not bool(margins.isfinite().all() and idle.isfinite().all()):
            todo = "The network's logits overflow or are NaN under an intervention; run it in float32."
            raise InputError(expected("x", "images with finite logits", "NaN or infinity", todo))
        unit = margins.abs().median().clamp_min(1e-9)
        predicted = idle.argmax(1)
        x, wanted = _explaining(idle, conditional), (margins / unit).asinh()
        gram = x.T @ x + _PENALTY * torch.eye(x.shape[1], dtype=torch.float64)
        coefficients = torch.linalg.solve(gram, x.T @ wanted)
        squares = (wanted - x @ coefficients).square()
        counts = torch.bincount(predicted, minlength=idle.shape[1]).double()[:, None]
        sums = torch.zeros(idle.shape[1], squares.shape[1], dtype=torch.float64).index_add(0, predicted, squares)
        spread = ((sums + _PRIOR * squares.mean(0)) / (counts + _PRIOR)).sqrt().clamp_min(1e-9)
        return cls(unit, coefficients, spread, conditional)

    def __call__(self, margins: Tensor, idle: Tensor) -> Tensor:
        """-r over its spread, (N, S), float64; greater means that more than usual was taken away."""
        margins, idle = margins.to(self.coefficients), idle.to(self.coefficients)
        left = (margins / self.unit).asinh() - _explaining(idle, self.conditional) @ self.coefficients
        return -left / self.spread[idle.detach().argmax(1)]

    def to(self, device: torch.device) -> Reversal:
        """The same on another device."""
        unit, coefficients, spread = (value.to(device) for value in self.tensors().values())
        return Reversal(unit, coefficients, spread, self.conditional)

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored."""
        return {"unit": self.unit, "coefficients": self.coefficients, "spread": self.spread}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, conditional: bool) -> Reversal:
        """What :meth:`tensors` gave."""
        return cls(tensors["unit"], tensors["coefficients"], tensors["spread"], conditional)


def _explaining(idle: Tensor, conditional: bool) -> Tensor:
    """What the margin is predicted from, (N, P): with few classes the class; and, if conditional, the logits."""
    few = idle.shape[1] <= FEW
    top = idle.topk(min(3, idle.shape[1]), dim=1).values if few else leading_logits(idle)
    own = torch.nn.functional.one_hot(idle.detach().argmax(1), idle.shape[1]).to(idle) if few else idle[:, :0]
    columns = [torch.ones_like(top[:, :1]), own]
    if conditional:
        columns += [top, *([idle, own * top[:, :1]] if few else [])]
    return torch.cat(columns, 1)
