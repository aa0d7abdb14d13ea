"""Networks from files: accuracies that their sources state, names of old checkpoints, and files that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from ce_plugin.datasets import cifar10_sheets, cub200, fashion_mnist, mnist, pneumonia_xrays
from ce_plugin.errors import ArgumentError, FileError, ModelError, UnknownNameError
from ce_plugin.models import (
    VisionModel,
    chexnet,
    cifar_resnet,
    load_bird_mobilenet,
    load_robust,
    pneumonia_cnn,
    read_weights,
)


def answers(net: VisionModel, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([net.model(net.normalization.to_model(part)) for part in images.split(250)])


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("mnist_cnn_a_adv", 0.9633),
        ("mnist_certified_0.1", 0.9820),
        ("mnist_certified_0.3", 0.8523),
        ("fashion_certified_0.1", 0.7827),
    ],
)
def test_robust_networks_of_gray_pictures_have_the_stated_accuracy(name: str, stated: float, data_folder: Path) -> None:
    read, folder = (mnist, "mnist") if name.startswith("mnist") else (fashion_mnist, "fashion-mnist")
    images, labels = read(data_folder / folder, "test")
    net = load_robust(data_folder / "robust-nets" / f"{name}.npz")
    right = (answers(net, images).argmax(1) == labels).double().mean()
    assert abs(float(right) - stated) < 0.00015  # two decimals of percent


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("cifar_resnet2b_adv2", 0.6925),
        ("cifar_resnet4b_adv2", 0.7720),
        ("cifar_cnn_a_adv2", 0.6975),
        ("cifar_cnn_a_adv4", 0.6007),
        ("resnet20", 0.9173),
    ],
)
def test_networks_of_cifar_are_near_the_accuracy_on_all_ten_thousand(
    name: str, stated: float, data_folder: Path
) -> None:
    images, labels = cifar10_sheets(data_folder / "cifar10")
    n = 2000 if name == "resnet20" else 8000
    if name == "resnet20":
        net = cifar_resnet(20, data_folder / "cifar10" / "nets" / "resnet20.pt")
    else:
        net = load_robust(data_folder / "robust-nets" / f"{name}.npz")
    right = (answers(net, images[:n]).argmax(1) == labels[:n]).double().mean()
    # The others are 2,000 pictures or more: three standard errors of the difference.
    assert abs(float(right) - stated) < 3 * (stated * (1 - stated) * (1 / n - 1 / 10_000)) ** 0.5


@pytest.mark.parametrize("depth", [32, 56])
def test_deeper_networks_load_too(depth: int, data_folder: Path) -> None:
    images, labels = cifar10_sheets(data_folder / "cifar10")
    net = cifar_resnet(depth, data_folder / "cifar10" / "nets" / f"resnet{depth}.pt")
    assert float((answers(net, images[:200]).argmax(1) == labels[:200]).double().mean()) > 0.88


def test_the_pneumonia_network_has_the_stated_accuracy(data_folder: Path) -> None:
    net = pneumonia_cnn(data_folder / "cxr-pneumonia-cnn" / "pneumonia_cnn64.npz")
    data = pneumonia_xrays(data_folder / "chest-xray" / "pneumonia-224px", "test")
    with torch.inference_mode():
        logits = net.model(net.inputs([data[i][0] for i in range(len(data))]))[:, 0]
    found, sick = logits > 0, data.labels == 1
    assert float((found == sick).double().mean()) == 0.8875
    assert float(found[sick].double().mean()) == 0.97
    assert float((~found[~sick]).double().mean()) == 0.805
    assert abs(roc_auc_score(data.labels, logits) - 0.952) < 0.0005


def test_the_network_of_birds_knows_most_of_cub(data_folder: Path) -> None:
    net = load_bird_mobilenet(data_folder / "mobilenet")
    assert net.class_names is not None
    data = cub200(data_folder / "cub200", "test").matched(net.class_names)
    assert len(data.labels.unique()) == 160
    assert data.left_out == {"of classes that the network does not know": 200}
    some = range(0, len(data), 5)
    with torch.inference_mode():
        found = net.model(net.inputs([data[i][0] for i in some])).argmax(1)
    right = float((found == data.labels[::5]).double().mean())
    assert right > 0.743 - 3 * (0.743 * 0.257 / len(some)) ** 0.5  # stated for 150 of these species


def test_old_names_of_public_checkpoints(tmp_path: Path) -> None:
    net = chexnet()
    state = {}
    for name, value in net.model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        for part in ("norm", "conv"):
            for number in "12":
                name = name.replace(f"{part}{number}.", f"{part}.{number}.") if "denselayer" in name else name
        name = name.replace("classifier.", "classifier.0.")
        state[f"module.densenet121.{name}"] = value + 1
    assert any("denselayer1.norm.1" in name for name in state)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "m-25012018.pth.tar")
    loaded = chexnet(tmp_path / "m-25012018.pth.tar").model.state_dict()
    for name, value in net.model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(loaded[name], value + 1), name
    torch.save({**state, "module.densenet121.classifier.0.weight": torch.zeros(3, 1024)}, tmp_path / "other.pt")
    with pytest.raises(ModelError, match=r"classifier\.weight"):
        chexnet(tmp_path / "other.pt")


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="svhn"):
        load_robust(tmp_path / "svhn.npz")
    np.savez(tmp_path / "mnist_x.npz", a=np.zeros(3))
    with pytest.raises(FileError, match=r"without '0\.weight'"):
        load_robust(tmp_path / "mnist_x.npz")
    np.savez(tmp_path / "b.npz", a=np.array([{}], dtype=object))
    with pytest.raises(FileError, match="a file of tensors"):
        read_weights(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(FileError, match="a file of tensors"):
        read_weights(tmp_path / "c.npz")
    with pytest.raises(ModelError, match="conv1"):
        pneumonia_cnn(tmp_path / "mnist_x.npz")
    with pytest.raises(ArgumentError, match="depth"):
        cifar_resnet(21)
    with pytest.raises(ArgumentError, match="class_names"):
        chexnet(class_names=())


def test_random_weights_do_not_move_the_random_state() -> None:
    torch.manual_seed(4)
    first = torch.rand(1)
    torch.manual_seed(4)
    one, two = chexnet(class_names=("a",)), chexnet(class_names=("a",))
    pneumonia_cnn()
    cifar_resnet(20)
    assert bool(torch.rand(1) == first)
    assert torch.equal(one.model.classifier.weight, two.model.classifier.weight)
