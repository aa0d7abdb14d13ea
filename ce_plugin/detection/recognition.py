"""What attacked images teach: a small network on effects that recognises attacks of the kinds it was shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ce_plugin.randomness import generator

__all__ = ["Recogniser"]

_HIDDEN = 32
_STEPS = 600
_BATCH = 256
_LEARNING_RATE = 5e-3
_DECAY = 0.1
_INITIAL = 0.33
_FOLDS = 4
# Beyond so many standard deviations a trait says no more: an image far from all that was shown is nobody's likeness.
_FAR = 8.0


@dataclass(frozen=True)
class Recogniser:
    """Likeness of an image's effects to those of the attacked images that were shown.

    z = (h(t) - center) / spread, where h is the logit of a network with two hidden layers, trained to tell attacked
    images from clean and harmlessly altered ones, both kinds counting the same; center and spread are those of clean
    and altered images that h was not trained on (four folds). It is one verdict among others: an attack of another
    kind, which it takes for clean, is still judged by its deviations.

    Args:
        mean, scale: of the traits, (P,).
        first, second, last: weights of the layers, (32, P + 1), (32, 33), (1, 33); the last column are offsets.
        center, spread: scalars.

    Example:
        >>> usual = torch.randn(80, 1, 2, generator=torch.Generator().manual_seed(0))
        >>> recogniser = Recogniser.fit(usual, usual[:, 0] + torch.tensor([4.0, 0.0]), seed=0)
        >>> recogniser(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])).gt(1.5).tolist()
        [False, True, False]
    """

    mean: Tensor
    scale: Tensor
    first: Tensor
    second: Tensor
    last: Tensor
    center: Tensor
    spread: Tensor

    @classmethod
    def fit(cls, usual: Tensor, attacked: Tensor, seed: int) -> Recogniser:
        """Learn from traits.

        Args:
            usual: of clean images, each in V versions (as it is, and harmlessly altered), (n, V, P).
            attacked: of attacked images, (M, P).
            seed: of the weights and of the order of training.
        """
        usual, attacked = usual.double(), attacked.double()
        folds = torch.arange(len(usual)) % _FOLDS
        folds = folds[torch.randperm(len(usual), generator=generator(seed, "recognition", "folds"))]
        unseen = torch.cat([_trained(usual[folds != k], attacked, seed)(usual[folds == k]) for k in range(_FOLDS)])
        whole = _trained(usual, attacked, seed)
        return replace(whole, center=unseen.mean(), spread=unseen.std().clamp_min(1e-9))

    def __call__(self, traits: Tensor) -> Tensor:
        """z of traits (..., P), (...)."""
        x = ((traits.to(self.mean) - self.mean) / self.scale).clamp(-_FAR, _FAR)
        return (_logit(x, (self.first, self.second, self.last)) - self.center) / self.spread

    def to(self, device: torch.device) -> Recogniser:
        """The same on another device."""
        return Recogniser(*(value.to(device) for value in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Recogniser:
        """What :meth:`tensors` gave."""
        return cls(**tensors)


def _logit(x: Tensor, layers: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The network's answer (...) to standardised traits (..., P)."""
    for layer in layers[:-1]:
        x = F.silu(F.linear(x, layer[:, :-1], layer[:, -1]))
    return F.linear(x, layers[-1][:, :-1], layers[-1][:, -1]).squeeze(-1)


def _trained(usual: Tensor, attacked: Tensor, seed: int) -> Recogniser:
    """The network, not yet centred and scaled."""
    traits = torch.cat([usual.flatten(0, 1), attacked])
    is_attacked = torch.cat([torch.zeros(len(traits) - len(attacked)), torch.ones(len(attacked))]).to(traits)
    share = is_attacked.mean()
    worth = torch.where(is_attacked > 0, 0.5 / share, 0.5 / (1 - share))
    mean, scale = traits.mean(0), traits.std(0).clamp_min(1e-6)
    x = ((traits - mean) / scale).clamp(-_FAR, _FAR)
    random = generator(seed, "recognition")
    first, second, last = (
        _drawn(n_out, n_in, random) for n_out, n_in in ((_HIDDEN, x.shape[1]), (_HIDDEN, _HIDDEN), (1, _HIDDEN))
    )
    layers = (first, second, last)
    optimizer = torch.optim.AdamW(layers, lr=_LEARNING_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS)
    with torch.enable_grad():
        for _ in range(_STEPS):
            rows = torch.randint(len(x), (_BATCH,), generator=random)
            losses = F.binary_cross_entropy_with_logits(_logit(x[rows], layers), is_attacked[rows], reduction="none")
            optimizer.zero_grad()
            (losses * worth[rows]).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    nought, one = torch.zeros_like(share), torch.ones_like(share)
    return Recogniser(mean, scale, first.detach(), second.detach(), last.detach(), nought, one)


def _drawn(n_out: int, n_in: int, random: torch.Generator) -> Tensor:
    """Weights of a layer before training, offsets of zero beside them."""
    weights = torch.randn(n_out, n_in, generator=random, dtype=torch.float64) * (_INITIAL / n_in) ** 0.5
    return torch.cat([weights, torch.zeros(n_out, 1, dtype=torch.float64)], 1).requires_grad_()
