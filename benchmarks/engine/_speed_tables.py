"""Cases of the speed benchmark, and its tables."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common.networks import HOW
from benchmarks.common.results import write


@dataclass(frozen=True)
class Case:
    """What is measured: a layer, or windows at the input if it is empty; and the targets."""

    network: str
    layer: str
    passes: float | None  # target: at most this many clean passes
    ratio: float  # target: at least this many times faster than the peers


CASES = {
    "vgg29": Case("VGG-16", "features.29", 3, 100),
    "resnet4": Case("ResNet-50", "layer4", 2, 300),
    "densenet": Case("DenseNet-121", "features.norm5", 2, 150),
    "vgg16": Case("VGG-16", "features.16", None, 2.5),
    "resnet3": Case("ResNet-50", "layer3", None, 4),
    "occlusion": Case("VGG-16", "", None, 4),
}
WINDOW, STRIDE = 16, 8
PEERS = ("captum", "grad-cam", "suffix loop")


def median_of(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    draw = np.random.default_rng(0)
    medians = np.median(draw.choice(values, size=(4000, len(values))), axis=1)
    return statistics.median(values), float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def shown(values: list[float], digits: int = 2) -> str:
    """Median (low to high)."""
    middle, low, high = median_of(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def report(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """The table, the lower bound, the profile."""
    lines = [
        "### Effects of all units: time",
        "",
        f"{HOW} One photograph, {options.threads} threads. Medians of {options.pairs} rounds, each of which times all",
        "columns one after the other; 95 % bootstrap intervals of the median. Ours: a whole call of `estimate`, from",
        "the arguments to the effects of all units on all 1,000 logits; the peers explain one class. Peers at the best",
        f"batch size of {options.batches}, at least {options.trials} trials in every round, their time multiplied to",
        "all units. The loop runs a clean pass, and then the modules behind the layer by hand on batches of ablated",
        "activations.",
        "",
        "| case | units | ours, s | clean passes | aim | Captum / ours | grad-cam / ours | aim | suffix loop / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, one in found.items():
        case, rounds = CASES[key], one["rounds"]
        ratio = {
            name: shown([r[name] / r["ours"] for r in rounds], 1) if name in rounds[0] else "-"
            for name in PEERS
        }  # fmt: skip
        passes = shown([r["ours"] / r["clean"] for r in rounds])
        lines.append(
            f"| {title(case)} | {one['units']} | {statistics.median(r['ours'] for r in rounds):.2f} | {passes} "
            f"| {'<= ' + str(case.passes) if case.passes else '-'} | {ratio['captum']} | {ratio['grad-cam']} "
            f"| >= {case.ratio} | {ratio['suffix loop']} |"
        )
    lines += ["", *details(found)]
    write("engine_speed", "\n".join(lines), {"cases": found}, "grad-cam")


def title(case: Case) -> str:
    """A case in a few words."""
    return f"{case.network} {case.layer or f'occlusion {WINDOW} px, stride {STRIDE}'}"


def details(found: dict[str, dict[str, Any]]) -> list[str]:
    """All times in seconds, the lower bound, and the profile."""
    lines = [
        "Seconds of a whole map (best batch size), our first call in a process, and the lower bound: floating-point",
        "operations that an exact answer cannot avoid (the clean pass; the first linear mixing once for all units",
        "together; what follows it for every unit, or for windows what their reach touches) over the rate of a large",
        "matrix product.",
        "",
        "| case | clean | ours | first call | Captum | grad-cam | suffix loop | bound, GFLOP | bound, s | times it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, one in found.items():
        middle = {name: statistics.median(r[name] for r in one["rounds"]) for name in one["rounds"][0]}
        peers = " | ".join(f"{middle[p]:.1f} ({one['best'][p]})" if p in middle else "-" for p in PEERS)
        least = one["lower_bound"] / one["matrix_rate"]
        lines.append(
            f"| {title(CASES[key])} | {middle['clean']:.3f} | {middle['ours']:.2f} | {one['first_call']:.2f} | {peers} "
            f"| {one['lower_bound'] / 1e9:.1f} | {least:.2f} | {middle['ours'] / least:.1f} |"
        )
    rates = [one["matrix_rate"] / 1e9 for one in found.values()]
    lines += ["", f"Rate of a matrix product of 2048 x 2048: {min(rates):.0f} to {max(rates):.0f} GFLOP/s."]
    whole = [
        f"{title(CASES[key])}: {one['whole']['captum']:.0f} s in full, "
        f"{statistics.median(r['captum'] for r in one['rounds']):.0f} s by multiplication"
        for key, one in found.items()
        if one["whole"]
    ]
    if whole:
        lines += ["", "Captum in full, once: " + "; ".join(whole) + "."]
    lines += ["", "Where our time goes (share of the operators' own time):", ""]
    for key, one in found.items():
        top = ", ".join(f"{name} {share:.0%}" for name, share in one["profile"])
        lines.append(f"* {title(CASES[key])}: {top}. Said beforehand: {one['cost']}.")
    return lines
