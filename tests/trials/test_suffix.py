"""The suffix returns what the network returns, and what hooks return when they set the site; it changes nothing."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ce_plugin.networks.graph import HookPoint, Suffix, Untraceable

Pair = collections.namedtuple("Pair", ["logits", "features"])


class Residual(nn.Module):
    """In-place operations of every kind beside a by-pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norm, self.relu, self.head = nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(x)))
        out = self.relu(self.conv2(x))
        out = self.conv3(out)
        out += x
        self.relu(out)  # changes `out`, whatever becomes of the returned value
        out.mul_(2).add_(0.5)
        out = F.relu(out, inplace=True)
        return self.head(out.mean((2, 3)))


class Heads(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form, self.body, self.head = form, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x).relu()
        return self.form(self.head(features), features)


class Several(nn.Module):
    """Two inputs, two additional arguments, a shape that is used, a module that is called twice, tuple outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, a: Tensor, b: Tensor, scale: Tensor, power: int = 1) -> Tensor:
        n = a.shape[0]
        token = self.token.expand(n, -1, -1)
        first = self.shared(a)
        second = torch.tanh(self.shared(first) + self.other(b))
        sequence, (state, _) = self.lstm(torch.cat([token, second[:, None]], 1))
        out = sequence[:, -1] + state[0] * scale[:, None]
        return out**power if power > 1 else out


def brute(network: nn.Module, point: HookPoint, values: Tensor, *args: Any) -> Any:
    """Set the value by a hook; a copy, because the network itself changes it in place."""
    values = values.clone()
    calls = [0]

    def counts() -> bool:
        calls[0] += 1
        return calls[0] == point.call + 1

    def after(module: nn.Module, given: Any, output: Any) -> Any:
        if not counts():
            return None
        if point.element is None:
            return values
        return (*output[: point.element], values, *output[point.element + 1 :])

    def before(module: nn.Module, given: Any) -> Any:
        k = point.element or 0
        return (*given[:k], values, *given[k + 1 :]) if counts() else None

    assert point.module is not None
    module = point.module
    handle = module.register_forward_pre_hook(before) if point.at_input else module.register_forward_hook(after)
    try:
        return network(*args)
    finally:
        handle.remove()


def randomised(network: nn.Module) -> nn.Module:
    """In float64 and eval mode, with batch-norm statistics that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return network.double().eval()


def check(network: nn.Module, point: HookPoint, inputs: tuple[Tensor, ...], args: tuple[Any, ...] = ()) -> Suffix:
    """Random values, at random examples, against hooks."""
    suffix = Suffix(network, point, n_inputs=len(inputs), args=args)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    copies = [x.clone() for x in inputs]
    captured = suffix.capture(inputs, args)
    examples = torch.tensor([1, 0, 1, 1])
    values = captured.site[examples] + torch.randn(4, *captured.site.shape[1:]).double()
    kept, clean = values.clone(), captured.site.clone()
    rows = [arg[examples] if isinstance(arg, Tensor) and len(arg) == len(inputs[0]) else arg for arg in args]
    expected = brute(network, point, values, *(x[examples] for x in inputs), *rows)
    for _ in range(2):  # a second run finds the same captured values
        torch.testing.assert_close(suffix.run(captured, values, examples), expected, rtol=1e-9, atol=1e-11)
    again = suffix.run(captured, captured.site, torch.arange(len(inputs[0])))
    torch.testing.assert_close(again, network(*inputs, *args), rtol=1e-9, atol=1e-11)
    assert torch.equal(values, kept)
    assert torch.equal(captured.site, clean)
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    return suffix


POINTS = ["conv1", "norm", "conv2", "conv3", "head"]


@pytest.mark.parametrize("at_input", [False, True])
@pytest.mark.parametrize("name", POINTS)
def test_in_place_operations_and_by_passes_are_as_with_hooks(name: str, at_input: bool) -> None:
    network = randomised(Residual())
    suffix = check(network, HookPoint(network.get_submodule(name), at_input), (torch.randn(2, 3, 6, 6).double(),))
    assert suffix.is_cut == (name in ("conv1", "norm", "head") or (name, at_input) == ("conv1", True))


@pytest.mark.parametrize("call", [0, 1])
def test_a_module_that_is_called_several_times(call: int) -> None:
    network = randomised(Residual())
    check(network, HookPoint(network.relu, call=call), (torch.randn(2, 3, 6, 6).double(),))
    with pytest.raises(Untraceable, match="not reached"):
        Suffix(network, HookPoint(network.relu, call=3))
    with pytest.raises(Untraceable, match="not used"):
        Suffix(network, HookPoint(network.relu, call=2))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [("shared", {}), ("shared", {"call": 1}), ("other", {"at_input": True}), ("lstm", {"element": 0})],
)
def test_several_inputs_arguments_and_shapes(name: str, options: dict[str, Any], power: int) -> None:
    network = randomised(Several())
    inputs = (torch.randn(3, 4).double(), torch.randn(3, 4).double())
    check(network, HookPoint(network.get_submodule(name), **options), inputs, (torch.rand(3).double(), power))


def test_arguments_other_than_those_traced_are_refused() -> None:
    network, x, scale = randomised(Several()), torch.randn(2, 4).double(), torch.rand(2).double()
    suffix = Suffix(network, HookPoint(network.shared), n_inputs=2, args=(scale, 1))
    with pytest.raises(Untraceable, match="other additional arguments"):
        suffix.capture((x, x), (scale, 2))
    with pytest.raises(Untraceable, match="traced with 2 additional arguments, called with 1"):
        suffix.capture((x, x), (scale,))


@pytest.mark.parametrize("form", [lambda a, b: {"a": a, "b": b}, lambda a, b: (a, b), lambda a, b: [a, {"b": b}], Pair])
def test_every_form_of_output(form: Callable[[Tensor, Tensor], Any]) -> None:
    network = randomised(Heads(form))
    check(network, HookPoint(network.body), (torch.randn(2, 4).double(),))


def test_the_input_is_a_site() -> None:
    network, x = randomised(Residual()), torch.randn(2, 3, 6, 6).double()
    suffix = Suffix(network, HookPoint())
    captured = suffix.capture((x,))
    assert suffix.is_cut
    assert captured.site is x
    new = torch.randn_like(x)
    torch.testing.assert_close(suffix.run(captured, new, torch.arange(2)), network(new))


def test_where_the_site_is_a_cut_nothing_is_run() -> None:
    network, x = randomised(Residual()), torch.randn(2, 3, 6, 6).double()
    suffix, site = Suffix(network, HookPoint(network.norm)), network.norm(network.conv1(x))
    with torch.no_grad():
        network.conv1.weight.fill_(torch.nan)
    captured = suffix.capture((x,), site=site)
    assert bool(suffix.run(captured, site, torch.arange(2)).isfinite().all())


def test_a_decoder_stands_between_the_code_and_the_network() -> None:
    network, x = randomised(Residual()), torch.randn(2, 3, 6, 6).double()
    decoder = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(inplace=True)).double().eval()
    point = HookPoint(network.conv2)
    suffix = Suffix(network, point, decoder=decoder)
    code = torch.randn(2, 2, 6, 6).double()
    captured = suffix.capture((x,), site=code)
    out = suffix.run(captured, code.flip(0), torch.arange(2))
    torch.testing.assert_close(out, brute(network, point, decoder(code.flip(0)), x))
    with pytest.raises(ValueError, match="the code must be given"):
        suffix.capture((x,))


def test_gradients_reach_the_values_even_after_inference_mode() -> None:
    network, x = randomised(Residual()), torch.randn(2, 3, 6, 6).double()
    suffix = Suffix(network, HookPoint(network.conv2))
    with torch.inference_mode():
        captured = suffix.capture((x,))
    values = captured.site.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: suffix.run(captured, v, torch.arange(2)), values)


def test_hooks_of_leaves_fire_as_usual() -> None:
    network, x, seen = randomised(Residual()), torch.randn(2, 3, 6, 6).double(), []
    suffix = Suffix(network, HookPoint(network.conv1))
    captured = suffix.capture((x,))
    with network.relu.register_forward_hook(lambda *_: seen.append(1)):
        suffix.run(captured, captured.site, torch.arange(2))
    assert len(seen) == 3
    assert network.relu.inplace


class LooksAtValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class ChangesAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        part = y.view(-1, 2, 2)
        y.add_(1)
        return part.flatten(1)


class MixesExamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x.mean(0, keepdim=True)[:, :1]


def test_what_cannot_be_traced_says_why() -> None:
    inside = nn.Sequential(nn.Linear(4, 4), LooksAtValues())
    with pytest.raises(Untraceable, match="control flow"):
        Suffix(LooksAtValues().eval(), HookPoint())
    network = ChangesAView().eval()
    with pytest.raises(Untraceable, match="view"):
        Suffix(network, HookPoint(network.layer))
    mixes = MixesExamples().eval()
    suffix = Suffix(mixes, HookPoint(mixes.layer))
    with pytest.raises(Untraceable, match="no row per example"):
        suffix.capture((torch.randn(3, 4),))
    # A part that cannot be traced stays whole, as long as the site is not in it.
    check(inside.double().eval(), HookPoint(inside[0]), (torch.randn(2, 4).double(),))


def test_a_layer_whose_output_is_not_used() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.layer(x)
            return x * 2

    network = Idle().eval()
    with pytest.raises(Untraceable, match="not used"):
        Suffix(network, HookPoint(network.layer))


def test_a_network_as_it_was() -> None:
    network = randomised(Residual()).train()
    before = copy.deepcopy(network.__dict__)
    Suffix(network, HookPoint(network.conv2))
    assert network.training
    assert network.__dict__.keys() == before.keys()
    assert [name for name, _ in network.named_modules()] == [name for name, _ in Residual().named_modules()]
