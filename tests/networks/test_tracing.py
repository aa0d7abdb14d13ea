"""Recording a network's operations touches neither the network nor what anyone else can see."""

from __future__ import annotations

import math
import pickle
import threading
from math import sqrt
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.designs import OneAtATime
from ce_plugin.interventions import PixelMask
from ce_plugin.networks.graph import HookPoint, Suffix, Untraceable


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 4),
    ).eval()  # fmt: skip


class State:
    def __init__(self) -> None:
        self.last: Any = None
        self.seen: list[Any] = []


class Writes(nn.Module):
    """Writes what it computes wherever a module can write."""

    shared: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.feature: Any = None
        self.cache: dict[str, Any] = {}
        self.seen: list[Any] = []
        self.nested: dict[str, Any] = {"deep": [[]]}
        self.state, self.namespace = State(), SimpleNamespace(last=None)
        self.layers = [self.first, self.second]
        self.step = self.second_step
        self.register_buffer("counter", torch.zeros(()))

    def second_step(self, x: Tensor) -> Tensor:
        self.by_method = x
        return self.second(x)

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.first.weight.sum(0)
        self.feature = self.layers[0](x) + self.cache["bias"]
        self.seen.append(self.feature)
        self.nested["deep"][0].append(self.feature)
        self.state.last, self.namespace.last = self.feature, self.feature
        self.state.seen.append(x)
        type(self).shared["last"] = self.feature
        self.shared["again"] = x
        self.head.given = self.feature
        return self.head(self.step(self.state.last / sqrt(self.feature.shape[1]) / math.sqrt(x.shape[1])))


def holds_proxies(value: Any, depth: int = 6) -> bool:
    if isinstance(value, fx.Proxy):
        return True
    parts = list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list) else []
    parts += list(vars(value).values()) if isinstance(value, (nn.Module, State, SimpleNamespace)) else []
    return depth > 0 and any(holds_proxies(part, depth - 1) for part in parts)


@pytest.mark.parametrize("layer", [None, "first", "second", "head"])
def test_nothing_that_a_forward_pass_writes_reaches_the_network(layer: str | None) -> None:
    network, x = Writes().eval(), torch.randn(3, 4)
    Writes.shared.clear()
    before = pickle.dumps(network)
    suffix = Suffix(network, HookPoint(None if layer is None else network.get_submodule(layer)))
    assert pickle.dumps(network) == before
    assert Writes.shared == {}
    captured = suffix.capture((x,))
    found = suffix.run(captured, captured.site, torch.arange(3))
    torch.testing.assert_close(found, network(x))
    assert not holds_proxies(network)
    for _ in range(2):
        LayerCausalEffect(network, layer or "first").estimate(x)
        pickle.dumps(network)


def test_a_module_outside_of_the_tree_of_modules_is_written_to_only_on_its_double() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.unregistered = [Writes()]

        def forward(self, x: Tensor) -> Tensor:
            return self.unregistered[0](self.layer(x))

    network = Hidden().eval()
    before = pickle.dumps(network.unregistered[0])
    with pytest.raises(Untraceable, match="not installed as a submodule"):
        Suffix(network, HookPoint(network.layer))
    assert pickle.dumps(network.unregistered[0]) == before


REGISTRY: list[type] = []


class Registering(nn.Module):
    def __init_subclass__(cls) -> None:
        REGISTRY.append(cls)


class Child(Registering):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert nn.Module.__call__ is CALL
        assert nn.Module.__getattr__ is GETATTR
        assert not fx._symbolic_trace.is_fx_tracing()
        assert type(self).__name__ == self.__class__.__qualname__ == "Child"
        return super().__call__.__self__.layer(x) * 2  # super() works on a double


CALL, GETATTR = nn.Module.__call__, nn.Module.__getattr__


def test_nothing_is_swapped_and_no_class_is_registered() -> None:
    network, x = nn.Sequential(Child(), nn.ReLU()).eval(), torch.randn(2, 4)
    REGISTRY.clear()
    suffix = Suffix(network, HookPoint(network[0].layer))
    captured = suffix.capture((x,))
    torch.testing.assert_close(suffix.run(captured, captured.site, torch.arange(2)), network(x))
    assert REGISTRY == []


def scaled(x: Tensor, n: int) -> Tensor:
    return x * n if int(n) > 1 else -x


fx.wrap("scaled")
fx.wrap("len")


class Registered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return scaled(h, x.shape[1]) * sqrt(x.shape[1]) + math.floor(x.shape[1]) + len(h.shape)


def test_registered_functions_are_operations_and_put_back() -> None:
    before, names = (scaled, sqrt, math.sqrt, math.floor), set(globals())
    network, x = Registered().eval(), torch.randn(3, 4)
    suffix = Suffix(network, HookPoint(network.layer))
    assert (scaled, sqrt, math.sqrt, math.floor) == before
    assert set(globals()) == names, "len, a built-in function, leaves no name behind"
    assert {scaled, math.sqrt, math.floor, len} <= {node.target for node in suffix.graph.nodes}
    captured = suffix.capture((x,))
    torch.testing.assert_close(suffix.run(captured, captured.site, torch.arange(3)), network(x))


def test_others_are_not_disturbed_while_networks_are_traced() -> None:
    """Predictions, and functions that are registered for tracing, in this thread; explanations in another."""
    other, registered, x = convolutional(), Registered().eval(), torch.rand(1, 3, 64, 64)
    wanted, features = other(x), torch.rand(2, 4)
    fine, failed = registered(features), []

    def explain() -> None:
        try:
            for _ in range(15):
                LayerCausalEffect(convolutional(), "3").estimate(x)
                LayerCausalEffect(Registered(), "layer").estimate(features)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=explain)
    thread.start()
    while thread.is_alive():
        assert torch.equal(other(x), wanted)
        assert torch.equal(registered(features), fine)
        assert math.sqrt(4) == 2
    thread.join()
    assert failed == []


class AttentionBiases(nn.Module):
    """Caches what it computes from its weights, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.biases = nn.Linear(6, 18), nn.Parameter(torch.randn(2, 5))
        self.register_buffer("index", torch.arange(25).view(5, 5) % 5)
        self.cache: dict[str, Tensor] = {}

    def bias(self, device: torch.device) -> Tensor:
        if str(device) not in self.cache:
            self.cache[str(device)] = self.biases[:, self.index].mean(0)
        return self.cache[str(device)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(1, 2) + self.bias(torch.device("cpu"))).softmax(-1) @ v


@pytest.mark.parametrize("warm", [False, True])
def test_what_a_network_caches_stays_its_own(warm: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 6), AttentionBiases(), nn.Flatten(), nn.Linear(30, 3)).eval()
    x = torch.randn(2, 5, 6)
    if warm:
        network(x)
    before = pickle.dumps(network)
    for layer in ("0", "1", "1.qkv"):
        found = LayerCausalEffect(network, layer, engine="suffix").estimate(x)
        full = LayerCausalEffect(network, layer, engine="full").estimate(x)
        torch.testing.assert_close(found.effect, full.effect, rtol=1e-4, atol=1e-5)
        assert not holds_proxies(network)
    assert pickle.loads(before)[1].cache.keys() <= network[1].cache.keys()
    torch.save(network.state_dict(), "/dev/null")
    pickle.dumps(network)


@pytest.mark.parametrize("kwargs", [False, True])
@pytest.mark.parametrize("where", ["root", "block", "leaf"])
def test_hooks_of_the_user_see_tensors_and_are_heeded(where: str, kwargs: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 3))
    network.eval()
    module = {"root": network, "block": network[1], "leaf": network[2]}[where]
    seen: list[Any] = []

    def before(m: nn.Module, args: Any, *rest: Any) -> Any:
        assert m is module
        seen.append(args[0])
        return ((args[0] + 1,), *rest) if kwargs else args[0] + 1

    def after(m: nn.Module, args: Any, *rest: Any) -> Any:
        seen.extend([args[0], rest[-1]])
        return rest[-1].clamp(max=0.2)  # which changes some outputs only

    module.register_forward_pre_hook(before, with_kwargs=kwargs)
    module.register_forward_hook(after, with_kwargs=kwargs)
    x = torch.randn(5, 4)
    fast, full = (LayerCausalEffect(network, "0.1", engine=engine).estimate(x) for engine in ("suffix", "full"))
    torch.testing.assert_close(fast.effect, full.effect)
    assert all(type(value) is Tensor for value in seen)


def test_a_hook_that_changes_the_form_of_its_values_is_not_recorded() -> None:
    network, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU())).eval(), torch.randn(2, 4)
    network.register_forward_hook(lambda m, args, out: {"logits": out})
    suffix = Suffix(network, HookPoint(network[0]))
    captured = suffix.capture((x,))
    with pytest.raises(Untraceable, match="a hook changes"):
        suffix.run(captured, captured.site, torch.arange(2))


def test_what_a_whole_part_hands_on_in_an_attribute_is_noticed() -> None:
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.twice = x * 2
            return x if float(x.sum()) > 0 else -x

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.looks = nn.Linear(4, 4), Looks()

        def forward(self, x: Tensor) -> Tensor:
            return self.looks(self.layer(x)) + self.looks.twice

    network = Reads().eval()
    with pytest.raises(Untraceable, match="attribute"):
        Suffix(network, HookPoint(network.layer))


def test_what_a_whole_part_hands_on_from_a_real_pass_is_noticed() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.gate = 4, torch.ones(())

        def forward(self, x: Tensor) -> Tensor:
            positive = float(x.sum()) > 0  # not traced
            self.gate = x.sum(1, keepdim=True)
            return x if positive else -x

    class Reads(nn.Module):
        def __init__(self, reads: bool) -> None:
            super().__init__()
            self.layer, self.looks, self.head = nn.Linear(4, 4), Looks(), nn.Linear(4, 3)
            self.reads = reads

        def forward(self, x: Tensor) -> Tensor:
            h = self.looks(self.layer(x)) * self.looks.width
            return self.head(h * self.looks.gate if self.reads else h)

    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    for reads in (False, True):
        torch.manual_seed(0)
        network = Reads(reads).eval()
        suffix = Suffix(network, HookPoint(network.layer))
        captured = suffix.capture((x,))
        if reads:
            with pytest.raises(Untraceable, match=r"`network\.looks` is run whole"):
                suffix.run(captured, captured.site + 1, torch.zeros(1, dtype=torch.int64))
        else:
            run = suffix.run(captured, captured.site, torch.zeros(1, dtype=torch.int64))
            torch.testing.assert_close(run, network(x))


def test_an_error_of_the_networks_own_class_is_no_error_of_ours() -> None:
    class OwnError(Exception):
        pass

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(x, Tensor):
                raise OwnError("tensors only")
            return self.layer(x)

    x = torch.randn(2, 4)
    with pytest.raises(Untraceable, match="OwnError: tensors only"):
        Suffix(network := Picky().eval(), HookPoint(network.layer))
    assert LayerCausalEffect(network, "layer").estimate(x).settings["route"] == "full"
    assert CausalEffect(network, PixelMask("zero"), OneAtATime()).estimate(x).effect.shape[0] == 2
