"""Where causal effect maps lie: at the front, the values that a change reaches before anything mixes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ce_plugin import CausalEffectMap, ConceptSite, Evidence, LayerCausalEffect, LayerSite
from ce_plugin.concepts import ConceptAutoencoder
from ce_plugin.designs import Joint, OneAtATime, RandomMask
from ce_plugin.errors import InputError, ModelError
from ce_plugin.interventions import MeanOut, PixelMask, Resample, ZeroOut
from ce_plugin.models import efficientnet_lite0

Net = TypeVar("Net", bound=nn.Module)


def pictures(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(net: Net) -> Net:
    """In float64, with random parameters and statistics."""
    draw = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=draw) / 4)
            module.running_var.copy_(torch.rand(module.num_features, generator=draw) + 0.5)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) / 2
    return net.double().eval()


def shares(change: Tensor) -> Tensor:
    """|d| (N, U, h, w) as shares of each unit's total; 0 where nothing changes."""
    total = change.abs().sum((2, 3), keepdim=True)
    return change.abs() / total.where(total > 0, 1.0)


def by_hand(net: nn.Module, layer: str, x: Tensor, fronts: Callable[[Tensor], list[Tensor]]) -> Tensor:
    """The map from its definition, each channel set to zero by itself.

    Args:
        fronts: from the layer's value (N, C, h, w) to the values of the front, (N, C', h, w).
    """
    kept: list[Tensor] = []
    hook = net.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output.detach()))
    net(x)
    hook.remove()
    contribution = LayerCausalEffect(net, layer, outcome="logit").estimate(x).contribution
    units = []
    for u in range(kept[0].shape[1]):
        do = kept[0].clone()
        do[:, u] = 0
        changes = [(after - before).abs().sum(1) for after, before in zip(fronts(do), fronts(kept[0]), strict=True)]
        totals = [change.sum((1, 2), keepdim=True) for change in changes]
        parts = [change / total.where(total > 0, 1.0) for change, total in zip(changes, totals, strict=True)]
        count = torch.stack([(total > 0).double() for total in totals]).sum(0)
        units.append(torch.stack(parts).sum(0) / count.clamp(min=1))
    return torch.einsum("nuc,nuhw->nchw", contribution, torch.stack(units, 1)).detach()


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]


def test_before_an_activation_it_is_the_map_behind_it() -> None:
    """ReLU leaves zero as it is, so that a channel set to zero before or behind it is the same intervention."""
    net, x = made(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), *head(6))), pictures(2, 2, 7, 8)
    torch.testing.assert_close(CausalEffectMap(net, "0").maps(x), CausalEffectMap(net, "1").maps(x))


def test_before_a_batch_norm() -> None:
    net = made(nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), *head(4)))
    x = pictures(2, 2, 7, 8)
    torch.testing.assert_close(CausalEffectMap(net, "0").maps(x), by_hand(net, "0", x, lambda h: [net[1:3](h)]))


class Squeeze(nn.Module):
    """A gate for each channel, which mixes channels and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.gate = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.act, self.fc = nn.SiLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.conv(x)))
        h = h * torch.sigmoid(self.gate(h.mean((2, 3))))[:, :, None, None]
        return self.fc(h.mean((2, 3)))


def test_a_gate_that_mixes_ends_the_way() -> None:
    """The activation is pooled and multiplied with what mixes: one value, which counts once."""
    net, x = made(Squeeze()), pictures(2, 2, 6, 7)
    for layer, rest in (("conv", lambda h: [net.act(net.norm(h))]), ("norm", lambda h: [net.act(h)])):
        torch.testing.assert_close(CausalEffectMap(net, layer).maps(x), by_hand(net, layer, x, rest))
    torch.testing.assert_close(CausalEffectMap(net, "act").maps(x), by_hand(net, "act", x, lambda h: [h]))


class Gate(nn.Module):
    """A gate of each element by itself, and a scale for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale, self.mix = nn.Conv2d(2, 4, 3), nn.Parameter(torch.ones(4, 1, 1)), nn.Conv2d(4, 3, 3)

    def rest(self, h: Tensor) -> Tensor:
        return self.scale * h * torch.tanh(h - 0.3) + 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.rest(self.conv(x))).mean((2, 3))


def test_a_gate_of_each_element_is_followed() -> None:
    net, x = made(Gate()), pictures(2, 2, 6, 7)
    torch.testing.assert_close(CausalEffectMap(net, "conv").maps(x), by_hand(net, "conv", x, lambda h: [net.rest(h)]))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.norm = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act, self.last, self.fc = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = self.act(self.norm(self.one(h)) + h)
        return self.fc(self.last(h).mean((2, 3)))


def test_sums() -> None:
    """What the site does not reach may be added; a sum with what already mixes takes the site as it is, once."""
    net, x = made(Residual()), pictures(2, 2, 7, 7)
    stem = net.stem(x).detach()
    wanted = by_hand(net, "one", x, lambda h: [(net.norm(h) + stem).relu()])
    torch.testing.assert_close(CausalEffectMap(net, "one").maps(x), wanted)
    torch.testing.assert_close(CausalEffectMap(net, "stem").maps(x), by_hand(net, "stem", x, lambda h: [h]))


class Dense(nn.Module):
    """Each layer sees all that came before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (5, 5, 7))
        self.more, self.fc = nn.Conv2d(5, 2, 3, padding=1), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        h = torch.cat([first, self.grow(first.relu())], 1)
        h = torch.cat([h, self.more(self.norms[0](h).relu())], dim=1)
        return self.fc(self.norms[2](h).relu().mean((2, 3)))


def test_dense_connections_reach_a_front_of_several_values() -> None:
    net, x = made(Dense()), pictures(2, 2, 6, 7)
    net.norms[0].bias.data[3] = -50.0  # the first of the site's channels changes one of the two values only
    first = net.stem(x).detach()

    def fronts(h: Tensor) -> list[Tensor]:
        both = torch.cat([first, h], 1)
        late = torch.cat([both, torch.zeros(2, 2, *h.shape[2:], dtype=h.dtype)], 1)
        return [net.norms[0](both).relu(), net.norms[2](late).relu()]

    torch.testing.assert_close(CausalEffectMap(net, "grow").maps(x), by_hand(net, "grow", x, fronts))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.norm = nn.Conv2d(2, 4, 3, stride=2), nn.GELU(), nn.LayerNorm(4)
        self.attend, self.fc = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.act(self.conv(x)).flatten(2).transpose(1, 2)
        tokens = tokens + self.attend(*[self.norm(tokens)] * 3, need_weights=False)[0]
        return self.fc(tokens.mean(1))


def test_before_attention() -> None:
    net, x = made(Attention()), pictures(2, 2, 9, 9)
    torch.testing.assert_close(CausalEffectMap(net, "conv").maps(x), by_hand(net, "conv", x, lambda h: [net.act(h)]))

    def to_map(tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, (4, 4))

    tokens = LayerSite("norm", reshape_transform=to_map)  # attention takes them: the front is the site
    contribution = LayerCausalEffect(net, tokens, outcome="logit").estimate(x).contribution
    here = shares(to_map(net.norm(net.act(net.conv(x)).flatten(2).transpose(1, 2)).detach()))
    torch.testing.assert_close(CausalEffectMap(net, tokens).maps(x), torch.einsum("nuc,nuhw->nchw", contribution, here))


def test_channels_that_meet_are_mixed() -> None:
    """A sum of a value and its shifted copy: each element depends on two channels."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(2, 3, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            c = torch.ones_like(x[:, :1, 1:-1, 1:-1])
            return self.fc((torch.cat([h, c], 1) + torch.cat([c, h], 1)).relu().mean((2, 3)))

    net, x = made(Net()), pictures(2, 2, 6, 6)
    # Both copies are in the front, and each is the value itself.
    torch.testing.assert_close(CausalEffectMap(net, "conv").maps(x), by_hand(net, "conv", x, lambda h: [h, h]))


class Handwritten(nn.Module):
    """GELU, as several networks write it."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.erf(x / 2**0.5))


_STEPS = {
    "handwritten": Handwritten(),
    "relu": nn.ReLU(), "inplace": nn.ReLU6(inplace=True), "silu": nn.SiLU(), "prelu": nn.PReLU(4), "tanh": nn.Tanh(),
    "norm": nn.BatchNorm2d(4), "dropout": nn.Dropout(0.5), "identity": nn.Identity(), "leaky": nn.LeakyReLU(),
}  # fmt: skip


@given(st.lists(st.sampled_from(sorted(_STEPS)), max_size=4), st.sampled_from(["suffix", "full"]))
@settings(max_examples=15, deadline=None)
def test_any_chain_of_elementwise_operations(names: list[str], engine: str) -> None:
    chain = nn.Sequential(*[_STEPS[name] for name in names])
    net, x = made(nn.Sequential(nn.Conv2d(2, 4, 3), chain, nn.Conv2d(4, 4, 3), *head(4))), pictures(1, 2, 8, 8)
    found = CausalEffectMap(net, "0", engine=engine).maps(x)  # type: ignore[arg-type]
    torch.testing.assert_close(found, by_hand(net, "0", x, lambda h: [chain(h.clone())]))


def test_signals_and_volumes() -> None:
    for conv, norm, pool, shape in (
        (nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.AdaptiveAvgPool1d(1), (2, 2, 9)),
        (nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.AdaptiveAvgPool3d(1), (2, 2, 4, 5, 6)),
    ):
        net, x = made(nn.Sequential(conv, norm, nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, 3))), pictures(*shape)
        before, after = net[0](x), net[:3](x).detach()
        change = after - net[1:3](torch.zeros_like(before)).detach()
        contribution = LayerCausalEffect(net, "0", outcome="logit").estimate(x).contribution
        weights = shares(change.flatten(2)[..., None])[..., 0]
        wanted = torch.einsum("nuc,nus->ncs", contribution, weights).reshape(2, 3, *after.shape[2:])
        torch.testing.assert_close(CausalEffectMap(net, "0").maps(x), wanted)


class Planted(nn.Module):
    """Its first two channels are dead behind the activation; asks for the number of rows, as many networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.deep = nn.Conv2d(2, 6, 3), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6)
        self.norm, self.mix, self.fc = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.size(0)
        h = self.mix(self.norm(self.deep(self.act(self.conv(x)))))
        return self.fc(h.mean((2, 3)).view(rows, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_unit_that_changes_nothing_at_the_front_contributes_exactly_nothing(dtype: torch.dtype) -> None:
    net = made(Planted()).to(dtype)
    net.conv.bias.data[:2] = -100.0
    x = pictures(3, 2, 9, 9).to(dtype)
    contribution = LayerCausalEffect(net, "conv", outcome="logit").estimate(x).contribution
    assert bool((contribution[:, :2] == 0).all())
    assert bool((contribution[:, 2:] != 0).any())
    torch.testing.assert_close(CausalEffectMap(net, "conv").maps(x).sum((2, 3)), contribution.sum(1))


def test_it_adds_up_in_a_trained_network() -> None:
    model, x = efficientnet_lite0().model, pictures(1, 3, 96, 96).float() * 2 - 1
    for layer in ("_bn1", "_blocks.12._bn1", "_blocks.12"):
        estimate = LayerCausalEffect(model, layer, outcome="logit").estimate(x)
        own = estimate.contribution[0, :, int(estimate.predicted[0])].sum()
        torch.testing.assert_close(CausalEffectMap(model, layer).attribute(x).sum(), own, rtol=1e-4, atol=1e-4)


def test_alternative_values_average_the_products() -> None:
    """Products of several fills and donors are averaged, not contributions and weights."""
    net, x = made(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), *head(4))), pictures(2, 2, 8, 8)
    fills = (-1.0, 0.0, 0.4)  # the first changes nothing that ReLU lets through where a channel is negative
    net[0].bias.data[0] = -9.0
    found = CausalEffectMap(net, "0", PixelMask(fills)).maps(x)
    each = torch.stack([CausalEffectMap(net, "0", PixelMask(fill)).maps(x) for fill in fills])
    torch.testing.assert_close(found, each.mean(0))
    contribution = LayerCausalEffect(net, "0", PixelMask(fills), outcome="logit").estimate(x).contribution
    torch.testing.assert_close(found.sum((2, 3)), contribution.sum(1))
    donors = Resample(pictures(5, 2, 8, 8).flip(0), n_donors=3)
    contribution = LayerCausalEffect(net, "0", donors, outcome="logit").estimate(x).contribution
    torch.testing.assert_close(CausalEffectMap(net, "0", donors).maps(x).sum((2, 3)), contribution.sum(1))


def test_draws_of_evidence_average_the_products() -> None:
    net, x = made(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), *head(4))), pictures(2, 2, 8, 8)
    evidence = Evidence(PixelMask("zero"), units=RandomMask(0.5, n_trials=4))
    contribution = LayerCausalEffect(net, "0", outcome="logit").estimate(x, given=evidence).contribution
    found = CausalEffectMap(net, "0").maps(x, given=evidence)
    torch.testing.assert_close(found.sum((2, 3)), contribution.sum(1))
    # Under fixed evidence it is the map of the changed images.
    fixed = Evidence(PixelMask("zero"), units=[0, 3, 9])
    from ce_plugin.sites import InputSite

    (where,) = InputSite().units_of((x,)).masks(fixed.assignment(64, 0, 0)[None], torch.zeros(1, dtype=torch.int64))
    changed = CausalEffectMap(net, "0").maps(x.where(~where, 0.0))
    torch.testing.assert_close(CausalEffectMap(net, "0").maps(x, given=fixed), changed)


@pytest.mark.parametrize("where", ["stem", "act", "last"])
def test_evidence_at_a_layer_is_held(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """Before the layer; at the activation behind it, which is then no longer one; and behind what mixes."""
    net, x = made(Residual()), pictures(2, 2, 7, 7)
    evidence = Evidence(ZeroOut(), site=LayerSite(where), units=[0, 2])
    hold = net.get_submodule(where).register_forward_hook(
        lambda module, args, output: output * torch.tensor([0.0, 1, 0, 1]).reshape(1, 4, 1, 1).to(output)
    )
    stem = net.stem(x).detach()

    def fronts(h: Tensor) -> list[Tensor]:
        summed = net.norm(h) + stem
        return [summed if where == "act" else summed.relu()]

    wanted = by_hand(net, "one", x, fronts)
    hold.remove()
    torch.testing.assert_close(CausalEffectMap(net, "one").maps(x, given=evidence), wanted)
    assert not caplog.records


def test_random_designs_and_groups() -> None:
    net, x = made(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), *head(4))), pictures(2, 2, 8, 8)
    net[0].bias.data[1] = -100.0  # a channel that is dead behind the activation
    design = RandomMask(0.4, n_trials=40)
    contribution = LayerCausalEffect(net, "0", design=design, outcome="logit").estimate(x).contribution
    alive = (net[:2](x) > 0).flatten(2).any(2)
    assert not alive[:, 1].any()
    maps = CausalEffectMap(net, "0", design=design).maps(x)
    torch.testing.assert_close(maps.sum((2, 3)), (contribution * alive[..., None]).sum(1))
    groups = Joint([(0, 1), (1, 2), (3,)])
    contribution = LayerCausalEffect(net, "0", design=groups, outcome="logit").estimate(x).contribution
    a = net[:2](x).detach()
    changes = torch.stack([a[:, [0, 1]].sum(1), a[:, [1, 2]].sum(1), a[:, 3]], 1)
    wanted = torch.einsum("nuc,nuhw->nchw", contribution, shares(changes))
    torch.testing.assert_close(CausalEffectMap(net, "0", design=groups).maps(x), wanted)


def test_masks_that_differ_between_examples() -> None:
    net, x = made(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), *head(4))), pictures(2, 2, 6, 6)
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]]).reshape(2, 4, 1, 1)
    maps = CausalEffectMap(net, LayerSite("0", layer_mask=mask)).maps(x)
    for i in range(2):
        single = CausalEffectMap(net, LayerSite("0", layer_mask=mask[i : i + 1])).maps(x[i : i + 1])
        torch.testing.assert_close(maps[i : i + 1], single)


def test_an_in_painter_that_sees_the_trial() -> None:
    """Each unit has the value that it gets when it is set alone."""

    def paint(value: Tensor, mask: Tensor) -> Tensor:
        return torch.full_like(value, 0.2) * mask.expand_as(value).double().mean((1, 2, 3), keepdim=True)

    net, x = made(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), *head(4))), pictures(1, 2, 6, 6)
    contribution = LayerCausalEffect(net, "0", PixelMask(paint), outcome="logit").estimate(x).contribution
    wanted = torch.einsum("nuc,nuhw->nchw", contribution, shares(net[:2](x).detach() - 0.2 / 4))
    torch.testing.assert_close(CausalEffectMap(net, "0", PixelMask(paint)).maps(x), wanted)


def test_concepts_lie_at_the_code() -> None:
    net, x = made(nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), *head(5))), pictures(2, 2, 8, 8)
    coder = made(ConceptAutoencoder(5, 2))
    explainer = CausalEffectMap.__new__(CausalEffectMap)
    from ce_plugin.attribution.layer_effect import ConceptCausalEffect

    explainer.effects = ConceptCausalEffect(net, "1", coder, min_fidelity=0, outcome="logit")
    explainer.weighting = "change"
    contribution = explainer.effects.estimate(x).contribution
    code = coder.encoder(net[:2](x)).detach()
    torch.testing.assert_close(explainer.maps(x), torch.einsum("nuc,nuhw->nchw", contribution, shares(code)))
    with pytest.raises(ModelError, match="autoencoder"):
        CausalEffectMap(net, ConceptSite("1", coder))


def test_without_a_trace_the_front_is_the_site_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    net, x = made(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), *head(6))), pictures(2, 2, 7, 8)
    maps = CausalEffectMap(lambda images: net(images), net[0])
    with caplog.at_level(logging.WARNING, "ce_plugin"):
        found = maps.maps(x)
        maps.maps(x)
    (record,) = caplog.records
    assert "where the layer itself changes, because forward_func is a function" in record.getMessage()
    contribution = LayerCausalEffect(net, "0", outcome="logit").estimate(x).contribution
    wanted = torch.einsum("nuc,nuhw->nchw", contribution, shares(net[0](x).detach()))
    torch.testing.assert_close(found, wanted)
    caplog.clear()
    CausalEffectMap(lambda images: net(images), net[0], weighting="activation").maps(x)
    assert not caplog.records


def test_the_last_layer_is_found() -> None:
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    cases = {
        "resnet18": LayerSite("avgpool", at_input=True),
        "mobilenet_v2": LayerSite("features"),
        "densenet121": LayerSite("features.norm5"),
    }
    for name, layer in cases.items():
        torch.manual_seed(0)
        net = getattr(torchvision.models, name)(num_classes=5).eval()
        torch.testing.assert_close(
            CausalEffectMap(net).attribute(x, target=1), CausalEffectMap(net, layer).attribute(x, target=1)
        )
    lite = efficientnet_lite0().model
    torch.testing.assert_close(
        CausalEffectMap(lite).attribute(x), CausalEffectMap(lite, "_avg_pooling").attribute(x, None, None, True)
    )


def test_the_last_layer_before_flattening_and_of_shared_modules() -> None:
    act = nn.ReLU()
    net = made(nn.Sequential(nn.Conv2d(2, 4, 3), act, nn.Conv2d(4, 4, 3), act, nn.Flatten(), nn.Linear(16, 3)))
    x = pictures(2, 2, 6, 6)
    torch.testing.assert_close(CausalEffectMap(net).maps(x), CausalEffectMap(net, LayerSite("3", call=1)).maps(x))

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).relu().mean((2, 3)))

    net = made(Functional())
    torch.testing.assert_close(CausalEffectMap(net).maps(x), CausalEffectMap(net, "conv").maps(x))


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.ReLU(), nn.Linear(4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)),
    ],
    ids=["no positions", "positions to the end"],
)
def test_no_last_layer_is_an_error_that_asks(net: nn.Module) -> None:
    with pytest.raises(ModelError, match="Name one: `CausalEffectMap"):
        CausalEffectMap(net).attribute(torch.rand(1, 3, 32, 32), target=0)


def test_the_tokens_of_a_transformer_are_asked_for() -> None:
    net = torchvision.models.VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32).eval()
    with pytest.raises(InputError, match="reshape_transform"):
        CausalEffectMap(net).attribute(torch.rand(1, 3, 32, 32))


def test_wrong_inputs_are_named_where_the_layer_is_to_be_found() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="3 channels"):
        CausalEffectMap(net).attribute(torch.rand(1, 2, 8, 8))


def test_a_mean_and_the_rest() -> None:
    """Set to the mean of a reference set, in one pass of two examples or in two of one."""
    net, x = made(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head(4))), pictures(2, 2, 6, 6)
    maps = CausalEffectMap(net, "0", MeanOut(x.flip(0)), OneAtATime())
    torch.testing.assert_close(maps.maps(x), torch.cat([maps.maps(x[:1]), maps.maps(x[1:])]))
    assert CausalEffectMap(net, "0", ZeroOut()).maps(x).shape == (2, 3, 4, 4)
