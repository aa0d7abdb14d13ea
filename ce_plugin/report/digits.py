"""The detector of the demo: handwritten digits, a network trained in seconds, the paper's four attacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ce_plugin.datasets import digits
from ce_plugin.models import DigitsCNN
from ce_plugin.randomness import generator
from ce_plugin.report.detection import try_detector
from ce_plugin.report.detector_attacks import detector_attack
from ce_plugin.report.detector_findings import DetectorTrial
from ce_plugin.report.findings import ATTACKS

if TYPE_CHECKING:
    from ce_plugin.detection import CausalEffectDetector

__all__ = ["digits_trial"]

# Eight pixels a side leave a filter nothing to smooth.
_SIZE = 16
# The paper's, section 4.
_EPS = 0.3


def digits_trial(
    *,
    seed: int = 0,
    n_train: int = 700,
    n_fit: int = 700,
    n_test: int = 150,
    steps: int = 120,
    progress: Callable[[str], None] | None = None,
) -> DetectorTrial:
    """Train a network on handwritten digits, fit a detector on other, clean ones, and try both on a third part.

    Args:
        seed: of everything random, which digit goes where included.
        n_train: digits that train the network.
        n_fit: digits that the detector is fitted and calibrated on.
        n_test: digits that are attacked; the three parts are disjoint.
        steps: training steps of the denoiser; the detector's own default is 800.
        progress: is told each step.

    Example:
        >>> trial = digits_trial(n_train=100, n_fit=80, n_test=10, steps=1)
        >>> [tried.attack for tried in trial.tried]
        ['fgsm 0.3', 'bim 0.3', 'pgd 0.3', 'jsma']
    """
    tell = progress or (lambda step: None)
    images, labels = digits(_SIZE)
    order = torch.randperm(len(images), generator=generator(seed, "digits"))
    train, fit, test = torch.split(order[: n_train + n_fit + n_test], [n_train, n_fit, n_test])
    tell("digits: training the network")
    network = DigitsCNN.trained(images[train], labels[train], seed=seed)
    tell("digits: fitting the detector on clean images")
    detector = _detector(network, steps, seed)
    detector.fit(images[fit].numpy(), nb_epochs=1)
    return try_detector(
        detector,
        images[test],
        [f"digit {int(i)}" for i in test],
        [detector_attack(detector, name, _EPS, batch_size=n_test, seed=seed) for name in ATTACKS],
        labels=labels[test],
        seed=seed,
        progress=lambda step: tell(f"digits: {step}"),
    )


def _detector(network: DigitsCNN, steps: int, seed: int) -> CausalEffectDetector:
    from ce_plugin.detection import CausalEffectDetector, Denoising, Signature

    groups = [one for one in Signature.small_images().probes if not isinstance(one, Denoising)]
    return CausalEffectDetector(network, Signature([Denoising(least_steps=steps), *groups]), seed=seed)
