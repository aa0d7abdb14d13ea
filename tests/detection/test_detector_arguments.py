"""Wrong arguments of the detector and its parts: an error of ours that names the argument, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ce_plugin.detection import (
    AdaptiveEvasion,
    Augmentation,
    Calibration,
    CausalEffectDetector,
    CounterAttack,
    Denoising,
    Interchange,
    NodeZeroing,
    PixelMasking,
    Signature,
    Smoothing,
    rate,
    realised_interval,
)
from ce_plugin.errors import CEPluginError, InferenceError
from ce_plugin.interventions import Adversarial, Smooth
from ce_plugin.networks.art import build_classifier

QUICK = Signature([CounterAttack()])


class Counted(nn.Module):
    """A network that counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        # An array, because the attributes of a guarded network are restored.
        self.linear, self._count = nn.Linear(64, 3), np.zeros(1, int)

    @property
    def passes(self) -> int:
        return int(self._count[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._count += 1
        return self.linear(x.flatten(1))


def images(n: int = 90) -> np.ndarray:
    return np.random.default_rng(0).random((n, 1, 8, 8), dtype=np.float32)


@pytest.fixture(scope="module")
def network() -> Counted:
    torch.manual_seed(0)
    return Counted().eval()


@pytest.fixture(scope="module")
def fitted(network: Counted) -> CausalEffectDetector:
    detector = CausalEffectDetector(network, QUICK)
    detector.fit(images())
    return detector


def _detector(**options: Any) -> Callable[[Counted], Any]:
    return lambda network: CausalEffectDetector(network, options.pop("signature", QUICK), **options)


CONSTRUCTED: list[tuple[str, Callable[[Counted], Any]]] = [
    ("classifier", lambda _: CausalEffectDetector(None)),
    ("classifier", lambda _: CausalEffectDetector(lambda x: x)),
    ("signature", lambda n: CausalEffectDetector(n, "small")),
    ("signature", lambda n: CausalEffectDetector(n, [CounterAttack()])),
    ("clip_values", _detector(clip_values=1.0)),
    ("clip_values", _detector(clip_values=(1, 0))),
    ("clip_values", _detector(clip_values=("0", "1"))),
    ("clip_values", _detector(clip_values=(0, 1, 2))),
    ("clip_values", _detector(clip_values=(0, float("nan")))),
    ("clip_values", _detector(clip_values=(0, float("inf")))),
    ("normalization", _detector(normalization=3)),
    ("normalization", _detector(normalization=("a", 1))),
    ("normalization", _detector(normalization=(0, 0))),
    ("fpr", _detector(fpr="0.05")),
    ("fpr", _detector(fpr=5)),
    ("fpr", _detector(fpr=True)),
    ("fpr", _detector(fpr=float("nan"))),
    ("fpr", _detector(fpr=None)),
    ("holdout", _detector(holdout=0)),
    ("holdout", _detector(holdout="half")),
    ("augmentation", _detector(augmentation="strong")),
    ("augmentation", _detector(augmentation=0.1)),
    ("augmentation", _detector(augmentation=np.zeros(2))),
    ("aggregate", _detector(aggregate="mean")),
    ("aggregate", _detector(aggregate=None)),
    ("attacks", _detector(attacks="fgsm")),
    ("attacks", _detector(attacks=[])),
    ("attack", _detector(attacks=["fgms"])),
    ("attacks", _detector(attacks=[3])),
    ("attacks", _detector(attacks=[None])),
    ("seed", _detector(seed="a")),
    ("seed", _detector(seed=1.5)),
    ("seed", _detector(seed=None)),
    ("seed", _detector(seed=True)),
    ("probes", lambda _: Signature([])),
    ("probes", lambda _: Signature(CounterAttack())),
    ("probes", lambda _: Signature(None)),
    ("probes", lambda _: Signature(["blur"])),
    ("probes", lambda _: Signature([CounterAttack(), CounterAttack()])),
    ("leading", lambda _: Signature([CounterAttack()], leading="counter-attack")),
    ("leading", lambda _: Signature([CounterAttack()], leading=3)),
    ("leading", lambda _: Signature([CounterAttack()], leading=["blur"])),
    ("shape", lambda _: Signature.of((8, 8))),
    ("filters", lambda _: Smoothing("blur", [])),
    ("filters", lambda _: Smoothing("blur", Smooth.gauss(1.0))),
    ("filters", lambda _: Smoothing("blur", ["gauss"])),
    ("filters", lambda _: Smoothing("blur", [Smooth.gauss(1.0), Smooth.gauss(1.0)])),
    ("judged", lambda _: Smoothing("blur", [Smooth.gauss(1.0)], judged="distance")),
    ("judged", lambda _: Smoothing("blur", [Smooth.gauss(1.0)], judged=["far"])),
    ("judged", lambda _: CounterAttack(judged=[1])),
    ("name", lambda _: Smoothing(3, [Smooth.gauss(1.0)])),
    ("steps", lambda _: CounterAttack(steps=0.1)),
    ("steps", lambda _: CounterAttack(steps=[-0.1])),
    ("steps", lambda _: CounterAttack(steps=["0.1"])),
    ("value_range", lambda _: CounterAttack(value_range=1)),
    ("value_range", lambda _: CounterAttack(value_range=(1, 0))),
    ("share", lambda _: PixelMasking("half")),
    ("share", lambda _: PixelMasking(1.0)),
    ("n_draws", lambda _: PixelMasking(n_draws=1)),
    ("n_draws", lambda _: PixelMasking(n_draws=2.5)),
    ("seed", lambda _: PixelMasking(seed="a")),
    ("layer", lambda _: NodeZeroing(3)),
    ("filters", lambda _: Interchange("0", "blur")),
    ("width", lambda _: Denoising(width=0)),
    ("width", lambda _: Denoising(width="wide")),
    ("least_steps", lambda _: Denoising(least_steps=1.5)),
    ("eps", lambda _: Denoising(eps="8/255")),
    ("eps", lambda _: Denoising(eps=-1)),
    ("passes", lambda _: Denoising(passes="3")),
    ("noise", lambda _: Augmentation(noise="loud")),
    ("noise", lambda _: Augmentation(noise=-1)),
    ("shift", lambda _: Augmentation(shift=0.5)),
    ("contrast", lambda _: Augmentation(contrast=2)),
    ("value_range", lambda _: Augmentation(value_range=0)),
    ("scores", lambda _: Calibration(["a"])),
    ("scores", lambda _: Calibration([])),
    ("scores", lambda _: Calibration([1.0]).p_values(["b"])),
    ("fpr", lambda _: Calibration(np.arange(99.0)).threshold("0.05")),
    ("fpr", lambda _: Calibration(np.arange(99.0)).threshold(5)),
    ("n", lambda _: realised_interval("many", 0.05)),
    ("level", lambda _: realised_interval(99, 0.05, level=95)),
    ("n_test", lambda _: realised_interval(99, 0.05, n_test=0)),
    ("flags", lambda _: rate([0, 1])),
    ("level", lambda _: rate([True], level="0.95")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "call"), CONSTRUCTED, ids=[f"{i} {name}" for i, (name, _) in enumerate(CONSTRUCTED)])
def test_wrong_arguments_of_constructors(name: str, call: Callable[[Counted], Any], network: Counted) -> None:
    before = network.passes
    with pytest.raises(CEPluginError, match=f"argument `{name}` to be"):
        call(network)
    assert network.passes == before


CALLED: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    ("x", "fit", (None,), {}),
    ("x", "fit", ("images",), {}),
    ("x", "fit", ([[1.0]],), {}),
    ("x", "fit", (images()[0],), {}),
    ("x", "fit", (images() * 255,), {}),
    ("x", "fit", ((images() * 255).astype(np.uint8),), {}),
    ("x", "fit", (images() * np.nan,), {}),
    ("y", "fit", (images(), [0, 1]), {}),
    ("y", "fit", (images(), np.arange(90)), {}),
    ("y", "fit", (images(), ["a"] * 90), {}),
    ("y", "fit", (images(), np.ones(90)), {}),
    ("batch_size", "fit", (images(),), {"batch_size": 0}),
    ("batch_size", "fit", (images(),), {"batch_size": "all"}),
    ("batch_size", "fit", (images(),), {"batch_size": 2.5}),
    ("nb_epochs", "fit", (images(),), {"nb_epochs": 0}),
    ("nb_epochs", "fit", (images(),), {"nb_epochs": None}),
    ("x", "score", (None,), {}),
    ("x", "score", (images()[:, :, :4],), {}),
    ("x", "score", (images()[0],), {}),
    ("x", "score", (images() - 1,), {}),
    ("x", "score", (images()[:0],), {}),
    ("batch_size", "score", (images(), True), {}),
    ("x", "detect", ("x",), {}),
    ("explain", "detect", (images()[:2],), {"explain": "yes"}),
    ("layer", "detect", (images()[:2],), {"layer": "nosuch"}),
    ("layer", "detect", (images()[:2],), {"explain": True, "layer": "nosuch"}),
    ("x", "calibrate", (3,), {}),
    ("fpr", "calibrate", (1 - images(),), {"fpr": "0.1"}),
    ("fpr", "calibrate", (1 - images(),), {"fpr": 1e-6}),
    ("batch_size", "calibrate", (1 - images(),), {"batch_size": -1}),
    ("x", "calibrate", (images(),), {}),
    ("x", "teach", (None,), {}),
    ("images", "score_tensor", (images(),), {}),
    ("images", "score_tensor", (torch.zeros(1, 3, 8, 8),), {}),
    ("images", "score_tensor", (torch.zeros(1, 1, 8, 8, dtype=torch.uint8),), {}),
    ("state", "restore", (None,), {}),
    ("params", "set_params", (), {"fprr": 0.1}),
    ("fpr", "set_params", (), {"fpr": "a"}),
    ("attacks", "set_params", (), {"attacks": "fgsm"}),
]


@pytest.mark.parametrize(
    ("name", "method", "args", "options"), CALLED, ids=[f"{i} {one[1]} {one[0]}" for i, one in enumerate(CALLED)]
)
def test_wrong_arguments_of_methods(
    name: str, method: str, args: tuple[Any, ...], options: dict[str, Any], fitted: CausalEffectDetector,
    network: Counted,
) -> None:  # fmt: skip
    before, state, fpr = network.passes, fitted.state, fitted.fpr
    with pytest.raises(CEPluginError, match=f"argument `{name}` to be"):
        getattr(fitted, method)(*args, **options)
    assert network.passes == before
    assert (fitted.state, fitted.fpr) == (state, fpr)


def test_a_detector_that_is_not_fitted(network: Counted) -> None:
    detector = CausalEffectDetector(network, QUICK)
    for call in (detector.score, detector.detect, detector.calibrate, detector.teach):
        with pytest.raises(InferenceError, match="`detector` to be a fitted one"):
            call(images())
    for wrong in (None, 3, "nosuch.ce"):
        with pytest.raises((CEPluginError, TypeError)):
            CausalEffectDetector.load(wrong, network)


def test_attacks_are_made_before_the_fit(network: Counted) -> None:
    fgsm = Adversarial.fgsm(network, eps=0.1)
    unclipped = build_classifier(network, (1, 8, 8), 3, (0.0, 1.0), torch.device("cpu"))
    unclipped._clip_values = None
    from art.attacks.evasion import FastGradientMethod

    detector = CausalEffectDetector(network, QUICK, attacks=[fgsm, FastGradientMethod(unclipped)])
    before = network.passes
    with pytest.raises(CEPluginError, match="`clip_values`"):
        detector.fit(images())
    assert network.passes == before


@pytest.mark.parametrize(
    ("wrong", "obeyed"),
    [
        ({"attacks": "fgsm"}, {"attacks": ["fgsm"]}),
        ({"attacks": ["fgms"]}, {"attacks": ["fgsm"]}),
        ({"attacks": ["FGSM"]}, {"attacks": ["fgsm"]}),
    ],
)
def test_hints_work_when_obeyed(wrong: dict[str, Any], obeyed: dict[str, Any], network: Counted) -> None:
    with pytest.raises(CEPluginError, match="fgsm"):
        CausalEffectDetector(network, QUICK, **wrong)
    detector = CausalEffectDetector(network, QUICK, **obeyed)
    detector.fit(images())
    assert detector.state is not None
    assert detector.state.scorer.attacks is not None


def test_presets_have_the_size_of_the_range(network: Counted) -> None:
    detector = CausalEffectDetector(network, QUICK, attacks=["fgsm"], clip_values=(0, 255))
    detector.fit(images() * 255)
    from ce_plugin.detection.fitting import attacks_on

    (attack,) = attacks_on(detector.classifier, ["fgsm"], 128)
    assert attack.config.size == pytest.approx(0.3 * 255)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eps", {"eps": "8/255"}), ("eps", {"eps": 0}), ("norm", {"norm": 1}), ("steps", {"steps": 0}),
        ("restarts", {"restarts": 1.5}), ("losses", {"losses": "all"}), ("levels", {"levels": 1}),
        ("seed", {"seed": "a"}), ("threshold", {"threshold": "low"}), ("batch_size", {"batch_size": 0}),
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_adaptive_attack(
    name: str, options: dict[str, Any], fitted: CausalEffectDetector, network: Counted
) -> None:
    classifier = build_classifier(network, (1, 8, 8), 3, (0.0, 1.0), torch.device("cpu"))
    with pytest.raises(CEPluginError, match=f"argument `{name}` to be"):
        AdaptiveEvasion(classifier, fitted, **options)


def test_scikit_learn_clones_a_detector_unfitted(network: Counted) -> None:
    from sklearn.base import clone

    fitted = CausalEffectDetector(network, QUICK, fpr=0.1, holdout=0.4, seed=np.int64(7))
    fitted.fit(images())
    fresh = clone(fitted)
    assert fresh.state is None
    assert fresh.get_params() == fitted.get_params()
    assert fresh.classifier is fitted.classifier
    fresh.fit(images())
    assert fresh.threshold == fitted.threshold
    fresh.set_params(fpr=0.2)
    assert fitted.fpr == 0.1
