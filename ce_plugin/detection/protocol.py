"""Protocols of detectors of adversarial examples: images in, scores out."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array = npt.NDArray[Any]


@runtime_checkable
class Detector(Protocol):
    """Anything that fits on images and scores images; a greater score means more adversarial.

    Attributes:
        name: what tables call it.

    Example:
        >>> class Brightness:
        ...     name = "brightness"
        ...     def fit(self, x, y=None): ...
        ...     def score(self, x, batch_size=128):
        ...         return x.mean((1, 2, 3)).astype(float)
        >>> isinstance(Brightness(), Detector)
        True
    """

    name: str

    def fit(self, x: Array, y: Array | None = None) -> None:
        """Learn what images are like: clean ones alone, or with labels, 0 clean and 1 adversarial.

        Args:
            x: images (N, ...), float32, in image units.
            y: (N,), or None where all images are clean.
        """

    def score(self, x: Array, batch_size: int = 128) -> npt.NDArray[np.float64]:
        """How adversarial each image looks, (N,), float64."""


@runtime_checkable
class DifferentiableDetector(Detector, Protocol):
    """A detector whose score has a gradient, so that an attacker can lower it.

    Example:
        >>> class Brightness:
        ...     name = "brightness"
        ...     def fit(self, x, y=None): ...
        ...     def score(self, x, batch_size=128):
        ...         return self.score_tensor(torch.as_tensor(x)).double().numpy()
        ...     def score_tensor(self, images):
        ...         return images.mean((1, 2, 3))
        >>> import torch
        >>> isinstance(Brightness(), DifferentiableDetector)
        True
    """

    def score_tensor(self, images: Tensor) -> Tensor:
        """The score of images (N, ...) in image units, (N,), with a gradient; roundings pass it straight through."""
