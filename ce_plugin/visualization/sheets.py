"""Several pictures on one sheet, and a picture with one of its regions pointed out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, expected

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["sheet", "spotlight"]

_DPI = 100


def sheet(rows: Sequence[Sequence[tuple[str, Figure | Tensor]]], *, note: str = "", width: int = 300) -> Figure:
    """Pictures in rows, each with its title.

    Args:
        rows: of (title, picture); a picture is a figure, or (C, H, W) with values in [0, 1], C = 1 or 3.
        note: written below.
        width: of each picture, in pixels.

    Returns:
        A figure.

    Raises:
        ArgumentError: no picture, or rows of different lengths.
        InputError: a tensor of another shape.

    Example:
        >>> import torch
        >>> sheet([[("left", torch.rand(3, 8, 8)), ("right", torch.rand(1, 8, 8))]]).get_size_inches().tolist()
        [6.0, 3.3]
    """
    from matplotlib.figure import Figure

    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or lengths == {0}:
        raise ArgumentError(expected("rows", "one or more rows of equal length", [len(row) for row in rows]))
    inches, head, foot = width / _DPI, 0.3, 0.3 if note else 0.0
    columns = lengths.pop()
    height = len(rows) * (inches + head) + foot
    figure = Figure(figsize=(columns * inches, height), dpi=_DPI)
    for i, row in enumerate(rows):
        for j, (title, shown) in enumerate(row):
            bottom = height - (i + 1) * (inches + head)
            axes = figure.add_axes((j / columns + 0.004, bottom / height, 1 / columns - 0.008, inches / height))
            axes.imshow(_pixels(shown))
            axes.set_axis_off()
            top = (bottom + inches + 0.5 * head) / height
            figure.text((j + 0.5) / columns, top, _shortened(title), ha="center", va="center", fontsize=9)
    figure.text(0.5, 0.5 * foot / height, note, ha="center", va="center", fontsize=8.5)
    return figure


def _shortened(title: str, most: int = 48) -> str:
    """A title that fits above a picture."""
    return title if len(title) <= most else title[: most - 1] + "…"


def _pixels(shown: Figure | Tensor) -> npt.NDArray[Any]:
    if isinstance(shown, Tensor):
        if shown.dim() != 3 or shown.shape[0] not in (1, 3):
            raise InputError(expected("rows", "pictures of shape (1 or 3, H, W)", tuple(shown.shape)))
        pixels: npt.NDArray[Any] = shown.detach().float().cpu().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
        return pixels
    from PIL import Image

    buffer = io.BytesIO()
    shown.savefig(buffer, format="png", dpi=150)
    return np.asarray(Image.open(buffer).convert("RGB"))


def spotlight(image: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """A picture with one region as it is, outlined in white, and the rest darkened.

    Args:
        image: (C, H, W), values in [0, 1].
        box: (left, top, right, bottom) in pixels, right and bottom exclusive.

    Returns:
        A picture of the same shape.

    Raises:
        InputError: not a picture, or a box that is empty or beyond it.

    Example:
        >>> import torch
        >>> spotlight(torch.full((1, 4, 4), 0.8), (1, 1, 3, 4))[0, :, 3].tolist()  # the outline
        [1.0, 1.0, 1.0, 1.0]
    """
    left, top, right, bottom = box
    height, width = image.shape[-2:]
    if image.dim() != 3 or not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(expected("box", f"a region inside of a picture (C, {height}, {width})", box))
    shown = 0.5 * image.detach().float().cpu()
    edge = max(1, min(height, width) // 112)
    outer = (slice(max(0, top - edge), bottom + edge), slice(max(0, left - edge), right + edge))
    shown[:, outer[0], outer[1]] = 1.0
    shown[:, top:bottom, left:right] = image[:, top:bottom, left:right].detach().float().cpu()
    return shown.clamp(0, 1)
