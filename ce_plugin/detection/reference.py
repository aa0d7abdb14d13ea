"""What the effects of clean images are like, class by class, and how far an image's effects are from that."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ce_plugin.errors import InputError, expected

__all__ = ["ClassScale", "EffectDistance"]

# Images' worth of weight that a class's own centre and scale have to outweigh before they count more than everyone's.
_PRIOR = 20.0
_MAD = 1.4826
# A column that hardly varies over clean images must not be blown up: everyone's scale of it is at least this share of
# the typical one, and classes are drawn towards that.
_FLOOR = 0.05


@dataclass(frozen=True)
class ClassScale:
    """Centre and scale of every effect in every predicted class.

    With n images of a class, its centre is (n median_class + n0 median_all) / (n + n0), and its scale the same mean of
    squares of 1.4826 times the median absolute deviations, with n0 = 20: classes with few images borrow from all.

    Args:
        center: (K, F), float64.
        scale: (K, F), float64, positive.

    Example:
        >>> effects = torch.tensor([[1.0], [2.0], [3.0], [40.0]], dtype=torch.float64)
        >>> scale = ClassScale.fit(effects, torch.tensor([0, 0, 0, 1]), n_classes=3)
        >>> scale.center[2].item()  # a class without images has everyone's median
        2.5
        >>> scale.standardised(torch.tensor([[2.5]]), torch.tensor([2])).item()
        0.0
    """

    center: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, effects: Tensor, predicted: Tensor, n_classes: int) -> ClassScale:
        """Centres and scales of clean images' effects (N, F), of predicted classes (N,)."""
        effects = effects.double()
        counts = torch.bincount(predicted, minlength=n_classes).double()[:, None]
        everyone = effects.quantile(0.5, dim=0)
        center = everyone.expand(n_classes, -1).clone()
        present = counts.squeeze(1).nonzero().squeeze(1).tolist()
        for k in present:
            center[k] = effects[predicted == k].quantile(0.5, dim=0)
        center = (counts * center + _PRIOR * everyone) / (counts + _PRIOR)
        residual = (effects - center[predicted]).abs()
        typical = _floored(_MAD * residual.quantile(0.5, dim=0))
        squares = typical.square().expand(n_classes, -1).clone()
        for k in present:
            squares[k] = (_MAD * residual[predicted == k].quantile(0.5, dim=0)).square()
        scale = ((counts * squares + _PRIOR * typical.square()) / (counts + _PRIOR)).sqrt()
        return cls(center, scale)

    def standardised(self, effects: Tensor, predicted: Tensor) -> Tensor:
        """How many scales each effect lies from the centre of its class, (N, F), float64."""
        predicted = predicted.to(self.center.device)
        return (effects.to(self.center) - self.center[predicted]) / self.scale[predicted]


@dataclass(frozen=True)
class EffectDistance:
    """The distance of an image's effects from those of clean images, of one group of interventions.

    d = log((v - mu)' P (v - mu)), where v is the inverse hyperbolic sine of the standardised effects, which tames
    heavy tails, and mu and P are the mean and the inverse of the shrunken covariance of clean images. Effects that are
    abnormally small count as much as those that are abnormally large.

    Args:
        scale: centres and scales by class.
        mean: mu, (F,).
        precision: P, (F, F).

    Example:
        >>> clean = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
        >>> classes = torch.arange(500) % 2
        >>> distance = EffectDistance.fit(clean, classes, n_classes=2)
        >>> odd = distance(torch.full((1, 4), 9.0), torch.tensor([0]))
        >>> bool(odd > distance(clean, classes).max())
        True

    Source: the covariance is shrunk as in Ledoit and Wolf, Journal of Multivariate Analysis 88 (2004), 365-411.
    """

    scale: ClassScale
    mean: Tensor
    precision: Tensor

    @classmethod
    def fit(cls, effects: Tensor, predicted: Tensor, n_classes: int) -> EffectDistance:
        """Learn from clean images' effects (N, F), of predicted classes (N,).

        Raises:
            InputError: an effect is not finite.
        """
        from sklearn.covariance import LedoitWolf

        effects, predicted = effects.detach().double().cpu(), predicted.cpu()
        if not bool(effects.isfinite().all()):
            todo = "The network's logits overflow or are NaN under an intervention; run it in float32."
            raise InputError(expected("x", "images with finite effects", "effects with NaN or infinity", todo))
        scale = ClassScale.fit(effects, predicted, n_classes)
        values = scale.standardised(effects, predicted).asinh()
        shrunk = LedoitWolf().fit(values.numpy())
        mean, precision = torch.as_tensor(shrunk.location_), torch.as_tensor(shrunk.precision_)
        return cls(scale, mean.double(), precision.double())

    def __call__(self, effects: Tensor, predicted: Tensor) -> Tensor:
        """The distances (N,), float64, with a gradient where the effects have one."""
        deviation = self.scale.standardised(effects, predicted).asinh() - self.mean
        return ((deviation @ self.precision) * deviation).sum(1).clamp_min(1e-9).log()

    def to(self, device: torch.device) -> EffectDistance:
        """The same on another device."""
        scale = ClassScale(self.scale.center.to(device), self.scale.scale.to(device))
        return EffectDistance(scale, self.mean.to(device), self.precision.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored; :meth:`from_tensors` is the way back."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "scale"}
        return {**own, "center": self.scale.center, "scale": self.scale.scale}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> EffectDistance:
        """The distance whose :meth:`tensors` these are."""
        return cls(ClassScale(tensors["center"], tensors["scale"]), tensors["mean"], tensors["precision"])


def _floored(typical: Tensor) -> Tensor:
    floor = _FLOOR * typical.median()
    # All columns constant (a network that ignores its input): any scale will do, since every difference is zero.
    return typical.clamp_min(float(floor) if floor > 0 else 1e-9)
