"""The curve of carriers shows the numbers of the result."""

from __future__ import annotations

import pytest
import torch

from ce_plugin.effects import Carriers, carried, plot_carriers


def found(*shares: float, n: int = 12) -> Carriers:
    total = torch.linspace(1, 2, n).double()
    return carried(range(8), total[:, None] * torch.tensor(shares).double(), total, sizes=[1, 2, 8][: len(shares)])


def test_curve_marks_and_words_are_those_of_the_result() -> None:
    axes = plot_carriers(found(0.3, 0.6, 0.8)).axes[0]
    curve = axes.lines[0]
    assert curve.get_xdata().tolist() == [1, 2, 8]  # type: ignore[union-attr]
    assert curve.get_ydata() == pytest.approx([0.3, 0.6, 0.8])
    marked = [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axes.lines
        if line.get_markersize() == 6 and line.get_marker() == "o"
    ]  # type: ignore[index, arg-type]
    assert marked == [(2.0, pytest.approx(0.6))]
    assert [text.get_text() for text in axes.texts] == ["50 %: 2 units", "90 %: not reached"]
    assert "of 8" in axes.get_xlabel()
    assert axes.get_title() == "12 test images"


def test_title_and_width_are_the_callers() -> None:
    figure = plot_carriers(found(0.6), width=300, title="pgd")
    assert figure.axes[0].get_title() == "pgd"
    assert figure.get_figwidth() == 3.0
    figure.canvas.draw()


def test_infinite_intervals_can_be_drawn() -> None:
    few = found(0.3, 0.6, 0.8)
    few.share_low, few.share_high = torch.full((3,), -torch.inf), torch.full((3,), torch.inf)
    figure = plot_carriers(few)
    figure.canvas.draw()
    low, high = figure.axes[0].get_ylim()
    assert 0 <= low + 0.5 <= high <= 2
