"""A probe that is defined outside the package: fitted, scored, explained, saved, and loaded in another process."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from _toy import classifier, patterns

from ce_plugin.detection import CausalEffectDetector, CounterAttack, Probe, Signature, View
from ce_plugin.errors import ArgumentError, FileError
from ce_plugin.interventions import Smooth

X, NEW = patterns(240)[0], patterns(20, seed=1)[0]
MODULE = """
import torch
from ce_plugin.detection import Probe, effect_labels
from ce_plugin.interventions import Smooth


class FromMean(Probe, kind="from-mean"):
    # Effects of moving an image towards the mean clean image, which it learns.

    def __init__(self, share=0.5, name="mean image"):
        super().__init__(name, passes=1)
        self.share = share

    def fit(self, classifier, images, *, n_epochs, seed):
        self.register_buffer("mean", images.mean(0))

    def allocate(self, shape, value_range):
        self.register_buffer("mean", torch.empty(shape))

    def respond(self, view):
        moved = view.images + self.share * (self.mean.to(view.images) - view.images)
        return view.response([view.run(moved)], ("distance", "reversal"))

    def labels(self, n_classes):
        return effect_labels(self.interventions(), n_classes)

    def interventions(self):
        return [f"moving {self.share:.0%} towards the mean image"]

    def input_interventions(self):
        return [Smooth.mean(3)]
"""
LOAD = """
import sys
import numpy as np
import torch
torch.set_num_threads(1)  # as in the tests: the network is trained there and here, and must be the same
sys.path.insert(0, {tests!r})
from _toy import classifier
from ce_plugin.detection import CausalEffectDetector
from ce_plugin.errors import FileError
try:
    CausalEffectDetector.load("detector.ce", classifier())
except FileError as error:
    print(error)
import own_probes
np.save("scores.npy", CausalEffectDetector.load("detector.ce", classifier()).score(np.load("new.npy")))
"""


@pytest.fixture
def own_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "own_probes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_probes", None)
    return importlib.import_module("own_probes")


def test_a_probe_of_ones_own_is_like_any_other(own_probes: ModuleType, tmp_path: Path) -> None:
    signature = Signature([own_probes.FromMean(0.3), CounterAttack()])
    detector = CausalEffectDetector(classifier(), signature, fpr=0.5)
    detector.fit(X)
    assert not hasattr(signature.probes[0], "mean")  # it is a copy that learns
    report, flagged = detector.detect(1 - NEW, explain=True, layer="1")
    assert list(report["groups"]) == ["mean image", "mean image: moving 30% towards the mean image", "counter-attack"]
    alarm = report["explanations"][int(np.flatnonzero(flagged)[0])]
    assert any(effect.what.startswith("moving 30% towards the mean image on the logit of") for effect in alarm.effects)
    assert alarm.intervention == "moving 30% towards the mean image"
    assert alarm.regions.shape == (8, 8)
    assert alarm.channels
    x = torch.as_tensor(NEW[:2]).double().requires_grad_()
    (gradient,) = torch.autograd.grad(detector.score_tensor(x).sum(), x)
    assert bool(gradient.isfinite().all())
    path = detector.save(tmp_path / "detector.ce")
    again = CausalEffectDetector.load(path, classifier())
    np.testing.assert_array_equal(again.score(NEW), detector.score(NEW))
    assert again.signature == signature
    np.save(tmp_path / "new.npy", NEW)
    root, tests = Path(__file__).parents[2], Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", LOAD.format(tests=str(tests))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(tmp_path)])},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "but got 'from-mean'. Import 'own_probes', which defined it, before you load the detector." in result.stdout
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), detector.score(NEW), rtol=1e-9)


def test_an_unknown_kind_in_a_file_is_named() -> None:
    unknown = {"kind": "Sorcery", "module": "magic", "settings": {}, "leading": False}
    with pytest.raises(FileError, match=r"probes of kinds among .*but got 'Sorcery'. Import 'magic'"):
        Signature.from_settings([unknown])


def test_a_kind_belongs_to_one_class() -> None:
    with pytest.raises(ArgumentError, match=r"`kind` to be one that no other probe has.*Write `class Mine\(Probe"):

        class Mine(Probe, kind="Smoothing"):
            def respond(self, view: View) -> object:  # type: ignore[override]
                return view


def test_margins_without_names_are_refused() -> None:
    class Nameless(Probe):
        def __init__(self) -> None:
            super().__init__("nameless", passes=1)

        def respond(self, view: View) -> object:  # type: ignore[override]
            return view.response([view.do(Smooth.mean(3))])

    with pytest.raises(ArgumentError, match="`interventions` to be 1 names, one for each margin, but got 0 names"):
        CausalEffectDetector(classifier(), Signature([Nameless()])).fit(X)  # type: ignore[abstract]


def test_old_names_work_and_warn() -> None:
    from ce_plugin import detection

    with pytest.warns(FutureWarning, match="Augmentation"):
        assert detection.Benign is detection.Augmentation
    with pytest.warns(FutureWarning, match="`groups` is called `probes`"):
        signature = Signature(groups=[CounterAttack()])  # type: ignore[call-arg]
    with pytest.warns(FutureWarning, match=r"Signature.groups is called Signature.probes"):
        assert signature.groups == signature.probes
    with pytest.warns(FutureWarning, match="adversarially_trained"):
        assert Signature.hardened() == Signature.adversarially_trained()
    with pytest.warns(FutureWarning, match="`benign` is called `augmentation`"):
        detector = CausalEffectDetector(classifier(), signature, benign=None)  # type: ignore[call-arg]
    assert detector.augmentation is None
    with pytest.warns(FutureWarning, match="`benign` is called `augmentation`"):
        detector.set_params(benign="default")
    assert detector.augmentation == "default"


def test_a_file_of_an_older_format_says_what_to_do() -> None:
    file = Path(__file__).parents[1] / "golden" / "detector_format_2.ce"
    with pytest.raises(FileError, match=r"a file of format 3, but got format 2. Fit again, or use ce_plugin \d"):
        CausalEffectDetector.load(file, classifier())
