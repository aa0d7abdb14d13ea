"""Picture files with labels: one form for all data sets of photographs, and readers of their folders and tables."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ce_plugin.datasets.images import read_image
from ce_plugin.datasets.sources import PICTURES, matched_classes
from ce_plugin.errors import ArgumentError, FileError, expected, unknown_name
from ce_plugin.files import existing_file, path_of, printable
from ce_plugin.randomness import generator

logger = logging.getLogger("ce_plugin")

_IMAGENET = 1000

Folder = str | PathLike[str]


@dataclass(frozen=True, repr=False)
class ImageFiles:
    """Pictures that are read when they are asked for, a data set for torch: item k is (picture, label).

    Args:
        files: N of them.
        labels: class index of each, (N,), int64; or which of the K findings each has, (N, K), bool.
        classes: what the indices mean; or the K findings.
        groups: to whom each belongs, such as a patient, for splits that no one is in twice; empty: all apart.
        left_out: reason -> how many pictures are not here.

    Example:
        >>> found = ImageFiles((Path("a.png"), Path("b.png")), torch.tensor([1, 0]), ("cat", "dog"))
        >>> len(found), found.subset([1]).files[0].name, found
        (2, 'b.png', ImageFiles(2 pictures, 2 classes))
    """

    files: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]
    groups: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        missing = "".join(f", left out: {count} {reason}" for reason, count in self.left_out.items())
        return f"{type(self).__name__}({len(self)} pictures, {len(self.classes)} classes{missing})"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        """The picture, (3, H, W), uint8, and its label: a class index, or (K,), bool.

        Raises:
            FileError: it cannot be read.
        """
        label = self.labels[index]
        return read_image(self.files[index]), (label if label.dim() else int(label))

    def subset(self, indices: Iterable[int] | Tensor, reason: str = "") -> ImageFiles:
        """Those with these indices; how many others there were is counted, if a reason is given."""
        kept = [int(i) for i in indices]
        left = len(self) - len(kept)
        counts = Counter(self.left_out)
        if reason and left:
            counts[reason] += left
        return replace(
            self,
            files=tuple(self.files[i] for i in kept),
            labels=self.labels[torch.tensor(kept, dtype=torch.long)],
            groups=tuple(self.groups[i] for i in kept) if self.groups else (),
            left_out=dict(counts),
        )

    def readable(self, *, strict: bool = False) -> ImageFiles:
        """Those that can be read whole; the others are logged and counted, or stop it if it is strict.

        Raises:
            FileError: one cannot be read, and ``strict`` is set.
        """
        errors = [_unreadable(file) for file in self.files]
        if strict:
            for error in filter(None, errors):
                raise error
        return self.subset((i for i, error in enumerate(errors) if error is None), "unreadable")

    def matched(self, names: Sequence[str]) -> ImageFiles:
        """Labels as indices of a network's outputs, whose class names are given; pictures of other classes left out.

        Raises:
            ArgumentError: no class has a name that agrees (:func:`~ce_plugin.datasets.matched_classes`), or several
                findings can be true at once.
        """
        if self.labels.dim() > 1:
            raise ArgumentError(expected("labels", "one class for each picture", f"{len(self.classes)} findings"))
        found = matched_classes(self.classes, names)
        kept = [i for i, label in enumerate(self.labels.tolist()) if label in found]
        here = self.subset(kept, "of classes that the network does not know")
        return replace(here, labels=torch.tensor([found[k] for k in here.labels.tolist()]), classes=tuple(names))

    def split(self, shares: Sequence[float], *, seed: int = 0) -> list[ImageFiles]:
        """Random parts of about these shares of the pictures; no group is in two of them.

        Args:
            shares: positive, at most 1 together.
            seed: any integer; which part a group is in depends on it and on the groups.

        Raises:
            ArgumentError: shares out of range.

        Example:
            >>> every = ImageFiles(tuple(map(Path, "abcdef")), torch.zeros(6).long(), ("x",), tuple("112233"))
            >>> [sorted(set(part.groups)) for part in every.split([1 / 3, 2 / 3])]
            [['1'], ['2', '3']]
        """
        if min(shares, default=0) <= 0 or sum(shares) > 1 + 1e-9:
            raise ArgumentError(expected("shares", "positive numbers, at most 1 together", list(shares)))
        groups = self.groups or tuple(str(file) for file in self.files)
        sizes = Counter(groups)
        names = sorted(sizes)
        order = torch.randperm(len(names), generator=generator(seed, "split")).tolist()
        ends = torch.tensor(shares, dtype=torch.float64).cumsum(0) * len(self)
        part, done = {}, 0
        for k in order:
            # By the middle of the group, so that shares are kept within half a group.
            part[names[k]] = int((ends <= done + sizes[names[k]] / 2).sum())
            done += sizes[names[k]]
        return [self.subset(i for i, g in enumerate(groups) if part[g] == p) for p in range(len(shares))]


def imagenet_samples(folder: Folder) -> ImageFiles:
    """Photographs of ImageNet whose file names begin with the index of their class: ``0985_n11939491_daisy.jpg``.

    Raises:
        FileError: no such folder, or pictures without an index from 0 to 999.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (4, 4)).save(Path(folder, "0985_n11939491_daisy.jpg"))
        ...     found = imagenet_samples(folder)
        >>> found.classes[985], found.labels
        ('daisy', tensor([985]))
    """
    files = pictures_in(folder)
    heads = [file.stem.split("_", 2) for file in files]
    strange = [
        file.name
        for file, head in zip(files, heads, strict=True)
        if len(head) < 3 or not head[0].isdecimal() or int(head[0]) >= _IMAGENET
    ]
    if strange:
        raise FileError(expected("folder", "pictures named INDEX_WNID_NAME, of classes 0 to 999", strange[:3]))
    names = {int(index): name.replace("_", " ") for index, _, name in heads}
    classes = tuple(names.get(k, f"class {k}") for k in range(_IMAGENET))
    return ImageFiles(tuple(files), torch.tensor([int(head[0]) for head in heads]), classes)


def class_folders(folder: Folder, split: str = "", classes: Sequence[str] | None = None) -> ImageFiles:
    """Pictures in one folder for each class, in a folder for each split where there is one: ``train/forest/1.jpg``.

    This is the layout of 15 scenes (``scene15``), of Kermany's X-rays and of ``torchvision.datasets.ImageFolder``.

    Args:
        folder: the data set's.
        split: name of the folder inside, or "".
        classes: names of the class folders in their order; None: those that are there, in alphabetical order.

    Raises:
        FileError: no such folder, pictures beside the class folders, or class folders that are missing or unknown.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("test/forest", "test/street"):
        ...         Path(folder, name).mkdir(parents=True)
        ...         Image.new("RGB", (4, 4)).save(Path(folder, name, "1.png"))
        ...     found = class_folders(folder, "test")
        >>> found.classes, found.labels
        (('forest', 'street'), tensor([0, 1]))
    """
    place = path_of(folder, "folder") / split
    files = pictures_in(place, deep=True)
    inside = [file.relative_to(place).parts for file in files]
    loose = ["/".join(parts) for parts in inside if len(parts) != 2]
    if loose:
        hint = "Name the folder that holds one folder for each class, or a split of it."
        got = f"{len(loose)} that are not, such as {loose[0]!r}"
        raise FileError(expected("folder", f"{str(place)!r} with pictures in class folders", got, hint))
    names = sorted({parts[0] for parts in inside})
    if classes is not None and set(names) != set(classes):
        wanted = f"{str(place)!r} with folders {', '.join(classes)}"
        raise FileError(expected("folder", wanted, ", ".join(names)))
    order = list(classes) if classes is not None else names
    labels = torch.tensor([order.index(parts[0]) for parts in inside])
    return ImageFiles(tuple(files), labels, tuple(order))


def cub200(folder: Folder, split: str = "") -> ImageFiles:
    """CUB-200-2011 in its own layout (``images.txt``, ``classes.txt`` ...), or crops listed in ``index.csv``.

    Args:
        folder: holds ``images/`` and the tables.
        split: ``"train"``, ``"test"``, or "" for both.

    Returns:
        200 classes, with names such as "Black footed Albatross".

    Raises:
        UnknownNameError: an unknown split.
        FileError: a table is missing, has other columns, or names files that are not there.

    Example:
        >>> cub200("no/such/folder")
        Traceback (most recent call last):
        ce_plugin.errors.FileError: Expected argument `folder` to be one with classes.txt, but got ...

    Source: Wah, Branson, Welinder, Perona, Belongie, 2011 (Caltech, CNS-TR-2011-001).
    """
    if split not in ("", "train", "test"):
        raise unknown_name("split", split, ("train", "test"))
    place = path_of(folder, "folder")
    if (place / "index.csv").is_file():
        rows = table(place / "index.csv", ("file", "class_name", "split"))
        entries = [(row["file"], row["class_name"], row["split"]) for row in rows]
    else:
        names = dict(_pairs(place / "classes.txt"))
        label, train = dict(_pairs(place / "image_class_labels.txt")), dict(_pairs(place / "train_test_split.txt"))
        try:
            entries = [
                (name, names[label[key]], "train" if train[key] == "1" else "test")
                for key, name in _pairs(place / "images.txt")
            ]
        except KeyError as error:
            wanted = "tables that agree (images, image_class_labels, train_test_split and classes.txt)"
            raise FileError(expected("folder", wanted, f"no entry for {error}")) from error
    # A number in front of a class's name says where it comes: "001.Black_footed_Albatross".
    classes = sorted({name for _, name, _ in entries})
    kept = [entry for entry in entries if split in ("", entry[2])]
    return ImageFiles(
        _present(place / "images", [name for name, _, _ in kept]),
        torch.tensor([classes.index(name) for _, name, _ in kept]),
        tuple(name.partition(".")[2].replace("_", " ") or name.replace("_", " ") for name in classes),
    )


def birds(folder: Folder) -> ImageFiles:
    """Photographs of birds listed in ``index.csv`` (columns file and class).

    Raises:
        FileError: the table is missing, has other columns, or names files that are not there.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "index.csv").write_text("file,class\\nx.jpg,Least Auklet\\n")
        ...     Image.new("RGB", (4, 4)).save(Path(folder, "x.jpg"))
        ...     birds(folder).classes
        ('Least Auklet',)
    """
    place = path_of(folder, "folder")
    rows = table(place / "index.csv", ("file", "class"))
    classes = sorted({row["class"] for row in rows})
    labels = torch.tensor([classes.index(row["class"]) for row in rows])
    return ImageFiles(_present(place, [row["file"] for row in rows]), labels, tuple(classes))


def pictures_in(folder: Folder, *, deep: bool = False) -> list[Path]:
    """The pictures in a folder, or also below it, in order.

    Raises:
        FileError: no such folder, or none in it.
    """
    place = path_of(folder, "folder")
    if not place.is_dir():
        raise FileError(expected("folder", "an existing folder of pictures", repr(str(place))))
    files = sorted(one for one in (place.rglob("*") if deep else place.iterdir()) if one.suffix.lower() in PICTURES)
    if not files:
        hint = f"Known are {', '.join(sorted(PICTURES))}."
        raise FileError(expected("folder", "a folder with pictures", f"{str(place)!r}, without any", hint))
    return files


def table(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a csv file that has these columns and perhaps others.

    Raises:
        FileError: it is missing, no text, has other columns, or a row that is too short.
    """
    existing_file(file, "folder", f"one with {file.name}")
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise FileError(expected("folder", f"one where {file.name} is a table", f"{str(file)!r} ({error})")) from error
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        wanted = f"one where {file.name} has the columns {', '.join(columns)}"
        came = f"{', '.join(map(str, reader.fieldnames or ())) or 'none'}: no {', '.join(missing)}"
        raise FileError(expected("folder", wanted, came))
    for number, row in enumerate(rows, 2):
        if any(row[name] is None for name in columns):
            raise FileError(expected("folder", f"one where {file.name} has whole rows", f"line {number} is cut off"))
    return rows


def _pairs(file: Path) -> list[tuple[str, str]]:
    """The rows "number value" of a text file."""
    existing_file(file, "folder", f"one with {file.name}")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        key, _, value = line.partition(" ")
        if not value:
            wanted = f"one where {file.name} has lines of a number and a value"
            raise FileError(expected("folder", wanted, f"line {number}: {line[:60]!r}"))
        found.append((key, value.strip()))
    return found


def _present(folder: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """The files of a table, all of which must be there, none twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise FileError(expected("folder", "a table that names each file once", f"{twice[0]!r} twice"))
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*")} if folder.is_dir() else set()
    missing = [name for name in names if name not in there]
    if missing:
        got = f"{len(missing)} of {len(names)} missing in {str(folder)!r}, such as {missing[0]!r}"
        raise FileError(expected("folder", "one with all files that its table names", got))
    return tuple(folder / name for name in names)


def _unreadable(file: Path) -> FileError | None:
    """Why a picture cannot be read."""
    try:
        read_image(file)
    except FileError as error:
        logger.warning("left out: %s (%s)", printable(file.name), error)
        return error
    return None
