"""Shares: the bootstrap against scipy's, its coverage, and its invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ce_plugin.effects import ratio_of_means
from ce_plugin.effects.mediation import refuse_without_total
from ce_plugin.errors import InferenceError, UnitError


def sample(n: int, seed: int, skewed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts and totals whose ratio of means is 0.4."""
    rng = np.random.default_rng(seed)
    total = rng.lognormal(0, 1, n) if skewed else rng.normal(3, 2, n)
    part = total * rng.beta(2, 3, n) if skewed else 0.4 * total + rng.normal(0, 1, n)
    return torch.from_numpy(part)[:, None], torch.from_numpy(total)


def plain_interval(y: np.ndarray, x: np.ndarray, seed: int, draws: int = 4000) -> tuple[float, float]:
    """The bootstrap-t interval by a loop over resamples."""
    rng, n = np.random.default_rng(seed), len(x)

    def ratio(y: np.ndarray, x: np.ndarray) -> tuple[float, float]:
        share = y.mean() / x.mean()
        return share, float(np.sqrt(((y - share * x) ** 2).sum() / (n * (n - 1))) / abs(x.mean()))

    share, error = ratio(y, x)
    found = []
    for _ in range(draws):
        chosen = rng.integers(n, size=n)
        again, own = ratio(y[chosen], x[chosen])
        found.append((again - share) / own)
    low, high = np.quantile(found, [0.025, 0.975])
    return share - high * error, share - low * error


@pytest.mark.parametrize("skewed", [False, True])
def test_interval_is_that_of_a_plain_loop(skewed: bool) -> None:
    part, total = sample(40, 3, skewed)
    found = ratio_of_means(part, total, n_boot=4000)
    low, high = plain_interval(part[:, 0].numpy(), total.numpy(), seed=0)
    width = high - low
    assert float(found.share) == pytest.approx(float(part.mean() / total.mean()), abs=1e-12)
    assert float(found.low) == pytest.approx(low, abs=0.06 * width)
    assert float(found.high) == pytest.approx(high, abs=0.06 * width)


def test_interval_of_a_mean_is_about_the_t_interval_for_normal_totals() -> None:
    _, total = sample(60, 0)
    mean, low, high = refuse_without_total(total, 0.95, 4000, 0)
    want = stats.t.interval(0.95, 59, loc=float(total.mean()), scale=stats.sem(total.numpy()))
    assert mean == pytest.approx(float(total.mean()))
    assert (low, high) == pytest.approx(want, abs=0.1 * (want[1] - want[0]))


@pytest.mark.parametrize(("skewed", "n", "least"), [(False, 30, 0.91), (True, 20, 0.86)])
def test_coverage(skewed: bool, n: int, least: float) -> None:
    """600 samples at 95 %: measured 0.94 and 0.91; the bounds leave three standard errors."""
    samples = [sample(n, seed, skewed) for seed in range(600)]
    inside = []
    for part, total in samples:
        found = ratio_of_means(part, total, n_boot=500)
        inside.append(bool(found.low <= 0.4 <= found.high))
    assert least <= np.mean(inside) <= 0.985


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(0, 10_000), st.floats(-1e3, 1e3).filter(lambda f: abs(f) > 1e-3))
def test_order_and_unit_of_measurement_do_not_matter(n: int, seed: int, factor: float) -> None:
    part, total = sample(n, seed, skewed=True)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    found, other = ratio_of_means(part, total, n_boot=200), ratio_of_means(part[order], total[order], n_boot=200)
    torch.testing.assert_close(torch.cat(found), torch.cat(other), rtol=1e-6, atol=1e-9)
    scaled = ratio_of_means(part * abs(factor), total * abs(factor), n_boot=200)
    torch.testing.assert_close(torch.cat(found), torch.cat(scaled), rtol=1e-6, atol=1e-9)


def test_units_do_not_see_each_other() -> None:
    """One column gets what it gets among 600 others, which are resampled in several chunks."""
    part, total = sample(25, 1)
    many = torch.cat([torch.randn(25, 599, generator=torch.Generator().manual_seed(0)).double(), part], dim=1)
    alone, among = ratio_of_means(part, total), ratio_of_means(many, total)
    for one, all_ in zip(alone, among, strict=True):
        torch.testing.assert_close(one, all_[-1:], atol=1e-12, rtol=0)


def test_proportional_parts_have_no_error() -> None:
    _, total = sample(10, 0, skewed=True)
    rounding = 1e-7 * torch.randn(10, 2, generator=torch.Generator().manual_seed(0)).double()
    found = ratio_of_means(torch.stack([total, 0 * total], dim=1) + rounding, total)
    want = torch.tensor([1.0, 0.0]).double()
    for value in found:
        torch.testing.assert_close(value, want, atol=1e-6, rtol=0)
    exact = ratio_of_means(torch.stack([total / 2, 0 * total], dim=1), total)
    for value in exact:
        torch.testing.assert_close(value, want / 2, atol=1e-15, rtol=0)


def test_too_few_images_have_no_finite_interval_and_no_share() -> None:
    total = torch.tensor([1.0, 1.1])
    found = ratio_of_means(torch.tensor([[0.5], [0.6]]), total)
    assert found.low.isinf().all()
    assert found.high.isinf().all()
    with pytest.raises(InferenceError, match=r"interval \[-inf, \+inf\]"):
        refuse_without_total(total, 0.95, 2000, 0)


def test_a_share_is_refused_about_as_often_as_promised_where_there_is_no_effect() -> None:
    """Totals around 0: at 95 % about 5 % of samples look like an effect."""
    wrong = 0
    for seed in range(300):
        total = torch.from_numpy(np.random.default_rng(seed).normal(0, 1, 30))
        try:
            refuse_without_total(total, 0.95, 500, 0)
            wrong += 1
        except InferenceError:
            pass
    assert 3 <= wrong <= 30  # 15 expected, four standard errors are 15


def test_seed_is_all_that_is_random() -> None:
    part, total = sample(20, 0)
    first, again, other = (ratio_of_means(part, total, n_boot=200, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.low, other.low)


def test_shapes_are_checked() -> None:
    with pytest.raises(UnitError, match=r"`part` to be of shape \(N, U\), with totals \(N,\)"):
        ratio_of_means(torch.zeros(3, 2), torch.zeros(4))
