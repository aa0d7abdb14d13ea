"""Chest X-rays: NIH's ChestX-ray14 with findings, patients and boxes, and Kermany's pneumonia of children.

Not for clinical use.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ce_plugin.datasets.labelled import Folder, ImageFiles, class_folders, pictures_in, table
from ce_plugin.errors import ArgumentError, FileError, expected, unknown_name
from ce_plugin.files import existing_file, path_of

FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
"""The fourteen findings, in the order of CheXNet's outputs."""

_NOTHING = "No Finding"
_OTHER_NAMES = {"Infiltrate": "Infiltration"}  # as the list of boxes has it
_ORIGINAL = 1024  # side of the images in whose pixels boxes are listed
_LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
_COLUMNS = ("Image Index", "Finding Labels", "Patient ID")


@dataclass(frozen=True)
class Box:
    """Where a radiologist saw a finding.

    Args:
        finding: index in :data:`FINDINGS`.
        x, y, width, height: of the box, as shares of the image's sides; x and y of the corner at the top left.

    Example:
        >>> Box(1, 0.25, 0.5, 0.25, 0.5).mask(4, 4).int().tolist()
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    """

    finding: int
    x: float
    y: float
    width: float
    height: float

    def mask(self, height: int, width: int) -> Tensor:
        """Pixels of an image of this size whose centres lie in the box; the one in its middle, if there is none."""
        rows, columns = ((torch.arange(side) + 0.5) / side for side in (height, width))
        inside = (rows >= self.y) & (rows < self.y + self.height), (columns >= self.x) & (columns < self.x + self.width)
        for own, middle in zip(inside, (self.y + self.height / 2, self.x + self.width / 2), strict=True):
            if not bool(own.any()):
                own[min(int(middle * len(own)), len(own) - 1)] = True
        return inside[0][:, None] & inside[1]


@dataclass(frozen=True, repr=False)
class XRays(ImageFiles):
    """NIH's X-rays: item k is (picture, which of :data:`FINDINGS` it has); ``groups`` are patients.

    Args:
        boxes: file name -> its boxes.
    """

    boxes: Mapping[str, tuple[Box, ...]] = field(default_factory=dict)

    def boxes_of(self, index: int) -> tuple[Box, ...]:
        """The boxes of one picture; most have none."""
        return self.boxes.get(self.files[index].name, ())


def chest_xray14(folder: Folder, split: str = "", images: str = "") -> XRays:
    """NIH's ChestX-ray14 in its own layout, whole or in part.

    Args:
        folder: holds the table of findings (``Data_Entry_2017*.csv``, either version), if there are boxes
            ``BBox_List_2017.csv``, and the pictures anywhere below it (``images_001/images/`` ...), at any size.
            Rows of the table without a picture are left out and counted.
        split: ``"train"`` or ``"test"`` by NIH's lists (``train_val_list.txt``, ``test_list.txt``), which no patient
            is in twice; "" for all. Without the lists take :meth:`ImageFiles.split`.
        images: the folder below in which the pictures are, if several hold the same ones.

    Raises:
        UnknownNameError: an unknown split.
        FileError: the table is missing, has other columns, rows or findings; no picture is there, one is there twice
            or is not in the table; a list is missing.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = "Image Index,Finding Labels,Patient ID\\na.png,Mass|Effusion,7\\nb.png,No Finding,8\\n"
        ...     _ = Path(folder, "Data_Entry_2017.csv").write_text(text)
        ...     Image.new("L", (4, 4)).save(Path(folder, "a.png"))
        ...     found = chest_xray14(folder)
        >>> found, [FINDINGS[k] for k in found.labels[0].nonzero().flatten()], found.groups
        (XRays(1 pictures, 14 classes, left out: 1 without a picture), ['Effusion', 'Mass'], ('7',))

    Source: Wang et al., CVPR 2017 (arXiv 1705.02315); NIH Clinical Center,
        https://nihcc.app.box.com/v/ChestXray-NIHCC.
    """
    place = path_of(folder, "folder")
    if split not in ("", *_LISTS):
        raise unknown_name("split", split, _LISTS)
    rows = {row["Image Index"]: row for row in table(_entries(place), _COLUMNS)}
    files = _by_name(pictures_in(place / images, deep=True))
    strange = sorted(files.keys() - rows.keys())
    if strange:
        hint = "Name the folder with NIH's pictures by `images`."
        got = f"{len(strange)} that are not, such as {strange[0]!r}"
        raise FileError(expected("folder", "one whose pictures are in the table of findings", got, hint))
    names = sorted(files)
    if split:
        listed = existing_file(place / _LISTS[split], "folder", f"one with {_LISTS[split]}")
        wanted = set(listed.read_text(encoding="utf-8").split())
        names = [name for name in names if name in wanted]
        if not names:
            raise FileError(expected("folder", f"one with pictures of {_LISTS[split]}", "none of them"))
    absent = len(rows) - len(files)
    return XRays(
        tuple(files[name] for name in names),
        torch.stack([_findings(rows[name]["Finding Labels"], name) for name in names]),
        FINDINGS,
        tuple(rows[name]["Patient ID"].strip() for name in names),
        {"without a picture": absent} if absent else {},
        _boxes(place / "BBox_List_2017.csv") if (place / "BBox_List_2017.csv").is_file() else {},
    )


def pneumonia_xrays(folder: Folder, split: str = "train") -> ImageFiles:
    """Kermany's chest X-rays of children: NORMAL (0) and PNEUMONIA (1), in folders ``train`` and ``test``.

    ``groups`` are what file names begin with (``person1_...``, ``IM-0115-...``), which may stand for patients.

    Raises:
        UnknownNameError: an unknown split.
        FileError: no such folders, or pictures beside the class folders.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("NORMAL/IM-0115-0001.jpg", "PNEUMONIA/person1_virus_6.jpg"):
        ...         Path(folder, "train", name).parent.mkdir(parents=True)
        ...         Image.new("L", (4, 4)).save(Path(folder, "train", name))
        ...     found = pneumonia_xrays(folder)
        >>> found.labels, found.groups
        (tensor([0, 1]), ('IM-0115', 'person1'))

    Source: Kermany et al., Cell 2018.
    """
    if split not in ("train", "test"):
        raise unknown_name("split", split, ("train", "test"))
    found = class_folders(folder, split, ("NORMAL", "PNEUMONIA"))
    names = [file.name.split("_")[0] for file in found.files]
    groups = tuple("-".join(name.split("-")[:-1]) or name for name in names)
    return ImageFiles(found.files, found.labels, found.classes, groups)


def box_mask(data: XRays, index: int, finding: int, height: int, width: int) -> Tensor:
    """The boxes of one finding in one picture, drawn at a size (height, width), bool.

    Raises:
        ArgumentError: it has no box of this finding.

    Example:
        >>> boxes = {"a.png": (Box(1, 0.5, 0.0, 0.5, 0.5),)}
        >>> data = XRays((Path("a.png"),), torch.zeros(1, 14).bool(), FINDINGS, boxes=boxes)
        >>> box_mask(data, 0, 1, 2, 2).tolist()
        [[False, True], [False, False]]
    """
    own = [box for box in data.boxes_of(index) if box.finding == finding]
    if not own:
        name = data.files[index].name
        raise ArgumentError(expected("finding", f"one with a box in {name!r}", FINDINGS[finding]))
    return torch.stack([box.mask(height, width) for box in own]).any(0)


def _entries(place: Path) -> Path:
    """The table of findings: of one of its versions."""
    found = sorted(place.glob("Data_Entry_2017*.csv"))
    if len(found) != 1:
        wanted = "one with a table of findings, Data_Entry_2017*.csv"
        raise FileError(expected("folder", wanted, [file.name for file in found] or repr(str(place))))
    return found[0]


def _by_name(files: list[Path]) -> dict[str, Path]:
    """Pictures by their names, none of which may be there twice."""
    twice = [name for name, count in Counter(file.name for file in files).items() if count > 1]
    if twice:
        hint = "Name one of the folders by `images`."
        places = [str(file) for file in files if file.name == twice[0]]
        got = f"{len(twice)} twice, such as {places}"
        raise FileError(expected("folder", "one with each picture once", got, hint))
    return {file.name: file for file in files}


def _findings(text: str, name: str) -> Tensor:
    """Which of the findings are in a cell such as "Effusion|Mass", (14,), bool."""
    words = [word.strip() for word in text.split("|")]
    strange = [word for word in words if word not in FINDINGS and word != _NOTHING]
    if strange or (_NOTHING in words and len(words) > 1):
        wanted = f"one whose table has findings of {', '.join(FINDINGS)}, or {_NOTHING}"
        raise FileError(expected("folder", wanted, f"{text!r} of {name!r}"))
    return torch.tensor([finding in words for finding in FINDINGS])


def _boxes(file: Path) -> dict[str, tuple[Box, ...]]:
    """Name -> boxes. The table's header splits "[x,y,w,h]" over four columns, and ends in empty ones."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        head, *rows = csv.reader(stream)
    if [name.strip() for name in head[:2]] != ["Image Index", "Finding Label"]:
        wanted = f"one where {file.name} has the columns Image Index, Finding Label, Bbox [x,y,w,h]"
        raise FileError(expected("folder", wanted, ", ".join(head)))
    found: dict[str, tuple[Box, ...]] = {}
    for number, row in enumerate(rows, 2):
        try:
            name, finding = row[0], _OTHER_NAMES.get(row[1], row[1])
            x, y, width, height = (float(cell) / _ORIGINAL for cell in row[2:6])
            box = Box(FINDINGS.index(finding), x, y, width, height)
        except (ValueError, IndexError) as error:
            wanted = f"one where {file.name} has a name, a finding and four numbers in each row"
            raise FileError(expected("folder", wanted, f"line {number}: {row} ({error})")) from error
        if not all(map(math.isfinite, (x, y, width, height))) or min(x, y) < 0 or min(width, height) <= 0:
            raise FileError(
                expected("folder", f"one where {file.name} has boxes inside images", f"line {number}: {row}")
            )
        found[name] = (*found.get(name, ()), box)
    return found
