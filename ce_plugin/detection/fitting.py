"""Fitting a detector: splitting the user's images, running attacks on them, and the fitted state."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ce_plugin.detection.augmentation import Augmentation
from ce_plugin.detection.calibration import Calibration
from ce_plugin.detection.checkpoint import Checkpoint, shards
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.denoiser import STEP
from ce_plugin.detection.probes import View
from ce_plugin.detection.scorers import FittedModule, Sample, Scorer
from ce_plugin.detection.signature import Signature, digests
from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.interventions import Adversarial
from ce_plugin.interventions.crafting import PRESETS
from ce_plugin.networks.art import attack_class, is_art_attack
from ce_plugin.randomness import derived_seed

# With fewer, medians and covariances are noise; with 19 the smallest false-alarm rate is 5 %.
LEAST_FIT = 50
LEAST_CALIBRATION = 19


@dataclass(frozen=True)
class FitConfig:
    """How a detector is fitted.

    Args:
        signature: what is measured.
        augmentation: harmless alterations that are no reason for an alarm; None: clean images only.
        aggregate: how deviations become one score.
        seed: of everything random.
        batch_size: images at a time, on which the result does not depend.
        n_epochs: of what probes train.
    """

    signature: Signature
    augmentation: Augmentation | None
    aggregate: str
    seed: int
    batch_size: int = field(compare=False)
    n_epochs: int

    def settings(self, classifier: ClassifierWrapper, split: Split, attacks: Sequence[Adversarial]) -> dict[str, Any]:
        """What an interrupted fit must share with the one that goes on."""
        attacked = [] if split.attacked is None else digests(split.attacked)
        images = repr((split.hashes, attacked)).encode()
        return {
            "purpose": "fit",
            "network": classifier.fingerprint(),
            "images": hashlib.blake2b(images, digest_size=16).hexdigest(),
            "clip_values": classifier.clip_values,
            "normalization": repr(classifier.normalization),
            "signature": repr(self.signature),
            "augmentation": repr(self.augmentation),
            "aggregate": self.aggregate,
            "attacks": list(map(repr, attacks)),
            "holdout": split.holdout,
            "seed": int(self.seed),
            "batch_size": self.batch_size,
            "nb_epochs": self.n_epochs,
        }

    def check(self, clip_values: tuple[float, float]) -> None:
        """Whether what alters images was made for images in this range of values.

        Raises:
            ArgumentError: a probe's interventions, or the augmentation, were made for another one.
        """
        made_for = [("signature", values) for probe in self.signature.probes for values in probe.ranges()]
        if self.augmentation is not None:
            made_for.append(("augmentation", self.augmentation.value_range))
        for name, values in made_for:
            if tuple(values) != clip_values:
                hint = "Pass its `value_range=`, and sizes in the same units; or leave it out for the default."
                raise ArgumentError(expected(name, f"made for the clip values, {clip_values}", tuple(values), hint))


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
class Split:
    """The user's images: clean ones to fit to, clean ones held out, and attacked ones.

    Args:
        clean: (N, C, H, W).
        attacked: the attacked examples to learn from, (M, C, H, W), or None.
        hashes: of the clean images.
        held_out: which clean images are kept for calibration, (N,), bool.
        holdout: their share.
    """

    clean: Tensor = field(repr=False)
    attacked: Tensor | None = field(repr=False)
    hashes: tuple[int, ...] = field(repr=False)
    held_out: Tensor = field(repr=False)
    holdout: float

    @classmethod
    def of(cls, images: Tensor, y: npt.ArrayLike | None, holdout: float, seed: int) -> Split:
        """Sort images by their labels and hold some out: by the images themselves, not by their order.

        An attacked image whose nearest clean one is held out is left out, unless there are no others: the threshold
        must come from images that did not influence the fit, not even through their attacked versions.

        Raises:
            InputError: labels that cannot be used, or without a clean image.
        """
        adversarial = torch.as_tensor(adversarial_labels(y, len(images)))
        if bool(adversarial.all()):
            hint = "The detector learns what clean images are like; adversarial ones are optional."
            raise InputError(expected("y", "labels with clean images (0) among them", "adversarial ones only", hint))
        clean, attacked = images[~adversarial], images[adversarial]
        hashes = digests(clean)
        # Equal images stay on one side.
        distinct = sorted(set(hashes), key=functools.partial(derived_seed, seed, "hold out"))
        kept = set(distinct[: round(holdout * len(distinct))])
        held_out = torch.tensor(list(map(kept.__contains__, hashes)))
        if len(attacked):
            free = ~held_out[_nearest(attacked, clean)]
            attacked = attacked[free] if bool(free.any()) else attacked
        return cls(clean, attacked if len(attacked) else None, tuple(hashes), held_out, holdout)

    @property
    def to_fit(self) -> Tensor:
        """The clean images that are not held out, in an order that does not depend on the user's."""
        rows: list[int] = (~self.held_out).nonzero().squeeze(1).tolist()
        return self.clean[sorted(rows, key=self.hashes.__getitem__)]

    def check(self, classifier: ClassifierWrapper, batch_size: int) -> None:
        """Whether there are enough clean images to fit to and to calibrate on.

        Raises:
            InputError: too few clean images, or all of one predicted class.
        """
        counts = Counter(classifier.predict(self.clean, batch_size).tolist())
        n_held_out = int(self.held_out.sum())
        n_fit = len(self.held_out) - n_held_out
        if n_fit < LEAST_FIT or n_held_out < LEAST_CALIBRATION:
            wanted = f"clean images, {LEAST_FIT} or more to fit to and {LEAST_CALIBRATION} or more to calibrate on"
            hint = "About 50 of each predicted class are good; classes with fewer than 20 lean on the others."
            raise InputError(expected("x", wanted, f"{n_fit} and {n_held_out} ({_listed(counts)})", hint))
        if len(counts) < 2:
            hint = "Pass images of all classes; about 50 of each are good."
            raise InputError(expected("x", "clean images of two predicted classes or more", _listed(counts), hint))


def _listed(counts: Counter[int]) -> str:
    """How many images there are of each class, in words."""
    some = sorted(counts.items())[:12]
    return ", ".join(f"{n} of class {k}" for k, n in some) + " ..." * (len(counts) > 12)


def _nearest(images: Tensor, clean: Tensor) -> Tensor:
    """Index of the nearest clean image, Euclidean, (M,)."""
    among = clean.flatten(1).float()
    parts = [torch.cdist(part.flatten(1).float(), among).argmin(1) for part in torch.split(images, 256)]
    return torch.cat(parts).cpu()


def _in_own_order(images: Tensor) -> Tensor:
    """Images sorted by their hashes, so that folds, batches and random draws do not depend on the user's order."""
    hashes = digests(images)
    return images[sorted(range(len(hashes)), key=hashes.__getitem__)]


def check_attack(attack: object) -> None:
    """Whether this is an attack, or the name of one.

    Raises:
        UnknownNameError: no attack has this name.
        ArgumentError: neither.
    """
    if isinstance(attack, str):
        if attack not in PRESETS:
            attack_class(attack, list(PRESETS))
    elif not isinstance(attack, Adversarial) and not is_art_attack(attack):
        wanted = "a list of names, Adversarial interventions or attacks of ART"
        raise ArgumentError(expected("attacks", wanted, f"{type(attack).__name__} in it"))


def attacks_on(classifier: ClassifierWrapper, attacks: Sequence[Any], batch_size: int) -> list[Adversarial]:
    """Attacks on a classifier, made before any work.

    Args:
        classifier: the classifier.
        attacks: names of presets ("fgsm", "bim", "pgd", "jsma") or of attacks of ART, :class:`Adversarial`
            interventions, or attacks of ART. A preset's size is 0.3 of the range of the clip values.
        batch_size: images at a time.

    Raises:
        UnknownNameError: no attack has this name.
        AttackError: one cannot be built.
    """
    options: dict[str, Any] = {"clip_values": classifier.clip_values, "batch_size": batch_size}
    made = []
    for one in attacks:
        if isinstance(one, Adversarial):
            made.append(one)
        elif isinstance(one, str):
            made.append(Adversarial(one, model=classifier, **options))
        else:
            made.append(Adversarial(one, batch_size=batch_size))
    return made


def attacked_versions(
    classifier: ClassifierWrapper,
    attack: Adversarial,
    images: Tensor,
    batch_size: int,
    checkpoint: Checkpoint | None = None,
    name: str = "attack",
) -> Tensor:
    """The images after an attack, those whose answer it changed: (M, C, H, W), in 256 levels.

    Args:
        classifier: the classifier.
        attack: the attack.
        images: clean ones, see :attr:`Split.to_fit`.
        batch_size: images at a time.
        checkpoint: where the attacked images are saved, or read.
        name: of the attack in it.
    """
    before = classifier.predict(images, batch_size)
    low, high = classifier.clip_values
    saved, parts = checkpoint or Checkpoint(), []
    for rows in shards(len(images), math.lcm(batch_size, attack.batch_size)):
        perturb = functools.partial(attack.perturb, images[rows], target=before[rows])
        moved = saved.tensor(f"{name} {rows.start}", perturb).to(images).clamp(low, high)
        moved = ((moved - low) / (high - low) * 255).round() / 255 * (high - low) + low
        parts.append(moved[classifier.predict(moved, batch_size) != before[rows]])
        saved.tick(name, -(-(rows.stop - rows.start) // STEP))
    return torch.cat(parts)


class State(FittedModule):
    """The fitted state of a detector; its state dict holds all tensors.

    Args:
        signature: what is measured, its probes fitted.
        scorer: how unusual that is.
        columns: what each column of the deviations is, but for known attacks.
        shape: of an image, (C, H, W).
        seen: hashes of the images that it was fitted on.
        fingerprint: of the network.
        seed: of interventions that draw random numbers.

    Attributes:
        held_out: deviations of the images that calibrate it, (n, D).
        features: of the same images, (n, P).
        calibration: their scores.
    """

    held_out: Tensor
    features: Tensor
    calibration: Calibration
    fitted = ("held_out", "features")

    def __init__(
        self,
        signature: Signature,
        scorer: Scorer,
        *,
        columns: Sequence[str],
        shape: tuple[int, ...],
        seen: frozenset[int],
        fingerprint: str,
        seed: int,
    ) -> None:
        super().__init__()
        self.signature, self.scorer, self.columns = signature, scorer, list(columns)
        self.shape, self.seen, self.fingerprint, self.seed = shape, seen, fingerprint, seed
        self.probes = nn.ModuleList(signature.probes)
        self.eval()

    def calibrate(self, deviations: Tensor, features: Tensor) -> State:
        """Calibrate it on these images."""
        self.held_out, self.features = deviations, features
        self.calibration = Calibration(self.scorer.score(deviations).numpy())
        return self

    def measure(
        self,
        classifier: ClassifierWrapper,
        images: Tensor,
        batch_size: int,
        checkpoint: Checkpoint | None = None,
        name: str = "images",
    ) -> Sample:
        """The responses of all probes to images."""
        return self.signature.measure(
            classifier, images, batch_size=batch_size, seed=self.seed, checkpoint=checkpoint, name=name
        )

    def by_column(self, deviations: Tensor) -> dict[str, npt.NDArray[np.float64]]:
        """Deviations (N, D) by the names of their columns."""
        names = self.columns + ["known attacks"] * (self.scorer.attacks is not None)
        return dict(zip(names, deviations.numpy().T, strict=True))

    def score_tensor(self, classifier: ClassifierWrapper, images: Tensor) -> Tensor:
        """Scores (N,) with a gradient.

        Raises:
            ArgumentError: a probe of the signature has none.
        """
        if not self.signature.differentiable:
            names = [probe.name for probe in self.signature.probes if not probe.differentiable]
            raise ArgumentError(expected("signature", "probes that have a gradient", f"{names}, which have none"))
        with classifier.guarded():
            sample = self.signature.respond(View(classifier, images, digests(images), self.seed))
            return self.scorer.score(self.scorer.deviations(sample)).to(images.dtype).to(images.device)

    def with_attacks(
        self, classifier: ClassifierWrapper, images: Tensor, batch_size: int, checkpoint: Checkpoint | None = None
    ) -> State:
        """A copy that has learned from these attacked images."""
        again = copy.deepcopy(self)
        sample = self.measure(classifier, _in_own_order(images), batch_size, checkpoint, "attacked images")
        again.scorer = self.scorer.with_attacks(sample, self.seed)
        return again.calibrate(again.scorer.with_likeness(self.held_out, self.features), self.features)

    def recalibrated(self, classifier: ClassifierWrapper, images: Tensor, batch_size: int) -> State:
        """A copy that is calibrated on other images.

        Raises:
            InputError: an image is among those that the detector was fitted on.
        """
        again = sum(map(self.seen.__contains__, digests(images)))
        if again:
            hint = "On its own images every distance is too small, and the threshold would be, too."
            raise InputError(expected("x", "images that the detector was not fitted on", f"{again} that it was", hint))
        sample = self.measure(classifier, images, batch_size)
        deviations = self.scorer.deviations(sample)
        return copy.deepcopy(self).calibrate(deviations, sample.features())


class Fitter:
    """Fits states, and remembers the last one.

    Fitting again to the same clean images with other attacked ones beside them, as comparisons of attacks do, then
    takes no time.
    """

    def __init__(self) -> None:
        self._last: tuple[object, State] | None = None

    def fit(
        self, classifier: ClassifierWrapper, config: FitConfig, split: Split, checkpoint: Checkpoint | None = None
    ) -> State:
        """The state fitted to the clean images of a split; its attacked ones are not used."""
        fingerprint = classifier.fingerprint()
        key = (config, split.holdout, sorted(split.hashes), fingerprint)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        clean, size, seed = split.to_fit, config.batch_size, config.seed
        signature = config.signature.fit(classifier, clean, n_epochs=config.n_epochs, seed=seed, checkpoint=checkpoint)
        measure = functools.partial(
            signature.measure, classifier, clean, batch_size=size, seed=seed, checkpoint=checkpoint
        )
        sample, altered = measure(name="clean images"), None
        if config.augmentation is not None:
            altered = measure(augmentation=config.augmentation, name="altered images")
        scorer = Scorer(config.aggregate).fit(sample, altered, seed=seed, leading=signature.leading)
        state = State(
            signature,
            scorer,
            columns=signature.columns(sample),
            shape=tuple(split.clean.shape[1:]),
            seen=frozenset(itertools.compress(split.hashes, ~split.held_out)),
            fingerprint=fingerprint,
            seed=seed,
        )
        held_out = state.measure(classifier, split.clean[split.held_out], size, checkpoint, "images held out")
        # A copy, for the user may go on to change a probe.
        self._last = (copy.deepcopy(key), state.calibrate(scorer.deviations(held_out), held_out.features()))
        return state
