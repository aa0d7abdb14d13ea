"""The commands about layers: nodes and map. Numbers are those of the library, or of a closed form."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import unboxed

from ce_plugin import CausalEffectMap, CausalMediation, LayerCausalEffect
from ce_plugin.cli import main
from ce_plugin.datasets import read_image
from ce_plugin.models import VisionModel, load_model

FACTORY = """
import torch
from torch import nn
from ce_plugin.models import Framing, VisionModel

def full():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(8, 4))
    with torch.no_grad():
        net[6].weight.mul_(30)
    return VisionModel(net, "tiny", Framing(28), class_names=("cat", "dog", "bird", "fish"))
"""
FULL = ("--model", "tiny_layers:full", "--quiet")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    for name in ("one.png", "pictures/two.png", "pictures/below/three.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "tiny_layers.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_layers", raising=False)
    return tmp_path


@pytest.fixture
def net(folder: Path) -> VisionModel:
    return load_model("tiny_layers:full")


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open() as text:
        return list(csv.DictReader(text))


def test_nodes_are_the_contributions_of_the_library(folder: Path, net: VisionModel) -> None:
    assert main(["nodes", "one.png", *FULL, "--classes", "all"]) == 0
    rows = _rows(folder / "ce-plugin-nodes" / "nodes.csv")
    assert len(rows) == 8 * 4
    inputs = net.inputs([read_image("one.png")])
    contribution = LayerCausalEffect(net.model, "2", outcome="log_odds").estimate(inputs).contribution[0]
    for row in rows:
        value = float(contribution[int(row["channel"]), int(row["class"])])
        assert float(row["contribution_clean"]) == pytest.approx(value, abs=1e-6)
        assert row["class_name"] == ("cat", "dog", "bird", "fish")[int(row["class"])]
    assert Image.open(folder / "ce-plugin-nodes" / "nodes.png").size[0] > 300


def test_nodes_rank_by_the_size_of_the_contribution(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nodes", "one.png", *FULL[:2], "--top", "3", "--target", "bird"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Layer 2: 8 trials")
    assert "log-odds of bird" in shown
    manifest = json.loads((folder / "ce-plugin-nodes" / "manifest.json").read_text())
    assert (manifest["arguments"]["command"], manifest["arguments"]["classes"]) == ("nodes", 3)
    listed = manifest["findings"]["channels"]
    assert len(listed) == 3
    rows = _rows(folder / "ce-plugin-nodes" / "nodes.csv")
    assert {row["class_name"] for row in rows} == {"bird"}
    by_size = sorted(rows, key=lambda row: -abs(float(row["contribution_clean"])))
    assert [one["channel"] for one in listed] == [row["channel"] for row in by_size[:3]]


def test_an_attack_stands_beside_and_its_carriers_are_named(folder: Path, net: VisionModel) -> None:
    assert main(["nodes", "one.png", *FULL, "--given", "fgsm", "--outcome", "logit"]) == 0
    out = folder / "ce-plugin-nodes"
    assert {"contribution_clean", "contribution_fgsm"} <= _rows(out / "nodes.csv")[0].keys()
    carriers = _rows(out / "carriers.csv")
    shares = [float(row["share_of_total_effect"]) for row in carriers]
    assert shares == sorted(shares, reverse=True)
    assert len(carriers) == 8
    # What follows the layer is not linear (a ReLU), so that shares need not add up to 1; they are near it here.
    found = json.loads((out / "manifest.json").read_text())["findings"]["carried"]
    inputs = net.inputs([read_image("one.png")])
    target = int(net.model(inputs).argmax())
    from ce_plugin.interventions import Adversarial

    attacked = Adversarial.fgsm(net.model, eps=8 / 255).perturb(inputs, ids=[0])
    mediation = CausalMediation(net.model, "2", attacked).estimate(inputs, target)
    assert found["total_effect"] == pytest.approx(float(mediation.total), rel=1e-4)
    best = int((mediation.indirect[0, :, 0] / mediation.total[0, 0]).argmax())
    assert found["channels"][0]["channel"] == str(best)
    assert 1 <= found["channels_needed"]["0.5"] <= found["channels_needed"]["0.9"] <= 8
    assert found["chosen_and_tested_on"] == "the same image"


@pytest.mark.parametrize("kind", ["mean", "resample"])
def test_reference_pictures(folder: Path, kind: str) -> None:
    assert main(["nodes", "one.png", *FULL, "--intervention", kind, "--reference", "pictures"]) == 0
    text = (folder / "ce-plugin-nodes" / "nodes.csv").read_text()
    assert main(["nodes", "one.png", *FULL, "--force"]) == 0
    assert (folder / "ce-plugin-nodes" / "nodes.csv").read_text() != text


def test_tables_by_their_suffix(folder: Path) -> None:
    words = ["nodes", "one.png", *FULL, "--given", "fgsm"]
    assert main(words) == 0
    assert main([*words, "--tables", "json", "--out", "again"]) == 0
    assert not list((folder / "again").glob("*.csv"))
    for name in ("nodes", "carriers"):
        rows = json.loads((folder / "again" / f"{name}.json").read_text())
        text = [{key: str(value) for key, value in row.items()} for row in rows]
        assert text == _rows(folder / "ce-plugin-nodes" / f"{name}.csv")
    assert 'tables = "json"' in (folder / "again" / "run.toml").read_text()


def test_the_same_words_give_the_same_numbers(folder: Path) -> None:
    for out in ("a", "b"):
        assert main(["nodes", "one.png", *FULL, "--given", "pgd", "--seed", "3", "--out", out]) == 0
    for name in ("nodes.csv", "carriers.csv"):
        assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()


@pytest.mark.parametrize(("words", "contrast"), [([], None), (["--contrast", "others"], "others")])
def test_map_is_that_of_the_library(folder: Path, net: VisionModel, words: list[str], contrast: str | None) -> None:
    assert main(["map", "one.png", *FULL, "--target", "dog", *words]) == 0
    arrays = np.load(folder / "ce-plugin-map" / "maps.npz")
    inputs = net.inputs([read_image("one.png")])
    own = CausalEffectMap(net.model, "2").attribute(inputs, 1, contrast=contrast)[0, 0].double()
    assert torch.allclose(torch.from_numpy(arrays["clean_effect_map"]), own, atol=1e-6)
    assert arrays["clean_effect_map_enlarged"].shape == arrays["clean_grad_cam"].shape == (28, 28)
    assert Image.open(folder / "ce-plugin-map" / "map.png").size[0] > 600


def test_map_under_attack_tells_how_far_it_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--given", "bim", "--contrast", "dog", "--contrast", "3", "--target", "cat", "--weighting", "activation"]
    assert main(["map", "one.png", *FULL[:2], *words]) == 0
    shown = capsys.readouterr().out
    assert "Map of: cat rather than dog, fish" in shown
    assert "Under BIM: " in shown
    arrays = np.load(folder / "ce-plugin-map" / "maps.npz")
    assert {"clean_effect_map", "bim_effect_map", "bim_grad_cam"} <= set(arrays)
    findings = json.loads((folder / "ce-plugin-map" / "manifest.json").read_text())["findings"]
    assert -1 <= findings["rank_correlation_with_clean"]["effect_map"] <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nodes", "none.png"], "an existing file, but got 'none.png'"),
        (["nodes", "one.png", *FULL, "--layer", "77"], "`layer`"),
        (["nodes", "one.png", *FULL, "--target", "brid"], "Did you mean 'bird'?"),
        (["nodes", "one.png", *FULL, "--target", "9"], "from 0 to 3, but got 9"),
        (["nodes", "one.png", *FULL, "--intervention", "mean"], "a folder of pictures for --intervention mean"),
        (["nodes", "one.png", *FULL, "--reference", "pictures"], "left out with --intervention zero"),
        (
            ["nodes", "one.png", *FULL, "--intervention", "mean", "--reference", "none"],
            "an existing folder of pictures",
        ),
        (["map", "one.png", *FULL, "--layer", "6"], "maps (N, C, h, w)"),
        (["map", "one.png", *FULL, "--contrast", "others", "--contrast", "dog"], "others, or classes"),
        (["map", "one.png", *FULL, "--target", "dog", "--contrast", "dog"], "not the target 1, but got 1"),
        (["map", "one.png", *FULL, "--contrast", "dgo"], "Did you mean 'dog'?"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("ce-plugin: error: Expected argument ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (folder / f"ce-plugin-{words[0]}").exists()


@pytest.mark.parametrize("command", ["nodes", "map"])
def test_existing_results_are_refused_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    import ce_plugin.cli._nodes as nodes

    out = folder / f"ce-plugin-{command}"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with monkeypatch.context() as patch:
        patch.setattr(nodes, "read_image", lambda file: pytest.fail("work was done"))
        assert main([command, "one.png", *FULL]) == 1
    assert "--force" in capsys.readouterr().err
    assert main([command, "one.png", *FULL, "--force"]) == 0
    assert (out / "mine.txt").read_text() == "keep"


def test_words_that_are_not_understood(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["nodes", "one.png", "--classes", "some"], "some is not a positive whole number"),
        (["nodes", "one.png", "--classes", "2", "--target", "cat"], "--classes is not allowed with --target"),
        (["map", "one.png", "--weighting", "both"], "'both' is not one of 'change', 'activation'"),
    ):
        assert main(words) == 2
        assert message in unboxed(capsys.readouterr().err)
