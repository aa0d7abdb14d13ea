"""Whatever fails, wherever, on whichever route: everything is as before."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _state import Stateful, differences, in_training, nothing, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.designs import OneAtATime, RandomMask
from ce_plugin.interventions import Adversarial, Context, Intervention, PixelMask
from ce_plugin.networks.guard import state_guard
from ce_plugin.trials import _runner


class OwnError(Exception):
    """Of the user's."""


ERRORS = (
    ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, AssertionError, StopIteration, OwnError,
    MemoryError, torch.OutOfMemoryError, GeneratorExit, KeyboardInterrupt, SystemExit,
)  # fmt: skip
PLACES = ("forward", "hook", "output", "outcome", "progress", "intervention")
ROUTES = ("fast", "full", "attack")


class Fuse:
    """Raises from a certain call on; never while a network is traced, where what is raised means another route."""

    def __init__(self, after: int, raising: Callable[[], Any]) -> None:
        self.left, self.raising, self.lit = after, raising, False

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return dict, ()  # in a network that is pickled, and no object whose attributes the guard restores

    def hook(self, module: nn.Module, args: Any, found: Any) -> None:
        self(found)

    def __call__(self, value: Any = None) -> None:
        if value is not None and not isinstance(value, Tensor):
            return
        self.left -= 1
        if self.left < 0:
            self.lit = True
            self.raising()


class Failing(Intervention):
    """Another intervention, with a fuse."""

    def __init__(self, inner: Intervention, fuse: Fuse) -> None:
        self.inner, self.fuse = inner, fuse

    def values(self, clean: Tensor, context: Context) -> Tensor:
        torch.rand(2)
        self.fuse()
        return self.inner.values(clean, context)

    def __repr__(self) -> str:
        return "Failing()"


def explain(network: nn.Module, x: Tensor, route: str, place: str, fuse: Fuse) -> Any:
    """One run with the fuse at a place."""

    def output(found: Tensor) -> Tensor:
        fuse(found)
        return found

    def outcome(found: Tensor, reference: Tensor) -> Tensor:
        fuse(found)
        return found

    options: dict[str, Any] = {"outcome": None}
    if place == "output":
        options["output"] = output
    if place == "outcome":
        options["outcome"] = outcome
    inner: Intervention = PixelMask("zero")
    if route == "attack":
        inner = Adversarial.pgd(network, eps=0.1, max_iter=2, clip_values=(0, 1))
    intervention = Failing(inner, fuse) if place == "intervention" else inner
    if route == "attack":
        explainer: Any = CausalEffect(network, intervention, RandomMask(n_trials=4, p=0.5), **options)
    else:
        own = (intervention,) if place == "intervention" else ()
        engine = "full" if route == "full" else "auto"
        explainer = LayerCausalEffect(network, "conv", *own, engine=engine, **options)
    return explainer.estimate(x, show_progress=place == "progress")


@contextlib.contextmanager
def lit(network: nn.Module, place: str, fuse: Fuse, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fuse in the network itself, its hook, or the progress bar."""
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        if place == "forward":
            network.fuse = fuse
        if place == "hook":
            handle = network.second.register_forward_hook(fuse.hook)
            stack.callback(handle.remove)
        if place == "progress":

            class Bar(_runner.tqdm):  # type: ignore[misc]
                def update(self, n: float = 1) -> None:
                    fuse()

            patch.setattr(_runner, "tqdm", Bar)
        yield


class Fused(Stateful):
    def write(self, h: Tensor) -> None:
        super().write(h)
        if "fuse" in vars(self):
            self.fuse(h)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("place", PLACES)
def test_after_any_error_everything_is_as_before(place: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 3, 12, 12)
    network = in_training(Fused(), x)
    for number, error in enumerate(ERRORS):

        def raising(error: type[BaseException] = error) -> None:
            raise error("on purpose")

        fuse = Fuse(0 if place in ("progress", "intervention") else number % 3, raising)
        with lit(network, place, fuse, monkeypatch):
            before = snapshot(network)
            with pytest.raises(BaseException) as caught:  # noqa: PT011
                explain(network, x, route, place, fuse)
            assert fuse.lit
            assert differences(before, snapshot(network)) == [], (error, caught.value)
        vars(network).pop("fuse", None)
    # Without an error the run goes through, and everything is as before too.
    before = snapshot(network)
    explain(network, x, route, "none", Fuse(10**9, nothing))
    assert differences(before, snapshot(network)) == []


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_leaves_everything_as_before(
    place: str, route: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.rand(2, 3, 12, 12)
    network = in_training(Fused(), x)
    fuse = Fuse(0 if place in ("progress", "intervention") else after, lambda: signal.raise_signal(signal.SIGINT))
    with lit(network, place, fuse, monkeypatch):
        before = snapshot(network)
        with pytest.raises(KeyboardInterrupt):
            explain(network, x, route, place, fuse)
        assert differences(before, snapshot(network)) == []


def test_the_number_of_combinations() -> None:
    assert len(ERRORS) * len(PLACES) * len(ROUTES) + len(PLACES) * len(ROUTES) >= 150


def test_the_fast_route_is_one() -> None:
    x = torch.rand(2, 3, 12, 12)
    routes = [explain(Stateful(), x, r, "none", Fuse(10**9, nothing)).settings["route"] for r in ("fast", "full")]
    assert routes[0] != "full"
    assert routes[1] == "full"


def test_a_snapshot_sees_what_a_pass_writes() -> None:
    x = torch.rand(2, 3, 12, 12)
    network = in_training(Stateful(), x)
    before = snapshot(network)
    network(x).sum().backward()
    network.relu.register_forward_hook(nothing)
    changed = differences(before, snapshot(network))
    for part in (" attributes", "head attributes", "relu attributes", "conv gradients", "torch"):
        assert any(key.endswith(part) for key in changed), part


class Unready(nn.Module):
    """Builds its layer in the first pass, and notes that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.ready, self.first = False, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.layer, self.ready = nn.Linear(4, 3), True
        self.feature = self.first(x)
        return self.layer(self.feature)


def test_what_a_first_pass_builds_stays_with_its_flag() -> None:
    network, x = Unready(), torch.rand(2, 4)
    LayerCausalEffect(network, "first").estimate(x)
    assert network.ready
    before, wanted = snapshot(network), network.layer.weight.clone()
    LayerCausalEffect(network, "first").estimate(x)
    assert differences(before, snapshot(network)) == []
    assert torch.equal(network.layer.weight, wanted)


WRITES: dict[str, Callable[[Any, Tensor], None]] = {
    "attribute": lambda m, h: setattr(m, "feature", h),
    "deleted": lambda m, h: delattr(m, "there") if hasattr(m, "there") else None,
    "list": lambda m, h: m.items.append(h),
    "emptied": lambda m, h: m.items.clear(),
    "dict": lambda m, h: m.table.update(last=h, first=len(m.table)),
    "popped": lambda m, h: m.table.pop("a", None),
    "set": lambda m, h: m.names.add(h.dim()),
    "object": lambda m, h: setattr(m.state, "last", h),
    "deep": lambda m, h: m.state.seen.append(h),
    "buffer": lambda m, h: m.count.add_(1),
    "new buffer value": lambda m, h: setattr(m, "count", m.count + 1),
    "hook": lambda m, h: m.register_forward_hook(nothing),
    "flag": lambda m, h: setattr(m, "training", True),
    "frozen": lambda m, h: m.layer.weight.requires_grad_(False),
    "random": lambda m, h: torch.rand(1),
    "swapped layer": lambda m, h: setattr(m, "spare", nn.Identity()),
}


class Writing(nn.Module):
    def __init__(self, writes: list[str]) -> None:
        super().__init__()
        self.layer, self.spare, self.writes = nn.Linear(3, 3), nn.Linear(1, 1), writes
        self.items: list[Any] = [1]
        self.table: dict[str, Any] = {"a": 1, "b": 2}
        self.names, self.there = {1}, True
        self.state: Any = __import__("_state").Notes()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        for name in self.writes:
            WRITES[name](self, h)
        return h


@settings(max_examples=25, deadline=None)
@given(
    blocks=st.lists(st.lists(st.sampled_from(sorted(WRITES)), max_size=5), min_size=1, max_size=3),
    training=st.booleans(),
    layer=st.sampled_from([None, "0", "0.layer"]),
    engine=st.sampled_from(["auto", "full"]),
)
def test_whatever_a_network_writes_is_gone_afterwards(
    blocks: list[list[str]], training: bool, layer: str | None, engine: Any
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(*map(Writing, blocks), nn.Linear(3, 2)).train(training)
    x, before = torch.rand(2, 3), snapshot(network)
    if layer is None:
        CausalEffect(network, PixelMask("zero"), OneAtATime(), outcome=None).estimate(x)
    else:
        LayerCausalEffect(network, layer, outcome=None, engine=engine).estimate(x)
    assert differences(before, snapshot(network)) == []


def test_attributes_come_back_when_the_guard_is_left_by_an_error() -> None:
    network = Stateful()
    before = snapshot(network)
    with pytest.raises(OwnError), state_guard(network):  # noqa: PT012
        network(torch.rand(1, 3, 12, 12))
        raise OwnError
    assert differences(before, snapshot(network)) == []
