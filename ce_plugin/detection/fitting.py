"""From the user's images to what a detector has learned: who is held out, who is attacked, and is it enough?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ce_plugin.detection.benign import Benign
from ce_plugin.detection.calibration import Calibration
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.probes import View
from ce_plugin.detection.scorers import Fitted, Sample, learn
from ce_plugin.detection.signature import Signature, digests, measured
from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.interventions import Adversarial
from ce_plugin.randomness import derived_seed

__all__ = [
    "Learner",
    "Lesson",
    "Recipe",
    "State",
    "adversarial_labels",
    "attacked",
    "check_enough",
    "fit_to",
    "held_out",
]


# With fewer, medians and covariances are noise; with 19 the smallest false-alarm rate is 5 %.
LEAST_FIT = 50
LEAST_CALIBRATION = 19
_PRESETS = ("fgsm", "bim", "pgd", "jsma")


@dataclass(frozen=True)
class Recipe:
    """How a detector is fitted.

    Args:
        signature: what is measured.
        benign: harmless alterations that are no reason for an alarm; None: clean images only.
        aggregate: how groups become one score.
        seed: of everything random.
        batch_size: images at a time.
        n_epochs: of what groups train.
    """

    signature: Signature
    benign: Benign | None
    aggregate: str
    seed: int
    batch_size: int
    n_epochs: int


def held_out(names: Sequence[int], share: float, seed: int) -> Tensor:
    """Which images are kept for calibration, (N,), bool: by the images themselves, not by their order.

    Equal images stay on one side.
    """
    distinct = sorted(set(names), key=lambda name: derived_seed(seed, "hold out", name))
    kept = set(distinct[: round(share * len(distinct))])
    return torch.tensor([name in kept for name in names])


def attacked(classifier: ClassifierWrapper, attacks: Sequence[Any], images: Tensor, batch_size: int) -> Tensor:
    """The images after each attack, those that the attack turned over: (M, C, H, W), in 256 levels.

    Args:
        classifier: the classifier.
        attacks: names of presets ("fgsm", "bim", "pgd", "jsma"), :class:`Adversarial` interventions, or attacks of ART.
        images: clean ones.
        batch_size: images at a time.

    Raises:
        UnknownNameError: a preset of another name.
        InputError: no attack turned any image over.
    """
    made = [_adversarial(classifier, one, batch_size) for one in attacks]
    names = digests(images)
    # In an order of their own: an attack may draw random numbers for one image after the other.
    images = images[sorted(range(len(names)), key=names.__getitem__)]
    with classifier.guarded(), torch.no_grad():
        before = torch.cat([classifier(part).argmax(1) for part in torch.split(images, batch_size)])
    successes = []
    low, high = classifier.clip_values
    for attack in made:
        moved = attack.perturb(images, target=before).detach().clamp(low, high)
        moved = ((moved - low) / (high - low) * 255).round() / 255 * (high - low) + low
        with classifier.guarded(), torch.no_grad():
            after = torch.cat([classifier(part).argmax(1) for part in torch.split(moved, batch_size)])
        successes.append(moved[after != before])
    found = torch.cat(successes)
    if not len(found):
        hint = "Take a stronger attack, or a larger eps."
        raise InputError(expected("attacks", "attacks that turn some image over", f"none of {len(images)}", hint))
    return found


def _adversarial(classifier: ClassifierWrapper, attack: Any, batch_size: int) -> Adversarial:
    if isinstance(attack, Adversarial):
        return attack
    if isinstance(attack, str) and attack in _PRESETS:
        preset = getattr(Adversarial, attack)
        made: Adversarial = preset(classifier, clip_values=classifier.clip_values, batch_size=batch_size)
        return made
    if isinstance(attack, str):
        return Adversarial(attack, model=classifier, clip_values=classifier.clip_values, batch_size=batch_size)
    return Adversarial(attack, batch_size=batch_size)


def fit_to(classifier: ClassifierWrapper, recipe: Recipe, clean: Tensor) -> tuple[Signature, Fitted]:
    """Learn from clean images.

    Returns:
        The signature with what its groups have learned, and what its effects are like.
    """
    names = digests(clean)
    # In an order of their own, so that folds and batches are the same in whatever order the images came.
    order = sorted(range(len(names)), key=names.__getitem__)
    clean, names = clean[order], [names[i] for i in order]
    signature = recipe.signature.prepared(classifier, clean, n_epochs=recipe.n_epochs, seed=recipe.seed)
    sample = measured(classifier, signature, clean, batch_size=recipe.batch_size, seed=recipe.seed, ids=names)
    altered = None
    if recipe.benign is not None:
        benign = recipe.benign

        def alter(batch: Tensor, ids: list[int]) -> Tensor:
            return benign(batch, ids, recipe.seed)

        altered = measured(
            classifier, signature, clean, batch_size=recipe.batch_size, seed=recipe.seed, altered=alter, ids=names
        )
    return signature, learn(sample, altered, how=recipe.aggregate, seed=recipe.seed, leading=signature.leading)


def check_enough(classifier: ClassifierWrapper, clean: Tensor, kept: Tensor, batch_size: int) -> None:
    """Whether clean images are enough to fit to and to calibrate on.

    Args:
        classifier: the classifier.
        clean: clean images, (N, C, H, W).
        kept: which of them are held out for calibration, (N,), bool.
        batch_size: images at a time.

    Raises:
        InputError: too few clean images, or all of one predicted class.
    """
    with classifier.guarded(), torch.no_grad():
        predicted = torch.cat([classifier(part).argmax(1) for part in torch.split(clean, batch_size)])
    counts = Counter(predicted.tolist())
    shown = ", ".join(f"{n} of class {k}" for k, n in sorted(counts.items())[:12]) + " ..." * (len(counts) > 12)
    n_kept = int(kept.sum())
    n_fit = len(kept) - n_kept
    if n_fit < LEAST_FIT or n_kept < LEAST_CALIBRATION:
        wanted = f"clean images, {LEAST_FIT} or more to fit to and {LEAST_CALIBRATION} or more to calibrate on"
        hint = "About 50 of each predicted class are good; classes with fewer than 20 lean on the others."
        raise InputError(expected("x", wanted, f"{n_fit} and {n_kept} ({shown})", hint))
    if len(counts) < 2:
        hint = "Pass images of all classes; about 50 of each are good."
        raise InputError(expected("x", "clean images of two predicted classes or more", shown, hint))


_FORMS = "None, or labels 0 (clean) and 1 (adversarial): (N,), (N, 1), or one-hot (N, 2)"


def adversarial_labels(y: npt.ArrayLike | None, n_images: int) -> npt.NDArray[np.bool_]:
    """Which images are adversarial.

    Args:
        y: None (all are clean), 0 / 1 of shape (N,) or (N, 1), or one-hot (N, 2): [1, 0] clean, [0, 1] adversarial.
        n_images: N.

    Returns:
        (N,), bool.

    Raises:
        InputError: another form, mixed forms, or not one label per image.

    Example:
        >>> adversarial_labels([[1, 0], [0, 1]], 2).tolist() == adversarial_labels([0, 1], 2).tolist() == [False, True]
        True
        >>> adversarial_labels([3, 7], 2)
        Traceback (most recent call last):
        ...
        ce_plugin.errors.InputError: Expected argument `y` to be None, or labels 0 (clean) and 1 (adversarial): (N,),
        (N, 1), or one-hot (N, 2), but got values 3 and 7. Classes of the images are not wanted here.
    """
    if y is None:
        return np.zeros(n_images, dtype=bool)
    try:
        labels = np.asarray(y, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(expected("y", _FORMS, "labels of mixed form", "Write all of them in one form.")) from error
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or (labels.ndim == 2 and labels.shape[1] != 2):
        hint = "Classes of the images are not wanted here."
        raise InputError(expected("y", _FORMS, f"shape {labels.shape}", hint))
    if len(labels) != n_images:
        raise InputError(expected("y", f"one label for each of the {n_images} images", f"{len(labels)} labels"))
    odd = np.setdiff1d(labels, [0.0, 1.0])
    if odd.size:
        got = "values " + " and ".join(f"{value:g}" for value in odd[:2])
        raise InputError(expected("y", _FORMS, got, "Classes of the images are not wanted here."))
    if labels.ndim == 2 and not (labels.sum(1) == 1).all():
        got = f"{int((labels.sum(1) != 1).sum())} rows that do not have exactly one 1"
        raise InputError(expected("y", _FORMS, got))
    adversarial: npt.NDArray[np.bool_] = (labels if labels.ndim == 1 else labels[:, 1]) == 1
    return adversarial


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

    def deviations(self, classifier: ClassifierWrapper, images: Tensor, batch_size: int) -> Tensor:
        """Every verdict on images, centred and scaled on clean ones, (N, D)."""
        return self.fitted.deviations(self.measured(classifier, images, batch_size))

    def taught(self, classifier: ClassifierWrapper, images: Tensor, batch_size: int) -> State:
        """The same, having been shown these attacked images."""
        names = digests(images)
        # In an order of their own: training takes them in the order of their places.
        order = sorted(range(len(names)), key=names.__getitem__)
        fitted = self.fitted.taught(self.measured(classifier, images[order], batch_size), self.seed)
        return replace(self, fitted=fitted, held=fitted.with_likeness(self.held, self.traits))

    def checked(self, classifier: ClassifierWrapper, x: object) -> Tensor:
        """The user's images, of the shape that the detector was fitted on."""
        images = classifier.images(x)
        if tuple(images.shape[1:]) != self.shape:
            raise InputError(expected("x", f"images of shape {self.shape}", f"shape {tuple(images.shape[1:])}"))
        return images

    def measured(self, classifier: ClassifierWrapper, images: Tensor, batch_size: int) -> Sample:
        """What the signature finds in images."""
        return measured(classifier, self.signature, images, batch_size=batch_size, seed=self.seed)

    def scores(self, classifier: ClassifierWrapper, images: Tensor, batch_size: int) -> npt.NDArray[np.float64]:
        """Scores (N,) of images."""
        scores: npt.NDArray[np.float64] = self.fitted.score(self.deviations(classifier, images, batch_size)).numpy()
        return scores

    def score_tensor(self, classifier: ClassifierWrapper, images: Tensor) -> Tensor:
        """Scores (N,) with a gradient.

        Raises:
            ArgumentError: a group of the signature has none.
        """
        if not self.signature.differentiable:
            names = [group.name for group in self.signature.groups if not group.differentiable]
            raise ArgumentError(expected("signature", "groups that have a gradient", f"{names}, which have none"))
        with classifier.guarded():
            view = View(classifier, images, digests(images), self.seed)
            sample = Sample(self.signature.measure(view), view.logits)
            fitted = self.fitted.to(images.device)
            return fitted.score(fitted.deviations(sample)).to(images.dtype)

    def recalibrated(self, classifier: ClassifierWrapper, images: Tensor, batch_size: int) -> State:
        """The same, calibrated on other images.

        Raises:
            InputError: an image is among those that the detector was fitted on.
        """
        again = sum(name in self.seen for name in digests(images))
        if again:
            hint = "On its own images every distance is too small, and the threshold would be, too."
            raise InputError(expected("x", "images that the detector was not fitted on", f"{again} that it was", hint))
        sample = self.measured(classifier, images, batch_size)
        return replace(self, held=self.fitted.deviations(sample), traits=sample.traits())

    def groups(self, deviations: Tensor) -> dict[str, npt.NDArray[np.float64]]:
        """The columns of the verdicts (N, D) by name."""
        names: Sequence[str] = self.signature.verdicts(self.fitted)
        return {name: deviations[:, i].numpy() for i, name in enumerate(names)}


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
            hint = "The detector learns what clean images are like; adversarial ones are optional."
            raise InputError(expected("y", "labels with clean images (0) among them", "adversarial ones only", hint))
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

    def learn(self, classifier: ClassifierWrapper, recipe: Recipe, lesson: Lesson) -> State:
        """What the lesson's clean images teach; its adversarial ones are left aside."""
        fingerprint = classifier.fingerprint()
        key = (repr(replace(recipe, batch_size=1)), lesson.holdout, tuple(sorted(lesson.names)), fingerprint)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        signature, fitted = fit_to(classifier, recipe, lesson.fitted)
        held = measured(
            classifier, signature, lesson.clean[lesson.kept], batch_size=recipe.batch_size, seed=recipe.seed
        )
        seen = frozenset(name for name, keep in zip(lesson.names, lesson.kept.tolist(), strict=True) if not keep)
        shape = tuple(lesson.clean.shape[1:])
        deviations, traits = fitted.deviations(held), held.traits()
        state = State(fitted, signature, deviations, traits, shape, seen, fingerprint, recipe.seed)
        self._last = (key, state)
        return state
