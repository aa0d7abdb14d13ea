"""Data sets by name: a folder of pictures, a data set of torchvision, Parquet, or a function of yours."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ce_plugin.datasets.images import decode_image, read_image, to_eight_bits
from ce_plugin.errors import ArgumentError, FileError, InputError, UnknownNameError, expected, unknown_name
from ce_plugin.files import path_of, printable

if TYPE_CHECKING:
    import pyarrow.parquet as pq

PICTURES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Endings of the names of pictures."""

# Of a Parquet file, the columns that may hold pictures and classes.
_IMAGES, _LABELS = (
    ("image", "img", "jpg", "png", "picture"),
    ("label", "labels", "class", "fine_label", "target", "cls"),
)


def data_folder(name: str = "") -> Path:
    """The folder of a data set, inside the folder that the environment variable ``CE_PLUGIN_DATA`` names.

    Args:
        name: of the folder inside, such as ``"cifar10"``; "" for all of them.

    Raises:
        FileError: the variable is not set, or there is no such folder; the message says what to do.

    Example:
        >>> import tempfile
        >>> from unittest.mock import patch
        >>> with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, CE_PLUGIN_DATA=folder):
        ...     Path(folder, "cifar10").mkdir()
        ...     data_folder("cifar10").name
        'cifar10'
    """
    root = os.environ.get("CE_PLUGIN_DATA", "")
    place = path_of(root) / path_of(name, "name")
    if not root or not place.is_dir():
        wanted = f"the folder that holds {name or 'the data sets'}"
        came = repr(root) if root else "not set"
        hint = "Write export CE_PLUGIN_DATA=FOLDER; the page on the gallery says what is in it."
        raise FileError(expected("CE_PLUGIN_DATA", wanted, came, hint))
    return place


class ImageSource(ABC):
    """Pictures that are read one by one, with their labels, where there are some.

    Attributes:
        paths: what each is called.
        labels: class index of each, or None.
        class_names: what the labels mean, in their order, or None.
        fingerprint: tells the data set from another.
    """

    paths: Sequence[str]
    labels: list[int] | None = None
    class_names: tuple[str, ...] | None = None
    fingerprint: str = ""

    @abstractmethod
    def item(self, index: int) -> tuple[Tensor, int | None]:
        """One picture, (3, H, W), uint8 (or as the network takes it, where it is of a floating-point type); its label.

        Raises:
            FileError: it cannot be read.
        """

    def __len__(self) -> int:
        return len(self.paths)


class FolderImages(ImageSource):
    """Pictures in and below a folder; where each lies in a subfolder, these are its classes.

    Args:
        folder: is searched to the bottom; the order is that of the paths.
        classes: whether subfolders are classes; None finds out.

    Raises:
        FileError: no such folder, or no picture in it.
        ArgumentError: some pictures lie in subfolders and some do not.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cat", "dog"):
        ...         Path(folder, name).mkdir()
        ...         Image.new("RGB", (4, 4)).save(Path(folder, name, "1.png"))
        ...     found = FolderImages(folder)
        >>> found.class_names, found.labels, list(found.paths)
        (('cat', 'dog'), [0, 1], ['cat/1.png', 'dog/1.png'])
    """

    def __init__(self, folder: str | os.PathLike[str], *, classes: bool | None = None) -> None:
        self.folder = Path(os.path.abspath(path_of(folder, "data")))
        if not os.path.isdir(self.folder):
            raise FileError(expected("data", "an existing folder of pictures", repr(str(self.folder))))
        files = sorted(one for one in self.folder.rglob("*") if one.suffix.lower() in PICTURES and one.is_file())
        if not files:
            hint = f"Known are {', '.join(sorted(PICTURES))}."
            raise FileError(expected("data", "a folder with pictures", f"{str(self.folder)!r}, without any", hint))
        # As text: a data set of millions goes to every worker.
        self.files = list(map(str, files))
        inside = [one.relative_to(self.folder) for one in files]
        self.paths = [printable(one.as_posix()) for one in inside]
        deep = [len(one.parts) > 1 for one in inside]
        if classes is None and any(deep) and not all(deep):
            loose = self.paths[deep.index(False)]
            hint = "Move the others into folders of their classes, or say that folders are no classes (--no-labels)."
            got = f"{sum(deep)} in subfolders and {len(deep) - sum(deep)} that are not, such as {loose!r}"
            raise ArgumentError(expected("data", "all pictures in class folders, or none", got, hint))
        if all(deep) if classes is None else classes:
            names = sorted({one.parts[0] for one in inside})
            self.class_names = tuple(names)
            self.labels = [names.index(one.parts[0]) for one in inside]
        sizes = "".join(f"{path} {file.stat().st_size}\n" for path, file in zip(self.paths, files, strict=True))
        self.fingerprint = f"{len(files)} pictures, {_digest(sizes.encode())}"

    def item(self, index: int) -> tuple[Tensor, int | None]:
        return read_image(self.files[index]), None if self.labels is None else self.labels[index]


class ParquetImages(ImageSource):
    """Pictures in Parquet files, as the Hugging Face hub holds them: a column of encoded bytes, another of labels.

    Args:
        path: a file, or a folder of them, in the order of their names.

    Raises:
        FileError: no such file, no Parquet, or no column of pictures in it.

    Example:
        >>> import io, tempfile
        >>> import pyarrow, pyarrow.parquet
        >>> from PIL import Image
        >>> Image.new("RGB", (4, 4), "red").save(content := io.BytesIO(), "png")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = pyarrow.table({"image": [content.getvalue()], "label": [7]})
        ...     pyarrow.parquet.write_table(table, folder + "/pictures.parquet")
        ...     image, label = ParquetImages(folder).item(0)
        >>> image[:, 0, 0].tolist(), label
        ([255, 0, 0], 7)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        place = Path(os.path.abspath(path_of(path, "data")))
        self.files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
        # Where each row group begins: file, group, first row.
        self.groups: list[tuple[int, int, int]] = []
        labels: list[Any] = []
        names: list[str] = []
        for number in range(len(self.files)):
            self._take_file(number, names, labels)
        self.paths = names
        if labels:
            self._take_labels(labels)
        stated = "".join(f"{file.name} {file.stat().st_size}\n" for file in self.files)
        self.fingerprint = f"{len(names)} pictures, {_digest(stated.encode())}"
        self._open: dict[int, pq.ParquetFile] = {}
        self._held: tuple[int, list[Any]] = (-1, [])

    def _take_file(self, number: int, names: list[str], labels: list[Any]) -> None:
        """Add a file's rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self.files[number]
        try:
            with pq.ParquetFile(file) as opened:
                columns = opened.schema_arrow.names
                self.image = _column(columns, _IMAGES, file)
                for group in range(opened.num_row_groups):
                    self.groups.append((number, group, len(names)))
                    rows = opened.metadata.row_group(group).num_rows
                    names += [f"{file.name}:{row}" for row in range(len(names), len(names) + rows)]
                there = [name for name in _LABELS if name in columns]
                labels += opened.read([there[0]])[there[0]].to_pylist() if there else []
        except FileError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise FileError(expected("data", "Parquet files of pictures", f"{str(file)!r} ({error})")) from error

    def _take_labels(self, labels: list[Any]) -> None:
        if len(labels) != len(self.paths) or any(label is None for label in labels):
            return
        if all(isinstance(label, str) for label in labels):
            self.class_names = tuple(sorted(set(labels)))
            self.labels = [self.class_names.index(label) for label in labels]
        elif all(isinstance(label, int) for label in labels):
            self.labels = labels

    def item(self, index: int) -> tuple[Tensor, int | None]:
        import pyarrow.parquet as pq

        place = max(k for k, (_, _, first) in enumerate(self.groups) if first <= index)
        number, group, first = self.groups[place]
        if self._held[0] != place:
            if number not in self._open:
                self._open[number] = pq.ParquetFile(self.files[number])
            column = self._open[number].read_row_group(group, columns=[self.image])[self.image]
            self._held = (place, column.to_pylist())
        stored = self._held[1][index - first]
        content = stored.get("bytes") if isinstance(stored, dict) else stored
        if not isinstance(content, bytes):
            raise FileError(expected("image", "the bytes of a picture file", type(content).__name__))
        return decode_image(content, self.paths[index]), None if self.labels is None else self.labels[index]

    def __getstate__(self) -> dict[str, Any]:
        """Files are opened anew in another process."""
        return {**self.__dict__, "_open": {}, "_held": (-1, [])}


class DatasetImages(ImageSource):
    """The images of a map-style data set whose items are pictures, or pairs (picture, label).

    Args:
        data: a data set of torchvision, or your own; a picture is one of PIL's, a tensor of bytes, or of a
            floating-point type, which is then what the network takes. Its attribute ``files``, if there is one, names
            the pictures.
        name: what it is called.

    Raises:
        ArgumentError: it has no length or no items.

    Example:
        >>> DatasetImages([(torch.zeros(1, 2, 2), 3)], "mine").item(0)[1]
        3
    """

    def __init__(self, data: Any, name: str) -> None:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ArgumentError(expected("data", "a data set with a length and items", type(data).__name__))
        self.data, self.name = data, name
        self.paths = _names(getattr(data, "files", None), len(data)) or _Numbered(name, len(data))
        found = getattr(data, "classes", None)
        if isinstance(found, (list, tuple)) and all(isinstance(one, str) for one in found):
            self.class_names = tuple(found)
        first = self.item(0)[0] if len(data) else torch.empty(0)
        self.fingerprint = f"{name}, {len(data)} pictures, {_digest(first.numpy().tobytes())}"

    def item(self, index: int) -> tuple[Tensor, int | None]:
        from torchvision.transforms.v2 import functional as transform

        item = self.data[index]
        image, label = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
        if not isinstance(image, Tensor):
            try:
                image = transform.pil_to_tensor(to_eight_bits(image, f"{self.name}:{index}"))
            except (AttributeError, TypeError) as error:
                wanted = "pictures of PIL or tensors, or pairs with a label"
                raise InputError(expected("data", wanted, type(image).__name__)) from error
        elif image.dtype == torch.uint8:
            image = image if image.dim() == 3 else image[None]
            image = image.expand(3, *image.shape[1:])
        # Several findings of one picture are no class.
        return image, None if label is None or np.ndim(label) else int(label)


def _names(files: object, n: int) -> list[str]:
    """Different names of as many files, below the folder that they share; none, where these are none."""
    if not isinstance(files, (list, tuple)) or not all(isinstance(one, (str, Path)) for one in files):
        return []
    if len(files) != n or len({*map(str, files)}) < n or not n:
        return []
    shared = os.path.commonpath([os.path.dirname(one) for one in files])
    return [printable(Path(os.path.relpath(one, shared or os.curdir)).as_posix()) for one in files]


class _Numbered(Sequence[str]):
    """Names "name:0", "name:1" ... of as many items, made when they are asked for."""

    def __init__(self, name: str, n: int) -> None:
        self.name, self.n = name, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> Any:
        return f"{self.name}:{range(self.n)[index]}"


def open_source(name: str, *, root: str | os.PathLike[str] | None = None, labels: bool = True) -> ImageSource:
    """The data set with this name.

    Args:
        name: a folder of pictures (subfolders are classes); a file or folder of Parquet; ``torchvision:NAME`` or
            ``torchvision:NAME:SPLIT`` (``torchvision:CIFAR10:test``); ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION``, a
            function without arguments that returns a data set.
        root: where torchvision keeps its data sets.
        labels: whether folders are classes.

    Raises:
        FileError: there is no such file or folder, or the data set is not there and cannot be downloaded.
        UnknownNameError: no such data set, split, module or function.

    Example:
        >>> open_source("no/such/folder")
        Traceback (most recent call last):
        ce_plugin.errors.FileError: Expected argument `data` to be a folder of pictures, a Parquet file,
        torchvision:NAME or MODULE:FUNCTION, but got 'no/such/folder', which does not exist.
    """
    place = Path(name)
    if place.is_dir():
        parquet = any(place.glob("*.parquet"))
        return ParquetImages(place) if parquet else FolderImages(place, classes=None if labels else False)
    if place.suffix == ".parquet":
        return ParquetImages(place)
    prefix, colon, rest = name.partition(":")
    if prefix == "torchvision" and colon:
        return _from_torchvision(rest, Path(root) if root is not None else Path("data"))
    if colon:
        return _from_function(name)
    wanted = "a folder of pictures, a Parquet file, torchvision:NAME or MODULE:FUNCTION"
    raise FileError(expected("data", wanted, f"{name!r}, which does not exist"))


def labels_for(source: ImageSource, class_names: Sequence[str] | None, n_classes: int) -> list[int] | None:
    """The labels as indices of a network's outputs.

    Names of classes that the network knows are found by name; names that are numbers are indices; as many names as
    the network has classes are taken in their order.

    Args:
        source: whose labels.
        class_names: of the network; None where it has none.
        n_classes: number of its outputs.

    Returns:
        A class index for each picture; None where there are no labels, or they are indices already.

    Raises:
        ArgumentError: classes that the network does not know.

    Example:
        >>> from types import SimpleNamespace
        >>> labels_for(SimpleNamespace(class_names=("Cat", "dog"), labels=[0, 1, 1]), ["dog", "cow", "cat"], 3)
        [2, 0, 0]
    """
    names = source.class_names
    if names is None or source.labels is None:
        return None
    known = {name.casefold(): index for index, name in enumerate(class_names or ())}
    if all(name.casefold() in known for name in names):
        index = [known[name.casefold()] for name in names]
    elif all(name.isdecimal() for name in names):
        index = [int(name) for name in names]
    elif len(names) in (n_classes, 2 if n_classes == 1 else n_classes):
        index = list(range(len(names)))
    else:
        strange = [name for name in names if name.casefold() not in known]
        got = f"{len(names)} classes, among them {strange[:5]}"
        hint = "Name the folders as the network's classes or by their numbers, or leave labels out (--no-labels)."
        raise ArgumentError(expected("data", f"labels among the network's {n_classes} classes", got, hint))
    return [index[label] for label in source.labels]


def matched_classes(classes: Sequence[str], names: Sequence[str]) -> dict[int, int]:
    """Which classes of a data set a network knows by name: index of the class -> index of the network's output.

    Names agree where their letters do, whatever their case, in "Cassin's Finch", "Cassin_Finch" and
    "Haemorhous cassinii (Cassin's Finch)" alike.

    Args:
        classes: of the data set.
        names: of the network's outputs.

    Raises:
        ArgumentError: no class has a name that agrees.

    Example:
        >>> matched_classes(["Cassin Finch", "Dodo"], ["Anas acuta (Pintail)", "Haemorhous cassinii (Cassin's Finch)"])
        {0: 1}
    """
    known: dict[str, int] = {}
    for index, name in enumerate(names):
        known.setdefault(_letters(name), index)
    found = {k: known[_letters(name)] for k, name in enumerate(classes) if _letters(name) in known}
    if not found:
        came = f"{', '.join(map(repr, classes[:3]))} ..., which are none of {', '.join(map(repr, names[:3]))} ..."
        raise ArgumentError(expected("names", "classes of this data set", came))
    return found


def _letters(name: str) -> str:
    """The letters of a name by which it is recognised, without a possessive s: of the part in brackets, if there is."""
    common = name.rpartition("(")[2].rpartition(")")[0] or name
    words = common.replace("_", " ").replace("-", " ").replace("'s ", " ").replace("’s ", " ")
    return "".join(sign for sign in words.casefold() if sign.isalnum())


def _from_torchvision(name: str, root: Path) -> DatasetImages:
    import inspect

    from torchvision import datasets

    kind, _, split = name.partition(":")
    known = [one for one in datasets.__all__ if inspect.isclass(getattr(datasets, one))]
    if kind not in known:
        raise unknown_name("data", f"torchvision:{kind}", [f"torchvision:{one}" for one in known])
    made = getattr(datasets, kind)
    options = inspect.signature(made).parameters
    settings: dict[str, Any] = {"root": str(root)} if "root" in options else {}
    if "train" in options:
        if split not in ("", "train", "test"):
            raise unknown_name("split", split, ("train", "test"))
        settings["train"] = split == "train"
    elif "split" in options and split:
        settings["split"] = split
    try:
        data = made(**settings)
    except (RuntimeError, OSError) as there_is_none:
        if "download" not in options:
            raise _not_there(kind, root, there_is_none) from there_is_none
        try:
            data = made(download=True, **settings)
        except (RuntimeError, OSError) as error:
            raise _not_there(kind, root, error) from error
    except (ValueError, TypeError) as error:  # an unknown split; a data set with obligatory arguments
        raise ArgumentError(expected("data", f"torchvision:{kind}:SPLIT", f"{name!r} ({error})")) from error
    return DatasetImages(data, f"{kind}:{split}" if split else kind)


def _not_there(kind: str, root: Path, error: Exception) -> FileError:
    hint = f"Put its files where torchvision.datasets.{kind} looks for them, or name another folder with --root."
    reason = " ".join(str(error).split())[:200]
    return FileError(expected("data", f"torchvision's {kind} in {str(root)!r}, or downloadable", reason, hint))


def _from_function(name: str) -> ImageSource:
    module, _, function = name.rpartition(":")
    hint = "It must be installed, or be a .py file; the function takes no arguments and returns a data set."
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            if spec is None or spec.loader is None or not Path(module).is_file():
                raise ImportError(f"no file {module!r}")
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
        made = getattr(loaded, function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownNameError(expected("data", "MODULE:FUNCTION", f"{name!r} ({error})", hint)) from error
    data = made()
    return data if isinstance(data, ImageSource) else DatasetImages(data, name)


def _column(names: Sequence[str], known: Sequence[str], file: Path) -> str:
    """Which column holds the pictures."""
    found = [name for name in known if name in names]
    if not found:
        wanted = f"Parquet with a column of pictures, named {', '.join(known)}"
        raise FileError(expected("data", wanted, f"{file.name!r} with {', '.join(names)}"))
    return found[0]


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
