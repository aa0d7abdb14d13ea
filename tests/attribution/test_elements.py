"""Layers that return several tensors: which of them is the site is said, never guessed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ce_plugin import LayerCausalEffect
from ce_plugin.errors import ArgumentError, InputError
from ce_plugin.interventions import ZeroOut
from ce_plugin.networks.graph import HookPoint
from ce_plugin.networks.layers import hooked
from ce_plugin.sites import LayerSite


class Recurrent(nn.Module):
    """A classifier of sequences that reads a recurrent module's last state, or its outputs."""

    def __init__(self, kind: str, reads: str, layers: int = 1, batch_first: bool = True) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(4, 6, layers, batch_first=batch_first)
        self.head, self.kind, self.reads = nn.Linear(6, 3), kind, reads

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        output, state = self.rnn(x)
        if self.reads == "output":
            return self.head(output[:, -1] if self.rnn.batch_first else output[-1])
        h, c = state if self.kind == "LSTM" else (state, state)
        return self.head(h[-1] if self.reads == "h" else c[-1])


def sequences(n: int = 3) -> Tensor:
    return torch.rand(n, 5, 4, generator=torch.Generator().manual_seed(0))


def expected_effect(net: Recurrent, value: Tensor) -> Tensor:
    """Of each unit that is zeroed in what the head reads, (N, U, C)."""
    clean = net.head(value)
    each = [net.head(value * (torch.arange(6) != unit)) - clean for unit in range(6)]
    return torch.stack(each, 1).detach()


ELEMENTS = {"output": 0, "h": (1, 0), "c": (1, 1)}


@pytest.mark.parametrize("engine", ["auto", "full"])
@pytest.mark.parametrize("reads", ELEMENTS)
@pytest.mark.parametrize(("layers", "batch_first"), [(1, True), (2, True), (1, False)])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_states_of_recurrent_modules_are_sites(
    kind: str, layers: int, batch_first: bool, reads: str, engine: Any
) -> None:
    torch.manual_seed(1)
    net, x = Recurrent(kind, reads, layers, batch_first), sequences()
    element: Any = ELEMENTS[reads] if kind == "LSTM" or reads == "output" else 1
    site = LayerSite("rnn", element=element, channel_dim=2)
    found = LayerCausalEffect(net, site, ZeroOut(), outcome=None, engine=engine).estimate(x)
    output, state = net.rnn(x if batch_first else x.transpose(0, 1))
    h, c = state if kind == "LSTM" else (state, state)
    last = output[:, -1] if batch_first else output[-1]
    value = last if reads == "output" else h[-1] if reads == "h" else c[-1]
    assert torch.allclose(found.effect, expected_effect(net, value), atol=1e-5)


def test_a_layer_that_returns_several_tensors_is_asked_which() -> None:
    with pytest.raises(InputError, match=r"with tensors at \[0, \(1, 0\), \(1, 1\)\]. Say which: .*element=0"):
        LayerCausalEffect(Recurrent("LSTM", "h"), "rnn").estimate(sequences())
    with pytest.raises(InputError, match=r"with tensors at \[0, 1\]"):
        LayerCausalEffect(Recurrent("GRU", "h"), "rnn").estimate(sequences())
    site = LayerSite("rnn", element=(1, 2))
    with pytest.raises(InputError, match=r"one with a tensor at \(1, 2\), but got 'rnn'"):
        LayerCausalEffect(Recurrent("LSTM", "h"), site).estimate(sequences())
    # The one that another element carries on has no effect, and now that was asked for.
    unused = LayerCausalEffect(Recurrent("LSTM", "h"), LayerSite("rnn", element=0, channel_dim=2)).estimate(sequences())
    assert not unused.effect.any()


def test_one_tensor_at_any_depth_needs_no_name() -> None:
    class Wraps(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return None, [(x * 2,), "text"]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wraps, self.head = Wraps(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.wraps(x)[1][0][0])

    net, x = Net(), torch.rand(2, 4)
    wanted = LayerCausalEffect(net, LayerSite("head", at_input=True), outcome=None).estimate(x)
    for site in ("wraps", LayerSite("wraps", element=(1, 0, 0))):
        for engine in ("suffix", "full"):
            found = LayerCausalEffect(net, site, outcome=None, engine=engine).estimate(x)
            assert torch.allclose(found.effect, wanted.effect, atol=1e-6)


def test_a_state_that_goes_into_a_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.rnn, self.head = nn.Linear(4, 6), nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.start(x.mean(1))[None]
            return self.head(self.rnn(x, (h, torch.zeros_like(h)))[0][:, -1])

    net, x = Net(), sequences()
    wanted = LayerCausalEffect(net, "start", outcome=None).estimate(x)
    site = LayerSite("rnn", at_input=True, element=(1, 0), channel_dim=2)
    for engine in ("auto", "full"):
        found = LayerCausalEffect(net, site, outcome=None, engine=engine).estimate(x)
        assert torch.allclose(found.effect, wanted.effect, atol=1e-6)


@pytest.mark.parametrize("element", [-1, (), (0, -1), "a", 1.5, (0, "b")])
def test_elements_are_indices(element: Any) -> None:
    with pytest.raises(ArgumentError, match="`element` to be None, an index from 0, or a tuple of such"):
        LayerSite("rnn", element=element)


def test_the_container_keeps_its_class() -> None:
    class Returns(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.max(x, 1)

    module = Returns()
    with hooked(HookPoint(module, element=0), lambda value: value * 0, "max"):
        found = module(torch.rand(2, 3))
    assert isinstance(found, torch.return_types.max)
    assert not found.values.any()
