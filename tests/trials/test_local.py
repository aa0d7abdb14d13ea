"""Local differences are what full passes with hooks compute, through every kind of operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ce_plugin.networks.graph import HookPoint, Suffix
from ce_plugin.trials._incremental import IncrementalForward
from ce_plugin.trials._states import CleanMap, Window, overlaid


def brute(network: nn.Module, module: nn.Module | None, x: Tensor, do: Tensor, masks: Tensor) -> Any:
    """Full passes, the site set by a hook."""
    rows = x.expand(len(masks), *x.shape[1:])
    if module is None:
        return network(torch.where(masks, do, rows))
    with module.register_forward_hook(lambda m, args, out: torch.where(masks, do, out)):
        return network(rows)


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and eval mode, with weights and batch-norm statistics that let effects through."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.1, 0.5)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
    return network.double().eval()


def every_channel(channels: int, dims: int = 4) -> Tensor:
    return torch.eye(channels, dtype=torch.bool).view(channels, channels, *[1] * (dims - 2))


def largest(values: Any) -> float:
    if isinstance(values, Tensor):
        return float(values.abs().max())
    return max(map(largest, values.values() if isinstance(values, dict) else values))


def check(
    network: nn.Module, module: nn.Module | None, x: Tensor, masks: Tensor, do: Tensor | None = None, tol: float = 1e-9
) -> IncrementalForward:
    """Against full passes, relative to the largest effect; what is passed in, and the network, stay as they are."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    suffix = Suffix(network, HookPoint(module))
    captured = suffix.capture((x,))
    site = captured.site.clone()
    do = torch.randn(1, *site.shape[1:], generator=torch.Generator().manual_seed(1)).to(site) if do is None else do
    kept = do.clone()
    local = IncrementalForward(suffix, captured)
    example = len(x) - 1
    expected = brute(network, module, x[example : example + 1], do, masks)
    clean = network(x[example : example + 1])
    effect = largest(_difference(expected, clean))
    assert effect > 1e-6 * largest(clean)  # or an engine that returns zeros would pass
    for _ in range(2):
        assert largest(_difference(local(example, do, masks), expected)) <= tol * effect
    assert torch.equal(do, kept)
    assert torch.equal(captured.site, site)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    return local


def _difference(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor):
        return a - b
    if isinstance(a, dict):
        return {key: _difference(a[key], b[key]) for key in a}
    return [_difference(x, y) for x, y in zip(a, b, strict=True)]


class Body(nn.Module):
    """A site of four channels, something in the middle, and a head of two classes."""

    def __init__(self, middle: nn.Module | Callable[[Tensor], Tensor], relu: bool = True) -> None:
        super().__init__()
        self.site = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True) if relu else nn.Identity())
        self.middle = middle
        self.head = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.site(x)).flatten(1))


class Residual(nn.Module):
    """A by-pass that is joined by what ``join`` does."""

    def __init__(self, branch: nn.Module, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.branch, self.join = branch, join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.branch(x), x)


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu_(self.down(F.adaptive_avg_pool2d(x, 1)))))


class LastNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(4), nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * self.scale + x


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        x += 1
        x.clamp_(min=-0.5).mul_(1.5)
        x -= x.mean((2, 3), keepdim=True)
        return torch.sigmoid_(x) / 3


class Odd(nn.Module):
    """Shapes taken from values, chunks, a shuffle of channels."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(x.size(0), c, h, w)
        first, second = x.chunk(2, 1)
        return torch.cat([second, first * second + torch.zeros(n, 1, h, w).to(x)], 1).view(n, -1)


class Normed(nn.Module):
    """A functional batch norm and a mean in between, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.mean, self.var, None, None, False, 0.1, 1e-3)
        return torch.cat([x.mean([2, 3]), torch.flatten(F.avg_pool2d(x, 2), 1)], dim=1)


MIDDLES: dict[str, Callable[[], Any]] = {
    "conv": lambda: nn.Conv2d(4, 5, 3, padding=1),
    "pointwise conv": lambda: nn.Conv2d(4, 5, 1, stride=2),
    "padded pointwise conv": lambda: nn.Conv2d(4, 5, 1, padding=1),
    "dilated conv": lambda: nn.Conv2d(4, 5, (3, 2), stride=(2, 1), padding=(2, 0), dilation=2, bias=False),
    "same": lambda: nn.Conv2d(4, 5, 3, padding="same"),
    "same, even": lambda: nn.Conv2d(4, 5, 2, padding="same"),
    "reflecting conv": lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "depthwise, two each": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.ReLU6(), nn.Conv2d(8, 2, 1)),
    "groups": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 2)),
    "groups twice": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 9, 1, groups=3)),
    "norm": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3)),
    "norm, not affine": lambda: nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Hardswish(inplace=True)),
    "functional": Normed,
    "max-pool": lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "dilated max-pool": lambda: nn.MaxPool2d(2, 1, 1, dilation=2),
    "average": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "average, divisor": lambda: nn.AvgPool2d(3, 2, 1, divisor_override=5),
    "adaptive": lambda: nn.Sequential(nn.AdaptiveAvgPool2d((3, 2)), nn.Tanh(), nn.AdaptiveMaxPool2d(2)),
    "global": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4, 3), nn.GELU()),
    "linear": lambda: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.LazyLinear(6), nn.ReLU()),
    "pads": lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.ReflectionPad2d(1), nn.Upsample(scale_factor=2)),
    "activations": lambda: nn.Sequential(nn.PReLU(), nn.SiLU(inplace=True), nn.Softplus(), nn.LeakyReLU(0.1)),
    "prelu": lambda: nn.PReLU(4, 0.3),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "group norm": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU()),
    "softmax": lambda: nn.Softmax2d(),
    "transposed conv": lambda: nn.ConvTranspose2d(4, 3, 2, 2),
    "pixel shuffle": lambda: nn.PixelShuffle(2),
    "layer norm": LastNorm,
    "squeeze": Squeeze,
    "in place": InPlace,
    "odd": Odd,
    "channel shuffle": lambda: nn.ChannelShuffle(2),
    "add": lambda: Residual(nn.Conv2d(4, 4, 3, padding=1), lambda a, b: F.relu_(a + b)),
    "iadd": lambda: Residual(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), lambda a, b: a.add_(b)),
    "add depthwise": lambda: Residual(nn.Conv2d(4, 4, 3, padding=1, groups=4), lambda a, b: torch.add(a, b, alpha=2)),
    "mul": lambda: Residual(nn.BatchNorm2d(4), lambda a, b: a * b + 1),
    "broadcast": lambda: Residual(nn.AdaptiveAvgPool2d(1), lambda a, b: b - a),
    "cat": lambda: Residual(nn.Conv2d(4, 3, 3, padding=1), lambda a, b: torch.cat([a, b, a], 1)),
    "cat with itself": lambda: Residual(nn.ReLU(), lambda a, b: torch.cat((a, b), dim=1)),
    "dense block": lambda: nn.Sequential(
        Residual(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)), lambda a, b: torch.cat([b, a], 1)),
        Residual(nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)), lambda a, b: torch.cat([b, a], 1)),
        nn.AvgPool2d(2),
    ),
    "depth": lambda: torchvision.ops.StochasticDepth(0.5, "row"),
}


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", list(MIDDLES))
def test_each_operation_on_channels_is_as_with_hooks(name: str, relu: bool) -> None:
    torch.manual_seed(3)
    network, x = Body(MIDDLES[name](), relu).eval(), torch.randn(2, 2, 9, 8)
    network(x)  # lazy layers take shape
    randomised(network)
    local = check(network, network.site, x.double(), every_channel(4))
    assert local.route == "channel differences"
    assert local.bytes_per_row > 0


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from([1, 2, 4]),
)
def test_any_convolution_on_channels(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int
) -> None:
    conv = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups)
    network, x = Body(conv, relu=False).eval(), torch.randn(1, 2, 9, 8)
    network(x)
    check(randomised(network), network.site, x.double(), every_channel(4))


def test_part_of_a_channel() -> None:
    network, x = Body(nn.Conv2d(4, 5, 3)).eval(), torch.randn(1, 2, 9, 8)
    network(x)
    masks = every_channel(4) & (torch.rand(4, 1, 9, 8) < 0.5)
    check(randomised(network), network.site, x.double(), masks)


def test_several_channels_at_once_are_dense() -> None:
    network, x = Body(nn.Conv2d(4, 5, 3)).eval(), torch.randn(1, 2, 9, 8)
    network(x)
    masks = every_channel(4) | every_channel(4).roll(1, 1)
    assert check(randomised(network), network.site, x.double(), masks).route == "dense"


def test_features_of_a_vector() -> None:
    network = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    masks = torch.eye(6, dtype=torch.bool)
    assert check(randomised(network), network[0], torch.randn(3, 3).double(), masks).route == "channel differences"


def test_tokens_go_through_what_treats_them_separately() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = nn.Linear(3, 4)
            self.norm, self.inner = nn.LayerNorm(4), nn.Linear(4, 4)
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(self.norm(self.site(x)))
            return self.head(x + self.attention(x, x, x, need_weights=False)[0])[:, 0]

    network = randomised(Tokens())
    assert check(network, network.site, torch.randn(2, 5, 3).double(), every_channel(5, 3)).route.startswith("channel")


def test_rows_that_do_not_differ_are_clean_exactly_and_are_not_run() -> None:
    # Weights under which a second rectifier does not swallow the difference as well.
    torch.manual_seed(0)
    network, x = (
        Body(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 5, 3))),
        torch.randn(1, 2, 9, 8),
    )
    network.site = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1))
    network(x)
    network, x = randomised(network), x.double()
    with torch.no_grad():
        network.site[0].bias.copy_(torch.tensor([-50.0, 50.0, 0.0, -50.0]))
    suffix = Suffix(network, HookPoint(network.site))
    local = IncrementalForward(suffix, suffix.capture((x,)))
    seen: list[int] = []
    with network.middle[3].register_forward_hook(lambda m, args, out: seen.append(len(out))):
        out = local(0, torch.zeros(1, 4, 9, 8).double(), every_channel(4))
    assert sorted(seen) == [1, 2]  # the clean pass, and the two channels that a rectifier lets through
    assert torch.equal(out[[0, 3]], network(x).expand(2, -1))
    assert bool((out[[1, 2]] != network(x)).all())
    nothing = local(0, torch.zeros(1, 4, 9, 8).double(), torch.zeros(3, 4, 1, 1, dtype=torch.bool))
    assert torch.equal(nothing, network(x).expand(3, -1))


def test_every_form_of_output_and_a_by_pass() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.site, self.head = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            x = self.first(x)
            y = self.site(x) + x
            return {"logits": self.head(y.mean((2, 3))), "maps": (y, [y.relu(), x * 2])}

    network, x = randomised(Heads()), torch.randn(2, 2, 5, 5).double()
    check(network, network.site, x, every_channel(4))
    suffix = Suffix(network, HookPoint(network.site))
    out = IncrementalForward(suffix, suffix.capture((x,)))(1, torch.zeros(1, 4, 5, 5), every_channel(4)[:2])
    assert isinstance(out["maps"], tuple)
    torch.testing.assert_close(out["maps"][1][1], network(x)["maps"][1][1][1:].expand(2, -1, -1, -1))


def test_examples_take_turns() -> None:
    network, x = randomised(torchvision.models.resnet18(num_classes=5)), torch.randn(3, 3, 32, 32).double()
    site: Any = network.layer2
    suffix = Suffix(network, HookPoint(site))
    local = IncrementalForward(suffix, suffix.capture((x,)))
    do, masks = torch.zeros(1, 128, 4, 4).double(), every_channel(128)[::50]
    for example in (0, 1, 2, 0, 1):
        expected = brute(network, site, x[example : example + 1], do, masks)
        torch.testing.assert_close(local(example, do, masks), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(local.clean_output(example), network(x[example : example + 1]))


def test_hooks_of_leaves_see_full_values() -> None:
    network, x, seen = Body(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 3, 1))).eval(), torch.randn(1, 2, 6, 6), []
    network(x)
    randomised(network)
    with network.middle[0].register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape))):
        check(network, network.site, x.double(), every_channel(4))
    assert (4, 4, 6, 6) in seen


def test_cost_counts_what_a_row_takes() -> None:
    network, x = (
        Body(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1))),
        torch.randn(1, 2, 16, 16),
    )
    network(x)
    network, x = randomised(network), x.double()
    suffix = Suffix(network, HookPoint(network.site))
    captured = suffix.capture((x,))
    cost = IncrementalForward(suffix, captured).cost(torch.randn(1, 4, 16, 16), every_channel(4))
    # Of the two convolutions (2 to 4 and 4 to 8 channels) a quarter of the second is left.
    assert cost == pytest.approx(8 / (8 + 32), rel=0.05)
    assert suffix.share(captured) == pytest.approx(32 / (8 + 32), rel=0.05)


class Peak(TorchDispatchMode):
    """The most memory that tensors take at a time, of those that operations inside make."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            storage = made.untyped_storage() if isinstance(made, Tensor) else None
            if storage is not None and storage._cdata not in known | self.live.keys():
                self.live[storage._cdata] = storage.nbytes()
                self.most = max(self.most, sum(self.live.values()))
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        return out


@pytest.mark.parametrize("form", ["channels", "windows"])
def test_bytes_per_row_are_what_memory_grows_by(form: str) -> None:
    network: Any = randomised(torchvision.models.resnet18(num_classes=7))
    site = network.layer1 if form == "channels" else None
    suffix = Suffix(network, HookPoint(site))
    with torch.no_grad():
        captured = suffix.capture((torch.randn(1, 3, 96, 96).double(),))
        do = torch.randn_like(captured.site)
        masks = every_channel(64)
        if form == "windows":
            masks = torch.zeros(64, 1, 96, 96, dtype=torch.bool)
            masks[torch.arange(64), :, 30:40, 30:40] = True
        local, peaks = IncrementalForward(suffix, captured), []
        for rows in (4, 8, 16):
            with Peak() as peak:
                local(0, do, masks[:rows])
            peaks.append(peak.most)
    assert (peaks[2] - peaks[1]) / 8 == pytest.approx(local.bytes_per_row, rel=0.1)


def test_only_clean_values_whose_elements_are_needed_are_kept() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).eval()
    suffix = Suffix(network, HookPoint())
    forward = IncrementalForward(suffix, suffix.capture((torch.rand(2, 3, 16, 16),)))
    masks = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    masks[torch.arange(3), :, torch.arange(3), 4:6] = True
    forward.cost(torch.zeros(1, 3, 16, 16), masks)
    kept = forward.clean_value.kept
    # The second convolution reads around the window; the last value is what rows are pasted into.
    assert {suffix.graph.module(node) for node in kept} == {network[2], network[4]}
    # Parameters take gradients here; the graph of a clean pass would hold on to all of its values.
    assert not any(value.requires_grad for value in kept.values())
    before = dict(kept)
    for example in (1, 0):
        forward(example, torch.zeros(1, 3, 16, 16), masks)
        assert kept.keys() == before.keys()
    assert all(torch.equal(kept[node], before[node]) for node in kept)


TORCHVISION = {
    "resnet18": ["maxpool", "layer2.0.bn1", "layer4"],
    "mobilenet_v3_small": ["features.2", "features.5.block.1"],
    "densenet121": ["features.denseblock4.denselayer15"],
}


@pytest.mark.parametrize(("name", "layer"), [(name, layer) for name in TORCHVISION for layer in TORCHVISION[name]])
def test_networks_of_torchvision(name: str, layer: str) -> None:
    torch.manual_seed(0)
    network = randomised(torchvision.models.get_model(name, weights=None, num_classes=7))
    site = network.get_submodule(layer)
    x = torch.randn(1, 3, 32, 32).double()
    captured = Suffix(network, HookPoint(site)).capture((x,))
    channels = captured.site.shape[1]
    masks = every_channel(channels)[:: channels // 4]
    assert check(network, site, x, masks).route == "channel differences"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "convnext_tiny", "inception_v3"])
def test_larger_networks_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": True} if name == "inception_v3" else {}
    network = randomised(torchvision.models.get_model(name, weights=None, num_classes=7, **options))
    for module in network.modules():
        if isinstance(module, nn.Linear) and module.out_features == 7:
            nn.init.normal_(module.weight)
    layers = {
        "vit_b_16": ["conv_proj", "encoder.layers.encoder_layer_10"],
        "swin_t": ["features.3"],
        "convnext_tiny": ["features.5"],
        "inception_v3": ["Mixed_6c"],
    }
    x = torch.randn(1, 3, *[224 if name != "inception_v3" else 128] * 2).double()
    for layer in layers[name]:
        site = network.get_submodule(layer)
        captured = Suffix(network, HookPoint(site)).capture((x,))
        check(network, site, x, every_channel(captured.site.shape[1], captured.site.dim())[:3])


def test_a_single_window_leaves_the_clean_map_alone() -> None:
    """One row has the memory of the clean map where its channels come last."""
    clean = torch.rand(1, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    before = clean.clone()
    window = Window(CleanMap.of(clean), torch.tensor([1]), torch.tensor([2]), torch.zeros(1, 3, 2, 2))
    full = overlaid(clean, window)
    assert torch.equal(clean, before)
    assert not full[:, :, 1:3, 2:].any()
