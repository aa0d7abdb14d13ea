"""What is run when the user leaves the question open, and why."""

from __future__ import annotations

from torch import Tensor

from ce_plugin.designs import Design, OneAtATime, RandomRegions
from ce_plugin.interventions import Normalization, PixelMask
from ce_plugin.sites import InputSite

__all__ = ["default_design", "default_mask", "on_grid"]

# Below this many pixels a side there are so few units that each can be asked for by itself.
_SMALLEST_GRID = 5


def on_grid(site: InputSite, inputs: tuple[Tensor, ...]) -> bool:
    """Whether these inputs are images whose patches can be set region by region."""
    return site.is_grid(inputs) and min(inputs[0].shape[2:]) >= _SMALLEST_GRID


def default_mask(grid: bool, normalization: Normalization) -> PixelMask:
    """Black, mean and blur in turn for images: no single fill then passes for evidence; zero for anything else."""
    return PixelMask(("zero", "mean", "blur") if grid else "zero", normalization=normalization)


def default_design(grid: bool) -> Design:
    """Random regions, 400 passes with the reference, for images; each unit by itself for anything else."""
    return RandomRegions() if grid else OneAtATime()
