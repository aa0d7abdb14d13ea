"""Exact designs, through CausalEffect, against enumeration of planted networks in float64."""

from __future__ import annotations

import pytest
import torch

from ce_plugin import CausalEffect
from ce_plugin.designs import Design, Joint, LeaveOneIn, OneAtATime, RandomMask
from ce_plugin.effects import adjusted, difference_in_means, half_width, resolve_outcome
from ce_plugin.evaluation.planted import PlantedNetwork, expected_effects
from ce_plugin.interventions import PixelMask

U, C = 8, 3
PAIRS = [(0, 1), (2, 5), (6, 7)]
OUTCOMES = [None, "logit", "probability", "sigmoid", "log_odds", "margin", "prediction_weighted"]


def network(kind: str) -> PlantedNetwork:
    g = torch.Generator().manual_seed(3)
    main = torch.randn(U, C, generator=g, dtype=torch.double)
    strength = 2 * torch.randn(len(PAIRS), C, generator=g, dtype=torch.double)
    inner = torch.randn(U, 6, generator=g, dtype=torch.double)
    outer = torch.randn(6, C, generator=g, dtype=torch.double)
    if kind == "linear":
        return PlantedNetwork(main)
    if kind == "interactions":
        return PlantedNetwork(main, PAIRS, strength)
    return PlantedNetwork(0 * main, hidden=(inner, outer))


def explain(net: PlantedNetwork, design: Design, outcome: str | None) -> CausalEffect:
    return CausalEffect(net, PixelMask("zero"), design, outcome=outcome)


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("kind", ["linear", "interactions", "relu"])
@pytest.mark.parametrize(("design", "p"), [(OneAtATime(), 0.0), (LeaveOneIn(), 1.0)])
def test_single_effects_match_enumeration(design: Design, p: float, kind: str, outcome: str | None) -> None:
    net = network(kind)
    got = explain(net, design, outcome).estimate(torch.ones(1, U, dtype=torch.double))
    want = expected_effects(net, p, outcome)
    assert got.effect.dtype == torch.float64
    assert (got.effect[0] - want).abs().max() < 1e-9
    assert got.std_error is None


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("kind", ["linear", "interactions", "relu"])
def test_joint_effects_and_interactions_match_enumeration(kind: str, outcome: str | None) -> None:
    net, x = network(kind), torch.ones(1, U, dtype=torch.double)
    measure = resolve_outcome(outcome)
    reference = net(x)
    design = Joint([*((u,) for u in range(U)), *PAIRS, (0, 1, 2, 5)])
    got = explain(net, design, outcome).estimate(x)
    single = []
    for g, group in enumerate(design.groups):
        do = x.clone()
        do[:, list(group)] = 0
        effect = measure(net(do), reference) - measure(reference, reference)
        single.append(effect)
        assert (got.effect[:, g] - effect).abs().max() < 1e-9
        interaction = effect - torch.stack([single[u] for u in group]).sum(0)
        assert (got.interaction[:, g] - interaction).abs().max() < 1e-9
    if kind == "interactions" and outcome is None:
        # With all others idle, x_u = 1: the planted strength is the interaction.
        assert (got.interaction[0, U : U + len(PAIRS)] - net.strength).abs().max() < 1e-9


@pytest.mark.parametrize("estimator", ["adjusted", "difference_in_means"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_random_designs_give_what_the_estimator_gives_on_their_trials(estimator: str, antithetic: bool) -> None:
    net = network("interactions")
    design = RandomMask(0.3, n_trials=300, antithetic=antithetic, estimator=estimator, seed=5)
    x = torch.ones(1, U, dtype=torch.double)
    got = explain(net, design, "probability").estimate(x, keep_trials=True)
    a = design.assignments(U)
    y = net(1 - a.double()).softmax(1)
    blocks = design.blocks(300)
    want = adjusted(a, y, 0.3, blocks) if estimator == "adjusted" else difference_in_means(a, y, blocks)
    assert want.std_error is not None
    assert got.std_error is not None
    torch.testing.assert_close(got.effect[0], want.effect, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(got.std_error[0], want.std_error, atol=1e-12, rtol=1e-9)
    inside = (got.effect[0] - expected_effects(net, 0.3, "probability")).abs() <= half_width(want.std_error, want.dof)
    assert inside.double().mean() > 0.8
    pairs = got.pairs(PAIRS)
    assert pairs.effect.shape == (1, len(PAIRS), C)
