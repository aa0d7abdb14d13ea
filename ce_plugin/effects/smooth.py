"""Effects of a grid's units by regression with a smooth prior: for designs whose neighbours flip together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ce_plugin.effects.estimators import score_mean, with_rounding
from ce_plugin.errors import DesignError, UnitError, expected
from ce_plugin.networks.forward import double

LENGTHS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3)
"""Length scales that are tried, as shares of the grid's longer side; the shortest is less than a cell of 14."""

# What is expected before the trials, learnt from other photographs (benchmarks/results/faithfulness_prior.md): mean and
# standard deviation of the decimal logarithms of the length scale and of the noise (in multiples of the signal), and of
# the guide's weight in multiples of tau.
_LENGTH, _NOISE, _WEIGHT = (-1.1, 0.25), (-0.2, 0.33), (1.0, 0.5)
_NOISES = torch.linspace(-2, 3, 26, dtype=torch.float64)


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
    guide: Tensor | None = None,
    lengths: tuple[float, ...] = LENGTHS,
) -> SmoothEffects:
    r"""Effects of a grid's units, and a smooth map of them, from coherent and independent trials.

    Some trials set coherent regions, others (``independent``) each unit by itself with probability p. All of them fit a
    smooth additive description m of the outcome, by Gaussian-process regression:

        y_t = mu_v(t) + sum_u a_tu f_u + noise,   f ~ tau b g + N(0, tau^2 K),   noise ~ N(0, sigma^2)

    K is a Matern-3/2 kernel of the distance between units plus 1, a level that all share; each alternative value v
    (fill) has an intercept of its own with a flat prior. g is a guide, a map that is known before the trials, scaled to
    a mean square of 1, with a weight b ~ N(1, 0.5^2); without one it is 0. The posterior mean is

        f = tau g + H (y - tau A g),   H = tau^2 K' A' (tau^2 A K' A' + sigma^2 I)^-1,   K' = K + 0.5^2 g g'

    (A and y centred within each alternative). tau has the highest restricted likelihood; the length scale and
    sigma^2 / tau^2 have, on a grid, the highest product of it and what they are expected to be, for each output by
    itself: log-normal, learnt from other images, so that few trials do not have to choose them. Shrunk and smooth, f is
    the more faithful map, and biased. The effect of unit u that is estimated,

        effect_u = mean over v of E[ y(a_u = 1, A, v) - y(a_u = 0, A, v) ],   A: the others, each set with probability p

    is the mean, within each alternative and then over them, of the independent trials' scores

        psi_tu = f_u^(-t) + (a_tu - p) / (p (1 - p)) e_t^(-t)

    where f^(-t) is the fit without trial t and e_t^(-t) what it mispredicts there: e_t / (1 - h_t), and
    f^(-t) = f - H_t e_t^(-t). Trial t is independent of that fit and its units of each other, so that the mean is
    unbiased for every network, however rough its effects, and the scores' spread is its standard error. The map is
    the fit to the coherent trials alone, where there are enough: what units do one by one is another question.

    Args:
        assignments: (T, U) boolean, True where the trial sets the unit.
        outcomes: (T, C).
        grid: number of cells along each dimension, rows and columns for images; U is their product.
        variants: (T,) integers: which alternative value a trial set; None where there is one.
        independent: (T,) boolean, the trials whose units were set independently; None where there are none.
        p: the probability with which they were.
        guide: (U, C), what is known of the effects' pattern before the trials, in any unit; columns of zeros are none.
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
    strata = [] if independent is None else _strata(independent.cpu(), variants)
    fit = y.new_zeros(a.shape[1], y.shape[1])
    effect, error, dof = fit.clone(), fit.clone(), fit + (sum(map(len, strata)) - 1)
    live = y.square().sum(0) > 1e-24 * len(y) * double(outcomes).square().amax(0).clamp_min(1e-300)
    for columns, known in _guided(guide, live):
        for chosen, here in _chosen(a, y[:, columns], grid, known, held.shape[1], lengths):
            at = columns[here]
            hat, fit[:, at], deleted = chosen.fitted(y[:, at], held)
            if strata:
                weights = (flips - p) / (p * (1 - p)) - hat.T
                mean, error[:, at], dof[:, at] = _score_means(weights, deleted, flips, strata, p)
                effect[:, at] = fit[:, at] + mean
    if not strata or independent is None:
        return SmoothEffects(fit, None, None, fit)
    coherent = ~independent
    if int(coherent.sum()) >= held.shape[1] + 3:
        turns = None if variants is None else variants[coherent]
        fit = smooth(assignments[coherent], outcomes[coherent], grid, turns, guide=guide, lengths=lengths).smoothed
    return SmoothEffects(effect, error, dof, fit)


def estimate_bytes(trials: int, units: int, classes: int) -> int:
    """Memory that :func:`smooth` takes: priors of all length scales, likelihoods and scores of all classes.

    Example:
        >>> estimate_bytes(399, 196, 1000) >> 20
        28
    """
    priors = len(LENGTHS) * (units * units + trials * units)
    likelihoods = 2 * len(LENGTHS) * len(_NOISES) * classes
    return 8 * (priors + likelihoods + (4 * trials + 6 * units) * classes)


def _guided(guide: Tensor | None, live: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The columns whose outcomes vary, those without a guide together, each of the others with its own (U,)."""
    scale = live.new_zeros(len(live), dtype=torch.double) if guide is None else double(guide).square().mean(0).sqrt()
    plain = (live & (scale == 0)).nonzero()[:, 0]
    if len(plain):
        yield plain, None
    if guide is not None:
        for column in (live & (scale > 0)).nonzero():
            yield column, double(guide)[:, column[0]] / scale[column]


class _Prior(NamedTuple):
    """The prior of one length scale in a basis: M (U, k), G (T, k), w (k,) with K' = M M', A M = G, G' G = diag(w).

    ``mean`` (U,) and what it predicts (T,) are in units of tau.
    """

    to_units: Tensor
    to_trials: Tensor
    w: Tensor
    mean: Tensor
    predicted: Tensor


class _Fit(NamedTuple):
    """A prior with a ratio sigma^2 / tau^2, and the scale tau (C,) of each output."""

    prior: _Prior
    ratio: Tensor
    tau: Tensor

    def fitted(self, y: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """H (U, T), the posterior mean (U, C), and what the fit without each trial mispredicts there (T, C)."""
        to_units, to_trials, w, mean, predicted = self.prior
        hat = (to_units / (w + self.ratio)) @ to_trials.T
        new = y - predicted[:, None] * self.tau
        residual = new - (to_trials / (w + self.ratio)) @ (to_trials.T @ new)
        leverage = (to_trials.square() / (w + self.ratio)).sum(1) + held.square().sum(1)
        deleted = residual / (1 - leverage).clamp_min(1e-12)[:, None]
        return hat, mean[:, None] * self.tau + hat @ new, deleted


def _chosen(
    a: Tensor, y: Tensor, grid: tuple[int, ...], guide: Tensor | None, intercepts: int, lengths: tuple[float, ...]
) -> Iterator[tuple[_Fit, Tensor]]:
    """The most probable hyperparameters, and the outputs (indices) that have them."""
    n = len(a) - intercepts
    noises = _NOISES.to(a)
    priors: list[tuple[_Prior, Tensor]] = []
    tables, taus = [], []
    for length in lengths:
        prior = _prior(a, grid, length, guide)
        ratios = 10**noises * ((prior.w.sum() + prior.predicted.square().sum()) / n)
        likelihood, tau = _restricted_likelihood(prior, y, n, ratios)
        expected_noise = ((noises - _NOISE[0]) / _NOISE[1]).square()
        expected_length = ((math.log10(length) - _LENGTH[0]) / _LENGTH[1]) ** 2
        priors.append((prior, ratios))
        tables.append(likelihood - 0.5 * (expected_noise[:, None] + expected_length))
        taus.append(tau)
    best, tau = torch.cat(tables).argmax(0), torch.cat(taus)
    for choice in sorted(set(best.tolist())):
        here = (best == choice).nonzero()[:, 0]
        prior, ratios = priors[choice // len(noises)]
        yield _Fit(prior, ratios[choice % len(noises)], tau[choice, here]), here


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


@lru_cache(maxsize=32)
def _root(grid: tuple[int, ...], length: float) -> Tensor:
    """R with R R' = K, a Matern-3/2 kernel between the units' centres, plus 1; the same for all calls."""
    place = torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, len(grid)).double() / max(grid)
    # Not torch.cdist: it goes through a matrix product and loses digits.
    distance = (place[:, None] - place[None]).square().sum(-1).sqrt() * (math.sqrt(3) / length)
    values, vectors = torch.linalg.eigh((1 + distance) * torch.exp(-distance) + 1)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def _prior(
    a: Tensor, grid: tuple[int, ...], length: float, guide: Tensor | None, weight: tuple[float, float] = _WEIGHT
) -> _Prior:
    root, mean = _root(grid, length), a.new_zeros(a.shape[1])
    if guide is not None:
        root, mean = torch.cat([root, weight[1] * guide[:, None]], 1), weight[0] * guide
    onto = a @ root
    w, rotation = torch.linalg.eigh(onto.T @ onto)
    return _Prior(root @ rotation, onto @ rotation, w.clamp_min(0), mean, a @ mean)


def _restricted_likelihood(prior: _Prior, y: Tensor, n: int, ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Log restricted likelihood (R, C) at each noise ratio and the best tau, and this tau (R, C).

    With P the inverse covariance (over tau^2) of what the intercepts leave, and m the mean (over tau), it is
    -1/2 [n log tau^2 + y'Py / tau^2 - 2 m'Py / tau + m'Pm + log det], highest where n tau^2 + (m'Py) tau = y'Py.
    """
    _, onto, w, _, mean = prior
    inverse = 1 / (w + ratios[:, None])
    data, known = onto.T @ y, onto.T @ mean
    form = ((y.square().sum(0) - inverse @ data.square()) / ratios[:, None]).clamp_min(1e-300)
    cross = (mean @ y - inverse @ (data * known[:, None])) / ratios[:, None]
    offset = (mean @ mean - inverse @ known.square()) / ratios
    tau = (-cross + (cross.square() + 4 * n * form).sqrt()) / (2 * n)
    logdet = (w + ratios[:, None]).log().sum(1) + (n - len(w)) * ratios.log()
    squares = 2 * n * tau.log() + form / tau.square() - 2 * cross / tau + (offset + logdet)[:, None]
    return -0.5 * squares, tau
