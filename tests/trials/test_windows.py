"""Windows of differences are what full passes compute, whatever the kernels, strides, paddings and positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ce_plugin.networks.graph import HookPoint, Suffix
from ce_plugin.trials._incremental import IncrementalForward
from ce_plugin.trials._states import Window, as_dense
from ce_plugin.trials._windows import window_of


def windows(height: int, width: int, size: tuple[int, int], stride: int, rows: int | None = None) -> Tensor:
    """All windows on a grid, also at the far borders, (B, 1, H, W)."""
    tops = sorted({*range(0, height - size[0], stride), height - size[0]})
    lefts = sorted({*range(0, width - size[1], stride), width - size[1]})
    masks = torch.zeros(len(tops) * len(lefts), 1, height, width, dtype=torch.bool)
    for row, (top, left) in enumerate((top, left) for top in tops for left in lefts):
        masks[row, :, top : top + size[0], left : left + size[1]] = True
    return masks if rows is None else masks[:: max(1, len(masks) // rows)]


def check(
    network: nn.Module, module: nn.Module | None, masks: Tensor, x: Tensor, tol: float = 1e-10
) -> IncrementalForward:
    """Against full passes, relative to the largest effect."""
    suffix = Suffix(network, HookPoint(module))
    captured = suffix.capture((x,))
    clean = captured.site.clone()
    do = torch.randn(1, *clean.shape[1:], generator=torch.Generator().manual_seed(1)).to(clean)
    rows = x.expand(len(masks), *x.shape[1:])
    if module is None:
        expected = network(torch.where(masks, do, rows))
    else:
        with module.register_forward_hook(lambda m, args, out: torch.where(masks, do, out)):
            expected = network(rows)
    local = IncrementalForward(suffix, captured)
    effect = float((expected - network(x)).abs().max())
    assert effect > 1e-6 * float(expected.abs().max())  # or an engine that returns zeros would pass
    for _ in range(2):
        assert float((local(0, do, masks) - expected).abs().max()) <= tol * effect
    assert torch.equal(captured.site, clean)
    return local


class Body(nn.Module):
    """Something between a site of three channels and a head that looks at every cell."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.site, self.middle, self.head = nn.Conv2d(3, 3, 1), middle, nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.site(x)).flatten(1))


def body(middle: nn.Module, x: Tensor) -> nn.Module:
    network = Body(middle).eval()
    network(x)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.3, 1)
    return network.double()


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.branch, self.join = branch, join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.branch(x), x)


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "block": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3, padding=1), nn.GELU()),
    "downwards": lambda: nn.Sequential(*[nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.SiLU()]),
    "bias": lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, bias=False)),
    "depthwise": lambda: nn.Conv2d(3, 3, 5, padding=2, groups=3),
    "reflecting": lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
    "pads": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 2, 1)), nn.Conv2d(3, 3, 3, 2), nn.ConstantPad2d(1, 0.5)),
    "mean": lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Hardswish()),
    "adaptive": lambda: nn.Sequential(nn.AdaptiveAvgPool2d((20, 18)), nn.AdaptiveAvgPool2d((5, 3))),
    "add": lambda: Residual(nn.Conv2d(3, 3, 3, padding=1), lambda a, b: (a + b).relu_()),
    "two boxes": lambda: Residual(
        nn.Sequential(nn.ZeroPad2d((2, 0, 2, 0)), nn.Conv2d(3, 3, 3)), lambda a, b: a - 2 * b
    ),
    "squeeze": lambda: Residual(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1)), lambda a, b: b * a),
    "by-pass of a cell": lambda: Residual(nn.Identity(), lambda a, b: a * torch.arange(18.0) + torch.ones(3, 1, 1)),
    "cat": lambda: Residual(nn.Conv2d(3, 2, 3, padding=1), lambda a, b: torch.cat([a, b, a], 1)),
    "softmax": lambda: nn.Sequential(nn.Softmax(1), nn.Conv2d(3, 2, 1)),
    "up": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 2, 1)),
    "group norm": lambda: nn.Sequential(nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 1)),
}


@pytest.mark.parametrize("name", list(MIDDLES))
def test_each_operation_on_windows_is_as_with_hooks(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 20, 18)
    network = body(MIDDLES[name](), x)
    local = check(network, network.site, windows(20, 18, (4, 3), 3), x.double())
    assert local.route == "window differences"
    assert check(network, None, windows(20, 18, (4, 3), 5), x.double()).route == "window differences"


pairs = st.tuples


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_kernel_on_any_window(data: st.DataObject) -> None:
    draw = data.draw
    kernel = draw(pairs(st.integers(1, 5), st.integers(1, 4)))
    stride = draw(pairs(st.integers(1, 4), st.integers(1, 3)))
    dilation = draw(pairs(st.integers(1, 2), st.integers(1, 2)))
    form = draw(st.sampled_from(["conv", "grouped", "max", "avg"]))
    most = [k // 2 if form in ("max", "avg") else k + 1 for k in kernel]
    padding = draw(pairs(st.integers(0, most[0]), st.integers(0, most[1])))
    ceil, include = draw(st.booleans()), draw(st.booleans())
    middle: nn.Module
    if form in ("conv", "grouped"):
        groups = 1 if form == "conv" else 3
        middle = nn.Conv2d(3, 3, kernel, stride, padding, dilation, groups)
    elif form == "max":
        middle = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil)
    else:
        divisor = draw(st.sampled_from([None, 3]))
        middle = nn.AvgPool2d(kernel, stride, padding, ceil, include, divisor)
    size = draw(pairs(st.integers(1, 6), st.integers(1, 6)))
    seed = draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    masks = torch.zeros(5, 1, 15, 14, dtype=torch.bool)
    for row in range(5):
        height, width = int(torch.randint(1, size[0] + 1, ())), int(torch.randint(1, size[1] + 1, ()))
        top, left = int(torch.randint(0, 16 - height, ())), int(torch.randint(0, 15 - width, ()))
        masks[row, :, top : top + height, left : left + width] = True
    masks[0] = False
    masks[0, :, 0, 0] = True
    x = torch.randn(1, 3, 15, 14).double()
    network = nn.Sequential(nn.Identity(), middle, nn.Flatten()).double().eval()
    suffix = Suffix(network, HookPoint(network[0]))
    do = torch.randn(1, 3, 15, 14).double()
    expected = network(torch.where(masks, do, x))
    torch.testing.assert_close(
        IncrementalForward(suffix, suffix.capture((x,)))(0, do, masks), expected, rtol=1e-10, atol=1e-10
    )


def test_the_smallest_rectangle_is_found() -> None:
    site, do = torch.zeros(1, 2, 8, 9), torch.arange(144.0).view(1, 2, 8, 9) + 1
    masks = torch.zeros(3, 2, 8, 9, dtype=torch.bool)
    masks[0, 0, 1, 2] = masks[0, 1, 3, 2] = True
    masks[1, :, 7, 8] = True
    found = window_of(site, do, masks)
    assert isinstance(found, Window)
    assert found.size == (3, 1)
    assert found.top.tolist() == [1, 5, 0]
    assert found.left.tolist() == [2, 8, 0]
    torch.testing.assert_close(as_dense(found, 3), torch.where(masks, do, site))
    assert window_of(site, do, torch.ones(1, 1, 8, 9, dtype=torch.bool)) is None
    assert window_of(torch.zeros(1, 4), torch.zeros(1, 4), torch.eye(4, dtype=torch.bool)) is None


def test_only_windows_are_run() -> None:
    x = torch.randn(1, 3, 32, 32)
    network = body(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)), x)
    suffix = Suffix(network, HookPoint())
    captured = suffix.capture((x.double(),))
    masks = windows(32, 32, (4, 4), 7)
    local = IncrementalForward(suffix, captured)
    cost = local.cost(torch.zeros(1, 3, 32, 32), masks)
    # Per cell 9, 216 and 576 multiplications; windows of 4, 6 and 8 cells; the head sees all of 8 x 32 x 32, twice.
    cells = 32 * 32
    full = cells * (9 + 216 + 576 + 16)
    assert cost == pytest.approx((16 * 9 + 36 * 216 + 64 * 576 + 16 * cells) / full, rel=0.01)


def test_a_window_in_one_channel_of_a_grey_image() -> None:
    x = torch.randn(1, 1, 20, 20).double()
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten()).double().eval()
    assert check(network, None, windows(20, 20, (5, 5), 5), x).route == "window differences"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", None),
        ("resnet18", "layer1"),
        ("mobilenet_v2", None),
        pytest.param("vgg11_bn", None, marks=pytest.mark.slow),
        pytest.param("densenet121", None, marks=pytest.mark.slow),
        pytest.param("inception_v3", None, marks=pytest.mark.slow),
    ],
)
def test_networks_of_torchvision(name: str, layer: str | None) -> None:
    torch.manual_seed(0)
    options = {"init_weights": True, "aux_logits": False} if name == "inception_v3" else {}
    network: Any = torchvision.models.get_model(name, weights=None, num_classes=7, **options).double()
    x = torch.randn(1, 3, 96, 96).double()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    network.train()
    with torch.no_grad():
        network(torch.randn(4, 3, 96, 96).double())  # batch-norm statistics that keep activations moderate
    network.eval()
    with torch.inference_mode():
        module = network.get_submodule(layer) if layer else None
        shape = Suffix(network, HookPoint(module)).capture((x,)).site.shape
        masks = windows(shape[2], shape[3], (shape[2] // 8, shape[3] // 8), shape[2] // 8, rows=5)
        assert check(network, module, masks, x, tol=1e-9).route == "window differences"
