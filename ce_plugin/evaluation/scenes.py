"""Planted scenes: images and networks in which the contribution of every cell is known, for every kind of method."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ce_plugin.effects import resolve_outcome
from ce_plugin.errors import ArgumentError, expected
from ce_plugin.evaluation.methods import Scene
from ce_plugin.evaluation.planted import PlantedNetwork
from ce_plugin.randomness import generator

__all__ = ["PlantedCase", "PlantedScene", "planted_scenes"]

_MOST = 12  # 4096 assignments


class PlantedScene(nn.Module):
    """A convolutional network whose answer depends on which marks an image has, and an image with some of them.

        m_k(x) = sum over cells of mark k's presence,   z = PlantedNetwork(m):
        main effects, interactions of pairs of marks, and hidden units

    An image is black but for marks in some cells of a grid, each a square of one of K colours; colour k is channel k.
    The network has what attribution methods look for: a convolution, ReLU, a last value with positions (each mark's
    presence), pooling over them, and a head. So the effect of removing a cell's mark (setting it to black) while each
    of the others is removed with probability 1/2 can be computed exactly, by enumeration.

    Args:
        colors: K.
        grid: cells of a side.
        cell: pixels of a cell's side.
        marks: how many cells have one, at most 12.
        seed: of weights and image.

    Attributes:
        x: (1, K, grid cell, grid cell), values 0 and 1.
        places: index of each mark's cell, row by row.

    Raises:
        ArgumentError: numbers out of range.

    Example:
        >>> scene = PlantedScene(seed=3)
        >>> scene.x.shape, scene(scene.x).shape, scene.contributions(0).shape
        (torch.Size([1, 3, 28, 28]), torch.Size([1, 3]), torch.Size([7, 7]))
    """

    def __init__(self, colors: int = 3, grid: int = 7, cell: int = 4, marks: int = 10, *, seed: int = 0) -> None:
        super().__init__()
        if not (colors >= 2 and cell >= 1 and 1 <= marks <= min(_MOST, grid**2)):
            wanted = f"2 colours, 1 pixel and 1 to {_MOST} marks that fit, or more of the first two"
            raise ArgumentError(expected("colors, cell, marks", wanted, (colors, cell, marks)))
        draw = generator(seed, "planted scene")
        self.grid, self.cell = grid, cell
        # Two channels for each colour, so that no channel is the image itself.
        self.conv = nn.Conv2d(colors, 2 * colors, cell, stride=cell, device="meta")
        weight = torch.zeros(2 * colors, colors, cell, cell)
        for k in range(2 * colors):
            weight[k, k % colors] = 1 / cell**2
        self.conv.weight, self.conv.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(2 * colors))
        self.act, self.pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        classes, units, hidden = 3, 2 * colors, 4
        self.head = PlantedNetwork(
            0.5 * torch.randn(units, classes, generator=draw),
            list(itertools.combinations(range(colors), 2)),
            0.15 * torch.randn(colors * (colors - 1) // 2, classes, generator=draw),
            hidden=(
                0.3 * torch.randn(units, hidden, generator=draw),
                0.5 * torch.randn(hidden, classes, generator=draw),
            ),
        )
        self.places = torch.randperm(grid**2, generator=draw)[:marks].tolist()
        kinds = torch.randint(colors, (marks,), generator=draw).tolist()
        small = torch.zeros(1, colors, grid, grid)
        for place, kind in zip(self.places, kinds, strict=True):
            small[0, kind, place // grid, place % grid] = 1.0
        self.x = small.repeat_interleave(cell, 2).repeat_interleave(cell, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, K, grid cell, grid cell) to logits (N, 3)."""
        planes = self.pool(self.act(self.conv(images))) * self.grid**2
        logits: Tensor = self.head(planes.flatten(1))
        return logits

    def contributions(self, target: int, outcome: str = "probability") -> Tensor:
        """Minus the effect of removing each cell's mark, the others removed with probability 1/2, (grid, grid)."""
        n = len(self.places)
        assignments = ((torch.arange(2**n)[:, None] >> torch.arange(n)) & 1).bool()
        small = self.x[:, :, :: self.cell, :: self.cell].flatten(2).expand(2**n, -1, -1).clone()
        small[:, :, self.places] *= (~assignments)[:, None].float()
        images = small.reshape(2**n, -1, self.grid, self.grid).repeat_interleave(self.cell, 2)
        with torch.no_grad():
            logits = self(images.repeat_interleave(self.cell, 3)).double()
        measured = resolve_outcome(outcome)(logits, logits[:1].expand_as(logits))[:, target]
        found = torch.zeros(self.grid**2, dtype=torch.double)
        for unit, place in enumerate(self.places):
            removed = assignments[:, unit]
            found[place] = measured[~removed].mean() - measured[removed].mean()
        return found.reshape(self.grid, self.grid)


@dataclass(frozen=True)
class PlantedCase:
    """A scene with the true contribution of each of its cells, (grid, grid)."""

    scene: Scene
    truth: Tensor

    def agreement(self, map_: Tensor) -> float:
        """Pearson correlation of a map (H, W), averaged over each cell, with the truth; of a constant map 0."""
        side = len(self.truth)
        cells = map_.double().reshape(side, len(map_) // side, side, -1).mean((1, 3)).flatten()
        a, b = cells - cells.mean(), (self.truth - self.truth.mean()).flatten()
        scale = float(a.norm() * b.norm())
        return float(a @ b) / scale if scale > 0 else 0.0


def planted_scenes(n: int, *, seed: int = 0) -> Iterator[PlantedCase]:
    """Different planted scenes; the class that is explained is the one that the network answers.

    Example:
        >>> case = next(planted_scenes(1))
        >>> round(case.agreement(case.truth.repeat_interleave(4, 0).repeat_interleave(4, 1)), 6)
        1.0
    """
    for ident in range(n):
        own = PlantedScene(seed=seed * 1_000_003 + ident).eval()
        with torch.no_grad():
            target = int(own(own.x).argmax())
        yield PlantedCase(Scene(own.x, target, own, ident=ident, signed=True), own.contributions(target))
