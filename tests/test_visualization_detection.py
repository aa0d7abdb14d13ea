"""Pictures of detectors: curves that pass through the right points, bars that add up."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import auc, roc_auc_score

from ce_plugin.errors import ArgumentError, InputError
from ce_plugin.visualization import plot_roc, plot_scores


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
