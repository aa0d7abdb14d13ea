"""Designs: boolean assignments with the margins, the dependence and the reproducibility that they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ce_plugin.designs import (
    Design,
    EveryUnit,
    Joint,
    LeaveOneIn,
    OneAtATime,
    RandomMask,
    RandomRegions,
    RandomWindows,
)
from ce_plugin.errors import DesignError

GRID = (7, 5)
ALL: list[Design] = [
    OneAtATime(),
    LeaveOneIn(),
    EveryUnit(),
    Joint([(0, 3), (2,), (1, 2, 3)]),
    RandomMask(0.3, 20),
    RandomMask(0.3, 20, balanced=True),
    RandomMask(0.3, 20, antithetic=True),
    RandomMask(0.3, 20, balanced=True, antithetic=True),
    RandomRegions(0.3, 20),
    RandomWindows(0.3, 20),
]


@pytest.mark.parametrize("design", ALL, ids=repr)
def test_rows_are_parts_of_the_assignments(design: Design) -> None:
    units = GRID[0] * GRID[1]
    every = design.assignments(units, example=4, grid=GRID)
    assert every.dtype == torch.bool
    assert every.shape == (design.n_trials_for(units), units)
    for start, stop in ((0, 1), (1, 3), (0, len(every)), (len(every) - 1, len(every))):
        assert torch.equal(design.rows(units, start, stop, example=4, grid=GRID), every[start:stop])


@pytest.mark.parametrize("design", [d for d in ALL if not d.exact], ids=repr)
def test_random_assignments_come_from_seed_and_example_only(design: Design) -> None:
    first = design.assignments(35, example=1, grid=GRID)
    torch.manual_seed(123)
    assert torch.equal(first, design.assignments(35, example=1, grid=GRID))
    assert not torch.equal(first, design.assignments(35, example=2, grid=GRID))
    other = design.reseeded(9)
    assert type(other) is type(design)
    assert not torch.equal(first, other.assignments(35, example=1, grid=GRID))
    assert torch.equal(first, other.reseeded(design.seed).assignments(35, example=1, grid=GRID))
    assert torch.equal(first, design.assignments(35, example=1, grid=GRID))


@pytest.mark.parametrize("design", [d for d in ALL if d.exact], ids=repr)
def test_exact_designs_are_the_same_for_all(design: Design) -> None:
    assert torch.equal(design.assignments(6, example=1), design.reseeded(5).assignments(6, example=2))
    assert design.blocks(3) is None
    assert design.flip_probability() is None


@given(units=st.integers(1, 40))
def test_one_at_a_time_and_leave_one_in(units: int) -> None:
    assert torch.equal(OneAtATime().assignments(units), torch.eye(units, dtype=torch.bool))
    assert torch.equal(LeaveOneIn().assignments(units), ~torch.eye(units, dtype=torch.bool))
    assert OneAtATime.reference == "idle"
    assert LeaveOneIn.reference == "all"


@given(groups=st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=6), units=st.integers(10, 12))
def test_joint(groups: list[set[int]], units: int) -> None:
    design = Joint([tuple(group) for group in groups])
    rows = design.assignments(units)
    assert [set(row.nonzero().flatten().tolist()) for row in rows] == groups


def test_all_pairs() -> None:
    assert Joint.pairs([4, 1, 2]).groups == ((4,), (1,), (2,), (4, 1), (4, 2), (1, 2))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_independent_flips(p: float) -> None:
    a = RandomMask(p, 4000).assignments(30).double()
    # 30 shares and 435 covariances: 4.5 standard errors.
    assert ((a.mean(0) - p).abs() < 4.5 * (p * (1 - p) / 4000) ** 0.5).all()
    z = (a - p) / (p * (1 - p)) ** 0.5
    correlation = (z.T @ z / 4000)[~torch.eye(30, dtype=torch.bool)]
    assert correlation.abs().max() < 4.5 / 4000**0.5
    between_trials = (z[:-1] * z[1:]).mean(0)
    assert between_trials.abs().max() < 4.5 / 4000**0.5
    assert RandomMask(p, 4000).flip_probability() == p


@given(
    p=st.floats(0.05, 0.95), half=st.integers(10, 40), antithetic=st.booleans(), units=st.integers(1, 8),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_balanced_designs_flip_each_unit_equally_often(
    p: float, half: int, antithetic: bool, units: int, seed: int
) -> None:
    design = RandomMask(p, 2 * half, balanced=True, antithetic=antithetic, seed=seed)
    flips = design.assignments(units).sum(0)
    assert (flips == round(p * 2 * half)).all()
    assert design.flip_probability() == pytest.approx(round(p * 2 * half) / (2 * half))


def test_balanced_designs_balance_units_and_not_trials() -> None:
    """With k units in every trial a unit's flip would say that the others are idle: a biased comparison."""
    a = RandomMask(0.5, 400, balanced=True).assignments(10).double()
    per_trial = a.sum(1)
    assert per_trial.std() == pytest.approx((10 * 0.25) ** 0.5, rel=0.15)
    z = 2 * a - 1
    correlation = (z.T @ z / 400)[~torch.eye(10, dtype=torch.bool)]
    assert correlation.abs().max() < 4.5 / 20


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.7])
def test_antithetic_pairs_differ_as_much_as_p_allows(p: float, balanced: bool) -> None:
    design = RandomMask(p, 2000, antithetic=True, balanced=balanced)
    a = design.assignments(20)
    first, second = a[0::2], a[1::2]
    if p <= 0.5:
        assert not (first & second).any()
    if p >= 0.5:
        assert (first | second).all()
    for half in (first, second):
        assert ((half.double().mean(0) - p).abs() < 4.5 * (p * (1 - p) / 1000) ** 0.5).all()
    assert design.blocks(6).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("make", [RandomRegions, RandomWindows])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_coherent_designs(make: Any, p: float) -> None:
    grid = (14, 14)
    a = make(p, 600, independent=0).assignments(196, grid=grid).double().reshape(600, *grid)
    if make is RandomRegions:  # every unit, at the border too, flips with probability p exactly
        assert ((a.flatten(1).mean(0) - p).abs() < 4.5 * (p * (1 - p) / 600) ** 0.5).all()
    else:
        assert float(a.mean()) == pytest.approx(p, abs=0.03)
    # Neighbours flip together far more often than by chance, distant units do not.
    together = float((a[:, :, :-1] == a[:, :, 1:]).double().mean())
    apart = float((a[:, :, :7] == a[:, :, 7:]).double().mean())
    chance = p**2 + (1 - p) ** 2
    assert together > chance + 0.15
    assert abs(apart - chance) < 0.12
    # No unit is left out or always in.
    assert 0.3 * p < float(a.mean(0).min())
    assert float(a.mean(0).max()) < min(1.0, 2.2 * p)


@pytest.mark.parametrize("make", [RandomRegions, RandomWindows])
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (2, 2), (9, 2), (14, 14)])
def test_coherent_designs_on_any_grid(make: Any, grid: tuple[int, int]) -> None:
    units = grid[0] * grid[1]
    rows = make(0.4, 200).assignments(units, grid=grid)
    assert rows.shape == (200, units)
    if units > 1 or make is RandomRegions:  # a window covers at least one unit, here the only one
        assert float(rows.double().mean()) == pytest.approx(0.4, abs=0.2)
    assert (rows.any(0) & ~rows.all(0)).all() or make is RandomWindows


@pytest.mark.parametrize("make", [RandomRegions, RandomWindows])
@pytest.mark.parametrize("grid", [None, (3, 3)])
def test_coherent_designs_need_a_grid(make: Any, grid: Any) -> None:
    with pytest.raises(DesignError, match=r"units that are not a grid, but got .*use RandomMask or OneAtATime"):
        make(0.5, 10).assignments(16, grid=grid)


@pytest.mark.parametrize("design", ALL, ids=repr)
def test_representations_can_be_evaluated(design: Design) -> None:
    again = eval(repr(design), {type(design).__name__: type(design)})
    assert type(again) is type(design)
    assert repr(again) == repr(design)
    assert torch.equal(again.assignments(35, grid=GRID), design.assignments(35, grid=GRID))
