"""Detectors in reports: what is counted, what is shown, and pages that stand alone."""

from __future__ import annotations

import csv
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import ce_plugin.report.evaluation as demo
from ce_plugin.detection import Alarm, Calibration, UnusualEffect
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.signature import digests
from ce_plugin.errors import InputError, UnknownNameError
from ce_plugin.models import DigitsCNN, VisionModel
from ce_plugin.report import (
    DetectorAttack,
    Plan,
    Screened,
    Screening,
    build_manifest,
    detector_attack,
    digits_trial,
    render,
    save_evaluation,
    save_screening,
    screen,
    try_detector,
)
from ce_plugin.report.alarms import alarm_shown
from ce_plugin.report.evaluation import EvaluationSection, rounded

NAMES = ("dark & <low>", "bright")
ALARM = Alarm(
    deviations={"filters": 5.0, "filters: Smooth.gauss(1.0)": -1.0},
    effects=(UnusualEffect("Smooth.gauss(1.0) on the logit of class 1", -2.0, 0.5, -7.0),),
    turned_to=0,
    intervention="Smooth.gauss(1.0)",
    channels={7: 0.5},
    regions=torch.eye(4) - 0.5,
)


class Brightness(nn.Module):
    """Class 1 where the mean of the picture is above one half."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


class Stub:
    """A detector whose score is the picture's first pixel; it was fitted on `seen`."""

    name, fpr, threshold, passes = "stub", 0.25, 0.5, 7.0

    def __init__(self, seen: Tensor | None = None) -> None:
        self.classifier = ClassifierWrapper(Brightness())
        names = frozenset() if seen is None else frozenset(digests(seen))
        self.state = SimpleNamespace(seen=names, calibration=Calibration([0.1, 0.2, 0.4, 0.6]), shape=(1, 4, 4))
        self.batches: list[int] = []

    def learned(self) -> Any:
        return self.state

    def detect(self, x: Any, batch_size: int = 128, *, explain: bool = False, layer: str | None = None) -> Any:
        self.batches.append(len(x))
        images = torch.as_tensor(x)
        scores = images[:, 0, 0, 0].double().numpy()
        flags = scores > self.threshold
        report = {
            "scores": scores,
            "p_values": self.state.calibration.p_values(scores),
            "predictions": self.classifier(images).argmax(1).numpy(),
            "groups": {"filters": scores * 2, "filters: Smooth.gauss(1.0)": scores},
            "explanations": [ALARM if flag else None for flag in flags],
        }
        return report, flags


def images(*first_and_rest: tuple[float, float]) -> Tensor:
    """Pictures of one first pixel and fifteen equal others."""
    made = torch.stack([torch.full((1, 4, 4), rest) for _, rest in first_and_rest])
    made[:, 0, 0, 0] = torch.tensor([first for first, _ in first_and_rest])
    return (made * 255).round() / 255


def brighter(x: Tensor, classes: Tensor, ids: Any) -> Tensor:
    return x + 0.2


@pytest.fixture
def net() -> VisionModel:
    return VisionModel(Brightness(), "brightness", class_names=NAMES)


def manifest() -> dict[str, Any]:
    return build_manifest(arguments={}, command=["ce-plugin"], seed=0, inputs={}, model=nn.Linear(1, 1))


def many() -> tuple[Tensor, Tensor]:
    """Sixty dark pictures, of which half are near enough to one half; and their classes."""
    rng = np.random.default_rng(0)
    pairs = [(float(first), 0.4 if i % 2 else 0.1) for i, first in enumerate(rng.random(60) * 0.7)]
    return images(*pairs), torch.zeros(60, dtype=torch.long)


def test_a_trial_counts_what_it_says(net: VisionModel) -> None:
    x, labels = many()
    labels[3] = 1  # the network says 0: not attacked, but a clean picture all the same
    detector = Stub()
    attack = DetectorAttack("brighter 0.2", "adds 0.2", 0.2, brighter)
    trial = try_detector(detector, x, [f"{i}.png" for i in range(60)], [attack], labels=labels)  # type: ignore[arg-type]
    (tried,) = trial.tried
    won = [i for i in range(60) if i % 2 and i != 3]  # 0.4 + 0.2 is bright, 0.1 + 0.2 is not
    assert (tried.n_tried, len(tried.scores), int(trial.right.sum())) == (59, len(won), 59)
    first = x[:, 0, 0, 0].double().numpy()
    np.testing.assert_allclose(tried.scores, first[won] + 51 / 255, atol=1e-6)
    assert trial.false_alarms.n_flagged == int((first > 0.5).sum())
    assert trial.false_alarms.n == 60
    assert tried.flagged is not None
    assert tried.flagged.n_flagged == int((first[won] + 51 / 255 > 0.5).sum())
    right = np.delete(first, 3)
    truth = np.r_[np.zeros(len(right)), np.ones(len(won))]
    assert tried.figures.auroc is not None
    assert tried.figures.auroc.value == pytest.approx(roc_auc_score(truth, np.r_[right, tried.scores]))
    assert [one.screened.flagged for one in tried.shown] == [True, False]
    assert tried.shown[0].alarm is ALARM
    assert tried.shown[1].alarm is None
    shown = tried.shown[0]
    assert shown.before is not None
    assert float((shown.picture - shown.before).abs().max()) == pytest.approx(51 / 255, abs=1e-6)


def test_without_classes_the_answers_count_as_correct() -> None:
    x, _ = many()
    trial = try_detector(Stub(), x, list(map(str, range(60))), [])  # type: ignore[arg-type]
    assert trial.right.all()
    assert not trial.truth_known


def test_few_successes_are_not_evaluated_and_none_is_no_mistake(net: VisionModel, tmp_path: Path) -> None:
    x, labels = many()
    attacks = [
        DetectorAttack("nothing", "changes nothing", None, lambda x, classes, ids: x),
        DetectorAttack("few", "changes three", None, lambda x, c, ids: torch.cat([torch.ones_like(x[:3]), x[3:]])),
    ]
    trial = try_detector(Stub(), x, list(map(str, range(60))), attacks, labels=labels)  # type: ignore[arg-type]
    assert [len(one.scores) for one in trial.tried] == [0, 3]
    assert [one.figures.evaluated for one in trial.tried] == [False, False]
    assert trial.tried[0].flagged is None
    page = save_evaluation(trial, tmp_path, net=net, detector="d.ce", manifest=manifest())
    assert page.read_text().count("not evaluated") >= 2
    with (tmp_path / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["auroc"] for row in rows] == ["", "", ""]
    assert [row["flagged"] for row in rows[1:]] == ["", "1.0"]


def test_pictures_that_were_fitted_on_and_wrong_ones_are_refused() -> None:
    x, _ = many()
    with pytest.raises(InputError, match="but got 2 that it was"):
        try_detector(Stub(seen=x[:2]), x, list(map(str, range(60))), [])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="classifies correctly, but got none"):
        try_detector(Stub(), x, list(map(str, range(60))), [], labels=torch.ones(60))  # type: ignore[arg-type]


def test_screening_keeps_the_order_and_explains_the_highest() -> None:
    x = images(*[(first, 0.1) for first in (0.3, 0.9, 0.6, 0.7, 0.1)])
    detector = Stub()
    asked = []

    def batches(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return x[start:stop]

    found = screen(detector, list("abcde"), batches, batch_size=2, n_shown=2)  # type: ignore[arg-type]
    assert [row.name for row in found.rows] == list("abcde")
    assert [row.flagged for row in found.rows] == [False, True, True, True, False]
    assert [one.name for one in found.shown] == ["b", "d"]
    assert asked == [(0, 2), (2, 4), (4, 5), (1, 2), (3, 4)]
    assert found.rows[1].p_value == pytest.approx(1 / 5)


@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=9),
    st.floats(0, 1),
    st.sampled_from([0.1, 0.3, 8 / 255, 1.0]),
    st.sampled_from([(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)]),
)
@settings(max_examples=60, deadline=None)
def test_rounding_stays_within_the_bound(
    levels: list[int], share: float, bound: float, clip: tuple[float, float]
) -> None:
    low, high = clip
    clean = torch.tensor(levels, dtype=torch.float64) / 255 * (high - low) + low
    moved = (clean + (2 * share - 1) * bound * (high - low)).clamp(low, high)
    kept = rounded(moved, clean, bound, clip)
    change = (kept - clean).abs() / (high - low)
    assert float(change.max()) <= bound + 1e-9
    steps = (kept - low) / (high - low) * 255
    assert float((steps - steps.round()).abs().max()) < 1e-9
    assert float(((kept - moved).abs() / (high - low)).max()) <= 1 / 255 + 1e-9


def test_attacks_go_by_name_and_know_the_range() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.stack([torch.ones(16), -torch.ones(16)]) / 1e4)
    detector = SimpleNamespace(classifier=ClassifierWrapper(network, clip_values=(0.0, 255.0)))
    x = torch.full((2, 1, 4, 4), 100.0)
    for name in ("fgsm", "bim", "pgd"):
        attack = detector_attack(detector, name, 0.1)  # type: ignore[arg-type]
        moved = attack.craft(x, torch.zeros(2, dtype=torch.long), [0, 1])
        assert attack.bound == 0.1
        assert float((moved - x).min()) == pytest.approx(-25.5, abs=0.01)
    assert detector_attack(detector, "jsma", 0.1).bound is None  # type: ignore[arg-type]
    assert detector_attack(detector, "fgsm", 8 / 255).name == "fgsm 8/255"  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="Did you mean 'pgd'"):
        detector_attack(detector, "pdg", 0.1)  # type: ignore[arg-type]


class _Page(HTMLParser):
    """What a page refers to, and whether its elements are closed in order."""

    void = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.alts: list[str | None] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.sources += [str(found[key]) for key in ("src", "href") if key in found]
        self.alts += [found.get("alt")] if tag == "img" else []
        self.open += [] if tag in self.void else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def alone(text: str) -> str:
    """The page's words, where it stands alone and is well formed."""
    page = _Page(text)
    assert page.open == []
    assert "<script" not in text
    assert all(source.startswith(("data:image/", "#")) for source in page.sources)
    assert all(page.alts)
    return " ".join(" ".join(page.words).split())


def test_the_page_of_alarms(net: VisionModel, tmp_path: Path) -> None:
    x = images((0.9, 0.1), (0.2, 0.1), (0.8, 0.9))
    found = screen(Stub(), ["a<b>.png", "b.png", "c.png"], lambda start, stop: x[start:stop])  # type: ignore[arg-type]
    page = save_screening(found, tmp_path, net=net, detector="x & y.ce", manifest=manifest())
    words = alone(page.read_text())
    assert "2 of 3 pictures are flagged" in words
    assert "about 0.75 would be flagged by chance" in words
    assert "share of 4 clean calibration pictures" in words
    assert "a<b>.png" in words  # escaped in the source, as it is to the reader
    turned = "Smooth.gauss(1.0) turns the answer from “bright” to “dark & <low>”."  # of c.png, which is bright
    assert f"{turned} Of 4 clean pictures none score as high (p = 0.2)." in words
    assert "No intervention changes the answer “dark & <low>”; Smooth.gauss(1.0) leaves the least of it." in words
    assert "Smooth.gauss(1.0) on the logit of class 1: −2 , usual +0.5 (−7.0 scales)" in words
    assert "Channels that smoothing takes most from: 7 (+0.50)" in words
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["flagged"]) for row in rows] == [("a<b>.png", "1"), ("b.png", "0"), ("c.png", "1")]
    assert float(rows[0]["filters"]) == pytest.approx(2 * float(rows[0]["score"]))


def test_the_page_without_alarms(net: VisionModel, tmp_path: Path) -> None:
    row = Screened("a.png", 0.1, 0.9, False, 1, {"filters": 0.0})
    found = Screening((row,), (), Calibration([0.1, 0.2]), 0.5, 0.25)
    words = alone(save_screening(found, tmp_path, net=net, detector="d", manifest=manifest()).read_text())
    assert "No picture is flagged." in words
    assert "Why they were flagged" not in words


def test_the_page_of_a_trial(net: VisionModel, tmp_path: Path) -> None:
    x, labels = many()
    attack = DetectorAttack("brighter 0.2", "adds <0.2>", 0.2, brighter)
    trial = try_detector(Stub(), x, [f"{i}.png" for i in range(60)], [attack], labels=labels)  # type: ignore[arg-type]
    page = save_evaluation(trial, tmp_path, net=net, detector="d.ce", manifest=manifest())
    words = alone(page.read_text())
    auroc = trial.tried[0].figures.auroc
    assert auroc is not None
    assert f"{auroc.value:.3f} [{auroc.low:.3f}, {auroc.high:.3f}]" in words
    assert "adds <0.2>" in words
    assert "BRIGHTER 0.2: 1.png “dark & <low>” before, now answers “bright”" in words
    assert "None of these attackers knows the detector" in words
    record = EvaluationSection(str).record(trial)
    assert record["attacks"][0]["auroc"] == auroc.value
    assert record["pictures"] == 60


def test_a_picture_that_is_not_flagged_has_no_reason() -> None:
    x, labels = many()
    attack = DetectorAttack("brighter 0.2", "", 0.2, brighter)
    trial = try_detector(Stub(), x, list(map(str, range(60))), [attack], labels=labels)  # type: ignore[arg-type]
    shown = alarm_shown(trial.tried[0].shown[1], NAMES.__getitem__, trial.calibration)
    assert not shown["row"].flagged
    assert (shown["turned"], shown["effects"]) == ("", [])
    assert [cell["title"] for cell in shown["cells"]] == ["Before", "After the attack", "What changed"]


def test_the_demo_keeps_its_digits_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's, the detector's and the attacked digits: no picture twice, and the same ones again for a seed."""
    parts: dict[str, list[int]] = {}
    trained = DigitsCNN.trained

    def train(images: Tensor, labels: Tensor, **options: Any) -> DigitsCNN:
        parts["network"] = digests(images)
        return trained(images, labels, **options)

    def tried(detector: Any, images: Tensor, names: Any, attacks: Any, **options: Any) -> Any:
        parts["detector"], parts["test"] = sorted(detector.learned().seen), digests(images)
        return try_detector(detector, images, names, attacks[:1], **options)

    monkeypatch.setattr(demo.DigitsCNN, "trained", train)
    monkeypatch.setattr(demo, "try_detector", tried)
    told: list[str] = []
    trial = digits_trial(n_train=300, n_fit=120, n_test=30, steps=2, progress=told.append)
    assert [len(part) for part in parts.values()] == [300, 84, 30]
    assert len(set().union(*parts.values())) == 414
    assert len(trial.clean) == 30
    assert told[0] == "digits: training the network"
    again = digits_trial(n_train=300, n_fit=120, n_test=30, steps=2)
    np.testing.assert_array_equal(again.clean, trial.clean)


def test_the_report_of_photographs_shows_the_digits_below() -> None:
    x, labels = many()
    attack = DetectorAttack("brighter 0.2", "", 0.2, brighter)
    trial = try_detector(Stub(), x, list(map(str, range(60))), [attack], labels=labels)  # type: ignore[arg-type]
    common: dict[str, Any] = {"model": "net", "plan": Plan(), "experiment": "", "manifest": manifest()}
    with_digits, without = render([], **common, digits=trial), render([], **common)
    assert "Handwritten digits" in alone(with_digits)
    assert "“0” before, now answers “1”" in alone(with_digits)
    assert "Handwritten digits" not in alone(without)
