"""Does a run keep to its memory budget? Growth of the peak beyond model and inputs, each case in its own process.

Linux only: the kernel's own record of a process's largest resident memory (VmHWM in /proc/self/status), reset just
before the run. The first estimate of a process also loads code and workspaces that stay; a small warm-up run excludes
them, and the growth without it is shown as well, at the smallest budget.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.common.results import write

MIB = 2**20
# Name -> (network, layer, height and width of the layer).
CASES = {
    "ResNet-50 layer4, 2048 channels": ("ResNet-50", "layer4", 7),
    "VGG-16 features.30, 512 channels": ("VGG-16", "features.30", 7),
    "VGG-16 features.4, 64 channels": ("VGG-16", "features.4", 112),
    "ResNet-18 layer1, 64 channels": ("ResNet-18", "layer1", 56),
    "ResNet-18 layer1, 3136 positions": ("ResNet-18", "layer1:positions", 56),
    "ResNet-18 input, 169 windows": ("ResNet-18", "input", 224),
}
TOLERANCE = 0.10


def peak() -> int:
    """Largest resident memory since the last reset, in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def resident() -> int:
    """Resident memory now, in bytes."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def child(network_name: str, layer: str, budget: int, warm: bool, engine: str, threads: int) -> None:
    """Run one case and print what was measured."""
    import ctypes
    import gc

    import torch

    from benchmarks.common.networks import network
    from ce_plugin import CausalEffect, LayerCausalEffect
    from ce_plugin.sites import LayerSite

    torch.set_num_threads(threads)
    model, x = network(network_name)
    model.requires_grad_(False)
    name, _, units = layer.partition(":")
    explainer: Any
    options: dict[str, Any] = {}
    shared: dict[str, Any] = {"outcome": None, "memory_budget": budget, "engine": engine}
    if name == "input":
        explainer = CausalEffect(model, **shared)
        options = {"sliding_window_shapes": (3, 32, 32), "strides": (3, 16, 16)}
    else:
        site = LayerSite(name, units=units or "channels")  # type: ignore[arg-type]
        explainer = LayerCausalEffect(model, site, **shared)
    cost = explainer.estimate_cost(x, **options)
    if warm and name == "input":
        explainer.estimate(x[..., :64, :64], **options)
    elif warm:
        explainer.estimate(x, target=0, layer_mask=torch.zeros(1, dtype=torch.long))

    def growth(function: Callable[[], Any]) -> tuple[int, Any]:
        gc.collect()
        # Freed memory that is not returned to the system would be reused without being measured.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")
        before = resident()
        answer = function()
        return peak() - before, answer

    with torch.inference_mode():
        clean, _ = growth(lambda: model(x)) if warm else (0, None)
    grown, estimate = growth(lambda: explainer.estimate(x, **options))
    size = estimate.effect.numel() * estimate.effect.element_size()
    found = {"growth": grown, "clean": clean, "answer": size, "route": str(cost), "one_pass": cost.pass_bytes}
    print(json.dumps(found))


def measured(case: str, budget: int, warm: bool, options: argparse.Namespace) -> dict[str, Any]:
    """A case in a new process, in which glibc returns large blocks to the system."""
    network, layer, _ = CASES[case]
    command = [sys.executable, "-m", "benchmarks.engine.memory", "--child", network, layer, str(budget), str(int(warm))]
    command += ["--engine", options.engine, "--threads", str(options.threads)]
    skipped = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    environment = {key: value for key, value in os.environ.items() if key not in skipped}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        return {"error": run.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256], help="in MiB")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--engine", choices=("auto", "suffix", "full"), default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        network, layer, budget, warm = options.child
        child(network, layer, int(budget), bool(int(warm)), options.engine, options.threads)
        return
    rows, data = [], []
    for case in options.cases:
        for size in options.budgets:
            budget = size * MIB
            found = {True: measured(case, budget, True, options)}
            found[False] = measured(case, budget, False, options) if size == min(options.budgets) else {}
            data.append({"case": case, "budget": budget, "warm": found[True], "first": found[False]})
            one = found[True]
            side = CASES[case][2]
            if "error" in one:
                rows.append(f"| {case} | {side} x {side} | {size} | {one['error']} | | | | | |")
            else:
                share = one["growth"] / budget
                most = (1 + TOLERANCE) * max(budget, one["one_pass"])
                kept = "yes" if one["growth"] <= most else "**no**"
                first = f"{found[False]['growth'] / MIB:.0f}" if "growth" in found[False] else "-"
                rows.append(
                    f"| {case} | {side} x {side} | {size} | {one['growth'] / MIB:.0f} | {share:.0%} "
                    f"| {one['one_pass'] / MIB:.0f} "
                    f"| {kept} | {first} | {one['answer'] / MIB:.1f} "
                    f"| {one['clean'] / MIB:.0f} |"
                )
            print(rows[-1], flush=True)
    text = [
        "### Memory of the engine",
        "",
        "Effects of all channels of a layer on all 1,000 logits of one 224 x 224 image. Growth of the peak of resident",
        "memory during `estimate` beyond what the process held before it (model, image, libraries), the answer",
        f"included; kept where it is at most {1 + TOLERANCE:.0%} of the budget, or of what the cost says that one",
        "pass takes. Every figure is from a process of",
        "its own, after one small run (first run: without it, so that what is loaded once counts). Clean pass: the",
        "growth during one plain pass of the image, for comparison.",
        "",
        "| case | layer | budget, MiB | growth, MiB | share | one pass | kept | first run | answer | clean pass |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    write("engine_memory", "\n".join(text), {"cases": data})


if __name__ == "__main__":
    main()
