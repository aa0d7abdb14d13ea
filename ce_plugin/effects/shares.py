"""Shares of a total effect: ratios of means over images, with bootstrapped intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, InferenceError, UnitError, expected
from ce_plugin.randomness import generator

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Ratio", "Shares", "check_bootstrap", "ratio_of_means", "refuse_without_total"]

# Units whose resamples are held at once: 2,000 resamples of 256 units are 4 MB each for a handful of tensors.
_CHUNK = 256


class Ratio(NamedTuple):
    """Ratios of means with their intervals.

    Attributes:
        share: (U,).
        low: (U,).
        high: (U,).
    """

    share: Tensor
    low: Tensor
    high: Tensor


@dataclass(kw_only=True, eq=False, repr=False)
class Shares:
    """The share of the total effect that passes through each unit, over images.

    Intervals are studentised bootstraps over the images (see :func:`~ce_plugin.effects.ratio_of_means`), each by
    itself. Shares of several units need not add up to 1, and can be negative: a unit may work against the effect.

    Attributes:
        indirect: mean NIE / mean TE, (U,): what the unit carries by itself.
        indirect_low, indirect_high: its interval, (U,).
        direct: 1 - mean NDE / mean TE, (U,): what is lost when the unit alone does not learn of the intervention.
        direct_low, direct_high: its interval, (U,).
        total, total_low, total_high: mean TE and its interval.
        n_images: number of images.
        level: of the intervals.
        unit_labels, site, outcome: what the units are, where, and what was measured.
        cut: everything passes through the site's layer.
        whole: the units that stand for the whole layer; of a cut layer their share is 1 by construction.
    """

    indirect: Tensor
    indirect_low: Tensor
    indirect_high: Tensor
    direct: Tensor
    direct_low: Tensor
    direct_high: Tensor
    total: float
    total_low: float
    total_high: float
    n_images: int
    level: float
    unit_labels: list[str]
    site: str = ""
    outcome: str = ""
    cut: bool = False
    whole: tuple[int, ...] = ()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per unit, the largest indirect share first.

        Columns: unit, label, indirect_share, indirect_low, indirect_high, direct_share, direct_low, direct_high, cut,
        by_construction.
        """
        import pandas as pd

        named = {
            "indirect_share": self.indirect,
            "indirect_low": self.indirect_low,
            "indirect_high": self.indirect_high,
        }
        named |= {"direct_share": self.direct, "direct_low": self.direct_low, "direct_high": self.direct_high}
        units = range(len(self))
        frame = pd.DataFrame(
            {
                "unit": list(units),
                "label": self.unit_labels,
                **{name: values.detach().cpu().numpy() for name, values in named.items()},
                "cut": self.cut,
                "by_construction": [self.cut and u in self.whole for u in units],
            }
        )
        ordered: pd.DataFrame = frame.sort_values("indirect_share", ascending=False, kind="stable", ignore_index=True)
        return ordered

    def __len__(self) -> int:
        return len(self.indirect)

    def __repr__(self) -> str:
        cut = " (a cut: the share of the whole layer is 1 by construction)" * self.cut
        lines = [
            f"Shares of the effect on {self.outcome or 'the outcome'} through {self.site or 'a site'}{cut}",
            f"  {self.n_images} images, mean total effect {self.total:+.4g} "
            f"[{self.total_low:+.4g}, {self.total_high:+.4g}], intervals at {self.level:g}",
        ]
        for u in self.indirect.argsort(descending=True, stable=True)[:5].tolist():
            note = ", by construction" if self.cut and u in self.whole else ""
            lines.append(
                f"  {self.unit_labels[u]}: {float(self.indirect[u]):.3f} "
                f"[{float(self.indirect_low[u]):.3f}, {float(self.indirect_high[u]):.3f}] by itself, "
                f"{float(self.direct[u]):.3f} lost without it{note}"
            )
        return "\n".join(lines + ["  ..."] * (len(self) > 5))


def ratio_of_means(part: Tensor, total: Tensor, level: float = 0.95, n_boot: int = 2000, seed: int = 0) -> Ratio:
    """Ratio of two means over images, with a studentised bootstrap interval.

        share = sum_i part_i / sum_i total_i,   SE = sqrt(sum_i (part_i - share total_i)^2 / (N (N - 1))) / |mean total|

    and the interval [share - q_high SE, share - q_low SE], q being quantiles of (share* - share) / SE* over images
    drawn with replacement. Studentised, because both simpler intervals are too short for ratios: with 20 images whose
    totals are log-normal, intervals at 95 % covered 85 % (BCa), 88 % (percentile) and 91 % (studentised); with
    part = total^1.5 and 50 images 69 % (percentile) and 84 %. No interval mends images of which one carries the mean.

    Args:
        part: (N, U), one column for each unit.
        total: (N,), not 0 on average (see :func:`refuse_without_total`).
        level: in (0, 1).
        n_boot: resamples, at least 100.
        seed: of the resampling; the images' order does not matter.

    Returns:
        Shares (U,) in float64 and their interval, infinite where there are too few images for one.

    Raises:
        UnitError: where the shapes do not go together.
        InferenceError: for fewer than two images.
        ArgumentError: for a level or number of resamples out of range.

    Example:
        >>> import torch
        >>> total = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        >>> ratio = ratio_of_means(torch.stack([total / 2, total - 1], dim=1), total)
        >>> ratio.share.round(decimals=3).tolist(), bool(ratio.low[1] < 0.667 < ratio.high[1])
        ([0.5, 0.667], True)

    Source: Efron and Tibshirani 1993, chapter 12 (bootstrap-t); ratio estimation, Cochran 1977, chapter 6.
    """
    _check(part, total, level, n_boot)
    return _ratio(part, total, total, level, n_boot, seed)


def mean_interval(x: Tensor, level: float, n_boot: int, seed: int) -> tuple[float, float, float]:
    """Mean over images, (N,), and its studentised bootstrap interval."""
    ratio = _ratio(x[:, None], torch.ones_like(x), x, level, n_boot, seed)
    return float(ratio.share), float(ratio.low), float(ratio.high)


def refuse_without_total(total: Tensor, level: float, n_boot: int, seed: int) -> tuple[float, float, float]:
    """Mean total effect and its interval, or an error where the interval contains 0.

    Args:
        total: (N,), each image's total effect.
        level, n_boot, seed: as in :func:`ratio_of_means`.

    Returns:
        (mean, low, high).

    Raises:
        InferenceError: where there is no total effect to have a share of.

    Example:
        >>> import torch
        >>> refuse_without_total(torch.tensor([1.0, -1.0, 0.5, -0.6, 0.2]), 0.95, 1000, 0)
        Traceback (most recent call last):
        ...
        ce_plugin.errors.InferenceError: There is no total effect to have a share of: its mean over 5 images is +0.02,
        with the interval [...] at level 0.95, which contains 0. ...
    """
    _check(total[:, None] if total.dim() == 1 else total, total, level, n_boot)
    mean, low, high = mean_interval(total, level, n_boot, seed)
    if not (low > 0 or high < 0):  # written so that NaN is refused too
        raise InferenceError(
            f"There is no total effect to have a share of: its mean over {len(total)} images is {mean:+.4g}, with the "
            f"interval [{low:+.4g}, {high:+.4g}] at level {level:g}, which contains 0. "
            "Take more images, a stronger intervention or another class; .total and .indirect themselves can be read."
        )
    return mean, low, high


def check_bootstrap(level: float, n_boot: int) -> None:
    """Whether level and number of resamples make an interval.

    Raises:
        ArgumentError: where they do not.

    Example:
        >>> check_bootstrap(0.95, 2000)
    """
    if not 0 < level < 1:
        raise ArgumentError(expected("level", "in (0, 1)", level, "Write 0.95 for 95 per cent."))
    if n_boot < 100:
        raise ArgumentError(expected("n_boot", "at least 100", n_boot, "2000 resamples are a matter of moments."))


def _check(part: Tensor, total: Tensor, level: float, n_boot: int) -> None:
    """Errors before any work."""
    check_bootstrap(level, n_boot)
    if total.dim() != 1 or part.dim() != 2 or len(part) != len(total):
        got = f"shapes {tuple(part.shape)} and {tuple(total.shape)}"
        raise UnitError(expected("part", "of shape (N, U), with totals (N,)", got))
    if len(total) < 2:
        todo = "A share is a ratio of means over images; of one image read .indirect and .total."
        raise InferenceError(expected("total", "the effects on at least 2 images", len(total), todo))


def _ratio(part: Tensor, total: Tensor, key: Tensor, level: float, n_boot: int, seed: int) -> Ratio:
    """Ratios and their intervals; images take part in the resampling by the rank of ``key``, (N,)."""
    y, x = part.detach().cpu().double(), total.detach().cpu().double()
    n, mean = len(x), x.mean()
    share = y.sum(dim=0) / x.sum() + 0.0  # no -0.0 in tables
    # What the ratios leave over: a share that is 1 but for rounding then has an interval of rounding's size.
    left = y - share * x[:, None]
    error = _ratio_error(left.square().sum(dim=0), n, mean)
    low, high = torch.empty_like(share), torch.empty_like(share)
    counts = _resamples(key, n_boot, seed)
    drawn, squares = (counts @ x)[:, None], (counts @ x.square())[:, None]
    for start in range(0, len(share), _CHUNK):
        own = slice(start, start + _CHUNK)
        off = counts @ left[:, own] / drawn
        # The sum of (left - off total)^2 over each resample, written out as three products of matrices.
        around = counts @ left[:, own].square()
        spread = around - 2 * off * (counts @ (left[:, own] * x[:, None])) + off.square() * squares
        # One image drawn again and again leaves nothing but rounding.
        spread = torch.where(spread <= 1e-12 * around, 0.0, spread)
        lowest, highest = _extremes(off, _ratio_error(spread, n, drawn / n), level)
        low[own] = share[own] - (highest * error[own]).nan_to_num(0.0, torch.inf, -torch.inf)
        high[own] = share[own] - (lowest * error[own]).nan_to_num(0.0, torch.inf, -torch.inf)
    return Ratio(share, low, high)


def _ratio_error(spread: Tensor, n: int, mean: Tensor) -> Tensor:
    """Standard error of a ratio of means, from the sum of squares of what the ratio leaves over."""
    return (spread / (n * (n - 1))).sqrt() / mean.abs()


def _resamples(key: Tensor, n_boot: int, seed: int) -> Tensor:
    """How often each image is drawn, (B, N) in float64: by rank, so that the images' order does not matter."""
    n = len(key)
    drawn = torch.randint(n, (n_boot, n), generator=generator(seed, "bootstrap", n))
    counts = torch.zeros(n_boot, n, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    rank = torch.empty(n, dtype=torch.long)
    rank[key.detach().cpu().argsort(stable=True)] = torch.arange(n)
    return counts[:, rank]


def _extremes(off: Tensor, errors: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """The quantiles of the studentised deviations, (B, U) to (U,)."""
    # A resample without an error of its own: no deviation is no surprise, any other an infinite one.
    surprise = torch.where(off == 0, 0.0, off.sign() * torch.inf)
    ordered = torch.where(errors > 0, off / errors, surprise).sort(dim=0).values
    # No interpolation: between an infinite and a finite value there is nothing.
    tail = math.floor((1 - level) / 2 * len(ordered))
    return ordered[tail], ordered[-1 - tail]
