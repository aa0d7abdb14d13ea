"""What a user writes outside the package is first-class: it runs, and what it gave is saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ce_plugin import CausalEffect, Estimate, LayerCausalEffect
from ce_plugin.designs import Design, OneAtATime
from ce_plugin.interventions import Context, Intervention, PixelMask
from ce_plugin.randomness import generator


class Shuffle(Intervention):
    """x' is the image with its pixels in random order."""

    def values(self, clean: Tensor, context: Context) -> Tensor:
        rows = []
        for i, image in enumerate(clean.flatten(2)):
            order = torch.randperm(image.shape[-1], generator=context.generator(i, "shuffle"))
            rows.append(image[:, order])
        return torch.stack(rows).view_as(clean)


class Coins(Design):
    """Each unit flips when its own coin says so."""

    estimator = "difference_in_means"

    def __init__(self, n_trials: int, seed: int = 0) -> None:
        self.n_trials, self.seed = n_trials, seed

    def n_trials_for(self, n_units: int) -> int:
        return self.n_trials

    def assignments(self, n_units: int, *, example: int = 0, grid: object = None) -> Tensor:
        return torch.rand(self.n_trials, n_units, generator=generator(self.seed, example, "coins")) < 0.5


def entropy(output: Tensor, reference_output: Tensor) -> Tensor:
    """How unsure the answer is, in nats."""
    log_p = output.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1, keepdim=True)


def network() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        body = (nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
        return nn.Sequential(*body).double().eval()


def images() -> Tensor:
    return torch.rand(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def saved(estimate: Estimate, folder: Path) -> Estimate:
    estimate.save(folder / "estimate.ce")
    return Estimate.load(folder / "estimate.ce")


def test_an_intervention_of_ones_own(tmp_path: Path) -> None:
    net, x = network(), images()
    estimate = CausalEffect(net, Shuffle(), OneAtATime(), outcome="logit", seed=3).estimate(x)
    shuffled = Shuffle().perturb(x, seed=3)
    for unit in (0, 5, 15):  # straight from the definition: the output with one pixel of the shuffled image
        changed = x.clone()
        changed.view(2, -1)[:, unit] = shuffled.view(2, -1)[:, unit]
        torch.testing.assert_close(estimate.effect[:, unit], net(changed) - net(x))
    assert saved(estimate, tmp_path).equals(estimate)


def test_an_intervention_of_ones_own_at_a_node() -> None:
    net, x = network(), images()
    effect = LayerCausalEffect(net, "0", Shuffle(), outcome="logit", seed=3).estimate(x).effect
    layer = net[0](x)
    shuffled = Shuffle().perturb(layer, seed=3)
    for channel in range(3):
        changed = layer.clone()
        changed[:, channel] = shuffled[:, channel]
        torch.testing.assert_close(effect[:, channel], net[1:](changed) - net(x))


def test_a_design_of_ones_own(tmp_path: Path) -> None:
    estimate = CausalEffect(network(), PixelMask("zero"), Coins(60), outcome="logit").estimate(images()[:1])
    flips, net = Coins(60).assignments(16), network()
    outcomes = net(torch.where(flips.view(60, 1, 4, 4), 0.0, images()[:1]))
    unit = flips[:, 7]
    torch.testing.assert_close(estimate.effect[0, 7], outcomes[unit].mean(0) - outcomes[~unit].mean(0))
    again = saved(estimate, tmp_path)
    assert again.equals(estimate)
    torch.testing.assert_close(again.confidence_interval(0.9), estimate.confidence_interval(0.9), equal_nan=True)


def test_an_outcome_of_ones_own(tmp_path: Path) -> None:
    net, x = network(), images()
    estimate = CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=entropy).estimate(x)
    changed = x.clone()
    changed[..., 2, 1] = 0
    torch.testing.assert_close(estimate.effect[:, 9], entropy(net(changed), net(x)) - entropy(net(x), net(x)))
    assert saved(estimate, tmp_path).equals(estimate)


@pytest.mark.parametrize("wrong", [3, "no outcome of this name"])
def test_what_is_no_outcome_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="outcome"):
        CausalEffect(network(), outcome=wrong)  # type: ignore[arg-type]
