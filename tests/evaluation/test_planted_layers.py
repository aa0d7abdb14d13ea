"""Planted layers: their closed forms against brute force, with hooks that set the layer's value."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ce_plugin.effects import MediationEffects, mediation_effects
from ce_plugin.errors import ArgumentError, UnitError, UnknownNameError
from ce_plugin.evaluation import PlantedInteraction, PlantedMediation, mediation_truth

SETS = [(0,), (1,), (4,), (0, 1), (0, 2, 3), (1, 2, 3, 4), (0, 1, 2, 3, 4)]


def images(n: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 4, 4, generator=g).double(), torch.randn(n, 2, 4, 4, generator=g).double()


def under(net: nn.Module, layer: nn.Module, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The network's output on x with the layer's value changed."""
    handle = layer.register_forward_hook(lambda module, args, out: change(out))
    try:
        with torch.no_grad():
            out: Tensor = net(x)
    finally:
        handle.remove()
    return out


def brute_force(net: PlantedMediation, x: Tensor, x1: Tensor, sets: list[tuple[int, ...]]) -> MediationEffects:
    with torch.no_grad():
        h, h1 = net.mediator(x), net.mediator(x1)

    def put(value: Tensor, one: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        def change(out: Tensor) -> Tensor:
            out = out.clone()
            out[:, list(one)] = value[:, list(one)]
            return out

        return change

    mediated = torch.stack([under(net, net.mediator, x, put(h1, one)) for one in sets], dim=1)
    blocked = torch.stack([under(net, net.mediator, x1, put(h, one)) for one in sets], dim=1)
    with torch.no_grad():
        return mediation_effects(net(x), net(x1), mediated, blocked)


@pytest.mark.parametrize("bypass", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_closed_forms_are_those_of_brute_force(bypass: bool, seed: int) -> None:
    net = PlantedMediation(5, 3, bypass=bypass, seed=seed).double()
    x, x1 = images(seed=seed)
    found, truth = brute_force(net, x, x1, SETS), mediation_truth(net, x, x1, SETS)
    for name in MediationEffects._fields:
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), atol=1e-9, rtol=0)


def test_no_quantity_is_trivial() -> None:
    """All four differ from 0 and from each other, for single channels and for sets that split a pair."""
    x, x1 = images()
    truth = mediation_truth(PlantedMediation(5, 3), x, x1, SETS)
    for part in (truth.indirect, truth.direct, truth.interaction):
        assert part.abs().amax(dim=(0, 2)).min() > 0.05
    alone = mediation_truth(PlantedMediation(5, 3), x, x1, [(0,), (1,), (0, 1)]).indirect
    assert (alone[:, 2] - alone[:, 0] - alone[:, 1]).abs().max() > 0.05


def test_everything_passes_through_a_cut() -> None:
    x, x1 = images()
    truth = mediation_truth(PlantedMediation(5, 3, bypass=False), x, x1, SETS)
    torch.testing.assert_close(truth.indirect[:, -1], truth.total, atol=1e-12, rtol=0)
    torch.testing.assert_close(truth.direct[:, -1], torch.zeros_like(truth.total), atol=1e-12, rtol=0)
    around = mediation_truth(PlantedMediation(5, 3), x, x1, SETS)
    assert (around.indirect[:, -1] - around.total).abs().max() > 0.1


def test_truth_is_that_of_float64_and_leaves_the_network_alone() -> None:
    net, (x, x1) = PlantedMediation(), images()
    state = torch.get_rng_state()
    single = mediation_truth(net, x.float(), x1.float())
    double = mediation_truth(PlantedMediation().double(), x.float(), x1.float())
    assert torch.equal(single.indirect, double.indirect)
    assert net.main.dtype == torch.float32
    assert torch.equal(state, torch.get_rng_state())
    assert single.indirect.shape == (3, 6, 3)  # each channel by itself


def planted_outcomes(net: PlantedInteraction, rows: Tensor) -> Tensor:
    """Outcomes (R, 2) with the rows' channels zeroed by a hook."""
    x = torch.rand(1, 1, 4, 4, dtype=torch.double, generator=torch.Generator().manual_seed(3)).expand(
        len(rows), -1, -1, -1
    )
    return under(net, net.layer, x, lambda h: h * (1 - rows)[:, :, None, None])


@pytest.mark.parametrize("gate", ["product", "relu"])
def test_the_pair_does_nothing_alone_and_its_strength_together(gate: str) -> None:
    net = PlantedInteraction(30, (4, 21), -2.0, gate=gate).double()
    y0 = planted_outcomes(net, torch.zeros(1, 30).double())
    single = planted_outcomes(net, torch.eye(30).double()) - y0
    assert single[[4, 21]].abs().max() < 1e-12
    assert single.abs().max() > 0.5  # the haystack is there
    pairs = list(itertools.combinations(range(30), 2))
    rows = torch.zeros(len(pairs), 30).double()
    for row, pair in zip(rows, pairs, strict=True):
        row[list(pair)] = 1
    u, v = zip(*pairs, strict=True)
    found = planted_outcomes(net, rows) - y0 - single[list(u)] - single[list(v)]
    place = pairs.index((4, 21))
    torch.testing.assert_close(found[place], torch.tensor([-2.0, 0.0]).double(), atol=1e-12, rtol=0)
    found[place] = 0
    assert 1e-3 < found.abs().max() < 1.0


def test_weights_come_from_the_seed_only() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    nets = [PlantedInteraction(6, (0, 1)), PlantedInteraction(6, (0, 1)), PlantedInteraction(6, (0, 1), seed=1)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(nets[0].main, nets[1].main)
    assert not torch.equal(nets[0].main, nets[2].main)


def test_bad_arguments_are_named() -> None:
    x, x1 = images()
    with pytest.raises(UnitError, match=r"`sets` to be sets of different channels in range\(6\)"):
        mediation_truth(PlantedMediation(), x, x1, [(6,)])
    with pytest.raises(UnitError, match="`sets`"):
        mediation_truth(PlantedMediation(), x, x1, [(0, 0)])
    with pytest.raises(ArgumentError, match="at least 2, 1, 1 and 1, but got"):
        PlantedMediation(channels=1)
    with pytest.raises(UnitError, match=r"`pair` to be two different channels in range\(5\)"):
        PlantedInteraction(5, (1, 1))
    with pytest.raises(UnknownNameError, match="Did you mean 'relu'"):
        PlantedInteraction(5, (1, 2), gate="rel")
