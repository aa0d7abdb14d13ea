"""MobileNets from TensorFlow's 8-bit files: the numbers of the file's own graph, and classes of photographs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ce_plugin import LayerCausalEffect
from ce_plugin.datasets import read_image, sample_photographs
from ce_plugin.errors import ArgumentError, FileError
from ce_plugin.models import load_mobilenet
from ce_plugin.models.mobilenet import ConvUnit

FILES = {"v1_0.25_128_quant": (128, 13, False), "v2_1.0_224_quant": (224, 17, True)}


def _by_the_graph(file: Path, x: Tensor) -> Tensor:
    """All 1001 logits, operation by operation, with TensorFlow's padding for any side."""
    archive, values = np.load(file), {}
    graph = json.loads(archive["graph"].tobytes())
    values[graph[0]["inp"]] = x
    for entry in graph:
        y = values[entry["inp"]]
        if entry["op"] in ("conv", "dw"):
            k, stride = f"{entry['k']:02d}", entry["stride"]
            weight = torch.tensor(archive["w" + k].astype("f4") * archive["s" + k].reshape(-1, 1, 1, 1))
            size = weight.shape[-1]
            missing = max((-(-y.shape[-1] // stride) - 1) * stride + size - y.shape[-1], 0)
            y = F.pad(y, (missing // 2, missing - missing // 2) * 2)
            y = F.conv2d(y, weight, torch.tensor(archive["b" + k]), stride, groups=len(weight) // weight.shape[1]
                         if entry["op"] == "dw" else 1)  # fmt: skip
        elif entry["op"] == "add":
            y = y + values[entry["inp2"]]
        elif entry["op"] == "gap":
            y = y.mean((2, 3), keepdim=True)
        values[entry["out"]] = y.clamp(0, 6) if entry.get("act") == "relu6" else y
    return values[graph[-1]["out"]].flatten(1)


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_the_files_own_graph_without_the_background(data_folder: Path, name: str) -> None:
    side, n_blocks, has_head = FILES[name]
    file = data_folder / "mobilenet" / f"mobilenet_{name}.npz"
    net = load_mobilenet(file, size=side)
    assert len(net.model.blocks) == n_blocks
    assert isinstance(net.model.head, ConvUnit) == has_head
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        assert torch.allclose(net.model(x), _by_the_graph(file, x)[:, 1:], atol=1e-3, rtol=1e-4)


def test_photographs_are_recognised(data_folder: Path) -> None:
    net = load_mobilenet(data_folder / "mobilenet" / "mobilenet_v2_1.0_224_quant.npz")
    files = sorted((data_folder / "imagenet-samples").glob("*.jpg"))[::30]
    with torch.inference_mode():
        found = net.model(net.inputs([read_image(file) for file in files])).argmax(1).tolist()
    right = sum(int(file.name[:4]) == answer for file, answer in zip(files, found, strict=True))
    assert right / len(files) > 0.7


def test_a_network_of_birds_has_its_background_last(data_folder: Path) -> None:
    folder = data_folder / "mobilenet"
    names = (folder / "inat_bird_labels.txt").read_text().splitlines()
    net = load_mobilenet(
        folder / "mobilenet_v2_1.0_224_inat_bird_quant.npz", background=-1, class_names=names[:-1]
    )  # fmt: skip
    assert net.class_names is not None
    assert net.model.classifier.out_features == len(net.class_names) == 964
    with pytest.raises(ArgumentError, match="`class_names` to be 964 names"):
        load_mobilenet(folder / "mobilenet_v2_1.0_224_inat_bird_quant.npz", background=-1, class_names=["a"])


def test_layers_take_the_fast_route(data_folder: Path) -> None:
    net = load_mobilenet(data_folder / "mobilenet" / "mobilenet_v1_0.25_128_quant.npz", size=128)
    x = net.inputs(list(sample_photographs().values())[:1])
    fast = LayerCausalEffect(net.model, "blocks.5").estimate(x, target=985)
    full = LayerCausalEffect(net.model, "blocks.5", engine="full").estimate(x, target=985)
    assert fast.settings["route"] != "full"
    assert torch.allclose(fast.effect, full.effect, atol=1e-5)


def test_padding_is_tensorflows() -> None:
    # Stride 2 on an even side: nothing at the left and top, one at the right and bottom.
    unit = ConvUnit(torch.ones(1, 1, 3, 3), torch.zeros(1), stride=2, act=False)
    out = unit(torch.arange(16.0).reshape(1, 1, 4, 4))
    assert out[0, 0].tolist() == [[45.0, 39.0], [66.0, 50.0]]
    unit = ConvUnit(torch.ones(1, 1, 3, 3), torch.zeros(1), act=True)
    assert unit(torch.ones(1, 1, 2, 2)).max() == 4.0
    assert unit(torch.full((1, 1, 2, 2), 5.0)).max() == 6.0


def test_files_that_are_none(tmp_path: Path) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 something")
    with pytest.raises(FileError, match="`file` to be a MobileNet's weights"):
        load_mobilenet(broken)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(FileError, match="`file` to be a MobileNet's weights"):
        load_mobilenet(tmp_path / "other.npz")
    with pytest.raises(FileError, match=r"an existing \.npz file"):
        load_mobilenet(tmp_path / "missing.npz")


def test_the_background_must_be_an_output(data_folder: Path) -> None:
    with pytest.raises(ArgumentError, match="`background` to be one of 1001 outputs"):
        load_mobilenet(data_folder / "mobilenet" / "mobilenet_v2_1.0_224_quant.npz", background=1001)


def test_it_is_a_module(data_folder: Path) -> None:
    net = load_mobilenet(data_folder / "mobilenet" / "mobilenet_v2_1.0_224_quant.npz")
    assert isinstance(net.model, nn.Module)
    assert not net.model.training
    assert dict(net.model.named_modules())["blocks.3.depthwise.conv"].groups == 144
