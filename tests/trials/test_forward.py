"""One way to call whatever is explained."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, ModelError
from ce_plugin.networks.forward import Forward, learned


def test_heads() -> None:
    x = torch.ones(2, 3)
    one = Forward(lambda v: v + 1)((x,))
    assert list(one) == [""]
    assert torch.equal(one[""], x + 1)
    two = Forward(lambda v: {"a": v, "b": 2 * v, "text": "not a head", "none": None})((x,))
    assert list(two) == ["a", "b"]
    assert list(Forward(lambda v: {"only": v, "n": 3})((x,))) == [""]
    assert list(Forward(lambda v: {"a": v, "b": v}, output=["b"])((x,))) == ["b"]
    assert torch.equal(Forward(lambda v: [v, 2 * v], output=-1)((x,))[""], 2 * x)


def test_numbers_become_tensors() -> None:
    assert Forward(lambda v: 2)((torch.ones(1),))[""].tolist() == 2.0
    assert Forward(lambda v: float(v.sum()))((torch.ones(3),))[""].dtype == torch.float32


@pytest.mark.parametrize("returned", ["text", None, [1.0], (torch.ones(1),), {"a": "text"}, {}, object()])
def test_what_cannot_be_explained(returned: Any) -> None:
    with pytest.raises(ModelError, match=r"a tensor or a dict of tensors, but got"):
        Forward(lambda v: returned)((torch.ones(1),))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("b", r"a part of what the model returns \(\['a'\]\), but got 'b'"),
        (["a", "b"], "but got 'b'"),
        (3, "but got 3"),
    ],
)
def test_parts_that_are_not_there(output: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Forward(lambda v: {"a": v}, output=output)((torch.ones(1),))
    with pytest.raises(ModelError, match="but got 'a'"):
        Forward(lambda v: (v, v), output="a")((torch.ones(1),))


@pytest.mark.parametrize("output", [1.5, [], ["a", 3], object()])
def test_selectors(output: Any) -> None:
    with pytest.raises(ArgumentError, match="argument `output` to be None, a key, an index, a callable, or a list"):
        Forward(lambda v: v, output=output)


def test_modules_are_found_behind_functions() -> None:
    net = nn.Linear(2, 2)

    class Holder:
        def __init__(self) -> None:
            self.net = net

        def __call__(self, x: Tensor) -> Tensor:
            return self.net(x)

        def method(self, x: Tensor) -> Tensor:
            return self.net(x)

    for function in (net, net.forward, lambda x: net(x), functools.partial(net), Holder(), Holder().method):
        assert Forward(function).modules == [net]


def test_what_is_learned_belongs_to_the_module_itself() -> None:
    net = nn.Linear(2, 2)
    first, second = Forward(net), Forward(net, output=0)
    first.learned["key"] = 1
    assert second.learned is first.learned is learned(net)
    for other in (Forward(lambda x: net(x)), Forward(net, output=lambda out: out), Forward(nn.Linear(2, 2))):
        assert other.learned == {}


def test_what_is_learned_goes_with_the_module() -> None:
    net = nn.Linear(2, 2)
    gone = weakref.ref(net)
    learned(net)["key"] = 1
    key = id(net)
    del net
    gc.collect()
    assert gone() is None
    from ce_plugin.networks import forward

    assert key not in forward._LEARNED
