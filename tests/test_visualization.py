"""Pictures say what the numbers say: colours, outlines, factors; and matplotlib's state is left alone."""

from __future__ import annotations

import base64
import io

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ce_plugin.effects import Estimate, plot_estimate
from ce_plugin.errors import ArgumentError, InputError, TargetError, UnitError
from ce_plugin.visualization import contribution_colors, data_uri, magnify, outlines, overlay


def _pixels(figure: object) -> np.ndarray:
    """The figure as (H, W, 3) in [0, 1]."""
    uri = figure if isinstance(figure, str) else data_uri(figure)  # type: ignore[arg-type]
    raw = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"), dtype=float) / 255


def _gray(size: int = 8) -> Tensor:
    return torch.full((3, size, size), 0.5)


def test_support_is_orange_opposition_blue_and_zero_shows_the_photograph() -> None:
    attribution = torch.zeros(8, 8)
    attribution[:, :2], attribution[:, 6:] = 1.0, -1.0
    shown = _pixels(overlay(attribution, _gray()))
    left, middle, right = shown[150, 30], shown[150, 150], shown[150, 270]
    assert left[0] > left[2] + 0.4
    assert right[2] > right[0] + 0.4
    assert np.ptp(middle) < 0.03  # gray: no colour at zero


def test_a_common_scale_makes_maps_comparable() -> None:
    weak, strong = torch.full((8, 8), 0.5), torch.full((8, 8), 1.0)
    strength = [np.ptp(_pixels(overlay(m, _gray(), scale=s))[150, 150]) for m, s in ((weak, 1.0), (strong, 1.0))]
    alone = np.ptp(_pixels(overlay(weak, _gray()))[150, 150])
    assert strength[0] < 0.8 * strength[1]
    assert alone == pytest.approx(strength[1], abs=0.02)
    # What exceeds the scale gets its full colour, no more.
    beyond = np.ptp(_pixels(overlay(3 * strong, _gray(), scale=1.0))[150, 150])
    assert beyond == pytest.approx(strength[1], abs=0.02)


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-12, 1e12), st.integers(0, 10_000))
def test_maps_do_not_depend_on_the_unit_of_measurement(factor: float, seed: int) -> None:
    attribution = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).double()
    once, again = (_pixels(overlay(m, _gray(4), width=60)) for m in (attribution, attribution * factor))
    assert np.abs(once - again).max() < 0.03


def test_a_map_of_zeros_is_the_photograph_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    shown = _pixels(overlay(torch.zeros(8, 8), _gray()))
    assert np.ptp(shown) < 0.02
    assert not recwarn.list


def test_dull_photographs_keep_their_contrast() -> None:
    # Captum would stretch it to black and white.
    dull = torch.full((3, 8, 8), 0.5)
    dull[:, :4] = 0.52
    attribution = torch.zeros(8, 8)
    attribution[0, 0] = 1.0
    shown = _pixels(overlay(attribution, dull))
    assert abs(shown[200, 250, 0] - shown[100, 250, 0]) < 0.1


def test_positive_maps_leave_out_what_is_negative() -> None:
    attribution = torch.full((8, 8), -1.0)
    assert np.ptp(_pixels(overlay(attribution, _gray(), sign="positive"))) < 0.02


def test_significant_units_are_outlined_where_they_are() -> None:
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[2:4, 2:6] = True
    with_lines = _pixels(overlay(torch.zeros(8, 8), _gray(), significant=region, width=400))
    without = _pixels(overlay(torch.zeros(8, 8), _gray(), width=400))
    changed = np.abs(with_lines - without).max(axis=2) > 0.15
    rows, columns = np.nonzero(changed)
    assert abs(rows.min() - 100) <= 3
    assert abs(rows.max() - 200) <= 3
    assert abs(columns.min() - 100) <= 3
    assert abs(columns.max() - 300) <= 3
    assert not changed[120:180, 120:280].any()


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_outlines_separate_true_from_false(height: int, width: int, data: st.DataObject) -> None:
    cells = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    region = torch.tensor(cells).reshape(height, width)
    drawn = set()
    for (x0, y0), (x1, y1) in outlines(region).tolist():
        assert x0 == x1 or y0 == y1
        for step in range(round(abs(x1 - x0) + abs(y1 - y0))):
            if y0 == y1:
                drawn.add(("h", round(min(x0, x1) + 0.5) + step, round(y0 + 0.5)))
            else:
                drawn.add(("v", round(x0 + 0.5), round(min(y0, y1) + 0.5) + step))
    padded = torch.nn.functional.pad(region, (1, 1, 1, 1))
    borders = {("h", c, r) for r in range(height + 1) for c in range(width) if padded[r, c + 1] != padded[r + 1, c + 1]}
    borders |= {
        ("v", c, r) for r in range(height) for c in range(width + 1) if padded[r + 1, c] != padded[r + 1, c + 1]
    }
    assert drawn == borders


@given(st.floats(1e-4, 1.0))
def test_magnified_perturbations_are_undone_by_their_factor(size: float) -> None:
    change = torch.tensor([[[size, -size, 0.0]]])
    shown, factor = magnify(change)
    assert factor == 0.5 or factor == int(factor)
    assert torch.allclose((shown - 0.5) / factor, change, atol=1e-5)


def test_no_change_is_gray() -> None:
    shown, factor = magnify(torch.zeros(3, 2, 2))
    assert factor == 1.0
    assert (shown == 0.5).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_survive_their_way_into_a_page(channels: int) -> None:
    levels = torch.arange(0, 256, 4).reshape(1, 8, 8).expand(channels, 8, 8) / 255
    uri = data_uri(levels)
    tolerance = 1e-6 if "png" in uri[:20] else 0.03
    assert np.abs(_pixels(uri)[:, :, 0] - levels[0].numpy()).max() <= tolerance


def test_the_colours_are_clear_at_zero_and_strongest_at_the_ends() -> None:
    colors = contribution_colors()
    assert colors(0.5)[3] == 0.0
    assert colors(0.0)[3] == colors(1.0)[3] > 0.8
    assert contribution_colors(0.5)(1.0)[3] < colors(1.0)[3]


def test_pyplot_and_its_backend_are_left_alone() -> None:
    from matplotlib import pyplot

    before, figures = mpl.rcParams["backend"], pyplot.get_fignums()
    overlay(torch.eye(4), _gray(4), title="title")
    plot_estimate(_estimate())
    assert mpl.rcParams["backend"] == before
    assert pyplot.get_fignums() == figures


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (torch.zeros(4, 5), torch.zeros(3, 8, 8)),
            {},
            InputError,
            r"`attribution` to be of the image's size \(8, 8\)",
        ),
        ((torch.zeros(1, 1, 8, 8), torch.zeros(3, 8, 8)), {}, InputError, r"of shape \(H, W\) or \(C, H, W\)"),
        ((torch.full((8, 8), torch.nan), torch.zeros(3, 8, 8)), {}, InputError, r"finite"),
        ((torch.zeros(8, 8), torch.zeros(2, 8, 8)), {}, InputError, r"`image` to be of shape \(1 or 3, H, W\)"),
        ((torch.zeros(8, 8), torch.zeros(3, 8, 8)), {"scale": 0.0}, ArgumentError, r"`scale` to be None or a positive"),
        ((torch.zeros(8, 8), torch.zeros(3, 8, 8)), {"sign": "negative"}, ArgumentError, r"`sign` to be 'all' or"),
        (
            (torch.zeros(8, 8), torch.zeros(3, 8, 8)),
            {"significant": torch.ones(4, 4, dtype=torch.bool)},
            InputError,
            r"`significant` to be of the map's size \(8, 8\), but got \(4, 4\)",
        ),
    ],
)
def test_overlay_refuses(
    arguments: tuple[Tensor, Tensor], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        overlay(*arguments, **options)  # type: ignore[arg-type]


def _estimate(**changes: object) -> Estimate:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, object] = {
        "effect": torch.randn(2, 16, 3, generator=generator),
        "std_error": torch.full((2, 16, 3), 0.4),
        "reference": torch.rand(2, 3, generator=generator),
        "class_shape": (3,),
        "predicted": torch.tensor([1, 2]),
        "outcome": "logit",
    }
    return Estimate(**{**options, **changes})  # type: ignore[arg-type]


def test_bars_show_the_largest_contributions_first_with_their_intervals() -> None:
    estimate = _estimate()
    axes = plot_estimate(estimate, example=1, top=5).axes[0]
    contribution = estimate.contribution[1, :, 2]
    order = contribution.abs().argsort(descending=True)[:5]
    bars = [patch.get_width() for patch in axes.patches]
    assert bars == pytest.approx(contribution[order].tolist())
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(int(unit)) for unit in order]
    half = estimate.half_width(0.95)[1, order, 2].tolist()
    drawn = [container.lines[2][0].get_segments()[0] for container in axes.containers if hasattr(container, "lines")]
    assert [(segment[1, 0] - segment[0, 0]) / 2 for segment in drawn] == pytest.approx(half)
    filled = [patch.get_facecolor()[3] == 1.0 for patch in axes.patches]
    assert filled == estimate.significant()[1, order, 2].tolist()


def test_exact_estimates_have_bars_without_intervals() -> None:
    axes = plot_estimate(_estimate(std_error=None)).axes[0]
    assert all(patch.get_facecolor()[3] == 1.0 for patch in axes.patches)
    assert "significant" not in axes.get_xlabel()


def test_estimate_over_its_image_is_the_overlay_of_its_contributions() -> None:
    estimate = _estimate()
    image = torch.rand(3, 4, 4)
    axes = estimate.plot(image, target=0, title="t").axes[0]
    plane = estimate.contribution[0, :, 0].reshape(4, 4)
    region = estimate.significant()[0, :, 0].reshape(4, 4)
    wanted = overlay(plane, image, significant=region, width=480).axes[0]
    assert [image.get_array().tolist() for image in axes.images] == [one.get_array().tolist() for one in wanted.images]
    drawn, lines = ([path.vertices.tolist() for path in one.collections[0].get_paths()] for one in (axes, wanted))
    assert drawn == lines
    assert axes.get_title() == "t"


def test_estimate_with_a_mask_of_its_own() -> None:
    mask = torch.arange(4).repeat_interleave(2).expand(1, 1, 8, 8)
    estimate = _estimate(effect=torch.randn(1, 4, 1), std_error=None, reference=torch.rand(1, 1), class_shape=(1,))
    plot_estimate(estimate, torch.rand(3, 8, 8), feature_mask=mask)
    with pytest.raises(UnitError, match=r"with the 4 units of the estimate, but got 64.*feature_mask"):
        plot_estimate(estimate, torch.rand(3, 8, 8))


def test_plot_refuses() -> None:
    with pytest.raises(ArgumentError, match=r"`example` to be below 2"):
        plot_estimate(_estimate(), example=2)
    with pytest.raises(ArgumentError, match=r"`top` to be at least 1"):
        plot_estimate(_estimate(), top=0)
    with pytest.raises(TargetError, match=r"a class index below 3, but got 3"):
        plot_estimate(_estimate(), target=3)
    with pytest.raises(TargetError, match=r"a class index below 3, but got None"):
        plot_estimate(_estimate(predicted=None))
    one = _estimate(
        effect=torch.zeros(1, 2, 1),
        std_error=None,
        reference=torch.rand(1, 1),
        target=torch.tensor([5]),
        predicted=None,
    )
    with pytest.raises(TargetError, match=r"`target` to be 5, but got 3"):
        plot_estimate(one, target=3)
