"""``ce-plugin compare`` from the command line: tables, page, resumption, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ce_plugin.cli import main

NETWORK = '''
import torch
from torch import nn
from ce_plugin.models import Framing, VisionModel

def net(outputs=4):
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, outputs)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[4].weight.mul_(20)
    return VisionModel(model, name="tiny", framing=Framing(16))

def answers():
    """One class for each colour, and one for dark pictures."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Identity())
    with torch.no_grad():
        model[0].weight.copy_(torch.cat([torch.eye(3), -torch.ones(1, 3)])[:, :, None, None] * 5)
        model[0].bias.copy_(torch.tensor([0.0, 0.0, 0.0, 3.5]))
    return VisionModel(model, name="colours", framing=Framing(16))

def one():
    return net(1)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures of four colours, and networks."""
    (tmp_path / "nets.py").write_text(NETWORK)
    draw = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for k in range(8):
        pixels = draw.integers(0, 60, (20, 20, 3))
        if k % 4 < 3:
            pixels[5:15, 5:15, k % 4] += 180
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> int:
    return main(["compare", "photos", "--model", "nets.py:answers", "--quiet", *words])


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_two_pictures_end_to_end_and_more_later(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--methods", "grad-cam,rise", "--passes", "12", "--planted", "2", "--out", "run")
    assert run(*words, "--images", "2") == 0
    table = rows(folder / "run" / "compare.csv")
    assert {row["method"] for row in table} == {"Grad-CAM", "RISE", "random", "centre"}
    assert {row["measure"] for row in table} == {
        "insertion - deletion, shared",
        "insertion - deletion, unshared",
        "insertion",
        "deletion",
        "grid pointing",
        "passes",
        "seconds",
        "correlation with planted truth",
    }
    passes = {row["method"]: float(row["mean"]) for row in table if row["measure"] == "passes"}
    assert passes["RISE"] == 12
    assert passes["random"] == 0
    assert len(rows(folder / "run" / "images.csv")) == 4 * (2 + 2)
    page = (folder / "run" / "compare.html").read_text()
    assert "grid pointing" in page
    assert "12 passes" in page
    assert json.loads((folder / "run" / "compare.json").read_text())["model"] == "colours"
    before = (folder / "run" / "records.jsonl").read_text()

    assert run(*words, "--images", "2") == 1  # it exists
    assert run(*words, "--images", "3", "--resume") == 0
    after = (folder / "run" / "records.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == len(before.splitlines()) + 4
    capsys.readouterr()
    assert run(*words[:2], "--passes", "13", "--planted", "2", "--out", "run", "--resume") == 1
    assert "passes 12, not 13" in capsys.readouterr().err
    assert run("--methods", "rise", "--passes", "13", "--images", "2", "--planted", "0", "--out", "run", "--force") == 0
    assert len(rows(folder / "run" / "images.csv")) == 3 * 2


def test_few_pictures_are_compared_without_mosaics(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in range(2, 8):
        (folder / "photos" / f"{k}.png").unlink()
    words = ("--methods", "grad-cam", "--planted", "0", "--passes", "12")
    assert run(*words) == 0
    assert "fewer than 4 different answers: the measure pointing is left out" in capsys.readouterr().err
    measures = {row["measure"] for row in rows(folder / "ce-plugin-compare" / "compare.csv")}
    assert "insertion - deletion, shared" in measures
    assert "grid pointing" not in measures
    assert run(*words, "--measures", "pointing", "--out", "again") == 1  # who asks for it is told
    assert "pictures of 4 different answers" in capsys.readouterr().err
    (folder / "photos" / "1.png").unlink()
    assert run(*words, "--out", "alone") == 1
    assert "two pictures or more, but got 1. Name more pictures." in capsys.readouterr().err


def test_pictures_that_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (folder / "photos" / "3.png").read_bytes()
    (folder / "photos" / "3.png").write_bytes(whole[: len(whole) // 2])
    words = ("--methods", "saliency", "--measures", "faithfulness", "--planted", "0")
    assert run(*words, "--images", "8", "--out", "a") == 3
    assert "left out: 3.png" in capsys.readouterr().err
    assert len(rows(folder / "a" / "images.csv")) == 3 * 7
    assert list(json.loads((folder / "a" / "manifest.json").read_text())["inputs"]["unreadable"]) == ["3.png"]
    assert run(*words, "--images", "8", "--out", "b", "--strict") == 1
    assert "3.png" in capsys.readouterr().err


def test_boxes_are_framed_as_the_pictures_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "boxes.csv").write_text("file,x,y,width,height\n" + "".join(f"{k}.png,5,5,10,10\n" for k in (0, 1, 4)))
    words = ("--methods", "occlusion", "--planted", "0", "--images", "8")
    assert run(*words, "--measures", "boxes", "--boxes", "boxes.csv", "--out", "a") == 0
    found = {row["method"]: row for row in rows(folder / "a" / "compare.csv") if row["measure"] == "share in boxes"}
    assert found["random"]["images"] == "3"
    assert float(found["random"]["mean"]) == pytest.approx(0.25, abs=0.05)  # 8 x 8 of 16 x 16
    assert float(found["Occlusion"]["mean"]) > 0.3
    assert run(*words, "--measures", "boxes", "--out", "b") == 1
    assert "boxes" in capsys.readouterr().err
    (folder / "boxes.csv").write_text("file,x,y,width,height\n0.png,5,5,ten,10\n")
    assert run(*words, "--measures", "boxes", "--boxes", "boxes.csv", "--out", "b") == 1
    assert "line 2" in capsys.readouterr().err
    (folder / "boxes.csv").write_text("file,x,y\n0.png,5,5\n")
    assert run(*words, "--measures", "boxes", "--boxes", "boxes.csv", "--out", "b") == 1
    assert "no width, height" in capsys.readouterr().err


def test_all_measures_of_a_network_with_one_output(folder: Path) -> None:
    words = ["compare", "photos", "--model", "nets.py:one", "--outcome", "sigmoid", "--quiet", "--images", "2"]
    measures = "faithfulness,infidelity,sensitivity,randomisation,stability"
    options = ["--methods", "integrated-gradients", "--measures", measures, "--planted", "0", "--out", "a"]
    assert main([*words, *options]) == 0
    assert {row["measure"] for row in rows(folder / "a" / "compare.csv")} >= {
        "infidelity",
        "max-sensitivity",
        "|rank correlation|, shuffled weights",
        "rank correlation, FGSM",
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--methods", "sailency"], "saliency"),
        (["--measures", "faithfullness"], "faithfulness"),
        (["--model", "nets.py:one", "--outcome", "sigmoid", "--measures", "pointing"], "of 4 different answers"),
        (["--measures", "faithfulness", "--boxes", "boxes.csv"], "boxes"),
    ],
)
def test_what_is_refused(words: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "boxes.csv").write_text("file,x,y,width,height\n")
    assert run(*words, "--images", "2", "--out", "a") == 1
    assert says in capsys.readouterr().err
    assert not (folder / "a" / "compare.csv").exists()
