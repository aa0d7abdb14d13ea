"""All that a fitted detector knows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ce_plugin.detection.calibration import Calibration
from ce_plugin.detection.classifier import Protected
from ce_plugin.detection.fitted import Fitted, Sample
from ce_plugin.detection.measuring import digests, measured
from ce_plugin.detection.signature import Signature
from ce_plugin.detection.view import View
from ce_plugin.errors import ArgumentError, InputError, expected

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["State"]


@dataclass(frozen=True)
class State:
    """What was learned, on which images and which network.

    Args:
        fitted: what clean images' effects are like.
        signature: what is measured, with what its groups have trained.
        held: deviations of the images that calibrate it, (n, D).
        traits: of the same images, (n, P).
        shape: of an image, (C, H, W).
        seen: digests of the images that it was fitted on.
        fingerprint: of the network.
        seed: of interventions that draw random numbers.
    """

    fitted: Fitted
    signature: Signature
    held: Tensor = field(repr=False)
    traits: Tensor = field(repr=False)
    shape: tuple[int, ...]
    seen: frozenset[int] = field(repr=False)
    fingerprint: str
    seed: int

    @cached_property
    def calibration(self) -> Calibration:
        """The scores of the images that calibrate it."""
        return Calibration(self.fitted.score(self.held).numpy())

    def deviations(self, protected: Protected, images: Tensor, batch_size: int) -> Tensor:
        """Every verdict on images, centred and scaled on clean ones, (N, D)."""
        return self.fitted.deviations(self.measured(protected, images, batch_size))

    def taught(self, protected: Protected, images: Tensor, batch_size: int) -> State:
        """The same, having been shown these attacked images."""
        names = digests(images)
        # In an order of their own: training takes them in the order of their places.
        order = sorted(range(len(names)), key=names.__getitem__)
        fitted = self.fitted.taught(self.measured(protected, images[order], batch_size), self.seed)
        return replace(self, fitted=fitted, held=fitted.with_likeness(self.held, self.traits))

    def checked(self, protected: Protected, x: object) -> Tensor:
        """The user's images, of the shape that the detector was fitted on."""
        images = protected.images(x)
        if tuple(images.shape[1:]) != self.shape:
            raise InputError(expected("x", f"images of shape {self.shape}", f"shape {tuple(images.shape[1:])}"))
        return images

    def measured(self, protected: Protected, images: Tensor, batch_size: int) -> Sample:
        """What the signature finds in images."""
        return measured(protected, self.signature, images, batch_size=batch_size, seed=self.seed)

    def scores(self, protected: Protected, images: Tensor, batch_size: int) -> npt.NDArray[np.float64]:
        """Scores (N,) of images."""
        scores: npt.NDArray[np.float64] = self.fitted.score(self.deviations(protected, images, batch_size)).numpy()
        return scores

    def score_tensor(self, protected: Protected, images: Tensor) -> Tensor:
        """Scores (N,) with a gradient.

        Raises:
            ArgumentError: a group of the signature has none.
        """
        if not self.signature.differentiable:
            names = [group.name for group in self.signature.groups if not group.differentiable]
            raise ArgumentError(expected("signature", "groups that have a gradient", f"{names}, which have none"))
        with protected.guarded():
            view = View(protected, images, digests(images), self.seed)
            sample = Sample(self.signature.measure(view), view.logits)
            fitted = self.fitted.to(images.device)
            return fitted.score(fitted.deviations(sample)).to(images.dtype)

    def recalibrated(self, protected: Protected, images: Tensor, batch_size: int) -> State:
        """The same, calibrated on other images.

        Raises:
            InputError: an image is among those that the detector was fitted on.
        """
        again = sum(name in self.seen for name in digests(images))
        if again:
            todo = "On its own images every distance is too small, and the threshold would be, too."
            raise InputError(expected("x", "images that the detector was not fitted on", f"{again} that it was", todo))
        sample = self.measured(protected, images, batch_size)
        return replace(self, held=self.fitted.deviations(sample), traits=sample.traits())

    def groups(self, deviations: Tensor) -> dict[str, npt.NDArray[np.float64]]:
        """The columns of the verdicts (N, D) by name."""
        names: Sequence[str] = self.signature.verdicts(self.fitted)
        return {name: deviations[:, i].numpy() for i, name in enumerate(names)}
