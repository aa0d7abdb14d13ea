"""The commands about concepts: a training that can be interrupted, and a page that shows what was found."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import unboxed
from test_cli_layers import FACTORY

import ce_plugin.cli._concepts as command
from ce_plugin.cli import main
from ce_plugin.concepts import ConceptAutoencoder, Fidelity

FULL = ("--model", "tiny_layers:full", "--quiet")
TRAIN = ("concepts", "train", "pictures", *FULL, "--concepts", "2", "--out", "c.pt", "--epochs", "3")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "tiny_layers.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_layers", raising=False)
    return tmp_path


def test_train_writes_an_autoencoder_and_its_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--seed", "4"]) == 0
    assert capsys.readouterr().out == f"Autoencoder: {folder / 'c.pt'}\n"
    loaded = ConceptAutoencoder.load(folder / "c.pt")
    assert (loaded.layer_name, loaded.concepts, len(loaded.history), loaded.seed) == ("2", 2, 3, 4)
    manifest = json.loads((folder / "c.pt.json").read_text())
    assert (manifest["arguments"]["command"], manifest["arguments"]["action"]) == ("concepts", "train")
    assert manifest["findings"]["layer"] == "2"
    assert manifest["findings"]["fidelity"]["n_images"] == 2
    assert not (folder / "c.pt.checkpoint").exists()


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*TRAIN[:-3], "whole.pt", "--epochs", "3"]) == 0
    train = command.train_autoencoder

    def interrupted(*arguments: object, **options: object) -> object:
        train(*arguments, **{**options, "epochs": 1})  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "train_autoencoder", interrupted)
        assert main(list(TRAIN)) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (folder / "c.pt").exists()
    assert main(list(TRAIN)) == 1
    assert "Go on from it with --resume" in capsys.readouterr().err
    assert main([*TRAIN, "--resume"]) == 0
    pair = [ConceptAutoencoder.load(folder / name) for name in ("whole.pt", "c.pt")]
    assert pair[0].history == pair[1].history
    assert not (folder / "c.pt.checkpoint").exists()


def test_show_makes_a_page_a_table_and_a_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(TRAIN)) == 0
    words = ["concepts", "show", "c.pt", *FULL[:2], "--images", "pictures", "--min-fidelity", "0", "--top", "3"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "8 images keep their top class" in shown
    out = folder / "ce-plugin-concepts"
    text = (out / "concepts.html").read_text()
    assert "Which concepts does the layer hold?" in text
    assert "<script" not in text
    assert 'src="http' not in text
    with (out / "concepts.csv").open() as file:
        assert [row["concept"] for row in csv.DictReader(file)] == ["0", "1"]
    findings = json.loads((out / "manifest.json").read_text())["findings"]
    assert findings["fidelity_on_these_pictures"]["n_images"] == 8
    alive = [one for one in findings["concepts"] if one["concept"] not in findings["dead"]]
    assert text.count("<figure>") == sum(len(one["examples"]) for one in alive)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["concepts", "train", "none", *FULL, "--concepts", "2", "--out", "c.pt"], "an existing folder of pictures"),
        ([*TRAIN[:6], "--concepts", "99", "--out", "c.pt"], "below the 8 channels of layer '2'"),
        ([*TRAIN, "--resume"], "There is nothing to go on from"),
        ([*TRAIN[:-3], "no/folder/c.pt"], "a file in an existing folder"),
        ([*TRAIN, "--layer", "77"], "`layer`"),
        (["concepts", "show", "none.pt", *FULL, "--images", "pictures"], "ConceptAutoencoder.save"),
        (["concepts", "show", "tiny_layers.py", *FULL, "--images", "pictures"], "which is none"),
    ],
)
def test_mistakes_get_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("ce-plugin: error: Expected argument ")
    assert message in captured.err
    assert not (folder / "c.pt").exists()


@pytest.mark.parametrize("given", ["inf", "nan", "-1", "much"])
@pytest.mark.parametrize(
    "words", [[*TRAIN, "--lambda-deep"], ["concepts", "show", "c.pt", "--images", "pictures", "--min-fidelity"]]
)
def test_a_weight_is_finite_and_not_negative(capsys: pytest.CaptureFixture[str], words: list[str], given: str) -> None:
    assert main([*words, given]) == 2
    assert f"{given} is not a number that is zero or more" in unboxed(capsys.readouterr().err)


def test_an_autoencoder_that_changes_answers_is_refused_with_the_numbers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ConceptAutoencoder(8, 2).save(folder / "untrained.pt")
    assert main(["concepts", "show", "untrained.pt", *FULL, "--images", "pictures"]) == 1
    assert "that was trained" in capsys.readouterr().err
    assert main(list(TRAIN)) == 0
    poor = ConceptAutoencoder.load("c.pt")
    poor.fidelity = Fidelity(agreement=0.4, kl=1.0, outcome_change=0.3, n_images=10)
    poor.save("poor.pt")
    capsys.readouterr()
    assert main(["concepts", "show", "poor.pt", *FULL, "--images", "pictures"]) == 1
    assert "40.0% of 10 images" in capsys.readouterr().err
    assert not (folder / "ce-plugin-concepts").exists()


def test_an_existing_autoencoder_is_replaced_with_force_only(folder: Path) -> None:
    (folder / "c.pt").write_text("precious")
    assert main(list(TRAIN)) == 1
    assert (folder / "c.pt").read_text() == "precious"
    assert main([*TRAIN, "--force"]) == 0
    assert ConceptAutoencoder.load(folder / "c.pt").concepts == 2
