"""From a network's outputs to the outcomes of the classes that are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from ce_plugin.attribution.inputs import Target, flat_target
from ce_plugin.effects import Outcome, check_outcome
from ce_plugin.errors import ModelError, TargetError, expected

__all__ = ["Measured"]


class Measured:
    """The reference's outputs, and how trials are measured against them.

    Args:
        heads: the reference's outputs, (N, *K) for each head.
        outcome: what is measured.
        target: in any of Captum's forms; only its outcome is kept then.
        predicted_only: without a target keep each example's predicted class only.
        decided: the outputs that say which class is predicted, where these are others than the reference's: those of
            the network without an autoencoder.

    Attributes:
        reference: the reference's outcomes, (N, C) for each head.
        targets: index into the flattened output for each example, (N,), or None where all are kept, by head.
        predicted: predicted class, (N,), or None where the output is not (N, C >= 2), by head.
        class_shapes: trailing shape of the outcomes, by head.

    Raises:
        ModelError: the reference's outputs are not finite.
        OutcomeError: the outcome does not fit the output.
        TargetError: the target does not fit the output, or is missing where it is needed.
    """

    def __init__(
        self,
        heads: dict[str, Tensor],
        outcome: Outcome,
        target: Target,
        predicted_only: bool,
        decided: dict[str, Tensor] | None = None,
    ) -> None:
        self.outcome = outcome
        self._outputs = heads
        self.targets: dict[str, Tensor | None] = {}
        self.predicted: dict[str, Tensor | None] = {}
        self.class_shapes: dict[str, tuple[int, ...]] = {}
        self.reference: dict[str, Tensor] = {}
        for name, head in heads.items():
            if not bool(torch.isfinite(head).all()):
                todo = "Check the inputs' range and the model's weights."
                raise ModelError(
                    expected("forward_func", "a model with finite outputs on the clean inputs", "NaN", todo)
                )
            check_outcome(outcome, head)
            deciding = head if decided is None else decided[name]
            self.predicted[name] = deciding.argmax(1) if head.dim() == 2 and head.shape[1] > 1 else None
            # Copies, because a user's outcome may write to what it is given.
            own = outcome(head.clone(), head.clone())
            self.targets[name] = self._target(name, head, own, target, predicted_only)
            self.class_shapes[name] = () if self.targets[name] is not None else tuple(own.shape[1:])
            self.reference[name] = self._kept(name, own, torch.arange(len(head), device=head.device))

    def _target(self, name: str, head: Tensor, own: Tensor, target: Target, predicted_only: bool) -> Tensor | None:
        if not self.outcome.per_class:
            if target is not None:
                todo = f"{self.outcome.name!r} is one number for all classes: leave the target out."
                raise TargetError(expected("target", "None", target, todo))
            return None
        flat = flat_target(target, tuple(own.shape))
        if flat is None and predicted_only:
            if own.shape[1:].numel() == 1:
                return None
            flat = self.predicted[name]
            if flat is None or own.shape != head.shape:
                wanted = f"an index into outputs {tuple(own.shape)}"
                todo = "Only for outputs (N, C) the predicted class is the default."
                raise TargetError(expected("target", wanted, "None", todo))
        return None if flat is None else flat.to(head.device)

    def _kept(self, name: str, outcome: Tensor, examples: Tensor) -> Tensor:
        flat = outcome.reshape(len(outcome), -1)
        target = self.targets[name]
        return flat if target is None else flat.gather(1, target[examples][:, None])

    def __call__(self, heads: dict[str, Tensor], examples: Tensor) -> dict[str, Tensor]:
        """Outcomes (B, C) of a batch of rows, each against its own example's reference."""
        return {
            name: self._kept(name, self.outcome(head, self._outputs[name][examples]), examples)
            for name, head in heads.items()
        }
