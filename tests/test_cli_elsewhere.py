"""Networks of other libraries by name, files of options, ``doctor``, folders and patterns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ce_plugin.cli import main
from ce_plugin.errors import FileError, UnknownNameError
from ce_plugin.models import load_model

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NETWORK = """
import torch
from torch import nn

def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3)).eval()
"""
FEW = ["--model", "nets.py:tiny", "--size", "32", "--trials", "40", "--quiet"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a network, and two pictures in a folder."""
    (tmp_path / "nets.py").write_text(NETWORK)
    (tmp_path / "in").mkdir()
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(draw.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "in" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_network_of_timm_comes_with_its_own_preparation() -> None:
    timm = pytest.importorskip("timm")
    net = load_model("timm:mobilenetv3_small_050.lamb_in1k", weights=None)
    config = timm.data.resolve_model_data_config(net.model)
    assert net.framing.size == config["input_size"][-1] == 224
    assert net.framing.resize == int(224 / config["crop_pct"])
    assert net.framing.interpolation == config["interpolation"]
    assert net.normalization.mean == tuple(config["mean"])
    assert net.class_names is not None
    assert net.class_names[0] == "tench"
    # Pixel for pixel as timm's own transform, but for where the crop rounds.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    wanted = timm.data.create_transform(**config)(image)
    found = net.inputs([torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0)])[0]
    assert float((found - wanted).abs().median()) < 0.02
    with pytest.raises(UnknownNameError, match="resnet18"):
        load_model("timm:resnet18s", weights=None)


def test_a_network_of_transformers_is_read_from_its_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=16,
        id2label={0: "cat, a pet", 1: "dog"}, label2id={"cat, a pet": 0, "dog": 1},
    )  # fmt: skip
    network = transformers.ViTForImageClassification(config).eval()
    network.save_pretrained(tmp_path)
    settings = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    transformers.ViTImageProcessor(**settings).save_pretrained(tmp_path)
    net = load_model(f"hf:{tmp_path}")
    assert net.class_names == ("cat", "dog")
    assert (net.framing.size, net.framing.interpolation) == (32, "bicubic")
    assert net.normalization.std == (0.25, 0.25, 0.25)
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(net.model(x), network(x).logits)
    with pytest.raises(FileError, match="can be downloaded or read"):
        load_model(f"hf:{tmp_path / 'no such folder'}")


def test_a_run_leaves_what_runs_it_again(folder: Path) -> None:
    assert main(["explain", "in", *FEW, "--normalization", "0.5/0.25", "--out", "first", "--seed", "3"]) == 0
    left = tomllib.loads((folder / "first" / "run.toml").read_text())
    assert left["images"] == ["in"]
    assert left["normalization"] == "0.5/0.25"
    assert (left["trials"], left["seed"]) == (40, 3)
    assert "out" not in left
    assert main(["explain", "--config", "first/run.toml", "--out", "second"]) == 0
    found = [json.loads((folder / out / "manifest.json").read_text())["findings"] for out in ("first", "second")]
    assert found[0] == found[1]
    # The command line counts more.
    assert main(["explain", "--config", "first/run.toml", "--out", "third", "--seed", "4"]) == 0
    assert json.loads((folder / "third" / "manifest.json").read_text())["seed"] == 4


def test_a_file_of_options_that_cannot_be_used_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "wrong.toml").write_text("trails = 40\n")
    assert main(["explain", "in", "--config", "wrong.toml"]) == 2
    assert "'trails' is no option" in " ".join(capsys.readouterr().err.split())
    assert main(["explain", "in", "--config", "absent.toml"]) == 2


def test_folders_and_patterns_are_pictures(folder: Path) -> None:
    for given, out in (("in", "one"), ("in/*.png", "two")):
        assert main(["explain", given, *FEW, "--out", out]) == 0
        inputs = json.loads((folder / out / "manifest.json").read_text())["inputs"]
        assert sorted(inputs) == ["a.png", "b.png"]


def test_doctor_says_where_torchvision_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from ce_plugin.cli import _doctor

    def fails(name: str) -> None:
        raise RuntimeError("operator torchvision::nms\n does not exist")

    assert not _doctor._misfits()
    monkeypatch.setattr(_doctor.importlib, "import_module", fails)
    assert "(operator torchvision::nms does not exist): it and torch must come" in _doctor._misfits()[0]


def test_doctor_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__.partition('+')[0]}" in said
    assert "cpu:" in said


def test_the_page_begins_with_the_sentence_and_its_numbers(folder: Path) -> None:
    assert main(["explain", "in/a.png", *FEW, "--out", "page"]) == 0
    page = (folder / "page" / "report.html").read_text()
    told = json.loads((folder / "page" / "manifest.json").read_text())["findings"]["a.png"]["evidence"]["Clean"]
    tested = told["answer_tested"]
    sentence = tested["sentence"].replace(" %", "\u00a0%")  # does not break there
    assert page.index(sentence) < page.index("Why we believe it") < page.index("Method: how the maps")
    assert tested["p_value"] == pytest.approx((1 + sum(v <= tested["covered"] for v in tested["placed"])) / 25)
    data = json.loads(page.split('<script type="application/json">')[1].split("</script>")[0])
    assert len(data) == 3
    assert all(len(one["drawn"]) == len(one["half"]) == 196 for one in data)
    assert page.count('data-place="row ') == 196
    assert str(folder) not in page
