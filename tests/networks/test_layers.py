"""A layer that cannot be used is refused with our own words, whichever call names it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ce_plugin import CausalEffect, CausalEffectMap, LayerCausalEffect
from ce_plugin.designs import OneAtATime
from ce_plugin.errors import ModelError, UnknownNameError
from ce_plugin.interventions import PixelMask
from ce_plugin.networks import find_layer, inserted, last_conv_layer, read_layer

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()


def scripted(how: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Any = torch.jit.trace(plain(), X) if how == "traced" else torch.jit.script(plain())
        if how == "frozen":
            found = torch.jit.freeze(found)
        return nn.Sequential(nn.Identity(), found) if how == "inside" else found


def replaced(net: nn.Module, layer: Any) -> None:
    with inserted(net, layer, nn.Identity()):
        net(X)


CALLS: dict[str, Callable[[nn.Module, Any], object]] = {
    "effect": lambda net, layer: LayerCausalEffect(net, layer).estimate(X),
    "input of a layer": lambda net, layer: LayerCausalEffect(net, layer).estimate(X, attribute_to_layer_input=True),
    "full": lambda net, layer: LayerCausalEffect(net, layer, engine="full").estimate(X),
    "cost": lambda net, layer: LayerCausalEffect(net, layer).estimate_cost(X),
    "map": lambda net, layer: CausalEffectMap(net, layer).attribute(X),
    "read": lambda net, layer: read_layer(net, layer, X),
    "replace": replaced,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("how", ["scripted", "traced", "frozen", "inside"])
def test_layers_of_torchscript_take_no_hooks(how: str, call: Callable[[nn.Module, Any], object]) -> None:
    net = scripted(how)
    layer = "1.0" if how == "inside" else "1"
    with pytest.raises(ModelError, match=r"`layer` .*TorchScript.*before `torch\.jit`"):
        call(net, layer)
    if how != "frozen":
        with pytest.raises(ModelError, match=r"`layer` .*a module of TorchScript"):
            call(net, dict(net.named_modules())[layer])


@pytest.mark.parametrize("how", ["scripted", "traced", "frozen", "inside"])
def test_what_the_hint_says_works(how: str) -> None:
    mask = (torch.arange(8) // 4)[None, :].expand(8, 8)
    design = (PixelMask("zero"), OneAtATime())
    found = CausalEffect(scripted(how), *design, outcome=None).attribute(X, target=0, feature_mask=mask)
    wanted = CausalEffect(plain(), *design, outcome=None).attribute(X, target=0, feature_mask=mask)
    torch.testing.assert_close(found, wanted)
    LayerCausalEffect(plain(), "1").estimate(X)
    assert last_conv_layer(scripted(how), X) is None


def test_beside_a_scripted_part_layers_are_found() -> None:
    net = scripted("inside")
    assert find_layer(net, "0")[0] == "0"
    with pytest.raises(UnknownNameError, match=r"'1\.3', but got 'nosuch'"):
        find_layer(net, "nosuch")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_network_that_is_one_layer(call: Callable[[nn.Module, Any], object]) -> None:
    net = nn.Conv2d(3, 2, 8)
    with pytest.raises(ModelError, match=r"'1' of one Conv2d\. .*Sequential\(network\)"):
        call(net, "1")
    call(nn.Sequential(net, nn.Flatten()), "0")
