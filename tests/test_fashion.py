"""Fashion-MNIST: the reader against torchvision's, damaged files, and the small network."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from ce_plugin.datasets import FASHION_CLASSES, fashion_mnist
from ce_plugin.errors import FileError, UnknownNameError
from ce_plugin.models import FashionCNN

IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def write(folder: Path, packed: bool) -> torch.Tensor:
    """Three pictures and their labels."""
    pixels = torch.randint(256, (3, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (3, 28, 28))
    contents = {IMAGES: header + pixels.numpy().tobytes(), LABELS: bytes([0, 0, 8, 1, 0, 0, 0, 3, 9, 0, 4])}
    for name, content in contents.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return pixels


@pytest.mark.parametrize("packed", [True, False])
def test_reader_agrees_with_torchvisions(packed: bool, tmp_path: Path) -> None:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    write(tmp_path, packed)
    images, labels = fashion_mnist(tmp_path, "test")
    plain = tmp_path / "plain"
    plain.mkdir()
    write(plain, packed=False)
    assert torch.equal((images[:, 0] * 255).round().byte(), read_image_file(str(plain / IMAGES)))
    assert torch.equal(labels, read_label_file(str(plain / LABELS)))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_the_real_files(data_folder: Path) -> None:
    images, labels = fashion_mnist(data_folder / "fashion-mnist", "test")
    assert images.shape == (10_000, 1, 28, 28)
    assert labels.bincount().tolist() == [1000] * len(FASHION_CLASSES)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)


def test_damaged_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="one of 'test', 'train', but got 'valid'"):
        fashion_mnist(tmp_path, "valid")
    with pytest.raises(FileError, match=r"one with t10k-images-idx3-ubyte\.gz, but got .*No such file"):
        fashion_mnist(tmp_path, "test")
    write(tmp_path, packed=False)
    whole = (tmp_path / IMAGES).read_bytes()
    for content in (b"", whole[:-1], b"\x00\x00\x0d\x03" + whole[4:], whole[:9]):
        (tmp_path / IMAGES).write_bytes(content)
        with pytest.raises(FileError, match="is a complete file in IDX format, but got"):
            fashion_mnist(tmp_path, "test")
    (tmp_path / IMAGES).write_bytes(whole)
    (tmp_path / LABELS).write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 9]))
    with pytest.raises(FileError, match="a label for each of 3 pictures, but got 1"):
        fashion_mnist(tmp_path, "test")
    (tmp_path / f"{IMAGES}.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(FileError, match="one with t10k-images"):
        fashion_mnist(tmp_path, "test")


def test_the_network_has_two_convolutions_and_learns() -> None:
    g = torch.Generator().manual_seed(0)
    network = FashionCNN()
    assert sum(isinstance(m, torch.nn.Conv2d) for m in network.modules()) == 2
    x, y = torch.rand(20, 1, 28, 28, generator=g), torch.arange(20) % 10
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
