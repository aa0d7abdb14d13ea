"""From the outcomes of trials to effects and their standard errors: pure functions on plain tensors.

Every estimator takes the outcomes (T, C) of T trials and returns effects (U, C) of all units on all classes at once,
by matrix products in float64 on the CPU. An effect is the outcome under ``do`` minus the outcome when idle (Eq. 1 of
Yang et al., ICIP 2019); in random designs it is averaged over the other units' random assignment (Eq. 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, DesignError, UnitError, expected
from ce_plugin.networks.forward import double

SKEW = 4.27
"""Weight of squared skewness in the degrees of freedom, where that of excess kurtosis is 1.

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
        hint = "Without a penalty the regression needs more trials than units." if ridge == 0 else ""
        raise ArgumentError(expected("ridge", "above 0", ridge, hint))
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


RIDGE = 0.25
"""Penalty of the adjusting regression, in multiples of U p (1 - p); see :func:`adjusted`."""


class Effects(NamedTuple):
    """Effects of all units on all classes, with what is known about their errors.

    Attributes:
        effect: (U, C), outcome under ``do`` minus outcome when idle.
        std_error: (U, C), or None for exact designs.
        dof: degrees of freedom of the t quantiles, (U, C), or None for exact designs.
    """

    effect: Tensor
    std_error: Tensor | None = None
    dof: Tensor | None = None


def exact_difference(outcomes: Tensor, reference: Tensor) -> Effects:
    """Outcome of each trial minus the reference outcome: the effect itself, without sampling error.

    Args:
        outcomes: (R, C), one trial per row (one unit, window or group under ``do``).
        reference: (C,) or (R, C), the outcome that each trial is compared with.

    Returns:
        Effects (R, C) in float64 without standard errors.

    Raises:
        UnitError: where the shapes do not go together.

    Example:
        >>> import torch
        >>> exact_difference(torch.tensor([[0.2], [0.9]]), torch.tensor([0.7])).effect.round(decimals=6)
        tensor([[-0.5000],
                [ 0.2000]], dtype=torch.float64)

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Eq. 1.
    """
    if outcomes.dim() != 2 or reference.shape not in (outcomes.shape, outcomes.shape[1:]):
        wanted = f"of shape (C,) or (R, C) for outcomes {tuple(outcomes.shape)}"
        raise UnitError(expected("reference", wanted, f"shape {tuple(reference.shape)}"))
    # In place on a copy: with thousands of units and classes another one would take noticeable memory.
    return Effects(outcomes.cpu().to(torch.float64, copy=True).sub_(double(reference)))


def difference_in_means(assignments: Tensor, outcomes: Tensor, blocks: Tensor | None = None) -> Effects:
    """Mean outcome of the trials that flip a unit minus the mean of those that do not.

        effect_u = mean(y_t | a_tu = 1) - mean(y_t | a_tu = 0),   SE_u = sqrt(s_1^2 / n_1 + s_0^2 / n_0)

    with the smaller arm's degrees of freedom (never more than Welch's), or fewer where outcomes are skewed or have
    heavy tails. In antithetic designs the two trials of a pair depend on each other; then the error comes from the
    pairs' influence values, which for p = 1/2 is the paired t test.

    Args:
        assignments: (T, U) boolean, True where the trial sets the unit.
        outcomes: (T, C).
        blocks: (T,) integers, equal within an antithetic pair; None where trials are independent.

    Returns:
        Effects (U, C). A unit that is flipped in no trial, or in all, has effect NaN; one that is flipped (or idle)
        only once has an infinite error.

    Raises:
        UnitError: where the shapes do not go together.
        DesignError: for fewer than two trials (or pairs).

    Example:
        >>> import torch
        >>> a = torch.tensor([[True], [True], [False], [False]])
        >>> y = torch.tensor([[3.0], [5.0], [1.0], [1.0]])
        >>> effects = difference_in_means(a, y)
        >>> effects.effect.item(), effects.std_error.item(), effects.dof.item()
        (3.0, 1.0, 1.0)

    Source: Neyman 1923; Welch 1947.
    """
    a, y = _checked(assignments, outcomes)
    index = block_index(blocks, len(a))
    n1, n0 = a.sum(dim=0)[:, None], (1 - a).sum(dim=0)[:, None]
    (mean1, *one), (mean0, *zero) = arm_mean(a, y), arm_mean(1 - a, y)
    variance, dof = one[0] + zero[0], arms_dof(n1, n0, one, zero)
    if blocks is not None:
        variance = paired_variance(a, y, index, mean1, mean0)
        dof = dof.clamp(max=len(index) - 1)
    fewest = torch.minimum(n1, n0)
    never = torch.where(fewest == 0, torch.nan, 0.0)
    error = torch.where(fewest == 1, torch.inf, with_rounding(variance, y))
    return Effects(mean1 - mean0 + never, error + never, torch.where(fewest == 1, 1.0, dof) + never)


def adjusted(
    assignments: Tensor,
    outcomes: Tensor,
    p: float | Tensor,
    blocks: Tensor | None = None,
    *,
    ridge: float = RIDGE,
) -> Effects:
    """Differences in means, with what the other units explain taken out by a regression that has not seen the trial.

        effect_u = mean over t of [ beta_u^(-t) + e_t^(-t) (a_tu - p_u) / (p_u (1 - p_u)) ],   SE_u = sd / sqrt(T)

    where beta^(-t) is the ridge regression (intercept not penalised) of the outcomes on the assignments of all trials
    but t, and e_t^(-t) what it mispredicts on trial t. The estimate is unbiased for *every* network and every penalty
    that is fixed beforehand, because the flip probability is known and trial t is independent of the fit; the
    regression only takes variance out. It is valid with fewer trials than units. All T fits cost one: deleted residuals
    and coefficients follow from the full fit (hat matrix), which is solved in its smaller form (T x T or U x U).

    The penalty is ``ridge * U p (1 - p)``: with independent effects of equal variance this is the best one where main
    effects explain 1 / (1 + ridge) of the outcome's variance, whatever its scale. The default of 1/4, four fifths, is a
    compromise: less wins on nearly linear networks, more where interactions are strong and trials few.

    The t quantiles have the degrees of freedom of the smaller of the unit's two arms (p T - 1 for p below 1/2), or
    fewer where the scores are skewed or have heavy tails, so that few trials carry the effect.

    Args:
        assignments: (T, U) boolean, True where the trial sets the unit.
        outcomes: (T, C).
        p: flip probability, one for all units or (U,); for a balanced design the fraction that was realised. There
            trials depend on each other: a bias of about effect / T remains, and errors are a little too large.
        blocks: (T,) integers, equal within an antithetic pair, which is then left out as a whole; None where trials
            are independent.
        ridge: penalty in multiples of U p (1 - p); 0 is ordinary least squares, which needs more trials than units.

    Returns:
        Effects (U, C) with standard errors.

    Raises:
        ArgumentError: for p outside (0, 1), or a penalty that leaves the regression undetermined.
        UnitError: where the shapes do not go together.
        DesignError: for fewer than two trials (or pairs).

    Example:
        >>> import torch
        >>> a = torch.rand(400, 3, generator=torch.Generator().manual_seed(0)) < 0.3
        >>> y = a.double() @ torch.tensor([[1.0], [0.5], [-2.0]], dtype=torch.double)
        >>> adjusted(a, y, 0.3).effect.flatten().round(decimals=3).tolist()
        [1.0, 0.5, -2.0]

    Source: leave-one-out potential outcomes (Wu and Gagnon-Bartsch 2018), regression adjustment (Lin 2013).
    """
    a, y = _checked(assignments, outcomes)
    index = block_index(blocks, len(a))
    z, scale, kurtosis = _standardised(a, p)
    smoother, slopes, residuals = leave_out_fit(z, y, index, ridge)
    weights = z - block_sizes(index, len(a), z) * smoother
    smallest = torch.minimum(a.sum(dim=0), (1 - a).sum(dim=0))
    mean, variance, dof = score_mean(weights, residuals, index, kurtosis, smallest)
    return Effects((slopes + mean) / scale, with_rounding(variance, y) / scale, dof)


def interactions(
    assignments: Tensor,
    outcomes: Tensor,
    pairs: Sequence[tuple[int, int]] | Tensor,
    p: float | Tensor,
    blocks: Tensor | None = None,
    *,
    ridge: float = RIDGE,
) -> Effects:
    """Average interaction of pairs of units: by how much the effect of u changes when v is flipped too.

        interaction_uv = E[ y(1, 1) - y(1, 0) - y(0, 1) + y(0, 0) ]
                       = E[ e_t^(-t) w_tu w_tv ],   w_tu = (a_tu - p_u) / (p_u (1 - p_u))

    over the other units' random assignment. As in :func:`adjusted` the main effects are taken out by a regression that
    has not seen trial t; they do not bias it, because weights of different units are independent.

    Args:
        assignments: (T, U) boolean, True where the trial sets the unit.
        outcomes: (T, C).
        pairs: (P, 2) unit indices; the two units of a pair differ.
        p: flip probability, one for all units or (U,).
        blocks: (T,) integers, equal within an antithetic pair; None where trials are independent.
        ridge: penalty of the regression, as in :func:`adjusted`.

    Returns:
        Effects (P, C) with standard errors; about p^2 T trials flip both, so small p needs many trials.

    Raises:
        UnitError: for a pair out of range or of a unit with itself.
        ArgumentError, DesignError: as in :func:`adjusted`.

    Example:
        >>> import torch
        >>> a = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)) < 0.5
        >>> y = 3.0 * (a[:, :1] & a[:, 1:])
        >>> round(interactions(a, y, [(0, 1)], 0.5).effect.item(), 1)
        3.0
    """
    a, y = _checked(assignments, outcomes)
    index = block_index(blocks, len(a))
    where = torch.as_tensor(pairs, dtype=torch.long, device=a.device).reshape(-1, 2)
    bad = (where < 0) | (where >= a.shape[1])
    if bool(bad.any()) or bool((where[:, 0] == where[:, 1]).any()):
        wanted = f"pairs of different units in range({a.shape[1]})"
        raise UnitError(expected("pairs", wanted, where.tolist()[:8]))
    z, scale, kurtosis = _standardised(a, p)
    _, _, residuals = leave_out_fit(z, y, index, ridge)
    weights = (z / scale.T)[:, where].prod(dim=2)
    first, second = a[:, where[:, 0]], a[:, where[:, 1]]
    smallest = torch.stack([(u * v).sum(0) for u in (first, 1 - first) for v in (second, 1 - second)]).amin(0)
    effect, variance, dof = score_mean(weights, residuals, index, kurtosis[where].prod(dim=1), smallest)
    return Effects(effect, with_rounding(variance, y), dof)


def joint_interaction(effect: Tensor, groups: Sequence[tuple[int, ...]]) -> Tensor:
    """Joint effect of each group minus the sum of the single effects of its units; 0 for groups of one unit.

    Args:
        effect: (..., G, C), exact effects of the groups.
        groups: the units of each group; every unit is also a group of its own.

    Returns:
        A tensor of the shape of ``effect``.

    Raises:
        DesignError: where single units are missing.

    Example:
        >>> import torch
        >>> joint_interaction(torch.tensor([[1.0], [2.0], [5.0]]), [(0,), (1,), (0, 1)]).flatten().tolist()
        [0.0, 0.0, 2.0]
    """
    single = {group[0]: g for g, group in enumerate(groups) if len(group) == 1}
    missing = sorted({u for group in groups for u in group} - set(single))
    if missing:
        hint = "Add them as groups of one unit, as Joint.pairs(units) does."
        raise DesignError(expected("groups", "the single units of every group too", f"none for {missing[:8]}", hint))
    parts = torch.zeros(len(groups), len(groups), dtype=effect.dtype, device=effect.device)
    for g, group in enumerate(groups):
        parts[g, [single[u] for u in group]] = 1
    return effect - parts @ effect


def _checked(assignments: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Assignments and centred outcomes in float64; constant outcomes become exact zeros."""
    if assignments.dim() != 2 or outcomes.dim() != 2 or len(assignments) != len(outcomes):
        got = f"shapes {tuple(assignments.shape)} and {tuple(outcomes.shape)}"
        raise UnitError(expected("assignments", "of shape (T, U), with outcomes (T, C)", got))
    if len(outcomes) < 2:
        raise DesignError(expected("n_trials", "at least 2", len(outcomes), "Errors need repeated trials."))
    # The first row goes first: the mean of equal numbers need not be that number in floating point.
    y = double(outcomes)
    y = y - y[0]
    return double(assignments), y - y.mean(dim=0)


def _standardised(a: Tensor, p: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a - p) / sqrt(p (1 - p)), the scale sqrt(p (1 - p)) as (U, 1), and the kurtosis of these weights, (U,)."""
    prob = (double(p) if isinstance(p, Tensor) else torch.tensor(p, dtype=torch.float64)).expand(a.shape[1])
    if not bool(((prob > 0) & (prob < 1)).all()):
        hint = "A unit that is always or never flipped has no effect to compare."
        raise ArgumentError(expected("p", "in (0, 1)", p, hint))
    variance = prob * (1 - prob)
    return (a - prob) / variance.sqrt(), variance.sqrt()[:, None], 1 / variance - 3
