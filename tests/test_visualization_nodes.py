"""Bars of nodes and sheets of pictures show what they were given, where they were told to."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ce_plugin.errors import ArgumentError, InputError
from ce_plugin.visualization import plot_nodes, sheet, spotlight


def test_bars_keep_order_and_values_of_both_series() -> None:
    values = {"clean": [0.5, -0.4, 0.1], "pgd": [0.2, -0.6, 0.0]}
    figure = plot_nodes(["7", "3", "9"], values, shares=(["3", "1"], [0.5, 0.25]), title="t")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["7", "3", "9"]
    assert [bar.get_width() for bar in left.patches] == pytest.approx([*values["clean"], *values["pgd"]])
    assert left.patches[0].get_facecolor() != left.patches[1].get_facecolor()  # for and against
    assert left.patches[3].get_facecolor()[3] == 0.0  # the second series is an outline
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["clean", "pgd"]
    assert [bar.get_width() for bar in right.patches] == pytest.approx([50, 25])


@pytest.mark.parametrize(
    ("labels", "series", "shares", "message"),
    [
        ([], {"clean": []}, None, r"`labels` to be the name of one node or more"),
        (["1"], {"clean": [1.0, 2.0]}, None, r"`series` to be one or two lists of 1 numbers"),
        (["1"], {}, None, r"`series` to be one or two lists"),
        (["1"], {"clean": [1.0]}, (["1"], []), r"`shares` to be as many numbers as names"),
    ],
)
def test_bars_refuse(labels: list[str], series: dict[str, list[float]], shares: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        plot_nodes(labels, series, shares=shares)  # type: ignore[arg-type]


def test_a_sheet_has_each_picture_in_its_place() -> None:
    red, blue = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    red[0], blue[2] = 1.0, 1.0
    buffer = io.BytesIO()
    sheet([[("red", red), ("blue", blue)], [("blue", blue), ("red", red)]], width=100).savefig(buffer)
    pixels = np.asarray(Image.open(buffer).convert("RGB"))
    assert pixels.shape == (260, 200, 3)
    places = {(80, 50): 0, (80, 150): 2, (210, 50): 2, (210, 150): 0}
    for (row, column), channel in places.items():
        assert pixels[row, column].argmax() == channel
        assert pixels[row, column].tolist().count(0) == 2


def test_a_sheet_takes_figures_too() -> None:
    inner = plot_nodes(["1"], {"clean": [1.0]})
    assert sheet([[("bars", inner)]], note="below").get_size_inches().tolist() == pytest.approx([3.0, 3.6])


def test_sheets_refuse() -> None:
    picture = torch.zeros(3, 4, 4)
    with pytest.raises(ArgumentError, match=r"rows of equal length, but got \[1, 2\]"):
        sheet([[("a", picture)], [("b", picture), ("c", picture)]])
    with pytest.raises(ArgumentError, match=r"one or more rows"):
        sheet([])
    with pytest.raises(InputError, match=r"`rows` to be of shape \(1 or 3, H, W\)"):
        sheet([[("a", torch.zeros(4, 4))]])


def test_a_spotlight_leaves_its_region_and_darkens_the_rest() -> None:
    image = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))
    shown = spotlight(image, (5, 6, 12, 15))
    assert torch.equal(shown[:, 6:15, 5:12], image[:, 6:15, 5:12])
    assert torch.equal(shown[:, 5, 5:12], torch.ones(3, 7))  # the white line
    assert torch.allclose(shown[:, :5], image[:, :5] / 2)
    assert torch.equal(spotlight(image, (0, 0, 20, 20)), image)
    for box in ((5, 5, 5, 9), (0, 0, 21, 20), (-1, 0, 3, 3)):
        with pytest.raises(InputError, match=r"`box` to be a region inside"):
            spotlight(image, box)
