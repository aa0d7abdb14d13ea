"""Beside the toolbox's own detectors, in the same scripts: its classifiers, its attacks, its calls."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _toy import classifier, patterns, quick_signature
from torch import nn

from ce_plugin.detection import CausalEffectDetector
from ce_plugin.networks.forward import load_art

load_art()
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent  # noqa: E402
from art.defences.detector.evasion import BinaryInputDetector, EvasionDetector  # noqa: E402
from art.estimators.classification import PyTorchClassifier  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
X, CLASSES = patterns(240)
NEW, ANSWERS = patterns(90, seed=1)


def in_the_toolbox(net: nn.Module, n_classes: int = 3, shape: tuple[int, ...] = (1, 8, 8), **options: Any) -> Any:
    return PyTorchClassifier(
        net,
        nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(net.parameters(), 3e-3),
        input_shape=shape,
        nb_classes=n_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
        **options,
    )


@pytest.mark.parametrize("ours", [False, True])
def test_one_script_for_both(ours: bool) -> None:
    """Fit to clean and attacked images with labels, then detect: the calls of the toolbox's own example."""
    protected = in_the_toolbox(classifier(dtype=torch.float32))
    attack = FastGradientMethod(protected, eps=0.3)
    x_train = np.concatenate([X, attack.generate(X)])
    y_train = np.concatenate([np.eye(2)[np.zeros(240, int)], np.eye(2)[np.ones(240, int)]])
    if ours:
        detector = CausalEffectDetector(protected, quick_signature())
    else:
        torch.manual_seed(0)
        judge = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
        detector = BinaryInputDetector(in_the_toolbox(judge, 2))
    assert isinstance(detector, EvasionDetector)
    detector.fit(x_train, y_train, nb_epochs=3, batch_size=20)
    report, is_adversarial = detector.detect(attack.generate(NEW))
    assert isinstance(report, dict)
    assert "predictions" in report
    assert is_adversarial.shape == (90,)
    assert is_adversarial.dtype == np.bool_
    if ours:
        assert is_adversarial.mean() > 0.8
        assert detector.detect(NEW)[1].mean() < 0.25


def test_the_calls_are_those_of_the_toolbox() -> None:
    for name in ("fit", "detect"):
        theirs = inspect.signature(getattr(EvasionDetector, name)).parameters
        ours = inspect.signature(getattr(CausalEffectDetector, name)).parameters
        assert list(ours)[: len(theirs) - 1] == list(theirs)[:-1]  # but for the last, **kwargs
        for key, parameter in theirs.items():
            if parameter.default is not inspect.Parameter.empty:
                assert ours[key].default == parameter.default
    assert set(CausalEffectDetector.defence_params) == set(CausalEffectDetector(classifier()).get_params())


@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_of_the_toolbox_is_a_normalisation(channels: int) -> None:
    mean, std = (np.float32([0.4, 0.5, 0.6][:channels]), np.float32([0.2, 0.25, 0.3][:channels]))
    mean, std = mean.reshape(-1, 1, 1), std.reshape(-1, 1, 1)
    net = classifier(channels=channels, dtype=torch.float32)
    with torch.no_grad():  # the same answers from normalised images
        shift = (net[0].weight * torch.as_tensor(mean)).sum((1, 2, 3))
        net[0].bias.add_(shift)
        net[0].weight.mul_(torch.as_tensor(std))
    shape = (channels, 8, 8)
    x, new = (patterns(n, channels=channels, seed=seed)[0] for n, seed in ((240, 0), (60, 1)))
    inside = CausalEffectDetector(in_the_toolbox(net, shape=shape, preprocessing=(mean, std)), quick_signature())
    beside = CausalEffectDetector(
        net, quick_signature(), normalization=(mean.flatten().tolist(), std.flatten().tolist())
    )
    for detector in (inside, beside):
        detector.fit(x)
    scores = beside.score(new)
    np.testing.assert_allclose(inside.score(new), scores, atol=1e-4 * scores.std())


def test_attacks_of_the_toolbox_can_be_learned_from() -> None:
    net = classifier(dtype=torch.float32)
    protected = in_the_toolbox(net)
    attack = ProjectedGradientDescent(protected, eps=0.3, eps_step=0.05, max_iter=5, num_random_init=1, verbose=False)
    detector = CausalEffectDetector(protected, quick_signature(), attacks=[attack, "fgsm"])
    detector.fit(X)
    assert detector.learned().scorer.attacks is not None
    attacked = attack.generate(NEW)
    fooled = protected.predict(attacked).argmax(1) != ANSWERS
    assert fooled.sum() > 20
    assert detector.detect(attacked[fooled])[1].mean() > 0.7


@pytest.mark.slow
def test_the_example_runs_as_written(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "detector.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=dict(os.environ),
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FastGradientMethod:" in result.stdout
    assert "clean test images:" in result.stdout
    assert " leaves class " in result.stdout
