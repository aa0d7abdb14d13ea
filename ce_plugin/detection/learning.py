"""What a detector learns from, and what it has learned last."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy.typing as npt
import torch
from torch import Tensor

from ce_plugin.detection.classifier import Protected
from ce_plugin.detection.fitting import Recipe, fit_to, held_out
from ce_plugin.detection.labels import adversarial_labels
from ce_plugin.detection.measuring import digests, measured
from ce_plugin.detection.state import State
from ce_plugin.errors import InputError, expected

__all__ = ["Learner", "Lesson"]

_TOGETHER = 256


@dataclass(frozen=True)
class Lesson:
    """The user's images, sorted.

    Args:
        clean: (N, C, H, W).
        adversarial: those that may teach, (M, C, H, W), or None.
        names: digests of the clean ones.
        kept: which clean ones are held out to calibrate, (N,), bool.
        holdout: their share.
    """

    clean: Tensor = field(repr=False)
    adversarial: Tensor | None = field(repr=False)
    names: tuple[int, ...] = field(repr=False)
    kept: Tensor = field(repr=False)
    holdout: float

    @classmethod
    def of(cls, images: Tensor, y: npt.ArrayLike | None, holdout: float, seed: int) -> Lesson:
        """Sort images by their labels and hold some out.

        An adversarial image whose nearest clean one is held out does not teach, unless there are no others: a threshold
        is to come from images of which nothing was learned, not even that what is nearly the same is an attack.

        Raises:
            InputError: labels that cannot be used, or without a clean image.
        """
        adversarial = torch.as_tensor(adversarial_labels(y, len(images)))
        if bool(adversarial.all()):
            todo = "The detector learns what clean images are like; adversarial ones are optional."
            raise InputError(expected("y", "labels with clean images (0) among them", "adversarial ones only", todo))
        clean = images[~adversarial]
        names = digests(clean)
        kept = held_out(names, holdout, seed)
        taught = images[adversarial]
        free = ~kept[_nearest(taught, clean)]
        taught = taught[free] if bool(free.any()) else taught
        return cls(clean, taught if len(taught) else None, tuple(names), kept, holdout)

    @property
    def fitted(self) -> Tensor:
        """The clean images that are not held out."""
        return self.clean[~self.kept]


def _nearest(images: Tensor, clean: Tensor) -> Tensor:
    """Place of the nearest clean image, Euclidean, (M,)."""
    among = clean.flatten(1).float()
    parts = [torch.cdist(part.flatten(1).float(), among).argmin(1) for part in torch.split(images, _TOGETHER)]
    return torch.cat(parts).cpu()


class Learner:
    """Learns from clean images, and remembers the last lesson.

    Fitting again to the same clean images with other attacked ones beside them, as comparisons of attacks do, then
    takes no time.
    """

    def __init__(self) -> None:
        self._last: tuple[object, State] | None = None

    def learn(self, protected: Protected, recipe: Recipe, lesson: Lesson) -> State:
        """What the lesson's clean images teach; its adversarial ones are left aside."""
        fingerprint = protected.fingerprint()
        key = (repr(replace(recipe, batch_size=1)), lesson.holdout, tuple(sorted(lesson.names)), fingerprint)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        signature, fitted = fit_to(protected, recipe, lesson.fitted)
        held = measured(protected, signature, lesson.clean[lesson.kept], batch_size=recipe.batch_size, seed=recipe.seed)
        seen = frozenset(name for name, keep in zip(lesson.names, lesson.kept.tolist(), strict=True) if not keep)
        shape = tuple(lesson.clean.shape[1:])
        deviations, traits = fitted.deviations(held), held.traits()
        state = State(fitted, signature, deviations, traits, shape, seen, fingerprint, recipe.seed)
        self._last = (key, state)
        return state
