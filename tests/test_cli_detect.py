"""The commands about detectors: what is fitted, what its judgement says, and what stays untouched after a mistake."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import unboxed

from ce_plugin.cli import main
from ce_plugin.cli._commands import EvaluateOptions
from ce_plugin.cli._detect import column_of
from ce_plugin.cli._session import Pictures
from ce_plugin.datasets import digits
from ce_plugin.detection import CausalEffectDetector, CounterAttack, Denoising, Signature, Smoothing
from ce_plugin.errors import FileError
from ce_plugin.files import csv_text
from ce_plugin.interventions import Adversarial, Smooth
from ce_plugin.models import DigitsCNN, Framing, VisionModel
from ce_plugin.report import evaluation

FACTORY = """
import torch
from torch import nn
from ce_plugin.interventions.base import Normalization
from ce_plugin.models import DigitsCNN, Framing, VisionModel
from ce_plugin.report import evaluation

def gray():
    return VisionModel(DigitsCNN(8), "digits", Framing(8), class_names=("zero", *"123456789"))

def colour():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    return VisionModel(model, "colour", Framing(8))

def photographs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(9), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return VisionModel(model, "photographs", Framing(72), Normalization(127.0, 128.0), (0.0, 255.0))
"""
NETWORK = ("--model", "tiny_digits:gray", "--weights", "weights.pt")
TEST = range(500, 560)


def network(folder: Path) -> DigitsCNN:
    model = DigitsCNN(8).eval()
    model.load_state_dict(torch.load(folder / "weights.pt"))
    return model


def save(images: torch.Tensor, folder: Path, names: list[str]) -> None:
    folder.mkdir()
    for image, name in zip(images, names, strict=True):
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(folder / name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a trained network, clean and attacked digits, and a detector that was fitted by the command."""
    folder = tmp_path_factory.mktemp("detect")
    images, labels = digits()
    model = DigitsCNN.trained(images[:250], labels[:250], epochs=6)
    torch.save(model.state_dict(), folder / "weights.pt")
    (folder / "tiny_digits.py").write_text(FACTORY)
    save(images[250:500], folder / "clean", [f"{i:04}.png" for i in range(250, 500)])
    save(images[list(TEST)], folder / "test", [f"{i:04}.png" for i in TEST])
    attack = Adversarial.fgsm(model, eps=0.2, batch_size=60)
    save(attack.perturb(images[list(TEST)], target=labels[list(TEST)]), folder / "bad", [f"bad{i}.png" for i in TEST])
    rows = [f"{i:04}.png,{'zero' if labels[i] == 0 else int(labels[i])}" for i in TEST]
    (folder / "truth.csv").write_text("\n".join(["file,class", *rows]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        quick_signature(patch)
        sys.modules.pop("tiny_digits", None)
        words = ["detect", "fit", "clean", *NETWORK, "--grayscale", "--out", "d.ce", "--seed", "3", "--quiet"]
        assert main(words) == 0
        yield folder


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    quick_signature(monkeypatch)
    return made


def quick_signature(patch: pytest.MonkeyPatch) -> None:
    """The default signature without its denoiser, whose training takes longer than a test should."""
    signature = Signature([CounterAttack(steps=(0.05,)), Smoothing("filters", [Smooth.median(2), Smooth.gauss(1.0)])])
    patch.setattr(Signature, "small_images", classmethod(lambda cls, value_range=(0.0, 1.0): signature))


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


def test_fit_writes_a_detector_and_what_it_was_fitted_with(folder: Path) -> None:
    detector = CausalEffectDetector.load(folder / "d.ce", network(folder))
    assert detector.learned().shape == (1, 8, 8)
    assert (detector.fpr, detector.seed) == (0.05, 3)
    record = json.loads((folder / "d.ce.json").read_text())
    assert record["command"].startswith("ce-plugin detect fit clean")
    found = record["findings"]
    assert found["pictures"] == 250
    assert found["calibration_images"] == detector.learned().calibration.n == 75
    assert found["threshold"] == detector.threshold
    low, high = found["false_alarms_due"]
    assert 0 < low < 0.05 < high < 0.2


def test_fit_is_what_the_detector_itself_does(folder: Path) -> None:
    images = digits()[0][250:500]
    detector = CausalEffectDetector(network(folder), seed=3)
    detector.fit(images.numpy())
    loaded = CausalEffectDetector.load(folder / "d.ce", network(folder))
    np.testing.assert_allclose(loaded.score(images[:9].numpy()), detector.score(images[:9].numpy()), rtol=1e-5)


def test_fit_prepares_for_attackers_who_know_the_detector_where_asked_to(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, float]] = []

    def adversarially_trained(cls: type[Signature], value_range: tuple[float, float]) -> Signature:
        asked.append(value_range)
        return Signature([Denoising(width=2, least_steps=2, eps=0.2, name="hardened denoising")])

    monkeypatch.setattr(Signature, "adversarially_trained", classmethod(adversarially_trained))
    words = ["detect", "fit", "clean", *NETWORK, "--grayscale", "--epochs", "1", "--quiet", "--force"]
    assert main([*words, "--out", "hardened.ce", "--hardened"]) == 0
    assert "--hardened is called --adversarial-training now" in capsys.readouterr().err
    assert main([*words, "--out", "hardened.ce", "--adversarial-training"]) == 0
    assert capsys.readouterr().err == ""
    assert asked == [(0.0, 1.0), (0.0, 1.0)]
    detector = CausalEffectDetector.load(folder / "hardened.ce", network(folder))
    (group,) = detector.learned().signature.probes
    assert group.settings()["eps"] == 0.2


def test_score_writes_a_table_a_page_and_a_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["detect", "score", "test", "bad", "--detector", "d.ce", *NETWORK, "--out", "alarms", "--explain", "3"]
    assert main([*words, "--layer", "features.2"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith(f"Alarms: {folder / 'alarms' / 'alarms.html'}\n")
    rows = rows_of(folder / "alarms" / "scores.csv")
    detector = CausalEffectDetector.load(folder / "d.ce", network(folder))
    assert list(rows[0])[:6] == ["file", "score", "p_value", "flagged", "predicted", "class_name"]
    assert list(rows[0])[6:] == [*detector.learned().columns, "unreadable"]
    clean = digits()[0][list(TEST)].numpy()
    report, flags = detector.detect(clean)
    first = rows[: len(clean)]
    np.testing.assert_allclose([float(row["score"]) for row in first], report["scores"], rtol=1e-4)
    np.testing.assert_allclose([float(row["p_value"]) for row in first], report["p_values"])
    assert [row["flagged"] == "1" for row in first] == flags.tolist()
    assert [int(row["predicted"]) for row in first] == report["predictions"].tolist()
    assert {row["class_name"] for row in first if row["predicted"] == "0"} == {"zero"}
    flagged = [row["file"] for row in rows if row["flagged"] == "1"]
    assert f"{len(flagged)} of 120 pictures flagged; of clean ones about 6 would be" in shown
    attacked = sum(name.startswith("bad") for name in flagged)
    assert attacked > 2 * (len(flagged) - attacked)
    assert json.loads((folder / "alarms" / "manifest.json").read_text())["findings"]["flagged"] == flagged
    page = (folder / "alarms" / "alarms.html").read_text()
    assert page.count('class="card">\n    <h3>') == 3
    assert "Channels that smoothing takes most from" in page
    best = max(rows, key=lambda row: float(row["score"]))["file"]
    assert page.index(f"<td>{best}") == min(page.index(f"<td>{name}") for name in flagged)


def test_a_picture_alone_scores_as_in_company(folder: Path) -> None:
    assert main(["detect", "score", "test", "--detector", "d.ce", *NETWORK, "--out", "all", "--quiet"]) == 0
    words = ["detect", "score", "test/0507.png", "--detector", "d.ce", *NETWORK, "--out", "one", "--fpr", "0.5"]
    assert main([*words, "--quiet"]) == 0
    (alone,) = rows_of(folder / "one" / "scores.csv")
    (among,) = [row for row in rows_of(folder / "all" / "scores.csv") if row["file"] == "0507.png"]
    assert float(alone["score"]) == pytest.approx(float(among["score"]), rel=1e-4)
    assert (alone["flagged"] == "1") == (float(alone["p_value"]) <= 0.5)


def test_evaluate_attacks_what_is_classified_correctly(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["detect", "evaluate", "test", "--detector", "d.ce", *NETWORK, "--truth", "truth.csv", "--out", "tried"]
    assert main([*words, "--attacks", "fgsm", "jsma", "--eps", "0.1", "0.2"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith(f"Evaluation: {folder / 'tried' / 'evaluation.html'}\n")
    images, labels = digits()
    with torch.no_grad():
        right = network(folder)(images[list(TEST)]).argmax(1) == labels[list(TEST)]
    clean, *rows = rows_of(folder / "tried" / "evaluation.csv")
    assert [row["attack"] for row in rows] == ["fgsm 0.1", "fgsm 0.2", "jsma"]
    assert {int(row["n_tried"]) for row in rows} == {int(right.sum())}
    assert 0 < int(rows[0]["n_successful"]) < int(rows[1]["n_successful"])
    detector = CausalEffectDetector.load(folder / "d.ce", network(folder))
    false_alarms = (detector.score(images[list(TEST)].numpy()) > detector.threshold).mean()
    assert (clean["attack"], clean["n_tried"]) == ("clean", "60")
    assert float(clean["flagged"]) == pytest.approx(false_alarms)
    assert 0.5 < float(rows[1]["auroc_low"]) < float(rows[1]["auroc"]) <= float(rows[1]["auroc_high"])
    page = (folder / "tried" / "evaluation.html").read_text()
    assert "None of these attackers knows the detector" in page
    assert "FGSM 0.2" in page
    manifest = json.loads((folder / "tried" / "manifest.json").read_text())
    assert manifest["findings"]["true_classes_given"]
    assert (manifest["arguments"]["command"], manifest["arguments"]["action"]) == ("detect", "evaluate")


def test_the_attacks_of_an_evaluation_are_the_first_four() -> None:
    given = {"images": [Path("one.png")], "detector": Path("d.ce")}
    assert EvaluateOptions(**given).attacks == ["fgsm", "bim", "pgd", "jsma"]
    assert EvaluateOptions(**given, attacks=["pgd"]).attacks == ["pgd"]


def test_the_attacker_who_knows_the_detector(folder: Path) -> None:
    words = ["detect", "evaluate", "test", "--detector", "d.ce", *NETWORK, "--limit", "2", "--out", "known", "--quiet"]
    from ce_plugin.detection import AdaptiveEvasion

    with pytest.MonkeyPatch.context() as patch:
        # A hundred steps of five restarts of four losses are for a real evaluation.
        default = AdaptiveEvasion.__init__.__kwdefaults__
        patch.setitem(default, "steps", 3)
        patch.setitem(default, "restarts", 1)
        assert main([*words, "--attacks", "fgsm", "adaptive", "--eps", "0.2"]) == 0
    _, _, adaptive = rows_of(folder / "known" / "evaluation.csv")
    assert adaptive["attack"] == "adaptive 0.2"
    assert "knows network and detector, 4 losses x 1 restarts x 3 steps" in adaptive["settings"]
    page = (folder / "known" / "evaluation.html").read_text()
    assert "None of these attackers" not in page
    assert "count as classified correctly" in page
    assert "not evaluated" in page  # two pictures are too few for an AUROC


def test_colour_photographs_in_other_units(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, n in (("photos", 80), ("others", 25)):
        (folder / name).mkdir()
        for number in range(n):
            pixels = rng.integers(0, 256, (9, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((100, 90)).save(folder / name / f"{number}.png")
    model = ("--model", "tiny_digits:photographs")
    assert main(["detect", "fit", "photos", *model, "--out", "photos.ce", "--fpr", "0.2", "--quiet"]) == 0
    words = ["--detector", "photos.ce", *model, "--quiet", "--out"]
    assert main(["detect", "evaluate", "others", *words, "noticed", "--attacks", "fgsm", "--eps", "8/255"]) == 0
    clean, fgsm = rows_of(folder / "noticed" / "evaluation.csv")
    assert (clean["n_tried"], fgsm["attack"]) == ("25", "fgsm 8/255")
    assert main(["detect", "score", "others", *words, "seen", "--fpr", "0.9", "--explain", "2"]) == 0
    rows = rows_of(folder / "seen" / "scores.csv")
    assert sum(row["flagged"] == "1" for row in rows) / 25 == pytest.approx(0.9, abs=0.25)
    assert (folder / "seen" / "alarms.html").read_text().count("What smoothing takes away") == 2


def test_attacked_pictures_teach(folder: Path) -> None:
    rows = [*(f"clean/{i:04}.png,clean" for i in range(250, 500)), *(f"bad{i}.png,1" for i in TEST)]
    (folder / "labels.csv").write_text("\n".join(["file,label", *rows]) + "\n")
    words = ["detect", "fit", "clean", "bad", *NETWORK, "--grayscale", "--out", "taught.ce", "--quiet"]
    assert main([*words, "--labels", "labels.csv"]) == 0
    taught = CausalEffectDetector.load(folder / "taught.ce", network(folder))
    assert taught.learned().calibration.n == 75  # of the clean ones alone
    words = ["detect", "fit", "clean", *NETWORK, "--grayscale", "--out", "self-taught.ce", "--quiet"]
    assert main([*words, "--attacks", "fgsm", "--eps", "0.2"]) == 0
    pictures = digits()[0][list(TEST)].numpy()
    plain = CausalEffectDetector.load(folder / "d.ce", network(folder)).score(pictures)
    for file in ("taught.ce", "self-taught.ce"):
        scores = CausalEffectDetector.load(folder / file, network(folder)).score(pictures)
        assert not np.allclose(scores, plain), file


def test_what_exists_stays_without_force(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "d.ce").read_bytes()
    words = ["detect", "fit", "clean", *NETWORK, "--grayscale", "--out", "d.ce", "--quiet"]
    assert main(words) == 1
    assert "--force" in capsys.readouterr().err
    assert (folder / "d.ce").read_bytes() == before
    words = ["detect", "score", "test/0507.png", "--detector", "d.ce", *NETWORK, "--out", "kept", "--quiet"]
    assert main(words) == 0
    (folder / "kept" / "mine.txt").write_text("mine")
    assert main(words) == 1
    assert main([*words, "--force"]) == 0
    assert (folder / "kept" / "mine.txt").read_text() == "mine"


def test_a_network_that_refuses_colours_is_fitted_in_gray_and_it_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["detect", "fit", "clean", *NETWORK, "--out", "by-itself.ce", "--seed", "3"]) == 0
    assert "note: the network takes one channel: pictures are converted to gray" in capsys.readouterr().err
    asked, found = (CausalEffectDetector.load(file, network(folder)) for file in ("d.ce", "by-itself.ce"))
    assert found.learned().shape == (1, 8, 8)
    assert found.threshold == pytest.approx(asked.threshold)


def test_a_record_of_the_user_s_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.ce.json").write_text("mine")
    assert main(["detect", "fit", "clean", *NETWORK, "--out", "mine.ce", "--quiet"]) == 1
    assert "a file without a record beside it, but got 'mine.ce.json'" in capsys.readouterr().err
    assert (folder / "mine.ce.json").read_text() == "mine"
    assert not (folder / "mine.ce").exists()


def test_a_folder_survives_its_worst_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inbox = folder / "inbox"
    inbox.mkdir()
    for name in ("0500.png", "0501.png"):
        (inbox / name).write_bytes((folder / "test" / name).read_bytes())
    (inbox / "0502.png").write_bytes((folder / "test" / "0502.png").read_bytes()[:60])
    (inbox / "empty.png").touch()
    (inbox / os.fsdecode(b"caf\xe9\n=.jpg")).write_text("no picture")
    Image.new("L", (1, 900)).save(inbox / "thread.png")
    words = ["detect", "score", "inbox", *NETWORK, "--detector", "d.ce", "--out", "survived", "--quiet"]
    assert main(words) == 3
    rows = rows_of(folder / "survived" / "scores.csv")
    assert [row["file"] for row in rows if row["score"]] == ["0500.png", "0501.png"]
    unreadable = {row["file"]: row["unreadable"] for row in rows if not row["score"]}
    assert unreadable.keys() == {"0502.png", "empty.png", r"caf\xe9\n=.jpg", "thread.png"}
    assert "truncated" in unreadable["0502.png"]
    assert "200 times" in unreadable["thread.png"]
    manifest = json.loads((folder / "survived" / "manifest.json").read_text())
    assert manifest["inputs"]["unreadable"] == manifest["findings"]["unreadable"] == unreadable
    assert "4 pictures could not be read" in (folder / "survived" / "alarms.html").read_text()
    assert capsys.readouterr().err.count("ce-plugin: warning: left out: ") == 4
    for file in ("0500.png", "0501.png"):
        (inbox / file).unlink()
    assert main([*words[:-3], "--out", "none", "--quiet"]) == 1
    assert not (folder / "none").exists()


FIT = ("detect", "fit", "clean", *NETWORK, "--out", "new.ce")
SCORE = ("detect", "score", "test", *NETWORK, "--out", "new", "--detector")
EVALUATE = ("detect", "evaluate", "test", *NETWORK, "--out", "new", "--detector", "d.ce")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            (*FIT, "--grayscale", "--model", "tiny_digits:colour", "--weights", "DEFAULT"),
            "takes pictures of shape (1, 1, 8, 8), but got the error RuntimeError",
        ),
        ((*FIT, "--grayscale", "--out", "no/folder/d.ce"), "a file in an existing folder"),
        ((*FIT, "--grayscale", "--fpr", "0.001"), "what 75 calibration images can resolve"),
        ((*FIT, "--grayscale", "--labels", "none.csv"), "a CSV table with the columns file and label"),
        ((*FIT, "--grayscale", "--labels", "truth.csv"), "with file, class"),
        (("detect", "fit", "test", *NETWORK, "--grayscale", "--out", "new.ce"), "19 or more"),
        (("detect", "fit", "none", *NETWORK, "--grayscale", "--out", "new.ce"), "existing files or folders"),
        (("detect", "fit", "clean", "clean/0300.png", *NETWORK, "--grayscale", "--out", "new.ce"), "several times"),
        ((*SCORE, "none.ce"), "CausalEffectDetector.save"),
        ((*SCORE, "weights.pt"), "CausalEffectDetector"),
        ((*SCORE, "d.ce", "--size", "10"), "takes pictures of shape (1, 3, 10, 10), but got the error RuntimeError"),
        ((*SCORE, "d.ce", "--value-range", "0,255"), "`value_range`"),
        ((*SCORE, "d.ce", "--weights", "DEFAULT"), "the network that the detector was fitted on"),
        ((*SCORE, "d.ce", "--normalization", "0.5/0.5"), "answers a test image otherwise"),
        ((*SCORE, "d.ce", "--fpr", "0.001"), "what 75 calibration images can resolve"),
        ((*SCORE, "d.ce", "--layer", "features.9"), "`layer`"),
        ((*EVALUATE, "--truth", "half.csv"), "a class for every picture, but got none for '0501.png'"),
        ((*EVALUATE, "--truth", "odd.csv"), "`truth`"),
        (("detect", "evaluate", "clean", *EVALUATE[3:]), "that the detector was not fitted on"),
    ],
)
def test_mistakes_get_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    lines = (folder / "truth.csv").read_text().splitlines()
    (folder / "half.csv").write_text("\n".join(lines[:2]) + "\n")
    (folder / "odd.csv").write_text("\n".join(lines[:-1] + ["0559.png,dog"]) + "\n")
    assert main([*words, "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("ce-plugin: error: Expected argument ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (folder / "new.ce").exists()
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["detect"], "Missing command"),
        (["detect", "fit", "clean"], "--out"),
        (["detect", "score", "test"], "--detector"),
        (["detect", "evaluate", "test", "--detector", "d.ce", "--attacks", "pdg"], "'pdg' is not one of"),
        (["detect", "fit", "clean", "--out", "d", "--fpr", "1"], "1 is all of it"),
        (["detect", "fit", "clean", "--out", "d", "--attacks", "adaptive"], "'adaptive' is not one of"),
    ],
)
def test_words_that_are_not_understood(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(words) == 2
    assert message in unboxed(capsys.readouterr().err)


def test_gray_pictures_keep_their_values_and_colours_their_order(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "levels.png")
    net = VisionModel(torch.nn.Flatten(), framing=Framing(16), value_range=(0.0, 255.0))
    in_gray = replace(net, grayscale=True)
    assert torch.equal(Pictures([tmp_path], in_gray).all()[0, 0], torch.from_numpy(levels).float())
    Image.new("RGB", (16, 16), (10, 20, 30)).save(tmp_path / "colour.png")
    colour = Pictures([tmp_path / "colour.png"], net)
    assert colour.all()[0, :, 0, 0].tolist() == [10.0, 20.0, 30.0]
    gray = Pictures([tmp_path / "colour.png"], in_gray)
    assert gray.all()[0, :, 0, 0].tolist() == [round(0.299 * 10 + 0.587 * 20 + 0.114 * 30)]


def test_a_table_finds_pictures_by_path_and_by_file_name(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("\ufefffile,label\na/one.png,0\nb/one.png,1\ntwo.png,1\n", encoding="utf-8")
    assert column_of(table, ["b/one.png", "deep/two.png"], "label", "labels") == ["1", "1"]
    table.write_text(csv_text(["file", "label"], [["=one.png", "0"], ["two.png", "1"]]))
    assert column_of(table, ["=one.png", "two.png"], "label", "labels") == ["0", "1"]
    table.write_text("file,label\na/one.png,0\nb/one.png,1\n")
    with pytest.raises(FileError, match=r"none for 'one\.png'"):  # two pictures are called so
        column_of(table, ["one.png"], "label", "labels")


# --- interrupted runs ------------------------------------------------------------------------------------------------


def stop_at(patch: pytest.MonkeyPatch, owner: type, method: str, count: int) -> list[int]:
    """Interrupt the run at one of the calls of a method; returns the calls so far."""
    calls: list[int] = []
    original = getattr(owner, method)

    def counted(*args: object, **options: object) -> object:
        calls.append(len(calls))
        if len(calls) == count:
            raise KeyboardInterrupt
        return original(*args, **options)

    patch.setattr(owner, method, counted)
    return calls


def test_an_interrupted_fit_is_taken_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ce_plugin.detection.checkpoint._SHARD", 128)
    fit = ["detect", "fit", "clean", *NETWORK, "--grayscale", "--out", "again.ce", "--quiet"]
    seeded = [*fit, "--seed", "3"]
    with monkeypatch.context() as patch:
        calls = stop_at(patch, Signature, "_measured", 3)
        assert main(seeded) == 130
        assert "What was done is in" in (said := capsys.readouterr().err)
        assert "add --resume" in said
        assert main(seeded) == 1
        assert "Go on from it with --resume" in capsys.readouterr().err
        assert main([*fit, "--resume", "--seed", "4"]) == 1
        assert "`checkpoint` to be one" in capsys.readouterr().err
        assert main([*seeded, "--resume"]) == 0
        assert len(calls) == 3 + 3, "two of the five parts are not measured again"
    assert not Path("again.ce.checkpoint").exists()
    one, other = (CausalEffectDetector.load(name, network(folder)).learned() for name in ("again.ce", "d.ce"))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert main([*seeded, "--force", "--resume"]) == 1
    assert "There is nothing to go on from" in capsys.readouterr().err


def test_an_interrupted_evaluation_is_taken_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["detect", "evaluate", "test", *NETWORK, "--detector", "d.ce", "--attacks", "fgsm", "pgd", "--quiet"]
    assert main([*words, "--out", "whole"]) == 0
    assert not Path("whole.checkpoint").exists()
    monkeypatch.setattr("ce_plugin.detection.checkpoint._SHARD", 32)
    with monkeypatch.context() as patch:
        calls = stop_at(patch, Adversarial, "perturb", 2)
        scores = stop_at(patch, evaluation, "scored", 10**9)
        assert main([*words, "--out", "taken-up"]) == 130
        before = len(scores)
        assert before > 1
        assert "add --resume" in capsys.readouterr().err
        assert main([*words, "--out", "taken-up", "--resume", "--seed", "4"]) == 1
        assert main([*words, "--out", "taken-up", "--resume", "--fpr", "0.2"]) == 1
        assert main([*words, "--out", "taken-up", "--resume"]) == 0
        assert len(calls) == 3, "the first attack is not made again"
        resumed = len(scores) - before
        assert main([*words, "--out", "again"]) == 0
        assert len(scores) - before - resumed == before + resumed, "nothing is scored again"
    assert not Path("taken-up.checkpoint").exists()
    assert Path("taken-up/evaluation.csv").read_text() == Path("whole/evaluation.csv").read_text()


def test_epochs_are_as_many_as_were_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[str] = []
    monkeypatch.setattr("ce_plugin.cli._detect.CausalEffectDetector.fit", lambda *_, **__: steps.append("fit") or 1 / 0)
    fit = ["detect", "fit", "clean", *NETWORK, "--grayscale", "--out", "epochs.ce"]
    signature = Signature([Denoising(), CounterAttack()])
    monkeypatch.setattr(Signature, "small_images", classmethod(lambda cls, value_range=(0.0, 1.0): signature))
    for words, said in (([], "800 steps of 64"), (["--epochs", "3"], "8 steps of 64 pictures; fewer than 800 seldom")):
        with pytest.raises(ZeroDivisionError):
            main([*fit, *words, "--force"])
        assert f"Training, denoising: {said}" in capsys.readouterr().out
    quick_signature(monkeypatch)
    assert main([*fit, "--epochs", "3", "--force"]) == 1
    assert "`epochs` to be left out for pictures of 8 pixels" in capsys.readouterr().err
    assert steps == ["fit", "fit"]
