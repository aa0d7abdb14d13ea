"""Effects of nodes: captum's LayerFeatureAblation, brute force with hooks, closed forms; every route says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import LayerFeatureAblation
from torch import Tensor, nn

from ce_plugin import CausalEffect, Evidence, LayerCausalEffect, LayerSite
from ce_plugin.designs import Joint, LeaveOneIn, RandomMask
from ce_plugin.errors import ArgumentError, InputError, ModelError, UnitError, UnknownNameError
from ce_plugin.interventions import MeanOut, Patch, PixelMask, Resample, ZeroOut

ENGINES = ("auto", "suffix", "full")


class Small(nn.Module):
    """Convolutions with an in-place activation, a residual connection and a second head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        h = self.relu(self.stem(x))
        h = self.relu(h + self.norm(self.block(h)))
        return self.head(h.mean((2, 3))) * scale


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Small().double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def brute(net: nn.Module, layer: nn.Module, x: Tensor, do: Any) -> Tensor:
    """Logits minus clean logits with channel u of the layer's output set by ``do(value, u)``, (N, U, C)."""
    clean = net(x)
    found = []
    state: dict[str, Any] = {}
    handle = layer.register_forward_hook(lambda m, a, out: state.update(width=out.shape[1]))
    net(x)
    handle.remove()
    for u in range(state["width"]):
        handle = layer.register_forward_hook(lambda m, a, out, u=u: do(out.clone(), u))
        found.append(net(x) - clean)
        handle.remove()
    return torch.stack(found, 1).detach()


def zero(value: Tensor, u: int) -> Tensor:
    value[:, u] = 0
    return value


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layer", ["stem", "block", "norm"])
def test_equals_full_passes_with_a_hook(net: nn.Module, x: Tensor, layer: str, engine: Any) -> None:
    estimate = LayerCausalEffect(net, layer, outcome="logit", engine=engine).estimate(x)
    wanted = brute(net, net.get_submodule(layer), x, zero)
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(estimate.effect, wanted, rtol=1e-9, atol=1e-12)
    assert estimate.settings["route"] == ("full" if engine == "full" else estimate.settings["route"])


@pytest.mark.parametrize("engine", ENGINES)
def test_attribute_equals_captum(net: nn.Module, x: Tensor, engine: Any) -> None:
    def forward(images: Tensor) -> Tensor:
        return net(images)

    wanted = LayerFeatureAblation(forward, net.block).attribute(
        x, target=2, layer_mask=torch.arange(6).reshape(1, 6, 1, 1)
    )
    explained = forward if engine == "full" else net
    found = LayerCausalEffect(explained, net.block, outcome=None, engine=engine).attribute(x, target=2)
    assert found.shape == (3, 6, 6, 6)
    torch.testing.assert_close(found, wanted)


def test_captums_signature(net: nn.Module, x: Tensor) -> None:
    mask = torch.tensor([0, 0, 1, 1, 2, 2]).reshape(1, 6, 1, 1)
    args = (x, 0.5, [0, 1, 2], (torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[:, None],), mask, True, 1)
    wanted = LayerFeatureAblation(net, net.block).attribute(*args)
    torch.testing.assert_close(LayerCausalEffect(net, net.block, outcome=None).attribute(*args), wanted)


@pytest.mark.parametrize("design", [Joint([(0, 1), (2, 3, 4)]), LeaveOneIn(), RandomMask(0.3, n_trials=60)])
def test_every_design_by_every_route(net: nn.Module, x: Tensor, design: Any) -> None:
    found = [LayerCausalEffect(net, "stem", design=design, engine=engine).estimate(x) for engine in ENGINES]
    assert found[0].effect.abs().max() > 1e-3
    for other in found[1:]:
        torch.testing.assert_close(found[0].effect, other.effect, rtol=1e-8, atol=1e-12)


def test_mean_resample_and_patch(net: nn.Module, x: Tensor) -> None:
    others = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    layer = net.block
    store: list[Tensor] = []
    handle = layer.register_forward_hook(lambda m, a, out: store.append(out.detach().clone()))
    net(others), net(x + 0.1)
    handle.remove()
    reference, counterpart = store

    def mean(value: Tensor, u: int) -> Tensor:
        value[:, u] = reference.mean(0)[u]
        return value

    def patched(value: Tensor, u: int) -> Tensor:
        value[:, u] = counterpart[:, u]
        return value

    for intervention, do in ((MeanOut(others), mean), (Patch(x + 0.1), patched), (Patch(PixelMask(0.3)), None)):
        for engine in ENGINES:
            estimate = LayerCausalEffect(net, layer, intervention, outcome=None, engine=engine).estimate(x)
            if do is not None:
                torch.testing.assert_close(estimate.effect, brute(net, layer, x, do))
    resampled = LayerCausalEffect(net, layer, Resample(others, n_donors=5), outcome=None).estimate(x).effect

    def donor(k: int) -> Any:
        def do(value: Tensor, u: int) -> Tensor:
            value[:, u] = reference[k, u]
            return value

        return do

    # With as many donors as there are examples every order of them has the same mean.
    torch.testing.assert_close(resampled, torch.stack([brute(net, layer, x, donor(k)) for k in range(5)]).mean(0))


def test_a_batch_equals_its_examples(net: nn.Module, x: Tensor) -> None:
    for intervention in (ZeroOut(), Patch(x.flip(0)), Resample(x, 2)):
        whole = LayerCausalEffect(net, "stem", intervention).estimate(x)
        for i in range(3):
            own = Patch(x.flip(0)[i : i + 1]) if isinstance(intervention, Patch) else intervention
            single = LayerCausalEffect(net, "stem", own).estimate(x[i : i + 1])
            torch.testing.assert_close(single.effect[0], whole.effect[i])


def test_evidence_at_the_input_and_at_a_layer(net: nn.Module, x: Tensor) -> None:
    """Reading A: the effect of Z0 given F; reading B: the effect of F given Z0."""
    mask = PixelMask("zero", region=(0, 0, 3, 6))
    given = LayerCausalEffect(net, "block", outcome=None).estimate(x, given=mask)
    torch.testing.assert_close(given.effect, brute(net, net.block, mask.perturb(x), zero))

    node = Evidence(ZeroOut(), site=LayerSite("block"), units=[1])
    found = CausalEffect(net, mask, Joint([(0,)]), outcome=None).estimate(
        x, given=node, feature_mask=torch.zeros(1, 1, 1, 1, dtype=torch.long)
    )
    handle = net.block.register_forward_hook(lambda m, a, out: zero(out.clone(), 1))
    wanted = (net(mask.perturb(x)) - net(x)).detach()
    handle.remove()
    torch.testing.assert_close(found.effect[:, 0], wanted)

    both = LayerCausalEffect(net, "stem", outcome=None).estimate(x, given=[mask, node])
    handle = net.block.register_forward_hook(lambda m, a, out: zero(out.clone(), 1))
    torch.testing.assert_close(both.effect, brute(net, net.stem, mask.perturb(x), zero))
    handle.remove()


def test_units(net: nn.Module, x: Tensor) -> None:
    positions = LayerCausalEffect(net, LayerSite("norm", units="positions"), outcome=None)
    assert positions.estimate(x[:1]).effect.shape == (1, 36, 4)
    heads = LayerCausalEffect(net, LayerSite("norm", units="heads", n_heads=2), outcome=None).estimate(x)
    pairs = LayerCausalEffect(net, "norm", design=Joint([(0, 1, 2), (3, 4, 5)]), outcome=None).estimate(x)
    torch.testing.assert_close(heads.effect, pairs.effect)


def test_tokens_and_reshape_transform() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double().eval()

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = layer, nn.LayerNorm(8).double(), nn.Linear(8, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x))[:, 0])

    net = Tokens().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    tokens = LayerCausalEffect(net, LayerSite("first", units="tokens"), outcome=None).estimate(x).effect
    assert tokens[:, 0].abs().min() > 0
    assert tokens[:, 1:].abs().max() < 1e-12  # only the first one is read

    def to_map(value: Tensor) -> Tensor:
        return value[:, 1:].reshape(len(value), 2, 2, 8).permute(0, 3, 1, 2)

    site = LayerSite("first", reshape_transform=to_map)
    channels = LayerCausalEffect(net, site, outcome=None).estimate(x).effect
    assert channels.shape == (2, 8, 3)
    assert channels.abs().max() < 1e-12  # the class token is in no unit
    plain = LayerCausalEffect(net, "first", outcome=None).estimate(x).effect
    assert plain.shape == (2, 8, 3)
    assert plain.abs().min() > 0


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused, self.rnn = nn.Linear(3, 3), nn.Linear(3, 3), nn.LSTM(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(torch.relu(self.layer(x)))
        return h + self.rnn(x[:, None])[0][:, 0]


def test_layers_that_cannot_be_sites() -> None:
    net, x = Shared().eval(), torch.ones(2, 3)
    with pytest.raises(ModelError, match="never reached"):
        LayerCausalEffect(net, "unused").estimate(x)
    with pytest.raises(ModelError, match=r"passed through 2 times.*call=0"):
        LayerCausalEffect(net, "layer").estimate(x)
    with pytest.raises(ModelError, match="below 2"):
        LayerCausalEffect(net, LayerSite("layer", call=2)).estimate(x)
    with pytest.raises(UnknownNameError, match="Did you mean 'layer'"):
        LayerCausalEffect(net, "layr")
    with pytest.raises(ModelError, match="module of the network"):
        LayerCausalEffect(net, nn.Linear(3, 3))
    with pytest.raises(ArgumentError, match="dotted name"):
        LayerCausalEffect(net, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"counterpart.*\(2, 3\)"):
        LayerCausalEffect(net, LayerSite("layer", call=0), Patch(torch.ones(2, 4))).estimate(x)
    with pytest.raises(UnitError, match="divisor of the 3"):
        LayerCausalEffect(net, LayerSite("layer", call=0, units="heads", n_heads=2)).estimate(x)
    with pytest.raises(UnitError, match="tokens"):
        LayerCausalEffect(net, LayerSite("layer", call=0, units="tokens")).estimate(x)
    with pytest.raises(UnitError, match="indices of the site's 3 units"):
        CausalEffect(net).estimate(x, given=Evidence(ZeroOut(), site=LayerSite("layer", call=1), units=[3]))
    outputs = LayerCausalEffect(net, LayerSite("rnn", element=0, channel_dim=2), outcome=None).estimate(x)
    assert outputs.effect.shape == (2, 3, 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_call_of_a_shared_layer(engine: Any) -> None:
    net, x = Shared().double().eval(), torch.ones(2, 3, dtype=torch.float64)
    first = LayerCausalEffect(net, LayerSite("layer", call=0), outcome=None, engine=engine).estimate(x).effect
    second = LayerCausalEffect(net, LayerSite("layer", call=1), outcome=None, engine=engine).estimate(x).effect
    h = net.layer(x)
    wanted = [net.layer(torch.relu(h * (torch.arange(3) != u))) - net.layer(torch.relu(h)) for u in range(3)]
    torch.testing.assert_close(first, torch.stack(wanted, 1).detach())
    torch.testing.assert_close(second, torch.diag_embed(-net.layer(torch.relu(h))).detach())


def test_a_network_that_is_not_deterministic_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.rand(3)

    for engine in ("auto", "full"):
        with pytest.raises(ModelError, match="deterministic"):
            LayerCausalEffect(Noisy().eval(), "layer", engine=engine).estimate(torch.ones(1, 3))  # type: ignore[arg-type]


def test_fallback_is_logged_once_and_suffix_insists(caplog: pytest.LogCaptureFixture) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return h if bool((h.sum() > 1e9).item()) else -h

    net, x = Branching().eval(), torch.ones(1, 3)
    explainer = LayerCausalEffect(net, "layer", outcome=None)
    with caplog.at_level("INFO", logger="ce_plugin"):
        first, second = explainer.estimate(x), explainer.estimate(x)
    assert len(caplog.records) == 1
    assert "whole network" in caplog.text
    torch.testing.assert_close(first.effect, torch.diag_embed(net.layer(x)))
    assert second.settings["route"] == "full"
    with pytest.raises(ModelError, match=r"engine.*'suffix'"):
        LayerCausalEffect(net, "layer", engine="suffix").estimate(x)


def test_the_model_is_left_as_it_was(net: nn.Module, x: Tensor) -> None:
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    hooks = len(net.block._forward_hooks)
    LayerCausalEffect(net, "block").estimate(x)
    with pytest.raises(InputError):
        LayerCausalEffect(net, "block", Patch(x[:1, :, :2])).estimate(x)
    assert net.training
    assert net.norm.training
    assert len(net.block._forward_hooks) == hooks
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_hook_that_looks_at_values_does_not_hinder_the_suffix(net: nn.Module, x: Tensor) -> None:
    wanted = LayerCausalEffect(net, "block").estimate(x)
    seen: list[int] = []
    handle = net.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found = LayerCausalEffect(net, "block", engine="suffix").estimate(x)
    handle.remove()
    assert sum(seen) > 0
    torch.testing.assert_close(found.effect, wanted.effect)
    # One that changes the outputs is heeded: by the suffix where it can be traced, else by whole passes.
    for change in (lambda m, a, out: 2 * out, lambda m, a, out: out * (2 if float(out.sum()) < 1e9 else 1)):
        handle = net.register_forward_hook(change)
        doubled = LayerCausalEffect(net, "block", outcome=None).estimate(x)
        handle.remove()
        torch.testing.assert_close(doubled.effect, 2 * LayerCausalEffect(net, "block", outcome=None).estimate(x).effect)
