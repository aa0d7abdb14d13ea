"""Effects of concepts: the code set by hand, the split into insertion and node, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ce_plugin import ConceptCausalEffect, Evidence, LayerCausalEffect
from ce_plugin.concepts import ConceptAutoencoder
from ce_plugin.errors import ArgumentError, ModelError
from ce_plugin.interventions import PixelMask, ZeroOut
from ce_plugin.sites import ConceptSite, LayerSite


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4))
    return nn.Sequential(*layers).double().eval()


@pytest.fixture
def coder() -> ConceptAutoencoder:
    return ConceptAutoencoder(6, 3).double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_hand(net: nn.Sequential, coder: ConceptAutoencoder, x: Tensor, unit: int | None = None) -> Tensor:
    """Logits with the autoencoder behind the first ReLU, one concept zeroed."""
    code = coder.encode(net[:2](x)).clone()
    if unit is not None:
        code[:, unit] = 0
    return net[2:](coder.decode(code)).detach()


@pytest.mark.parametrize("engine", ["auto", "suffix", "full"])
def test_reference_is_the_network_with_the_autoencoder(
    net: nn.Sequential, coder: ConceptAutoencoder, x: Tensor, engine: Any
) -> None:
    explainer = ConceptCausalEffect(net, "1", coder, min_fidelity=0, outcome=None, engine=engine)
    estimate = explainer.estimate(x)
    reference = by_hand(net, coder, x)
    wanted = torch.stack([by_hand(net, coder, x, u) - reference for u in range(3)], 1)
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(estimate.reference, reference)
    torch.testing.assert_close(estimate.effect, wanted)
    # total = effect of inserting the autoencoder + effect of the concept given it
    total = torch.stack([by_hand(net, coder, x, u) for u in range(3)], 1) - net(x)[:, None].detach()
    torch.testing.assert_close(estimate.insertion_effect[:, None] + estimate.effect, total)
    assert torch.equal(estimate.predicted, net(x).argmax(1))
    maps = explainer.attribute(x, target=1)
    torch.testing.assert_close(maps[:, :, 0, 0], -wanted[..., 1])
    assert maps.shape == (3, 3, 6, 6)


def test_both_readings_of_the_papers_tables(net: nn.Sequential, coder: ConceptAutoencoder, x: Tensor) -> None:
    """A: Z0 given F; B: F given Z0 on a concept, held in every pass."""
    mask = PixelMask("zero", region=(0, 0, 4, 8))
    a = ConceptCausalEffect(net, "1", coder, min_fidelity=0, outcome=None).estimate(x, given=mask)
    wanted = by_hand(net, coder, mask.perturb(x), 2) - by_hand(net, coder, mask.perturb(x))
    torch.testing.assert_close(a.effect[:, 2], wanted)
    node = Evidence(ZeroOut(), site=ConceptSite("1", coder), units=[2])
    b = LayerCausalEffect(net, LayerSite("0", at_input=True), mask, outcome=None).estimate(
        x, layer_mask=torch.zeros(1, 1, 1, 1, dtype=torch.long), given=node
    )
    wanted = by_hand(net, coder, mask.perturb(x), 2) - by_hand(net, coder, x, 2)
    torch.testing.assert_close(b.effect[:, 0], wanted)


def test_refusals(net: nn.Sequential, coder: ConceptAutoencoder, x: Tensor) -> None:
    with pytest.raises(ModelError, match="autoencoder"):
        ConceptCausalEffect(net, "1", coder)
    with pytest.raises(ArgumentError, match="ConceptAutoencoder"):
        ConceptCausalEffect(net, "1", nn.Identity())  # type: ignore[arg-type]
    explainer = ConceptCausalEffect(net, "1", coder, min_fidelity=0)
    with pytest.raises(ArgumentError, match="Joint"):
        explainer.attribute(x, layer_mask=torch.zeros(1, 3, 1, 1, dtype=torch.long))
