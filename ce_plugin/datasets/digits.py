"""Handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998), which come with scikit-learn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ce_plugin.errors import ArgumentError, expected
from ce_plugin.networks.guard import state_guard

_SIDE = 8


def digits(size: int = _SIDE) -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits that come with scikit-learn.

    Args:
        size: height and width; above 8 the pictures are enlarged bilinearly.

    Returns:
        Pictures (1797, 1, size, size), float32 in [0, 1], multiples of 1/255 as in 8-bit image files, and
        labels (1797,), int64.

    Raises:
        ArgumentError: a size below 8.

    Example:
        >>> images, labels = digits(16)
        >>> images.shape, labels[:3].tolist()
        (torch.Size([1797, 1, 16, 16]), [0, 1, 2])

    Source: Alpaydin, Kaynak, 1998: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
    """
    if size < _SIDE:
        raise ArgumentError(expected("size", f"{_SIDE} pixels or more", size))
    with state_guard():  # its first import moves the global random state
        from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(values).reshape(-1, 1, _SIDE, _SIDE) / 16.0
    if size > _SIDE:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return ((images * 255.0).round() / 255.0).float(), torch.from_numpy(labels).long()
