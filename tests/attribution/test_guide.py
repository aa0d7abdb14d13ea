"""The gradient that guides a smooth map: what it is, when there is none, and that it changes nothing else."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.attribution import _estimation
from ce_plugin.designs import Design, FirstOrder, LeaveOneIn, OneAtATime, RandomMask, RandomRegions
from ce_plugin.effects.smooth import smooth
from ce_plugin.errors import ArgumentError, DesignError, InferenceError, ModelError, UnknownNameError
from ce_plugin.interventions import Adversarial, PixelMask
from ce_plugin.sites import Evidence

DOUBLE = torch.float64


def network() -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    )
    return net.eval().double()


def images(n: int = 2, size: int = 16) -> Tensor:
    return torch.rand(n, 1, size, size, dtype=DOUBLE, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("outcome", ["logit", "probability", "log_odds"])
def test_the_guide_is_minus_gradient_times_activation(outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooled and weighed afterwards, the last value's first-order effect is known: weights times activations."""
    seen: list[Tensor] = []

    def watched(*args: Any, guide: Tensor, **kwargs: Any) -> Any:
        seen.append(guide)
        return smooth(*args, guide=guide, **kwargs)

    monkeypatch.setattr(_estimation, "smooth", watched)
    net, x = network(), images()
    target = net(x).argmax(1)
    CausalEffect(net, design=RandomRegions(n_trials=24), outcome=outcome).attribute(x)
    with torch.no_grad():
        planes, logits = net[:5](x), net(x)
    weights = net[7].weight.detach()[target]
    if outcome != "logit":  # log p - log (1 - p) is the logit minus the logarithm of the others' sum
        others = logits.clone().scatter_(1, target[:, None], -torch.inf).softmax(1)
        weights = weights - others @ net[7].weight.detach()
    expected = (planes * weights[:, :, None, None]).sum(1, keepdim=True)
    expected = interpolate(expected, (14, 14), mode="bilinear", align_corners=False)[:, 0].flatten(1)
    for guide, map_ in zip(seen[-2:], expected, strict=True):
        own, wanted = -guide[:, 0], map_
        assert torch.allclose(own / own.abs().max(), wanted / wanted.abs().max(), atol=1e-9)


def test_attribute_is_the_map_of_the_predicted_class_in_estimate() -> None:
    net, x = network(), images()
    explainer = CausalEffect(net, design=RandomRegions(n_trials=40))
    estimate = explainer.estimate(x)
    predicted = estimate.predicted
    own = estimate.smoothed_contribution[torch.arange(2), :, predicted]
    target = explainer.estimate(x, target=predicted)
    assert torch.allclose(target.smoothed_contribution[:, :, 0], own, atol=1e-9)
    assert torch.allclose(target.effect[:, :, 0], estimate.effect[torch.arange(2), :, predicted], atol=1e-9)
    assert estimate.settings["guide"] == "gradient"


def test_examples_have_guides_of_their_own() -> None:
    net, x = network(), images(3)
    explainer = CausalEffect(net, design=RandomRegions(n_trials=12))
    together = explainer.attribute(x, ids=[4, 5, 6])
    for i in range(3):
        assert torch.allclose(explainer.attribute(x[i : i + 1], ids=[4 + i])[0], together[i], atol=1e-8)


def test_effects_stay_unbiased_whatever_the_guide_says() -> None:
    """A network of which one half shouts in the gradient and does nothing under the fill."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1, bias=False)
            self.conv.weight.data.fill_(1.0)

        def forward(self, v: Tensor) -> Tensor:
            h = self.conv(v)
            loud = h[:, 0, :, :7].sum((1, 2)) - h[:, 0, :, :7].detach().sum((1, 2))  # a slope without a value
            return (h[:, 0, 6, 10] + 5 * loud)[:, None].expand(-1, 2)

    x, covered = torch.ones(1, 1, 14, 14, dtype=DOUBLE), []
    for run in range(40):
        explainer = CausalEffect(
            Half().double(), PixelMask("zero"), RandomRegions(n_trials=60, independent=0.4), outcome=None
        )
        found = explainer.estimate(x, target=0, ids=[run])
        low, high = found.confidence_interval(0.95)
        truth = torch.zeros(196, dtype=DOUBLE)
        truth[6 * 14 + 10] = -1.0
        covered.append(((low[0, :, 0] <= truth) & (truth <= high[0, :, 0])).double())
    assert 0.92 < float(torch.stack(covered).mean()) < 0.99


@pytest.mark.parametrize("batch", [1, 2])
def test_passes_are_counted(batch: int) -> None:
    net, x = network(), images(batch)
    counts = {}
    CausalEffect(net, design=RandomRegions(n_trials=30)).estimate(x)  # finds the network's memory layout
    for guide in ("gradient", None):
        explainer = CausalEffect(net, design=RandomRegions(n_trials=30), guide=guide)  # type: ignore[arg-type]
        counts[guide] = explainer.estimate(x, target=0).cost, explainer.estimate_cost(x, target=0).forward_passes
    # A pass and a backward pass, which counts as two, for each example.
    assert [a - b for a, b in zip(counts["gradient"], counts[None], strict=True)] == [3 * batch] * 2


@pytest.mark.parametrize("passes", [12, 40, 100])
def test_a_budget_of_passes_is_kept(passes: int) -> None:
    net, x = network(), images(1)
    explainer = CausalEffect(net)
    explainer.estimate(x)  # finds the network's memory layout
    found = explainer.estimate(x, passes=passes)
    assert found.cost == passes
    assert found.n_trials == passes - 6
    assert (found.std_error is None) == (passes < 36)
    assert torch.equal(explainer.attribute(x, passes=passes), explainer.attribute(x, passes=passes))
    plain = CausalEffect(net, design=RandomMask(0.3, 77, balanced=True, seed=4)).estimate(x, passes=passes)
    assert plain.design == repr(RandomMask(0.3, passes - 3, balanced=True, seed=4))


def test_the_search_for_a_memory_layout_is_beside_the_budget() -> None:
    net, x = network(), images(1)
    found = [CausalEffect(net).estimate(x, passes=passes) for passes in (20, 60, 60)]
    assert [one.cost for one in found] == [20, 62, 60]
    assert torch.equal(found[1].effect, found[2].effect)


def test_budgets_that_cannot_be_kept_are_refused() -> None:
    net, x = network(), images(1)
    for passes in (2, 0, -3, 2.5, "many", True):
        with pytest.raises(ArgumentError, match="`passes` to be None or an integer, at least 3"):
            CausalEffect(net).attribute(x, passes=passes)  # type: ignore[arg-type]
    CausalEffect(net).attribute(x, passes=3)  # what the hint says works
    with pytest.raises(ArgumentError, match="`passes` to be None or an integer, at least 9"):
        CausalEffect(net, guide=None).attribute(x, passes=8)
    CausalEffect(net, guide=None).attribute(x, passes=9)
    paired = CausalEffect(net, PixelMask("zero"), RandomMask(0.5, 40, antithetic=True)).estimate(x, passes=20)
    assert paired.n_trials == 16
    with pytest.raises(DesignError, match=r"number of trials can be chosen, but got OneAtATime.*Leave out `passes`"):
        CausalEffect(net, PixelMask("zero"), OneAtATime()).attribute(x, passes=100)


class NoGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.net(v)
            return out


class NoPositions(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return v.flatten(1)[:, :2]


@pytest.mark.parametrize("make", [NoGradient, NoPositions])
def test_without_a_gradient_trials_alone_answer(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    net, x = make(), images()
    with caplog.at_level(logging.INFO, logger="ce_plugin"):
        found = CausalEffect(net, design=RandomRegions(n_trials=40)).estimate(x, target=0)
    assert found.settings["guide"] is None
    assert sum("no gradient guides the map" in record.message for record in caplog.records) == 1
    plain = CausalEffect(net, design=RandomRegions(n_trials=40), guide=None).estimate(x, target=0)
    assert torch.equal(found.smoothed, plain.smoothed)


def test_only_masks_on_regions_are_guided() -> None:
    net, x = network(), images()
    attack = Adversarial.fgsm(net, eps=0.1, clip_values=(0, 1))
    for explainer in (
        CausalEffect(net, PixelMask("zero"), RandomMask(0.5, n_trials=40)),
        CausalEffect(net, PixelMask("zero"), OneAtATime()),
        CausalEffect(net, attack, RandomRegions(n_trials=40)),
        CausalEffect(lambda v: v.flatten(1)[:, :3].exp(), design=RandomRegions(n_trials=40)),
    ):
        assert explainer.estimate(x, target=0).settings["guide"] is None


def test_the_network_is_as_it_was() -> None:
    net, x = network(), images()
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    kept, state = net[0].weight.grad, torch.get_rng_state()
    with torch.inference_mode():
        inferred = CausalEffect(net, design=RandomRegions(n_trials=40)).attribute(x, target=0)
    CausalEffect(net, design=RandomRegions(n_trials=40)).attribute(x, target=0)
    assert torch.equal(inferred, CausalEffect(net, design=RandomRegions(n_trials=40)).attribute(x, target=0))
    assert net[0].weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert not x.requires_grad


def test_unknown_guides_are_refused() -> None:
    for guide in ("saliency", 3, ("gradient",)):
        with pytest.raises(UnknownNameError, match="`guide`"):
            CausalEffect(network(), guide=guide)  # type: ignore[arg-type]


@pytest.mark.parametrize("outcome", ["logit", "log_odds", "probability"])
def test_first_order_effects_are_those_of_the_last_value(outcome: str) -> None:
    """On a 14 x 14 value a unit is a position: the slope of the outcome as this position alone is scaled down."""
    net, x = network(), images(2, 28)
    found = CausalEffect(net, design=FirstOrder(), outcome=outcome).estimate(x)
    assert (found.cost, found.n_trials, found.std_error) == (2 * 3, 0, None)
    assert found.effect.shape == (2, 196, 1)
    with torch.no_grad():
        value, target = net[:5](x), net(x).argmax(1)
        for i, unit in ((0, 0), (0, 77), (1, 195)):
            small = value[i : i + 1].clone()
            small[0, :, unit // 14, unit % 14] *= 1 - 1e-6
            ends = []
            for one in (value[i : i + 1], small):
                logits = net[5:](one)[0]
                p = logits.softmax(0)[target[i]]
                ends.append({"logit": logits[target[i]], "log_odds": p.logit(), "probability": p}[outcome])
            slope = (ends[1] - ends[0]) / 1e-6
            assert torch.allclose(found.effect[i, unit, 0], slope, rtol=1e-4, atol=1e-12)
    with pytest.raises(InferenceError):
        found.significant()
    given = CausalEffect(net, design=FirstOrder(), outcome=outcome).estimate(x, target=[1, 2])
    assert given.target is not None
    assert given.target.tolist() == [1, 2]


def test_few_passes_leave_the_gradient_alone() -> None:
    net, x = network(), images()
    one, other = CausalEffect(net), CausalEffect(net, design=FirstOrder())
    for passes in (3, 11):
        assert torch.equal(one.attribute(x, passes=passes), other.attribute(x))
    assert one.estimate(x, passes=12).n_trials == 6
    assert other.estimate_cost(x).forward_passes == 6
    assert [len(other.estimate(x[:n]).effect) for n in (1, 2)] == [1, 2]
    assert torch.allclose(other.attribute(x)[1:], other.attribute(x[1:]))


def test_where_there_is_no_gradient_few_passes_are_refused() -> None:
    x = images()
    no_positions = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).double()
    cut = nn.Sequential(network(), Detached())
    for net in (no_positions, cut):
        with pytest.raises(ModelError, match="Take 12 passes or more"):
            CausalEffect(net).attribute(x, passes=3)
        CausalEffect(net).attribute(x, passes=12)  # what the hint says works
    with pytest.raises(DesignError, match="one with trials"):
        LayerCausalEffect(network(), "0", design=FirstOrder()).estimate(x)
    with pytest.raises(DesignError, match="one with trials"):
        CausalEffect(network(), Adversarial.fgsm(network(), eps=0.1), FirstOrder()).estimate(x)
    with pytest.raises(DesignError, match="not a grid"):
        CausalEffect(network(), design=FirstOrder()).attribute(x, feature_mask=torch.arange(256).reshape(1, 1, 16, 16))


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def test_updates_show_the_map_converging() -> None:
    net, x = network(), images()
    explainer, told = CausalEffect(net), []
    last = explainer.attribute(x, passes=100, on_update=lambda map_, passes: told.append((map_, passes)))
    assert [passes for _, passes in told] == [18, 30, 54, 100]
    assert torch.equal(told[-1][0], last)
    assert torch.allclose(last, explainer.attribute(x, passes=100), atol=1e-9)
    distances = [float((map_ - last).norm()) for map_, _ in told]
    assert distances[0] > distances[2] > 0
    # So many trials alone: a prefix of a design is a small design of the same kind.
    first = CausalEffect(net, design=RandomRegions(n_trials=94)).estimate
    estimates: list[Any] = []
    first(x, target=0, on_update=lambda estimate, passes: estimates.append(estimate))
    assert [one.settings["trials_per_example"] for one in estimates] == [[n, n] for n in (12, 24, 48, 94)]


@pytest.mark.parametrize(
    ("design", "trials"), [(RandomMask(0.5, 100), [24, 48, 96, 100]), (OneAtATime(), [196]), (LeaveOneIn(), [196])]
)
def test_updates_of_other_designs(design: Design, trials: list[int]) -> None:
    seen: list[int] = []
    explainer = CausalEffect(network(), PixelMask("zero"), design)
    explainer.estimate(images(1), target=0, on_update=lambda found, passes: seen.append(found.n_trials))
    assert seen == trials


def test_updates_of_random_evidence_are_of_the_draws_so_far() -> None:
    net, x, told = network(), images(1), []
    given = Evidence(PixelMask("zero"), units=RandomMask(0.2, 2))
    explainer = CausalEffect(net, design=RandomRegions(n_trials=24))
    found = explainer.estimate(x, target=0, given=given, on_update=lambda one, passes: told.append(one.effect))
    assert len(told) == 3  # of each draw at 12 trials, and of all trials
    assert torch.equal(told[-1], found.effect)
    assert not torch.allclose(told[0], told[1])
    with pytest.raises(ArgumentError, match="`on_update` to be None or a function"):
        explainer.attribute(x, on_update=3)  # type: ignore[arg-type]
