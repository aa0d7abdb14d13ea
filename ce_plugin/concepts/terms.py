"""The loss of a batch, term by term, and its course over an epoch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ce_plugin.concepts.losses import deep_loss, shallow_loss
from ce_plugin.concepts.model import ConceptAutoencoder
from ce_plugin.concepts.recorded import Batch, Recorded
from ce_plugin.concepts.settings import Settings
from ce_plugin.errors import ArgumentError, expected

__all__ = ["Objective"]

Terms = dict[str, Tensor]


class Objective:
    """``lambda_shallow shallow + lambda_deep deep + lambda_interpretability interpretability``.

    Args:
        settings: the weights, the outcome, and the size of a batch.
        scale: unit of the shallow term.
        interpretability: from a code to a scalar.
    """

    def __init__(self, settings: Settings, scale: float, interpretability: Callable[[Tensor], Tensor]) -> None:
        self.settings, self.scale, self._interpretability = settings, scale, interpretability

    def terms(self, autoencoder: ConceptAutoencoder, recorded: Recorded, batch: Batch) -> Terms:
        """Each term and the total, with gradient to the autoencoder."""
        s = self.settings
        code = autoencoder.encode(batch.activations)
        reconstruction = autoencoder.decode(code)
        found = {
            "shallow": shallow_loss(batch.activations, reconstruction, self.scale),
            "deep": deep_loss(batch.output, recorded.answer(reconstruction, batch), s.outcome),
            "interpretability": self._interpretability(code),
        }
        weights = (s.lambda_shallow, s.lambda_deep, s.lambda_interpretability)
        total = torch.zeros_like(found["shallow"])
        for value, weight in zip(found.values(), weights, strict=True):
            # Left out at weight zero: zero times a value that is not finite is not zero.
            total = total + weight * value if weight > 0 else total
        return {**found, "total": total}

    def epoch(
        self,
        autoencoder: ConceptAutoencoder,
        recorded: Recorded,
        rows: list[int],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> dict[str, float]:
        """Means of all terms over some images, in this order; with an optimizer, a step per batch.

        Raises:
            ArgumentError: the loss is no longer finite.
        """
        sums: dict[str, float] = {}
        size = self.settings.batch_size
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            terms = self.terms(autoencoder, recorded, recorded.batch(some))
            if not bool(terms["total"].isfinite()):
                todo = "Try a tenth of it, and look at what `interpretability` returns."
                raise ArgumentError(expected("lr", "so small that the loss stays finite", self.settings.lr, todo))
            if optimizer is not None:
                optimizer.zero_grad()
                torch.autograd.backward(terms["total"])
                optimizer.step()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach()) * len(some)
        return {key: value / len(rows) for key, value in sums.items()}
