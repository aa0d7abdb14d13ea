"""The kinds of operations through which differences can be followed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Cat", "Conv", "Last", "Linear", "Norm", "Operation", "Pointwise", "Pool", "Separable", "View"]


@dataclass(frozen=True)
class Operation:
    """An operation on ``source``; ``apply`` runs it on a tensor."""

    source: Any
    apply: Callable[..., Any]


@dataclass(frozen=True)
class Pointwise(Operation):
    """Each element of the result depends on the same element of the operands (the tensors among ``source``)."""


@dataclass(frozen=True)
class Separable(Operation):
    """Channels are treated separately, and the result has the same channels.

    ``spatial`` is what is reduced: "mean" over all positions, or a padding (left, right, top, bottom).
    """

    spatial: Any = None


@dataclass(frozen=True)
class Pool(Separable):
    """Pooling by windows: "max" or "avg"."""

    form: str = "max"
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil: bool = False


@dataclass(frozen=True)
class Last(Operation):
    """Only the last dimensions are mixed: normalisation or a linear map of the features of each token."""

    dims: int = 1


@dataclass(frozen=True)
class Norm(Operation):
    """Batch normalisation with fixed statistics: one affine map per channel."""

    mean: Tensor = field(default_factory=torch.Tensor)
    var: Tensor = field(default_factory=torch.Tensor)
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


@dataclass(frozen=True)
class Conv(Operation):
    """Two-dimensional convolution with zero padding."""

    weight: Tensor = field(default_factory=torch.Tensor)
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        return self.weight.shape[2], self.weight.shape[3]


@dataclass(frozen=True)
class Linear(Operation):
    """A linear map of the last dimension."""

    weight: Tensor = field(default_factory=torch.Tensor)


@dataclass(frozen=True)
class View(Operation):
    """The same elements in the same order, in another shape."""


@dataclass(frozen=True)
class Cat(Operation):
    """Concatenation; ``source`` are the parts."""

    dim: int = 0
