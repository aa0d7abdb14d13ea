"""Pairwise interactions at the input and at a layer: exhaustive, screened, planted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.designs import Joint, OneAtATime
from ce_plugin.errors import UnitError
from ce_plugin.interventions import PixelMask, ZeroOut


class Pair(nn.Module):
    """200 channels; 17 and 142 do nothing alone: -2 when both are taken away, through a product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 200, 1, bias=False)
        nn.init.ones_(self.layer.weight)
        self.register_buffer("weight", torch.linspace(-1, 1, 200))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).mean((2, 3))
        weight = self.weight.clone()
        weight[[17, 142]] = 0
        return ((h * weight).sum(1) - 2 * (1 - h[:, 17]) * (1 - h[:, 142]))[:, None]


@pytest.mark.parametrize("engine", ["auto", "full"])
def test_a_planted_interaction_of_200_channels_is_found(engine: Any) -> None:
    net = Pair().double().eval()
    x = torch.ones(2, 1, 3, 3, dtype=torch.float64)
    explainer = LayerCausalEffect(net, "layer", outcome=None, engine=engine)
    for found in explainer.interactions(x):
        assert found.screened
        assert found.pairs[0].tolist() == [17, 142]
        assert abs(found.interaction[0, 0].item() + 2) < 1e-9
        assert found.single[[17, 142]].abs().max() < 1e-9


def test_exhaustive_interactions_are_those_of_joint_trials() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x = torch.randn(2, 6, dtype=torch.float64)
    found = CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome="probability").interactions(x, target=1)
    joint = CausalEffect(net, PixelMask("zero"), Joint.pairs(range(6))).estimate(x, target=1)
    for i in range(2):
        assert not found[i].screened
        places = {tuple(pair): k for k, pair in enumerate(found[i].pairs.tolist())}
        for k, pair in enumerate(itertools.combinations(range(6), 2)):
            wanted = joint.interaction[i, 6 + k, 0]
            torch.testing.assert_close(found[i].interaction[places[pair], 0], wanted)


def test_units_must_have_one_value_and_not_overlap() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(UnitError, match="single value"):
        CausalEffect(net, PixelMask((0.0, 1.0)), OneAtATime()).interactions(torch.rand(1, 1, 4, 4))
    assert LayerCausalEffect(net, "0", ZeroOut()).interactions(torch.rand(1, 1, 4, 4))[0].single.shape == (16, 1)
