"""What a notebook shows, and what results are handed on as: pictures, names of classes, arrays, typed returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ce_plugin import CausalEffect, CausalEffectMap, CausalMediation, Estimate, LayerCausalEffect
from ce_plugin.designs import RandomRegions
from ce_plugin.detection.explanation import Alarm, UnusualEffect
from ce_plugin.effects import Mediation
from ce_plugin.errors import ArgumentError, InputError, TargetError, UnknownNameError
from ce_plugin.expected.answer import answered
from ce_plugin.expected.moments import moments_of
from ce_plugin.visualization import overlay
from ce_plugin.visualization.pictures import as_bytes

NAMES = ("cat", "dog", "owl")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 12 * 12, 3)).eval()


def pictures(n: int = 1) -> Tensor:
    return torch.rand(n, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def estimate() -> Estimate:
    explainer = CausalEffect(network(), design=RandomRegions(n_trials=60), class_names=NAMES)
    return explainer.estimate(pictures(2), answer=True)


def test_an_estimate_shows_picture_sentence_and_five_units(estimate: Estimate) -> None:
    shown = estimate._repr_html_()
    assert shown.count("data:image/png;base64,") == 2
    assert shown.count("<tr>") == 2 * 6
    assert "Covering the outlined" in shown
    assert f"“{NAMES[int(estimate.predicted[0])]}”" in shown  # type: ignore[index]
    assert "row " in shown
    many = estimate[[0, 1, 0, 1, 0]]._repr_html_()
    assert many.count("<img") == 3
    assert "and 2 more examples" in many


def test_an_estimate_without_a_class_to_speak_of_shows_its_text() -> None:
    found = Estimate(effect=torch.zeros(1, 2, 4), reference=torch.zeros(1, 4), class_shape=(2, 2))
    assert found._repr_html_().startswith("<pre>Estimate of outcome")


def test_names_of_classes_are_carried(estimate: Estimate, tmp_path: Path) -> None:
    assert estimate.class_names == NAMES
    frame = estimate.to_dataframe()
    assert frame.loc[:2, "class_name"].tolist() == list(NAMES)
    assert Estimate.load(estimate.save(tmp_path / "e.pt")).equals(estimate)
    one = LayerCausalEffect(network(), "1", class_names=NAMES).estimate(pictures(), target=2)
    assert one.to_dataframe()["class_name"].unique().tolist() == ["owl"]
    assert "“owl”" in one.summary()
    with pytest.raises(ArgumentError, match="`class_names` to be 3 names"):
        CausalEffect(network(), class_names=["a", "b"]).estimate(pictures())
    for wrong in ("cat", [1, 2, 3], 3):
        with pytest.raises(ArgumentError, match="`class_names` to be None or a name for each class"):
            CausalEffect(network(), class_names=wrong)  # type: ignore[arg-type]


def test_several_classes_stand_side_by_side_on_one_scale(estimate: Estimate) -> None:
    figure = estimate.plot(target=["owl", 0])
    left, right, scale = figure.axes
    assert [axes.get_title() for axes in (left, right)] == ["What supports “owl”", "What supports “cat”"]
    largest = estimate.smoothed_contribution[0, :, [2, 0]].abs().max()
    assert scale.get_ylim()[1] == pytest.approx(float(largest), rel=1e-5)
    assert "per cent points" in scale.get_ylabel()
    assert len(estimate.plot(target=0, colorbar=False).axes) == 1
    with pytest.raises(UnknownNameError, match="`target`"):
        estimate.plot(target="owls")
    with pytest.raises(TargetError, match="index below 3"):
        estimate.plot(target=[0, 3])


def test_plots_go_where_one_says(estimate: Estimate) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    first, second = figure.subplots(1, 2)
    assert estimate.plot(ax=first, cmap="PiYG", colorbar=False) is figure
    assert estimate.plot(ax=second, kind="bars", top=7) is figure
    assert len(first.images) == 2  # the picture and the map
    assert len(second.patches) == 7
    with pytest.raises(ArgumentError, match="`target` to be one class for one `ax`"):
        estimate.plot(ax=first, target=[0, 1])
    with pytest.raises(UnknownNameError, match="`cmap`"):
        estimate.plot(cmap="PiYGG")
    with pytest.raises(UnknownNameError, match="`outline`"):
        estimate.plot(outline="all")  # type: ignore[arg-type]


def test_outlined_is_what_was_tested_or_what_one_says(estimate: Estimate) -> None:
    def outlined(**options: Any) -> int:
        return len(estimate.plot(colorbar=False, **options).axes[0].collections)

    assert outlined() == outlined(outline="region") == 2
    assert outlined(outline="none") == 0


def test_an_estimate_is_an_array_and_a_dataset(estimate: Estimate) -> None:
    assert np.array_equal(np.asarray(estimate), estimate.effect.numpy())
    assert np.asarray(estimate, dtype=np.float64).dtype == np.float64
    pytest.importorskip("xarray")
    data = estimate.to_xarray()
    assert dict(data.sizes) == {"example": 2, "unit": 196, "class": 3}
    assert data.class_name.to_numpy().tolist() == list(NAMES)
    assert np.array_equal(data.effect.to_numpy(), estimate.effect.numpy())
    assert data.attrs["n_trials"] == 60


def test_figures_show_in_a_kernel_that_never_imported_pyplot() -> None:
    code = (
        "import sys, torch; from ce_plugin.visualization import overlay;"
        "figure = overlay(torch.eye(8), torch.rand(3, 8, 8), title='a map');"
        "print(figure._repr_html_()[:40])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith('<img width="300"')


def test_what_the_network_saw_is_kept_for_few_images_of_the_default_grid() -> None:
    explainer = CausalEffect(network(), design=RandomRegions(n_trials=40), normalization=(0.5, 0.25))
    x = (pictures() - 0.5) / 0.25
    kept = explainer.estimate(x).pictures
    assert kept is not None
    assert (kept.double() / 255 - pictures().double()).abs().max() < 1 / 255
    assert explainer.estimate(x.expand(17, -1, -1, -1)).pictures is None
    mask = torch.arange(28 * 28).reshape(28, 28) // 56
    assert CausalEffect(network()).estimate(pictures(), feature_mask=mask).pictures is None
    assert as_bytes(torch.tensor([[[[0.0, 255.0]]]])).flatten().tolist() == [0, 255]


def test_explainers_and_alarms_show_themselves() -> None:
    explainer = CausalEffect(network(), class_names=NAMES)
    assert repr(explainer) == "CausalEffect(network=Sequential, classes=3 with names, outcome=probability, seed=0)"
    assert "<th>network</th><td>Sequential</td>" in explainer._repr_html_()
    effect = UnusualEffect("<b> blur", -0.5, 0.1, -6.0)
    options: dict[str, Any] = {"deviations": {}, "effects": (effect,), "turned_to": 3, "intervention": "median"}
    shown = Alarm(**options, channels={}, regions=torch.rand(8, 8))._repr_html_()
    assert "&lt;b&gt; blur: -0.5" in shown
    assert "<img" in shown
    assert "<img" not in Alarm(**options, channels={}, regions=None)._repr_html_()


def test_a_map_shows_itself_over_its_picture() -> None:
    explainer = CausalEffectMap(network(), "1", class_names=NAMES)
    assert "<caption>CausalEffectMap</caption>" in explainer._repr_html_()
    assert "weighting=change" in repr(explainer)
    found = explainer.attribute(pictures(2))
    figure = CausalEffectMap.plot(found, pictures(2)[1], example=1, title="CEM")
    drawn = figure.axes[0].images[-1]
    assert drawn.get_array().shape[:2] == (28, 28)
    assert figure._repr_html_().startswith('<img width="480" alt=""')  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"`found` to be maps of pictures, \(N, 1, h, w\), but got \(28, 28\)"):
        CausalEffectMap.plot(torch.rand(28, 28), pictures()[0])
    with pytest.raises(ArgumentError, match="`example` to be below 2"):
        CausalEffectMap.plot(found, pictures()[0], example=2)


def test_a_mediation_shows_who_carries_the_most() -> None:
    x = pictures(5)
    found = CausalMediation(network(), "1", x + 0.5, class_names=NAMES).estimate(x)
    shown = found._repr_html_()
    assert shown.count("<table>") == 3
    assert "and 2 more examples" in shown
    totals, indirect, _ = found.column()
    unit = int((indirect[0] / totals[0]).argmax())
    assert f"<td>{unit}</td><td>{float(indirect[0, unit]):+.3g}</td>" in shown
    assert f"({float(totals[0]):+.3g})" in shown
    assert f"“{NAMES[int(found.predicted[0])]}”" in shown  # type: ignore[index]
    assert "by construction" in shown
    assert found.class_names == NAMES


def test_a_mediation_without_effect_or_class() -> None:
    nothing = torch.zeros(1, 2, 1)
    found = Mediation(total=torch.zeros(1, 1), indirect=nothing, direct=nothing, target=torch.tensor([3]))
    assert "The intervention changes the outcome of class 3 by +0." in found._repr_html_()
    assert "%" not in found._repr_html_()
    wide = torch.zeros(1, 2, 4)
    assert Mediation(total=wide[:, 0], indirect=wide, direct=wide)._repr_html_().startswith("<pre>Mediation")


def test_expected_effects_show_themselves_under_each_evidence() -> None:
    effects = torch.randn(9, 4, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    names = ["clean", "<pwm>", "fgsm", "pgd"]
    found = answered(moments_of(effects, extras=0), names, [7, 8], outcome="log_odds", unit_labels=["a", "b", "c"])
    shown = found._repr_html_()
    assert shown.count("<img") == shown.count("<table>") == 3
    assert "Mean of 9 images, evidence: &lt;pwm&gt;" in shown
    assert "and 1 more evidence" in shown
    unit, column = divmod(int(found.effect[0].abs().argmax()), 2)
    first = f"<td>{'abc'[unit]}</td><td>class {7 + column}</td><td>{float(found.effect[0, unit, column]):+.3g}</td>"
    assert first in shown
    alone = answered(moments_of(effects[:1], extras=0), names, ["explained", 8])
    assert "interval" not in alone._repr_html_()


@pytest.mark.parametrize("kind", [CausalEffect, LayerCausalEffect, CausalEffectMap])
def test_returns_have_types_and_captums_wrapper_stays(kind: Any) -> None:
    # NoiseTunnel calls the wrapped function.
    assert kind.attribute.__wrapped__ is not kind.attribute
    assert kind.attribute.__wrapped__.__annotations__["return"] in ("Tensor", "Inputs")
    if kind is not CausalEffectMap:
        assert kind.estimate.__annotations__["return"] == "Estimate"


def test_a_colour_map_of_ones_own_keeps_the_common_scale() -> None:
    strong = overlay(torch.full((4, 4), 1.0), torch.full((1, 4, 4), 0.5), scale=1.0, cmap="coolwarm").axes[0].images[-1]
    weak = overlay(torch.full((4, 4), 0.5), torch.full((1, 4, 4), 0.5), scale=1.0, cmap="coolwarm").axes[0].images[-1]
    assert strong.cmap(1.0) != weak.cmap(1.0)
