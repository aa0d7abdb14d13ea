"""The group of the learned denoiser: what the network makes of the image as clean images taught it to be cleaned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ce_plugin.detection.classifier import Protected
from ce_plugin.detection.denoiser import Denoiser, train_denoiser
from ce_plugin.detection.group import SIDES, Group, Response, checked_sides, labels_of, response_of
from ce_plugin.detection.view import View
from ce_plugin.errors import ArgumentError, InferenceError, expected
from ce_plugin.interventions import Denoise
from ce_plugin.trials.flops import flops_of

__all__ = ["Denoising"]


class Denoising(Group):
    """Effects of do(x = D(x)), where the denoiser D is trained, when the detector is fitted, on clean images alone.

    A hardened denoiser (``eps`` above 0) is trained on what shakes the network behind it most as well, which it finds
    for itself in every step: an attacker who knows the detector has to deceive a network that was prepared for that.
    Training takes about five times as long.

    Args:
        width: of the :class:`~ce_plugin.detection.denoiser.Denoiser`.
        least_steps: training takes ``nb_epochs`` of :meth:`CausalEffectDetector.fit`, and at least so many steps.
        eps: greatest change of a value against which the denoiser is hardened, in image units; 0: it is not.
        passes: what a denoised run costs, in forward passes of the network, the denoiser included; counted in
            floating-point operations when it is prepared.
        judged: from which sides, see :data:`~ce_plugin.detection.group.SIDES`.
        name: of the group.

    Example:
        >>> protected = Protected(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)))
        >>> images = torch.rand(8, 1, 8, 8)
        >>> group = Denoising(least_steps=2).prepared(protected, images, n_epochs=1, seed=0)
        >>> group.respond(View(protected, images)).effects.shape
        torch.Size([8, 3])

    Source: :func:`~ce_plugin.detection.denoiser.train_denoiser`.
    """

    def __init__(
        self,
        *,
        width: int = 16,
        least_steps: int = 800,
        eps: float = 0.0,
        passes: float = 3.0,
        judged: Sequence[str] = SIDES,
        name: str = "denoising",
    ) -> None:
        self.judged = checked_sides(judged)
        if width < 1 or least_steps < 1:
            raise ArgumentError(expected("width and least_steps", "1 or more", (width, least_steps)))
        if not 0 <= eps < math.inf:
            raise ArgumentError(expected("eps", "a size in image units, 0 or more", eps))
        self.name = name
        self.width, self.least_steps, self.eps, self.passes = width, least_steps, float(eps), passes
        self._denoiser: Denoiser | None = None

    def prepared(self, protected: Protected, images: Tensor, *, n_epochs: int, seed: int) -> Group:
        """The group with a denoiser trained on clean images."""
        n_steps = max(self.least_steps, n_epochs * len(images) // 64)
        ready = Denoising(**self.settings())
        ready._denoiser = train_denoiser(protected, images, width=self.width, n_steps=n_steps, eps=self.eps, seed=seed)
        ready.passes = 1 + _share(ready._denoiser, protected, images[:1])
        return ready

    def respond(self, view: View) -> Response:
        """Effects of denoising on the logits, and the margin that is left."""
        if self._denoiser is None:
            raise InferenceError(expected("signature", "one whose denoiser is trained", "one before `fit`"))
        # Where the images are, wherever it was trained or read from a file.
        denoiser = self._denoiser.to(view.images.device)

        def denoise(images: Tensor) -> Tensor:
            cleaned: Tensor = denoiser(images.to(denoiser.out.weight))
            return cleaned.to(images)

        return response_of(view, [view.do(Denoise(denoise))], self.judged)

    def labels(self, n_classes: int) -> list[str]:
        """See :meth:`Group.labels`."""
        return labels_of(self.interventions(), n_classes) if "distance" in self.judged else []

    def interventions(self) -> list[str]:
        """One."""
        return ["hardened denoising" if self.eps else "denoising"]

    def settings(self) -> dict[str, Any]:
        """See :meth:`Group.settings`."""
        return {
            "width": self.width,
            "least_steps": self.least_steps,
            "eps": self.eps,
            "passes": self.passes,
            "judged": list(self.judged),
            "name": self.name,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The denoiser's parameters and what it was built with."""
        if self._denoiser is None:
            return {}
        built = torch.tensor([self._denoiser.channels, *self._denoiser.value_range], dtype=torch.float64)
        return {**self._denoiser.state_dict(), "built": built}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Group:
        """The group with this denoiser."""
        if not tensors:
            return self
        channels, low, high = tensors["built"].tolist()
        ready = Denoising(**self.settings())
        ready._denoiser = Denoiser(int(channels), self.width, (low, high))
        ready._denoiser.load_state_dict({name: value for name, value in tensors.items() if name != "built"})
        ready._denoiser.eval().requires_grad_(False)
        return ready


def _share(denoiser: Denoiser, protected: Protected, image: Tensor) -> float:
    """What denoising costs in forward passes of the network, by floating-point operations, to a tenth."""
    with protected.guarded():
        one = flops_of(lambda: protected(image))
    return round(flops_of(lambda: denoiser(image.float())) / one, 1) if one else 0.0
