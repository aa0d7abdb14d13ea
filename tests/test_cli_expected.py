"""The command ``expected``: a table of a folder of pictures, and what it answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ce_plugin.cli import main
from ce_plugin.expected import EffectTable

_NETWORK = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 2))

class Own(nn.Module):
    # A class that no other process can import.
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return self.inner(x)

def own():
    return Own()

def one():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 1))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(_NETWORK)
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(6):
            pixels = random.integers(0, 256, (20, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> int:
    return main(["expected", *words])


OPTIONS = ("pets", "--model", "nets.py:net", "--size", "16", "--layer", "1", "--given", "clean,pwm,fgsm", "--quiet")


def test_a_table_and_its_answers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*OPTIONS, "--out", "run", "--shard-size", "5") == 0
    table = EffectTable("run")
    assert (len(table), table.evidences) == (12, ("clean", "pwm", "fgsm"))
    assert table.outcomes == ("log_odds", "probability", "prediction_weighted")
    frame = table.images()
    assert frame[frame["evidence"] == "clean"]["path"].tolist()[:2] == ["cat/0.png", "cat/1.png"]
    assert set(frame["label"]) == {0, 1}
    assert len(pd.read_parquet("run/rows")) == 36
    capsys.readouterr()
    assert call("show", "run", "--out", "page", "--top", "3") == 0
    shown = capsys.readouterr().out
    assert "log_odds: mean of 12 pictures" in shown
    answer = table.expected("log_odds")
    unit = int(answer.effect[0].abs().argmax())
    assert f"{answer.effect[0, unit, 0]:+.4g}" in shown
    page = Path("page/expected.html").read_text()
    assert "Which units matter over the data set?" in page
    assert "prediction_weighted" in page
    rows = pd.read_csv("page/expected.csv")
    assert set(rows["evidence"]) == {"clean", "pwm", "fgsm"}
    assert len(rows) == 3 * 3 * 6
    record = json.loads(Path("page/manifest.json").read_text())
    assert record["findings"]["configuration"]["given"]["clean"] == "none"
    assert call("show", "run", "--out", "b", "--reading", "B", "--correct", "--outcome", "log_odds") == 0
    assert set(pd.read_csv("b/expected.csv")["evidence"]) == {"pwm", "fgsm"}
    assert call("show", "run", "--out", "c", "--target", "0") == 1  # which is no answer of the network
    assert "a class that the table has" in capsys.readouterr().err


def test_resume_force_and_what_differs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*OPTIONS, "--out", "run", "--limit", "4") == 0
    assert call(*OPTIONS, "--out", "run") == 1
    assert "--force" in capsys.readouterr().err
    assert call(*OPTIONS, "--out", "run", "--resume") == 0
    assert len(EffectTable("run")) == 12
    assert call(*OPTIONS, "--out", "run", "--resume", "--seed", "1") == 1
    assert "seed is 0 there and 1 here" in capsys.readouterr().err
    assert call(*OPTIONS, "--out", "run", "--force", "--seed", "1", "--limit", "3") == 0
    assert EffectTable("run").configuration["seed"] == 1
    assert len(EffectTable("run")) == 3


def test_broken_pictures_are_left_out_or_stop_the_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Path("pets/cat/3.png").read_bytes()
    Path("pets/cat/3.png").write_bytes(whole[: len(whole) // 2])
    assert call(*OPTIONS, "--out", "run") == 3
    assert "left out: cat/3.png" in capsys.readouterr().err
    assert pd.read_csv("run/skipped.csv")["picture"].tolist() == ["cat/3.png"]
    assert len(EffectTable("run")) == 11
    assert call(*OPTIONS, "--out", "strict", "--strict") == 1
    Path("pets/cat/3.png").write_bytes(whole)
    # The folder is another one now.
    assert call(*OPTIONS, "--out", "run", "--resume") == 1


def test_one_output_and_patches_of_the_input(place: Path) -> None:
    gray = ("pets", "--model", "nets.py:one", "--size", "16", "--quiet", "--limit", "3")
    assert call(*gray, "--layer", "1", "--out", "one") == 0
    assert EffectTable("one").outcomes == ("sigmoid", "logit")
    several = (*OPTIONS[:5], "--layer", "1", "--given", "clean,fgsm", "--outcome", "sigmoid", "--quiet", "--limit", "3")
    assert call(*several, "--out", "labels") == 0
    assert "multi_label=True" in EffectTable("labels").configuration["given"]["fgsm"]
    words = (*OPTIONS[:5], "--input", "--trials", "60", "--limit", "2", "--quiet", "--classes", "all", "--out", "input")
    assert call(*words) == 0
    table = EffectTable("input")
    assert len(table.unit_labels) == 14 * 14
    assert table.expected("log_odds", target="all").effect.shape == (1, 196, 2)


def test_what_is_wrong_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = OPTIONS[:7]
    for words, said in (
        (("nowhere", *base[1:]), "does not exist"),
        ((*base, "--given", "clean,fog"), "'fog'"),
        ((*base, "--outcome", "odds"), "Did you mean 'log_odds'"),
        ((*base, "--classes", "cat"), "class"),
        ((*OPTIONS[:5], "--layer", "9"), "9"),
    ):
        assert call(*words, "--out", "x", "--quiet") == 1
        assert said in capsys.readouterr().err
        assert not Path("x").exists()
    assert call(*base, "--input") == 2
    Path("pets/hen").mkdir()
    Path("pets/hen/1.png").write_bytes(Path("pets/cat/1.png").read_bytes())
    assert call(*base, "--out", "x", "--quiet") == 1
    assert "3 classes" in capsys.readouterr().err
    assert call(*base, "--out", "x", "--quiet", "--no-labels") == 0
    assert call("show", "nowhere", "--out", "y") == 1
    assert "the folder of a run" in capsys.readouterr().err
    torch.manual_seed(0)


@pytest.mark.slow
def test_workers_of_ray_have_a_network_of_a_file(place: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra [cluster]")
    words = ("pets", "--model", "nets.py:own", "--size", "16", "--layer", "inner.1", "--quiet")
    assert call(*words, "--out", "here") == 0
    assert call(*words, "--out", "there", "--engine", "ray", "--workers", "2", "--shard-size", "4") == 0
    one, two = EffectTable("here").expected(), EffectTable("there").expected()
    assert torch.allclose(one.effect, two.effect, rtol=0, atol=1e-6 * float(one.effect.abs().max()))
