"""Estimators against brute force: refits without the trial, all 2^U assignments, other libraries' t tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import Ridge
from torch import Tensor

from ce_plugin.effects.estimators import (
    RIDGE,
    adjusted,
    difference_in_means,
    exact_difference,
    interactions,
    joint_interaction,
)
from ce_plugin.effects.inference import half_width, p_values
from ce_plugin.errors import ArgumentError, DesignError, UnitError

Estimator = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor | None]]


def draw(trials: int, units: int, classes: int, p: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Assignments with at least two flips and two idles per unit, and arbitrary outcomes."""
    g = torch.Generator().manual_seed(seed)
    while True:
        a = torch.rand(trials, units, generator=g) < p
        if bool((a.sum(0) >= 2).all() and (~a).sum(0).ge(2).all()):
            return a, torch.randn(trials, classes, generator=g, dtype=torch.double)


def all_assignments(units: int) -> Tensor:
    return torch.tensor(list(itertools.product((False, True), repeat=units)))


def chance(assignments: Tensor, p: float | Tensor) -> Tensor:
    """Probability of each assignment."""
    each = torch.as_tensor(p, dtype=torch.double)
    return torch.where(assignments, each, 1 - each).prod(1)


def refitted(a: Tensor, y: Tensor, p: Tensor, blocks: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The definition, trial by trial: scikit-learn's Ridge without the trial's block, then its score; sd over blocks.

    The penalty of units scaled to variance 1 is ridge * U.
    """
    scale = (p * (1 - p)).sqrt()
    x = (a.double() / scale).numpy()
    scores = []
    for t in range(len(a)):
        keep = (blocks != blocks[t]).numpy()
        model = Ridge(alpha=ridge * a.shape[1], solver="cholesky").fit(x[keep], y.numpy()[keep])
        error = y[t] - torch.from_numpy(model.predict(x[t : t + 1]))[0]
        beta = torch.from_numpy(model.coef_).T / scale[:, None]
        scores.append(beta + ((a[t].double() - p) / scale**2)[:, None] * error)
    every = torch.stack(scores)
    mean = every.mean(0)
    sums = torch.stack([(every[blocks == b] - mean).sum(0) for b in blocks.unique()])
    n = len(sums)
    return mean, (sums.square().sum(0) * n / (n - 1)).sqrt() / len(a)


@pytest.mark.parametrize(("trials", "units"), [(30, 4), (12, 20), (9, 9)])
@pytest.mark.parametrize("grouping", [1, 2, 3])
def test_adjusted_equals_refitting_without_each_trial(trials: int, units: int, grouping: int) -> None:
    a, y = draw(trials, units, 3, 0.4)
    p = torch.linspace(0.3, 0.6, units, dtype=torch.double)
    blocks = torch.arange(1, trials + 1) // grouping  # blocks of unequal size where the number does not divide
    got = adjusted(a, y, p, None if grouping == 1 else blocks, ridge=0.7)
    mean, error = refitted(a, y, p, blocks, 0.7)
    torch.testing.assert_close(got.effect, mean, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(got.std_error, error, atol=1e-12, rtol=1e-9)


def test_order_of_blocks_and_names_do_not_matter() -> None:
    a, y = draw(20, 3, 2, 0.5)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    blocks = torch.arange(20) // 2
    for estimate in (lambda a, y, b: adjusted(a, y, 0.5, b), difference_in_means):
        one, two = estimate(a, y, blocks), estimate(a[shuffled], y[shuffled], 100 - 7 * blocks[shuffled])
        for first, second in zip(one, two, strict=True):
            torch.testing.assert_close(first, second)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_adjusted_is_unbiased_over_all_assignments_of_all_trials(p: float) -> None:
    """Enumerates every design of three trials on two units: the mean of the estimate is the effect, for any outcome."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(4, 2, generator=g, dtype=torch.double)  # an arbitrary network on two units
    single = all_assignments(2)
    weights = chance(single, p)
    z = (single.double() - p) / (p * (1 - p))
    truth = (z * weights[:, None]).T @ table
    mean = torch.zeros(2, 2, dtype=torch.double)
    joint = torch.zeros(1, 2, dtype=torch.double)
    for rows in itertools.product(range(4), repeat=3):
        index = list(rows)
        likely = weights[index].prod()
        mean += likely * adjusted(single[index], table[index], p).effect
        joint += likely * interactions(single[index], table[index], [(0, 1)], p).effect
    torch.testing.assert_close(mean, truth, atol=1e-12, rtol=0)
    torch.testing.assert_close(joint[0], table[3] - table[2] - table[1] + table[0], atol=1e-12, rtol=0)


def test_difference_in_means_is_unbiased_over_all_balanced_assignments() -> None:
    """Every way to flip one unit in exactly two of four trials, the other unit independently."""
    table = torch.randn(4, 1, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    balanced = [c for c in itertools.product((False, True), repeat=4) if sum(c) == 2]
    total = torch.zeros(2, 1, dtype=torch.double)
    for u, v in itertools.product(balanced, balanced):
        a = torch.tensor([u, v]).T
        total += difference_in_means(a, table[a[:, 0].long() * 2 + a[:, 1].long()]).effect
    truth = torch.stack(
        [(table[2] + table[3] - table[0] - table[1]) / 2, (table[1] + table[3] - table[0] - table[2]) / 2]
    )
    torch.testing.assert_close(total / 36, truth, atol=1e-12, rtol=0)


def test_difference_in_means_has_welchs_error_and_the_smaller_arms_degrees_of_freedom() -> None:
    a, _ = draw(25, 1, 1, 0.4)
    y = torch.zeros(25, 2, dtype=torch.double)
    for c, member in itertools.product(range(2), (a[:, 0], ~a[:, 0])):
        base = torch.rand(int(member.sum()), generator=torch.Generator().manual_seed(c), dtype=torch.double)
        # Symmetric within each arm, with lighter tails than normal: then nothing is corrected.
        y[member, c] = (base - base.flip(0)) * (1 + c + member[0]) + member[0] / 4
    got = difference_in_means(a, y)
    smaller = min(int(a.sum()), int((~a).sum())) - 1
    for c in range(2):
        result = stats.ttest_ind(y[a[:, 0], c], y[~a[:, 0], c], equal_var=False)
        t = (got.effect / got.std_error)[0, c]  # type: ignore[operator]
        assert t.item() == pytest.approx(result.statistic, rel=1e-9)
        assert smaller <= result.df
        assert got.dof is not None
        assert got.dof[0, c] == smaller


def test_heavy_tails_and_skewness_lower_the_degrees_of_freedom() -> None:
    a, y = draw(400, 1, 1, 0.5)
    skewed = y.exp()
    heavy = y.clone()
    heavy[a[:, 0].nonzero()[0]] = 30.0
    for estimate in (difference_in_means, lambda a, y: adjusted(a, y, 0.5)):
        plain, less, few = (estimate(a, z).dof.item() for z in (y, skewed, heavy))
        assert 150 < plain < 200
        assert less < 100
        assert few < 10


def test_scores_that_cancel_are_no_discovery() -> None:
    """An even function of complementary trials: effect and error are both rounding, and p must not be small."""
    first, _ = draw(100, 20, 1, 0.5)
    a = torch.stack([first, ~first], dim=1).reshape(200, 20)
    z = a.double() - 0.5
    y = (z[:, :10] * z[:, 10:]) @ torch.randn(10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    blocks = torch.arange(200) // 2
    for got in (adjusted(a, y, 0.5, blocks), difference_in_means(a, y, blocks)):
        assert got.effect.abs().max() < 1e-12
        p = p_values(got.effect, got.std_error, got.dof)  # type: ignore[arg-type]
        assert p.min() > 0.5
    pair = interactions(a, y, [(0, 10)], 0.5, blocks)
    assert p_values(pair.effect, pair.std_error, pair.dof).min() < 1e-6  # type: ignore[arg-type]


def test_complementary_pairs_give_the_paired_t_test() -> None:
    first, y = draw(24, 1, 2, 0.5)
    a = torch.stack([first, ~first], dim=1).reshape(48, 1)
    y = torch.randn(48, 2, generator=torch.Generator().manual_seed(5), dtype=torch.double)
    got = difference_in_means(a, y, torch.arange(48) // 2)
    flipped, idle = y[a[:, 0]], y[~a[:, 0]]
    for c in range(2):
        result = stats.ttest_rel(flipped[:, c], idle[:, c])
        t = (got.effect / got.std_error)[0, c]  # type: ignore[operator]
        assert t.item() == pytest.approx(result.statistic, rel=1e-9)
    assert got.dof is not None
    assert bool((got.dof <= 23).all())


def test_least_squares_finds_a_linear_network_exactly() -> None:
    a, _ = draw(40, 6, 1, 0.3)
    beta = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    got = adjusted(a, 5 + a.double() @ beta, 0.3, ridge=0.0)
    torch.testing.assert_close(got.effect, beta, atol=1e-10, rtol=0)
    assert got.std_error is not None
    assert got.std_error.max() < 1e-10


def test_adjusting_removes_what_other_units_explain() -> None:
    a, _ = draw(400, 40, 1, 0.3, seed=4)
    y = a.double() @ torch.randn(40, 1, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    with_it, without = adjusted(a, y, 0.3).std_error, difference_in_means(a, y).std_error
    assert with_it is not None
    assert without is not None
    assert with_it.mean() < 0.1 * without.mean()


@pytest.mark.parametrize("blocks", [None, torch.arange(40) // 2])
@pytest.mark.parametrize("value", [0.1, -1e6, 3e-9])
def test_constant_outcomes_have_effect_zero_and_no_error(blocks: Tensor | None, value: float) -> None:
    a, y = draw(40, 5, 2, 0.4)
    y[:, 0] = value
    for got in (adjusted(a, y, 0.4, blocks), difference_in_means(a, y, blocks)):
        assert got.std_error is not None
        assert bool((got.effect[:, 0] == 0).all())
        assert bool((got.std_error[:, 0] == 0).all())
        p = p_values(got.effect, got.std_error, got.dof)
        assert bool((p[:, 0] == 1).all())
        assert bool((p[:, 1] < 1).all())


def test_units_that_never_or_hardly_vary() -> None:
    a, y = draw(30, 4, 2, 0.5)
    a[:, 0], a[:, 1], a[:, 2] = False, True, False
    a[3, 2] = True
    got = difference_in_means(a, y)
    assert got.std_error is not None
    assert bool(got.effect[:2].isnan().all() & got.std_error[:2].isnan().all())
    assert bool(got.effect[2].isfinite().all() & got.std_error[2].isinf().all())
    assert p_values(got.effect, got.std_error, got.dof)[2].tolist() == [1.0, 1.0]
    assert bool(got.std_error[3].isfinite().all())


ESTIMATORS: list[Estimator] = [
    lambda a, y: difference_in_means(a, y),
    lambda a, y: difference_in_means(a, y, torch.arange(len(a)) // 2),
    lambda a, y: adjusted(a, y, 0.4),
    lambda a, y: adjusted(a, y, 0.4, torch.arange(len(a)) // 2),
]


@pytest.mark.parametrize("estimate", ESTIMATORS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), trials=st.sampled_from((14, 40)))
def test_units_trials_and_scale_are_only_names(estimate: Estimator, seed: int, trials: int) -> None:
    a, y = draw(trials, 18, 2, 0.4, seed)
    g = torch.Generator().manual_seed(seed)
    units = torch.randperm(18, generator=g)
    pairs = torch.randperm(trials // 2, generator=g)
    order = torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten()
    plain, permuted = estimate(a, y), estimate(a[order][:, units], 3 - 1000 * y[order])
    torch.testing.assert_close(permuted[0], -1000 * plain[0][units], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(permuted[1], 1000 * plain[1][units], rtol=1e-7, atol=1e-7)  # type: ignore[index]
    torch.testing.assert_close(permuted[2], plain[2][units], rtol=1e-6, atol=1e-6)  # type: ignore[index]


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_all_classes_at_once_are_the_classes_one_by_one(estimate: Estimator) -> None:
    a, y = draw(16, 20, 5, 0.4)
    whole = estimate(a, y)
    for c in range(5):
        alone = estimate(a, y[:, c : c + 1])
        for first, second in zip(whole, alone, strict=True):
            torch.testing.assert_close(first[:, c : c + 1], second, rtol=1e-9, atol=1e-12)  # type: ignore[index]


def test_primal_and_dual_solutions_meet() -> None:
    """Padding with a unit that never varies keeps the fit, with its penalty rescaled, and goes from U <= T to U > T."""
    a, y = draw(12, 12, 2, 0.5)
    constant = torch.full((12, 12), 0.5, dtype=torch.double)
    wide = torch.cat([a.double(), constant], dim=1)
    got, padded = adjusted(a, y, 0.5, ridge=0.5), adjusted(wide, y, 0.5, ridge=0.25)
    torch.testing.assert_close(got.effect, padded.effect[:12])
    torch.testing.assert_close(got.std_error, padded.std_error[:12])  # type: ignore[index]


def test_degrees_of_freedom_follow_the_weights() -> None:
    a, y = draw(1000, 5, 1, 0.5)
    half = adjusted(a, y, 0.5).dof
    a, y = draw(1000, 5, 1, 0.1)
    tenth = adjusted(a, y, 0.1).dof
    assert half is not None
    assert tenth is not None
    assert half.max() <= 500
    assert half.min() > 400
    assert tenth.max() <= 0.86 * 100
    y[a[:, 0].nonzero()[0]] = 1e3  # one trial carries nearly everything
    few = adjusted(a, y, 0.1).dof
    assert few is not None
    assert few[0, 0] < 5


def test_interactions_of_a_bilinear_network() -> None:
    a, _ = draw(3000, 4, 1, 0.5, seed=1)
    x = a.double()
    y = torch.stack([x[:, 0] + 2 * x[:, 1] + 4 * x[:, 0] * x[:, 1], x[:, 2] - x[:, 3]], dim=1)
    got = interactions(a, y, [(0, 1), (2, 3), (1, 0)], 0.5)
    truth = torch.tensor([[4.0, 0.0], [0.0, 0.0], [4.0, 0.0]], dtype=torch.double)
    assert got.std_error is not None
    assert bool(((got.effect - truth).abs() <= 4 * got.std_error).all())
    assert got.std_error.max() < 0.1
    torch.testing.assert_close(got.effect[0], got.effect[2])


def test_joint_interaction_of_three() -> None:
    values = {(0,): 1.0, (1,): 2.0, (2,): -1.0, (0, 1): 3.0, (0, 1, 2): 7.0}
    got = joint_interaction(torch.tensor(list(values.values()))[:, None], list(values))
    assert got.flatten().tolist() == [0.0, 0.0, 0.0, 0.0, 5.0]
    with pytest.raises(DesignError, match=r"none for \[1\].*Joint.pairs"):
        joint_interaction(torch.zeros(2, 1), [(0,), (0, 1)])


def test_exact_difference_takes_one_reference_or_one_per_row() -> None:
    y, one = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([1.0, 1.0])
    assert exact_difference(y, one).effect.tolist() == [[0.0, 1.0], [2.0, 4.0]]
    assert exact_difference(y, y.flip(0)).effect.tolist() == [[-2.0, -3.0], [2.0, 3.0]]
    assert exact_difference(y, one).std_error is None
    with pytest.raises(UnitError, match="reference"):
        exact_difference(y, torch.zeros(3))


def test_bad_arguments_are_named() -> None:
    a, y = draw(10, 4, 2, 0.5)
    with pytest.raises(UnitError, match=r"`assignments`.*\(T, U\)"):
        adjusted(a, y[:5], 0.5)
    with pytest.raises(DesignError, match="at least 2, but got 1"):
        difference_in_means(a[:1], y[:1])
    for p in (0.0, 1.0, math.nan):
        with pytest.raises(ArgumentError, match=r"`p` to be in \(0, 1\)"):
            adjusted(a, y, p)
    with pytest.raises(ArgumentError, match="more trials than units"):
        adjusted(a[:4], y[:4], 0.5, ridge=0.0)
    with pytest.raises(ArgumentError, match="ridge"):
        adjusted(a, y, 0.5, ridge=-1.0)
    with pytest.raises(UnitError, match=r"`blocks`.*\(10,\)"):
        adjusted(a, y, 0.5, torch.arange(5))
    with pytest.raises(DesignError, match="at least 2 pairs"):
        adjusted(a, y, 0.5, torch.zeros(10))
    for pair in ((0, 4), (-1, 2), (1, 1)):
        with pytest.raises(UnitError, match=r"pairs of different units in range\(4\)"):
            interactions(a, y, [pair], 0.5)


def planted(a: Tensor) -> Tensor:
    """Softmax of a network with main effects and an interaction on eight units."""
    x = a.double()
    g = torch.Generator().manual_seed(9)
    z = x @ torch.randn(8, 3, generator=g, dtype=torch.double)
    z = z + 2 * (x[:, :1] * x[:, 1:2]) * torch.randn(1, 3, generator=g, dtype=torch.double)
    return torch.cat([z, z.softmax(1)], dim=1)


@pytest.mark.parametrize(("p", "trials", "units"), [(0.3, 200, 8), (0.5, 60, 8), (0.5, 60, 100)])
def test_intervals_cover_what_they_promise(p: float, trials: int, units: int) -> None:
    """A quick check of coverage, also with fewer trials than units; the full one is benchmarks/coverage."""
    every = all_assignments(8)
    weights = ((every.double() - p) / (p * (1 - p))) * chance(every, p)[:, None]
    truth = torch.zeros(units, 6, dtype=torch.double)
    truth[:8] = weights.T @ planted(every)
    g = torch.Generator().manual_seed(0)
    inside = []
    for _ in range(150):
        a = torch.rand(trials, units, generator=g) < p
        got = adjusted(a, planted(a[:, :8]), p)
        half = half_width(got.std_error, got.dof)  # type: ignore[arg-type]
        inside.append(((got.effect - truth).abs() <= half).double().mean())
    coverage = torch.stack(inside)
    error = coverage.std() / len(coverage) ** 0.5
    assert 0.93 < coverage.mean() - 3 * error < coverage.mean() + 3 * error < 0.98


def test_few_discoveries_where_there_are_only_interactions() -> None:
    """y = (a_0 - p)(a_1 - p) + ... has no main effect at p, so every discovery is false."""
    from ce_plugin.effects.inference import benjamini_hochberg

    p, runs, g = 0.3, 200, torch.Generator().manual_seed(0)
    false = 0
    for _ in range(runs):
        a = torch.rand(300, 20, generator=g) < p
        z = a.double() - p
        got = adjusted(a, (z[:, :10] * z[:, 10:]).sum(1, keepdim=True), p)
        q = benjamini_hochberg(p_values(got.effect, got.std_error, got.dof), axis=0)  # type: ignore[arg-type]
        false += bool((q <= 0.05).any())
    assert false <= stats.binom.ppf(0.999, runs, 0.05)


def test_the_default_penalty_is_the_documented_one() -> None:
    a, y = draw(10, 4, 1, 0.5)
    torch.testing.assert_close(adjusted(a, y, 0.5).effect, adjusted(a, y, 0.5, ridge=0.25).effect)
    assert RIDGE == 0.25
