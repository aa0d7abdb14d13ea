"""Which dimension holds channels, which rows belong to whom: decided by the network, said, or asked."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from captum.attr import FeatureAblation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ce_plugin import CausalEffect, CausalEffectMap, LayerCausalEffect
from ce_plugin.designs import OneAtATime, RandomMask, RandomRegions, RandomWindows
from ce_plugin.effects.smooth import smooth
from ce_plugin.errors import ArgumentError, InputError, NoChangeWarning, UnitError
from ce_plugin.interventions import PixelMask, ZeroOut
from ce_plugin.networks.layout import channel_dim, input_channel_dim
from ce_plugin.sites import Evidence, InputSite, LayerSite

Z: Any = (PixelMask("zero"), OneAtATime())
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Reads(nn.Module):
    """Reads one channel of a layer, by two outputs; ``last`` keeps the channels in the last dimension."""

    def __init__(self, layer: nn.Module, channel: int, *, last: bool) -> None:
        super().__init__()
        self.layer, self.channel, self.last = layer, channel, last

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        own = h.select(-1 if self.last else 1, self.channel).flatten(1).square().sum(1)
        return torch.stack([own, -own], 1)


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor, int, bool, int]:
    """A layer, its input, its number of channels, whether they are last, and the number of dimensions."""
    rank, channels, last = draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.booleans())
    sizes = draw(st.lists(st.integers(2, 5), min_size=rank, max_size=rank))
    ending = draw(st.sampled_from(["none", "relu", "norm", "both", "none after"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    if last:
        first, norm, x = nn.Linear(3, channels), nn.LayerNorm(channels), torch.rand(2, *sizes, 3)
    else:
        first, norm, x = CONVS[rank](3, channels, 1), NORMS[rank](channels), torch.rand(2, 3, *sizes)
    rest: dict[str, list[nn.Module]] = {
        "none": [], "relu": [nn.GELU()], "norm": [norm], "both": [norm, nn.GELU()], "none after": [nn.Dropout()],
    }  # fmt: skip
    return nn.Sequential(first, *rest[ending]), x, channels, last, rank


@settings(max_examples=60, deadline=None)
@given(made=layers(), data=st.data())
def test_the_planted_channel_is_the_unit_that_is_found(made: Any, data: st.DataObject) -> None:
    layer, x, channels, last, _ = made
    planted = data.draw(st.integers(0, channels - 1))
    net = Reads(layer, planted, last=last).eval()
    name = data.draw(st.sampled_from(["layer", f"layer.{len(layer) - 1}"]))
    found = LayerCausalEffect(net, name, outcome=None).estimate(x)
    assert found.effect.shape[1] == channels
    assert found.settings["channel_dim"] == (x.dim() - 1 if last else 1)
    others = [u for u in range(channels) if u != planted]
    assert bool((found.effect[:, others] == 0).all())
    assert bool((found.effect[:, planted, 0] < 0).all())


@settings(max_examples=25, deadline=None)
@given(made=layers(), data=st.data())
def test_the_planted_position_is_the_unit_that_is_found(made: Any, data: st.DataObject) -> None:
    layer, x, _, last, _ = made
    sizes = x.shape[1:-1] if last else x.shape[2:]
    unit = data.draw(st.integers(0, sizes.numel() - 1))
    mask = (torch.arange(sizes.numel()) == unit).reshape(sizes)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x) * (mask[..., None] if last else mask)
            return h.flatten(1).square().sum(1, keepdim=True)

    found = LayerCausalEffect(Net().eval(), LayerSite("layer", "positions"), outcome=None).estimate(x).effect[..., 0]
    assert found.shape == (2, sizes.numel())
    assert found.abs().argmax(1).tolist() == [unit, unit]
    # The map of the layer is where the position is.
    site = LayerSite("layer", channel_dim=-1) if last else "layer"
    cem = CausalEffectMap(Net().eval(), site, outcome=None).attribute(x)
    assert cem.shape == (2, 1, *sizes)


@pytest.mark.parametrize("make", ["conv1d", "swin", "convnext", "vit"])
def test_layers_of_known_networks(make: str) -> None:
    from torchvision import models

    if make == "conv1d":
        net: nn.Module = nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        x, wanted = torch.rand(1, 2, 60), {"0": 8, "1": 8, "2": 8}
    elif make == "swin":
        net, x = models.swin_v2_t(), torch.rand(1, 3, 64, 64)
        wanted = {"features.7.1.norm2": 768, "features.7.1": 768, "features.7": 768, "features.0.1": 96, "permute": 768}
    elif make == "convnext":
        net, x = models.convnext_tiny(), torch.rand(1, 3, 64, 64)
        wanted = {"features.7.2": 768, "features.7.2.block.2": 768, "features.6.0": 384, "features.0.1": 96}
        wanted |= {
            "features.7.2.block.1": 768,
            "features.7.2.block.4": 3072,
            "features.7.2.block.6": 768,
            "avgpool": 768,
        }
    else:
        net = models.VisionTransformer(16, 4, 2, 2, 12, 24, num_classes=3)
        x, wanted = torch.rand(1, 3, 16, 16), {"encoder": 12, "encoder.layers.encoder_layer_0": 12, "conv_proj": 12}
        wanted |= {"encoder.dropout": 12, "encoder.layers.encoder_layer_0.mlp.1": 24}
    net.eval()
    for name, channels in wanted.items():
        site, shape = LayerSite(name), []
        handle = net.get_submodule(name).register_forward_hook(lambda m, a, out, s=shape: s.append(out.detach()))
        with torch.no_grad():
            net(x)
        handle.remove()
        (value,) = shape
        assert site.laid_out(value, [net]).units_of((value,)).width == channels, name


def test_what_was_taken_is_said(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 58, 3))
    with caplog.at_level(logging.INFO, "ce_plugin"):
        found = LayerCausalEffect(net, "1").estimate(torch.rand(1, 2, 60))
    assert "1 of shape (1, 8, 58): dimension 1 holds the channels, as Conv1d has it" in caplog.text
    assert found.settings["channel_dim"] == 1


class Asks(nn.Module):
    """Nothing in it tells where the channels are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 6))
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale).flatten(1)[:, :2]


def test_where_nothing_tells_it_is_asked() -> None:
    net, x = Asks(), torch.rand(2, 4, 6)
    with pytest.raises(UnitError, match=r"which dimension.*`LayerSite\(layer, channel_dim=1\)` for.*`channel_dim=-1`"):
        LayerCausalEffect(net, "inner").estimate(x)
    for dim, units in ((1, 4), (-1, 6), (2, 6), (-2, 4)):
        assert LayerCausalEffect(net, LayerSite("inner", channel_dim=dim)).estimate(x).effect.shape[1] == units
    for dim in (3, -3, 9):
        with pytest.raises(UnitError, match="argument `channel_dim` to be from 1 to 2"):
            LayerCausalEffect(net, LayerSite("inner", channel_dim=dim)).estimate(x)
    # A mask of the units' own needs none.
    mask = torch.arange(4)[:, None].expand(4, 6)
    assert LayerCausalEffect(net, LayerSite("inner", layer_mask=mask)).estimate(x).effect.shape[1] == 4


def test_a_square_token_map_of_a_convolution_is_asked_about() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.out = nn.Conv2d(3, 4, 2, 2), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.proj(x).flatten(2).transpose(1, 2))  # (N, 4, 4): tokens and channels are as many

    net = Embedding()
    assert channel_dim([net], net.out, torch.Size([1, 4, 4])) is None
    assert channel_dim([net], net.out, torch.Size([1, 9, 4])) == (2, "Conv2d")


def test_a_concatenation_is_not_taken_for_a_permutation() -> None:
    class Dense(nn.Module):
        def __init__(self, *, permuted: bool) -> None:
            super().__init__()
            self.conv, self.norm, self.permuted = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), permuted

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.conv(x))
            return h.movedim(1, -1) if self.permuted else torch.cat([h, h], 1)

    for permuted in (False, True):
        net = nn.Sequential(Dense(permuted=permuted), nn.Flatten()).eval()
        # As wide as the convolution has channels: (N, 8, 4, 4), or (N, 7, 7, 4).
        x = torch.rand(1, 3, *([7, 7] if permuted else [4, 4]))
        with pytest.raises(UnitError, match="which dimension holds the channels"):
            LayerCausalEffect(net, "0", outcome=None).estimate(x, target=0)
    net = nn.Sequential(Dense(permuted=False), nn.Flatten()).eval()
    found = LayerCausalEffect(net, "0", outcome=None).estimate(torch.rand(1, 3, 5, 5), target=0)
    assert found.effect.shape[1] == 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        heads = [
            F.scaled_dot_product_attention(*(part[..., own] for part in (q, k, v)))
            for own in (slice(0, 3), slice(3, 6))
        ]
        return self.proj(torch.cat(heads, -1))


@pytest.mark.parametrize("layer", ["0", "0.proj"])
def test_heads_that_are_mixed_are_refused_and_the_hint_works(layer: str) -> None:
    net, x = nn.Sequential(Attention(), nn.Flatten(), nn.Linear(24, 2)), torch.rand(1, 4, 6)
    with pytest.raises(UnitError, match=r"0.proj has mixed them. Take .*LayerSite\('0.proj', units='heads'"):
        LayerCausalEffect(net, LayerSite(layer, "heads", n_heads=2)).estimate(x)
    found = LayerCausalEffect(net, LayerSite("0.proj", units="heads", n_heads=2, at_input=True)).estimate(x)
    assert found.effect.shape == (1, 2, 2)
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    wrapped = nn.ModuleList([attention])
    with pytest.raises(UnitError, match="MultiheadAttention has mixed them"):
        LayerSite("0", "heads", n_heads=2).laid_out(torch.rand(1, 4, 6), [wrapped])


def test_evidence_at_a_layer_is_laid_out_too() -> None:
    net = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)).eval()
    x = torch.rand(1, 2, 9)
    held = Evidence(ZeroOut(), site=LayerSite("0"), units=[0, 1, 2, 3])
    reference = CausalEffect(net, *Z, outcome=None).estimate(x, given=held).reference
    torch.testing.assert_close(reference, net[3](torch.zeros(1, 36)))


def test_units_of_evidence_at_the_input_are_those_of_the_explainer() -> None:
    for net, x in (
        (nn.Conv1d(2, 2, 1), torch.rand(2, 2, 40)),
        (nn.LSTM(2, 2, batch_first=True), torch.rand(2, 40, 2)),
    ):
        recurrent = isinstance(net, nn.LSTM)
        own: Any = {"output": (lambda y: y[0].sum(1)) if recurrent else (lambda y: y.sum(2)), "outcome": None}
        explainer = CausalEffect(net, PixelMask("mean"), OneAtATime(), **own)
        found = explainer.estimate(x, given=Evidence(PixelMask("mean"), units=[3, 7]))
        dim = found.settings["channel_dim"]
        held = x.movedim(dim, 1).clone()
        held[:, :, [3, 7]] = held.mean(2, keepdim=True)
        torch.testing.assert_close(found.reference, own["output"](net(held.movedim(1, dim))).detach())


# Inputs.


@pytest.mark.parametrize(
    ("net", "shape", "grid"),
    [
        (nn.Conv1d(2, 3, 3), (1, 2, 300), (64,)),
        (nn.Conv1d(2, 3, 3), (1, 2, 20), (20,)),
        (nn.LSTM(2, 3, batch_first=True), (1, 300, 2), (64,)),
        (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), (1, 50, 6), (50,)),
        (nn.Conv2d(3, 4, 3), (1, 3, 64, 32), (14, 14)),
        (nn.Conv2d(3, 4, 3), (1, 64, 32, 3), (14, 14)),
        (nn.Conv3d(1, 4, 3), (1, 1, 16, 30, 30), (8, 8, 8)),
        (nn.Conv3d(2, 4, 1), (1, 5, 30, 30, 2), (5, 8, 8)),
        (nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), (1, 2, 4), None),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 1, 2, 2), (2, 2)),
        (nn.Identity(), (1, 4, 5), None),
        (nn.Identity(), (1, 40), None),
    ],
)
def test_the_default_grid(net: nn.Module, shape: tuple[int, ...], grid: tuple[int, ...] | None) -> None:
    from ce_plugin.attribution._experiment import Call

    x = torch.rand(shape)
    site, _, design = CausalEffect(net)._setup(Call(inputs=x), (x,))
    units = site.units_of((x,))
    assert units.grid == grid
    assert isinstance(design, RandomRegions) == (grid is not None and min(grid) >= 5)
    if grid is not None:
        (mask,) = units.masks(torch.eye(units.width)[:1] > 0, torch.tensor([0]))
        found = input_channel_dim([net], x.shape)
        assert mask.shape[1 if found is None else found[0]] == 1  # all channels together


@settings(max_examples=12, deadline=None)
@given(rank=st.integers(1, 3), last=st.booleans(), seed=st.integers(0, 99))
def test_a_planted_part_of_a_signal_picture_or_volume_is_found(rank: int, last: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    size = {1: 256, 2: 28, 3: 16}[rank]
    corner = torch.randint(0, size - size // 4, (rank,), generator=draw).tolist()
    where = torch.zeros([size] * rank, dtype=torch.bool)
    where[tuple(slice(a, a + size // 4) for a in corner)] = True
    # Not used by forward but for its layout.
    first = (nn.Linear if last and rank == 1 else CONVS[rank])(*((3, 4) if last and rank == 1 else (3, 4, 1)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = first

        def forward(self, x: Tensor) -> Tensor:
            own = (x * (where[..., None] if last else where)).flatten(1).sum(1) / (3 * where.sum())
            return torch.stack([own, -own], 1)

    sizes = [size] * rank
    x = 0.5 + torch.rand(1, *([*sizes, 3] if last else [3, *sizes]), generator=draw)
    design = RandomRegions(0.5, 150, seed=seed)
    plane = CausalEffect(Net(), PixelMask("zero"), design, outcome=None).attribute(x, target=0)
    plane = plane.movedim(-1, 1)[0, 0] if last else plane[0, 0]
    assert float(plane[where].mean()) > 4 * float(plane[~where].abs().mean())


@pytest.mark.parametrize("cells", [(64,), (14, 14), (8, 8, 8), (5, 9, 3)])
def test_designs_over_grids_of_any_rank(cells: tuple[int, ...]) -> None:
    units = torch.Size(cells).numel()
    for design in (RandomRegions(0.3, 300), RandomWindows(0.3, 300)):
        drawn = design.assignments(units, grid=cells)
        assert drawn.shape == (300, units)
        assert abs(float(drawn.float().mean()) - 0.3) < 0.05
        # Neighbours along every dimension flip together more often than by chance.
        volume = drawn.reshape(300, *cells).float()
        for dim in range(1, volume.dim()):
            one, other = volume.narrow(dim, 0, cells[dim - 1] - 1), volume.narrow(dim, 1, cells[dim - 1] - 1)
            assert float(((one - 0.3) * (other - 0.3)).mean()) > 0.05
    with pytest.raises(Exception, match="not a grid"):
        RandomRegions().assignments(units + 1, grid=cells)


@pytest.mark.parametrize("cells", [(30,), (4, 4, 4)])
def test_the_smooth_estimator_over_grids_of_any_rank(cells: tuple[int, ...]) -> None:
    units = torch.Size(cells).numel()
    a = RandomRegions(0.5, 200).assignments(units, grid=cells)
    planted = torch.linspace(-1, 1, units)[:, None]
    found = smooth(a, a.float() @ planted, cells)
    assert float((found.effect - planted).abs().max()) < 0.1


@pytest.mark.parametrize(("rank", "mode"), [(1, "linear"), (2, "bilinear"), (3, "trilinear")])
def test_maps_of_any_rank(rank: int, mode: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(CONVS[rank](1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 6**rank, 2)).eval()
    x = torch.rand(2, 1, *[8] * rank)
    maps = CausalEffectMap(net, "1")
    found, effects = maps.attribute(x, target=0), LayerCausalEffect(net, "1", outcome="logit").estimate(x, target=0)
    assert found.shape == (2, 1, *[6] * rank)
    torch.testing.assert_close(
        found.flatten(1).sum(1), effects.contribution[..., 0].sum(1).to(found), atol=1e-5, rtol=1e-4
    )
    large = CausalEffectMap.interpolate(found, (12,) * rank, mode)
    torch.testing.assert_close(large, F.interpolate(found, [12] * rank, mode=mode))


def test_tokens_are_asked_about_before_any_trial() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(20, 2))
    with pytest.raises(InputError, match=r"`reshape_transform=`.*for a map along a sequence `channel_dim=-1`"):
        CausalEffectMap(net, "0").attribute(torch.rand(1, 5, 3))
    assert CausalEffectMap(net, LayerSite("0", channel_dim=-1)).attribute(torch.rand(1, 5, 3)).shape == (1, 1, 5)


# Fills.


@pytest.mark.parametrize(
    "shape", [(60, 1), (60, 2), (1, 60), (2, 2), (4, 4), (60,), (2,), (3, 9, 9), (2, 2, 2), (1, 1, 30)]
)
def test_a_blur_changes_whatever_can_be_blurred(shape: tuple[int, ...]) -> None:
    x = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    found = PixelMask("blur")(x)
    assert float(found.std()) < 0.95 * float(x.std())
    constant = torch.full((1, 3, *shape), 0.7)
    torch.testing.assert_close(PixelMask("blur")(constant), constant)
    # Every channel by itself, whatever else is there.
    torch.testing.assert_close(PixelMask("blur")(x[:, 1:2]), found[:, 1:2])


@pytest.mark.parametrize("fill", ["mean", "blur", "noise", 0.3, ("mean", "blur")])
def test_fills_are_the_same_with_the_channels_in_the_last_dimension(fill: Any) -> None:
    x = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    units: Any = {"normalization": ((0.1, 0.2, 0.3), (0.5, 1.0, 2.0)), "region": (1, 2, 8, 12)}
    wanted = PixelMask(fill, **units)(x)
    found = PixelMask(fill, channel_dim=-1, **units)(x.movedim(1, -1))
    torch.testing.assert_close(found.movedim(-1, 1), wanted)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.movedim(-1, 1)).relu().sum((2, 3))

    net, mask = Last(), PixelMask(fill, **units)
    first = CausalEffect(net.conv, mask, OneAtATime(), output=lambda y: y.relu().sum((2, 3)), outcome=None)
    last = CausalEffect(net, mask, OneAtATime(), outcome=None)
    found, wanted = last.estimate(x.movedim(1, -1)), first.estimate(x)
    torch.testing.assert_close(found.effect, wanted.effect, atol=1e-4, rtol=1e-4)
    assert "channel_dim=-1" in found.intervention


def test_the_blur_of_a_volume_is_scipys() -> None:
    from scipy.ndimage import gaussian_filter

    x = torch.rand(1, 1, 12, 20, 30, dtype=torch.float64)
    wanted = gaussian_filter(x[0, 0].numpy(), 1.5, mode="mirror", radius=4)
    torch.testing.assert_close(PixelMask("blur", sigma=1.5)(x)[0, 0], torch.from_numpy(wanted))
    along = gaussian_filter(x[0, 0, 0, 0].numpy(), 1.5, mode="mirror", radius=4)
    torch.testing.assert_close(PixelMask("blur", sigma=1.5)(x[:, :, 0, 0])[0, 0], torch.from_numpy(along))


def test_one_fill_of_several_that_does_nothing_is_warned_of() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    mask, x = PixelMask(("zero", "blur")), torch.rand(2, 3, 2, 2)
    with pytest.warns(NoChangeWarning, match=r"Alternative 2 of the 2 values of .*example\(s\) \[1\].*by about 1/2"):
        CausalEffect(net, mask, OneAtATime()).attribute(torch.stack([x[0], torch.full((3, 2, 2), 0.5)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoChangeWarning)
        CausalEffect(net, mask, OneAtATime()).attribute(x)
    with pytest.warns(NoChangeWarning, match="zero by construction") as caught:
        CausalEffect(net, mask, OneAtATime()).attribute(0 * x)
    assert len(caught) == 1


# Additional arguments.


class Product(nn.Module):
    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        return x @ p.T


class Sum(nn.Module):
    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        return (x * p).tanh()


class Both(nn.Module):
    def forward(self, x: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return (x * p) @ q.T


@settings(max_examples=40, deadline=None)
@given(
    net=st.sampled_from([Product(), Sum(), Both()]), n=st.integers(1, 4), m=st.integers(1, 4), width=st.integers(1, 4),
    rows=st.sampled_from([None, 1, 2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_additional_arguments_mean_what_the_model_makes_of_them(
    net: nn.Module, n: int, m: int, width: int, rows: int | None, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, own, shared = (torch.rand(k, width, generator=draw) for k in (n, n, m))
    args: Any = {Product: shared, Sum: own, Both: (own, shared)}[type(net)]
    # By hand: the whole batch with one column set to zero in all examples.
    every = args if isinstance(args, tuple) else (args,)
    wanted = torch.stack(
        [(net(x, *every) - net(x * (torch.arange(width) != u), *every))[:, 0] for u in range(width)], 1
    )
    found = CausalEffect(net, *Z, outcome=None).attribute(
        x, target=0, additional_forward_args=args, perturbations_per_eval=rows
    )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_an_argument_for_the_batch_with_as_many_rows_as_examples(caplog: pytest.LogCaptureFixture) -> None:
    x, p = torch.rand(3, 4), torch.rand(3, 4)
    with caplog.at_level(logging.INFO, "ce_plugin"):
        found = CausalEffect(Product(), *Z, outcome=None).attribute(
            x, target=0, additional_forward_args=p, perturbations_per_eval=1
        )
    wanted = FeatureAblation(Product()).attribute(x, target=0, additional_forward_args=p)
    torch.testing.assert_close(found, wanted)
    assert "additional_forward_args[0] belongs to all examples" in caplog.text


def test_a_shared_argument_at_a_layer_and_in_every_engine() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, p: Tensor) -> Tensor:
            return self.layer(x).relu() @ p.T

    torch.manual_seed(1)
    net, x, p = Net(), torch.rand(3, 4), torch.rand(3, 4)
    wanted = LayerCausalEffect(lambda x: net(x, p), "layer", outcome=None, engine="full").estimate(x).effect
    for engine in ("auto", "full"):
        found = LayerCausalEffect(net, "layer", outcome=None, engine=engine).estimate(x, additional_forward_args=p)  # type: ignore[arg-type]
        torch.testing.assert_close(found.effect, wanted)
    cost = LayerCausalEffect(net, "layer", outcome=None).estimate_cost(x, additional_forward_args=p)
    assert cost.route == "full"


def test_arguments_that_fit_neither_way_are_refused() -> None:
    class Mixes(nn.Module):
        def forward(self, x: Tensor, p: Tensor) -> Tensor:
            return x + p.reshape(len(x), -1, 4).sum(1)

    x = torch.rand(3, 4)
    with pytest.raises(
        ArgumentError, match=r"shapes \[\(6, 4\)\], with which examples give other.*own row, \(N, ...\)"
    ):
        CausalEffect(Mixes(), *Z, outcome=None).attribute(x, target=0, additional_forward_args=torch.rand(6, 4))
    obeyed = torch.rand(6, 4).reshape(3, 2, 4)  # a row for each example
    CausalEffect(Mixes(), *Z, outcome=None).attribute(x, target=0, additional_forward_args=obeyed)
    with pytest.raises(ArgumentError, match=r"what the model takes with inputs \(3, 4\), but got .*\(5, 4\).*it fails"):
        CausalEffect(Sum(), *Z, outcome=None).attribute(x, target=0, additional_forward_args=torch.rand(5, 4))


def test_evidence_and_random_designs_with_a_shared_argument() -> None:
    x, p = torch.rand(3, 4), torch.rand(3, 4)
    run = {"design": RandomMask(0.5, 60), "outcome": None}
    wanted = CausalEffect(lambda x: x @ p.T, PixelMask(), **run).estimate(x, given=Evidence(PixelMask(0.5), units=[0]))
    found = CausalEffect(Product(), PixelMask(), **run).estimate(
        x, given=Evidence(PixelMask(0.5), units=[0]), additional_forward_args=p
    )
    torch.testing.assert_close(found.effect, wanted.effect)


# Pictures.


def test_signals_and_volumes_are_drawn() -> None:
    for conv, x in ((nn.Conv1d(2, 3, 3), torch.rand(1, 2, 40)), (nn.Conv3d(1, 3, 3), torch.rand(1, 1, 9, 8, 8))):
        net = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).eval()
        with torch.no_grad():
            net(x)
        found = CausalEffect(net, PixelMask(), RandomRegions(0.5, 40)).estimate(x, target=0)
        figure = found.plot(x[0])
        assert len(figure.axes) == (1 if x.dim() == 3 else 6)
    sequence = torch.rand(1, 40, 2)
    recurrent = nn.LSTM(2, 3, batch_first=True).eval()
    found = CausalEffect(lambda x: recurrent(x)[0][:, -1], PixelMask(), OneAtATime()).estimate(sequence, target=0)
    assert found.settings["channel_dim"] == 2
    (axes,) = found.plot(sequence[0]).axes
    assert len(axes.lines) == 2
    assert InputSite(channel_dim=-1).units_of((sequence,)).width == 40
