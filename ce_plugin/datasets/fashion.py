"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): 70,000 pictures of clothes, 28 x 28, in ten classes."""

from __future__ import annotations

import gzip
import zlib
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ce_plugin.errors import FileError, expected, unknown_name

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_SPLITS = {"train": "train", "test": "t10k"}


def fashion_mnist(folder: str | PathLike[str], split: str = "train") -> tuple[Tensor, Tensor]:
    """Read Fashion-MNIST from its four distributed files, compressed or not.

    Args:
        folder: holds ``train-images-idx3-ubyte.gz`` and the others.
        split: ``"train"``, 60,000 pictures, or ``"test"``, 10,000.

    Returns:
        Pictures (N, 1, 28, 28), float32 in [0, 1], and labels (N,), int64, indices of :data:`FASHION_CLASSES`.

    Raises:
        UnknownNameError: an unknown split.
        FileError: a file is missing, damaged, or in another format.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "t10k-images-idx3-ubyte").write_bytes(
        ...         bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(784)
        ...     )
        ...     _ = pathlib.Path(folder, "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 9]))
        ...     images, labels = fashion_mnist(folder, "test")
        >>> images.shape, FASHION_CLASSES[labels[0]]
        (torch.Size([1, 1, 28, 28]), 'Ankle boot')

    Source: arXiv 1708.07747; the format is that of LeCun's MNIST.
    """
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
        hint = "Fetch it from the data set's own page."
        raise FileError(expected("folder", f"one with {name}.gz", f"{str(folder)!r} ({error})", hint)) from error
    header = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != header + int(np.prod(sizes)):
        came = f"{len(content)} bytes that begin with {content[:4].hex()}"
        raise FileError(expected("folder", f"one where {name} is a complete file in IDX format", came))
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy())
