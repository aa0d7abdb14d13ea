"""Pictures of detectors: curves that pass through the right points, bars that add up."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import auc, roc_auc_score

from ce_plugin.errors import ArgumentError, InputError
from ce_plugin.visualization import plot_intervals, plot_ranked, plot_roc, plot_scores


def test_the_area_under_the_curve_is_the_auroc() -> None:
    rng = np.random.default_rng(0)
    clean, attacked = rng.normal(size=80).round(1), rng.normal(1, 1, 50).round(1)  # with ties
    axes = plot_roc(clean, {"pgd": attacked, "none": []}, fpr=0.05).axes[0]
    curve, rate = axes.get_lines()
    x, y = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
    truth = np.r_[np.zeros(80), np.ones(50)]
    assert auc(x, y) == pytest.approx(roc_auc_score(truth, np.r_[clean, attacked]))
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert set(np.asarray(rate.get_xdata())) == {0.05}
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["pgd", "5 % false alarms"]


@pytest.mark.parametrize("shift", [0.0, 500.0])
def test_each_histogram_adds_up_to_one(shift: float) -> None:
    rng = np.random.default_rng(1)
    figure = plot_scores(rng.random(60), 0.9, {"pgd": rng.random(30) + shift, "none": []})
    axes = figure.axes[0]
    assert sum(bar.get_height() for bar in axes.containers[0]) == pytest.approx(1)  # type: ignore[misc]
    assert axes.get_xscale() == ("log" if shift else "linear")
    legend = axes.get_legend()
    assert legend is not None
    words = [text.get_text() for text in legend.get_texts()]
    assert sorted(words) == ["clean, calibration (60)", "pgd (30)", "threshold"]


def test_equal_scores_can_be_drawn() -> None:
    plot_scores([1.0, 1.0], 1.0, {"pgd": [1.0]}).canvas.draw()
    plot_roc([1.0, 1.0], {"pgd": [1.0]}, fpr=0.05).canvas.draw()


def test_many_attacks_differ_in_colour_or_dashes() -> None:
    scores = {str(number): [0.5] for number in range(12)}
    lines = plot_roc([0.1], scores, fpr=0.05).axes[0].get_lines()[:12]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_what_cannot_be_drawn_is_told() -> None:
    with pytest.raises(InputError, match="`calibration` to be at least one score"):
        plot_scores([], 0.5)
    with pytest.raises(InputError, match="`pgd` to be finite scores"):
        plot_scores([0.1], 0.5, {"pgd": [np.inf]})
    with pytest.raises(InputError, match="NaN among those of 'pgd'"):
        plot_roc([0.1], {"pgd": [np.nan]}, fpr=0.05)
    with pytest.raises(InputError, match="scores of at least one image"):
        plot_roc([], {}, fpr=0.05)
    with pytest.raises(ArgumentError, match=r"a rate in \(0, 1\)"):
        plot_roc([0.1], {}, fpr=1.0)


def test_ranked_nodes_stand_in_the_order_of_the_first_panel() -> None:
    effect, half = np.array([0.2, -0.4, 0.1]), np.array([0.1, 0.2, 0.3])
    found = np.array([True, True, False])
    panels = {name: (by * effect, by * effect - half, by * effect + half, found) for name, by in (("a", 1), ("b", -2))}
    figure = plot_ranked(["x", "y", "z"], panels)
    first, second = figure.axes
    assert [label.get_text() for label in second.get_xticklabels()] == ["y", "z", "x"]
    assert first.get_title(loc="left") == "a: 2 of 3 differ from 0"
    bars, filled, hollow = second.collections[:3]
    ends = [line[:, 1] for line in bars.get_segments()]
    np.testing.assert_allclose(ends, [(0.6, 1.0), (-0.5, 0.1), (-0.5, -0.3)])
    np.testing.assert_allclose(filled.get_offsets(), [[0, 0.8], [2, -0.4]])
    np.testing.assert_allclose(hollow.get_offsets(), [[1, -0.2]])


def test_intervals_of_all_conditions_are_drawn() -> None:
    panels = {
        "odds": {"node 1": {"clean": (1.0, 0.5, 1.5), "FGSM": (2.0, 1.0, 4.0)}, "node 2": {"FGSM": (0.0, -1.0, 1.0)}},
        "p": {"node 2": {"clean": (0.1, 0.0, 0.2)}},
    }
    figure = plot_intervals(panels, at=1.0)
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["node 1", "node 2"]
    (clean, fgsm), (own, _) = left.containers, right.containers
    assert clean.lines[0].get_xdata().tolist() == [1.0]
    assert fgsm.lines[0].get_xdata().tolist() == [2.0, 0.0]
    assert [tuple(line[:, 0]) for line in fgsm.lines[2][0].get_segments()] == [(1.0, 4.0), (-1.0, 1.0)]
    assert round(float(own.lines[0].get_ydata()[0])) == 1  # the second row
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["clean", "FGSM"]


def test_each_of_many_conditions_looks_different() -> None:
    figure = plot_intervals({"": {"row": {f"condition {k}": (k, k - 1, k + 1) for k in range(9)}}})
    marks = [one.lines[0] for one in figure.axes[0].containers]
    assert len({(mark.get_color(), mark.get_marker()) for mark in marks}) == 9


def test_nothing_to_rank_or_compare_is_told() -> None:
    with pytest.raises(ArgumentError, match="`panels`"):
        plot_ranked([], {})
    with pytest.raises(ArgumentError, match="with 2 numbers each"):
        plot_ranked(["a", "b"], {"clean": ([1], [1], [1], [True])})
    with pytest.raises(ArgumentError, match="`panels`"):
        plot_intervals({})
