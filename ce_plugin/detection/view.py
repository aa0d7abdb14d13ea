"""Images as a signature looks at them: the network's answer, its gradient, and any number of altered runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ce_plugin.effects import resolve_outcome
from ce_plugin.interventions.base import Context, Intervention

__all__ = ["FEW", "RANKS", "View", "effects_on_logits", "leading_logits", "margin_under", "outcome_names"]

RANKS = 8
FEW = 20
_margin = resolve_outcome("margin")


class View:
    """One batch of images together with what all groups of a signature share, computed once.

    Args:
        network: images in image units to logits (N, K), in eval mode.
        images: (N, ...), in image units. Where they require a gradient, everything here has one.
        ids: one id per image, for interventions that draw random numbers.
        seed: seed of these.

    Attributes:
        logits: (N, K), in float32 at least.
        predicted: index of the largest logit, (N,).
    """

    def __init__(self, network: nn.Module, images: Tensor, ids: Sequence[int] | None = None, seed: int = 0) -> None:
        self.network = network
        self.differentiable = images.requires_grad and torch.is_grad_enabled()
        self.images = images
        self.context = Context(ids=tuple(ids) if ids is not None else (0,) * len(images), seed=seed)
        self._gradient: Tensor | None = None
        self.logits = self.run(images)
        self.predicted = self.logits.detach().argmax(1)

    def run(self, images: Tensor) -> Tensor:
        """Logits (N, K) of altered images: one forward pass."""
        return _widened(self.network(images))

    def do(self, intervention: Intervention) -> Tensor:
        """Logits (N, K) with every unit of the input set by an intervention."""
        return self.run(intervention.values(self.images, self.context))

    def margin(self) -> Tensor:
        """Logit of the predicted class minus the largest other one, (N,); zero or more."""
        return _margin(self.logits, self.logits).gather(1, self.predicted[:, None]).squeeze(1)

    def gradient(self) -> Tensor:
        """Gradient of the margin with respect to the images, of their shape, in float32 at least: two passes.

        It is computed once. For an attacker it has a gradient itself.
        """
        if self._gradient is None:
            self._gradient = self._margin_gradient()
        return self._gradient

    def _margin_gradient(self) -> Tensor:
        if self.differentiable:
            (gradient,) = torch.autograd.grad(self.margin().sum(), self.images, create_graph=True)
            return _widened(gradient)
        with torch.enable_grad():
            images = self.images.detach().requires_grad_(True)
            logits = self.run(images)
            margin = _margin(logits, logits).gather(1, self.predicted[:, None])
            (gradient,) = torch.autograd.grad(margin.sum(), images)
        return _widened(gradient)


def effects_on_logits(do: Tensor, idle: Tensor) -> Tensor:
    """What an intervention does to the logits, in a form that images of one predicted class share.

    With up to 20 classes these are the effects on every logit. With more they are the effects on the predicted class's
    logit, on those of the next ``RANKS`` classes in the order of the idle run, on the largest logit of any class but
    the predicted one, and on the logarithm of the sum of exponentials over all of these.

    Args:
        do: logits under the intervention, (N, K).
        idle: logits without it, (N, K).

    Returns:
        (N, F), outcome under do minus outcome when idle (Eq. 1): a negative effect on the predicted class means that
        the intervention takes away what supports it.

    Example:
        >>> effects_on_logits(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]]))
        tensor([[-2.,  2.]])

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Eq. 1.
    """
    if idle.shape[1] <= FEW:
        return do - idle
    order = idle.detach().topk(RANKS + 1, dim=1).indices
    ranked = do.gather(1, order) - idle.gather(1, order)
    rivals = _without(do, order[:, :1]), _without(idle, order[:, :1])
    strongest = rivals[0].amax(1) - rivals[1].amax(1)
    together = rivals[0].logsumexp(1) - rivals[1].logsumexp(1)
    return torch.cat([ranked, strongest[:, None], together[:, None]], 1)


def margin_under(do: Tensor, idle: Tensor) -> Tensor:
    """The margin that the idle run's predicted class has under interventions.

    Args:
        do: logits (N, S, K).
        idle: logits (N, K).

    Returns:
        (N, S): below zero where the intervention changes the answer.
    """
    predicted = idle.detach().argmax(1)[:, None, None].expand(-1, do.shape[1], 1)
    rivals = do.scatter(2, predicted, -torch.inf).amax(2)
    return do.gather(2, predicted).squeeze(2) - rivals


def leading_logits(idle: Tensor) -> Tensor:
    """The idle logits in the form of :func:`effects_on_logits`: all of up to 20, else the largest, (N, F)."""
    return idle if idle.shape[1] <= FEW else idle.topk(RANKS + 1, dim=1).values


def outcome_names(n_classes: int, label: Callable[[int], str]) -> list[str]:
    """What the columns of :func:`effects_on_logits` are, in words."""
    if n_classes <= FEW:
        return [f"the logit of {label(k)}" for k in range(n_classes)]
    ranked = [f"the logit of class no. {rank + 1} in the idle order" for rank in range(1, RANKS + 1)]
    return ["the logit of the predicted class", *ranked, "the largest other logit", "all other logits together"]


def _without(logits: Tensor, index: Tensor) -> Tensor:
    return logits.scatter(1, index, -torch.inf)


def _widened(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
