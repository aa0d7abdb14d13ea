"""Split-conformal calibration: p-values, thresholds and the rates that come of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ce_plugin.detection.calibration import Calibration, Rate, rate, realised_interval
from ce_plugin.errors import ArgumentError, InputError

# Few different values, so that equal scores are common.
SCORES = st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6)), min_size=1, max_size=60)


def test_p_values_are_those_of_the_definition() -> None:
    calibration = Calibration(np.array([3.0, 1.0, 2.0, 2.0]))
    assert calibration.n == 4
    assert calibration.scores.tolist() == [1.0, 2.0, 2.0, 3.0]
    np.testing.assert_array_equal(calibration.p_values([0.0, 1.0, 2.0, 2.5, 3.0, 3.5]) * 5, [5, 5, 4, 2, 2, 1])
    np.testing.assert_array_equal(calibration.p_values([np.inf, -np.inf]), [0.2, 1.0])
    assert calibration.p_values([]).shape == (0,)


@settings(max_examples=200, deadline=None)
@given(scores=SCORES, new=SCORES, fpr=st.one_of(st.floats(1e-3, 0.999), st.integers(1, 99).map(lambda i: i / 100)))
def test_threshold_flags_what_p_values_flag(scores: list[float], new: list[float], fpr: float) -> None:
    """To the image, also at equal scores and at rates that lie on the grid of p-values."""
    calibration, given_scores = Calibration(np.array(scores)), np.array(scores + new)
    if fpr < calibration.smallest_fpr:
        with pytest.raises(ArgumentError, match="calibration images can resolve"):
            calibration.threshold(fpr)
        return
    flagged = given_scores > calibration.threshold(fpr)
    np.testing.assert_array_equal(flagged, calibration.p_values(given_scores) <= fpr)


def test_every_rate_on_the_grid_of_p_values_is_held_exactly() -> None:
    for n in (1, 2, 28, 99, 299, 1000):
        calibration = Calibration(np.arange(float(n)))
        for k in range(1, n + 1):
            fpr = k / (n + 1)
            assert (np.arange(-1.0, n + 1) > calibration.threshold(fpr)).sum() == k
            assert calibration.threshold(fpr) == n - k


@settings(max_examples=100, deadline=None)
@given(scores=SCORES, order=st.randoms(use_true_random=False), scale=st.sampled_from([2.0, 1024.0]))
def test_order_and_scale_of_the_scores_do_not_matter(scores: list[float], order: object, scale: float) -> None:
    shuffled = scores.copy()
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = Calibration(np.array(scores)), Calibration(np.array(shuffled) * scale)
    np.testing.assert_array_equal(first.p_values(scores), second.p_values(np.array(scores) * scale))


@settings(max_examples=100, deadline=None)
@given(scores=st.lists(st.integers(0, 4).map(float), min_size=2, max_size=40), fpr=st.floats(0.05, 0.9))
def test_each_image_against_the_others_is_flagged_at_no_more_than_the_rate(scores: list[float], fpr: float) -> None:
    """Exchangeability, exactly and with equal scores: whichever of them is the new one, on average over them."""
    values = np.array(scores)
    p = [Calibration(np.delete(values, i)).p_values(values[i]) for i in range(len(values))]
    assert np.mean(np.array(p) <= fpr) <= fpr


@pytest.mark.parametrize(("n", "fpr"), [(99, 0.05), (500, 0.01), (40, 0.3)])
def test_true_rates_follow_the_beta_distribution(n: int, fpr: float) -> None:
    generator = np.random.default_rng(0)
    true = np.array([1 - Calibration(generator.random(n)).threshold(fpr) for _ in range(3000)])
    k = int(fpr * (n + 1) + 1e-9)
    assert stats.kstest(true, stats.beta(k, n + 1 - k).cdf).pvalue > 0.001
    low, high = Calibration(generator.random(n)).realised_interval(fpr, 0.9)
    assert abs(((true >= low) & (true <= high)).mean() - 0.9) < 0.02
    assert abs(true.mean() - k / (n + 1)) < 0.004


def test_measured_rates_follow_the_beta_binomial_distribution() -> None:
    generator, n, n_test, fpr = np.random.default_rng(1), 200, 150, 0.05
    measured = np.array(
        [
            (generator.normal(size=n_test) > Calibration(generator.normal(size=n)).threshold(fpr)).mean()
            for _ in range(3000)
        ]
    )
    low, high = realised_interval(n, fpr, n_test=n_test)
    inside = ((measured >= low - 1e-12) & (measured <= high + 1e-12)).mean()
    assert 0.94 < inside < 0.98  # counts are whole, so that the interval covers somewhat more than 0.95
    assert np.mean((measured > low) & (measured < high)) < 0.95  # and would not without its ends


def test_equal_scores_lower_the_true_rate() -> None:
    generator = np.random.default_rng(2)
    rates = []
    for _ in range(500):
        threshold = Calibration(np.round(generator.random(99) * 5)).threshold(0.1)
        rates.append(np.mean(np.round(generator.random(2000) * 5) > threshold))
    assert 0 < np.mean(rates) < 0.1


def test_interval_of_the_true_rate_in_closed_form() -> None:
    """Beta(1, n): the distribution function is 1 - (1 - x)^n."""
    low, high = realised_interval(99, 0.01, 0.9)
    assert low == pytest.approx(1 - 0.95 ** (1 / 99))
    assert high == pytest.approx(1 - 0.05 ** (1 / 99))
    many = realised_interval(99, 0.01, 0.9, n_test=10**6)
    assert many == pytest.approx((low, high), abs=1e-4)


def test_more_calibration_images_narrow_the_interval() -> None:
    widths = [high - low for low, high in (realised_interval(n, 0.05) for n in (99, 499, 1999))]
    assert widths == sorted(widths, reverse=True)


def test_rate_has_the_interval_of_clopper_and_pearson() -> None:
    for n, k in ((20, 3), (7, 0), (7, 7), (1000, 12)):
        found = rate(np.arange(n) < k)
        assert (found.n, found.n_flagged, found.share) == (n, k, k / n)
        assert found.low == pytest.approx(stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0)
        assert found.high == pytest.approx(stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0)
    assert Rate(**found.to_dict()) == found


def test_rate_covers() -> None:
    generator = np.random.default_rng(3)
    found = [rate(generator.random(60) < 0.1, 0.9) for _ in range(1000)]
    assert np.mean([one.low <= 0.1 <= one.high for one in found]) >= 0.9


def test_what_is_given_is_left_alone_and_what_is_kept_cannot_be_changed() -> None:
    scores = np.array([2.0, 1.0])
    calibration = Calibration(scores)
    assert scores.tolist() == [2.0, 1.0]
    scores[:] = 9
    assert calibration.scores.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="read-only"):
        calibration.scores[0] = 5.0


@pytest.mark.parametrize("scores", [[], [[1.0]], [1.0, np.nan], [np.inf]])
def test_scores_that_cannot_calibrate(scores: object) -> None:
    with pytest.raises(InputError, match="`scores` to be one finite number for each calibration image"):
        Calibration(np.array(scores))


def test_rates_that_cannot_be_resolved_say_how_many_images_can() -> None:
    for n, fpr in ((50, 0.01), (98, 0.01), (0, 0.5), (998, 0.001), (30, 0.03)):
        with pytest.raises(ArgumentError, match=rf"at least 1 / {n + 1}, .* It takes (\d+) calibration") as caught:
            realised_interval(n, fpr)
        needed = int(str(caught.value).split("It takes ")[1].split()[0])
        realised_interval(needed, fpr)
        with pytest.raises(ArgumentError):
            realised_interval(needed - 1, fpr)


def test_other_values_that_are_refused() -> None:
    calibration = Calibration(np.arange(99.0))
    for fpr in (0.0, 1.0, -0.1, 5, float("nan")):
        with pytest.raises(ArgumentError, match=r"`fpr` to be a rate in \(0, 1\)"):
            calibration.threshold(fpr)
    for level in (0.0, 1.0, 95):
        with pytest.raises(ArgumentError, match=r"`level` to be a probability in \(0, 1\)"):
            calibration.realised_interval(0.05, level)
        with pytest.raises(ArgumentError, match="`level`"):
            rate([True], level)
    with pytest.raises(ArgumentError, match="`n_test` to be a number of images"):
        calibration.realised_interval(0.05, n_test=0)
    with pytest.raises(InputError, match="`scores` to be numbers, but got NaN"):
        calibration.p_values([np.nan])
    for flags in ([], [1, 0], [[True]]):
        with pytest.raises(InputError, match="one boolean for each image"):
            rate(flags)
