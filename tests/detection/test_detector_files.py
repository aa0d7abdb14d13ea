"""A detector in a file: it comes back bit by bit, on the same classifier only, and without any code in the file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from _toy import classifier, patterns, quick_signature
from torch import nn

from ce_plugin.detection import Augmentation, CausalEffectDetector, Denoising, NodeZeroing, PixelMasking, Signature
from ce_plugin.errors import FileError, ModelError
from ce_plugin.files import load, save
from ce_plugin.interventions import Adversarial
from ce_plugin.trials.batches import BatchSize

X, NEW = patterns(240)[0], patterns(40, seed=1)[0]


def fitted(
    net: nn.Module, *groups: object, leading: tuple[str, ...] | None = None, **options: object
) -> CausalEffectDetector:
    signature = Signature([*quick_signature().probes, *groups], leading=leading)  # type: ignore[list-item]
    detector = CausalEffectDetector(net, signature, **options)  # type: ignore[arg-type]
    detector.fit(X, nb_epochs=1)
    return detector


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_comes_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # How many trials pass the network at once is decided by measured time, and other batches round differently.
    monkeypatch.setattr("ce_plugin.trials._runner.BatchSize", partial(BatchSize, fixed=8))
    net = classifier(dtype=dtype)
    groups = Denoising(width=2, least_steps=2), PixelMasking(n_draws=2), NodeZeroing("1")
    options = {
        "fpr": np.float64(0.1),
        "seed": np.int64(4),
        "augmentation": Augmentation(noise=0.05),
        "aggregate": "sum",
    }
    detector = fitted(net, *groups, leading=("denoising",), **options)
    detector.teach(1 - NEW)
    path = detector.save(tmp_path / "detector.pt")
    again = CausalEffectDetector.load(path, net)
    np.testing.assert_array_equal(again.score(NEW), detector.score(NEW))
    assert again.threshold == detector.threshold
    report, flagged = detector.detect(NEW)
    other, again_flagged = again.detect(NEW)
    np.testing.assert_array_equal(again_flagged, flagged)
    np.testing.assert_array_equal(other["p_values"], report["p_values"])
    assert list(other["groups"]) == list(report["groups"])
    mine, theirs = detector.get_params(), again.get_params()
    assert {name: theirs[name] for name in ("fpr", "seed", "augmentation", "aggregate", "holdout")} == {
        name: mine[name] for name in ("fpr", "seed", "augmentation", "aggregate", "holdout")
    }
    assert again.learned().seen == detector.learned().seen
    second = again.save(tmp_path / "again.pt")
    one, two = (load(file, "CausalEffectDetector", 1) for file in (path, second))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]


def test_the_default_signature_is_a_default_again(tmp_path: Path) -> None:
    net = classifier(dtype=torch.float32)
    detector = CausalEffectDetector(net, augmentation=None)
    # What the default trains takes too long here; it has learned with a quick one.
    quick = fitted(net, augmentation=None)
    detector.restore(quick.learned())
    again = CausalEffectDetector.load(detector.save(tmp_path / "detector.pt"), net)
    assert again.signature is None
    assert again.augmentation is None
    np.testing.assert_array_equal(again.score(NEW), quick.score(NEW))


def test_attacks_that_have_names_come_back_as_options_and_others_leave_what_was_learned(tmp_path: Path) -> None:
    net = classifier()
    named = fitted(net, attacks=["fgsm"])
    again = CausalEffectDetector.load(named.save(tmp_path / "named.pt"), net)
    assert again.get_params()["attacks"] == ["fgsm"]
    np.testing.assert_array_equal(again.score(NEW), named.score(NEW))
    own = fitted(net, attacks=[Adversarial.fgsm(net, eps=0.3)])
    other = CausalEffectDetector.load(own.save(tmp_path / "own.pt"), net)
    assert other.get_params()["attacks"] is None
    np.testing.assert_array_equal(other.score(NEW), own.score(NEW))
    assert "known attacks" in other.detect(NEW)[0]["groups"]


def test_there_is_no_code_in_the_file(tmp_path: Path) -> None:
    path = fitted(classifier()).save(tmp_path / "detector.pt")
    values = load(path, "CausalEffectDetector", 1)
    assert set(values["versions"]) == {"ce_plugin", "torch"}
    # The network stays out of it.
    assert not any(isinstance(value, torch.Tensor) and value.shape == (3, 144) for value in values.values())


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    detector, path = fitted(classifier()), tmp_path / "detector.pt"
    path.write_text("mine")
    with pytest.raises(FileError, match=r"`path` to be a new file, .*Pass force=True to replace it"):
        detector.save(path)
    assert path.read_text() == "mine"
    detector.save(path, force=True)
    assert CausalEffectDetector.load(path, classifier()).threshold == detector.threshold


def test_another_network_is_refused(tmp_path: Path) -> None:
    net = classifier()
    path = fitted(net).save(tmp_path / "detector.pt")
    other = classifier()
    with torch.no_grad():
        other[3].bias[0] += 1e-3
    for wrong in (other, classifier(dtype=torch.float32), classifier(channels=3)):
        with pytest.raises(ModelError, match=r"the network .*but got one with other parameters. Fit again"):
            CausalEffectDetector.load(path, wrong)
    for normalization in ((0.5, 0.5), (0.0, 1.1)):
        with pytest.raises(ModelError, match=r"answers a test image otherwise. Pass the same normalization="):
            CausalEffectDetector.load(path, net, normalization=normalization)
    CausalEffectDetector.load(path, net)


def test_the_toolbox_s_preprocessing_is_part_of_the_network(tmp_path: Path) -> None:
    from art.estimators.classification import PyTorchClassifier

    net, settings = (
        classifier(dtype=torch.float32),
        {"input_shape": (1, 8, 8), "nb_classes": 3, "clip_values": (0.0, 1.0)},
    )
    plain, other = (
        PyTorchClassifier(net, nn.CrossEntropyLoss(), preprocessing=preprocessing, **settings)
        for preprocessing in ((0.0, 1.0), (0.5, 0.5))
    )
    detector = CausalEffectDetector(plain, quick_signature())
    detector.fit(X)
    path = detector.save(tmp_path / "detector.pt")
    np.testing.assert_allclose(CausalEffectDetector.load(path, plain).score(NEW), detector.score(NEW))
    with pytest.raises(ModelError, match="answers a test image otherwise"):
        CausalEffectDetector.load(path, other)


def test_what_is_no_detector_is_refused(tmp_path: Path) -> None:
    net = classifier()
    with pytest.raises(FileError, match=r"a file written by CausalEffectDetector.save"):
        CausalEffectDetector.load(tmp_path / "nothing.pt", net)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(FileError, match="which is none"):
        CausalEffectDetector.load(tmp_path / "text.pt", net)
    save(tmp_path / "other.pt", "Estimate", 1, {"a": 1})
    with pytest.raises(FileError, match="which holds something else"):
        CausalEffectDetector.load(tmp_path / "other.pt", net)
    future = load(fitted(net).save(tmp_path / "detector.pt"), "CausalEffectDetector", 1)
    save(tmp_path / "future.pt", "CausalEffectDetector", 1, {**future, "file_format": 99})
    with pytest.raises(FileError, match=r"a file of format 3, but got format 99. Fit again, or use ce_plugin "):
        CausalEffectDetector.load(tmp_path / "future.pt", net)
