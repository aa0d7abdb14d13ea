"""Image units and model units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ce_plugin.errors import ArgumentError
from ce_plugin.interventions import Normalization

NUMBERS = st.floats(-300, 300)
SPREADS = st.floats(0.01, 300)


@given(mean=st.tuples(NUMBERS, NUMBERS, NUMBERS), std=st.one_of(SPREADS, st.tuples(SPREADS, SPREADS, SPREADS)))
def test_there_and_back(mean: tuple[float, ...], std: Any) -> None:
    x = 255 * torch.rand(2, 3, 4, 5, dtype=torch.float64)
    both = Normalization(mean, std)
    assert torch.allclose(both.to_image(both.to_model(x)), x, atol=1e-6)
    spread = (std,) * 3 if isinstance(std, float) else std
    wanted = torch.stack([(x[:, c] - mean[c]) / spread[c] for c in range(3)], 1)
    assert torch.allclose(both.to_model(x), wanted)


def test_it_is_torchvisions_normalize() -> None:
    from torchvision.transforms import Normalize

    mean, std, x = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), torch.rand(2, 3, 4, 4)
    assert torch.allclose(Normalization(mean, std).to_model(x), Normalize(mean, std)(x))


def test_one_number_fits_any_input() -> None:
    for shape in ((3,), (2, 5), (2, 1, 4, 4), (1, 2, 3, 4, 5)):
        x = torch.rand(shape)
        assert torch.allclose(Normalization(127.0, 128.0).to_model(x), (x - 127) / 128)


def test_reading() -> None:
    assert Normalization.of(None) == Normalization()
    assert Normalization.of((0.5, [0.1, 0.2])) == Normalization(0.5, (0.1, 0.2))
    assert Normalization.of(Normalization(1.0, 2.0)) == Normalization(1.0, 2.0)
    assert Normalization((0.0, 0.0), 1.0).is_identity
    assert not Normalization(0.0, 2.0).is_identity
    x = torch.rand(1, 2)
    assert Normalization().to_model(x) is x
    assert Normalization().to_image(x) is x


def test_the_type_of_the_input_stays() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert Normalization((0.5, 0.5), 0.5).to_model(torch.rand(1, 2, 3, 3).to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, r"None or a pair \(mean, std\), but got 0.5. Write \(127.0, 128.0\)"),
        ((0.5, 0.5, 0.5), r"None or a pair"),
        ("imagenet", "None or a pair"),
        ((0.0, 0.0), "positive std"),
        ((0.0, (1.0, -1.0)), "positive std"),
        (((0.1, 0.2, 0.3), (0.1, 0.2)), "equal lengths"),
        ((float("nan"), 1.0), "finite"),
        ((0.0, float("nan")), "finite"),
        ((0.0, float("inf")), "finite"),
        (("a", 1.0), "numbers"),
        (((), 1.0), "numbers"),
        ((None, 1.0), "numbers"),
    ],
)
def test_bad_pairs(value: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Normalization.of(value)


def test_channels_must_fit() -> None:
    for x in (torch.rand(1, 4, 2, 2), torch.rand(3)):
        with pytest.raises(ArgumentError, match="one number or one per channel of"):
            Normalization((0.1, 0.2, 0.3), 1.0).to_model(x)
