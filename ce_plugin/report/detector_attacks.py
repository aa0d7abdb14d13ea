"""Attacks that a detector is tried against, in the units of its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ce_plugin.errors import unknown_name
from ce_plugin.interventions.adversarial import Adversarial
from ce_plugin.report.findings import ATTACKS, share

if TYPE_CHECKING:
    from ce_plugin.detection import CausalEffectDetector

__all__ = ["DETECTOR_ATTACKS", "DetectorAttack", "attack_to_learn", "detector_attack", "rounded"]

DETECTOR_ATTACKS = (*ATTACKS, "adaptive")
"""Attacks that a detector can be tried against: those of a report, and the one that knows the detector."""

_ITERATIONS = 10
_PAIRS = 20


@dataclass(frozen=True)
class DetectorAttack:
    """An attack.

    Attributes:
        name: in tables ("pgd 0.1").
        words: its settings, for the reader.
        bound: largest change of a value, as a share of the range; None where values may change as they like.
        craft: images (N, C, H, W) in image units, the classes to leave (N,), and their ids -> attacked images.
    """

    name: str
    words: str
    bound: float | None
    craft: Callable[[Tensor, Tensor, Sequence[int]], Tensor] = field(repr=False)


def detector_attack(
    detector: CausalEffectDetector, name: str, eps: float, *, batch_size: int = 128, seed: int = 0
) -> DetectorAttack:
    """An attack on the classifier that a detector protects.

    Args:
        detector: fitted, where the attack is "adaptive": only that one knows it.
        name: out of :data:`DETECTOR_ATTACKS`.
        eps: largest change of a value, as a share of the range; JSMA sets pairs of values to the end of the range.
        batch_size: images that are attacked together.
        seed: of random starts.

    Raises:
        UnknownNameError: another attack.

    Example:
        >>> from ce_plugin.detection import CausalEffectDetector
        >>> detector = CausalEffectDetector(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
        >>> attack = detector_attack(detector, "pgd", 0.1)
        >>> attack.name, attack.words
        ('pgd 0.1', 'L-inf, eps 0.1 of the range, 10 steps')
    """
    if name not in DETECTOR_ATTACKS:
        raise unknown_name("attacks", name, DETECTOR_ATTACKS)
    if name == "adaptive":
        return _adaptive(detector, eps, batch_size, seed)
    attack = attack_to_learn(detector, name, eps, batch_size=batch_size)

    def craft(images: Tensor, classes: Tensor, ids: Sequence[int]) -> Tensor:
        like = detector.protected.like
        found: Tensor = attack.perturb(images.to(like), target=classes.to(like.device), ids=ids, seed=seed)
        return found

    if name == "jsma":
        return DetectorAttack(name, f"L0, at most {_PAIRS} pairs of values set to the end of the range", None, craft)
    words = f"L-inf, eps {_size(eps)} of the range" + (f", {_ITERATIONS} steps" if name != "fgsm" else "")
    return DetectorAttack(f"{name} {_size(eps)}", words, eps, craft)


def attack_to_learn(detector: CausalEffectDetector, name: str, eps: float, *, batch_size: int = 128) -> Adversarial:
    """One of the paper's attacks on the classifier that a detector protects, as an intervention.

    Args:
        detector: fitted or not.
        name: out of :data:`ATTACKS`.
        eps, batch_size: as for :func:`detector_attack`.

    Raises:
        UnknownNameError: another attack.

    Example:
        >>> from ce_plugin.detection import CausalEffectDetector
        >>> detector = CausalEffectDetector(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
        >>> attack_to_learn(detector, "fgsm", 8 / 255).perturb(torch.rand(2, 1, 2, 2)).shape
        torch.Size([2, 1, 2, 2])
    """
    clip = detector.protected.clip_values
    unit = clip[1] - clip[0]
    settings: dict[str, Any] = {"eps": unit, "max_iter": _PAIRS} if name == "jsma" else {"eps": eps * unit}
    if name in ("bim", "pgd"):
        settings["max_iter"] = _ITERATIONS
    return Adversarial.preset(name, detector.protected, clip_values=clip, batch_size=batch_size, **settings)


def _adaptive(detector: CausalEffectDetector, eps: float, batch_size: int, seed: int) -> DetectorAttack:
    """The attack that lowers the detector's score while it fools the classifier."""
    from ce_plugin.detection import AdaptiveEvasion
    from ce_plugin.networks.art import build_classifier

    protected, state = detector.protected, detector.learned()
    clip = protected.clip_values
    n_classes = protected.test_logits(state.shape).shape[1]
    classifier = build_classifier(protected, state.shape, n_classes, clip, protected.like.device)
    attack = AdaptiveEvasion(classifier, detector, eps=eps * (clip[1] - clip[0]), batch_size=batch_size, seed=seed)

    def craft(images: Tensor, classes: Tensor, ids: Sequence[int]) -> Tensor:
        found = attack.generate(images.float().cpu().numpy(), classes.cpu().numpy(), ids=ids)
        return torch.from_numpy(found)

    runs = f"{len(attack.losses)} losses x {attack.restarts} restarts x {attack.steps} steps"
    words = f"L-inf, eps {_size(eps)} of the range, knows network and detector, {runs}"
    return DetectorAttack(f"adaptive {_size(eps)}", words, eps, craft)


def rounded(moved: Tensor, clean: Tensor, bound: float | None, clip_values: tuple[float, float]) -> Tensor:
    """What a file of eight bits would hold of attacked images, inside the attack's bound.

    Args:
        moved: attacked images, (N, C, H, W), image units.
        clean: those that were attacked.
        bound: largest change, as a share of the range; 0.1 is 25 of 255 levels, the nearest would step over it.
        clip_values: least and greatest value of an image.

    Example:
        >>> rounded(torch.tensor([0.3]), torch.tensor([0.2]), 0.1, (0.0, 1.0)).mul(255).round().tolist()
        [76.0]
    """
    low, high = clip_values
    unit = high - low
    levels = ((moved.detach().to(clean) - low) / unit * 255).round().clamp(0, 255)
    if bound is not None:
        original, step = (clean - low) / unit * 255, int(bound * 255 + 1e-6)
        levels = torch.minimum(torch.maximum(levels, original.round() - step), original.round() + step)
    return levels / 255 * unit + low


def _size(eps: float) -> str:
    """In levels of a file where they are few, as for photographs."""
    return share(eps) if eps * 255 < 20 else f"{eps:.3g}"
