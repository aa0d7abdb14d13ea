"""Insertion and deletion: closed forms on linear models, a plain loop, invariances, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, ModelError, TargetError, UnknownNameError
from ce_plugin.evaluation import (
    area_under_curve,
    insertion_deletion,
    pixel_order,
    reference_images,
)
from ce_plugin.interventions import PixelMask


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def linear(weights: Tensor) -> object:
    """(B, C, H, W) to (B, 2): a weighted sum and its negative."""

    def predict(x: Tensor) -> Tensor:
        total = (x * weights).flatten(1).sum(1)
        return torch.stack([total, -total], dim=1)

    return predict


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.sampled_from([2, 3, 4, 6, 12]))
def test_linear_model_has_sums_of_sorted_contributions_as_curves(seed: int, steps: int) -> None:
    x, weights = draw(2, 3, 3, 4, seed=seed), draw(3, 3, 4, seed=seed + 1) - 0.5
    reference = draw(2, 3, 3, 4, seed=seed + 2)
    contribution = ((x - reference) * weights).sum(1)
    got = insertion_deletion(linear(weights), x, contribution, 0, {"own": reference}, steps)  # type: ignore[arg-type]

    ranked = contribution.flatten(1).sort(dim=1, descending=True).values.cumsum(1)
    gained = torch.cat([torch.zeros(2, 1), ranked], 1)[:, [round(12 * k / steps) for k in range(steps + 1)]]
    empty = (reference * weights).flatten(1).sum(1, keepdim=True)
    full = (x * weights).flatten(1).sum(1, keepdim=True)
    torch.testing.assert_close(got.insertion[:, 0], (empty + gained).float())
    torch.testing.assert_close(got.deletion[:, 0], (full - gained).float())
    # Of all orders the one by contribution is the best, its reverse the worst by as much.
    other = insertion_deletion(linear(weights), x, -contribution, 0, {"own": reference}, steps)  # type: ignore[arg-type]
    torch.testing.assert_close(other.score, -got.score, atol=1e-5, rtol=1e-5)
    assert (got.score >= 0).all()


def test_a_needed_pair_gives_a_step() -> None:
    """The probability is 1 where both of two pixels are seen: which step that is can be counted."""

    def predict(images: Tensor) -> Tensor:
        both = images[:, 0, 0, 0] * images[:, 0, 1, 1]
        return torch.stack([both, 1 - both], 1)

    maps = torch.tensor([[[4.0, 1.0], [3.0, 2.0]]])  # order: (0, 0), (1, 0), (1, 1), (0, 1)
    x = torch.ones(1, 1, 2, 2)
    got = insertion_deletion(predict, x, maps, 0, {"zero": torch.zeros_like(x)}, 4)
    assert got.insertion.tolist() == [[[0.0, 0.0, 0.0, 1.0, 1.0]]]
    assert got.deletion.tolist() == [[[1.0, 0.0, 0.0, 0.0, 0.0]]]
    assert got.insertion_auc.item() == pytest.approx(0.375)
    assert got.deletion_auc.item() == pytest.approx(0.125)
    assert got.score.item() == pytest.approx(0.25)


def test_batch_size_and_company_change_nothing() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5), torch.nn.Softmax(1)).double()
    x, maps = draw(3, 3, 4, 4), draw(3, 4, 4, seed=1)
    references = reference_images(x)
    whole = insertion_deletion(network, x, maps, [0, 3, 4], references, 5)
    for size in (1, 7, 1000):
        again = insertion_deletion(network, x, maps, [0, 3, 4], references, 5, batch_size=size)
        torch.testing.assert_close(again.insertion, whole.insertion)
        torch.testing.assert_close(again.deletion, whole.deletion)
    for i, target in enumerate((0, 3, 4)):
        own = {name: reference[i : i + 1] for name, reference in references.items()}
        alone = insertion_deletion(network, x[i : i + 1], maps[i : i + 1], target, own, 5)
        torch.testing.assert_close(alone.score[0], whole.score[i])
    assert whole.references == ("blur", "mean", "zero")
    assert whole.score.shape == (3, 3)


def test_cost_is_what_is_promised_and_no_gradient_is_kept() -> None:
    rows = 0
    parameter = torch.ones(1, requires_grad=True)

    def predict(images: Tensor) -> Tensor:
        nonlocal rows
        rows += len(images)
        return images.flatten(1)[:, :2] * parameter

    x = torch.rand(2, 1, 4, 4)
    got = insertion_deletion(predict, x, torch.rand(2, 4, 4), 1, reference_images(x), 7)
    assert rows == 2 * (1 + 3 * (2 * 7 - 1))
    assert not got.score.requires_grad


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_only_the_order_of_a_map_counts(seed: int) -> None:
    maps = draw(2, 5, 5, seed=seed)
    order = pixel_order(maps)
    assert torch.equal(order, pixel_order(torch.exp(3 * maps)))
    assert torch.equal(order, pixel_order(maps[:, None].expand(-1, 3, -1, -1)))
    assert torch.equal(order.sort(dim=1).values, torch.arange(25).expand(2, -1))
    ranked = maps.flatten(1).gather(1, order)
    assert (ranked[:, 1:] <= ranked[:, :-1]).all()


def test_ties_are_broken_by_one_permutation_without_a_place_of_its_own() -> None:
    flat = pixel_order(torch.zeros(2, 40, 40))
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat, pixel_order(torch.zeros(2, 40, 40), seed=1))
    rows, columns = flat[0, :800] // 40, flat[0, :800] % 40
    # 800 of 1,600 places: the mean's standard deviation is 0.29.
    assert abs(rows.double().mean() - 19.5) < 1.5
    assert abs(columns.double().mean() - 19.5) < 1.5
    patches = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]).repeat_interleave(2, 1).repeat_interleave(2, 2)
    first = pixel_order(patches)[0]
    assert sorted(first[:4].tolist()) == [2, 3, 6, 7]
    assert sorted(first[4:8].tolist()) == [0, 1, 4, 5]


def test_references_are_the_fills_in_image_units() -> None:
    x = draw(2, 3, 40, 40).float() * 2 - 1
    got = reference_images(x, normalization=(127.0, 128.0))
    torch.testing.assert_close(got["zero"], torch.full_like(x, -127 / 128))
    torch.testing.assert_close(got["mean"], x.mean((2, 3), keepdim=True).expand_as(x))
    torch.testing.assert_close(got["blur"], PixelMask("blur", sigma=10)(x), atol=1e-5, rtol=0)
    assert not torch.allclose(got["blur"], reference_images(x, ["blur"], sigma=2)["blur"], atol=1e-3)


def test_area_is_exact_for_straight_lines() -> None:
    assert area_under_curve(torch.linspace(0.2, 0.8, 29)).item() == pytest.approx(0.5)
    curves = draw(4, 2, 9)
    torch.testing.assert_close(area_under_curve(curves), (curves[..., 1:] + curves[..., :-1]).sum(-1) / 16)


X = torch.rand(2, 1, 4, 4)
GOOD = {"predict": lambda x: x.flatten(1), "x": X, "maps": X[:, 0], "target": 0, "references": {"zero": 0 * X}}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": X[0]}, InputError, "`x`"),
        ({"x": X * torch.nan}, InputError, "`x` to be finite"),
        ({"maps": X[0]}, InputError, "`maps`"),
        ({"maps": X[:, 0, :2]}, InputError, "Enlarge maps"),
        ({"maps": X[:, 0] / 0 - X[:, 0] / 0}, InputError, "`maps` to be finite"),
        ({"references": {}}, InputError, "`references`"),
        ({"references": {"zero": X[:1]}}, InputError, "`references`"),
        ({"steps": 0}, ArgumentError, "`steps`"),
        ({"steps": 17}, ArgumentError, "16 pixels"),
        ({"batch_size": 0}, ArgumentError, "`batch_size`"),
        ({"target": [0, 1, 2]}, TargetError, "`target`"),
        ({"target": 16}, TargetError, "16 classes"),
        ({"target": -1}, TargetError, "16 classes"),
        ({"predict": lambda x: x.sum()}, ModelError, "`predict`"),
    ],
)
def test_errors(change: dict[str, object], error: type[Exception], match: str) -> None:
    arguments = {"steps": 4, **GOOD, **change}
    with pytest.raises(error, match=match):
        insertion_deletion(**arguments)  # type: ignore[arg-type]


def test_errors_of_the_parts() -> None:
    with pytest.raises(InputError, match="two points"):
        area_under_curve(torch.ones(3, 1))
    with pytest.raises(InputError, match="`maps`"):
        pixel_order(torch.ones(3))
    with pytest.raises(UnknownNameError, match="Did you mean 'blur'"):
        reference_images(X, ["blurr"])
    with pytest.raises(ArgumentError, match="`sigma`"):
        reference_images(X, sigma=0.0)
