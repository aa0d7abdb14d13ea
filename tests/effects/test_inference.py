"""Intervals, p-values and the false discovery rate against scipy's tests and a brute-force Benjamini-Hochberg."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ce_plugin.effects.inference import benjamini_hochberg, half_width, p_values, t_interval
from ce_plugin.errors import ArgumentError


def test_interval_and_p_value_are_those_of_a_t_test() -> None:
    x = np.random.default_rng(0).normal(0.3, 1.0, 17)
    result = stats.ttest_1samp(x, 0.0)
    effect, error = torch.tensor([x.mean()]), torch.tensor([x.std(ddof=1) / math.sqrt(17)])
    dof = torch.tensor([16.0])
    assert p_values(effect, error, dof).item() == pytest.approx(result.pvalue, rel=1e-12)
    for level in (0.5, 0.95, 0.999):
        low, high = t_interval(effect, error, dof, level)
        assert (low.item(), high.item()) == pytest.approx(tuple(result.confidence_interval(level)), rel=1e-12)


def test_normal_quantiles_without_degrees_of_freedom() -> None:
    assert half_width(torch.tensor([2.0]), None, 0.95).item() == pytest.approx(2 * 1.959963984540054)
    assert p_values(torch.tensor([-1.959963984540054]).double(), torch.ones(1), None).item() == pytest.approx(0.05)


def test_an_interval_excludes_zero_exactly_where_the_p_value_says_so() -> None:
    g = torch.Generator().manual_seed(0)
    effect, error = torch.randn(500, generator=g).double(), torch.rand(500, generator=g).double()
    dof = 1 + 20 * torch.rand(500, generator=g).double()
    low, high = t_interval(effect, error, dof, 0.9)
    outside = (low > 0) | (high < 0)
    assert torch.equal(outside, p_values(effect, error, dof) < 0.1)
    assert 0 < outside.sum() < 500


def test_no_error_means_certainty_and_no_information_means_none() -> None:
    effect = torch.tensor([0.0, 0.5, 0.5, math.nan])
    error = torch.tensor([0.0, 0.0, math.inf, math.nan])
    p = p_values(effect, error, torch.ones(4))
    assert p[:3].tolist() == [1.0, 0.0, 1.0]
    assert p[3].isnan()
    low, high = t_interval(effect, error, torch.ones(4))
    assert low[:3].tolist() == [0.0, 0.5, -math.inf]
    assert high[:3].tolist() == [0.0, 0.5, math.inf]
    assert low[3].isnan()


@pytest.mark.parametrize("level", [0.0, 1.0, 95, -1, math.nan])
def test_levels_outside_the_unit_interval(level: float) -> None:
    with pytest.raises(ArgumentError, match=r"Write 0.95 for 95 per cent"):
        half_width(torch.ones(1), None, level)


def discoveries(p: list[float], q: float) -> list[bool]:
    """The step-up procedure as Benjamini and Hochberg wrote it, on a plain list."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    last = max((k + 1 for k, i in enumerate(order) if p[i] <= q * (k + 1) / len(p)), default=0)
    chosen = set(order[:last])
    return [i in chosen for i in range(len(p))]


@given(
    p=st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=30),
    q=st.sampled_from((0.01, 0.05, 0.2, 0.5)),
)
def test_benjamini_hochberg_is_the_step_up_procedure(p: list[float], q: float) -> None:
    adjusted = benjamini_hochberg(torch.tensor(p, dtype=torch.double))
    # Numbers on the threshold itself may fall either way by rounding.
    clear = (adjusted - q).abs() > 1e-12
    expected = torch.tensor(discoveries(p, q))
    assert torch.equal((adjusted <= q)[clear], expected[clear])


def test_families_are_adjusted_apart_and_padding_does_not_count() -> None:
    g = torch.Generator().manual_seed(1)
    p = torch.rand(3, 10, 4, generator=g, dtype=torch.double) ** 3
    p[1, 7:] = math.nan
    p[2, 4, 1] = math.nan
    p[0, :, 3] = math.nan
    adjusted = benjamini_hochberg(p, axis=1)
    assert torch.equal(adjusted.isnan(), p.isnan())
    for n in range(3):
        for c in range(4):
            there = ~p[n, :, c].isnan()
            if there.any():
                torch.testing.assert_close(adjusted[n, there, c], benjamini_hochberg(p[n, there, c]))
    torch.testing.assert_close(adjusted[1, :7], benjamini_hochberg(p[1, :7], axis=0))
