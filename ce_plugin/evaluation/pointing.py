"""Does a map point at the right image? The grid pointing game on mosaics of classified images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ce_plugin.errors import ArgumentError, InputError, ModelError, TargetError, expected
from ce_plugin.randomness import generator

__all__ = ["Mosaics", "confidently_classified", "grid_pointing_game", "mosaics", "pointing_share"]

Explain = Callable[[Tensor, int, "tuple[int, ...]"], Tensor]
Labels = Union[Sequence[int], Tensor]


@dataclass(frozen=True)
class Mosaics:
    """Mosaics of grid x grid images of different classes.

    Args:
        x: (M, C, H, W), the mosaics.
        classes: (M, grid^2), the class of the image in each cell, row by row.
        members: (M, grid^2), the index of the image in each cell.

    Example:
        >>> Mosaics(torch.zeros(1, 3, 8, 8), torch.tensor([[4, 7, 1, 0]]), torch.tensor([[0, 1, 2, 3]])).grid
        2
    """

    x: Tensor
    classes: Tensor
    members: Tensor

    @property
    def grid(self) -> int:
        """Number of cells in a row."""
        return math.isqrt(self.classes.shape[1])

    def __len__(self) -> int:
        return len(self.x)

    def others(self, mosaic: int, cell: int) -> tuple[int, ...]:
        """The classes of the other cells, which a contrastive map is contrasted with."""
        return tuple(int(c) for i, c in enumerate(self.classes[mosaic]) if i != cell)


def confidently_classified(outputs: Tensor, labels: Labels, least: float = 0.9) -> Tensor:
    """Examples that are classified correctly with a probability of at least ``least``.

    Args:
        outputs: (N, K), logits.
        labels: the true classes, N of them.
        least: probability in (0, 1].

    Returns:
        Indices of the examples, in order.

    Raises:
        InputError: shapes that do not fit.
        TargetError: a label that is no class of the outputs.
        ArgumentError: ``least`` out of range.

    Example:
        >>> confidently_classified(torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.1, 0.0]]), [0, 1, 0]).tolist()
        [0]
    """
    right = torch.as_tensor(labels, device=outputs.device)
    if outputs.dim() != 2 or right.shape != outputs.shape[:1]:
        wanted = f"logits (N, K) with N = {len(right)} labels"
        raise InputError(expected("outputs", wanted, f"shape {tuple(outputs.shape)}"))
    if len(right) and not 0 <= int(right.min()) <= int(right.max()) < outputs.shape[1]:
        raise TargetError(
            expected("labels", f"class indices of {outputs.shape[1]} classes", sorted(set(right.tolist())))
        )
    if not 0 < least <= 1:
        raise ArgumentError(expected("least", "a probability in (0, 1]", least))
    found = outputs.softmax(1).max(1)
    return ((found.indices == right) & (found.values >= least)).nonzero().flatten()


def mosaics(
    images: Tensor, classes: Labels, n: int, *, grid: int = 2, size: int | None = None, seed: int = 0
) -> Mosaics:
    """Mosaics of images drawn at random, no class twice in one mosaic, every image about equally often.

    Args:
        images: (N, C, H, W), model units.
        classes: the class of each image.
        n: number of mosaics.
        grid: number of cells in a row.
        size: height and width that the mosaics are shrunk to (antialiased, bilinear); None leaves the images as they
            are, side by side: (grid H, grid W).
        seed: of the draw.

    Returns:
        The mosaics, on the images' device.

    Raises:
        InputError: shapes that do not fit, or fewer different classes than cells.
        ArgumentError: ``n``, ``grid`` or ``size`` out of range.

    Example:
        >>> made = mosaics(torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 1, 4, 4), range(5), 3)
        >>> made.x.shape, made.classes[0].unique().numel()
        (torch.Size([3, 1, 8, 8]), 4)

    Source: Böhle, Fritz, Schiele, 2021 (arXiv 2104.00032), "grid pointing game".
    """
    labels = [int(c) for c in torch.as_tensor(classes)]
    if images.dim() != 4 or len(images) != len(labels):
        raise InputError(expected("images", f"{len(labels)} images (N, C, H, W)", f"shape {tuple(images.shape)}"))
    for name, value in (("n", n), ("grid", grid), ("size", 1 if size is None else size)):
        if value < 1:
            raise ArgumentError(expected(name, "1 or more", value))
    if len(set(labels)) < grid**2:
        hint = "Give images of more classes, or a smaller grid."
        raise InputError(expected("classes", f"{grid**2} different ones", f"{len(set(labels))}", hint))
    members = torch.tensor(_drawn(labels, n, grid**2, seed))
    rows = images[members.to(images.device)].reshape(n, grid, grid, *images.shape[1:])
    made = rows.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    if size is not None:
        made = interpolate(made, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return Mosaics(made.contiguous(), torch.tensor(labels)[members], members)


def _drawn(labels: list[int], n: int, cells: int, seed: int) -> list[list[int]]:
    """Indices of the images: least used first, ties at random, no class twice in a mosaic."""
    draw, used = generator(seed, "mosaics"), [0] * len(labels)
    found = []
    for _ in range(n):
        order = torch.randperm(len(labels), generator=draw).tolist()
        chosen: dict[int, int] = {}
        for i in sorted(order, key=lambda i: used[i]):
            chosen.setdefault(labels[i], i)
            if len(chosen) == cells:
                break
        found.append(list(chosen.values()))
        for i in found[-1]:
            used[i] += 1
    return found


def pointing_share(maps: Tensor, cell: int | Sequence[int] | Tensor, *, grid: int = 2) -> Tensor:
    """The share of a map's positive values that lies inside one cell of the grid: sum_cell max(m, 0) / sum max(m, 0).

    The share of a map without positive values is 0, not the 1 / grid^2 of a constant map.

    Args:
        maps: (N, H, W), or (N, 1, H, W); height and width are multiples of ``grid``.
        cell: index of the right cell, row by row; one for all maps or one for each.
        grid: number of cells in a row.

    Returns:
        (N,), in [0, 1].

    Raises:
        InputError: shapes that do not fit, values that are not finite.
        ArgumentError: a cell that does not exist.

    Example:
        >>> pointing_share(torch.tensor([[[3.0, 1.0], [-5.0, 0.0]]]), 0).item()
        0.75
    """
    flat = maps[:, 0] if maps.dim() == 4 and maps.shape[1] == 1 else maps
    if flat.dim() != 3 or not len(flat) or flat.shape[1] % grid or flat.shape[2] % grid:
        wanted = f"of shape (N, H, W) or (N, 1, H, W), H and W multiples of {grid}"
        raise InputError(expected("maps", wanted, f"shape {tuple(maps.shape)}", "Enlarge maps to the mosaic's size."))
    if not bool(torch.isfinite(flat).all()):
        raise InputError(expected("maps", "finite", "NaN or infinity", "Set undefined values to 0."))
    cells = torch.as_tensor(cell, device=flat.device).flatten()
    if not 0 <= int(cells.min()) <= int(cells.max()) < grid**2 or len(cells) not in (1, len(flat)):
        wanted = f"one index below {grid**2}, or one for each of {len(flat)} maps"
        raise ArgumentError(expected("cell", wanted, cells.tolist()))
    n, height, width = flat.shape
    cut = flat.clamp(min=0).reshape(n, grid, height // grid, grid, width // grid)
    positive = cut.sum((2, 4)).flatten(1)
    inside = positive.gather(1, cells.expand(n)[:, None])[:, 0]
    total = positive.sum(1)
    return torch.where(total > 0, inside / total.where(total > 0, 1.0), torch.zeros_like(total))


def grid_pointing_game(explain: Explain, pictures: Mosaics) -> Tensor:
    """The pointing share of the map for every cell of every mosaic.

    Args:
        explain: ``explain(x, target, others)`` with x (1, C, H, W), the class of a cell, and the classes of the other
            cells (for contrastive maps): a map (1, h, w) or (1, 1, h, w) of any size; it is enlarged bilinearly.
        pictures: see :func:`mosaics`.

    Returns:
        (M, grid^2): see :func:`pointing_share`.

    Raises:
        ModelError: ``explain`` does not return one map.

    Example:
        >>> made = mosaics(torch.rand(4, 1, 4, 4) * 0 + torch.arange(1.0, 5).reshape(4, 1, 1, 1), range(4), 1)
        >>> grid_pointing_game(lambda x, target, others: (x[:, 0] == target + 1).float(), made).tolist()
        [[1.0, 1.0, 1.0, 1.0]]

    Source: Böhle, Fritz, Schiele, 2021 (arXiv 2104.00032), section 4.1.
    """
    size = tuple(pictures.x.shape[2:])
    shares = torch.zeros(pictures.classes.shape)
    for mosaic in range(len(pictures)):
        for cell, target in enumerate(pictures.classes[mosaic].tolist()):
            found = explain(pictures.x[mosaic : mosaic + 1], target, pictures.others(mosaic, cell))
            shaped = found[:, None] if isinstance(found, Tensor) and found.dim() == 3 else found
            if not isinstance(shaped, Tensor) or shaped.dim() != 4 or shaped.shape[:2] != (1, 1):
                got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise ModelError(expected("explain", "a function that returns one map (1, h, w)", got))
            large = interpolate(shaped.detach().float(), size, mode="bilinear", align_corners=False)
            shares[mosaic, cell] = pointing_share(large, cell, grid=pictures.grid)[0]
    return shares
