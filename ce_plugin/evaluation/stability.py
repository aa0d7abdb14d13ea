"""Does a map stay the same when the image is attacked? Rank correlation of maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ce_plugin.errors import InputError, ModelError, expected
from ce_plugin.networks.forward import double

__all__ = ["map_stability", "rank_correlation"]

Explain = Callable[[Tensor, Tensor], Tensor]


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of two maps, for each example; ties get the mean of their ranks.

    Args:
        first: (N, ...), finite.
        second: of the same shape.

    Returns:
        (N,), float64, in [-1, 1]; NaN where a map is constant.

    Raises:
        InputError: shapes that do not fit, fewer than two values, or values that are not finite.

    Example:
        >>> rank_correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 300.0, 20.0]])).item()
        0.5

    Source: Spearman 1904; of attribution maps Ghorbani, Abid, Zou 2019 (arXiv 1710.10547).
    """
    if first.shape != second.shape or first.dim() < 2 or first[0].numel() < 2:
        wanted = f"of the shape of `first`, {tuple(first.shape)}, (N, ...) with two values or more"
        raise InputError(expected("second", wanted, f"shape {tuple(second.shape)}"))
    if not bool(torch.isfinite(first).all()) or not bool(torch.isfinite(second).all()):
        raise InputError(expected("maps", "finite", "NaN or infinity", "Set undefined values to 0."))
    from scipy.stats import rankdata

    ranks = (rankdata(double(maps.detach().flatten(1)), axis=1) for maps in (first, second))
    a, b = (torch.from_numpy(one).to(first.device) for one in ranks)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    scale = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(1) / scale, torch.nan).clamp(-1, 1)


def map_stability(explain: Explain, clean: Tensor, changed: Tensor, target: Tensor) -> Tensor:
    """Rank correlation between the maps of clean and changed images for the same class, for each example.

    The class is the same for both, even if the network predicts another one for the changed image: otherwise the
    result would mix the stability of the map with that of the prediction.

    Args:
        explain: from (N, C, H, W) and classes (N,) to maps (N, ...).
        clean: (N, C, H, W), model units.
        changed: of the same shape: attacked, noisy ...
        target: (N,), the class that is explained in both images.

    Returns:
        (N,), float64: 1 where the order of the map's values is kept; NaN where a map is constant.

    Raises:
        InputError: shapes that do not fit.
        ModelError: ``explain`` does not return one map for each image.

    Example:
        >>> x = torch.rand(2, 3, 4, 4)
        >>> map_stability(lambda images, classes: images.sum(1), x, 2 * x + 1, torch.tensor([0, 1])).tolist()
        [1.0, 1.0]
    """
    if clean.dim() != 4 or changed.shape != clean.shape:
        wanted = f"images of the shape of `clean`, {tuple(clean.shape)}, (N, C, H, W)"
        raise InputError(expected("changed", wanted, f"shape {tuple(changed.shape)}"))
    if target.shape != clean.shape[:1]:
        raise InputError(expected("target", f"one class for each of {len(clean)} images", f"{tuple(target.shape)}"))
    maps = []
    for images in (clean, changed):
        found = explain(images, target)
        if not isinstance(found, Tensor) or found.dim() < 2 or len(found) != len(clean):
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ModelError(expected("explain", f"a function that returns {len(clean)} maps", got))
        maps.append(found)
    return rank_correlation(*maps)
