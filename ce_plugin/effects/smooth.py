"""Effects of a grid's units by regression with a smooth prior: for designs whose neighbours flip together."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ce_plugin.effects.estimators import score_mean, with_rounding
from ce_plugin.errors import DesignError, UnitError, expected
from ce_plugin.networks.forward import double

LENGTHS = (0.03, 0.1, 0.2, 0.3, 0.5, 0.8)
"""Length scales that are tried, as shares of the grid's longer side; the shortest is less than a cell of 14."""

_RATIOS = 31


class SmoothEffects(NamedTuple):
    """Effects of all units on all classes, with a smooth map beside them.

    Attributes:
        effect: (U, C); the smooth map itself where no trial is independent.
        std_error, dof: (U, C), or None where no trial is independent.
        smoothed: (U, C), a smooth and shrunk map of the effects.
    """

    effect: Tensor
    std_error: Tensor | None
    dof: Tensor | None
    smoothed: Tensor


def smooth(
    assignments: Tensor,
    outcomes: Tensor,
    grid: tuple[int, ...],
    variants: Tensor | None = None,
    *,
    independent: Tensor | None = None,
    p: float = 0.5,
    lengths: tuple[float, ...] = LENGTHS,
) -> SmoothEffects:
    r"""Effects of a grid's units, and a smooth map of them, from coherent and independent trials.

    Some trials set coherent regions, others (``independent``) each unit by itself with probability p. All of them fit a
    smooth additive description m of the outcome, by Gaussian-process regression:

        y_t = mu_v(t) + sum_u a_tu f_u + noise,   f ~ N(0, tau^2 K),   noise ~ N(0, sigma^2)

    K is a Matern-3/2 kernel of the distance between units plus 1, a level that all share; each alternative value v
    (fill) has an intercept of its own with a flat prior. The posterior mean is

        f = H y = tau^2 K A' (tau^2 A K A' + sigma^2 I)^-1 y     (A and y centred within each alternative)

    with the length scale and sigma^2 / tau^2 of highest restricted likelihood on a small grid, for each output by
    itself. Shrunk and smooth, it is the more faithful map, and biased. The effect of unit u that is estimated,

        tau_u = mean over v of E[ y(a_u = 1, A, v) - y(a_u = 0, A, v) ],   A: the others, each set with probability p

    is the mean, within each alternative and then over them, of the independent trials' scores

        psi_tu = f_u^(-t) + (a_tu - p) / (p (1 - p)) e_t^(-t)

    where f^(-t) is the fit without trial t and e_t^(-t) what it mispredicts there: e_t / (1 - h_t), and
    f^(-t) = f - H_t e_t^(-t). Trial t is independent of that fit and its units of each other, so that the mean is
    unbiased for every network, however rough its effects, and the scores' spread is its standard error.

    Args:
        assignments: (T, U) boolean, True where the trial sets the unit.
        outcomes: (T, C).
        grid: number of cells along each dimension, rows and columns for images; U is their product.
        variants: (T,) integers: which alternative value a trial set; None where there is one.
        independent: (T,) boolean, the trials whose units were set independently; None where there are none.
        p: the probability with which they were.
        lengths: length scales that are tried, as shares of the grid's longer side.

    Returns:
        Effects (U, C), with f as ``smoothed`` beside them. Without independent trials the effect is f itself, and
        has no standard error: how far shrinkage moves it depends on what the true effects are.

    Raises:
        UnitError: the units are not the cells of the grid, or trials and outcomes differ in number.
        DesignError: fewer than three trials more than alternatives, or one independent trial.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> a = torch.rand(200, 16, generator=draw) < 0.5
        >>> planted = torch.linspace(-1, 1, 16)[:, None]
        >>> effects = smooth(a, a.float() @ planted, (4, 4), independent=torch.ones(200, dtype=torch.bool))
        >>> bool((effects.effect - planted).abs().max() < 0.02)
        True

    Source: Rasmussen and Williams 2006, chapter 2; restricted likelihood: Patterson and Thompson 1971; scores: Wu and
    Gagnon-Bartsch 2018.
    """
    if assignments.dim() != 2 or math.prod(grid) != assignments.shape[1] or len(assignments) != len(outcomes):
        got = f"{tuple(assignments.shape)} for a grid {grid} and outcomes {tuple(outcomes.shape)}"
        raise UnitError(expected("assignments", "of shape (T, cells of the grid) with T outcomes", got))
    a, y = double(assignments), double(outcomes)
    held = _intercepts(variants, a)
    if len(a) < held.shape[1] + 3:
        raise DesignError(expected("n_trials", f"at least {held.shape[1] + 3}", len(a)))
    if independent is not None and int(independent.sum()) < 2:
        raise DesignError(expected("independent", "two independent trials or more", int(independent.sum())))
    flips = a
    a, y = a - held @ (held.T @ a), y - held @ (held.T @ y)
    n = len(a) - held.shape[1]
    scale = torch.logspace(-3, 3, _RATIOS, dtype=a.dtype, device=a.device)
    energy = y.square().sum(0)
    bases, fits = [], []
    for length in lengths:
        bases.append(_basis(a, grid, length))
        fits.append(_restricted_likelihood(bases[-1], y, energy, n, scale))
    best = torch.cat(fits).argmax(0)
    strata = [] if independent is None else _strata(independent.cpu(), variants)
    fit = y.new_zeros(a.shape[1], y.shape[1])
    effect, error, dof = fit.clone(), fit.clone(), fit + (sum(map(len, strata)) - 1)
    live = energy > 1e-24 * len(y) * double(outcomes).square().amax(0).clamp_min(1e-300)
    for choice in sorted(set(best[live].tolist())):
        basis = bases[choice // _RATIOS]
        ratio = scale[choice % _RATIOS] * basis[2].sum() / n
        here = live & (best == choice)
        hat, deleted = _fitted(basis, ratio, y[:, here], held)
        fit[:, here] = hat @ y[:, here]
        if strata:
            weights = (flips - p) / (p * (1 - p)) - hat.T
            mean, error[:, here], dof[:, here] = _score_means(weights, deleted, flips, strata, p)
            effect[:, here] = fit[:, here] + mean
    return SmoothEffects(effect, error, dof, fit) if strata else SmoothEffects(fit, None, None, fit)


def _strata(independent: Tensor, variants: Tensor | None) -> list[Tensor]:
    """The independent trials of each alternative; all together where an alternative has fewer than two."""
    fills = torch.zeros(len(independent)) if variants is None else variants.cpu()
    each = [(independent & (fills == fill)).nonzero()[:, 0] for fill in sorted(set(fills.tolist()))]
    return each if min(map(len, each)) >= 2 else [independent.nonzero()[:, 0]]


def _score_means(
    weights: Tensor, deleted: Tensor, flips: Tensor, strata: list[Tensor], p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over the strata of the means of w_tu e_tc, its standard error and degrees of freedom, each (U, C)."""
    kurtosis = weights.new_full((weights.shape[1],), 1 / (p * (1 - p)) - 3)
    means, variances, dofs = [], [], []
    for trials in strata:
        arm = flips[trials].sum(0)
        index = torch.arange(len(trials))[:, None]
        smallest = torch.minimum(arm, len(trials) - arm)
        mean, variance, dof = score_mean(weights[trials], deleted[trials], index, kurtosis, smallest)
        means.append(mean)
        variances.append(variance / len(strata) ** 2)
        dofs.append(dof)
    variance = torch.stack(variances)
    dof = variance.sum(0).square() / (variance.square() / torch.stack(dofs)).sum(0).clamp_min(1e-300)
    error = with_rounding(variance.sum(0), deleted)
    return torch.stack(means).mean(0), error, torch.where(variance.sum(0) > 0, dof, torch.stack(dofs).sum(0))


def _intercepts(variants: Tensor | None, a: Tensor) -> Tensor:
    """Orthonormal columns (T, V), one per alternative value."""
    if variants is None:
        return a.new_full((len(a), 1), len(a) ** -0.5)
    _, alternatives = torch.unique(variants.cpu(), return_inverse=True)
    columns = torch.nn.functional.one_hot(alternatives).to(a)
    return columns / columns.sum(0).sqrt()


def _fitted(basis: tuple[Tensor, Tensor, Tensor], ratio: Tensor, y: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """A fit at one length scale and noise ratio: H (U, T), and what the fit without each trial mispredicts there."""
    to_units, to_trials, w = basis
    hat = (to_units / (w + ratio)) @ to_trials.T
    residual = y - (to_trials / (w + ratio)) @ (to_trials.T @ y)
    leverage = (to_trials.square() / (w + ratio)).sum(1) + held.square().sum(1)
    return hat, residual / (1 - leverage).clamp_min(1e-12)[:, None]


def _kernel(grid: tuple[int, ...], length: float, like: Tensor) -> Tensor:
    """Matern-3/2 between the units' centres, plus 1."""
    place = torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, len(grid)).to(like) / max(grid)
    # Not torch.cdist: it goes through a matrix product and loses digits.
    distance = (place[:, None] - place[None]).square().sum(-1).sqrt() * (math.sqrt(3) / length)
    return (1 + distance) * torch.exp(-distance) + 1


def _basis(a: Tensor, grid: tuple[int, ...], length: float) -> tuple[Tensor, Tensor, Tensor]:
    """M (U, k), G (T, k), w (k,) with K = M M', A M = G and G' G = diag(w)."""
    values, vectors = torch.linalg.eigh(_kernel(grid, length, a))
    root = vectors * values.clamp_min(0).sqrt()
    onto = a @ root
    w, rotation = torch.linalg.eigh(onto.T @ onto)
    return root @ rotation, onto @ rotation, w.clamp_min(0)


def _restricted_likelihood(
    basis: tuple[Tensor, Tensor, Tensor], y: Tensor, energy: Tensor, n: int, scale: Tensor
) -> Tensor:
    """Log restricted likelihood (R, C) with tau^2 profiled out; noise in multiples of the mean signal variance."""
    _, onto, w = basis
    ratio = scale * (w.sum() / n)
    explained = (1 / (w + ratio[:, None])) @ (onto.T @ y).square()
    form = (energy - explained) / ratio[:, None]
    logdet = (w + ratio[:, None]).log().sum(1) + (n - len(w)) * ratio.log()
    return -0.5 * (n * (form / n).clamp_min(1e-300).log() + logdet[:, None])
