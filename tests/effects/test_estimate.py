"""Estimate: what it answers, what it refuses, what it warns about, and that nothing is lost on disk."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ce_plugin.effects import Estimate, interactions
from ce_plugin.errors import ArgumentError, DesignError, FileError, InferenceError, SaturationWarning, UnitError


def random_estimate(**changes: Any) -> Estimate:
    """Two examples with three and two units, four classes, of a random design."""
    g = torch.Generator().manual_seed(0)
    effect = torch.randn(2, 3, 4, generator=g)
    error = torch.rand(2, 3, 4, generator=g) / 3
    effect[1, 2], error[1, 2] = math.nan, math.nan
    values: dict[str, Any] = {
        "effect": effect,
        "std_error": error,
        "dof": torch.full((2, 3, 4), 30.0),
        "reference": torch.full((2, 4), 0.25),
        "class_shape": (4,),
        "n_units": torch.tensor([3, 2]),
        "n_trials": 20,
        "unit_labels": [["a", "b", "c"], ["d", "e"]],
        "outcome": "probability",
        "design": "RandomMask(0.5, n_trials=20)",
        "intervention": "PixelMask('zero')",
        "predicted": torch.tensor([2, 0]),
        "p": 0.5,
        "cost": 21.0,
        "settings": {"seed": 0},
        "assignments": torch.rand(2, 20, 3, generator=g) < 0.5,
        "outcomes": torch.randn(2, 20, 4, generator=g),
    }
    return Estimate(**{**values, **changes})


def exact_estimate(**changes: Any) -> Estimate:
    values: dict[str, Any] = {
        "effect": torch.tensor([[[1.0], [2.0], [5.0]]]),
        "reference": torch.tensor([[0.5]]),
        "class_shape": (),
        "target": torch.tensor([7]),
        "outcome": "probability",
        "design": "OneAtATime()",
    }
    return Estimate(**{**values, **changes})


def test_contribution_is_minus_the_effect() -> None:
    estimate = exact_estimate()
    assert torch.equal(estimate.contribution, -estimate.effect)


@pytest.mark.parametrize("question", ["p_values", "significant", "confidence_interval", "half_width"])
def test_exact_designs_have_no_sampling_error(question: str) -> None:
    with pytest.raises(InferenceError, match=r"OneAtATime\(\): exact designs have no sampling error.*RandomMask"):
        getattr(exact_estimate(), question)()


def test_intervals_are_centred_and_padding_stays_nan() -> None:
    estimate = random_estimate()
    low, high = estimate.confidence_interval(0.9)
    torch.testing.assert_close((low + high) / 2, estimate.effect.double(), equal_nan=True)
    torch.testing.assert_close((high - low) / 2, estimate.half_width(0.9), equal_nan=True)
    assert bool(low[1, 2].isnan().all())
    significant = estimate.significant()
    assert significant.dtype == torch.bool
    assert not significant[1, 2].any()
    assert 0 < significant.sum() < 20


def test_significance_does_not_see_other_examples_classes_or_padding() -> None:
    estimate = random_estimate()
    for i in range(2):
        own = int(estimate.n_units[i])
        alone = estimate[i]
        assert torch.equal(alone.significant()[0], estimate.significant()[i])
        assert estimate.std_error is not None
        for c in range(4):
            single = replace(
                alone,
                effect=estimate.effect[i : i + 1, :own, c : c + 1],
                std_error=estimate.std_error[i : i + 1, :own, c : c + 1],
                dof=None if estimate.dof is None else estimate.dof[i : i + 1, :own, c : c + 1],
            )
            assert torch.equal(single.significant()[0, :, 0], estimate.significant()[i, :own, c])


def test_rates_outside_the_unit_interval() -> None:
    with pytest.raises(ArgumentError, match="fdr"):
        random_estimate().significant(5)


@pytest.mark.parametrize(("outcome", "value", "warned"), [
    ("probability", 0.999, True), ("probability", 0.001, True), ("sigmoid", 0.995, True),
    ("probability", 0.9, False), ("log_odds", 0.999, False), ("logit", 0.001, False),
])  # fmt: skip
def test_saturated_probabilities_warn_when_asked_for_certainty(outcome: str, value: float, warned: bool) -> None:
    reference = torch.full((2, 4), 0.5)
    reference[1, 0] = value  # the predicted class of the second example
    estimate = random_estimate(reference=reference, outcome=outcome)
    for ask in (estimate.p_values, estimate.significant, estimate.confidence_interval, estimate.half_width):
        if warned:
            with pytest.warns(SaturationWarning, match=r'examples \[1\].*outcome="log_odds"'):
                ask()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                ask()


def test_classes_that_nobody_asked_about_do_not_warn() -> None:
    reference = torch.full((2, 4), 0.5)
    reference[:, 3] = 0.001
    estimate = random_estimate(reference=reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate.p_values()
    assert estimate.saturated.tolist() == [[False, False, False, True]] * 2
    with pytest.warns(SaturationWarning):
        random_estimate(reference=reference, predicted=None).p_values()


def test_frame_has_one_row_per_example_unit_and_class() -> None:
    estimate = random_estimate()
    frame = estimate.to_dataframe(level=0.9, fdr=0.2)
    assert len(frame) == (3 + 2) * 4
    assert list(frame.columns) == [
        *("example", "unit", "label", "class", "effect", "std_error", "ci_low", "ci_high", "p_value"),
        *("significant", "reference"),
    ]
    low, _ = estimate.confidence_interval(0.9)
    for row in frame.to_dict("records"):
        i, u, c = row["example"], row["unit"], row["class"]
        assert row["effect"] == pytest.approx(estimate.effect[i, u, c].item())
        assert row["ci_low"] == pytest.approx(low[i, u, c].item())
        assert row["p_value"] == pytest.approx(estimate.p_values()[i, u, c].item())
        assert row["significant"] == bool(estimate.significant(0.2)[i, u, c])
        assert row["label"] == [["a", "b", "c"], ["d", "e"]][i][u]
    assert not frame.isna().any().any()
    frame = replace(estimate, smoothed=2 * estimate.effect).to_dataframe()
    assert (frame["smoothed"] == 2 * frame["effect"]).all()


def test_frame_of_an_exact_design_names_the_target_and_has_no_errors() -> None:
    frame = exact_estimate().to_dataframe()
    assert frame["class"].tolist() == [7, 7, 7]
    assert frame[["std_error", "ci_low", "p_value", "significant"]].isna().all().all()
    assert frame["label"].tolist() == ["0", "1", "2"]


def test_classes_of_a_larger_output_are_its_indices() -> None:
    estimate = exact_estimate(effect=torch.zeros(1, 1, 4), reference=torch.zeros(1, 4), class_shape=(2, 2), target=None)
    assert estimate.to_dataframe()["class"].tolist() == ["(0, 0)", "(0, 1)", "(1, 0)", "(1, 1)"]


def test_pairs_are_the_estimator_on_the_kept_trials() -> None:
    estimate = random_estimate()
    pairs = estimate.pairs([(0, 1)])
    assert estimate.assignments is not None
    assert estimate.outcomes is not None
    want = interactions(estimate.assignments[1, :, :2], estimate.outcomes[1], [(0, 1)], 0.5)
    torch.testing.assert_close(pairs.effect[1], want.effect.float())
    assert pairs.unit_labels == [["a x b"], ["d x e"]]
    assert pairs.p_values().shape == (2, 1, 4)
    assert len(pairs.to_dataframe()) == 8
    with pytest.raises(UnitError, match=r"range\(2\)"):
        estimate.pairs([(0, 2)])  # the second example has two units
    with pytest.raises(DesignError, match="trials were kept"):
        random_estimate(assignments=None).pairs([(0, 1)])


def test_pairs_use_only_the_trials_that_were_run() -> None:
    estimate = random_estimate()
    assert estimate.outcomes is not None
    assert estimate.assignments is not None
    estimate.outcomes[1, 12:] = math.nan
    want = interactions(estimate.assignments[1, :12, :2], estimate.outcomes[1, :12], [(0, 1)], 0.5)
    torch.testing.assert_close(estimate.pairs([(0, 1)]).effect[1], want.effect.float())


def test_interaction_of_joint_groups() -> None:
    joint = exact_estimate(groups=((0,), (1,), (0, 1)), design="Joint(...)")
    assert joint.interaction.flatten().tolist() == [0.0, 0.0, 2.0]
    with pytest.raises(DesignError, match=r"Joint.pairs"):
        _ = exact_estimate().interaction


def test_indexing_keeps_examples_apart() -> None:
    estimate = random_estimate()
    assert len(estimate) == 2
    assert len(estimate[:1]) == 1
    swapped = estimate[[1, 0]]
    assert swapped.unit_labels == [["d", "e"], ["a", "b", "c"]]
    torch.testing.assert_close(swapped.effect[1], estimate.effect[0])
    assert swapped[-1].equals(estimate[0])
    assert swapped[::-1].equals(estimate)
    assert not swapped.equals(estimate)
    assert [e.n_units.item() for e in estimate] == [3, 2]
    with pytest.raises(IndexError, match="example 2"):
        estimate[2]


def test_to_moves_every_tensor() -> None:
    moved = random_estimate().to("meta")
    assert {v.device.type for v in vars(moved).values() if isinstance(v, torch.Tensor)} == {"meta"}


@pytest.mark.parametrize("make", [random_estimate, exact_estimate])
def test_saving_and_loading_lose_nothing(make: Any, tmp_path: Path) -> None:
    estimate = make(groups=((0,), (1,), (0, 1)))
    file = estimate.save(tmp_path / "result.pt")
    assert Estimate.load(file).equals(estimate)
    assert [path.name for path in tmp_path.iterdir()] == ["result.pt"]


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    file = tmp_path / "result.pt"
    file.write_text("mine")
    with pytest.raises(FileError, match=r"which exists. Pass force=True"):
        exact_estimate().save(file)
    assert file.read_text() == "mine"
    exact_estimate().save(file, force=True)
    assert Estimate.load(file).equals(exact_estimate())


def test_files_that_are_no_estimates(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"):
        Estimate.load(tmp_path / "missing.pt")
    text = tmp_path / "text.pt"
    text.write_text("hello")
    with pytest.raises(FileError, match="which is none"):
        Estimate.load(text)
    weights = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(2)}, weights)
    with pytest.raises(FileError, match="something else"):
        Estimate.load(weights)
    whole = exact_estimate().save(tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="which is damaged"):
        Estimate.load(tmp_path / "half.pt")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = exact_estimate().save(tmp_path / "result.pt")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileError, match="disk full"):
        random_estimate().save(file, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["result.pt"]
    assert Estimate.load(file).equals(exact_estimate())


def test_a_person_can_read_it() -> None:
    text = repr(random_estimate())
    assert "Estimate of probability: 2 examples, 3 units, 4 classes" in text
    assert "RandomMask(0.5, n_trials=20), 20 trials" in text
    assert "standard error" in text
    assert "largest effect +5, unit 2, class 7" in repr(exact_estimate())


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02]q", b"PK\x03\x04", b".", b"N.", b"K\x01K"])
def test_bytes_that_are_no_estimate_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(FileError, match=r"written by Estimate\.save"):
        Estimate.load(tmp_path / "file")
