"""Smoothing: each filter against an independent one, its gradient, its invariances and what it refuses."""

from __future__ import annotations

import io
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, UnknownNameError
from ce_plugin.interventions import Context, Smooth

ALL = [
    Smooth.bits(2),
    Smooth.median(2),
    Smooth.median(3),
    Smooth.median(4),
    Smooth.median(5),
    Smooth.mean(2),
    Smooth.gauss(1.0),
    Smooth.jpeg(75),
    Smooth.soft_threshold(0.1),
    Smooth.clip(0.2, 0.8),
    Smooth.stretch(0.2, 0.8),
    Smooth.scale(0.8),
    Smooth.shift(2, -1),
    Smooth.tv(0.1, 10),
    Smooth.noise(0.1),
    Smooth.chain(Smooth.gauss(1.0), Smooth.bits(1)),
]
EXACT = [smooth for smooth in ALL if smooth.steps[-1][0] not in ("bits", "jpeg")]
SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**31)


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape or (3, 2, 11, 7), generator=generator, dtype=torch.float64).to(dtype)


def picture() -> Tensor:
    """Something like a photograph, in bytes: smooth areas, an edge, and some grain; (1, 3, 45, 62)."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 45), torch.linspace(0, 1, 62), indexing="ij")
    planes = torch.stack([torch.sin(7 * x + 2 * y), torch.cos(5 * y), (x > y).float() - 0.5 * x])
    grain = 0.1 * torch.randn(planes.shape, generator=torch.Generator().manual_seed(1))
    return ((planes * 0.4 + 0.5 + grain).clamp(0, 1) * 255).round()[None]


# --- against independent implementations


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("shape", [(2, 3, 11, 7), (1, 1, 3, 2), (2, 1, 1, 1)])
def test_median_is_that_of_scipy(size: int, shape: tuple[int, ...]) -> None:
    x = images(*shape)
    wanted = ndimage.median_filter(x.numpy(), size=(1, 1, size, size), mode="reflect")
    np.testing.assert_array_equal(Smooth.median(size)(x).numpy(), wanted)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_mean_is_that_of_scipy(size: int) -> None:
    x = images()
    wanted = ndimage.uniform_filter(x.numpy(), size=(1, 1, size, size), mode="reflect")
    np.testing.assert_allclose(Smooth.mean(size)(x).numpy(), wanted, atol=1e-14)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.7, 6.0])
def test_gauss_is_that_of_scipy(sigma: float) -> None:
    """Also where the kernel reaches beyond the mirror image of the whole picture."""
    x = images()
    wanted = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="reflect")
    np.testing.assert_allclose(Smooth.gauss(sigma)(x).numpy(), wanted, atol=1e-13)


@pytest.mark.parametrize("depth", [1, 2, 5, 8])
def test_bits_are_roundings_of_numpy(depth: int) -> None:
    x, steps = images(dtype=torch.float32), 2**depth - 1
    np.testing.assert_allclose(Smooth.bits(depth)(x).numpy(), np.round(x.numpy() * steps) / steps, atol=1e-7)
    bytes_ = Smooth.bits(depth, value_range=(0, 255))(x * 255)
    np.testing.assert_allclose(bytes_.numpy() / 255, np.round(x.numpy() * steps) / steps, atol=1e-6)


def stored_by_pillow(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(file), dtype=np.float64)


@pytest.mark.parametrize("quality", [1, 10, 50, 75, 95, 100])
def test_jpeg_is_that_of_pillow(quality: int) -> None:
    """Sides that are no multiples of 8, in colour and in grey, in either range of values."""
    x = picture()
    ours = Smooth.jpeg(quality)(x / 255) * 255
    theirs = stored_by_pillow(x[0].permute(1, 2, 0).byte().numpy(), quality)
    assert np.abs(ours[0].permute(1, 2, 0).numpy() - theirs).max() < 1e-4
    wide = Smooth.jpeg(quality, value_range=(0.0, 255.0))(x)
    assert np.abs(wide[0].permute(1, 2, 0).numpy() - theirs).max() < 1e-4
    grey = Smooth.jpeg(quality)(x[:, 1:2] / 255) * 255
    assert np.abs(grey[0, 0].numpy() - stored_by_pillow(x[0, 1].byte().numpy(), quality)).max() < 1e-4


def test_jpeg_codes_other_numbers_of_channels_as_grey_pictures() -> None:
    x = images(2, 4, 16, 9)
    apart = torch.cat([Smooth.jpeg(30)(channel) for channel in x.split(1, 1)], 1)
    assert torch.equal(Smooth.jpeg(30)(x), apart)


def objective(u: Tensor, x: Tensor, weight: float) -> float:
    """Of total variation with softened corners, written down once more."""
    across, down = np.zeros(u.shape), np.zeros(u.shape)
    across[..., :-1], down[..., :-1, :] = np.diff(u.numpy(), axis=-1), np.diff(u.numpy(), axis=-2)
    return float(0.5 * ((u - x) ** 2).sum() + weight * np.sqrt(across**2 + down**2 + 1e-4).sum())


@settings(max_examples=30, deadline=None)
@given(height=SIZES, width=SIZES, seed=SEEDS, weight=st.floats(1e-3, 10.0))
def test_total_variation_never_rises(height: int, width: int, seed: int, weight: float) -> None:
    x = images(1, 2, height, width, seed=seed)
    path = [x, *(Smooth.tv(weight, n)(x) for n in (1, 2, 3, 5, 20))]
    values = [objective(u, x, weight) for u in path]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values))
    assert float(path[-1].min()) >= float(x.min()) - 1e-12
    assert float(path[-1].max()) <= float(x.max()) + 1e-12


def test_total_variation_comes_to_the_minimum() -> None:
    """Which is where the gradient of the objective, by automatic differentiation, vanishes."""
    x, weight = images(1, 1, 6, 5), 0.05
    u = Smooth.tv(weight, 3000)(x).requires_grad_()
    down, right = torch.zeros_like(u), torch.zeros_like(u)
    down[..., :-1, :], right[..., :-1] = u.diff(dim=-2), u.diff(dim=-1)
    (0.5 * ((u - x) ** 2).sum() + weight * (down**2 + right**2 + 1e-4).sqrt().sum()).backward()
    assert u.grad is not None
    assert float(u.grad.abs().max()) < 1e-9
    assert float((u - x).detach().abs().max()) > 0.01


# --- closed forms


def test_soft_threshold_clip_and_scale() -> None:
    x = torch.tensor([[0.0, 0.05, 0.1, 0.5, 1.0, -0.3]], dtype=torch.float64)
    np.testing.assert_allclose(Smooth.soft_threshold(0.1)(x), [[0, 0, 0, 0.4, 0.9, -0.2]], atol=1e-15)
    np.testing.assert_allclose(Smooth.clip(0.1, 0.5)(x), [[0.1, 0.1, 0.1, 0.5, 0.5, 0.1]])
    np.testing.assert_allclose(Smooth.scale(0.8)(x), [[0, 0.04, 0.08, 0.4, 0.8, -0.24]], atol=1e-15)
    around = Smooth.scale(0.5, value_range=(-1, 1))(x)
    np.testing.assert_allclose(around, -1 + (x + 1) / 2)
    np.testing.assert_allclose(Smooth.soft_threshold(0.1, value_range=(-1, 1))(x), x - 0.1, atol=1e-15)


def test_stretch_maps_its_bounds_to_the_ends_of_the_range() -> None:
    x = images()
    wanted = np.interp(x.numpy(), [0.25, 0.75], [0.0, 1.0])  # a straight line between, flat beyond
    np.testing.assert_allclose(Smooth.stretch(0.25, 0.75)(x), wanted, atol=1e-15)
    wanted = np.interp(x.numpy(), [0.1, 0.4], [-1.0, 3.0])
    np.testing.assert_allclose(Smooth.stretch(0.1, 0.4, value_range=(-1, 3))(x), wanted, atol=1e-14)
    np.testing.assert_allclose(Smooth.stretch(0.0, 1.0)(x), x, atol=1e-15)
    assert torch.equal(Smooth([["stretch", 0.25, 0.75]])(x), Smooth.stretch(0.25, 0.75)(x))


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, 0), (-2, 1), (0, -3), (100, -100)])
def test_shift_moves_right_and_down_and_repeats_the_edge(dx: int, dy: int) -> None:
    x = images(2, 3, 5, 6)
    wanted = np.empty(x.shape)
    for row in range(5):
        for column in range(6):
            wanted[:, :, row, column] = x[:, :, min(max(row - dy, 0), 4), min(max(column - dx, 0), 5)]
    np.testing.assert_array_equal(Smooth.shift(dx, dy)(x), wanted)


def test_noise_is_normal_and_depends_on_seed_and_id_only() -> None:
    x = torch.zeros(4, 1, 50, 50)
    noise = Smooth.noise(0.2).perturb(x, ids=[0, 1, 2, 0], seed=3)
    assert torch.equal(noise[0], noise[3])
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], Smooth.noise(0.2).perturb(x, ids=[0, 1, 2, 0], seed=4)[0])
    assert torch.equal(Smooth.noise(0.2).perturb(x[:2], ids=[2, 1], seed=3), noise[[2, 1]])
    assert abs(float(noise.std()) - 0.2) < 0.01
    assert abs(float(noise.mean())) < 0.01


def test_a_second_noise_is_another_one() -> None:
    x = torch.zeros(1, 1, 60, 60)
    twice = Smooth.chain(Smooth.noise(1.0), Smooth.noise(1.0))(x)
    assert abs(float(twice.std()) - 2**0.5) < 0.06  # one noise twice would have 2


def test_chain_applies_the_first_one_first() -> None:
    x = images()
    a, b = Smooth.scale(0.5), Smooth.clip(0.3, 1.0)
    assert torch.equal(Smooth.chain(a, b)(x), b(a(x)))
    assert not torch.equal(Smooth.chain(a, b)(x), Smooth.chain(b, a)(x))
    assert Smooth.chain(Smooth.chain(a, b), a).steps == (*a.steps, *b.steps, *a.steps)


# --- properties


@settings(max_examples=40, deadline=None)
@given(depth=st.integers(1, 8), seed=SEEDS)
def test_bits_are_idempotent_and_keep_the_range(depth: int, seed: int) -> None:
    x = images(1, 1, 5, 5, seed=seed)
    once = Smooth.bits(depth)(x)
    assert torch.equal(Smooth.bits(depth)(once), once)
    assert 0 <= float(once.min()) <= float(once.max()) <= 1
    assert float((once - x).abs().max()) <= 0.5 / (2**depth - 1) + 1e-12


@settings(max_examples=30, deadline=None)
@given(bounds=st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True), seed=SEEDS)
def test_clip_is_idempotent_and_keeps_its_bounds(bounds: list[float], seed: int) -> None:
    smooth, x = Smooth.clip(min(bounds), max(bounds)), images(1, 1, 5, 5, seed=seed)
    once = smooth(x)
    assert torch.equal(smooth(once), once)
    assert min(bounds) <= float(once.min()) <= float(once.max()) <= max(bounds)


@settings(max_examples=40, deadline=None)
@given(value=st.floats(0, 1), height=SIZES, width=SIZES, which=st.sampled_from(range(5)))
def test_constant_images_stay(value: float, height: int, width: int, which: int) -> None:
    smooth = [Smooth.median(3), Smooth.gauss(1.3), Smooth.mean(4), Smooth.tv(0.3, 5), Smooth.shift(1, 2)][which]
    x = torch.full((1, 2, height, width), value, dtype=torch.float64)
    tolerance = 1e-14 if which in (1, 2) else 0.0
    assert float((smooth(x) - x).abs().max()) <= tolerance


@settings(max_examples=40, deadline=None)
@given(height=SIZES, width=SIZES, seed=SEEDS, which=st.sampled_from(range(len(ALL))))
def test_range_is_kept(height: int, width: int, seed: int, which: int) -> None:
    smooth = ALL[which] if ALL[which].steps[0][0] != "noise" else Smooth.median(3)
    out = smooth(images(1, 3, height, width, seed=seed))
    assert float(out.min()) >= -1e-12
    assert float(out.max()) <= 1 + 1e-12


@pytest.mark.parametrize("smooth", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 1, 13, 11), (5, 3, 160, 161)], ids=["in one piece", "in several"])
def test_a_batch_is_its_images_one_by_one(smooth: Smooth, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """To the last digit, also where a large batch is worked on in pieces."""
    x, ids = images(*shape, dtype=dtype), range(shape[0])
    together = smooth.perturb(x, ids=ids)
    alone = torch.cat([smooth.perturb(x[i : i + 1], ids=[i]) for i in ids])
    assert torch.equal(together, alone)
    assert together.shape == x.shape
    assert together.dtype == dtype


@pytest.mark.parametrize("smooth", ALL, ids=repr)
def test_half_precision_is_worked_on_in_single(smooth: Smooth) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = images(dtype=dtype)
        assert torch.equal(smooth(x), smooth(x.float()).to(dtype))


@pytest.mark.parametrize("smooth", ALL, ids=repr)
def test_input_is_left_alone_and_costs_no_pass(smooth: Smooth) -> None:
    x = images()
    before = x.clone()
    smooth(x)
    assert torch.equal(x, before)
    assert smooth.forward_equivalents == 0
    assert smooth(x[:0]).shape == x[:0].shape


@pytest.mark.parametrize("smooth", ALL, ids=repr)
def test_units_of_the_model(smooth: Smooth) -> None:
    """Whatever the model's units are, the picture is filtered in its own."""
    x = images(2, 3, 9, 10)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    shaped = [numbers.double().reshape(1, 3, 1, 1) for numbers in (mean, std)]
    normal = Smooth(smooth.steps, normalization=(mean.tolist(), std.tolist()))
    out = normal((x - shaped[0]) / shaped[1]) * shaped[1] + shaped[0]
    np.testing.assert_allclose(out, smooth(x), atol=1e-6)


@pytest.mark.parametrize("smooth", [s for s in ALL if s.steps[0][0] != "noise"], ids=repr)
def test_units_of_the_picture(smooth: Smooth) -> None:
    """In bytes, with parameters in bytes, the same pictures come out."""
    x = images(2, 3, 9, 10)
    lengths = ("soft_threshold", "clip", "stretch", "tv")
    steps = [
        (kind, *(p * 255 if kind in lengths and isinstance(p, float) else p for p in rest))
        for kind, *rest in smooth.steps
    ]
    np.testing.assert_allclose(Smooth(steps, value_range=(0, 255))(x * 255) / 255, smooth(x), atol=1e-9)


# --- gradients


@pytest.mark.parametrize("smooth", EXACT, ids=repr)
def test_gradient_is_that_of_finite_differences(smooth: Smooth) -> None:
    x = images(2, 1, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: smooth.values(x, Context(ids=(0, 1))), x, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_gradient_of_the_median_goes_to_the_pixels_that_are_the_median(size: int) -> None:
    """In equal shares where several are; large batches are worked on in pieces."""
    x = images(3, 2, 9, 8).requires_grad_()
    places = size // 2, size - 1 - size // 2
    padded = np.pad(np.arange(72).reshape(9, 8), (places, places), mode="symmetric")
    upstream, wanted = images(3, 2, 9, 8, seed=1), torch.zeros(3, 2, 72, dtype=torch.float64)
    flat = x.detach().flatten(2)
    for row, column in np.ndindex(9, 8):
        window = torch.as_tensor(padded[row : row + size, column : column + size].copy()).flatten()
        middle = flat[..., window].sort(-1).values[..., size**2 // 2, None]
        equal = (flat[..., window] == middle).double()
        wanted.index_add_(2, window, equal / equal.sum(-1, keepdim=True) * upstream[..., row, column, None])
    found = torch.autograd.grad(Smooth.median(size)(x), x, upstream)[0]
    np.testing.assert_allclose(found.flatten(2), wanted, atol=1e-12)

    flat_image = torch.full((40, 1, 60, 70), 0.5, dtype=torch.float64, requires_grad=True)
    spread = torch.autograd.grad(Smooth.median(size)(flat_image).sum(), flat_image)[0]
    np.testing.assert_allclose(spread[:, :, 5:-5, 5:-5], 1.0, atol=1e-12)
    assert float(spread.sum()) == pytest.approx(flat_image.numel())


@pytest.mark.parametrize("smooth", [Smooth.bits(1), Smooth.bits(8), Smooth.jpeg(10)], ids=repr)
def test_gradient_goes_straight_through_roundings(smooth: Smooth) -> None:
    x = images().requires_grad_()
    out = smooth(x)
    assert torch.equal(out.detach(), smooth(x.detach()))  # what goes forward is exact
    upstream = images(seed=1)
    assert torch.equal(torch.autograd.grad(out, x, upstream)[0], upstream)


def test_gradient_through_a_chain_is_that_of_its_smooth_part() -> None:
    x, upstream = images().requires_grad_(), images(seed=1)
    through = torch.autograd.grad(Smooth.chain(Smooth.gauss(1.0), Smooth.bits(1))(x), x, upstream)[0]
    assert torch.equal(through, torch.autograd.grad(Smooth.gauss(1.0)(x), x, upstream)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("smooth", ALL, ids=repr)
def test_another_device(smooth: Smooth) -> None:
    x = images()
    out = smooth(x.cuda())
    assert out.is_cuda
    np.testing.assert_allclose(out.cpu(), smooth(x), atol=1e-9)


# --- words and errors


@pytest.mark.parametrize("smooth", ALL, ids=repr)
def test_repr_and_steps_make_it_again(smooth: Smooth) -> None:
    assert eval(repr(smooth)).steps == smooth.steps
    assert Smooth(json.loads(json.dumps(smooth.steps))).steps == smooth.steps


def test_repr_says_the_units() -> None:
    smooth = Smooth.median(3, normalization=(127.0, 128.0), value_range=(0, 255))
    assert repr(smooth) == "Smooth.median(3, normalization=((127.0,), (128.0,)), value_range=(0.0, 255.0))"
    assert eval(repr(smooth)).normalization == smooth.normalization


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Smooth.bits(0), "`depth` to be a whole number of bits from 1 to 16, but got 0"),
        (lambda: Smooth.bits(1.5), "`depth` to be a whole number of bits from 1 to 16, but got 1.5"),  # type: ignore[arg-type]
        (lambda: Smooth.median(0), "`size` to be a whole number of pixels, 1 or more, but got 0"),
        (lambda: Smooth.mean(-1), "`size` to be a whole number"),
        (lambda: Smooth.gauss(0.0), "`sigma` to be a positive number, but got 0.0"),
        (lambda: Smooth.gauss(float("nan")), "`sigma` to be a positive number, but got nan"),
        (lambda: Smooth.gauss("1"), "`sigma` to be a positive number, but got '1'"),  # type: ignore[arg-type]
        (lambda: Smooth.jpeg(101), "`quality` to be a whole number from 1 to 100, but got 101"),
        (lambda: Smooth.soft_threshold(-0.1), "`threshold` to be a number, 0 or more, but got -0.1"),
        (lambda: Smooth.clip(0.5, 0.5), "`high` to be greater than low = 0.5, but got 0.5"),
        (lambda: Smooth.stretch(0.5, 0.5), "`high` to be greater than low = 0.5, but got 0.5"),
        (lambda: Smooth([("stretch", 0.75, 0.25)]), "`high` to be greater than low = 0.75, but got 0.25"),
        (lambda: Smooth.scale(-1.0), "`factor` to be a number, 0 or more"),
        (lambda: Smooth.shift(0.5, 0), "`dx` to be a whole number of pixels, but got 0.5"),  # type: ignore[arg-type]
        (lambda: Smooth.tv(0.0), "`weight` to be a positive number"),
        (lambda: Smooth.tv(0.1, 0), "`n_iter` to be a whole number of steps, 1 or more, but got 0"),
        (lambda: Smooth.noise(-1.0), "`sigma` to be a positive number"),
        (lambda: Smooth.noise(1.0, value_range=(1, 0)), "`value_range` to be a pair .least, greatest."),
        (lambda: Smooth.chain(), "`parts` to be at least one smoothing"),
        (lambda: Smooth.chain(Smooth.bits(1), Smooth.bits(1, value_range=(0, 255))), "of one normalization and"),
        (lambda: Smooth([]), "`steps` to be a sequence of steps"),
        (lambda: Smooth("gauss"), "`steps` to be a sequence of steps"),
        (lambda: Smooth(["gauss"]), r"`steps` to be tuples \(name, parameters\)"),
        (lambda: Smooth([("gauss",)]), "`steps` to be `sigma` after 'gauss', but got 0 parameters"),
    ],
)
def test_wrong_parameters_are_named(make: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()  # type: ignore[operator]


def test_unknown_filter() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'median'"):
        Smooth([("meidan", 3)])


def test_inputs_that_cannot_be_smoothed() -> None:
    with pytest.raises(InputError, match=r"images \(N, C, H, W\) for Smooth.median\(3\), but got shape \(2, 5\)"):
        Smooth.median(3)(torch.rand(2, 5))
    with pytest.raises(InputError, match=r"of a floating type, but got torch\.uint8"):
        Smooth.bits(1)(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    assert Smooth.bits(1)(torch.rand(2, 5)).shape == (2, 5)
