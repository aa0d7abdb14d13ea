"""Readers of picture files with labels: real data sets, their splits, and folders and tables that are wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ce_plugin.datasets import (
    FINDINGS,
    ImageFiles,
    birds,
    box_mask,
    chest_xray14,
    cifar10_sheets,
    class_folders,
    cub200,
    imagenet_samples,
    mnist,
    pneumonia_xrays,
    read_image,
    usps,
)
from ce_plugin.errors import ArgumentError, FileError, UnknownNameError

HEAD = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"


def picture(file: Path, size: tuple[int, int] = (8, 8), mode: str = "L") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 90).save(file)


def nih(folder: Path, rows: str, files: str, boxes: str = "") -> Path:
    """A folder in NIH's layout."""
    (folder / "Data_Entry_2017_v2020.csv").write_text(HEAD + rows)
    for name in files.split():
        picture(folder / "images_001" / "images" / name, (16, 16))
    if boxes:
        (folder / "BBox_List_2017.csv").write_text("Image Index,Finding Label,Bbox [x,y,w,h],,,\n" + boxes)
    return folder


ROWS = "a.png,Effusion|Mass,0,7,50,M,PA\nb.png,No Finding,0,8,50,F,PA\nc.png,Hernia,1,7,50,M,PA\n"


def test_nih_has_findings_patients_boxes_and_counts_what_is_absent(tmp_path: Path) -> None:
    data = chest_xray14(nih(tmp_path, ROWS, "a.png b.png", "a.png,Infiltrate,512,0,256,128\nz.png,Mass,1,1,2,2\n"))
    assert [file.name for file in data.files] == ["a.png", "b.png"]
    assert [FINDINGS[k] for k in data.labels[0].nonzero().flatten()] == ["Effusion", "Mass"]
    assert not bool(data.labels[1].any())
    assert data.groups == ("7", "8")
    assert data.left_out == {"without a picture": 1}
    assert data.boxes_of(1) == ()
    # The box is in pixels of an original of 1024 x 1024; the picture has 16 x 16.
    assert box_mask(data, 0, FINDINGS.index("Infiltration"), 16, 16).nonzero().tolist() == [
        [row, column] for row in (0, 1) for column in range(8, 12)
    ]
    with pytest.raises(ArgumentError, match=r"a box in 'a\.png'"):
        box_mask(data, 0, 0, 16, 16)


def test_nih_lists_say_what_is_trained_on(tmp_path: Path) -> None:
    folder = nih(tmp_path, ROWS, "a.png b.png c.png")
    with pytest.raises(FileError, match=r"train_val_list\.txt"):
        chest_xray14(folder, "train")
    (folder / "train_val_list.txt").write_text("b.png\n")
    (folder / "test_list.txt").write_text("a.png\nc.png\n")
    assert [len(chest_xray14(folder, split)) for split in ("", "train", "test")] == [3, 1, 2]
    with pytest.raises(UnknownNameError, match="split"):
        chest_xray14(folder, "valid")


@pytest.mark.parametrize(
    ("rows", "files", "boxes", "says"),
    [
        ("a.png,Effusion,0,7,50,M,PA\n", "a.png x.png", "", "1 that are not, such as 'x.png'"),
        ("a.png,Efusion,0,7,50,M,PA\n", "a.png", "", "'Efusion' of 'a.png'"),
        ("a.png,No Finding|Mass,0,7,50,M,PA\n", "a.png", "", "No Finding|Mass"),
        ("a.png,Mass\n", "a.png", "", "line 2 is cut off"),
        ("a.png,Mass,0,7,50,M,PA\n", "a.png", "a.png,Mass,1,2,3\n", "line 2"),
        ("a.png,Mass,0,7,50,M,PA\n", "a.png", "a.png,Mass,1,2,3,nan\n", "boxes inside images"),
        ("a.png,Mass,0,7,50,M,PA\n", "a.png", "a.png,Lump,1,2,3,4\n", "Lump"),
    ],
)
def test_wrong_tables_of_findings_are_refused(rows: str, files: str, boxes: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(FileError) as error:
        chest_xray14(nih(tmp_path, rows, files, boxes))
    assert says in str(error.value)


def test_mixed_up_folders_are_refused(tmp_path: Path) -> None:
    nih(tmp_path, ROWS, "a.png")
    picture(tmp_path / "small" / "a.png")
    with pytest.raises(FileError, match="1 twice"):
        chest_xray14(tmp_path)
    assert len(chest_xray14(tmp_path, images="small")) == 1
    (tmp_path / "Data_Entry_2017.csv").write_text(HEAD)
    with pytest.raises(FileError, match="Data_Entry_2017"):
        chest_xray14(tmp_path, images="small")
    with pytest.raises(FileError, match="an existing folder"):
        pneumonia_xrays(tmp_path / "none", "train")
    picture(tmp_path / "k" / "train" / "NORMAL" / "1.png")
    with pytest.raises(FileError, match="folders NORMAL, PNEUMONIA, but got NORMAL"):
        pneumonia_xrays(tmp_path / "k")
    picture(tmp_path / "k" / "train" / "2.png")
    with pytest.raises(FileError, match=r"such as '2\.png'"):
        class_folders(tmp_path / "k", "train")


def test_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "Data_Entry_2017.csv").write_text("file,labels\na,b\n")
    with pytest.raises(FileError, match="file, labels: no Image Index"):
        chest_xray14(tmp_path)
    (tmp_path / "Data_Entry_2017.csv").write_bytes(b"\xff\xfe\x00Image")
    with pytest.raises(FileError, match="is a table"):
        chest_xray14(tmp_path)
    (tmp_path / "index.csv").write_text("file,class\na.png,Robin\na.png,Robin\n")
    with pytest.raises(FileError, match=r"'a\.png' twice"):
        birds(tmp_path)
    (tmp_path / "index.csv").write_text("file,class\na.png,Robin\n")
    with pytest.raises(FileError, match="1 of 1 missing"):
        birds(tmp_path)


def test_no_patient_is_in_two_parts() -> None:
    groups = tuple(str(k // 3) for k in range(90))
    data = ImageFiles(tuple(Path(f"{k}.png") for k in range(90)), torch.zeros(90).long(), ("x",), groups)
    parts = data.split([0.7, 0.1, 0.2])
    assert sum(map(len, parts)) == 90
    assert [abs(len(part) - 90 * share) <= 3 for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True)] == [True] * 3
    owners = [set(part.groups) for part in parts]
    assert sum(map(len, owners)) == len(set(groups))
    # Which part a patient is in does not depend on the order of the pictures.
    turned = data.subset(reversed(range(90))).split([0.7, 0.1, 0.2])
    assert [set(part.groups) for part in turned] == owners
    assert [set(part.groups) for part in data.split([0.7, 0.1, 0.2], seed=1)] != owners
    with pytest.raises(ArgumentError, match="shares"):
        data.split([0.7, 0.7])


def test_what_cannot_be_read_is_counted_or_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "cat" / "a.png", (64, 64))
    picture(tmp_path / "cat" / "b.png", (64, 64), mode="I;16")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(tmp_path / "cat" / "c.png")
    whole = (tmp_path / "cat" / "c.png").read_bytes()
    (tmp_path / "cat" / "c.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cat" / "d.png").write_text("no picture")
    data = class_folders(tmp_path)
    with caplog.at_level(logging.WARNING, "ce_plugin"):
        good = data.readable()
    assert [file.name for file in good.files] == ["a.png", "b.png"]
    assert good.left_out == {"unreadable": 2}
    assert "c.png" in caplog.text
    assert "truncated" in caplog.text
    assert repr(good) == "ImageFiles(2 pictures, 1 classes, left out: 2 unreadable)"
    with pytest.raises(FileError, match=r"c\.png"):
        data.readable(strict=True)
    image, label = good[1]
    assert image.dtype == torch.uint8
    assert label == 0


def test_classes_are_matched_by_name() -> None:
    files = tuple(Path(f"{k}.png") for k in range(4))
    data = ImageFiles(files, torch.tensor([0, 1, 2, 1]), ("Brewer Blackbird", "White_breasted Nuthatch", "Dodo"))
    names = ("Sitta carolinensis (White-breasted Nuthatch)", "background", "Euphagus (Brewer's Blackbird)")
    found = data.matched(names)
    assert found.labels.tolist() == [2, 0, 0]
    assert found.left_out == {"of classes that the network does not know": 1}
    with pytest.raises(ArgumentError, match="'Brewer Blackbird'"):
        data.matched(("tench",))


def test_cub_in_its_own_layout(tmp_path: Path) -> None:
    for name in ("001.Black_footed_Albatross/x.jpg", "002.Laysan_Albatross/y.jpg"):
        picture(tmp_path / "images" / name)
    texts = {
        "classes": "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n",
        "images": "1 001.Black_footed_Albatross/x.jpg\n2 002.Laysan_Albatross/y.jpg\n",
        "image_class_labels": "1 1\n2 2\n",
        "train_test_split": "1 1\n2 0\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    both, test = cub200(tmp_path), cub200(tmp_path, "test")
    assert both.classes == ("Black footed Albatross", "Laysan Albatross")
    assert both.labels.tolist() == [0, 1]
    assert test.labels.tolist() == [1]
    (tmp_path / "image_class_labels.txt").write_text("1 1\n")
    with pytest.raises(FileError, match="no entry for '2'"):
        cub200(tmp_path)
    (tmp_path / "images.txt").write_text("1\n")
    with pytest.raises(FileError, match="line 1: '1'"):
        cub200(tmp_path)


def test_sheets_and_arrays_that_are_wrong(tmp_path: Path) -> None:
    Image.new("RGB", (3200, 32)).save(tmp_path / "test_first8000.png")
    np.save(tmp_path / "test_first8000_labels.npy", np.full(99, 3, np.uint8))
    with pytest.raises(FileError, match="a label, 0 to 9, for each tile"):
        cifar10_sheets(tmp_path)
    np.save(tmp_path / "test_first8000_labels.npy", np.full(100, 3, np.uint8))
    assert cifar10_sheets(tmp_path)[0].shape == (100, 3, 32, 32)
    Image.new("RGB", (320, 32)).save(tmp_path / "test_first8000.png")
    with pytest.raises(FileError, match="320 x 32"):
        cifar10_sheets(tmp_path)
    np.savez(tmp_path / "usps.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.zeros(2, np.uint8))
    with pytest.raises(FileError, match=r"\(N, 16, 16\)"):
        usps(tmp_path)
    (tmp_path / "usps.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(FileError, match=r"usps\.npz holds"):
        usps(tmp_path)
    picture(tmp_path / "x" / "daisy.jpg")
    with pytest.raises(FileError, match="INDEX_WNID_NAME"):
        imagenet_samples(tmp_path / "x")


def test_the_real_pictures(data_folder: Path) -> None:
    every = imagenet_samples(data_folder / "imagenet-samples")
    assert len(every) == 900
    assert every.classes[985 - 1] == "rapeseed"
    scenes = class_folders(data_folder / "scene15", "test")
    assert scenes.labels.bincount().tolist() == [100] * 15
    for split, each in (("train", 4), ("test", 5)):
        assert cub200(data_folder / "cub200", split).labels.bincount().tolist() == [each] * 200
    assert [birds(data_folder / "birds").classes[k] for k in birds(data_folder / "birds").labels] == [
        "Black Footed Albatross",
        "Black Footed Albatross",
        "Least Auklet",
        "Parakeet Auklet",
    ]
    images, labels = usps(data_folder / "usps")
    assert images.shape == (11_000, 1, 16, 16)
    framed, _ = usps(data_folder / "usps", as_mnist=True)
    assert framed.shape == (11_000, 1, 28, 28)
    assert not framed[..., :4, :].any()
    assert not framed[..., -4:].any()
    assert labels.bincount().tolist() == [1_100] * 10
    images, labels = mnist(data_folder / "mnist", "test")
    assert images.shape == (10_000, 1, 28, 28)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_the_real_xrays(data_folder: Path) -> None:
    folder = data_folder / "chest-xray"
    with pytest.raises(FileError, match="each picture once"):
        chest_xray14(folder)  # some are there at two sizes
    with pytest.raises(FileError, match="1400 that are not"):
        chest_xray14(folder, images="pneumonia-224px")
    small, large = chest_xray14(folder, images="nih1000-64px"), chest_xray14(folder, images="nih")
    assert (len(small), len(large)) == (1000, 36)
    assert int(small.labels[:, FINDINGS.index("Effusion")].sum()) == 170
    assert sum(len(small.boxes_of(i)) > 0 for i in range(1000)) == 9
    # The boxes in pixels of the files, as their own table has them.
    lines = (folder / "nih_boxes_present.csv").read_text().splitlines()[1:]
    assert len(lines) == sum(len(large.boxes_of(i)) for i in range(36)) == 9
    names = [file.name for file in large.files]
    for line in lines:
        name, finding, *cells = line.split(",")
        index = names.index(name.partition("/")[2])
        _, height, width = large[index][0].shape
        finding = {"Infiltrate": "Infiltration"}.get(finding, finding)
        own = [box for box in large.boxes_of(index) if FINDINGS[box.finding] == finding]
        found = [[box.x * width, box.y * height, box.width * width, box.height * height] for box in own]
        assert any(np.allclose(one, [float(cell) for cell in cells[:4]], atol=0.02) for one in found), line
    parts = small.split([0.7, 0.1, 0.2])
    assert not set(parts[0].groups) & set(parts[2].groups)
    children = pneumonia_xrays(folder / "pneumonia-224px", "test")
    assert children.labels.bincount().tolist() == [200, 200]


def test_the_real_sheets(data_folder: Path) -> None:
    images, labels = cifar10_sheets(data_folder / "cifar10")
    assert images.shape == (8000, 3, 32, 32)
    sheet = read_image(data_folder / "cifar10" / "test_first8000.png")
    assert bool((images[217] * 255 == sheet[:, 64:96, 17 * 32 : 18 * 32]).all())
    assert labels[:4].tolist() == [3, 8, 8, 0]
