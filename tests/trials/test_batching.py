"""How many rows go through at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ce_plugin.designs import Design, LeaveOneIn, OneAtATime, RandomMask
from ce_plugin.interventions import Context, PixelMask
from ce_plugin.networks.forward import is_opaque
from ce_plugin.sites import InputSite
from ce_plugin.trials.batches import BatchSize, TrialSpec, batches, bytes_per_row, free_memory, rows_of


def run(size: BatchSize, seconds_per_row: dict[int, float], passes: int = 40) -> list[int]:
    """The batch sizes that are tried, if a row took so long in batches of these sizes."""
    tried = []
    for _ in range(passes):
        tried.append(size.rows)
        if not size.settled:
            size._learn(seconds_per_row[size.rows] * size.rows)
    return tried


def test_the_batch_grows_while_rows_get_cheaper() -> None:
    size = BatchSize(1000)
    tried = run(size, {4: 2.0, 8: 1.0, 16: 0.5, 32: 0.4, 64: 0.6})
    assert tried[:9] == [4, 8, 16] * 3
    assert tried[9:21] == [16, 32] * 3 + [32, 64] * 3
    assert set(tried[21:]) == {32}
    assert size.fastest == 32


def test_slower_ones_are_left_at_once() -> None:
    size = BatchSize(1000)
    assert set(run(size, {4: 1.5, 8: 1.0, 16: 2.0})[9:]) == {8}
    assert size.fastest == 8


def test_fewer_rows_are_tried_where_more_do_not_pay() -> None:
    size = BatchSize(1000)
    tried = run(size, {8: 1.0, 16: 2.0, 4: 0.7, 2: 0.6, 1: 0.8})
    assert tried[9:21] == [4, 2] * 3 + [2, 1] * 3
    assert set(tried[21:]) == {2}
    assert size.fastest == 2


def test_one_slow_pass_decides_nothing() -> None:
    size = BatchSize(1000)
    for pass_ in range(9):
        size._learn(size.rows * (50.0 if pass_ in (1, 5) else {4: 1.5, 8: 1.0, 16: 2.0}[size.rows]))
    assert size.fastest == 8


def test_very_short_passes_always_grow() -> None:
    size = BatchSize(1 << 20)
    tried = run(size, dict.fromkeys([2**k for k in range(2, 13)], 1e-7))
    assert max(tried) == 4096
    assert size.settled


def test_memory_is_the_limit_and_is_not_remembered_as_the_fastest() -> None:
    size = BatchSize(20)
    assert max(run(size, {4: 2.0, 8: 1.0, 16: 0.5})) == 16
    assert size.settled
    assert size.fastest is None
    assert BatchSize(0).rows == BatchSize(-5).rows == 1
    assert BatchSize(3).rows == 3


def test_what_an_earlier_run_learned_is_bounded_by_memory() -> None:
    assert BatchSize(100, start=64).rows == 64
    small = BatchSize(10, start=64)
    assert (small.rows, small.settled, small.fastest) == (10, True, None)
    assert BatchSize(10, fixed=64).rows == 64


def test_running_out_of_memory() -> None:
    size = BatchSize(1000)
    size.halve(8)
    assert (size.rows, size.limit, size.settled, size.fastest) == (4, 4, True, None)
    size.halve(3)
    assert size.rows == 1
    size.halve(1)
    assert size.rows == 1
    grown = BatchSize(1000, fixed=64)
    grown.halve(40)  # the last batch of a run was smaller, and even that did not fit
    assert grown.rows == 20
    during = BatchSize(1000)
    with during.timed(8, torch.device("cpu")):
        during.halve(8)
    assert (during.rows, during.fastest) == (4, None)


def test_only_full_batches_are_timed() -> None:
    size = BatchSize(1000)
    for _ in range(5):
        with size.timed(3, torch.device("cpu")):
            pass
    assert size.rows == 4
    with size.timed(4, torch.device("cpu")):
        pass
    assert size.rows == 8


def test_an_error_in_a_timed_pass_gets_out() -> None:
    size = BatchSize(1000)
    with pytest.raises(KeyError), size.timed(4, torch.device("cpu")):
        raise KeyError("x")
    assert size.rows == 4


def test_free_memory_is_a_sensible_number() -> None:
    assert 1 << 20 < free_memory(torch.device("cpu")) < 1 << 50


def test_bytes_per_row_sees_the_largest_layer() -> None:
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.Flatten(), nn.Linear(1024, 2))
    x = torch.rand(4, 1, 8, 8)
    with bytes_per_row([net], 4, (x,)) as found:
        net(x)
    row = 4 * 64
    assert found[0] == 4 * row + 3 * (4 * 2 * 1024)  # flatten holds its input and output
    assert not any(module._forward_hooks for module in net.modules())
    with bytes_per_row([], 4, (x,)) as found:
        pass
    assert found[0] == 64 * row


def test_hooks_of_the_measurement_go_after_an_error() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(KeyError), bytes_per_row([net], 1, (torch.ones(1, 2),)):
        raise KeyError("x")
    assert not any(module._forward_hooks for module in net.modules())


def test_opaque_modules() -> None:
    net = nn.Linear(2, 2)
    assert not is_opaque(net)
    assert is_opaque(torch.compile(net, backend="eager"))
    assert is_opaque(torch.jit.trace(net, torch.ones(1, 2)))
    net.compile(backend="eager")
    assert is_opaque(net)


def spec(n: int, design: Design, fills: int, mask: Tensor | None) -> TrialSpec:
    x = torch.zeros(n, 1, 2, 2)
    return TrialSpec(
        (x,), (), InputSite(mask).units_of((x,)), design, PixelMask(tuple(float(k) for k in range(fills))),
        Context(ids=tuple(range(n))),
    )  # fmt: skip


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_batches_hold_every_trial_once_and_are_full(data: st.DataObject) -> None:
    n, fills = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    design = data.draw(
        st.sampled_from([OneAtATime(), LeaveOneIn(), RandomMask(0.5, 6), RandomMask(0.5, 6, antithetic=True)])
    )
    mask = None
    if data.draw(st.booleans()):
        mask = torch.randint(0, 3, (n, 1, 2, 2), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    run_ = spec(n, design, fills, mask)
    chosen = data.draw(st.lists(st.integers(0, n - 1), unique=True, min_size=1))
    wanted = []
    for i in chosen:
        start = data.draw(st.integers(0, run_.n_trials(i) - 1))
        wanted.append((i, start, data.draw(st.integers(start + 1, run_.n_trials(i)))))
    size = BatchSize(1000, fixed=data.draw(st.integers(1, 9)))
    changes = data.draw(st.lists(st.integers(1, 9), max_size=8))
    seen, lengths = [], []
    for rows in batches(run_, wanted, size):
        lengths.append((len(rows), size.rows))
        for e, a, v, t in zip(rows.examples, rows.assignments, rows.variants, rows.trials, strict=True):
            seen.append((int(e), int(t), int(v)))
            assert torch.equal(a, run_.assignments(int(e), int(t), int(t) + 1)[0])
        if changes:
            size._queue = [changes.pop()]
    every = []
    for i, start, stop in wanted:
        for t in range(start, stop):
            turn = int(run_.variants(t, t + 1))
            every += [(i, t, v) for v in (range(fills) if design.exact else [turn])]
    assert seen == every
    assert all(length == at for length, at in lengths[:-1])


def test_antithetic_partners_set_the_same_alternative() -> None:
    run_ = spec(1, RandomMask(0.5, 8, antithetic=True), 2, None)
    assert run_.variants(0, 8).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert run_.variants(3, 6).tolist() == [1, 0, 0]
    assert spec(1, RandomMask(0.5, 8), 3, None).variants(2, 8).tolist() == [2, 0, 1, 2, 0, 1]


def test_rows_of_arguments() -> None:
    per_example, shared, flag = torch.tensor([1, 2, 3]), torch.tensor([7, 8]), object()
    scalar = torch.tensor(5)
    found = rows_of((per_example, shared, flag, scalar, None), 3, torch.tensor([2, 0, 0, 1]))
    assert found[0].tolist() == [3, 1, 1, 2]
    assert found[1] is shared
    assert found[2] is flag
    assert found[3] is scalar
    assert found[4] is None
