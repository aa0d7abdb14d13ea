"""The smooth estimator against the textbook's formula, and its invariances."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from ce_plugin.designs import RandomRegions, RandomWindows
from ce_plugin.effects import half_width
from ce_plugin.effects.smooth import LENGTHS, smooth
from ce_plugin.errors import DesignError, UnitError

GRID = (5, 6)
UNITS = 30


def trials(n: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    a = RandomRegions(0.5, n, independent=0, seed=seed).assignments(UNITS, grid=GRID)
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    planted = torch.linspace(-1, 1, UNITS).double()[:, None] * torch.tensor([1.0, -2.0]).double()
    return a, a.double() @ planted + 0.3 * noise


def of(design: RandomRegions, n: int) -> Tensor:
    found = design.independent(n)
    assert found is not None
    alone, p = found
    assert p == design.p
    return alone


def kernel(length: float) -> Tensor:
    place = [(row / 6, column / 6) for row in range(5) for column in range(6)]
    k = torch.empty(UNITS, UNITS, dtype=torch.double)
    for i, p in enumerate(place):
        for j, q in enumerate(place):
            d = math.sqrt(3) * math.dist(p, q) / length
            k[i, j] = (1 + d) * math.exp(-d) + 1
    return k


@pytest.mark.parametrize("guided", [False, True])
def test_is_the_posterior_mean_of_the_most_probable_hyperparameters(guided: bool) -> None:
    """All candidate posteriors by the dense formula, tau by a search: ours is the most probable one."""
    a, y = trials(40)
    n = len(a)
    centre = torch.eye(n, dtype=torch.double) - 1 / n
    ac, yc = centre @ a.double(), centre @ y[:, :1]
    g = torch.cos(torch.arange(UNITS).double())[:, None] - 0.3
    known = g / g.square().mean().sqrt() if guided else torch.zeros_like(g)
    # An orthonormal basis of what is left of the trials without the intercept.
    basis = torch.linalg.svd(centre).U[:, : n - 1]
    z, m = basis.T @ yc, basis.T @ ac @ known
    best, found = -math.inf, torch.zeros(UNITS, 1)
    for length in LENGTHS:
        k = kernel(length) + 0.25 * known @ known.T
        signal = ac @ k @ ac.T
        for noise in torch.linspace(-2, 3, 26, dtype=torch.double).tolist():
            ratio = 10**noise * (signal.trace() + m.square().sum()) / (n - 1)
            total = basis.T @ signal @ basis + ratio * torch.eye(n - 1, dtype=torch.double)
            inverse, logdet = torch.linalg.inv(total), float(torch.logdet(total))

            def loss(log_tau: float, inverse: Tensor = inverse, logdet: float = logdet) -> float:
                off = z / math.exp(log_tau) - m
                return 0.5 * (2 * (n - 1) * log_tau + float((off.T @ inverse @ off).squeeze()) + logdet)

            tau = minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-10})
            probability = -tau.fun - 0.5 * ((noise + 0.2) / 0.33) ** 2 - 0.5 * ((math.log10(length) + 1.1) / 0.25) ** 2
            if probability > best:
                best, scale = probability, math.exp(tau.x)
                found = scale * known + k @ ac.T @ basis @ inverse @ (z - scale * m)
    effects = smooth(a, y[:, :1], GRID, guide=7 * g if guided else None)
    assert torch.allclose(effects.smoothed, found, atol=1e-6)


def test_a_guide_leads_where_trials_are_few_and_gives_way_where_they_are_many() -> None:
    planted = torch.linspace(-1, 1, UNITS).double()[:, None]
    right, wrong = planted + 0.1, torch.ones_like(planted)
    found = {}
    for n in (6, 400):
        a, _ = trials(n, seed=4)
        noise = torch.randn(n, 1, generator=torch.Generator().manual_seed(5), dtype=torch.double)
        y = a.double() @ planted + noise
        for name, guide in (("none", None), ("right", right), ("wrong", wrong)):
            map_ = smooth(a, y, GRID, guide=guide).smoothed
            found[name, n] = float(torch.corrcoef(torch.cat([map_, planted], 1).T)[0, 1])
    assert found["right", 6] > found["none", 6] + 0.1
    assert found["right", 6] > 0.8
    assert min(found[name, 400] for name in ("none", "right", "wrong")) > 0.95


def test_classes_without_a_guide_are_as_if_there_were_none() -> None:
    a, y = trials(60)
    alone = torch.arange(len(a)) % 2 == 0
    guide = torch.zeros(UNITS, 2)
    guide[:, 1] = torch.linspace(-1, 0, UNITS)
    both, plain = smooth(a, y, GRID, independent=alone, guide=guide), smooth(a, y, GRID, independent=alone)
    assert torch.allclose(both.effect[:, 0], plain.effect[:, 0], atol=1e-10)
    assert not torch.allclose(both.smoothed[:, 1], plain.smoothed[:, 1], atol=1e-3)


def test_recovers_a_smooth_additive_outcome() -> None:
    a, _ = trials(300)
    planted = torch.linspace(-1, 1, UNITS).double()[:, None]
    effects = smooth(a, a.double() @ planted, GRID)
    assert float((effects.effect - planted).abs().max()) < 0.04


def test_each_class_by_itself() -> None:
    a, y = trials()
    alone = torch.arange(len(a)) % 2 == 0
    both = smooth(a, y, GRID, independent=alone)
    for c in range(2):
        one = smooth(a, y[:, c : c + 1], GRID, independent=alone)
        for together, single in zip(both, one, strict=True):
            assert torch.allclose(together[:, c], single[:, 0], atol=1e-10)


def test_scale_and_shift_of_the_outcome() -> None:
    a, y = trials()
    alone = torch.arange(len(a)) % 2 == 0
    plain, other = smooth(a, y, GRID, independent=alone), smooth(a, 5 - 3 * y, GRID, independent=alone)
    assert torch.allclose(other.effect, -3 * plain.effect, atol=1e-8)
    assert torch.allclose(other.smoothed, -3 * plain.smoothed, atol=1e-8)
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
    effects = smooth(a, torch.full((len(a), 1), 0.7).double(), GRID, independent=torch.arange(len(a)) % 2 == 0)
    assert float(effects.effect.abs().max()) == 0
    assert effects.std_error is not None
    assert float(effects.std_error.abs().max()) == 0


def test_effects_are_means_of_scores_that_leave_the_trial_out() -> None:
    """The closed form against 40 fits that each have not seen a trial, at the hyperparameters of the whole fit."""
    design, length = RandomRegions(0.5, 40, independent=0.5), 0.3
    a = design.assignments(UNITS, grid=GRID).double()
    alone = of(design, 40)
    fills = design.turns(40) % 2
    y = (a @ torch.linspace(-1, 1, UNITS).double() + torch.randn(40, generator=torch.Generator().manual_seed(1)))[
        :, None
    ]
    effects = smooth(a > 0.5, y, GRID, fills, independent=alone, lengths=(length,))
    # The noise ratio that was chosen, from the fit's own shrinkage: try all candidates.
    k, scores = kernel(length), {}
    held = torch.stack([fills == 0, fills == 1], 1).double()

    def fit(rows: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """Slopes and intercepts of the generalised least squares fit of some trials."""
        total = a[rows] @ k @ a[rows].T + ratio * torch.eye(len(rows), dtype=torch.double)
        inverse = torch.linalg.inv(total)
        h = held[rows]
        levels = torch.linalg.solve(h.T @ inverse @ h, h.T @ inverse @ y[rows])
        return k @ a[rows].T @ inverse @ (y[rows] - h @ levels), levels

    centred = a - held @ torch.linalg.lstsq(held, a).solution
    mean_signal = float((centred @ k @ centred.T).trace()) / 38
    for scale in torch.logspace(-2, 3, 26, dtype=torch.double).tolist():
        ratio = scale * mean_signal
        psi = torch.empty(40, UNITS, dtype=torch.double)
        for t in range(40):
            rows = torch.tensor([k for k in range(40) if k != t])
            slopes, levels = fit(rows, ratio)
            missed = y[t] - a[t] @ slopes - held[t] @ levels
            psi[t] = slopes[:, 0] + (a[t] - 0.5) / 0.25 * missed
        parts = [psi[alone & (fills == fill)] for fill in range(2)]
        mean = torch.stack([part.mean(0) for part in parts]).mean(0)
        error = (sum(part.var(0) / len(part) for part in parts) / 4).sqrt()
        scores[scale] = float((effects.effect[:, 0] - mean).abs().max() + (effects.std_error[:, 0] - error).abs().max())
    assert min(scores.values()) < 1e-9


def test_effects_are_unbiased_where_the_map_is_not() -> None:
    """One unit alone, and an interaction that no additive fit explains: 300 runs against the closed form."""
    found, maps, covered = [], [], []
    for seed in range(300):
        design = RandomRegions(0.5, 60, independent=0.4, seed=seed)
        a = design.assignments(UNITS, grid=GRID).double()
        y = (-a[:, 14] + 0.8 * a[:, 3] * a[:, 4] + 0.4 * (a[:, 20] - 0.5) * (a[:, 9] - 0.5))[:, None]
        effects = smooth(a > 0.5, y, GRID, design.turns(60) % 3, independent=of(design, 60))
        truth = torch.zeros(UNITS, 1, dtype=torch.double)
        truth[14], truth[3], truth[4] = -1.0, 0.4, 0.4
        found.append(effects.effect)
        maps.append(effects.smoothed)
        covered.append((effects.effect - truth).abs() <= half_width(effects.std_error, effects.dof, 0.95))
    estimates = torch.stack(found)
    z = (estimates.mean(0) - truth) / (estimates.std(0) / 300**0.5)
    assert float(z.abs().max()) < 4.5
    assert float(torch.stack(maps).mean(0)[14]) > -0.9
    rate = torch.stack(covered).double().mean(0)
    assert 0.93 < float(rate.mean()) < 0.99
    assert float(rate.min()) > 0.88


def test_a_map_alone_has_no_errors() -> None:
    a, y = trials()
    effects = smooth(a, y, GRID)
    assert effects.std_error is None
    assert effects.dof is None
    assert torch.equal(effects.effect, effects.smoothed)


def test_the_map_beside_the_effects_is_the_fit_to_coherent_trials() -> None:
    a, y = trials()
    alone, fills = torch.arange(len(a)) % 5 < 2, torch.arange(len(a)) % 3
    both = smooth(a, y, GRID, fills, independent=alone)
    assert torch.equal(both.smoothed, smooth(a[~alone], y[~alone], GRID, fills[~alone]).smoothed)
    assert not torch.allclose(both.effect, both.smoothed, atol=1e-3)
    every = torch.ones(len(a), dtype=torch.bool)
    assert torch.equal(smooth(a, y, GRID, independent=every).smoothed, smooth(a, y, GRID).smoothed)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 1.0])
def test_both_kinds_are_a_part_of_every_beginning_and_share_the_fills(share: float) -> None:
    design = RandomRegions(0.5, 399, independent=share)
    alone = of(design, 399)
    counts = alone.cumsum(0).double()
    assert float((counts - share * torch.arange(1, 400)).abs().max()) <= 1 + 1e-6
    for kind in (alone, ~alone):
        turns = torch.bincount(design.turns(399)[kind] % 3, minlength=3)
        assert int(turns.max() - turns.min()) <= 1


def test_independent_trials_are_those_of_a_random_mask() -> None:
    design = RandomRegions(0.3, 4000, independent=0.5)
    alone = of(design, 4000)
    a = design.assignments(49, grid=(7, 7)).double()
    near = torch.corrcoef(a[alone][:, [24, 25]].T)[0, 1], torch.corrcoef(a[~alone][:, [24, 25]].T)[0, 1]
    assert abs(float(near[0])) < 0.07
    assert float(near[1]) > 0.5
    assert float(a[alone].mean()) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("design", [RandomRegions(0.3, 4000, independent=0), RandomWindows(0.3, 4000, independent=0)])
def test_flips_are_as_frequent_at_the_border(design: RandomRegions) -> None:
    share = design.assignments(49, grid=(7, 7)).double().mean(0).reshape(7, 7)
    assert float((share - share.mean()).abs().max()) < 0.05
    assert float(share.mean()) == pytest.approx(0.3, abs=0.03)


def test_neighbours_flip_together() -> None:
    a = RandomRegions(0.5, 2000, independent=0).assignments(49, grid=(7, 7)).reshape(-1, 7, 7)
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
    for share in (-0.1, 1.5, "a", True):
        with pytest.raises(DesignError, match="`independent`"):
            RandomRegions(independent=share)  # type: ignore[arg-type]
    for n, share in ((5, 0.1), (30, 0.05)):
        with pytest.raises(DesignError, match="two independent trials or more"):
            RandomRegions(0.5, n, independent=share)
    assert int(of(RandomRegions(0.5, 5, independent=0.4), 5).sum()) == 2
    assert RandomRegions(0.5, 29).independent(29) is None
    for n, count in ((30, 6), (299, 59), (300, 120), (399, 159)):
        assert int(of(RandomRegions(0.5, n), n).sum()) == count
    for alone in (torch.zeros(len(a), dtype=torch.bool), torch.arange(len(a)) == 1):
        with pytest.raises(DesignError, match="two independent trials or more"):
            smooth(a, y, GRID, independent=alone)
    with pytest.raises(DesignError, match="sizes"):
        RandomWindows(sizes=())
