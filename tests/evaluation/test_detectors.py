"""Figures of detectors: against other libraries, brute force, and known coverage."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from benchmarks.harness.tables import worst_case_scores
from ce_plugin.errors import ArgumentError, InputError
from ce_plugin.evaluation.detectors import (
    Figures,
    Interval,
    auroc,
    bootstrapped,
    figures,
    tpr_at_fpr,
)

# Few different values, so that equal scores are common.
SCORES = st.lists(st.one_of(st.integers(-2, 2).map(float), st.floats(-10, 10)), min_size=1, max_size=40).map(np.array)
RATES = st.one_of(st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.25, 0.29, 0.5]), st.floats(0, 0.99))


@settings(max_examples=150, deadline=None)
@given(clean=SCORES, attacked=SCORES)
def test_auroc_is_that_of_scipy_and_sklearn(clean: np.ndarray, attacked: np.ndarray) -> None:
    ours = auroc(clean, attacked)
    u = stats.mannwhitneyu(attacked, clean, method="asymptotic").statistic
    assert ours == pytest.approx(u / (len(clean) * len(attacked)), abs=1e-12)
    labels = np.r_[np.zeros(len(clean)), np.ones(len(attacked))]
    assert ours == pytest.approx(roc_auc_score(labels, np.r_[clean, attacked]), abs=1e-12)
    assert auroc(attacked, clean) == pytest.approx(1 - ours, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(clean=SCORES, attacked=SCORES, fpr=RATES)
def test_detection_rate_is_the_best_that_a_clean_score_as_threshold_allows(
    clean: np.ndarray, attacked: np.ndarray, fpr: float
) -> None:
    allowed = [t for t in clean if (clean > t).sum() / len(clean) <= fpr]
    assert tpr_at_fpr(clean, attacked, fpr) == max((attacked > t).mean() for t in allowed)


@settings(max_examples=100, deadline=None)
@given(clean=SCORES, attacked=SCORES, fpr=RATES)
def test_detection_rate_is_below_the_roc_curve_of_sklearn(clean: np.ndarray, attacked: np.ndarray, fpr: float) -> None:
    """And no more than one step below it: a threshold between two clean scores may do a little better."""
    labels = np.r_[np.zeros(len(clean)), np.ones(len(attacked))]
    false, true, _ = roc_curve(labels, np.r_[clean, attacked], drop_intermediate=False)
    ours = tpr_at_fpr(clean, attacked, fpr)
    assert ours <= true[false <= fpr + 1e-12].max() + 1e-12
    assert ours >= true[false <= fpr - 1 / len(clean)].max(initial=0) - 1e-12


def test_detection_rate_with_equal_scores_flags_fewer_and_not_more() -> None:
    clean = np.array([0.0, 1.0, 1.0, 1.0])
    assert tpr_at_fpr(clean, np.array([1.0, 2.0]), 0.5) == 0.5
    assert tpr_at_fpr(clean, np.array([0.5, 1.0, 2.0]), 0.75) == 1.0
    assert tpr_at_fpr(np.zeros(100), np.zeros(5), 0.99) == 0.0


def test_detection_rate_below_what_the_clean_images_resolve() -> None:
    clean = np.arange(50.0)
    assert tpr_at_fpr(clean, np.array([48.5, 49.5]), 0.01) == 0.5
    assert tpr_at_fpr(clean, np.array([48.5, 49.5]), 0.02) == 1.0


def test_infinity_is_a_score() -> None:
    clean, attacked = np.array([-np.inf, 0.0, np.inf]), np.array([np.inf, 1.0])
    assert auroc(clean, attacked) == pytest.approx((2.5 + 2) / 6)
    assert tpr_at_fpr(clean, attacked, 0.4) == 1.0
    assert tpr_at_fpr(clean, attacked, 0.3) == 0.0


def slow_figures(clean: np.ndarray, attacked: np.ndarray, fprs: tuple[float, ...]) -> list[float]:
    """A sample's figures, with the images written out as often as they were drawn."""
    if not len(clean) or not len(attacked):
        return [np.nan] * (1 + len(fprs))
    return [auroc(clean, attacked), *(tpr_at_fpr(clean, attacked, fpr) for fpr in fprs)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("paired", [False, True])
def test_every_sample_has_the_figures_of_its_images(ties: bool, paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample, written out and evaluated one by one, and also when few are held at a time."""
    from ce_plugin.evaluation import detectors as bootstrap

    generator = np.random.default_rng(0)
    clean, attacked = generator.normal(size=23), generator.normal(1.0, size=9)
    if ties:
        clean, attacked = np.round(clean), np.round(attacked)
    ids = (np.arange(23), generator.choice(23, 9, replace=False)) if paired else None
    fprs = (0.0, 0.05, 0.3)
    used = []
    of_weights = bootstrap._of_weights
    monkeypatch.setattr(bootstrap, "_of_weights", lambda *a: used.append(a) or of_weights(*a))
    monkeypatch.setattr(bootstrap, "_BLOCK", 23 * 30)
    sample = bootstrapped(clean, attacked, fprs, ids=ids, n_resamples=200, seed=5)
    assert len(used) > 1
    rows = [
        slow_figures(np.repeat(below, n), np.repeat(above, m), fprs)
        for below, above, _, many, others in used
        for n, m in zip(many, others, strict=True)
    ]
    np.testing.assert_allclose(np.c_[sample.auroc, sample.tpr.T], np.array(rows), atol=1e-12)
    assert len(rows) == 200
    if paired:
        assert len({tuple(row) for row in rows}) > 50
    else:
        for _, _, _, many, others in used:
            assert set(many.sum(1)) == {23}
            assert set(others.sum(1)) == {9}


def test_twins_are_drawn_together() -> None:
    """With scores that are equal image by image, AUROC moves less than where twins are drawn apart."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=200)
    together = bootstrapped(scores, scores + 0.2, ids=(np.arange(200), np.arange(200))).auroc.std()
    apart = bootstrapped(scores, scores + 0.2).auroc.std()
    assert 0 < together < 0.5 * apart


def test_order_of_the_images_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    clean, attacked, names = generator.normal(size=50), generator.normal(size=20), np.arange(50)
    first, second = generator.permutation(50), generator.permutation(20)
    one = bootstrapped(clean, attacked, n_resamples=50)
    other = bootstrapped(clean[first], attacked[second], n_resamples=50)
    np.testing.assert_array_equal(one.auroc, other.auroc)
    one = bootstrapped(clean, attacked, ids=(names, names[:20]), n_resamples=50)
    other = bootstrapped(clean[first], attacked[second], ids=(names[first], names[:20][second]), n_resamples=50)
    np.testing.assert_array_equal(one.tpr, other.tpr)
    assert not np.array_equal(one.auroc, bootstrapped(clean, attacked, n_resamples=50, seed=1).auroc)


def test_intervals_cover_the_truth() -> None:
    """AUROC of two normal distributions one standard deviation apart is Phi(1 / sqrt 2)."""
    generator, truth = np.random.default_rng(1), stats.norm.cdf(0.5**0.5)
    inside = 0
    for run in range(300):
        sample = bootstrapped(generator.normal(size=120), generator.normal(1.0, size=80), (), n_resamples=300, seed=run)
        low, high = sample.interval(sample.auroc, 0.9)
        inside += low <= truth <= high
    assert 0.84 < inside / 300 < 0.96


def test_spread_of_the_samples_is_that_of_hanley_and_mcneil() -> None:
    """Standard error of AUROC in closed form for the bootstrap of a large sample: placement values' variances."""
    generator = np.random.default_rng(2)
    clean, attacked = generator.normal(size=1500), generator.normal(0.7, size=400)
    above = (attacked[:, None] > clean[None]).astype(float)
    wanted = np.sqrt(above.mean(0).var() / 1500 + above.mean(1).var() / 400)
    assert bootstrapped(clean, attacked, (), n_resamples=4000).auroc.std() == pytest.approx(wanted, rel=0.05)


def test_a_thousand_samples_take_well_under_a_second() -> None:
    generator = np.random.default_rng(0)
    clean, attacked = generator.normal(size=1000), generator.normal(size=300)
    bootstrapped(clean, attacked, n_resamples=10)
    start = time.process_time()
    bootstrapped(clean, attacked, n_resamples=1000)
    assert time.process_time() - start < 1.0


# --- tables


def test_figures_hold_the_figures_and_their_intervals() -> None:
    generator = np.random.default_rng(0)
    clean, attacked = generator.normal(size=400), generator.normal(2.0, size=100)
    found = figures(clean, attacked, detector="d", attack="a", needed=100, seed=3)
    assert found.evaluated
    assert (found.n_clean, found.n_attacked) == (400, 100)
    assert found.auroc is not None
    assert found.tpr_1 is not None
    assert found.tpr_5 is not None
    assert found.auroc.value == auroc(clean, attacked)
    assert found.tpr_1.value == tpr_at_fpr(clean, attacked, 0.01)
    assert found.tpr_5.value == tpr_at_fpr(clean, attacked, 0.05)
    for figure in (found.auroc, found.tpr_1, found.tpr_5):
        assert figure.low < figure.value < figure.high
    narrow = figures(clean, attacked, detector="d", attack="a", level=0.5, seed=3)
    assert narrow.auroc is not None
    assert found.auroc.low < narrow.auroc.low < narrow.auroc.high < found.auroc.high
    row = found.to_dict()
    assert [row["auroc"], row["auroc_low"], row["auroc_high"]] == list(found.auroc)
    assert row["tpr_5_low"] == found.tpr_5.low
    assert row["evaluated"] is True


def test_too_few_images_are_not_evaluated_and_stay_in_the_table() -> None:
    for clean, attacked in ((np.arange(300.0), np.arange(199.0)), (np.arange(199.0), np.arange(300.0))):
        found = figures(clean, attacked, detector="d", attack="a", needed=200)
        assert found == Figures("d", "a", len(clean), len(attacked))
        assert not found.evaluated
        assert found.to_dict()["auroc"] is None
        assert found.to_dict()["tpr_1_high"] is None
        assert f"not evaluated ({len(attacked)} successful attacks)" in str(found)
    assert not figures(np.arange(9.0), [], detector="d", attack="a").evaluated
    assert figures(np.arange(200.0), np.arange(200.0), detector="d", attack="a", needed=200).evaluated


def test_worst_case_is_the_least_score_of_each_image() -> None:
    generator = np.random.default_rng(0)
    table = {
        name: (generator.permutation(30)[:size], np.round(generator.normal(size=size), 1))
        for name, size in (("a", 20), ("b", 0), ("c", 25))
    }
    worst = worst_case_scores(table)
    brute: dict[int, tuple[float, str]] = {}
    for name, (ids, scores) in table.items():
        for i, score in zip(ids, scores, strict=True):
            if i not in brute or score < brute[i][0]:
                brute[i] = (score, name)
    assert worst.ids.tolist() == sorted(brute)
    assert [(s, a) for s, a in zip(worst.scores, worst.attacks, strict=True)] == [brute[i] for i in worst.ids]


def test_worst_case_is_detected_where_every_attack_is() -> None:
    generator = np.random.default_rng(0)
    table = {name: (np.arange(50), generator.normal(size=50)) for name in "abc"}
    worst = worst_case_scores(table)
    np.testing.assert_array_equal(worst.scores > -0.5, np.all([scores > -0.5 for _, scores in table.values()], axis=0))


def test_worst_case_of_names_and_of_nothing() -> None:
    worst = worst_case_scores({"a": (["x", "y"], [1.0, 2.0]), "b": ([], []), "c": (["y"], [2.0])})
    assert worst.ids.tolist() == ["x", "y"]
    assert worst.attacks == ("a", "a")
    nothing = worst_case_scores({"a": ([], []), "b": ([], [])})
    assert len(nothing.ids) == len(nothing.scores) == len(nothing.attacks) == 0


def test_what_is_refused() -> None:
    good = [1.0, 2.0]
    for bad in ([], [[1.0]], [1.0, np.nan]):
        with pytest.raises(InputError, match="`clean` to be one number for each image"):
            auroc(bad, good)
        with pytest.raises(InputError, match="`attacked` to be one number for each image"):
            tpr_at_fpr(good, bad, 0.1)
    for fpr in (-0.1, 1.0, float("nan"), 5):
        with pytest.raises(ArgumentError, match=r"`fpr` to be a rate in \[0, 1\)"):
            tpr_at_fpr(good, good, fpr)
        with pytest.raises(ArgumentError, match=r"`fpr` to be a rate in \[0, 1\)"):
            bootstrapped(good, good, (fpr,))
    with pytest.raises(InputError, match=r"`ids` to be one id for each score, \(2,\), but got shape \(3,\)"):
        bootstrapped(good, good, ids=([1, 2], [1, 2, 3]))
    with pytest.raises(ArgumentError, match="`n_resamples` to be a number of samples"):
        bootstrapped(good, good, n_resamples=0)
    with pytest.raises(ArgumentError, match="`level` to be a probability"):
        figures(good, good, detector="d", attack="a", level=95)
    with pytest.raises(ArgumentError, match="`needed` to be a number of images"):
        figures(good, good, detector="d", attack="a", needed=0)
    with pytest.raises(InputError, match="scores of at least one attack, but got none"):
        worst_case_scores({})
    with pytest.raises(InputError, match="each image once in 'a', but got an image twice"):
        worst_case_scores({"a": ([1, 1], good)})
    with pytest.raises(InputError, match=r"for each image of 'a', but got shapes \(1,\) and \(2,\)"):
        worst_case_scores({"a": ([1], good)})
    with pytest.raises(InputError, match="for each image of 'a', but got NaN"):
        worst_case_scores({"a": ([1], [np.nan])})


def test_samples_without_an_attacked_image_are_left_out_of_intervals() -> None:
    sample = bootstrapped(np.arange(6.0), [9.0], ids=(np.arange(6), [3]), n_resamples=200)
    assert 0 < np.isnan(sample.auroc).sum() < 200
    np.testing.assert_array_equal(np.isnan(sample.auroc), np.isnan(sample.tpr[0]))
    assert Interval(1.0, *sample.interval(sample.auroc, 0.9)) == Interval(1.0, 1.0, 1.0)
