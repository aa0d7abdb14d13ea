"""Random designs in which neighbouring units flip together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ce_plugin.designs.base import Design, Grid, check_n_trials, is_share
from ce_plugin.errors import DesignError, expected
from ce_plugin.randomness import generator

__all__ = ["RandomRegions", "RandomWindows"]


class _OverGrid(Design):
    """Random designs whose trials set coherent parts of a grid; neighbours flip together, so a regression is needed."""

    estimator = "smooth"

    def __init__(self, p: float, n_trials: int, seed: int) -> None:
        if not is_share(p):
            raise DesignError(expected("p", "a share of the area in (0, 1)", p, "Write 0.5 for a half."))
        check_n_trials(n_trials)
        self.p, self.n_trials, self.seed = float(p), int(n_trials), int(seed)

    def n_trials_for(self, n_units: int) -> int:
        return self.n_trials

    def _grid(self, n_units: int, grid: Grid | None) -> Grid:
        if grid is None or grid[0] * grid[1] != n_units:
            todo = "Leave out `feature_mask` and windows for images (N, C, H, W), or use RandomMask or OneAtATime."
            raise DesignError(expected("design", "one for units that are not a grid", repr(self), todo))
        return grid

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.p}, n_trials={self.n_trials}, seed={self.seed})"


class RandomWindows(_OverGrid):
    """Square windows of several sizes at random places, until they cover a share of the image.

    Args:
        p: share of the area that each trial sets, in (0, 1); the nearest that whole windows give.
        n_trials: number of trials, 2 or more.
        sizes: sides of the windows as shares of the grid's longer side, in (0, 1].
        seed: any integer.

    Raises:
        DesignError: p outside (0, 1), fewer than 2 trials, sizes outside (0, 1], units that are not a grid.

    Example:
        >>> a = RandomWindows(0.5, n_trials=300).assignments(196, grid=(14, 14))
        >>> a.shape, bool((a.float().mean() - 0.5).abs() < 0.02)
        (torch.Size([300, 196]), True)
    """

    def __init__(
        self,
        p: float = 0.5,
        n_trials: int = 399,
        *,
        sizes: Sequence[float] = (0.1, 0.15, 0.2, 0.3, 0.4),
        seed: int = 0,
    ) -> None:
        super().__init__(p, n_trials, seed)
        if not sizes or not all(0 < size <= 1 for size in sizes):
            raise DesignError(expected("sizes", "shares of the grid's side in (0, 1]", sizes))
        self.sizes = tuple(float(size) for size in sizes)

    def assignments(self, n_units: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        rows, columns = self._grid(n_units, grid)
        draw = generator(self.seed, example, "windows")
        sides = torch.tensor([max(1, round(size * max(rows, columns))) for size in self.sizes])
        # Enough windows for any share: each covers its area once, and the last of a cover are found late.
        count = 4 + int(6 * n_units / float(sides.double().square().mean()))
        return torch.stack([self._trial(sides, count, rows, columns, draw) for _ in range(self.n_trials)])

    def _trial(self, sides: Tensor, count: int, rows: int, columns: int, draw: torch.Generator) -> Tensor:
        """The union of as many windows as bring the covered share nearest to p."""
        side = sides[torch.randint(len(sides), (count,), generator=draw)]
        # Windows may reach over the border, so that units at the border flip as often as the others.
        top = _start(side, rows, draw)
        left = _start(side, columns, draw)
        row, column = torch.arange(rows), torch.arange(columns)
        high = (row >= top[:, None]) & (row < (top + side)[:, None])
        wide = (column >= left[:, None]) & (column < (left + side)[:, None])
        union = (high[:, :, None] & wide[:, None, :]).flatten(1).cummax(0).values
        best = (union.double().mean(1) - self.p).abs().argmin()
        return union[best]


class RandomRegions(_OverGrid):
    """Coherent regions of random shape: units where low-frequency noise over the grid is high.

    White noise is averaged with a Gaussian of standard deviation ``length`` cells, scaled to unit variance, and a unit
    is set where it exceeds the normal quantile of 1 - p. Every unit, at the border too, flips with probability exactly
    p; neighbours tend to flip together; no direction or position is preferred. How many units flip differs between
    trials: with a fixed number the level that all effects share could not be told from the intercept.

    Args:
        p: probability that a unit flips, in (0, 1).
        n_trials: number of trials, 2 or more; with the reference the default takes 400 forward passes.
        length: standard deviation of the smoothing, in cells of the grid.
        seed: any integer.

    Raises:
        DesignError: p outside (0, 1), fewer than 2 trials, length not positive, units that are not a grid.

    Example:
        >>> a = RandomRegions(0.5, n_trials=300).assignments(196, grid=(14, 14))
        >>> a.shape, bool((a.float().mean() - 0.5).abs() < 0.03)
        (torch.Size([300, 196]), True)
    """

    def __init__(self, p: float = 0.5, n_trials: int = 399, *, length: float = 1.2, seed: int = 0) -> None:
        super().__init__(p, n_trials, seed)
        if not length > 0:
            raise DesignError(expected("length", "a positive number of cells", length))
        self.length = float(length)

    def assignments(self, n_units: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        rows, columns = self._grid(n_units, grid)
        draw = generator(self.seed, example, "regions")
        pad = math.ceil(3 * self.length)
        noise = torch.randn(self.n_trials, rows + 2 * pad, columns + 2 * pad, generator=draw, dtype=torch.float64)
        field = _gaussian(rows, pad, self.length) @ noise @ _gaussian(columns, pad, self.length).T
        above: Tensor = torch.special.ndtri(torch.tensor(1 - self.p, dtype=torch.float64))
        return field.flatten(1) > above


def _gaussian(n: int, pad: int, length: float) -> Tensor:
    """Weights (n, n + 2 pad), rows of norm 1, that average padded noise around each of n cells."""
    centre = torch.arange(n, dtype=torch.float64)[:, None] + pad
    weights = torch.exp(-0.5 * ((centre - torch.arange(n + 2 * pad, dtype=torch.float64)) / length) ** 2)
    return weights / weights.square().sum(dim=1, keepdim=True).sqrt()


def _start(side: Tensor, size: int, draw: torch.Generator) -> Tensor:
    """First cells of windows that overlap a line of ``size`` cells, each place equally likely."""
    places = size + side - 1
    return (torch.rand(len(side), generator=draw) * places).long() - side + 1
