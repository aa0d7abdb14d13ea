"""Peak memory grows by no more than the budget, or by what one pass takes, which the estimated cost says."""

import ctypes
import gc
import multiprocessing
import os
import sys
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.designs import OneAtATime
from ce_plugin.interventions import PixelMask
from ce_plugin.sites import LayerSite
from ce_plugin.trials.batches import Cost, kernels_overhead

MB = 10**6


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU()]
    for _ in range(3):
        blocks += [nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 1000)).eval()


def wide() -> nn.Module:
    """1,930 channels and 1,000 classes: the outcomes alone take more than a small budget."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = [nn.Conv2d(3, 1930, 3, 8, 1), nn.ReLU(), nn.Conv2d(1930, 64, 1), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 1000)).eval()


KINDS = ["channels", "full", "positions", "windows", "regions"]


def explainer(case: str, budget: int | None) -> Any:
    if case == "windows":
        return CausalEffect(network(), PixelMask("zero"), OneAtATime(), memory_budget=budget)
    if case == "regions":
        return CausalEffect(network(), memory_budget=budget)
    if case == "wide":
        return LayerCausalEffect(wide(), "1", memory_budget=budget)
    units: Any = "positions" if case == "positions" else "channels"
    engine: Any = "full" if case == "full" else "auto"
    return LayerCausalEffect(network(), LayerSite("1", units=units), memory_budget=budget, engine=engine)


def options(case: str, target: int | None) -> dict[str, Any]:
    windows = {"sliding_window_shapes": (3, 8, 8), "strides": (3, 4, 4)} if case == "windows" else {}
    return {"target": target, **windows}


def _status(key: str) -> int:
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(key)).split()[1]) * 1024


def _grown(case: str, size: int, budget: int, target: int | None, queue: Any) -> None:
    """In a process of its own: by how much the peak of resident memory grows, after a first small run."""
    torch.set_num_threads(1)
    small, x = torch.rand(1, 3, 32, 32), torch.rand(1, 3, size, size)
    explainer(case, budget).estimate(small, **options(case, target))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    explainer(case, budget).estimate(x, **options(case, target))
    queue.put(_status("VmHWM") - before)


def grown(case: str, size: int, budget: int, target: int | None) -> int:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    # Large blocks go back to the system, so that they are measured when they are taken again.
    kept = {key: os.environ.pop(key) for key in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_") if key in os.environ}
    try:
        process = context.Process(target=_grown, args=(case, size, budget, target, queue))
        process.start()
    finally:
        os.environ.update(kept)
    found = queue.get(timeout=600)
    process.join()
    return int(found)


def least(case: str, size: int, budget: int, target: int | None) -> int:
    x = torch.rand(1, 3, size, size)
    return int(explainer(case, budget).estimate_cost(x, **options(case, target)).pass_bytes)


# What the allocator keeps of small blocks.
LOADED = 3 * MB
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ANY = given(
    case=st.sampled_from(KINDS),
    size=st.sampled_from([32, 48, 64]),
    budget=st.integers(1, 12) | st.integers(20, 60),
    target=st.sampled_from([0, None]),
)


def check_growth(case: str, size: int, budget: int, target: int | None) -> None:
    assume(case != "regions" or target == 0)  # see below
    allowed = max(budget * MB, least(case, size, budget * MB, target))
    assert grown(case, size, budget * MB, target) <= 1.1 * allowed + LOADED


@on_linux
@settings(max_examples=3, deadline=None, derandomize=True)
@ANY
def test_growth_of_any_kind_of_unit_keeps_to_the_budget(case: str, size: int, budget: int, target: int | None) -> None:
    check_growth(case, size, budget, target)


@pytest.mark.slow
@on_linux
@settings(max_examples=20, deadline=None)
@ANY
def test_growth_of_many_kinds_keeps_to_the_budget(case: str, size: int, budget: int, target: int | None) -> None:
    check_growth(case, size, budget, target)


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("budget", [60, 120])
@pytest.mark.parametrize("case", KINDS)
def test_growth_keeps_to_the_budget(case: str, budget: int) -> None:
    size = 96 if case == "positions" else 160
    assert grown(case, size, budget * MB, 0) <= 1.1 * max(budget * MB, least(case, size, budget * MB, 0))


@pytest.mark.slow
@on_linux
def test_growth_of_the_default_for_all_classes_keeps_to_the_budget() -> None:
    allowed = max(30 * MB, least("regions", 64, 30 * MB, None))
    assert grown("regions", 64, 30 * MB, None) <= 1.1 * allowed + LOADED


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("target", [0, None])
def test_growth_of_many_units_keeps_to_a_small_budget(target: int | None) -> None:
    check_growth("wide", 64, 16, target)


def test_only_weights_that_kernels_copy_are_counted() -> None:
    linear, cell, kernel = nn.Linear(512, 1024), nn.Conv2d(512, 1024, 1), nn.Conv2d(64, 64, 3)
    assert kernels_overhead([linear]) == kernels_overhead([cell]) == kernels_overhead([])
    assert kernels_overhead([kernel, linear]) - kernels_overhead([]) == 3 * 4 * 64 * 64 * 9


def test_a_cost_says_where_one_pass_takes_more_than_the_budget() -> None:
    x = torch.rand(1, 3, 64, 64)
    for case in ("channels", "full", "windows", "positions"):
        small, large = (explainer(case, budget).estimate_cost(x) for budget in (1000, 10**9))
        assert small.pass_bytes == large.pass_bytes > 8 * MB + 4 * 32 * 32 * 32
        assert "more than the budget of 0.0 MiB" in str(small)
        assert "budget" not in str(large)
    assert str(Cost(1, 2, "full", 0, 10, 10)) == "1 trials, 2 forward passes (route: full), 0.0 MiB of outcomes"


def test_outcomes_of_all_classes_are_part_of_the_budget() -> None:
    largest = {}
    for target in (None, 0):
        rows: list[int] = []
        net = network()
        net[0].register_forward_hook(lambda module, args, output, rows=rows: rows.append(len(output)))
        explained = CausalEffect(net, PixelMask("zero"), OneAtATime(), memory_budget=12 * MB, engine="full")
        explained.estimate(torch.rand(1, 3, 32, 32), target=target)
        largest[target] = max(rows)
    assert largest[None] < largest[0]
