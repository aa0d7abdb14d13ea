"""What the estimators rest on: blocks of dependent trials, and regressions that leave one block out, in closed form.

A block is an antithetic pair, or a single trial where trials are independent. Blocks are held as an index (B, m) of
trials, filled with T (one past the end) where a block has fewer than m. All tensors are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, DesignError, UnitError, expected

__all__ = [
    "SKEW",
    "arm_mean",
    "arms_dof",
    "block_index",
    "block_sizes",
    "block_square_sum",
    "gathered",
    "leave_out_fit",
    "paired_variance",
    "score_mean",
    "with_rounding",
]

SKEW = 4.27
"""What squared skewness counts in degrees of freedom, beside excess kurtosis counting 1.

The tail of a studentized mean is lifted by skewness g as by an excess of 8 / (x^2 + 1) (x^4 + 2 x^2 - 3) / 18 g^2 in
2 n / (2 + excess) (second-order Edgeworth expansion, Hall 1992, section 2.6); this is its value at x = 3, where
Benjamini-Hochberg decides among tens of units.
"""

# Relative to the largest outcome; float64 has 2^-53, and sums and solves lose a few digits.
_ROUNDING = 2.0**-40


def block_index(blocks: Tensor | None, trials: int) -> Tensor:
    """Trials of each block, (B, m).

    Args:
        blocks: (T,) integers, equal within a block; None for blocks of one trial.
        trials: T.

    Raises:
        UnitError: where ``blocks`` has another length.
        DesignError: for fewer than two blocks.

    Example:
        >>> block_index(torch.tensor([0, 0, 1]), 3).tolist()
        [[0, 1], [2, 3]]
    """
    if blocks is None:
        return torch.arange(trials)[:, None]
    if blocks.shape != (trials,):
        raise UnitError(expected("blocks", f"of shape ({trials},)", f"shape {tuple(blocks.shape)}"))
    _, inverse, counts = torch.unique(blocks.cpu(), return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise DesignError(expected("blocks", "at least 2 pairs", len(counts), "Errors need repeated trials."))
    order = torch.argsort(inverse, stable=True)
    position = torch.arange(trials) - (counts.cumsum(0) - counts)[inverse[order]]
    index = torch.full((len(counts), int(counts.max())), trials)
    index[inverse[order], position] = order
    return index


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each block, (B, m, ...); rows that only fill up are 0."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[index.to(x.device)]


def block_sizes(index: Tensor, trials: int, like: Tensor) -> Tensor:
    """Size of the block that each trial is in, (T, 1), of the dtype and device of ``like``."""
    sizes = torch.zeros(trials + 1, dtype=torch.long)
    sizes[index] = (index < trials).sum(dim=1, keepdim=True).expand(index.shape)
    return sizes[:trials, None].to(like)


def block_square_sum(left: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """sum over blocks of (sum over the block's trials of left_tu right_tc)^2, (U, C), without a (B, U, C) tensor."""
    rows, columns = gathered(left, index), gathered(right, index)
    out = left.new_zeros(left.shape[1], right.shape[1])
    for i in range(index.shape[1]):
        for j in range(i + 1):
            product = (rows[:, i] * rows[:, j]).T @ (columns[:, i] * columns[:, j])
            out += product if i == j else 2 * product
    return out


def leave_out_fit(z: Tensor, y: Tensor, index: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge regression, intercept not penalised, of y on z, and how it mispredicts blocks that it has not seen.

    One factorisation, of the smaller of (U, U) and (T, T): leaving out block B changes the slopes by
    - smoother_B' e and gives the residuals e = (I - H_BB)^-1 (those of the full fit), H the hat matrix.

    Args:
        z: regressors with variance about 1, (T, U).
        y: centred outcomes, (T, C).
        index: (B, m), from :func:`block_index`.
        ridge: penalty in multiples of U.

    Returns:
        smoother (T, U), slopes (U, C) = smoother' y, and left-out residuals (T, C).

    Raises:
        ArgumentError: for a penalty that is negative, or 0 where the trials do not determine the regression.

    Source: Cook 1977; Hastie, Tibshirani and Friedman 2009, section 7.10, for single trials.
    """
    trials, units = z.shape
    if not ridge >= 0 or (ridge == 0 and trials <= units + index.shape[1]):
        todo = "Without a penalty the regression needs more trials than units." if ridge == 0 else ""
        raise ArgumentError(expected("ridge", "above 0", ridge, todo))
    centred = z - z.mean(dim=0)
    primal = units <= trials
    gram = centred.T @ centred if primal else centred @ centred.T
    gram.diagonal().add_(ridge * units)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) != 0:
        raise ArgumentError(expected("ridge", "above 0", ridge, "These assignments do not determine the regression."))
    right = centred.T if primal else centred
    solved = torch.cholesky_solve(right, factor)
    smoother: Tensor = solved.T if primal else solved
    slopes = smoother.T @ y
    residuals = y - centred @ slopes
    hat = torch.einsum("bmu,bnu->bmn", gathered(smoother, index), gathered(centred, index))
    real = (index < trials).to(z.device)
    # Rows that only fill up stand alone: H = 0 there, so that I - H can be inverted.
    hat = (hat + 1 / trials) * real[:, :, None] * real[:, None, :]
    rest = torch.eye(index.shape[1], dtype=z.dtype, device=z.device) - hat
    left_out = torch.linalg.solve(rest, gathered(residuals, index))
    out = torch.empty_like(residuals)
    out[index.to(z.device)[real]] = left_out[real]
    return smoother, slopes, out


def score_mean(
    weights: Tensor, residuals: Tensor, index: Tensor, kurtosis: Tensor, smallest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over trials of the scores w_tu e_tc, its variance and the degrees of freedom of that, each (U, C).

    The degrees of freedom are 2 n / (2 + excess) - 1 for n blocks. With the scores' excess kurtosis this is
    Satterthwaite's number, that of a chi-square with the variance of the mean of squares. The excess taken is the
    largest of the scores' own, of the one that the design's weights give to normal residuals, because a sample shows
    too little of its tails, and of :data:`SKEW` times the scores' squared skewness. The smallest arm's trials less one
    are the most, the textbook's cautious choice for two samples: discoveries rest on the far tails.

    Args:
        weights: (T, U).
        residuals: (T, C).
        index: (B, m), from :func:`block_index`.
        kurtosis: E w^4 / (E w^2)^2 of each unit's weights by design, (U,).
        smallest: number of trials in the smallest arm of each unit, (U,).
    """
    trials, blocks = len(weights), len(index)
    size = block_sizes(index, trials, weights)
    mean = weights.T @ residuals / trials
    # sum over blocks of (block sum - block size * mean)^2: equal sizes give the ordinary variance.
    square = block_square_sum(weights, residuals, index) - 2 * mean * ((size * weights).T @ residuals)
    square = (square + mean.square() * size.sum()).clamp_min(0)
    variance = square * (blocks / (blocks - 1)) / trials**2

    powers = [weights.pow(k).T @ residuals.pow(k) / trials for k in (2, 3, 4)]
    second, third, fourth = _central(mean, *powers)
    own = torch.maximum(_ratio(fourth, second**2) - 3, SKEW * _ratio(third**2, second**3))
    excess = torch.maximum(own, 3 * (kurtosis[:, None] - 1)) * (blocks / trials)
    dof = torch.minimum(2 * blocks / (2 + excess), smallest[:, None]) - 1
    return mean, variance, dof.clamp_min(1.0)


def arm_mean(member: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean of the trials of one arm and the mean's cumulants: variance, third and (where positive) fourth, each (U, C).

    Args:
        member: (T, U), 1 where the trial belongs to the arm of the unit, 0 elsewhere.
        y: centred outcomes, (T, C).
    """
    n = member.sum(dim=0)[:, None]
    mean, *powers = (member.T @ y.pow(k) / n for k in (1, 2, 3, 4))
    second, third, fourth = _central(mean, *powers)
    return mean, second / (n - 1), third / n**2, (fourth - 3 * second**2).clamp_min(0) / (n - 1) ** 2 / n


def arms_dof(n1: Tensor, n0: Tensor, one: list[Tensor], zero: list[Tensor]) -> Tensor:
    """Degrees of freedom of a difference of two arms, (U, C): the smaller arm's, or fewer for heavy tails or skewness.

    2 v^2 / (2 v_1^2 / (n_1 - 1) + 2 v_0^2 / (n_0 - 1) + c), v = v_1 + v_0, is Welch's number with c = 0. Here c is the
    sum of the fourth cumulants, or :data:`SKEW` times the squared third cumulant of the difference over v if that is
    larger. The smaller arm's trials less one are the most, as in :func:`score_mean`.

    Args:
        n1, n0: sizes of the arms, (U, 1).
        one, zero: cumulants of the arms' means, as :func:`arm_mean` gives them.
    """
    variance = one[0] + zero[0]
    tails = torch.maximum(one[2] + zero[2], SKEW * _ratio((one[1] - zero[1]) ** 2, variance))
    normal = 2 * one[0] ** 2 / (n1 - 1) + 2 * zero[0] ** 2 / (n0 - 1)
    smaller = (torch.minimum(n1, n0) - 1).expand_as(variance)
    return torch.where(variance > 0, torch.minimum(2 * variance**2 / (normal + tails), smaller), smaller)


def _central(mean: Tensor, square: Tensor, cube: Tensor, fourth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Central moments from raw ones."""
    return (
        (square - mean**2).clamp_min(0),
        cube - 3 * mean * square + 2 * mean**3,
        fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4,
    )


def _ratio(upper: Tensor, lower: Tensor) -> Tensor:
    """upper / lower, 0 where the lower is 0."""
    return torch.where(lower > 0, upper / lower, 0.0)


def with_rounding(variance: Tensor, y: Tensor) -> Tensor:
    """Standard errors with the rounding of float64 added, (U, C): y are the centred outcomes, (T, C).

    Where symmetry makes scores cancel exactly, effect and error are both rounding, and their ratio would be noise
    that looks significant. Constant outcomes keep an error of exactly 0.
    """
    return (variance + (_ROUNDING * y.abs().amax(dim=0)).square()).sqrt()


def paired_variance(a: Tensor, y: Tensor, index: Tensor, mean1: Tensor, mean0: Tensor) -> Tensor:
    """Variance of a difference in means from the influence values of whole blocks, (U, C)."""
    n1, n0 = a.sum(dim=0), (1 - a).sum(dim=0)
    gain = a / n1 - (1 - a) / n0
    flipped, idle = gathered(a, index).sum(dim=1), gathered(1 - a, index).sum(dim=1)
    up, down = mean1 / n1[:, None], mean0 / n0[:, None]
    own1, own0 = torch.zeros_like(a), torch.zeros_like(a)
    for column in index.T:
        real = column < len(a)
        own1[column[real]], own0[column[real]] = flipped[real], idle[real]
    # (block sum of gain y - flipped up + idle down)^2, summed over blocks and multiplied out into matrix products.
    square = block_square_sum(gain, y, index)
    square += -2 * up * ((gain * own1).T @ y) + 2 * down * ((gain * own0).T @ y)
    square += up.square() * flipped.square().sum(0)[:, None] + down.square() * idle.square().sum(0)[:, None]
    square -= 2 * up * down * (flipped * idle).sum(0)[:, None]
    return square.clamp_min(0) * (len(index) / (len(index) - 1))
