"""The registry of methods: what they return, that passes are counted, and that networks stay as they were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from captum.attr import FeatureAblation, LayerGradCam, Saliency
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ce_plugin import CausalEffect
from ce_plugin.errors import ArgumentError, ModelError, UnknownNameError
from ce_plugin.evaluation import METHODS, Scene, attribution_method, explain, resolve_method
from ce_plugin.evaluation.methods import _Ridge, _with_identity

SIDE = 24
BUDGETED = [name for name, method in METHODS.items() if method.budget]
CAMS = ("ablation-cam", "score-cam")


class Bright(nn.Module):
    """Logit 1 is the brightness of rows 6 to 11 and columns 12 to 17, read by a convolution and a weighted pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.look = nn.Conv2d(4, 2, 6, stride=6)
        self.pool = nn.AdaptiveMaxPool2d(1)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:, 0, 1, 1] = torch.tensor([1.0, 1.0, 0.5, -1.0])
            self.conv.bias.zero_()
            self.look.weight.zero_()
            self.look.weight[1, :3] = 0.05
            self.look.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.look(self.act(self.conv(x)))).flatten(1)


def scene(signed: bool = False) -> Scene:
    x = torch.full((1, 1, SIDE, SIDE), 0.05)
    x[..., 6:12, 12:18] = 1.0
    return Scene(x, 1, Bright().eval(), ident=3, signed=signed)


def available(name: str) -> str:
    if name in CAMS:
        pytest.importorskip("pytorch_grad_cam")
    return name


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("random", "centre")])
def test_a_method_finds_what_the_network_looks_at(name: str) -> None:
    found = METHODS[available(name)](scene(), 400)
    assert found.shape == (SIDE, SIDE)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    inside = found[6:12, 12:18].mean()
    away = torch.cat([found[:, :6], found[:, -3:]], 1).mean()
    assert inside > away + 0.2 * (found.max() - found.min())


@pytest.mark.parametrize("name", METHODS)
def test_a_map_is_the_same_again_and_leaves_network_and_random_state(name: str) -> None:
    one = scene()
    before = {key: value.clone() for key, value in one.network.state_dict().items()}
    children = dict(one.network.named_modules())
    torch.manual_seed(5)
    first = METHODS[available(name)](one, 40)
    after = torch.rand(1)
    assert bool((first == METHODS[name](one, 40)).all())
    torch.manual_seed(5)
    assert bool((after == torch.rand(1)).all())
    assert dict(one.network.named_modules()) == children
    assert all(bool((value == before[key]).all()) for key, value in one.network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.network.modules())
    assert all(parameter.grad is None for parameter in one.network.parameters())


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("passes", [12, 20, 75])
def test_a_budget_is_kept(name: str, passes: int) -> None:
    counted = explain(METHODS[name], scene(), passes).passes
    if name == "occlusion":  # takes products of whole numbers
        assert 0.6 * passes < counted <= passes
    else:  # a first run may try a layout of memory with two rows
        assert passes <= counted <= passes + 2 * (name in ("causal-effect", "random-mask"))


def test_passes_are_counted_as_they_are_made() -> None:
    counts = {name: explain(METHODS[name], scene()).passes for name in METHODS if name not in (*CAMS, *BUDGETED)}
    assert counts["saliency"] == counts["input-x-gradient"] == 3
    assert counts["smoothgrad"] == counts["integrated-gradients"] == 150
    assert counts["random"] == counts["centre"] == 0
    # The layer is found by a pass of its own, once for a network.
    one = scene()
    assert [explain(METHODS["grad-cam"], one).passes for _ in range(2)] == [4, 3]
    assert 2 < counts["causal-effect-map"] < 6


@pytest.mark.parametrize("name", CAMS)
def test_a_pass_for_each_channel_is_counted(name: str) -> None:
    one = scene()
    explain(METHODS[available(name)], one)
    assert explain(METHODS[name], one).passes == {"ablation-cam": 2 + 2, "score-cam": 1 + 2}[name]


def test_part_of_a_pass_counts_by_its_operations() -> None:
    one = scene()
    net = one.network

    def half(x: Tensor, target: int) -> Tensor:
        with torch.no_grad():
            net(x)
            return net.act(net.conv(x)).sum(1)[0]

    # conv: 24 * 24 * 4 * 9 products, look: 4 * 4 * 2 * 4 * 36
    share = 24 * 24 * 4 * 9 / (24 * 24 * 4 * 9 + 16 * 2 * 4 * 36)
    assert explain(resolve_method(half), one).passes == pytest.approx(1 + share, abs=0.005)


def test_passes_through_other_arithmetic_count_too() -> None:
    one = scene()
    rows = []

    def fast(images: Tensor) -> Tensor:
        rows.append(len(images))
        return one.network.forward(images)

    assert explain(METHODS["rise"], replace(one, forward=fast), 30).passes == 30 == sum(rows)
    # One that calls the network itself is not counted twice.
    assert explain(METHODS["rise"], replace(one, forward=lambda images: one.network(images)), 30).passes == 30


def test_a_captum_attribution_and_a_callable_are_methods() -> None:
    one = scene()
    gradient = attribution_method(Saliency(one.network), abs=False)
    assert bool((gradient(one) == torch.autograd.functional.jacobian(one.network, one.x)[0, 1, 0, 0]).all())
    assert resolve_method(FeatureAblation(one.network)).name == "FeatureAblation"
    layer = resolve_method(LayerGradCam(one.network, one.network.act))
    assert layer(one).shape == (SIDE, SIDE)
    ours = resolve_method(CausalEffect(one.network))
    assert bool((ours(one) == CausalEffect(one.network).attribute(one.x, target=1)[0, 0]).all())
    own = resolve_method(lambda x, target: x[0, 0] * target, "input")
    assert own.name == "input"
    assert bool((own(one) == one.x[0, 0]).all())


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        ("occlusoin", UnknownNameError, "occlusion"),
        (3, ArgumentError, "a Captum attribution or a callable"),
    ],
)
def test_what_is_no_method_is_refused(method: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        resolve_method(method)


def test_a_map_of_another_form_is_refused() -> None:
    with pytest.raises(ModelError, match=r"maps are \(H, W\)"):
        resolve_method(lambda x, target: x[0, 0, 0])(scene())
    with pytest.raises(UnknownNameError, match="outcome"):
        replace(scene(), outcome="logit")
    with pytest.raises(ArgumentError, match="passes"):
        METHODS["occlusion"](scene(), 1)


def test_a_network_without_positions_has_no_layer() -> None:
    flat = Scene(torch.rand(1, 1, 4, 4), 0, nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval())
    with pytest.raises(ModelError, match="positions are pooled away"):
        METHODS["grad-cam"](flat)


def test_the_identity_is_taken_out_after_an_error() -> None:
    one = scene()
    children = dict(one.network.named_modules())

    def stopped() -> None:
        with _with_identity(one) as identity:
            assert identity in one.network.modules()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert dict(one.network.named_modules()) == children


def test_score_cam_and_ablation_cam_are_those_of_the_papers() -> None:
    pytest.importorskip("pytorch_grad_cam")
    one = scene()
    net, x = one.network, one.x
    with torch.no_grad():
        planes = net.look(net.act(net.conv(x)))
        masks = interpolate(planes, (SIDE, SIDE), mode="bilinear", align_corners=True)[0]
        low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
        scores = net(x * ((masks - low) / (high - low + 1e-8))[:, None])[:, 1].softmax(0)
        ablated = torch.stack([net.pool(planes * (torch.arange(2) != k)[:, None, None]).flatten(1)[0] for k in (0, 1)])
        drops = (net(x)[0, 1] - ablated[:, 1]) / net(x)[0, 1]
    for name, weights in (("score-cam", scores), ("ablation-cam", drops)):
        small = (weights[:, None, None] * planes[0]).sum(0).relu()
        large = interpolate(small[None, None], (SIDE, SIDE), mode="bilinear", align_corners=False)[0, 0]
        assert torch.corrcoef(torch.stack([large.flatten(), METHODS[name](one).flatten()]))[0, 1] > 0.999, name


def test_the_ridge_regression_is_that_of_scikit_learn() -> None:
    draw = torch.Generator().manual_seed(0)
    a, y, w = torch.rand(30, 6, generator=draw), torch.rand(30, generator=draw), torch.rand(30, generator=draw)
    ours = _Ridge(0.7)
    ours.fit([(a, y, w)])
    theirs = Ridge(0.7).fit(a.numpy(), y.numpy(), w.numpy()).coef_
    assert torch.allclose(ours.representation()[0], torch.from_numpy(theirs).float(), atol=1e-5)


def test_signs_are_kept_where_they_matter() -> None:
    one = scene(signed=True)
    dark = replace(one, x=-one.x)  # the relu lets through minus the fourth channel, which has no weight
    assert float(METHODS["input-x-gradient"](one).min()) >= 0
    flipped = Bright().eval()
    with torch.no_grad():
        flipped.look.weight.neg_()
        flipped.pool = nn.AdaptiveAvgPool2d(1)
    negative = replace(one, network=flipped)
    for name in ("input-x-gradient", "saliency"):
        assert float(METHODS[name](negative).max()) <= 1e-6, name
        assert float(METHODS[name](replace(negative, signed=False)).min()) >= 0, name
    assert float(METHODS["saliency"](dark).abs().max()) == 0
