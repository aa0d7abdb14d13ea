"""Mediation through a layer: planted truth, brute force, carriers on other images, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ce_plugin import CausalMediation, LayerCausalEffect
from ce_plugin.errors import ArgumentError, InferenceError, InputError
from ce_plugin.interventions import PixelMask


class Bypassed(nn.Module):
    """Y = sum_u w_u m_u + 2 x + 3 x m_0 with m_u = a_u x: every quantity is known."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 1, bias=False)
        self.layer.weight = nn.Parameter(torch.tensor([1.0, -1.0, 0.5, 2.0]).reshape(4, 1, 1, 1))
        self.weight = nn.Parameter(torch.tensor([2.0, 1.0, -1.0, 0.25]))

    def forward(self, x: Tensor) -> Tensor:
        m, s = self.layer(x).mean((2, 3)), x.mean((1, 2, 3))
        return ((m @ self.weight) + 2 * s + 3 * s * m[:, 0])[:, None]


@pytest.mark.parametrize("engine", ["auto", "full"])
def test_all_four_quantities_of_a_planted_network(engine: Any) -> None:
    net = Bypassed().double().eval()
    x = torch.rand(5, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x1 = x + torch.linspace(0.5, 1.5, 5, dtype=torch.float64).reshape(5, 1, 1, 1)
    found = CausalMediation(net, "layer", x1, outcome=None, engine=engine).estimate(x)
    a, w = torch.tensor([1.0, -1.0, 0.5, 2.0]).double(), torch.tensor([2.0, 1.0, -1.0, 0.25]).double()
    s, s1 = x.mean((1, 2, 3)), x1.mean((1, 2, 3))

    def outcome(s: Tensor, m: Tensor) -> Tensor:
        return m @ w + 2 * s + 3 * s * m[:, 0]

    m, m1 = s[:, None] * a, s1[:, None] * a
    total = outcome(s1, m1) - outcome(s, m)
    torch.testing.assert_close(found.total[:, 0], total)
    for u in range(4):
        mixed, other = m.clone(), m1.clone()
        mixed[:, u], other[:, u] = m1[:, u], m[:, u]
        indirect, direct = outcome(s, mixed) - outcome(s, m), outcome(s1, other) - outcome(s, m)
        torch.testing.assert_close(found.indirect[:, u, 0], indirect)
        torch.testing.assert_close(found.direct[:, u, 0], direct)
        torch.testing.assert_close(found.interaction[:, u, 0], total - indirect - direct)
    assert not found.cut
    assert found.interaction.abs().max() > 0.1
    every = CausalMediation(net, "layer", x1, outcome=None).estimate(x, sets=[(1,), range(4)])
    assert every.whole == (1,)
    torch.testing.assert_close(every.indirect[:, 1, 0], outcome(s, m1) - outcome(s, m))


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).double().eval()


def test_a_cut_layer_is_labelled_and_has_share_one(net: nn.Sequential) -> None:
    x = torch.rand(12, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # The logit that moves most, so that there is a total effect to have a share of.
    moved = (net(PixelMask("zero").perturb(x)) - net(x)).mean(0).abs()
    target = int(moved.argmax())
    found = CausalMediation(net, "1", PixelMask("zero")).estimate(x, target=target, sets=[range(8), (0, 1)])
    assert found.cut
    assert found.whole == (0,)
    shares = found.share()
    torch.testing.assert_close(shares.indirect[0].double(), torch.tensor(1.0).double())
    assert "cut" in repr(found)


def test_indirect_effects_are_those_of_patching(net: nn.Sequential) -> None:
    from ce_plugin.interventions import Patch

    x, mask = torch.rand(4, 1, 6, 6, dtype=torch.float64), PixelMask(0.5)
    found = CausalMediation(net, "1", mask).estimate(x)
    patched = LayerCausalEffect(net, "1", Patch(mask), outcome="logit").estimate(x)
    torch.testing.assert_close(found.indirect, patched.effect)
    torch.testing.assert_close(found.total, (net(mask.perturb(x)) - net(x)).detach())
    single = CausalMediation(net, "1", mask).estimate(x[2:3])
    torch.testing.assert_close(single.direct, found.direct[2:3])


def test_carriers_are_chosen_on_other_images(net: nn.Sequential) -> None:
    with torch.no_grad():  # channels 5 and 2 carry nearly everything
        net[3].weight.mul_(0.01)
        net[3].weight[:, 5 * 16 : 6 * 16] = 1.0
        net[3].weight[:, 2 * 16 : 3 * 16] = 0.8
        net[0].weight.abs_()
    x = torch.rand(40, 1, 6, 6, dtype=torch.float64)
    found = CausalMediation(net, "1", PixelMask("zero")).carriers(x[:20], x[20:])
    assert set(found.order[:2]) == {2, 5}
    assert found.needed[0.9] == 2
    assert found.n_images == 20


def test_bad_input(net: nn.Sequential) -> None:
    x = torch.rand(4, 1, 6, 6, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="intervention"):
        CausalMediation(net, "1", "pgd")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="counterparts"):
        CausalMediation(net, "1", x[:2]).estimate(x)
    with pytest.raises(InferenceError):
        CausalMediation(net, "1", x).estimate(x, target=0).share()
