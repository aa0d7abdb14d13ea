"""Effects of a grid's units by regression with a smooth prior: for designs whose neighbours flip together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ce_plugin.effects.estimators import Effects
from ce_plugin.errors import DesignError, UnitError, expected
from ce_plugin.networks.forward import double

LENGTHS = (0.03, 0.1, 0.2, 0.3, 0.5, 0.8)
"""Length scales that are tried, as shares of the grid's longer side; the shortest is less than a cell of 14."""

_RATIOS = 31


def smooth(
    assignments: Tensor,
    outcomes: Tensor,
    grid: tuple[int, ...],
    variants: Tensor | None = None,
    *,
    lengths: tuple[float, ...] = LENGTHS,
) -> Effects:
    r"""Effects of units that flip together with their neighbours, by Gaussian-process regression.

        y_t = mu_v(t) + sum_u a_tu f_u + noise,   f ~ N(0, tau^2 K),   noise ~ N(0, sigma^2)

    K is a Matern-3/2 kernel of the distance between units plus 1, a level that all share; each alternative value v
    (fill) has an intercept of its own with a flat prior. Reported is the posterior mean

        f = tau^2 K A' (tau^2 A K A' + sigma^2 I)^-1 y     (A and y centred within each alternative)

    with the length scale and sigma^2 / tau^2 of highest restricted likelihood on a small grid, for each output by
    itself. Writing f = H y, the squared standard error is the sampling variance sum_t H_ut^2 (e_t / (1 - h_t))^2 from
    leave-one-trial-out residuals, valid where the noise differs between trials, plus the prior expectation of the
    squared shrinkage, tau^2 [(I - H A) K (I - H A)']_uu.

    What is estimated is the best additive and smooth description of the outcome under the design's assignments: the
    effect of a unit with about a share p of its surroundings set as well. Where interactions are strong, that is not
    the effect of the unit alone.

    Args:
        assignments: (T, U) boolean, True where the trial sets the unit.
        outcomes: (T, C).
        grid: number of cells along each dimension, rows and columns for images; U is their product.
        variants: (T,) integers: which alternative value a trial set; None where there is one.
        lengths: length scales that are tried, as shares of the grid's longer side.

    Returns:
        Effects (U, C); the degrees of freedom are the trials left over by the regression.

    Raises:
        UnitError: the units are not the cells of the grid, or trials and outcomes differ in number.
        DesignError: fewer than three trials more than alternatives.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> a = torch.rand(200, 16, generator=draw) < 0.5
        >>> planted = torch.linspace(-1, 1, 16)[:, None]
        >>> effects = smooth(a, a.float() @ planted, (4, 4))
        >>> bool((effects.effect - planted).abs().max() < 0.02)
        True

    Source: Rasmussen and Williams 2006, chapter 2; restricted likelihood: Patterson and Thompson 1971; errors from
    deleted residuals: MacKinnon and White 1985.
    """
    if assignments.dim() != 2 or math.prod(grid) != assignments.shape[1] or len(assignments) != len(outcomes):
        got = f"{tuple(assignments.shape)} for a grid {grid} and outcomes {tuple(outcomes.shape)}"
        raise UnitError(expected("assignments", "of shape (T, cells of the grid) with T outcomes", got))
    a, y = double(assignments), double(outcomes)
    held = _intercepts(variants, a)
    if len(a) < held.shape[1] + 3:
        raise DesignError(expected("n_trials", f"at least {held.shape[1] + 3}", len(a)))
    a, y = a - held @ (held.T @ a), y - held @ (held.T @ y)
    n = len(a) - held.shape[1]
    scale = torch.logspace(-3, 3, _RATIOS, dtype=a.dtype, device=a.device)
    energy = y.square().sum(0)
    bases, fits = [], []
    for length in lengths:
        bases.append(_basis(a, grid, length))
        fits.append(_restricted_likelihood(bases[-1], y, energy, n, scale))
    best = torch.cat(fits).argmax(0)
    effect = y.new_zeros(a.shape[1], y.shape[1])
    error, dof = effect.clone(), effect + n
    live = energy > 1e-24 * len(y) * double(outcomes).square().amax(0).clamp_min(1e-300)
    for choice in sorted(set(best[live].tolist())):
        basis = bases[choice // _RATIOS]
        ratio = scale[choice % _RATIOS] * basis[2].sum() / n
        here = live & (best == choice)
        effect[:, here], error[:, here], left = _posterior(basis, ratio, y[:, here], held, n)
        dof[:, here] = left
    return Effects(effect, error, dof)


def _intercepts(variants: Tensor | None, a: Tensor) -> Tensor:
    """Orthonormal columns (T, V), one per alternative value."""
    if variants is None:
        return a.new_full((len(a), 1), len(a) ** -0.5)
    _, alternatives = torch.unique(variants.cpu(), return_inverse=True)
    columns = torch.nn.functional.one_hot(alternatives).to(a)
    return columns / columns.sum(0).sqrt()


def _posterior(
    basis: tuple[Tensor, Tensor, Tensor], ratio: Tensor, y: Tensor, held: Tensor, n: int
) -> tuple[Tensor, Tensor, float]:
    """Posterior mean, standard error (U, C) and degrees of freedom, at one length scale and noise ratio."""
    to_units, to_trials, w = basis
    hat = (to_units / (w + ratio)) @ to_trials.T
    residual = y - (to_trials / (w + ratio)) @ (to_trials.T @ y)
    leverage = (to_trials.square() / (w + ratio)).sum(1) + held.square().sum(1)
    deleted = residual / (1 - leverage).clamp_min(1e-12)[:, None]
    prior = (y * residual).sum(0) / ratio / n
    shrinkage = (to_units.square() * (ratio / (w + ratio)).square()).sum(1)[:, None] * prior
    error = (hat.square() @ deleted.square() + shrinkage).sqrt()
    return hat @ y, error, max(float(n - (w / (w + ratio)).sum()), 1.0)


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
