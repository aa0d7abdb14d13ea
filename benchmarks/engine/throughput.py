"""Trials per second against a bare loop of batched forward passes at its best batch size, in interleaved pairs."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.common.results import write
from ce_plugin import CausalEffect
from ce_plugin.designs import RandomMask
from ce_plugin.interventions import PixelMask
from ce_plugin.models import efficientnet_lite0

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def bare(model: nn.Module, x: Tensor, batch: int, rows: int, layout: str) -> float:
    """Rows per second of the minimal loop: the same batch through the model, nothing else."""
    images = x.expand(batch, -1, -1, -1).contiguous(memory_format=LAYOUTS[layout])
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(rows // batch):
            model(images)
    return rows // batch * batch / (time.perf_counter() - start)


def ours(explainer: CausalEffect, x: Tensor, rows: int) -> float:
    """Trials per second of a whole call, from the arguments to the estimate."""
    start = time.perf_counter()
    explainer.estimate(x, target=0)
    return rows / (time.perf_counter() - start)


def search(model: nn.Module, x: Tensor, batches: list[int]) -> dict[tuple[str, int], float]:
    """Rows per second of the bare loop in each layout and at each batch size: the better of two timings."""
    return {
        (layout, batch): max(bare(model, x, batch, max(batch, 32), layout) for _ in range(2))
        for layout in LAYOUTS
        for batch in batches
    }


def interval(ratios: list[float]) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median."""
    draw = np.random.default_rng(0)
    medians = np.median(draw.choice(ratios, size=(4000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10, help="interleaved pairs of timings")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="tried by the loop")
    options = parser.parse_args()
    networks: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "EfficientNet-lite0": (lambda: efficientnet_lite0().model, 256),
        "ResNet-50": (lambda: torchvision.models.resnet50(weights=None), 96),
    }
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows, data = [], {}
    for name, (build, trials) in networks.items():
        torch.manual_seed(0)
        model = build().eval()
        explainer = CausalEffect(model, PixelMask("zero"), RandomMask(0.1, n_trials=trials))
        ours(explainer, x, trials)  # finds its batch size, which later calls on this network reuse
        speeds = search(model, x, options.batches)
        layout, batch = max(speeds, key=lambda key: speeds[key])
        plain = max((speed, key[1]) for key, speed in speeds.items() if key[0] == "contiguous")
        pairs = [(ours(explainer, x, trials), bare(model, x, batch, trials, layout)) for _ in range(options.pairs)]
        ratios = [mine / loop for mine, loop in pairs]
        low, high = interval(ratios)
        mine, loop = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(ratios)
        data[name] = {
            "layout": layout, "batch": batch, "trials": trials, "pairs": pairs, "ratio": ratio,
            "interval": [low, high], "search": {f"{key[0]} {key[1]}": speed for key, speed in speeds.items()},
        }  # fmt: skip
        rows.append(
            f"| {name} | {trials} | {mine:.1f} | {loop:.1f} ({layout}, batch {batch}) "
            f"| {ratio:.3f} ({low:.3f} to {high:.3f}) | {plain[0]:.1f} (batch {plain[1]}) |"
        )
        print(rows[-1], flush=True)
    text = [
        "### Throughput of trials",
        "",
        "A whole call of `estimate` (RandomMask on 14 x 14 patches of one 224 x 224 image, from the arguments to the",
        "estimate) against a bare loop that passes one ready batch through the model again and again, in the memory",
        "layout and at the batch size in which it was fastest; beside it the fastest contiguous loop of that search.",
        f"Medians of {options.pairs} interleaved pairs; 95 % bootstrap interval of the median ratio. The plugin",
        "chooses batch size and layout by itself.",
        "",
        "| network | trials | trials/s | bare passes/s | ratio | bare passes/s, contiguous |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    write("throughput", "\n".join(text), data)


if __name__ == "__main__":
    main()
