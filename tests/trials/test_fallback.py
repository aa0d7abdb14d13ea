"""The part of a network that is run instead of the whole never costs an answer: where it fails, the whole is run."""

import collections
import dataclasses
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ce_plugin import CausalEffect, CausalMediation, LayerCausalEffect
from ce_plugin.designs import OneAtATime
from ce_plugin.errors import CEPluginError, ModelError
from ce_plugin.interventions import PixelMask, ZeroOut
from ce_plugin.networks.graph import mapped


class BrokenError(Exception):
    """What a module of someone else's may raise."""


def in_a_part() -> bool:
    """Whether a module is run as one operation of a graph."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "out_of_place":
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


class OnlyWhole(nn.Module):
    """Works where the network is passed through as a whole, and fails in a part of it, from some call on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:  # a look at values: this module is one operation in the graph
            return x
        if in_a_part():
            self.left -= 1
            if self.left < 0:
                raise BrokenError("only as a part of\nthe network")
        return x.tanh()


class Net(nn.Module):
    """A convolution, something in the middle, a head."""

    def __init__(self, middle: nn.Module | None = None, pack: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.conv, self.middle = nn.Conv2d(2, 3, 3), middle or nn.Identity()
        self.head, self.pack = nn.Linear(3 * 16, 4), pack or nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.head(self.middle(self.conv(x)).flatten(1)))


def images(n: int = 2) -> Tensor:
    return torch.rand(n, 2, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 5, 8])
def test_a_part_that_fails_at_some_call_is_replaced_by_the_whole(calls: int, caplog: Any) -> None:
    net = Net(OnlyWhole(calls)).eval()
    wanted = LayerCausalEffect(net, "conv", engine="full").estimate(images())
    explainer = LayerCausalEffect(net, "conv")
    with caplog.at_level(logging.INFO, "ce_plugin"):
        found = [explainer.estimate(images()) for _ in range(2)]
    for estimate in found:
        assert torch.allclose(estimate.effect, wanted.effect, atol=1e-6)
    told = [record.message for record in caplog.records if "BrokenError" in record.message]
    assert len(told) <= 1
    if calls < 3:
        assert told == ["conv: every trial passes through the whole network, because BrokenError: only as a part of"]
        assert {estimate.settings["route"] for estimate in found} == {"full"}
        net.middle.left = calls
        with pytest.raises(ModelError, match="'auto' or 'full' for this network, but got 'suffix': BrokenError"):
            LayerCausalEffect(net, "conv", engine="suffix").estimate(images())


@pytest.mark.parametrize("calls", range(6))
def test_so_do_interactions_costs_mediation_and_windows_of_the_input(calls: int) -> None:
    net = Net(OnlyWhole(calls)).eval()

    def again(run: Callable[[str], Any]) -> Any:
        wanted = run("full")
        net.middle.left = calls
        return run("auto"), wanted

    found, wanted = again(lambda engine: LayerCausalEffect(net, "conv", engine=engine).interactions(images(), target=1))
    assert torch.allclose(found[1].interaction, wanted[1].interaction, atol=1e-5)
    found, wanted = again(lambda engine: LayerCausalEffect(net, "conv", engine=engine).estimate_cost(images()))
    assert found.trials == wanted.trials
    found, wanted = again(
        lambda engine: CausalMediation(net, "conv", PixelMask("zero"), engine=engine).estimate(images())
    )
    assert torch.allclose(found.indirect, wanted.indirect, atol=1e-6)
    found, wanted = again(
        lambda engine: CausalEffect(net, PixelMask("zero"), OneAtATime(), engine=engine).attribute(images(), target=2)
    )
    assert torch.allclose(found, wanted, atol=1e-6)


def test_an_error_of_the_network_itself_is_what_the_user_sees() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 1 and bool((x == 0).all(3).all(2).any()):
                raise BrokenError("a channel is empty")
            return x

    for engine in ("auto", "full"):
        with pytest.raises(BrokenError, match="a channel is empty"):
            LayerCausalEffect(Net(Fails()).eval(), "conv", engine=engine).estimate(images())


def test_memory_that_runs_out_and_interrupts_are_no_reason_to_take_another_route() -> None:
    for error in (KeyboardInterrupt, MemoryError):

        class Stops(OnlyWhole):
            def forward(self, x: Tensor, error: type[BaseException] = error) -> Tensor:
                try:
                    return super().forward(x)
                except BrokenError:
                    raise error from None

        with pytest.raises(error):
            LayerCausalEffect(Net(Stops(1)).eval(), "conv").estimate(images())


class Answers(collections.OrderedDict):  # type: ignore[type-arg]
    """As transformers' outputs are: a dictionary whose entries are attributes too."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


@dataclasses.dataclass(frozen=True)
class Record:
    """A container of one's own."""

    logits: Tensor
    extra: tuple[Any, ...] = ()


Named = collections.namedtuple("Named", ["logits", "extra"])

PACKS: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    "dict with attributes": (lambda y: Answers(logits=y, extra=[y + 1, None]), lambda out: out.logits),
    "frozen dataclass": (lambda y: Record(y, (y + 1, {"a": y})), lambda out: out.logits + 0 * out.extra[1]["a"]),
    "namedtuple": (lambda y: Named(y, None), lambda out: out.logits if isinstance(out, Named) else None),
    "list in a tuple": (lambda y: ([y, 2 * y], "x"), lambda out: out[0].pop() if type(out) is tuple else None),
    "plain dict": (lambda y: {"logits": y}, lambda out: out.pop("logits")),
}


@pytest.mark.parametrize("engine", ["suffix", "full"])
@pytest.mark.parametrize("name", PACKS)
def test_output_selectors_get_the_containers_that_the_network_returns(name: str, engine: Any) -> None:
    pack, output = PACKS[name]
    net = Net(None, pack).eval()
    found = LayerCausalEffect(net, "conv", output=output, engine=engine).estimate(images()).effect
    plain = LayerCausalEffect(Net(None, None if name != "list in a tuple" else lambda y: 2 * y).eval(), "conv")
    plain.forward.forward_func.load_state_dict(net.state_dict())
    assert torch.allclose(found, plain.estimate(images()).effect, atol=1e-6)


def test_leaves_are_replaced_in_containers_of_the_same_classes() -> None:
    value = Record(1, ([2, {"a": 3}], Named(4, None)))  # type: ignore[arg-type]
    assert mapped(value, lambda leaf: leaf and 10 * leaf) == Record(10, ([20, {"a": 30}], Named(40, None)))  # type: ignore[arg-type]
    assert value.extra[0] == [2, {"a": 3}]


def test_a_value_that_the_next_operation_writes_to_is_handed_out_as_a_copy() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x += 1.0
            return x.relu_() if float(x.sum()) < 1e9 else x

    for middle in (Writes(), nn.ReLU(inplace=True)):
        net, x = Net(middle).eval(), images(1)
        found = [LayerCausalEffect(net, "conv", engine=engine).estimate(x).effect for engine in ("auto", "full")]
        assert torch.allclose(found[0], found[1], atol=1e-6)
    # By a hook the clean value is put back twice.
    attention = nn.MultiheadAttention(4, 2, batch_first=True)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attend, self.head = nn.Linear(4, 4), attention, nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            h += 1.0
            y = self.attend(h, h, h)
            return self.head((y[0] if isinstance(y, tuple) else y).mean(1))

    tokens, x = Tokens().eval(), torch.rand(2, 5, 4)
    found = [LayerCausalEffect(tokens, "embed", engine=engine).estimate(x) for engine in ("auto", "full")]
    assert torch.allclose(found[0].effect, found[1].effect, atol=1e-6)


class _Block(nn.Module):
    """One of several ways of going on from (N, 3, 4, 4) that networks have."""

    KINDS = ("conv", "in place", "relu_", "skip", "tuple", "leaf", "pool", "norm", "silent", "broken", "view")

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.broken = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), OnlyWhole(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "conv":
            return self.conv(x)
        if self.kind == "in place":
            x += 0.5
            return x
        if self.kind == "relu_":
            return self.conv(x).relu_()
        if self.kind == "skip":
            return x + torch.cat([self.conv(x)[:, :1], x[:, 1:]], 1)
        if self.kind == "tuple":
            y = self.conv(x), x
            return y[0] * y[1] if isinstance(y, tuple) else x
        if self.kind == "leaf" and float(x.detach().sum()) < 1e9:
            return x.mul_(0.5)
        if self.kind == "pool":
            return nn.functional.max_pool2d(x, 3, 1, 1)
        if self.kind == "norm":
            return self.norm(x)
        if self.kind == "silent":
            return x * (x.shape[0] > 0)
        if self.kind == "broken":
            return self.broken(x)
        if self.kind == "view":
            x.view(len(x) if isinstance(x, Tensor) else -1, -1)[:, :5] = 0.25
        return x


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(_Block.KINDS), min_size=1, max_size=4),
    pack=st.sampled_from([None, *PACKS]),
    layer=st.integers(-1, 3),
    n=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_the_fast_route_gives_what_the_whole_network_gives(
    kinds: list[str], pack: str | None, layer: int, n: int, seed: int
) -> None:
    torch.manual_seed(seed)
    net = Net(nn.Sequential(*map(_Block, kinds)), PACKS[pack][0] if pack else None).eval()
    name = "conv" if layer < 0 else f"middle.{layer % len(kinds)}"
    answers: list[Any] = []
    for engine in ("full", "auto"):
        explainer = LayerCausalEffect(net, name, ZeroOut(), output=PACKS[pack][1] if pack else None, engine=engine)
        try:
            answers.append(explainer.estimate(images(n)).effect)
        except CEPluginError as error:
            answers.append(str(error))
    if isinstance(answers[0], str):
        assert answers[0] == answers[1]
    else:
        assert torch.allclose(answers[0], answers[1], atol=1e-5)
