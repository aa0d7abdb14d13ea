"""The columns of the paper's tables: Z0 of nodes and concepts, also given F_i (random masks) and F_j (attacks)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ce_plugin import CausalEffect, ConceptCausalEffect, Evidence, LayerCausalEffect, LayerSite
from ce_plugin.concepts import ConceptAutoencoder
from ce_plugin.designs import Joint, RandomMask
from ce_plugin.interventions import Adversarial, PixelMask, ZeroOut
from ce_plugin.sites import ConceptSite


@pytest.fixture(scope="module")
def net() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    layers = (nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    net = nn.Sequential(*layers).eval()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return net


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attack", ["fgsm", "bim", "pgd", "jsma"])
def test_a_node_given_an_attack_and_an_attack_given_a_node(net: nn.Sequential, x: Tensor, attack: str) -> None:
    options: dict[str, Any] = {"eps": 0.1} if attack != "jsma" else {"max_iter": 5}
    made = getattr(Adversarial, attack)(net, clip_values=(0.0, 1.0), **options)
    attacked = made.perturb(x)
    assert not torch.equal(attacked, x)

    def logits(images: Tensor, node: int | None = None) -> Tensor:
        h = net[:2](images).clone()
        if node is not None:
            h[:, node] = 0
        return net[2:](h).detach()

    # Reading A: Z0 on (L, N) given F_j.
    a = LayerCausalEffect(net, "1", outcome=None).estimate(x, given=made)
    torch.testing.assert_close(a.effect[:, 3], logits(attacked, 3) - logits(attacked), rtol=1e-4, atol=1e-5)
    # Reading B: F_j given that the node is in a zero-out evident state.
    node = Evidence(ZeroOut(), site=LayerSite("1"), units=[3])
    whole = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    b = CausalEffect(net, made, Joint([(0,)]), outcome=None).estimate(x, feature_mask=whole, given=node)
    torch.testing.assert_close(b.effect[:, 0], logits(attacked, 3) - logits(x, 3), rtol=1e-4, atol=1e-5)


def test_a_node_given_pixels_masked_at_random(net: nn.Sequential, x: Tensor) -> None:
    """PWM: a tenth of the units is masked; the effect is the mean over the draws, with their error."""
    masked = Evidence(PixelMask("zero"), units=RandomMask(0.1, n_trials=8))
    found = LayerCausalEffect(net, "1", outcome="log_odds").estimate(x, given=masked)
    assert found.effect.shape == (2, 6, 3)
    assert found.std_error is not None
    assert (found.std_error > 0).any()
    again = LayerCausalEffect(net, "1", outcome="log_odds", engine="full").estimate(x, given=masked)
    torch.testing.assert_close(found.effect, again.effect, rtol=1e-3, atol=1e-5)


def test_concepts_have_the_same_columns(net: nn.Sequential, x: Tensor) -> None:
    coder = ConceptAutoencoder(6, 2)
    attack = Adversarial.fgsm(net, eps=0.1, clip_values=(0.0, 1.0))
    masked = Evidence(PixelMask("zero"), units=RandomMask(0.1, n_trials=3))
    explainer = ConceptCausalEffect(net, "1", coder, min_fidelity=0, outcome="prediction_weighted")
    for given in (None, masked, attack, [attack, Evidence(ZeroOut(), site=ConceptSite("1", coder), units=[0])]):
        found = explainer.estimate(x, given=given)
        assert found.effect.shape == (2, 2, 1)
        assert found.insertion_effect.shape == (2, 1)
        assert torch.isfinite(found.effect).all()
