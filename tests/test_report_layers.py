"""The report's layer: effect maps and carriers of a network whose numbers are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ce_plugin import CausalMediation
from ce_plugin.designs import OneAtATime
from ce_plugin.interventions import PixelMask
from ce_plugin.models import Framing, VisionModel
from ce_plugin.report import LayerCase, LayerStudy, Plan, Study, build_manifest, carried_by, render, study


class Corners(nn.Module):
    """Class c adds up corner c of three channels, which a convolution weighs 1 : 2 : 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0]))[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        parts = [x[..., :4, :4], x[..., :4, 4:], x[..., 4:, :4], x[..., 4:, 4:]]
        return torch.stack([part.mean((1, 2, 3)) for part in parts], dim=1) * 4


class Twice(nn.Module):
    """One convolution, passed through twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x)).mean((2, 3))


@pytest.fixture
def net() -> VisionModel:
    return VisionModel(Corners(), "corners", Framing(8))


@pytest.fixture
def photograph() -> Tensor:
    inputs = torch.full((1, 3, 8, 8), 0.5)
    inputs[:, :, :4, 4:] = 0.9
    return inputs


def _plan(**changes: object) -> Plan:
    options: dict[str, object] = {"attacks": ("fgsm",), "intervention": PixelMask("zero"), "design": OneAtATime()}
    options |= {"cells": 2, "outcome": "logit", "eps": 0.3}
    return Plan(**{**options, **changes})  # type: ignore[arg-type]


def _page(found: Study, net: VisionModel, plan: Plan) -> str:
    manifest = build_manifest(arguments={}, command=["ce-plugin"], seed=0, inputs={}, model=net.model)
    return render([found], model="m", plan=plan, experiment="e", manifest=manifest)


def test_the_effect_map_is_the_closed_form(net: VisionModel, photograph: Tensor) -> None:
    layer = study(net, photograph, "p", _plan(attacks=())).layer
    assert layer is not None
    assert layer.name == "conv"
    # Each channel contributes 4 w_u 0.9 / 3 to the logit, spread in proportion to the picture: all channels alike.
    expected = 4 * (1 + 2 + 3) * 0.9 / 3 * photograph[0, 0] / photograph[0, 0].sum()
    assert torch.allclose(layer.cases[0].effect_map.float(), expected, atol=1e-5)
    assert layer.cases[0].carried is None


def test_carriers_are_the_closed_form(net: VisionModel, photograph: Tensor) -> None:
    layer = study(net, photograph, "p", _plan()).layer
    assert layer is not None
    carried = layer.cases[1].carried
    assert carried is not None
    # What follows is linear: a channel carries its weight's share of the effect, 3, 2 and 1 sixths.
    assert carried.total == pytest.approx(-4 * 6 * 0.3 / 3, abs=1e-4)
    assert carried.order == (2, 1, 0)
    assert [carried.share(u) for u in carried.order] == pytest.approx([3 / 6, 2 / 6, 1 / 6], abs=1e-4)
    assert float(carried.indirect.sum()) == pytest.approx(carried.total, abs=1e-4)
    assert carried.needed[0.9] == 3
    assert carried.cut
    assert layer.cases[1].carried_map is not None
    # The map sums to the contributions, minus the effects.
    assert float(layer.cases[1].carried_map.sum()) == pytest.approx(-carried.total, abs=1e-3)


@pytest.mark.parametrize(("level", "needed"), [(0.4, 1), (0.6, 2), (0.8, 2), (0.9, 3)])
def test_how_many_channels_are_needed(net: VisionModel, photograph: Tensor, level: float, needed: int) -> None:
    mediation = CausalMediation(net.model, "conv", photograph * 0.5)
    assert carried_by(mediation, photograph, 1, levels=(level,)).needed == {level: needed}


def test_an_attack_without_effect_has_no_carriers(net: VisionModel, photograph: Tensor) -> None:
    carried = carried_by(CausalMediation(net.model, "conv", photograph.clone()), photograph, 1)
    assert (carried.total, carried.order, carried.needed) == (0.0, (), {0.5: None, 0.9: None})


def test_the_page_shows_the_layer_and_says_what_one_image_is_worth(net: VisionModel, photograph: Tensor) -> None:
    plan = _plan(attacks=("fgsm", "bim"))
    text = " ".join(_page(study(net, photograph, "p", plan), net, plan).split())
    for words in (
        "Inside the network: layer <code>conv</code>",
        "Nodes that carry the attack",
        "Rank correlation with the clean map",
        "channel 2",
        "chosen and tested on this same image and are therefore optimistic",
        "all its 3 channels together carry 100 % by construction",
    ):
        assert words in text


def test_a_layer_that_cannot_be_looked_at_leaves_the_rest_of_the_report(photograph: Tensor) -> None:
    net = VisionModel(Twice(), framing=Framing(8))
    plan = _plan()
    found = study(net, photograph, "p", plan)
    assert found.layer is not None
    assert found.layer.cases == ()
    assert "passed through 2 times" in found.layer.note
    assert len(found.cases) == 2
    text = _page(found, net, plan)
    assert "This layer cannot be looked at." in text
    assert "Nodes that carry the attack" not in text


def test_findings_are_numbers_that_json_knows(net: VisionModel, photograph: Tensor) -> None:
    found = study(net, photograph, "p", _plan())
    numbers = json.loads(json.dumps(found.record(), allow_nan=False))
    assert numbers["evidence"]["FGSM"]["answer_changed"] is (found.cases[1].success)
    carried = numbers["layer"]["evidence"]["FGSM"]["carried"]
    assert [one["channel"] for one in carried["channels"]] == ["2", "1", "0"]
    constant = LayerCase(found.cases[0], torch.zeros(8, 8), {"Grad-CAM": math.nan})
    undefined = replace(found, found={"evidence": found.cases[:1], "layer": LayerStudy("conv", (constant,))})
    shown = undefined.record()["layer"]["evidence"]["Clean"]["rank_correlation_with_clean"]
    assert shown == {"Grad-CAM": None}
