"""From the user's images to what a detector has learned: who is held out, who is attacked, and is it enough?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ce_plugin.detection.benign import Benign
from ce_plugin.detection.classifier import Protected
from ce_plugin.detection.fitted import Fitted, learn
from ce_plugin.detection.measuring import digests, measured
from ce_plugin.detection.signature import Signature
from ce_plugin.errors import InputError, expected
from ce_plugin.interventions import Adversarial
from ce_plugin.randomness import derived_seed

__all__ = ["Recipe", "attacked", "check_enough", "fit_to", "held_out"]

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


def attacked(protected: Protected, attacks: Sequence[Any], images: Tensor, batch_size: int) -> Tensor:
    """The images after each attack, those that the attack turned over: (M, C, H, W), in 256 levels.

    Args:
        protected: the classifier.
        attacks: names of presets ("fgsm", "bim", "pgd", "jsma"), :class:`Adversarial` interventions, or attacks of ART.
        images: clean ones.
        batch_size: images at a time.

    Raises:
        UnknownNameError: a preset of another name.
        InputError: no attack turned any image over.
    """
    made = [_adversarial(protected, one, batch_size) for one in attacks]
    names = digests(images)
    # In an order of their own: an attack may draw random numbers for one image after the other.
    images = images[sorted(range(len(names)), key=names.__getitem__)]
    with protected.guarded(), torch.no_grad():
        before = torch.cat([protected(part).argmax(1) for part in torch.split(images, batch_size)])
    successes = []
    low, high = protected.clip_values
    for attack in made:
        moved = attack.perturb(images, target=before).detach().clamp(low, high)
        moved = ((moved - low) / (high - low) * 255).round() / 255 * (high - low) + low
        with protected.guarded(), torch.no_grad():
            after = torch.cat([protected(part).argmax(1) for part in torch.split(moved, batch_size)])
        successes.append(moved[after != before])
    found = torch.cat(successes)
    if not len(found):
        todo = "Take a stronger attack, or a larger eps."
        raise InputError(expected("attacks", "attacks that turn some image over", f"none of {len(images)}", todo))
    return found


def _adversarial(protected: Protected, attack: Any, batch_size: int) -> Adversarial:
    if isinstance(attack, Adversarial):
        return attack
    if isinstance(attack, str) and attack in _PRESETS:
        preset = getattr(Adversarial, attack)
        made: Adversarial = preset(protected, clip_values=protected.clip_values, batch_size=batch_size)
        return made
    if isinstance(attack, str):
        return Adversarial(attack, model=protected, clip_values=protected.clip_values, batch_size=batch_size)
    return Adversarial(attack, batch_size=batch_size)


def fit_to(protected: Protected, recipe: Recipe, clean: Tensor) -> tuple[Signature, Fitted]:
    """Learn from clean images.

    Returns:
        The signature with what its groups have learned, and what its effects are like.
    """
    names = digests(clean)
    # In an order of their own, so that folds and batches are the same in whatever order the images came.
    order = sorted(range(len(names)), key=names.__getitem__)
    clean, names = clean[order], [names[i] for i in order]
    signature = recipe.signature.prepared(protected, clean, n_epochs=recipe.n_epochs, seed=recipe.seed)
    sample = measured(protected, signature, clean, batch_size=recipe.batch_size, seed=recipe.seed, ids=names)
    altered = None
    if recipe.benign is not None:
        benign = recipe.benign

        def alter(batch: Tensor, ids: list[int]) -> Tensor:
            return benign(batch, ids, recipe.seed)

        altered = measured(
            protected, signature, clean, batch_size=recipe.batch_size, seed=recipe.seed, altered=alter, ids=names
        )
    return signature, learn(sample, altered, how=recipe.aggregate, seed=recipe.seed, leading=signature.leading)


def check_enough(protected: Protected, clean: Tensor, kept: Tensor, batch_size: int) -> None:
    """Whether clean images are enough to fit to and to calibrate on.

    Args:
        protected: the classifier.
        clean: clean images, (N, C, H, W).
        kept: which of them are held out for calibration, (N,), bool.
        batch_size: images at a time.

    Raises:
        InputError: too few clean images, or all of one predicted class.
    """
    with protected.guarded(), torch.no_grad():
        predicted = torch.cat([protected(part).argmax(1) for part in torch.split(clean, batch_size)])
    counts = Counter(predicted.tolist())
    shown = ", ".join(f"{n} of class {k}" for k, n in sorted(counts.items())[:12]) + " ..." * (len(counts) > 12)
    n_kept = int(kept.sum())
    n_fit = len(kept) - n_kept
    if n_fit < LEAST_FIT or n_kept < LEAST_CALIBRATION:
        wanted = f"clean images, {LEAST_FIT} or more to fit to and {LEAST_CALIBRATION} or more to calibrate on"
        todo = "About 50 of each predicted class are good; classes with fewer than 20 lean on the others."
        raise InputError(expected("x", wanted, f"{n_fit} and {n_kept} ({shown})", todo))
    if len(counts) < 2:
        todo = "Pass images of all classes; about 50 of each are good."
        raise InputError(expected("x", "clean images of two predicted classes or more", shown, todo))
