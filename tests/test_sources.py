"""Data sets by name: folders, Parquet, torchvision, functions."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ce_plugin.datasets import (
    DatasetImages,
    FolderImages,
    ImageFiles,
    class_folders,
    labels_for,
    open_source,
    read_image,
)
from ce_plugin.errors import ArgumentError, CEPluginError, FileError, UnknownNameError


def pixels(seed: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def png(seed: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    pixels(seed, mode).save(buffer, "png")
    return buffer.getvalue()


def folder(place: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(png(number))
    return place


def test_class_folders_and_plain_folders(tmp_path: Path) -> None:
    classes = open_source(str(folder(tmp_path / "a", "dog/1.png", "cat/2.png", "cat/deep/3.png")))
    assert (classes.class_names, classes.labels) == (("cat", "dog"), [0, 0, 1])
    assert torch.equal(classes.item(2)[0], read_image(tmp_path / "a" / "dog" / "1.png"))
    assert classes.item(2)[1] == 1
    plain = open_source(str(folder(tmp_path / "b", "1.png", "2.jpg")))
    assert plain.labels is None
    mixed = folder(tmp_path / "c", "1.png", "cat/2.png")
    with pytest.raises(ArgumentError, match=r"1 in subfolders and 1 that are not, such as '1\.png'.*--no-labels"):
        open_source(str(mixed))
    assert open_source(str(mixed), labels=False).labels is None
    with pytest.raises(FileError, match="a folder with pictures"):
        open_source(str((tmp_path / "a" / "empty").mkdir() or tmp_path / "a" / "empty"))


def test_a_changed_folder_has_another_fingerprint(tmp_path: Path) -> None:
    before = FolderImages(folder(tmp_path, "1.png", "2.png")).fingerprint
    assert FolderImages(tmp_path).fingerprint == before
    (tmp_path / "2.png").write_bytes(png(2) + b"more")
    assert FolderImages(tmp_path).fingerprint != before


@pytest.mark.parametrize("hub", [True, False])
def test_parquet(tmp_path: Path, hub: bool) -> None:
    contents: list[Any] = [png(i, "L" if i == 1 else "RGB") for i in range(7)]
    if hub:
        contents = [{"bytes": one, "path": f"{i}.png"} for i, one in enumerate(contents)]
    for part, rows in enumerate((slice(0, 4), slice(4, 7))):
        table = pa.table({"image": contents[rows], "label": list(range(7))[rows]})
        pq.write_table(table, tmp_path / f"part{part}.parquet", row_group_size=2)
    source = open_source(str(tmp_path))
    assert len(source) == 7
    for i in (6, 0, 5, 1, 2):
        image, label = source.item(i)
        wanted = np.asarray(pixels(i, "L" if i == 1 else "RGB").convert("RGB"))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), wanted)
        assert label == i
    there = pickle.loads(pickle.dumps(source))
    assert torch.equal(there.item(3)[0], source.item(3)[0])
    assert len(open_source(str(tmp_path / "part1.parquet"))) == 3


def test_parquet_with_a_broken_picture_or_without_any(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(0), png(1)[:60]]}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    with pytest.raises(FileError, match=r"a\.parquet:1"):
        source.item(1)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(FileError, match="a column of pictures"):
        open_source(str(tmp_path / "b.parquet"))
    (tmp_path / "c.parquet").write_bytes(b"no")
    with pytest.raises(FileError, match="Parquet files of pictures"):
        open_source(str(tmp_path / "c.parquet"))


def test_torchvision_s_image_folder_is_read_as_ours(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    place = folder(tmp_path, "a/1.png", "b/2.png")
    theirs, ours = DatasetImages(ImageFolder(str(place)), "folder"), FolderImages(place)
    assert theirs.class_names == ours.class_names
    assert [theirs.item(i)[1] for i in range(2)] == ours.labels
    assert torch.equal(theirs.item(1)[0], ours.item(1)[0])
    fake = open_source("torchvision:FakeData")
    image, label = fake.item(3)
    assert image.shape == (3, 224, 224)
    assert isinstance(label, int)


def test_sixteen_bits_are_scaled_also_in_data_sets(tmp_path: Path) -> None:
    values = np.array([[0, 65535], [32768, 257]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    source = DatasetImages([(Image.open(tmp_path / "a.png"), 0)], "xrays")
    assert torch.equal(source.item(0)[0], read_image(tmp_path / "a.png"))
    assert source.item(0)[0][0].tolist() == [[0, 255], [128, 1]]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere", FileError, "which does not exist"),
        ("torchvision:CIFAR11", UnknownNameError, "Did you mean 'torchvision:CIFAR10'"),
        ("torchvision:CIFAR10:val", UnknownNameError, "'test', 'train'"),
        ("torchvision:ImageNet:val", FileError, "Put its files where"),
        ("no_such_module:data", UnknownNameError, "returns a data set"),
        ("ce_plugin.datasets:no_such", UnknownNameError, "no_such"),
    ],
)
def test_unknown_names(name: str, error: type[CEPluginError], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        open_source(name, root=tmp_path)


def test_a_function_of_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import torch\ndef data():\n    return [(torch.zeros(1, 4, 4), 1)] * 3\n")
    source = open_source(f"{tmp_path / 'mine.py'}:data")
    image, label = source.item(2)
    assert (tuple(image.shape), label, len(source)) == ((1, 4, 4), 1, 3)


def test_labels_become_the_network_s(tmp_path: Path) -> None:
    pets = FolderImages(folder(tmp_path / "a", "Dog/1.png", "cat/2.png"))
    assert pets.class_names == ("Dog", "cat")
    assert labels_for(pets, ["cat", "cow", "dog"], 3) == [2, 0]
    assert labels_for(pets, None, 2) == [0, 1]
    assert labels_for(pets, None, 1) == [0, 1]
    with pytest.raises(ArgumentError, match=r"among the network's 3 classes, but got 2 classes, among them \['cat'\]"):
        labels_for(pets, ["dog", "cow", "hen"], 3)
    numbers = FolderImages(folder(tmp_path / "b", "7/1.png", "12/2.png"))
    assert labels_for(numbers, None, 20) == [12, 7]
    assert labels_for(FolderImages(folder(tmp_path / "c", "1.png")), None, 3) is None


def test_pictures_of_a_data_set_are_called_by_their_files(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    data = class_folders(tmp_path)
    assert list(DatasetImages(data, "own").paths) == ["a/1.png", "b/1.png"]
    assert DatasetImages(data, "own").item(1)[1] == 1
    assert list(DatasetImages(data.subset([1]), "own").paths) == ["1.png"]
    assert list(DatasetImages([data[0], data[1]], "own").paths) == ["own:0", "own:1"]
    findings = ImageFiles(data.files, torch.tensor([[True, False], [True, True]]), ("x", "y"))
    assert DatasetImages(findings, "own").item(0)[1] is None  # several findings are no class
