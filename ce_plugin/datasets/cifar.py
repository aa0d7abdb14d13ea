"""CIFAR-10 (Krizhevsky 2009) from sheets of its pictures."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ce_plugin.datasets.images import read_image
from ce_plugin.errors import FileError, expected, unknown_name
from ce_plugin.files import existing_file

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SIDE, _ALONG = 32, 100
_SPLITS = {"train": "train_first5000", "test": "test_first8000"}


def cifar10_sheets(folder: str | PathLike[str], split: str = "test") -> tuple[Tensor, Tensor]:
    """Read the first pictures of CIFAR-10 from PNG sheets: tiles of 32 x 32, a hundred a row, in the original order.

    The whole data set in its own format is ``torchvision.datasets.CIFAR10``.

    Args:
        folder: holds ``test_first8000.png`` and ``test_first8000_labels.npy``, and those of ``train_first5000``.
        split: ``"train"``, the first 5,000 of the training pictures, or ``"test"``, the first 8,000.

    Returns:
        Pictures (N, 3, 32, 32), float32 in [0, 1], and labels (N,), int64, indices of :data:`CIFAR10_CLASSES`.

    Raises:
        UnknownNameError: an unknown split.
        FileError: a file is missing, damaged, or of another form.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (3200, 64)).save(Path(folder, "test_first8000.png"))
        ...     np.save(Path(folder, "test_first8000_labels.npy"), np.zeros(200, np.uint8))
        ...     cifar10_sheets(folder)[0].shape
        torch.Size([200, 3, 32, 32])

    Source: Krizhevsky, 2009: Learning multiple layers of features from tiny images.
    """
    if split not in _SPLITS:
        raise unknown_name("split", split, _SPLITS)
    stem = _SPLITS[split]
    sheet = read_image(existing_file(Path(folder) / f"{stem}.png", "folder", f"one with {stem}.png"))
    file = existing_file(Path(folder) / f"{stem}_labels.npy", "folder", f"one with {stem}_labels.npy")
    try:
        labels = torch.from_numpy(np.load(file, allow_pickle=False)).long()
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise FileError(expected("folder", f"one where {file.name} is an array", f"{error}")) from error
    _, height, width = sheet.shape
    if width != _SIDE * _ALONG or height % _SIDE:
        wanted = f"one where {stem}.png has {_ALONG} tiles of {_SIDE} x {_SIDE} a row"
        raise FileError(expected("folder", wanted, f"{width} x {height} pixels"))
    tiles = sheet.reshape(3, height // _SIDE, _SIDE, _ALONG, _SIDE).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if labels.shape != (len(tiles),) or not 0 <= int(labels.min()) <= int(labels.max()) < len(CIFAR10_CLASSES):
        came = f"labels {tuple(labels.shape)} for {len(tiles)} tiles"
        raise FileError(expected("folder", "one with a label, 0 to 9, for each tile", came))
    return tiles.float() / 255.0, labels
