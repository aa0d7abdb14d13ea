"""The smooth estimator against the textbook's formula, and its invariances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ce_plugin.designs import RandomRegions, RandomWindows
from ce_plugin.effects.smooth import smooth
from ce_plugin.errors import DesignError, UnitError

GRID = (5, 6)
UNITS = 30


def trials(n: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    a = RandomRegions(0.5, n, seed=seed).assignments(UNITS, grid=GRID)
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    planted = torch.linspace(-1, 1, UNITS).double()[:, None] * torch.tensor([1.0, -2.0]).double()
    return a, a.double() @ planted + 0.3 * noise


def kernel(length: float) -> Tensor:
    place = [(row / 6, column / 6) for row in range(5) for column in range(6)]
    k = torch.empty(UNITS, UNITS, dtype=torch.double)
    for i, p in enumerate(place):
        for j, q in enumerate(place):
            d = math.sqrt(3) * math.dist(p, q) / length
            k[i, j] = (1 + d) * math.exp(-d) + 1
    return k


def test_is_the_posterior_mean_of_the_best_hyperparameters() -> None:
    """All candidate posteriors by the dense formula: ours is the one of highest restricted likelihood."""
    a, y = trials()
    n = len(a)
    centre = torch.eye(n, dtype=torch.double) - 1 / n
    ac, yc = centre @ a.double(), centre @ y[:, :1]
    # An orthonormal basis of what is left of the trials without the intercept.
    basis = torch.linalg.svd(centre).U[:, : n - 1]
    best, found = -math.inf, torch.zeros(UNITS, 1)
    for length in (0.03, 0.1, 0.2, 0.3, 0.5, 0.8):
        k = kernel(length)
        signal = ac @ k @ ac.T
        for scale in torch.logspace(-3, 3, 31, dtype=torch.double):
            ratio = scale * signal.trace() / (n - 1)
            total = basis.T @ signal @ basis + ratio * torch.eye(n - 1, dtype=torch.double)
            z = basis.T @ yc
            form = float((z.T @ torch.linalg.solve(total, z)).squeeze())
            likelihood = -0.5 * ((n - 1) * math.log(form / (n - 1)) + float(torch.logdet(total)))
            if likelihood > best:
                best = likelihood
                found = k @ ac.T @ torch.linalg.solve(signal + ratio * torch.eye(n, dtype=torch.double), yc)
    effects = smooth(a, y[:, :1], GRID)
    assert torch.allclose(effects.effect, found, atol=1e-8)


def test_recovers_a_smooth_additive_outcome() -> None:
    a, _ = trials(300)
    planted = torch.linspace(-1, 1, UNITS).double()[:, None]
    effects = smooth(a, a.double() @ planted, GRID)
    assert float((effects.effect - planted).abs().max()) < 0.02


def test_each_class_by_itself() -> None:
    a, y = trials()
    both = smooth(a, y, GRID)
    for c in range(2):
        one = smooth(a, y[:, c : c + 1], GRID)
        for together, alone in zip(both, one, strict=True):
            assert torch.allclose(together[:, c], alone[:, 0], atol=1e-10)


def test_scale_and_shift_of_the_outcome() -> None:
    a, y = trials()
    plain, other = smooth(a, y, GRID), smooth(a, 5 - 3 * y, GRID)
    assert torch.allclose(other.effect, -3 * plain.effect, atol=1e-8)
    assert torch.allclose(other.std_error, 3 * plain.std_error, atol=1e-8)


def test_alternatives_have_intercepts_of_their_own() -> None:
    a, y = trials()
    variants = torch.arange(len(a)) % 3
    shifted = y + torch.tensor([0.0, 10.0, -5.0]).double()[variants][:, None]
    assert torch.allclose(smooth(a, shifted, GRID, variants).effect, smooth(a, y, GRID, variants).effect, atol=1e-8)


def test_order_of_trials_does_not_matter() -> None:
    a, y = trials()
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(smooth(a[order], y[order], GRID).effect, smooth(a, y, GRID).effect, atol=1e-9)


def test_constant_outcome_has_no_effect_and_no_error() -> None:
    a, _ = trials()
    effects = smooth(a, torch.full((len(a), 1), 0.7).double(), GRID)
    assert float(effects.effect.abs().max()) == 0
    assert effects.std_error is not None
    assert float(effects.std_error.abs().max()) == 0


def test_intervals_cover_smooth_effects() -> None:
    planted = torch.linspace(-1, 1, UNITS).double()[:, None] * torch.tensor([1.0, -2.0]).double()
    covered = []
    for seed in range(40):
        a, y = trials(seed=seed)
        effects = smooth(a, y, GRID)
        assert effects.std_error is not None
        covered.append(((effects.effect - planted).abs() <= 1.98 * effects.std_error).double().mean())
    assert 0.88 < float(torch.stack(covered).mean()) <= 1


@pytest.mark.parametrize("design", [RandomRegions(0.3, 4000), RandomWindows(0.3, 4000)])
def test_flips_are_as_frequent_at_the_border(design: RandomRegions) -> None:
    share = design.assignments(49, grid=(7, 7)).double().mean(0).reshape(7, 7)
    assert float((share - share.mean()).abs().max()) < 0.05
    assert float(share.mean()) == pytest.approx(0.3, abs=0.03)


def test_neighbours_flip_together() -> None:
    a = RandomRegions(0.5, 2000).assignments(49, grid=(7, 7)).reshape(-1, 7, 7)
    near = float((a[:, 3, 3] == a[:, 3, 4]).double().mean())
    far = float((a[:, 0, 0] == a[:, 6, 6]).double().mean())
    assert near > 0.75
    assert far == pytest.approx(0.5, abs=0.05)


def test_errors() -> None:
    a, y = trials()
    with pytest.raises(UnitError, match="cells of the grid"):
        smooth(a, y, (4, 4))
    with pytest.raises(DesignError, match="n_trials"):
        smooth(a[:3], y[:3], GRID)
    with pytest.raises(DesignError, match="not a grid"):
        RandomRegions().assignments(10)
    with pytest.raises(DesignError, match="sizes"):
        RandomWindows(sizes=())
