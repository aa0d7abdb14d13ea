"""What detectors have learned is kept, and comes back as it was: the benchmarks' figures must not depend on a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.detection import _fitted as fitted
from benchmarks.detectors import MLLOO
from ce_plugin.detection import CausalEffectDetector, CounterAttack, Signature, Smoothing
from ce_plugin.interventions import Smooth


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def images(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 1, 6, 6), dtype=np.float32)


def detector(net: nn.Module, folder: Path, code: str = "1", **options: Any) -> Any:
    signature = Signature([CounterAttack(), Smoothing("filters", [Smooth.median(2)])])
    made = CausalEffectDetector(net, signature, **options)
    made._fitter = fitted.KeptFitter(net, folder, code)
    return made


def test_what_was_learned_is_read_by_the_next_and_is_the_same(tmp_path: Path) -> None:
    net, x, new = network(), images(150, 0), images(20, 1)
    options = {"seed": 4, "aggregate": "sum", "augmentation": None}
    plain = CausalEffectDetector(net, detector(net, tmp_path).signature, **options)
    plain.fit(x)
    first = detector(net, tmp_path, **options)
    first.fit(x)
    (file,) = tmp_path.glob("*.ce")
    written = file.stat().st_mtime_ns
    labels = np.repeat([0, 1], [150, 20])
    for other in (first, detector(net, tmp_path, **options)):
        other.fit(x[::-1].copy())
        np.testing.assert_array_equal(other.score(new), plain.score(new))
        assert other.learned().seed == 4
        other.fit(np.concatenate([x, 1 - new]), labels)
        plain.fit(np.concatenate([x, 1 - new]), labels)
        np.testing.assert_array_equal(other.score(new), plain.score(new))
        plain.fit(x)
    assert file.stat().st_mtime_ns == written


def test_other_images_options_and_code_are_learned_anew(tmp_path: Path) -> None:
    net, x = network(), images(150, 0)
    for count, (pictures, code, options) in enumerate(
        [(x, "1", {}), (images(150, 3), "1", {}), (x, "1", {"seed": 1}), (x, "2", {}), (x, "1", {"holdout": 0.4})]
    ):
        detector(net, tmp_path, code, **options).fit(pictures)
        assert len(list(tmp_path.glob("*.ce"))) == count + 1


def test_dispersions_are_read_once_and_are_those_of_ml_loo() -> None:
    net, x = network(), images(40, 0)
    plain, remembering = MLLOO(net), fitted.RememberingMLLOO(net)
    for one in (plain, remembering):
        one.fit(x)
    np.testing.assert_array_equal(remembering.score(x[:7]), plain.score(x[:7]))
    calls: list[int] = []
    net.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    remembering.fit(x, np.arange(40) % 2)
    assert not calls
    assert remembering.score(images(2, 5)).shape == (2,)
    assert calls
