"""Networks as an attack sees them: images in, scores of at least two classes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ce_plugin.errors import ModelError, expected

__all__ = ["BinaryProblem", "ImageNetwork"]


class ImageNetwork(nn.Module):
    """A network as an attack sees it: float32 images in image units in, float32 scores (N, C) out, logits or alike.

    The network itself is kept out of the module tree, so that ART's ``.to()``, ``.train()`` and ``.zero_grad()`` do
    not reach it; inputs go to the device and dtype that it has at each call. Being no ``nn.Sequential``, it is also
    safe from ART's habit of running the children of a Sequential one by one, past its hooks and its ``forward``.

    Args:
        model: the network, fed in model units.
        to_model: image units to model units.
        output: key or function that takes the scores out of what the network returns.
        probabilities: the network ends in a softmax or sigmoid, which is undone.
        multi_label: each output is a label of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        to_model: Callable[[Tensor], Tensor] | None = None,
        *,
        output: str | int | Callable[[Any], Tensor] | None = None,
        probabilities: bool = False,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        self._hidden = (model,)
        self.to_model = to_model
        self.output = output
        self.probabilities = probabilities
        self.multi_label = multi_label

    def forward(self, images: Tensor) -> Tensor:
        (model,) = self._hidden
        tensors = (*model.parameters(), *model.buffers())
        like = next((t for t in tensors if t.is_floating_point()), images)
        x = images.to(like.device, like.dtype)
        scores = self._scores(model(x if self.to_model is None else self.to_model(x)))
        if not self.probabilities:
            return scores
        # Clamped where float32 has no more room; the gradient there is zero either way.
        log_p = scores.clamp_min(1e-30).log()
        independent = self.multi_label or scores.shape[1] == 1
        return log_p - (1 - scores).clamp_min(6e-8).log() if independent else log_p

    def _scores(self, result: Any) -> Tensor:
        if callable(self.output):
            result = self.output(result)
        elif self.output is not None:
            result = result[self.output]
        if not isinstance(result, Tensor):
            raise ModelError(
                expected("model", "a network that returns a tensor", type(result).__name__, "Say which with `output=`.")
            )
        if result.dim() == 1:
            result = result[:, None]
        if result.dim() != 2:
            shape = tuple(result.shape)
            raise ModelError(expected("model", "a network with scores (N, C), to be attacked", f"scores {shape}"))
        scores: Tensor = result.float()
        return scores


class BinaryProblem(nn.Module):
    """Labels of a multi-label network as one problem of two classes: 1 "all as decided", 0 "one of them flipped".

    The value is exact for attacks that look at the decision: the smallest margin min_l s_l z_l. The gradient is that
    of the sum of the labels' binary cross-entropies, the loss that such networks are trained with.

    Args:
        network: images to logits z, (N, L).
        signs: s, (L,): 1 for a label that is present, -1 for one that is absent, 0 for one that is left out.
    """

    def __init__(self, network: nn.Module, signs: Tensor) -> None:
        super().__init__()
        self.network = network
        self.signs = signs

    def forward(self, images: Tensor) -> Tensor:
        scores = self.network(images)
        signs = self.signs.to(scores)
        margins = scores * signs
        loss = (F.softplus(-margins) * signs.abs()).sum(1)
        smallest = margins.masked_fill(signs == 0, torch.inf).amin(1).detach()
        # -m and m, not 0 and 2m: the gradient of the larger of two logits vanishes once its probability rounds to 1.
        margin = (smallest - loss + loss.detach()) / 2
        return torch.stack([-margin, margin], 1)
