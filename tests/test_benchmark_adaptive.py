"""The benchmark of the adaptive attack: what is found is kept, and shown with the effort that found it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.detection import _adaptive_attack as adaptive
from benchmarks.detection import _adaptive_tables as tables
from benchmarks.detection import adaptive as script
from benchmarks.detection._results import Findings


class Brightness:
    """How bright an image is."""

    name = "brightness"

    def score(self, x: np.ndarray, batch_size: int = 128) -> np.ndarray:
        return self.score_tensor(torch.as_tensor(x)).double().numpy()

    def score_tensor(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).mean(1)


def target(folder: Path, n: int = 12) -> Any:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0, -1.0]]).repeat(1, 8).mul(torch.tensor([[1.0], [-1.0]])))
    images = np.random.default_rng(0).integers(90, 120, (n, 1, 4, 4)).astype(np.float32) / 255
    with torch.no_grad():
        labels = network(torch.as_tensor(images)).argmax(1).numpy()
    problem = SimpleNamespace(
        name="toy",
        seed=0,
        network=network,
        images={"test": images, "fit": images},
        labels={"test": labels},
        n_classes=2,
    )
    detector = Brightness()
    clean = detector.score(images)
    return adaptive.TargetModel(
        problem, "brightness", detector, np.arange(n), clean, clean, folder, dict.fromkeys(range(3), 0.04)
    )


def test_chunks_of_another_effort_are_kept_beside_and_the_row_shows_the_greatest_of_the_most(tmp_path: Path) -> None:
    known = target(tmp_path)
    low = adaptive.Effort(losses=("selective",), steps=4, restarts=1, width=1)
    high = dataclasses.replace(low, steps=6)
    assert adaptive.chunks(known, 0.1, range(2)) is None
    first = known.chunk(0, 0.1, low, None, make=True)
    assert len(first.images) == adaptive.CHUNK
    assert first.success.all()
    known.chunk(0, 0.1, high, None, make=True)
    assert known.chunk(0, 0.1, dataclasses.replace(low, seed=1), None, make=False) is None
    again = known.chunk(0, 0.1, low, None, make=True)
    np.testing.assert_array_equal(again.images, first.images)
    assert again.seconds == first.seconds  # read, not made anew
    effort, found = adaptive.chunks(known, 0.1, range(2))
    assert (effort, len(found)) == (high, 1)
    known.chunk(1, 0.1, low, None, make=True)
    effort, found = adaptive.chunks(known, 0.1, range(2))
    assert (effort, [number for number, _ in found]) == (low, [0, 1])
    assert len(found[1][1].images) == 2


def test_greater_efforts_are_compared_on_the_images_that_both_attacked(tmp_path: Path) -> None:
    known = target(tmp_path)
    low = adaptive.Effort(losses=("selective",), steps=4, restarts=1, width=1)
    high = dataclasses.replace(low, steps=60)
    found = [(number, known.chunk(number, 0.1, low, None, make=True)) for number in range(2)]
    assert adaptive.compared(known, 0.1, low, found) == []
    again = known.chunk(1, 0.1, high, None, make=True)
    assert again.success.all()
    assert again.score.mean() < found[1][1].score.mean()
    (one,) = adaptive.compared(known, 0.1, low, found)
    assert (one.less, one.more, one.n) == (low, high, 2)
    both = [np.mean([(known.clean < s).mean() for s in chunk.score]) for chunk in (found[1][1], again)]
    assert one.auroc == pytest.approx(both)
    assert one.gain.value == pytest.approx(both[1] - both[0])
    assert one.gain.low <= one.gain.value <= one.gain.high
    assert adaptive.compared(known, 0.1, high, [(1, again)]) == []  # less is not more


def test_what_was_found_against_another_detector_is_not_used(tmp_path: Path) -> None:
    known = target(tmp_path)
    effort = adaptive.Effort(losses=("selective",), steps=2, restarts=1, width=1)
    known.chunk(0, 0.1, effort, None, make=True)
    other = dataclasses.replace(known, probe=known.probe + 1)
    assert other.chunk(0, 0.1, effort, None, make=False) is None
    assert adaptive.chunks(other, 0.1, range(1)) is None


def test_a_row_counts_images_that_were_not_turned_over_with_their_clean_score(tmp_path: Path) -> None:
    known = dataclasses.replace(target(tmp_path), name="margin")
    found = known.chunk(0, 0.1, adaptive.Effort(("selective",), 2, 1, 1), None, make=True)
    success = np.arange(adaptive.CHUNK) < 4
    score = np.where(success, 9.0, -9.0)
    row = tables.Row.of(known, 0.1, adaptive.Effort(), [(0, dataclasses.replace(found, success=success, score=score))])
    assert row.success == 0.4
    assert row.over_successes.auroc.value == 1.0
    clean = known.clean
    own = np.mean([(clean < one).mean() + (clean == one).mean() / 2 for one in clean[4:10]])
    assert row.over_all == pytest.approx(0.4 + 0.6 * own)
    assert row.evades == 0.0
    assert row.room == ["- (0)", "- (3)", "- (0)", "- (0)"]  # 0.04 of 0.1; of the fourth nothing is known
    cells = row.cells("-")
    assert cells[2] == "0.1"
    assert cells[-2] == "3 x 6 x 4 x 40"


def test_results_of_a_run_whose_cache_is_lost_are_kept_while_the_detector_is_the_same(tmp_path: Path) -> None:
    known = dataclasses.replace(target(tmp_path / "cache"), name="margin")
    low = adaptive.Effort(("selective",), 4, 1, 1)
    made = [known.chunk(number, 0.1, low, None, make=True) for number in range(2)]
    # As the file holds them: these scores tie with those of clean images, and rounding moves ties.
    found = [(n, dataclasses.replace(one, score=one.score.round(5))) for n, one in enumerate(made)]
    known.chunk(1, 0.1, dataclasses.replace(low, steps=9), None, make=True)
    first = tables.Row.of(known, 0.1, low, found, adaptive.compared(known, 0.1, low, found))
    assert len(first.more) == 1
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"rows": [first.to_dict()]}))
    lost = dataclasses.replace(known, folder=tmp_path / "lost")
    assert script.best_known(lost, 0.1, range(2), tmp_path / "none.json") is None
    assert script.best_known(lost, 0.3, range(2), results) is None
    again = script.best_known(lost, 0.1, range(2), results)
    then, now = (json.loads(json.dumps(row.to_dict())) for row in (first, again))
    for name in ("success", "over_all", "evades", "late", "seconds"):
        assert now.pop(name) == pytest.approx(then.pop(name), abs=2e-5), name
    assert now == then
    assert again.room == first.room
    np.testing.assert_allclose(again.sample, first.sample, atol=1e-4)
    # The cache goes before the results where it holds as much, and a detector that scores otherwise has none.
    cached = script.best_known(known, 0.1, range(2), results).images["score"]
    np.testing.assert_array_equal(cached, np.concatenate([one.score for one in made]))
    other = dataclasses.replace(lost, clean=lost.clean + 0.1)
    assert script.best_known(other, 0.1, range(2), results) is None


def rows_of_two_classifiers(folder: Path, name: str, scores: tuple[float, float]) -> list[Any]:
    first = dataclasses.replace(target(folder), name=name)
    first.problem.name = "mnist"
    second = dataclasses.replace(first, problem=SimpleNamespace(**{**vars(first.problem), "seed": 1}))
    found = first.chunk(0, 0.1, adaptive.Effort(("selective",), 2, 1, 1), None, make=True)
    return [
        tables.Row.of(one, eps, adaptive.Effort(), [(0, dataclasses.replace(found, score=np.full(10, score)))])
        for one, score in zip((first, second), scores, strict=True)
        for eps in (0.1, 0.3)
    ]


def test_figures_are_pooled_over_classifiers_and_the_bar_is_held_against_the_pooled_ones(tmp_path: Path) -> None:
    # Above every clean image on one classifier and below on the other: in whatever sample of images, one half.
    rows = rows_of_two_classifiers(tmp_path, "mahalanobis", (9.0, -9.0))
    at_tenth, at_three = tables.means(rows)
    assert (at_tenth.eps, at_three.eps) == (0.1, 0.3)
    assert at_tenth.seeds == (0, 1)
    assert at_tenth.n == (10, 10)
    assert tuple(at_tenth.auroc) == (0.5, 0.5, 0.5)
    assert at_tenth.evades == 0.5
    verdicts = [line[-1] for line in tables.asked([at_tenth, at_three]).rows]
    assert verdicts == ["met", "**not met**"]
    assert [line[2] for line in tables.over_classifiers([at_tenth, at_three]).rows] == ["10, 10"]


def test_the_static_report_takes_the_pooled_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tables.means(rows_of_two_classifiers(tmp_path, "mahalanobis", (9.0, -9.0)))
    findings = Findings()
    assert not tables.knowing(findings, tmp_path).rows
    (tmp_path / tables.FILE).write_text(json.dumps({"means": [one.to_dict() for one in found]}))
    (line,) = tables.knowing(findings, tmp_path).rows
    assert line[2:] == ["10, 10", "-", ".500 / 50.0 %", ".500 / 50.0 %"]
