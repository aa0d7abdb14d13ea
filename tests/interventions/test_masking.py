"""F_i: what a masked pixel is set to, in image units, and where."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from ce_plugin import CausalEffect, Evidence
from ce_plugin.designs import OneAtATime, RandomMask
from ce_plugin.errors import ArgumentError, NoChangeWarning, UnitError, UnknownNameError
from ce_plugin.interventions import Context, PixelMask
from ce_plugin.interventions.base import Intervention

SHAPE = (2, 3, 8, 6)


def painted(images: Tensor, masks: Tensor) -> Tensor:
    """An in-painter: the area of the hole."""
    return images * 0 + masks.flatten(1).sum(1).to(images).reshape(-1, 1, 1, 1)


def total() -> nn.Module:
    """A network whose output is the sum over the image."""

    class Total(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sum(1, keepdim=True)

    return Total()


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def of(mask: PixelMask, x: Tensor, **context: object) -> Tensor:
    return mask.values(x, Context(ids=(0,) * len(x), **context))


def test_zero_value_and_mean_are_what_they_say() -> None:
    x = images()
    assert (of(PixelMask("zero"), x) == 0).all()
    assert (of(PixelMask(0.25), x) == 0.25).all()
    assert torch.allclose(of(PixelMask("mean"), x), x.mean((2, 3), keepdim=True).expand_as(x))
    assert (of(PixelMask(np.float32(0.5)), x) == 0.5).all()


def test_the_mean_of_a_table_is_over_its_columns() -> None:
    x = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert PixelMask("mean")(x).tolist() == [[3.0] * 3, [1.0] * 3]


def test_blur_is_scipys_gaussian() -> None:
    x = images()
    found = of(PixelMask("blur", sigma=1.0), x)
    # Reflection without repeating the edge, cut at 3 sigma: scipy's "mirror".
    wanted = gaussian_filter(x.numpy(), sigma=(0, 0, 1.0, 1.0), mode="mirror", truncate=3.0)
    assert np.abs(found.numpy() - wanted).max() < 1e-12


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3, 40)])
def test_blur_of_tiny_images_keeps_their_shape(size: tuple[int, int]) -> None:
    x = torch.rand(1, 3, *size)
    assert PixelMask("blur")(x).shape == x.shape


def test_noise_has_the_examples_mean_and_spread_and_comes_from_seed_and_id() -> None:
    x = torch.rand(2, 3, 80, 80)
    values = PixelMask("noise").perturb(x, ids=[4, 5])
    assert torch.allclose(values.mean((2, 3)), x.mean((2, 3)), atol=0.02)
    assert torch.allclose(values.std((2, 3)), x.std((2, 3)), atol=0.02)
    single = PixelMask("noise").perturb(x[1:], ids=[5])
    assert torch.equal(values[1:], single)
    assert not torch.equal(values, PixelMask("noise").perturb(x, ids=[4, 5], seed=1))
    shared = PixelMask("noise").perturb(x[:1].expand(2, -1, -1, -1))
    assert torch.equal(shared[0], shared[1])


def test_a_tensor_fill_broadcasts() -> None:
    x = images()
    colour = torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1)
    assert torch.equal(PixelMask(colour)(x), colour.to(x).expand_as(x))


@pytest.mark.parametrize("fill", ["zero", 0.7, "mean", "blur", "noise", lambda image: image.flip(-1)])
def test_fills_are_in_image_units(fill: object) -> None:
    """Masking what the model sees equals masking the image and then normalising it."""
    image, mean, std = 255 * images(), (120.0, 110.0, 100.0), (60.0, 61.0, 62.0)
    shift, scale = torch.tensor(mean).reshape(3, 1, 1), torch.tensor(std).reshape(3, 1, 1)
    masked_image = PixelMask(fill)(image)
    masked_model = PixelMask(fill, normalization=(mean, std))((image - shift) / scale)
    assert torch.allclose(masked_model, (masked_image - shift) / scale, atol=1e-10)


def test_outside_of_a_region_nothing_changes() -> None:
    x = images()
    box = PixelMask("zero", region=(1, 2, 4, 7))(x)
    inside = torch.zeros(SHAPE[2:], dtype=torch.bool)
    inside[2:7, 1:4] = True
    assert (box[..., inside] == 0).all()
    assert torch.equal(box[..., ~inside], x[..., ~inside])
    assert torch.equal(PixelMask("zero", region=inside)(x), box)
    per_example = torch.stack([inside, ~inside])[:, None]
    assert torch.equal(PixelMask("zero", region=per_example)(x)[0], box[0])


@pytest.mark.parametrize("bytes_", [1, 1000, 1 << 20])
@pytest.mark.parametrize("fill", ["zero", painted, torch.arange(5.0).reshape(5, 1, 1, 1)])
def test_fills_and_regions_of_each_examples_own_follow_their_example(
    fill: object, bytes_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever examples the runner asks for together."""
    monkeypatch.setattr("ce_plugin.trials.batches._BYTES", bytes_)
    x = 1 + torch.rand(5, 1, 2, 2, dtype=torch.float64)
    region = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = PixelMask(fill, region=region)  # type: ignore[arg-type]
    for design in (OneAtATime(), RandomMask(0.5, 30)):
        whole = CausalEffect(total(), mask, design, outcome=None).estimate(x, perturbations_per_eval=2)
        for i in range(5):
            one = fill[i : i + 1] if isinstance(fill, Tensor) else fill
            alone = PixelMask(one, region=region[i : i + 1])  # type: ignore[arg-type]
            single = CausalEffect(total(), alone, design, outcome=None).estimate(x[i : i + 1])
            assert torch.allclose(single.effect[0], whole.effect[i], atol=1e-9)


def test_a_region_makes_units_outside_of_it_harmless() -> None:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double(), torch.rand(1, 1, 4, 4, dtype=torch.float64)
    estimate = CausalEffect(net, PixelMask("zero", region=(0, 0, 2, 4)), OneAtATime(), outcome="logit").estimate(x)
    effect = estimate.effect[0].reshape(4, 4, 2)
    assert effect[:, 2:].abs().max() < 1e-14
    wanted = -(net[1].weight.reshape(2, 4, 4) * x[0]).permute(1, 2, 0)
    assert torch.allclose(effect[:, :2], wanted[:, :2], atol=1e-12)


class Recorder:
    """An in-painter that notes every hole it is shown and paints it with the hole's area."""

    def __init__(self) -> None:
        self.holes: list[Tensor] = []

    def __call__(self, images: Tensor, masks: Tensor) -> Tensor:
        assert masks.dtype == torch.bool
        assert masks.shape == images.shape
        self.holes += list(masks)
        area = masks.flatten(1).sum(1).to(images).reshape(-1, 1, 1, 1)
        return images * 0 + area


@pytest.mark.parametrize("per_eval", [None, 1, 3])
def test_an_in_painter_sees_each_trials_hole(per_eval: int | None) -> None:
    painter, x = Recorder(), torch.rand(3, 1, 2, 2, dtype=torch.float64)
    mask = torch.tensor([[[[0, 0], [0, 1]]]])
    estimate = CausalEffect(total(), PixelMask(painter), OneAtATime(), outcome=None).estimate(
        x, feature_mask=mask, perturbations_per_eval=per_eval
    )
    # Three pixels of a hole of three become 3 each; one pixel of a hole of one becomes 1.
    first = 9 - x.flatten(1)[:, :3].sum(1)
    second = 1 - x.flatten(1)[:, 3]
    assert torch.allclose(estimate.effect[:, :, 0], torch.stack([first, second], 1), atol=1e-12)
    seen = [int(hole.sum()) for hole in painter.holes]
    # One of the trials is passed again, to see that the network gives the same.
    assert seen.count(1) + seen.count(3) == len(seen) == 7
    assert min(seen.count(1), seen.count(3)) == 3


def test_an_in_painter_is_told_only_of_what_lies_in_the_region() -> None:
    painter, x = Recorder(), torch.rand(1, 1, 2, 2)
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.long)
    CausalEffect(total(), PixelMask(painter, region=(0, 0, 1, 1)), OneAtATime(), outcome=None).estimate(
        x, feature_mask=mask
    )
    assert [int(hole.sum()) for hole in painter.holes] == [1, 1]  # the trial is passed again, to see that it repeats


def test_a_share_p_of_the_pixels_is_a_hole_for_an_in_painter() -> None:
    painter, x = Recorder(), torch.rand(1, 3, 40, 40)
    masked = PixelMask(painter).perturb(x, p=0.25)
    changed = (masked != x).any(1)
    assert torch.equal(changed[0], painter.holes[0][0])
    assert float(changed.float().mean()) == pytest.approx(0.25, abs=0.05)


def test_an_in_painter_as_evidence_sees_the_evidences_hole() -> None:
    painter, x = Recorder(), torch.rand(1, 1, 2, 2)
    explainer = CausalEffect(total(), PixelMask("zero"), OneAtATime(), outcome=None)
    found = explainer.estimate(x, given=Evidence(PixelMask(painter), units=[0, 3]))
    assert float(found.reference) == pytest.approx(float(2 * 2 + x[0, 0, 0, 1] + x[0, 0, 1, 0]), abs=1e-6)


def test_several_fills_are_averaged_by_exact_designs() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    x = torch.rand(3, 1, 6, 6, dtype=torch.float64)
    fills = ("zero", 0.5, "blur", "noise", Recorder())
    each = [CausalEffect(net, PixelMask(fill), OneAtATime(), outcome="probability").estimate(x) for fill in fills[:-2]]
    both = CausalEffect(net, PixelMask(fills[:-2]), OneAtATime(), outcome="probability").estimate(x)
    assert torch.allclose(both.effect, torch.stack([e.effect for e in each]).mean(0), atol=1e-12)
    # The same where values have to be asked for trial by trial, in batches of any size.
    per_trial = [
        CausalEffect(net, PixelMask(fills), OneAtATime(), outcome="probability").estimate(x, perturbations_per_eval=k)
        for k in (None, 1, 7)
    ]
    for other in per_trial[1:]:
        assert torch.allclose(per_trial[0].effect, other.effect, atol=1e-12)


def test_several_fills_are_taken_in_turn_by_random_designs() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    x = 1 + torch.rand(2, 1, 2, 2, dtype=torch.float64)
    weight = net[1].weight
    fills = ("zero", -1.0)
    found = CausalEffect(net, PixelMask(fills), RandomMask(0.5, 4000), outcome="logit").estimate(x)
    wanted = -(x.flatten(1)[:, :, None] + 0.5) * weight.T
    assert found.std_error is not None
    error = (found.effect - wanted.detach()).abs()
    assert (error <= 4.5 * found.std_error).all()
    assert float(error.max()) < 0.1


@given(p=st.floats(0.0, 1.0), seed=st.integers(-5, 5))
@settings(max_examples=20, deadline=None)
def test_perturb_masks_a_share_p_shared_by_channels(p: float, seed: int) -> None:
    x = 1 + torch.rand(2, 3, 30, 30)
    masked = PixelMask("zero").perturb(x, p=p, seed=seed)
    hit = masked == 0
    assert torch.equal(hit[:, 0], hit[:, 1])
    assert torch.equal(hit[0], hit[1])  # without ids every example has the same pixels
    assert torch.equal(masked[~hit], x[~hit])
    assert float(hit.float().mean()) == pytest.approx(p, abs=0.08)


def test_perturb_takes_tuples_and_leaves_inputs_alone() -> None:
    a, b = torch.rand(2, 1, 4, 4), torch.rand(2, 5)
    before = a.clone(), b.clone()
    out = PixelMask("zero").perturb((a, b), p=0.5)
    assert isinstance(out, tuple)
    assert [o.shape for o in out] == [a.shape, b.shape]
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fill", ["zero", "mean", "blur", "noise", 0.5])
def test_half_precision(fill: object, dtype: torch.dtype) -> None:
    x = images(dtype)
    values = PixelMask(fill)(x)
    assert values.dtype == dtype
    assert values.shape == x.shape
    wanted = PixelMask(fill)(x.float())
    assert (values.float() - wanted).abs().max() < 0.05


def test_fills_with_a_gradient_or_a_network_leave_no_graph() -> None:
    painter, fill = nn.Conv2d(1, 1, 1), torch.zeros(1, requires_grad=True)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.rand(1, 1, 4, 4, requires_grad=True)
    for one in (painter, fill):
        found = CausalEffect(net, PixelMask(one), OneAtATime()).estimate(x)
        assert not found.effect.requires_grad
        assert not PixelMask(one).values(x.detach(), Context(ids=(0,))).requires_grad


def test_an_in_painting_network_is_run_in_eval_mode_and_given_back() -> None:
    painter = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.9))
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.rand(1, 1, 4, 4)
    explainer = CausalEffect(net, PixelMask(painter), OneAtATime())
    first, second = explainer.attribute(x), explainer.attribute(x)
    assert torch.equal(first, second)
    assert painter.training
    assert painter[1].training


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PixelMask("blurr"), UnknownNameError, "Did you mean 'blur'"),
        (lambda: PixelMask(()), ArgumentError, "at least one fill"),
        (lambda: PixelMask([0.0]), ArgumentError, "a name, number, tensor or callable, but got list"),
        (lambda: PixelMask(float("nan")), ArgumentError, "argument `fill` to be finite"),
        (lambda: PixelMask(torch.tensor([0.0, torch.inf])), ArgumentError, "argument `fill` to be finite"),
        (lambda: PixelMask("blur", sigma=0.0), ArgumentError, "argument `sigma` to be a positive number"),
        (lambda: PixelMask("blur", sigma=float("nan")), ArgumentError, "argument `sigma` to be a positive number"),
        (lambda: PixelMask(region=(3, 0, 3, 4)), UnitError, "left < right"),
        (lambda: PixelMask(region=(0, 0, 1)), UnitError, "left, top, right, bottom"),
        (lambda: PixelMask(region=torch.ones(4, 4)), UnitError, "a boolean mask, but got dtype torch.float32"),
        (lambda: PixelMask(region=(0, 0, 7, 8))(images()), UnitError, "a box inside the input's shape"),
        (lambda: PixelMask(region=(-1, 0, 3, 8))(images()), UnitError, "a box inside the input's shape"),
        (lambda: PixelMask(region=torch.ones(5, 5, dtype=torch.bool))(images()), UnitError, "broadcasts to the input"),
        (lambda: PixelMask(torch.zeros(4))(images()), ArgumentError, "a fill that broadcasts"),
        (lambda: PixelMask("blur")(torch.rand(2, 5)), ArgumentError, "inputs that are not signals, images"),
        (lambda: PixelMask().perturb(images(), p=1.5), ArgumentError, r"a share in \[0, 1\]"),
        (lambda: PixelMask(normalization=((0.1, 0.1), 1.0))(images()), ArgumentError, "one per channel"),
        (lambda: PixelMask(normalization=(0.0, 0.0)), ArgumentError, "positive std"),
        (lambda: PixelMask(normalization=0.5), ArgumentError, "a pair"),
    ],
)  # fmt: skip
def test_bad_masks(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]


def test_an_intervention_that_changes_nothing_is_named() -> None:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.ones(2, 1, 4, 4)
    x[0] = 0
    with pytest.warns(NoChangeWarning, match=r"PixelMask\('zero'\) changes nothing in example\(s\) \[0\]"):
        CausalEffect(net, PixelMask("zero"), OneAtATime()).attribute(x)
    with pytest.warns(NoChangeWarning, match=r"The evidence PixelMask\(1.0\) changes nothing"):
        CausalEffect(net, PixelMask("zero"), OneAtATime()).attribute(x[1:], given=PixelMask(1.0))


def test_one_of_several_fills_that_changes_nothing_is_named() -> None:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.ones(1, 1, 4, 4)
    with pytest.warns(
        NoChangeWarning, match=r"Alternative 2 of the 2 values of PixelMask\(\('zero', 'blur'\)\) changes"
    ):
        CausalEffect(net, PixelMask(("zero", "blur")), OneAtATime()).attribute(x)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda clean: clean[:, :1], "the input's shape"),
        (lambda clean: clean * torch.nan, "values are finite"),
        (lambda clean: clean / 0, "values are finite"),
    ],
)
def test_what_an_intervention_returns_is_checked(values: object, message: str) -> None:
    class Mine(Intervention):
        def values(self, clean: Tensor, context: Context) -> Tensor:
            return values(clean)  # type: ignore[operator]

        def __repr__(self) -> str:
            return "Mine()"

    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(ArgumentError, match=message):
        CausalEffect(net, Mine(), OneAtATime()).attribute(torch.rand(2, 3, 4, 4))


def test_an_interventions_values_take_the_inputs_type() -> None:
    class Mine(Intervention):
        def values(self, clean: Tensor, context: Context) -> Tensor:
            return torch.zeros(clean.shape, dtype=torch.float64)

    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.rand(2, 1, 4, 4)
    found = CausalEffect(net, Mine(), OneAtATime()).attribute(x)
    assert torch.equal(found, CausalEffect(net, PixelMask("zero"), OneAtATime()).attribute(x))


def test_representations_say_what_differs_from_the_default() -> None:
    assert repr(PixelMask()) == "PixelMask('zero')"
    assert repr(PixelMask(("zero", 0.5))) == "PixelMask(('zero', 0.5))"
    assert (
        repr(PixelMask("blur", sigma=2.0, region=(0, 0, 1, 1))) == "PixelMask('blur', region=(0, 0, 1, 1), sigma=2.0)"
    )
    assert "normalization=" in repr(PixelMask(normalization=(0.5, 0.5)))
    assert repr(PixelMask(torch.zeros(1, 3))) == "PixelMask(tensor(1, 3))"
