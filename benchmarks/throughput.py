"""Trials per second against a bare loop of batched forward passes at its best batch size, in interleaved pairs."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import _record
import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from ce_plugin import CausalEffect
from ce_plugin.designs import RandomMask
from ce_plugin.interventions import PixelMask
from ce_plugin.models import efficientnet_lite0

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def bare(model: nn.Module, x: Tensor, batch: int, rows: int, layout: str) -> float:
    """Rows per second of the loop that nobody can do without: the same batch through the model, nothing else."""
    images = x.expand(batch, -1, -1, -1).contiguous(memory_format=LAYOUTS[layout])
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(rows // batch):
            model(images)
    return rows // batch * batch / (time.perf_counter() - start)


def ours(explainer: CausalEffect, x: Tensor, rows: int) -> float:
    """Trials per second of a whole call, from the arguments to the estimate of 1,000 classes x 196 units."""
    start = time.perf_counter()
    explainer.estimate(x, target=0)
    return rows / (time.perf_counter() - start)


def best(model: nn.Module, x: Tensor, layout: str, batches: list[int]) -> tuple[int, float]:
    """The batch size at which the bare loop is fastest: the best of three timings each."""
    speeds = {b: max(bare(model, x, b, max(b, 32), layout) for _ in range(3)) for b in batches}
    chosen = max(speeds, key=lambda b: speeds[b])
    return chosen, speeds[chosen]


def interval(ratios: list[float]) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median."""
    draw = np.random.default_rng(0)
    medians = np.median(draw.choice(ratios, size=(4000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=12, help="interleaved pairs of timings")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="tried by the loop")
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
        ours(explainer, x, trials)  # learns its batch size; later calls on this network know it
        for layout in LAYOUTS:
            batch, _ = best(model, x, layout, options.batches)
            pairs = [(ours(explainer, x, trials), bare(model, x, batch, trials, layout)) for _ in range(options.pairs)]
            ratios = [mine / floor for mine, floor in pairs]
            low, high = interval(ratios)
            mine, floor = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(ratios)
            data[f"{name}, {layout}"] = {"batch": batch, "pairs": pairs, "ratio": ratio, "interval": [low, high]}
            rows.append(
                f"| {name} | {layout}, batch {batch} | {mine:.1f} | {floor:.1f} | {ratio:.3f} ({low:.3f} to {high:.3f}) |"
            )
            print(rows[-1], flush=True)
    text = [
        "### Throughput of trials",
        "",
        "A whole call of `estimate` (RandomMask on 14 x 14 patches, one image of 224 x 224, the model's predicted class",
        "against a bare loop that passes one ready batch through the model again and again, at the batch size that was",
        f"fastest for it. Median of {options.pairs} interleaved pairs; 95 % bootstrap interval of the median ratio. The",
        "plugin chooses batch size and layout itself; the bare loop is shown in both layouts.",
        "",
        "| network | bare loop | trials/s | bare passes/s | ratio |",
        "|---|---|---|---|---|",
        *rows,
    ]
    _record.write("throughput", "\n".join(text), data)


if __name__ == "__main__":
    main()
