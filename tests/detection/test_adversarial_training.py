"""Adversarially trained denoisers: worst neighbours of linear networks in closed form, bounds, and what it is for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _toy import classifier, patterns, same, snapshot
from torch import Tensor, nn

from ce_plugin.detection import Denoising, Signature
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.denoiser import Bounds, Denoiser, train_denoiser, worst_nearby
from ce_plugin.errors import ArgumentError


def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_worst_neighbour_of_a_linear_network_of_two_classes_is_a_corner() -> None:
    """log p(0) falls along the sign of the difference of the two rows, whatever the start."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double()
    x = 0.5 + 0.05 * torch.randn(4, 1, 3, 3, dtype=torch.float64, generator=random())
    answers, bounds = torch.tensor([0, 1, 0, 1]), torch.tensor([0.1, 0.2, 0.0, 0.05])
    found = worst_nearby(net, x, answers, bounds, (0.0, 1.0), random())
    away = (net[1].weight[1] - net[1].weight[0]).sign().detach().reshape(1, 1, 3, 3)
    way = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()[:, None, None, None]
    torch.testing.assert_close(found, x + bounds.double()[:, None, None, None] * way * away)
    assert not found.requires_grad


def test_neighbours_stay_inside_bound_and_range() -> None:
    net = classifier()
    x = torch.as_tensor(patterns(6)[0]).double()
    bounds = torch.linspace(0, 0.9, 6)
    found = worst_nearby(net, x, net(x).argmax(1), bounds, (0.0, 1.0), random())
    change = (found - x).abs().flatten(1).amax(1)
    assert bool((change <= bounds + 1e-9).all())
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert torch.equal(found[0], x[0])


def test_bounds_grow_while_answers_hold_and_shrink_when_they_fall() -> None:
    bounds, rows = Bounds(4, 0.3), torch.tensor([3, 1])
    for _ in range(20):
        bounds.update(rows, torch.tensor([True, False]))
    torch.testing.assert_close(bounds.of(torch.arange(4)), torch.tensor([0.02, 0.0, 0.02, 0.3]))
    bounds.update(rows, torch.tensor([False, True]))
    torch.testing.assert_close(bounds.of(rows), torch.tensor([0.28, 0.02]))


def test_hardening_makes_the_network_behind_the_denoiser_robust_and_leaves_no_trace() -> None:
    net = classifier(dtype=torch.float32).train()
    protected, x = ClassifierWrapper(net), torch.as_tensor(patterns(240)[0])
    before = snapshot(net)
    options = {"width": 8, "n_steps": 100, "batch_size": 32, "seed": 3}
    plain = train_denoiser(protected, x, **options)  # type: ignore[arg-type]
    hardened = train_denoiser(protected, x, eps=0.1, **options)  # type: ignore[arg-type]
    assert same(before, snapshot(net))
    new = torch.as_tensor(patterns(120, seed=5)[0])
    answers = net.eval()(new).argmax(1)

    def kept(denoiser: Denoiser) -> float:
        """Share of images whose answer survives a change of up to 0.05."""

        def run(images: Tensor) -> Tensor:
            logits: Tensor = net(denoiser(images))
            return logits

        worst = worst_nearby(run, new, answers, torch.full((len(new),), 0.05), (0.0, 1.0), random())
        return float((run(worst).argmax(1) == answers).float().mean())

    assert kept(hardened) > 0.9
    assert kept(plain) < 0.7
    clean = [F.cross_entropy(net(denoiser(new)), answers).item() for denoiser in (plain, hardened)]
    assert clean[1] < clean[0] + 0.3


def test_without_a_bound_nothing_is_hardened_and_no_draw_is_lost() -> None:
    protected, x = ClassifierWrapper(classifier(dtype=torch.float32)), torch.as_tensor(patterns(40)[0])
    one, other = (train_denoiser(protected, x, width=2, n_steps=3, eps=eps, seed=3) for eps in (0.0, 0.1))
    again = train_denoiser(protected, x, width=2, n_steps=3, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.fine.weight, other.fine.weight)


def test_the_probe_keeps_its_bound() -> None:
    probe = Denoising(width=2, least_steps=2, eps=0.1, name="hardened denoising")
    assert Signature.from_settings(Signature([probe]).settings()) == Signature([probe])
    assert probe.interventions() == ["hardened denoising"]
    assert probe.ranges() == []
    old = {name: value for name, value in probe.settings().items() if name != "eps"}
    assert Denoising(**old).eps == 0.0  # files that were written before there was a bound


@pytest.mark.parametrize("eps", [-0.1, float("inf"), float("nan")])
def test_a_bound_that_cannot_be_is_refused(eps: float) -> None:
    with pytest.raises(ArgumentError, match="Expected argument `eps` to be a size in image units, 0 or more"):
        Denoising(eps=eps)
