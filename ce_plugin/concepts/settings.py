"""The numbers of a training, checked before any work."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ce_plugin.concepts.losses import check_outcome
from ce_plugin.errors import ArgumentError, expected

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What a training was asked for; what an interrupted one must share with the one that goes on.

    Args: those of ``train_autoencoder``; ``interpretability`` is the name of the callable, ``validation`` a share or a
    word that says that the images are others.

    Raises:
        ArgumentError: a number out of its range.
    """

    concepts: int
    hidden: int | None
    kernel_size: int
    lambda_shallow: float
    lambda_deep: float
    lambda_interpretability: float
    interpretability: str
    epochs: int
    batch_size: int
    lr: float
    validation: float | str
    patience: int
    seed: int
    outcome: str

    def __post_init__(self) -> None:
        if self.concepts < 1:
            raise ArgumentError(expected("concepts", "at least 1", self.concepts))
        lambdas = ("lambda_shallow", "lambda_deep", "lambda_interpretability")
        for name in lambdas:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ArgumentError(expected(name, "zero or more", value))
        if not any(getattr(self, name) > 0 for name in lambdas[:2]):
            todo = "With neither, nothing asks the autoencoder to restore anything."
            raise ArgumentError(expected("lambda_shallow", "above zero where lambda_deep is zero", 0.0, todo))
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ArgumentError(expected(name, "1 or more", getattr(self, name)))
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ArgumentError(expected("lr", "above zero", self.lr))
        if not isinstance(self.validation, str) and not 0.0 < self.validation < 1.0:
            todo = "Without held-out images there is nothing to stop by and no fidelity."
            raise ArgumentError(expected("validation", "a share in (0, 1), or images", self.validation, todo))
        check_outcome(self.outcome)

    def to_dict(self) -> dict[str, object]:
        """The fields by name."""
        return asdict(self)
