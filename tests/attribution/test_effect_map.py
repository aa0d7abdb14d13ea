"""Causal effect maps: closed forms, sums, contrasts, transformers."""

from __future__ import annotations

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from ce_plugin import CausalEffectMap, ConceptSite, LayerCausalEffect, LayerSite
from ce_plugin.concepts import ConceptAutoencoder
from ce_plugin.designs import RandomMask
from ce_plugin.errors import InferenceError, InputError, ModelError, OutcomeError, TargetError, UnknownNameError
from ce_plugin.interventions import MeanOut


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    return nn.Sequential(*layers).double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 2, 8, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_after_pooling_a_linear_head_it_is_the_gradient_weighted_sum(net: nn.Sequential, x: Tensor) -> None:
    """For a mean and a linear head contribution_u = w_u mean(A_u), so CEM(s) = sum_u w_u A_u(s) / (h w): Grad-CAM."""
    for target in (0, torch.tensor([1, 3, 2])):
        wanted = LayerGradCam(net, net[1]).attribute(x, target=target)
        found = CausalEffectMap(net, "1").attribute(x, target=target)
        # Captum's weights are means of the gradients, w_u / (h w).
        torch.testing.assert_close(found, wanted.detach())


def test_a_map_sums_to_the_contributions(net: nn.Sequential, x: Tensor) -> None:
    maps = CausalEffectMap(net, "1", MeanOut(x.flip(0))).maps(x)
    effects = LayerCausalEffect(net, "1", MeanOut(x.flip(0)), outcome="logit").estimate(x)
    assert maps.shape == (3, 4, 6, 7)
    torch.testing.assert_close(maps.sum((2, 3)), effects.contribution.sum(1))


def test_target_contrast_and_sign(net: nn.Sequential, x: Tensor) -> None:
    cem = CausalEffectMap(net, net[1])
    maps = cem.maps(x)
    top = net(x).argmax(1)
    torch.testing.assert_close(cem.attribute(x), maps[torch.arange(3), top][:, None])
    one = cem.attribute(x, target=2)
    torch.testing.assert_close(cem.attribute(x, target=2, contrast=[0, 1]), one - maps[:, :2].mean(1, keepdim=True))
    torch.testing.assert_close(
        cem.attribute(x, target=2, contrast="others"), one - maps[:, [0, 1, 3]].mean(1, keepdim=True)
    )
    rows = torch.tensor([[0], [1], [3]])
    torch.testing.assert_close(
        cem.attribute(x, target=2, contrast=rows), one - maps[torch.arange(3), rows[:, 0]][:, None]
    )
    assert (one < 0).any()
    torch.testing.assert_close(cem.attribute(x, target=2, relu_attributions=True), one.clamp(min=0))


def test_activation_weighting_is_the_plain_product(net: nn.Sequential, x: Tensor) -> None:
    contribution = LayerCausalEffect(net, "1", outcome="logit").estimate(x, target=1).contribution
    wanted = (contribution[..., None] * net[:2](x)).sum(1, keepdim=True).detach()
    torch.testing.assert_close(CausalEffectMap(net, "1", weighting="activation").attribute(x, target=1), wanted)


def test_units_of_several_channels(net: nn.Sequential, x: Tensor) -> None:
    mask = torch.tensor([0, 0, 1, 1, 1]).reshape(1, 5, 1, 1)
    maps = CausalEffectMap(net, LayerSite("1", layer_mask=mask)).maps(x)
    contribution = LayerCausalEffect(net, "1", outcome="logit").estimate(x, layer_mask=mask).contribution
    a = net[:2](x).detach()
    groups = torch.stack([a[:, :2].sum(1), a[:, 2:].sum(1)], 1)
    weights = groups / groups.sum((2, 3), keepdim=True)
    torch.testing.assert_close(maps, torch.einsum("nuc,nuhw->nchw", contribution, weights))


def test_tokens_become_positions() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return self.head(h[:, 1:].mean(1) + h[:, 0])

    net, x = Patches().double().eval(), torch.randn(2, 7, 4, dtype=torch.float64)

    def to_map(value: Tensor) -> Tensor:
        return value[:, 1:].reshape(len(value), 2, 3, -1).permute(0, 3, 1, 2)

    maps = CausalEffectMap(net, LayerSite("embed", reshape_transform=to_map)).maps(x)
    h = net.embed(x)[:, 1:].detach()  # (2, 6, 6): positions, channels
    contribution = torch.einsum("npu,cu->nuc", h, net.head.weight) / 6
    weights = (h.abs() / h.abs().sum(1, keepdim=True)).transpose(1, 2).reshape(2, 6, 2, 3)
    torch.testing.assert_close(maps, torch.einsum("nuc,nuhw->nchw", contribution, weights).detach())
    with pytest.raises(InputError, match="reshape_transform"):
        CausalEffectMap(net, "embed").attribute(x)


def test_significant_units_only(net: nn.Sequential, x: Tensor) -> None:
    design = RandomMask(0.4, n_trials=24)
    every = CausalEffectMap(net, "1", design=design, outcome="margin")
    estimate = LayerCausalEffect(net, "1", design=design, outcome="margin").estimate(x)
    assert estimate.significant().any()
    assert not estimate.significant().all()
    a = net[:2](x).detach()
    weights = a / a.sum((2, 3), keepdim=True).clamp(min=1e-300)
    kept = estimate.contribution.where(estimate.significant(), 0.0)[..., 1:2]
    wanted = torch.einsum("nuc,nuhw->nchw", kept, weights)
    torch.testing.assert_close(every.attribute(x, target=1, significant_only=True), wanted)
    with pytest.raises(InferenceError):
        CausalEffectMap(net, "1").attribute(x, significant_only=True)


def test_a_map_of_concepts_needs_a_trained_autoencoder(net: nn.Sequential, x: Tensor) -> None:
    coder = ConceptAutoencoder(5, 2).double()
    with pytest.raises(ModelError, match="autoencoder"):
        CausalEffectMap(net, ConceptSite("1", coder)).attribute(x)


def test_bad_input(net: nn.Sequential, x: Tensor) -> None:
    with pytest.raises(UnknownNameError, match="weighting"):
        CausalEffectMap(net, "1", weighting="actvation")  # type: ignore[arg-type]
    with pytest.raises(OutcomeError, match="each class"):
        CausalEffectMap(net, "1", outcome="prediction_weighted")
    with pytest.raises(TargetError, match=r"0 \.\.\. 3"):
        CausalEffectMap(net, "1").attribute(x, contrast=[4])
    with pytest.raises(TargetError, match="2 rows"):
        CausalEffectMap(net, "1").attribute(x, contrast=torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(UnknownNameError, match="contrast"):
        CausalEffectMap(net, "1").attribute(x, contrast="other")  # type: ignore[arg-type]


def test_a_vision_transformer_by_both_routes() -> None:
    torch.manual_seed(0)
    net = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    nn.init.normal_(net.heads.head.weight)
    net = net.double().eval()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)

    def to_map(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

    site = LayerSite("encoder.layers.encoder_layer_1.ln_1", reshape_transform=to_map)
    maps = [CausalEffectMap(net, site, engine=engine).maps(x) for engine in ("suffix", "full")]
    assert maps[0].shape == (2, 1000, 4, 4)
    assert maps[0].abs().max() > 1e-3
    torch.testing.assert_close(maps[0], maps[1])
    contribution = LayerCausalEffect(net, site, outcome="logit").estimate(x).contribution
    torch.testing.assert_close(maps[0].sum((2, 3)), contribution.sum(1))
