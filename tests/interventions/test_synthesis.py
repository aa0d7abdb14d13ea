"""ClassVisualization: ascent in closed form on linear networks, independence of the batch, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ce_plugin import CausalEffect
from ce_plugin.designs import OneAtATime
from ce_plugin.errors import ArgumentError, AttackError, InputError, TargetError, UnknownNameError
from ce_plugin.interventions import ClassVisualization


def linear(side: int = 4) -> nn.Sequential:
    """Three classes whose logits are linear in the pixels."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(side * side, 3))
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(3, side * side, generator=torch.Generator().manual_seed(0)))
    return network


def images(n: int = 2, side: int = 4) -> Tensor:
    return 0.4 + 0.2 * torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(1))


def test_a_step_on_a_linear_network_goes_along_its_weights() -> None:
    network, x = linear(), images()
    weight = network[1].weight[2].detach().reshape(1, 4, 4)
    step = 0.01 * weight / weight.square().mean().sqrt()
    found = ClassVisualization(network, 2, steps=7, lr=0.01, l2=0, blur_every=0, jitter=0)(x)
    torch.testing.assert_close(found, (x + 7 * step).clamp(0, 1), atol=1e-6, rtol=0)


def test_regularised_ascent_ends_where_the_gradient_is_zero() -> None:
    """z_c = w x, J = w x - l2 mean((2 x - 1)^2): the optimum is x = 1/2 + n w / (8 l2)."""
    network, l2 = linear(), 20.0
    weight = network[1].weight[0].detach().reshape(1, 1, 4, 4)
    optimum = (0.5 + weight.numel() * weight / (8 * l2)).clamp(0, 1)
    found = ClassVisualization(network, 0, steps=400, lr=0.002, l2=l2, blur_every=0, jitter=0)(images(1))
    assert float((found - optimum).abs().max()) < 0.02


def test_jitter_moves_the_gradient_back() -> None:
    """On a network that sums all pixels a shift changes nothing."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    nn.init.constant_(network[1].weight, 0.5)
    settings = {"steps": 5, "lr": 0.01, "l2": 3.0, "blur_every": 0}
    still, moved = (ClassVisualization(network, 1, jitter=j, **settings)(images()) for j in (0, 3))  # type: ignore[arg-type]
    torch.testing.assert_close(still, moved, atol=1e-6, rtol=0)


def test_units_are_those_of_images() -> None:
    """With a normalisation the same image comes out, in the model's units."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * 0.25 + 0.5)

    settings = {"steps": 6, "jitter": 1, "clip_values": (0.0, 1.0)}
    plain = ClassVisualization(linear(), 1, **settings)(images())  # type: ignore[arg-type]
    scaled = ClassVisualization(Scaled(), 1, normalization=(0.5, 0.25), **settings)((images() - 0.5) / 0.25)  # type: ignore[arg-type]
    torch.testing.assert_close(scaled * 0.25 + 0.5, plain, atol=1e-5, rtol=0)


def test_results_depend_on_seed_and_id_alone() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    make, x = ClassVisualization(network, 0, steps=4, start="noise", jitter=2), images(3, 8)
    together = make.perturb(x, ids=[5, 6, 7])
    torch.testing.assert_close(make.perturb(x[1:2], ids=[6]), together[1:2])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(make.perturb(x, ids=[5, 6, 7], seed=1), together)


def test_frames_end_in_what_do_sets_and_begin_at_the_start() -> None:
    make, x = ClassVisualization(linear(), 0, steps=5), images()
    frames = make.frames(x, every=2)
    assert frames.shape == (4, *x.shape)
    torch.testing.assert_close(frames[0], x)
    torch.testing.assert_close(frames[-1], make(x))


def test_it_is_an_intervention_like_any_other_and_leaves_the_network_alone() -> None:
    """Pixel by pixel on a linear network: effect = weight times change, on every class."""
    network, x = linear().train(), images()
    network[1].weight.grad = torch.ones_like(network[1].weight)
    before = torch.get_rng_state()
    make = ClassVisualization(network, 2, steps=3, jitter=0)
    found = CausalEffect(network, make, OneAtATime(), outcome="logit").estimate(x)
    by_hand = network[1].weight.T * (make(x) - x).flatten(1)[:, :, None]
    torch.testing.assert_close(found.effect, by_hand.detach(), atol=1e-5, rtol=0)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert torch.equal(network[1].weight.grad, torch.ones_like(network[1].weight))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gradient_of_zero_changes_nothing() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    nn.init.zeros_(network[1].weight)
    torch.testing.assert_close(ClassVisualization(network, 0, l2=0, blur_every=0)(images()), images())


def test_errors() -> None:
    network = linear()
    for name, value in (("steps", 0), ("jitter", -1), ("blur_every", -1), ("target_class", -1)):
        with pytest.raises(ArgumentError, match=f"argument `{name}`"):
            ClassVisualization(network, **{"target_class": 0, name: value})
    for name, value in (("lr", 0.0), ("l2", -1.0), ("blur_sigma", 0.0), ("l2", float("nan"))):
        with pytest.raises(ArgumentError, match=f"argument `{name}`"):
            ClassVisualization(network, 0, **{name: value})
    with pytest.raises(UnknownNameError, match="`start`"):
        ClassVisualization(network, 0, start="nois")
    with pytest.raises(AttackError, match="`model`"):
        ClassVisualization(lambda x: x, 0)
    with pytest.raises(TargetError, match="`target_class` to be a class in 0 to 2, but got 3"):
        ClassVisualization(network, 3)(images())
    with pytest.raises(InputError, match=r"float images \(N, C, H, W\)"):
        ClassVisualization(network, 0)(images()[0])
