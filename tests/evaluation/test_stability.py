"""Rank correlation against scipy, its invariances, and what is asked of a method."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from ce_plugin.errors import InputError, ModelError
from ce_plugin.evaluation import map_stability, rank_correlation


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), levels=st.sampled_from([2, 3, 10, 1000]))
def test_equals_scipy_with_and_without_ties(seed: int, levels: int) -> None:
    a, b = ((draw(3, 4, 5, seed=seed + k) * levels / 4).round() for k in (0, 1))
    got = rank_correlation(a, b)
    for one, x, y in zip(got.tolist(), a.flatten(1).numpy(), b.flatten(1).numpy(), strict=True):
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert one == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_only_the_order_counts() -> None:
    a, b = draw(2, 6, 6), draw(2, 6, 6, seed=1)
    torch.testing.assert_close(rank_correlation(a, a.exp() * 3 - 7), torch.ones(2).double())
    torch.testing.assert_close(rank_correlation(a, -a), -torch.ones(2).double())
    torch.testing.assert_close(rank_correlation(a, b), rank_correlation(b, a))
    torch.testing.assert_close(rank_correlation(a, b), rank_correlation(a, b.sinh()))


def test_a_constant_map_has_no_order() -> None:
    assert rank_correlation(torch.ones(1, 4), draw(1, 4)).isnan().all()


def test_the_same_class_is_explained_in_both() -> None:
    x, changed, target = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1), torch.tensor([0, 1, 1])

    def explain(images: Tensor, classes: Tensor) -> Tensor:
        assert torch.equal(classes, target)
        return images[range(3), classes]

    got = map_stability(explain, x, changed, target)
    torch.testing.assert_close(got, rank_correlation(x[range(3), target], changed[range(3), target]))


def test_errors_name_the_argument() -> None:
    x = draw(2, 3, 4, 4)
    with pytest.raises(InputError, match="`second` to be of the shape of `first`"):
        rank_correlation(x, x[:1])
    with pytest.raises(InputError, match="two values or more"):
        rank_correlation(x[:, 0, 0, :1], x[:, 0, 0, :1])
    with pytest.raises(InputError, match="`maps` to be finite"):
        rank_correlation(x, x / 0)
    with pytest.raises(InputError, match="`changed` to be images of the shape of `clean`"):
        map_stability(lambda a, b: a, x, x[:1], torch.tensor([0, 1]))
    with pytest.raises(InputError, match="`target` to be one class for each of 2 images"):
        map_stability(lambda a, b: a, x, x, torch.tensor([0]))
    with pytest.raises(ModelError, match="a function that returns 2 maps, but got shape"):
        map_stability(lambda a, b: a[:1], x, x, torch.tensor([0, 1]))
