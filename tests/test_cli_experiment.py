"""The command ``experiment``: a recipe from start to page, resumed, and what is refused before any work."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ce_plugin.cli import main
from ce_plugin.cli._experiment import source_of
from ce_plugin.cli._recipe import packaged, read_recipe
from ce_plugin.expected import EffectTable
from ce_plugin.randomness import numpy_generator

_NETWORK = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 2))
"""

_RECIPE = """
title = "Dark and bright"
batch_size = 7

[data]
source = "pets"

[network]
model = "nets.py:net"
size = 12

[network.training]
source = "pets"
epochs = 40
rate = 0.02
batch_size = 8
least_accuracy = 0.6

[evidences]
clean = {}
PWM = { mask = 0.2 }
FGSM = { attack = "fgsm", eps = 0.2 }

[[sites]]
layer = "1"
nodes = [2, 4]

[[sites]]
layer = "1"
nodes = [1]
concepts = 3

[autoencoder]
images = 20
epochs = 3
least_fidelity = 0.0

[questions]
detector = true
largest = true
"""

# Of one site, clean and masked, one outcome: what a run takes is mostly its plots.
_SMALL = (
    _RECIPE.replace('FGSM = { attack = "fgsm", eps = 0.2 }\n', "")
    .replace('[[sites]]\nlayer = "1"\nnodes = [2, 4]\n', "")
    .replace("detector = true\nlargest = true", 'outcomes = ["log_odds"]\nreadings = ["A"]')
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(_NETWORK)
    (tmp_path / "mine.toml").write_text(_RECIPE)
    random = np.random.default_rng(0)
    for name, top in (("dark", 170), ("light", 256)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(12):
            pixels = random.integers(top - 170, top, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CE_PLUGIN_DATA", raising=False)
    return tmp_path


def call(*words: str) -> int:
    return main(["experiment", *words, "--quiet"])


def test_from_a_recipe_to_the_page(place: Path) -> None:
    before = torch.get_rng_state()
    assert call("./mine.toml", "--data", ".", "--out", "run") == 0
    assert torch.equal(torch.get_rng_state(), before)
    rows = pd.read_csv("run/experiment.csv")
    assert set(rows["site"]) == {"1", "1, code of 3"}
    assert {"node 2", "node 4", "node 1", "mean of all nodes", "inserting the autoencoder"} <= set(rows["what"])
    assert {"clean", "PWM", "FGSM", "PWM - clean", "FGSM - clean", "FGSM / clean"} <= set(rows["evidence"])
    assert (rows["low"] <= rows["effect"]).all()
    assert (rows["effect"] <= rows["high"]).all()

    # The numbers are the table's.
    table = EffectTable("run/tables/1")
    for outcome, reading in (("log_odds", "A"), ("log_odds", "B"), ("prediction_weighted", "A")):
        answer = table.expected(outcome, reading=reading)  # type: ignore[arg-type]
        low, high = answer.confidence_interval(0.95)
        for e, evidence in enumerate(answer.evidences):
            one = rows[(rows["site"] == "1") & (rows["reading"] == reading) & (rows["outcome"] == outcome)]
            (one,) = one[(one["what"] == "node 4") & (one["evidence"] == evidence)].to_dict("records")
            wanted = [float(x[e, 4, 0]) for x in (answer.effect, low, high)]
            assert [one["effect"], one["low"], one["high"]] == pytest.approx(wanted, abs=1e-9)

    # The mean over nodes, by hand.
    _, values = table.values(outcome="log_odds")
    mine = rows[(rows["site"] == "1") & (rows["outcome"] == "log_odds") & (rows["what"] == "mean of all nodes")]
    (got,) = mine[(mine["reading"] == "A") & (mine["evidence"] == "FGSM - clean")]["effect"]
    assert got == pytest.approx(float((values[:, 2] - values[:, 0]).double().mean()), abs=1e-7)

    detector = pd.read_csv("run/detector.csv")
    assert set(detector["attack"]) == {"FGSM"}
    assert {"1 - max softmax", "1 - |p|²", "index, 1, node 2", "index, 1, code of 3, node 1"} <= set(detector["score"])
    frame = table.images().pivot(index="id", columns="evidence", values="predicted")
    labels = table.images().groupby("id")["label"].first()
    fooled = np.array((frame["clean"] == labels) & (frame["FGSM"] != labels))
    (index,) = detector[detector["score"] == "index, 1, node 2"].to_dict("records")
    assert index["pairs"] == fooled.sum() > 2
    size = -table.values(outcome="prediction_weighted")[1][fooled][:, :, 2, 0].abs().double().numpy()
    pairs = [float(a > c) + 0.5 * float(a == c) for a in size[:, 2] for c in size[:, 0]]
    assert index["auroc"] == pytest.approx(np.mean(pairs), abs=1e-9)
    assert index["low"] <= index["auroc"] <= index["high"]
    _check_largest(table)
    record = json.loads(Path("run/experiment.json").read_text())
    assert "95 % interval" in record["facts"]["Network"].replace("95% ", "95 % ")
    page = Path("run/experiment.html").read_text()
    assert "Dark and bright" in page
    assert "inserting the autoencoder" in page
    plots = {file.name for file in Path("run/plots").iterdir()}
    assert {"named.png", "shares.png", "nodes-1-log_odds-A.png", "nodes-1-code-of-3-log_odds-B.png"} <= plots
    assert page.count("data:image/png;base64,") == len(plots)
    text = Path("run/experiment.md").read_text()
    assert all(f"](plots/{name})" in text for name in plots)


def _check_largest(table: EffectTable) -> None:
    """The node is the largest of one half of the images, by hand, and its value is that of the other half."""
    rows = pd.read_csv("run/largest.csv")
    rows = rows[rows["outcome"] == "log_odds"]
    ids, values = table.values(outcome="log_odds")
    effects = values[torch.from_numpy(ids.argsort())][:, 0, :, 0].double()
    own = rows[(rows["site"] == "1") & (rows["evidence"] == "clean")].set_index("images")
    assert own["n_images"].tolist() == [12, 12]
    node = int(own["node"].iloc[0])
    order = numpy_generator(0, "experiment halves", 0).permutation(len(ids))
    chose, other = (effects[torch.from_numpy(half)].mean(0) for half in np.array_split(order, 2))
    assert node == int(chose.abs().argmax())
    assert own.loc["chosen", "effect"] == pytest.approx(float(chose[node]), abs=1e-6)
    assert own.loc["other", "effect"] == pytest.approx(float(other[node]), abs=1e-6)
    # The largest of all sites is the larger of the two.
    first = rows[rows["first"]]
    chosen = rows[(rows["images"] == "chosen") & (rows["evidence"] == "clean")].set_index("site")["effect"].abs()
    assert set(first["site"]) == {chosen.idxmax()}
    assert set(rows["evidence"]) == {"clean", "PWM", "FGSM"}


def test_goes_on_where_it_was(place: Path) -> None:
    Path("mine.toml").write_text(_SMALL)
    assert call("./mine.toml", "--data", ".", "--out", "whole") == 0
    assert call("./mine.toml", "--data", ".", "--out", "parts", "--images", "10") == 0
    made = {file.name: file.stat().st_mtime_ns for file in Path("parts").glob("*.pt")}
    assert len(made) == 2
    assert call("./mine.toml", "--data", ".", "--out", "parts", "--resume") == 0
    assert {file.name: file.stat().st_mtime_ns for file in Path("parts").glob("*.pt")} == made
    whole, parts = (pd.read_csv(f"{folder}/experiment.csv") for folder in ("whole", "parts"))
    np.testing.assert_allclose(whole["effect"], parts["effect"], rtol=1e-4, atol=1e-6)

    # Questions may change; what made the numbers may not.
    Path("mine.toml").write_text(_SMALL + "level = 0.9\n")
    assert call("./mine.toml", "--data", ".", "--out", "parts", "--resume") == 0
    narrower = pd.read_csv("parts/experiment.csv")
    first = narrower["what"] == "node 1"
    assert (narrower["high"] - narrower["low"])[first].sum() < (parts["high"] - parts["low"])[first].sum()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("mask = 0.2", "masks = 0.2", "Did you mean 'mask'"),
        ("epochs = 40", 'epochs = "40"', "a whole number"),
        ('title = "Dark and bright"', "", "`title` to be in the recipe"),
        ('attack = "fgsm"', 'attack = "fgms"', "Did you mean 'fgsm'"),
        ('layer = "1"\nnodes = [2, 4]', 'layer = "1"\nnodes = [2, 6]', "nodes below 6"),
        ('layer = "1"\nnodes = [2, 4]', 'layer = "conv"\nnodes = [2, 4]', "layer"),
        ("concepts = 3", "concepts = 6", "codes below the layer's channels"),
        ('[data]\nsource = "pets"', '[data]\nsource = "pats"', "does not exist"),
        ('[data]\nsource = "pets"', '[data]\nsource = "pets"\nmatched = true', "classes of this data set"),
        ('[data]\nsource = "pets"', '[data]\nsource = "pets"\nimages = 3', "4 or more, for two halves, but got 3"),
        ("clean = {}\n", "", "clean"),
        ("[data]", "[data", "a TOML file"),
    ],
)
def test_refused_before_any_work(
    place: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    assert _RECIPE.count(old) >= 1
    Path("mine.toml").write_text(_RECIPE.replace(old, new))
    assert call("./mine.toml", "--data", ".", "--out", "run") == 1
    assert said in capsys.readouterr().err
    assert not Path("run").exists()


def test_another_recipe_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text(_SMALL)
    assert call("./mine.toml", "--data", ".", "--out", "run", "--images", "4") == 0
    Path("mine.toml").write_text(_SMALL.replace("mask = 0.2", "mask = 0.1"))
    assert call("./mine.toml", "--data", ".", "--out", "run", "--resume") == 1
    assert "evidences.PWM.mask is 0.2 there and 0.1 here" in capsys.readouterr().err
    assert call("./mine.toml", "--data", ".", "--out", "run", "--images", "4", "--force") == 0


def test_a_network_that_is_too_bad(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swapped = Path("swapped")
    Path("pets").rename(swapped)
    for old, new in (("dark", "light"), ("light", "dark")):
        (Path("pets") / new).mkdir(parents=True)
        for file in (swapped / old).iterdir():
            (Path("pets") / new / file.name).write_bytes(file.read_bytes())
    Path("mine.toml").write_text(_RECIPE.replace('[data]\nsource = "pets"', '[data]\nsource = "swapped"'))
    assert call("./mine.toml", "--data", ".", "--out", "run") == 1
    assert "at least 60.0% right" in capsys.readouterr().err


def test_the_recipes_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "--list"]) == 0
    listed = capsys.readouterr().out
    for name, file in packaged().items():
        assert f"{name}: {read_recipe(file).title}" in listed
        assert main(["experiment", name, "--print"]) == 0
        assert capsys.readouterr().out.strip() == file.read_text(encoding="utf-8").strip()
    assert main(["experiment", "tabel3", "--quiet"]) == 1
    assert "Did you mean 'table3'" in capsys.readouterr().err
    assert main(["experiment", "--quiet"]) == 1


def test_missing_data_says_what_to_put_where(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("table3", "--data", "nowhere") == 1
    assert "fashion-mnist" in capsys.readouterr().err


def test_classes_by_name_and_weights_by_hand(place: Path) -> None:
    """Species that the network does not know are left out, and counted; --weights takes the recipe's place."""
    Path("nets.py").write_text(
        _NETWORK
        + """
def named(weights):
    import torch
    from ce_plugin.models import Framing, VisionModel
    made = net()
    made.load_state_dict(torch.load(weights, weights_only=True))
    return VisionModel(made, framing=Framing(12), class_names=("Avis lucida (Light)", "nothing"))
"""
    )
    nets: dict[str, Any] = {}
    exec(_NETWORK, nets)
    torch.manual_seed(0)
    torch.save(nets["net"]().state_dict(), "weights.pt")
    recipe = """
title = "Birds"
[data]
source = "pets"
matched = true
[network]
model = "nets.py:named"
weights = "missing.pt"
[evidences]
clean = {}
[[sites]]
layer = "1"
[questions]
readings = ["A"]
outcomes = ["log_odds"]
"""
    Path("mine.toml").write_text(recipe)
    assert call("./mine.toml", "--data", ".", "--out", "run") == 1
    assert call("./mine.toml", "--data", ".", "--out", "run", "--weights", "weights.pt") == 0
    frame = EffectTable("run/tables/1").images()
    assert set(frame["label"]) == {0}
    assert all(path.startswith("light/") for path in frame["path"])
    facts = json.loads(Path("run/experiment.json").read_text())["facts"]
    assert facts["Images"].startswith("12 of ")
    assert "1 of 2 classes are the network's, and 12 images of the others are left out" in facts["Images"]


def test_an_attack_on_a_network_with_several_labels(place: Path) -> None:
    """Whoever asks several outputs for a sigmoid says that each is a label: all of them are attacked."""
    recipe = _SMALL.replace("PWM = { mask = 0.2 }", 'FGSM = { attack = "fgsm", eps = 0.2 }')
    recipe = recipe.replace("nodes = [1]\nconcepts = 3\n", "").replace("log_odds", "sigmoid")
    Path("mine.toml").write_text(recipe)
    assert call("./mine.toml", "--data", ".", "--out", "run", "--images", "6") == 0
    given = EffectTable("run/tables/1").configuration["given"]
    assert "multi_label=True" in given["FGSM"]
    Path("mine.toml").write_text(recipe.replace("sigmoid", "log_odds"))
    assert call("./mine.toml", "--data", ".", "--out", "classes", "--images", "6") == 0
    assert "multi_label" not in EffectTable("classes/tables/1").configuration["given"]["FGSM"]


@pytest.mark.slow
def test_workers_of_ray_write_the_same_table(place: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra [cluster]")
    Path("mine.toml").write_text(_SMALL)
    assert call("./mine.toml", "--data", ".", "--out", "run") == 0
    assert call("./mine.toml", "--data", ".", "--out", "ray", "--engine", "ray", "--workers", "2") == 0
    one, other = (pd.read_csv(f"{folder}/nodes.csv") for folder in ("run", "ray"))
    np.testing.assert_allclose(one["effect"], other["effect"], atol=1e-6)


def test_images_go_to_workers_once(data_folder: Path) -> None:
    """Not each with the memory of all, of which it is a view."""
    source = source_of("fashion-mnist:test", data_folder)
    image, label = source.item(3)
    assert image.shape == (1, 28, 28)
    assert isinstance(label, int)
    assert len(pickle.dumps(source)) < 2 * 4 * len(source) * 28 * 28  # float32
