"""Carriers: how many units carry an effect, against sets whose joint effect is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ce_plugin.effects import Mediation, carried, carriers, nested_sets, next_sizes, ranking
from ce_plugin.errors import ArgumentError, InferenceError, UnitError

TOTAL = torch.linspace(1, 2, 20).double()


def additive(weight: Tensor, total: Tensor = TOTAL, sign: float = 1.0) -> tuple[Mediation, list[int]]:
    """A mediation in which unit u carries weight_u of the total."""
    effect = sign * total[:, None] * weight
    sizes: list[int] = []
    return Mediation(total=sign * total[:, None], indirect=effect[..., None], direct=effect[..., None]), sizes


def test_ranking_is_in_the_direction_of_the_total_effect() -> None:
    weight = torch.tensor([0.1, -0.3, 0.7, 0.5]).double()
    for sign in (1.0, -1.0):
        assert ranking(additive(weight, sign=sign)[0]) == (2, 3, 0, 1)
    tied = additive(torch.tensor([0.2, 0.2, 0.4, 0.2]).double())[0]
    assert ranking(tied) == (2, 0, 1, 3)


def test_ranking_takes_the_mean_over_images() -> None:
    indirect = torch.tensor([[3.0, 0.0], [-2.0, 0.6]]).double()[..., None]
    total = torch.ones(2, 1).double()
    assert ranking(Mediation(total=total, indirect=indirect, direct=indirect)) == (0, 1)
    assert ranking(Mediation(total=total, indirect=indirect - torch.tensor([[1.0], [0.0]]), direct=indirect)) == (1, 0)


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_ranking_without_direction_is_refused(bad: float) -> None:
    mediation = additive(torch.ones(3).double() / 3)[0]
    mediation.total = torch.full_like(mediation.total, bad)
    with pytest.raises(InferenceError, match="mean total effect other than 0"):
        ranking(mediation)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 10_000))
def test_bisection_finds_what_all_sizes_would(units: int, seed: int) -> None:
    """Against a run of every size; the number of sets stays logarithmic."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.rand(units, generator=g).double() ** 4 + 1e-3
    weight = weight / weight.sum()
    mediation, asked = additive(weight)

    def run(sets: list[tuple[int, ...]]) -> Tensor:
        asked.extend(len(one) for one in sets)
        return torch.stack([TOTAL * weight[list(one)].sum() for one in sets], dim=1)

    found = carriers(mediation, run, TOTAL, n_boot=100)
    joint = weight[list(found.order)].cumsum(0)
    for part in (0.5, 0.9):
        want = int((joint < part - 1e-12).sum()) + 1
        assert found.needed[part] == want
        assert found.interval[part] == (want, want)  # every image has the same share: nothing is uncertain
    assert len(asked) == len(set(asked)) <= 3 * units.bit_length() + 1
    assert found.sizes == tuple(sorted(asked))


def test_sets_are_chosen_on_other_images() -> None:
    """Choosing images rank unit 0 first; on the test images it carries nothing, which the count shows."""
    choose, _ = additive(torch.tensor([0.6, 0.3, 0.1]).double())
    on_test = torch.tensor([0.0, 0.7, 0.3]).double()
    found = carriers(choose, lambda sets: torch.stack([TOTAL * on_test[list(s)].sum() for s in sets], dim=1), TOTAL)
    assert found.order == (0, 1, 2)
    assert found.needed == {0.5: 2, 0.9: 3}
    torch.testing.assert_close(found.share, torch.tensor([0.0, 0.7, 1.0]).double())


def test_curve_and_interval_of_the_count() -> None:
    """The count's interval is read off the share's: too small below it, surely enough at its upper end."""
    g = torch.Generator().manual_seed(0)
    total = 1 + torch.rand(40, generator=g).double()
    joint = total[:, None] * torch.linspace(0.1, 1.0, 10) + 0.3 * torch.randn(40, 10, generator=g)
    found = carried(range(10), joint, total)
    torch.testing.assert_close(found.share, joint.mean(0) / total.mean(), atol=1e-12, rtol=0)
    frame = found.to_dataframe()
    assert frame["n_units"].tolist() == list(range(1, 11))
    for part in (0.5, 0.9):
        low, high = found.interval[part]
        assert frame.loc[frame["share"] >= part, "n_units"].min() == found.needed[part]
        assert low == frame.loc[frame["share_high"] >= part, "n_units"].min()
        expect = frame.loc[frame["share_low"] >= part, "n_units"]
        assert high == (expect.min() if len(expect) else None)
        assert low <= found.needed[part]  # type: ignore[operator]
    low, high = found.interval[0.5]
    assert (low, high) != (found.needed[0.5], found.needed[0.5])


def test_sizes_that_were_not_run_stay_possible() -> None:
    """With 2 and 8 run and 8 needed, anything from 3 on may do."""
    found = carried(range(8), TOTAL[:, None] * torch.tensor([0.3, 0.95]).double(), TOTAL, sizes=[2, 8], levels=[0.5])
    assert found.needed == {0.5: 8}
    assert found.interval == {0.5: (3, 8)}


def test_what_is_never_reached_is_none() -> None:
    found = carried(range(3), TOTAL[:, None] * torch.tensor([0.3, 0.5, 0.6]).double(), TOTAL)
    assert found.needed == {0.5: 2, 0.9: None}
    assert found.interval[0.9] == (None, None)
    assert "90% of the total effect: not reached [more than were run, more than were run]" in repr(found)
    assert "50% of the total effect: 2 units [2, 2]" in repr(found)


def test_negative_totals_count_alike() -> None:
    joint = TOTAL[:, None] * torch.tensor([0.4, 0.7, 1.0]).double()
    assert carried(range(3), -joint, -TOTAL).needed == carried(range(3), joint, TOTAL).needed == {0.5: 2, 0.9: 3}


def test_nothing_is_run_without_a_total_effect() -> None:
    choose, _ = additive(torch.tensor([0.6, 0.4]).double())

    def run(sets: list[tuple[int, ...]]) -> Tensor:
        raise AssertionError("was run")

    with pytest.raises(InferenceError, match="contains 0"):
        carriers(choose, run, TOTAL - TOTAL.mean())
    with pytest.raises(ArgumentError, match="`levels` to be one or more numbers above 0"):
        carriers(choose, run, TOTAL, levels=(0.0,))
    with pytest.raises(ArgumentError, match="`n_boot`"):
        carriers(choose, run, TOTAL, n_boot=3)


def test_what_run_returns_is_checked() -> None:
    choose, _ = additive(torch.tensor([0.6, 0.4]).double())
    with pytest.raises(UnitError, match=r"`run` to be a callable that returns \(20, 2\), but got \(2, 20\)"):
        carriers(choose, lambda sets: torch.zeros(len(sets), 20), TOTAL)


def test_sizes_and_sets() -> None:
    assert nested_sets(range(1)) == [(0,)]
    assert [len(one) for one in nested_sets(range(64))] == [1, 2, 4, 8, 16, 32, 64]
    assert nested_sets((3, 1, 2), [2]) == [(3, 1)]
    assert next_sizes([1, 4], torch.tensor([0.6, 0.7]), (0.5,)) == []
    assert next_sizes([4, 8], torch.tensor([0.6, 0.7]), (0.5, 0.9)) == [2]
    with pytest.raises(UnitError, match="`sizes` to be from 1 to 3"):
        nested_sets(range(3), [4])
    with pytest.raises(UnitError, match="`order` to be one or more different units"):
        nested_sets((1, 1))
    for bad in ([2, 1], [1], [0, 1]):
        with pytest.raises(UnitError, match="`sizes` to be 2 ascending numbers"):
            next_sizes(bad, torch.zeros(2))
