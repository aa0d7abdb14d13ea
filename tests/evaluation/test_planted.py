"""Planted networks: their stated effects against closed forms and a plain loop over all assignments."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError
from ce_plugin.evaluation.planted import PlantedNetwork, expected_effects


def network(units: int = 5, classes: int = 3, **changes: object) -> PlantedNetwork:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.double)

    return PlantedNetwork(
        draw(units, classes),
        [(0, 1), (1, 3)],
        draw(2, classes),
        hidden=(draw(units, 4), draw(4, classes)),
        bias=draw(classes),
        **changes,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("outcome", [None, "probability", "prediction_weighted"])
def test_expected_effects_are_those_of_a_plain_loop(p: float, outcome: str | None) -> None:
    net = network()
    reference = net(torch.ones(1, 5, dtype=torch.double)).softmax(1)

    def measure(x: Tensor) -> Tensor:
        z = net(x[None])
        if outcome == "probability":
            return z.softmax(1)[0]
        return ((z.softmax(1) - reference) * reference).sum(1) if outcome else z[0]

    want = []
    for unit in range(5):
        total: Tensor | float = 0.0
        for others in itertools.product((0, 1), repeat=4):
            row = torch.tensor([*others[:unit], 0, *others[unit:]], dtype=torch.double)
            do, idle = 1 - row, 1 - row
            do[unit], idle[unit] = 0.0, 1.0
            chance = p ** sum(others) * (1 - p) ** (4 - sum(others))
            total = total + chance * (measure(do) - measure(idle))
        want.append(total)
    torch.testing.assert_close(expected_effects(net, p, outcome), torch.stack(want), atol=1e-12, rtol=0)  # type: ignore[arg-type]


def test_closed_form_with_interactions() -> None:
    g = torch.Generator().manual_seed(1)
    main, strength = torch.randn(4, 2, generator=g), torch.randn(2, 2, generator=g)
    got = expected_effects(PlantedNetwork(main, [(0, 1), (1, 2)], strength), 0.3)
    want = -main.double()
    want[0] -= 0.7 * strength[0]
    want[1] -= 0.7 * (strength[0] + strength[1])
    want[2] -= 0.7 * strength[1]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_centred_interactions_have_no_main_effect_at_their_p() -> None:
    null = PlantedNetwork(torch.zeros(4, 1), [(0, 1), (2, 3)], torch.ones(2, 1), centre=0.7)
    assert expected_effects(null, 0.3).abs().max() < 1e-7
    assert expected_effects(null, 0.5).abs().max() > 0.1


def test_units_that_do_not_matter_cost_nothing() -> None:
    main = torch.zeros(1000, 1)
    main[[3, 700]] = torch.tensor([[1.0], [-2.0]])
    net = PlantedNetwork(main, [(5, 6)], torch.ones(1, 1))
    assert net.active == [3, 5, 6, 700]
    got = expected_effects(net, 0.5)
    assert got[[3, 5, 6, 700, 8]].flatten().tolist() == [-1.0, -0.5, -0.5, 2.0, 0.0]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="at most 16 active units, but got 17"):
        expected_effects(PlantedNetwork(torch.ones(17, 1)), 0.5)
    with pytest.raises(ArgumentError, match=r"`p` to be in \[0, 1\]"):
        expected_effects(network(), 1.5)
    with pytest.raises(ArgumentError, match="strength"):
        PlantedNetwork(torch.ones(2, 1), [(0, 1)], torch.ones(1, 2))
