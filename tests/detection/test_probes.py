"""Probes: each effect against a forward pass of its own, closed forms, names, and JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from _toy import classifier, patterns, quick_signature
from torch import Tensor, nn

from ce_plugin.detection import (
    CounterAttack,
    Denoising,
    Interchange,
    NodeZeroing,
    PixelMasking,
    Signature,
    Smoothing,
)
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.probes import Probe, View
from ce_plugin.errors import ArgumentError, UnknownNameError
from ce_plugin.interventions import Smooth

FILTERS = [Smooth.gauss(1.0), Smooth.chain(Smooth.median(3), Smooth.bits(3)), Smooth.stretch(0.25, 0.75)]
PROBES: list[Probe] = [
    Smoothing("smoothing", FILTERS),
    Smoothing("distance only", FILTERS, judged=("distance",)),
    Smoothing("reversal only", FILTERS, judged=("reversal",)),
    Smoothing("margin only", FILTERS, judged=("margin",)),
    Smoothing("all sides", FILTERS, judged=("margin", "distance", "reversal")),
    CounterAttack(),
    CounterAttack(steps=(0.02, 0.1), judged=("reversal", "distance"), value_range=(0, 1)),
    CounterAttack(steps=(0.02,), judged=("reversal",)),
    PixelMasking(0.4, n_draws=3, seed=5, fill="mean"),
    NodeZeroing("0"),
    Interchange("1", Smooth.median(3)),
]


def images(n: int = 4, channels: int = 1) -> Tensor:
    return torch.as_tensor(patterns(n, channels=channels)[0]).double()


def with_hook(layer: nn.Module, change: Any, net: nn.Module, x: Tensor) -> Tensor:
    handle = layer.register_forward_hook(lambda module, inputs, output: change(output))
    found: Tensor = net(x)
    handle.remove()
    return found


def margins(logits: Tensor, predicted: Tensor) -> Tensor:
    rivals = [np.delete(row, k).max() for row, k in zip(logits.numpy(), predicted.tolist(), strict=True)]
    return logits.gather(1, predicted[:, None])[:, 0] - torch.as_tensor(np.array(rivals))


@torch.no_grad()
def test_smoothing_is_a_run_for_each_filter() -> None:
    net, x = classifier(), images()
    response = PROBES[0].respond(View(net, x))
    runs = [net(one(x)) for one in FILTERS]
    torch.testing.assert_close(response.effects, torch.cat([run - net(x) for run in runs], 1))
    predicted = net(x).argmax(1)
    torch.testing.assert_close(response.margins, torch.stack([margins(run, predicted) for run in runs], 1))
    assert torch.equal(response.answers, torch.stack([run.argmax(1) for run in runs], 1))


def test_first_order_sizes_of_a_linear_network() -> None:
    """Norms of the difference of two rows, and the true distances to the other answer."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double().eval()
    x = images()
    order = net(x).argsort(1, descending=True)
    w = (net[1].weight[order[:, 0]] - net[1].weight[order[:, 1]]).detach().numpy()
    logits = net(x).sort(1, descending=True).values.detach().numpy()
    margin = logits[:, 0] - logits[:, 1]
    norms = [np.linalg.norm(w, 2, axis=1), np.linalg.norm(w, 1, axis=1), np.abs(w).max(1)]
    wanted = [*norms, margin / norms[1], margin / norms[0]]
    with torch.no_grad():
        found = CounterAttack().respond(View(net, x)).effects
    np.testing.assert_allclose(found, np.log(np.stack(wanted, 1)), atol=1e-3)  # of margin + 1e-6
    assert len(CounterAttack().labels(3)) == 5


@torch.no_grad()
def test_a_step_of_a_linear_network_takes_its_size_times_the_l1_norm() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double().eval()
    x = images() * 0.5 + 0.25  # nothing is clipped
    w = (net[1].weight[0] - net[1].weight[1]).abs().sum()
    view = View(net, x)
    response = CounterAttack(steps=(0.01, 0.1), judged=("reversal",)).respond(view)
    torch.testing.assert_close(response.margins, view.margin()[:, None] - torch.tensor([0.01, 0.1]).double() * w)
    assert response.effects.shape == (4, 0)
    clipped = CounterAttack(steps=(9.0,), judged=("reversal",), value_range=(0.2, 0.8)).respond(view)
    side = (net[1].weight[view.predicted] - net[1].weight[1 - view.predicted]).sign().reshape(x.shape)
    torch.testing.assert_close(clipped.margins[:, 0], margins(net(0.5 - 0.3 * side), view.predicted))


@torch.no_grad()
def test_masking_a_share_of_the_pixels_takes_this_share_of_a_linear_answer() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False)).double().eval()
    x, draws = images(), 800
    response = PixelMasking(0.3, n_draws=draws).respond(View(net, x))
    mean, deviation = response.effects[:, :2], response.effects[:, 2:]
    assert float(((mean + 0.3 * net(x)) / (deviation / draws**0.5)).abs().max()) < 5
    pixels = (net[1].weight * x.flatten(1)[:, None]).square().sum(2)
    torch.testing.assert_close(deviation, (0.3 * 0.7 * pixels).sqrt(), rtol=0.15, atol=0)
    assert torch.equal(response.effects, PixelMasking(0.3, n_draws=draws).respond(View(net, x)).effects)
    assert not torch.equal(response.effects, PixelMasking(0.3, n_draws=draws, seed=1).respond(View(net, x)).effects)


@pytest.mark.parametrize("wrapped", [False, True])
@torch.no_grad()
def test_channels_set_to_zero_one_by_one(wrapped: bool) -> None:
    net, x = classifier(), images()
    idle, predicted = net(x), net(x).argmax(1)
    found = NodeZeroing("0").respond(View(ClassifierWrapper(net) if wrapped else net, x)).effects
    for channel in range(4):

        def zeroed(output: Tensor, channel: int = channel) -> Tensor:
            return output.index_fill(1, torch.tensor([channel]), 0.0)

        run = with_hook(net[0], zeroed, net, x)
        logit = (run - idle).gather(1, predicted[:, None])[:, 0]
        torch.testing.assert_close(found[:, channel], logit)
        margin = margins(run, predicted) - margins(idle, predicted)
        torch.testing.assert_close(found[:, 4 + channel], margin)


@torch.no_grad()
def test_channels_set_to_their_values_in_the_smoothed_run() -> None:
    net, x, smooth = classifier(), images(), Smooth.median(3)
    idle, predicted, smoothed = net(x), net(x).argmax(1), net[:2](smooth(x))
    found = Interchange("1", smooth).respond(View(net, x)).effects
    for channel in range(4):

        def patched(output: Tensor, channel: int = channel) -> Tensor:
            other = output.clone()
            other[:, channel] = smoothed[:, channel]
            return other

        run = with_hook(net[1], patched, net, x)
        torch.testing.assert_close(found[:, channel], (run - idle).gather(1, predicted[:, None])[:, 0])
        torch.testing.assert_close(found[:, 4 + channel], margins(run, predicted) - margins(idle, predicted))


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: f"{probe.name} {probe.settings().get('judged')}")
@pytest.mark.parametrize("n_classes", [3, 30])
@torch.no_grad()
def test_what_comes_out_is_named_finite_and_each_images_own(probe: Probe, n_classes: int) -> None:
    net, x = classifier(n_classes), torch.as_tensor(patterns(5, n_classes)[0]).double()
    ids = [3, 1, 4, 15, 9]
    together = probe.respond(View(net, x, ids))
    labels = probe.labels(n_classes)
    named = not isinstance(probe, (NodeZeroing, Interchange))  # how many channels there are is not known beforehand
    assert len(labels) == len(set(labels)) == (together.effects.shape[1] if named else 0)
    _, margins, answers, left = together
    assert {margins.shape[1], left.shape[1], answers.shape[1]} <= {0, len(probe.interventions())}
    assert answers.shape[1] == max(margins.shape[1], left.shape[1])
    if margins.shape[1] and left.shape[1]:
        assert torch.equal(margins, left)
    assert bool(together.effects.isfinite().all() and together.margins.isfinite().all())
    order = [4, 2, 0, 3, 1]
    alone = [probe.respond(View(net, x[i : i + 1], [ids[i]])) for i in order]
    torch.testing.assert_close(torch.cat([one.effects for one in alone]), together.effects[order], atol=1e-11, rtol=0)
    torch.testing.assert_close(torch.cat([one.margins for one in alone]), together.margins[order], atol=1e-11, rtol=0)


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: f"{probe.name} {probe.settings().get('judged')}")
@torch.no_grad()
def test_json_and_back_is_the_same_signature(probe: Probe) -> None:
    signature = Signature([probe])
    again = Signature.from_settings(json.loads(json.dumps(signature.settings())))
    assert again == signature
    assert hash(again) == hash(signature)
    assert again.names == signature.names
    assert again.passes == signature.passes
    view = View(classifier(), images())
    assert torch.equal(again.probes[0].respond(view).effects, probe.respond(view).effects)
    assert torch.equal(again.probes[0].respond(view).margins, probe.respond(view).margins)


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)])
def test_default_signatures_cost_what_they_may_and_come_back(value_range: tuple[float, float]) -> None:
    small, large = Signature.of((1, 28, 28), value_range), Signature.of((3, 224, 224), value_range)
    hard = Signature.adversarially_trained(value_range)
    assert hard.leading == ("hardened denoising",)
    assert hard.probes[-1].settings()["eps"] == pytest.approx(0.3 * (value_range[1] - value_range[0]))
    for signature in (small, large, hard):
        assert signature.passes <= 12
        assert signature.differentiable
        assert Signature.from_settings(json.loads(json.dumps(signature.settings()))) == signature
    assert small == Signature.small_images(value_range) != Signature.photographs(value_range) == large


@torch.no_grad()
def test_the_units_of_the_images_do_not_matter() -> None:
    """In bytes the same effects come out, but for the gradient's unit."""
    net, x = classifier(), images()
    in_bytes = nn.Sequential(Scaled(), net)
    one = CounterAttack(steps=(0.05,)).respond(View(net, x)).effects
    other = CounterAttack(steps=(0.05 * 255,), value_range=(0, 255)).respond(View(in_bytes, x * 255)).effects
    torch.testing.assert_close(other[:, 5:], one[:, 5:])
    unit = torch.tensor([-1, -1, -1, 1, 1]).double() * np.log(255)
    torch.testing.assert_close(other[:, :5], one[:, :5] + unit)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 255


@torch.no_grad()
def test_probes_counted_in_passes_run_as_often() -> None:
    calls = []
    net = classifier()
    net.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    for probe in (PROBES[0], CounterAttack(steps=(0.1, 0.2)), PixelMasking(0.4, n_draws=3)):
        view = View(net, images(1))
        calls.clear()
        probe.respond(view)
        backward = 1 if isinstance(probe, CounterAttack) else 0
        # A gradient is a forward and a backward pass, of which the forward one is that of the idle run once more.
        assert sum(calls) + backward == probe.passes


def test_bad_probes_are_refused() -> None:
    with pytest.raises(ArgumentError, match="`filters` to be a list of at least one Smooth intervention, but got none"):
        Smoothing("empty", [])
    with pytest.raises(ArgumentError, match="`filters` to be filters that differ"):
        Smoothing("twice", [Smooth.gauss(1.0), Smooth.gauss(1.0)])
    with pytest.raises(ArgumentError, match=r"`filters` to be in image units.*leave `normalization` out"):
        Smoothing("units", [Smooth.gauss(1.0, normalization=(0.5, 0.5))])
    with pytest.raises(ArgumentError, match="`filters` to be in image units"):
        Interchange("0", Smooth.gauss(1.0, normalization=(0.5, 0.5)))
    for judged in ((), "distance", ("distance", "both")):
        with pytest.raises(ArgumentError, match="`judged` to be one or more of"):
            Smoothing("sides", FILTERS, judged=judged)
    with pytest.raises(ArgumentError, match="`steps` to be positive sizes in image units"):
        CounterAttack(steps=(0.1, 0.0))
    for share in (0.0, 1.0):
        with pytest.raises(ArgumentError, match=r"`share` to be a float in \(0, 1\)"):
            PixelMasking(share)
    with pytest.raises(ArgumentError, match="`n_draws` to be a whole number, at least 2"):
        PixelMasking(n_draws=1)
    with pytest.raises(ArgumentError, match="`width` to be a whole number, 1 or more"):
        Denoising(width=0)
    with pytest.raises(UnknownNameError, match="`layer` to be one of"):
        NodeZeroing("9").respond(View(ClassifierWrapper(classifier()), images()))


def test_bad_signatures_are_refused() -> None:
    with pytest.raises(ArgumentError, match="`probes` to be at least one Probe, and nothing else"):
        Signature([])
    with pytest.raises(ArgumentError, match=r"nothing else, but got \['Smooth'\]"):
        Signature([Smooth.gauss(1.0)])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match=r"`probes` to be probes of different names.*Pass `name=`"):
        Signature([CounterAttack(), CounterAttack(steps=(0.1,))])
    with pytest.raises(UnknownNameError, match="`leading` to be one of 'counter-attack', but got 'denoising'"):
        Signature([CounterAttack()], leading=["denoising"])
    for leading in ((), "counter-attack"):
        with pytest.raises(ArgumentError, match="`leading` to be one or more names of probes, or None"):
            Signature([CounterAttack()], leading=leading)
    assert Signature([CounterAttack()], leading=["counter-attack"]) != Signature([CounterAttack()])
    assert quick_signature() != Signature([CounterAttack()])
    assert repr(Signature([CounterAttack()])).startswith("Signature([CounterAttack(steps=[]")
