"""Random numbers depend on their names only."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ce_plugin.randomness import derived_seed, generator, numpy_generator

NAMES = st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.text(max_size=5)), max_size=4)


@given(seed=st.integers(-(2**40), 2**40), names=NAMES)
def test_equal_names_equal_numbers(seed: int, names: list[int | str]) -> None:
    assert torch.equal(
        torch.rand(4, generator=generator(seed, *names)), torch.rand(4, generator=generator(seed, *names))
    )
    assert (numpy_generator(seed, *names).random(4) == numpy_generator(seed, *names).random(4)).all()
    assert 0 <= derived_seed(seed, *names) < 2**32


def test_different_names_different_numbers() -> None:
    names: list[tuple[int | str, ...]] = [
        (0,), (1,), (-1,), (2**32,), (2**40,), (0, 0), (0, 1), (1, 0), (0, -1), (0, "fill"), (0, "pwm"), (0, "fill", 1),
        (0, 1, "fill"), (0, "fill", 1, 0), (0, "fill", 0, 1),
    ]  # fmt: skip
    drawn = {float(torch.rand(1, generator=generator(*name), dtype=torch.float64)) for name in names}  # type: ignore[arg-type]
    assert len(drawn) == len(names)


def test_streams_of_neighbouring_ids_are_not_correlated() -> None:
    drawn = torch.stack([torch.rand(2000, generator=generator(0, i, "assignments")) for i in range(12)]) - 0.5
    correlation = torch.corrcoef(drawn)[~torch.eye(12, dtype=torch.bool)]
    assert correlation.abs().max() < 4.5 / 2000**0.5


def test_a_generator_is_fresh_each_time_and_leaves_the_global_state() -> None:
    state = torch.get_rng_state()
    first = generator(0, 1)
    torch.rand(10, generator=first)
    assert not torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=generator(0, 1)))
    assert torch.equal(state, torch.get_rng_state())
