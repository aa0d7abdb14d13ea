"""What a whole data set would take: rates measured on this machine's device, and the sizes of the tables."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision import models

from benchmarks.common.results import write
from ce_plugin import LayerCausalEffect


@dataclass(frozen=True)
class Plan:
    """A data set and the layers of a network.

    Attributes:
        images: of the data set.
        build: makes the network.
        layers: whose channels are set, all of them.
        outcome: what is measured; the prediction-weighted reduction beside it where outputs compare classes.
        outcomes: how many numbers are stored for each unit.
    """

    images: int
    build: Callable[[], nn.Module]
    layers: tuple[str, ...]
    outcome: str
    outcomes: int


def chexnet() -> nn.Module:
    """DenseNet-121 with 14 outputs, untrained: speed does not depend on the weights."""
    return models.densenet121(weights=None, num_classes=14)


PLANS = {
    "ImageNet-1k, ResNet-50": Plan(
        1_281_167, models.resnet50, ("relu", "layer1", "layer2", "layer3", "layer4"), "log_odds", 2
    ),
    "ChestX-ray14, DenseNet-121": Plan(
        112_120,
        chexnet,
        ("features.pool0", "features.transition1", "features.transition2", "features.transition3", "features.norm5"),
        "sigmoid",
        2,
    ),
}
DEVICES = (1, 8, 64)


def clock(device: str) -> float:
    """Seconds: of this process's processor on the CPU, where other work may run beside it; of the wall elsewhere."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measured(plan: Plan, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds an image and channels of each layer; the first call, which finds out what is fast, is not counted."""
    torch.manual_seed(0)
    model = plan.build().eval().to(options.device)
    x = torch.randn(options.images, 3, 224, 224, device=options.device)
    found = []
    for layer in plan.layers:
        made = LayerCausalEffect(model, layer, outcome=plan.outcome)
        cost = made.estimate_cost(x, target=0)
        made.estimate(x[:1], target=0)
        seconds = []
        for _ in range(options.repeats):
            start = clock(options.device)
            estimate = made.estimate(x, target=0, ids=range(len(x)))
            seconds.append((clock(options.device) - start) / len(x))
        with torch.inference_mode():
            start = clock(options.device)
            model(x)
            clean = (clock(options.device) - start) / len(x)
        channels = estimate.effect.shape[1]
        one = {"layer": layer, "channels": channels, "seconds": min(seconds), "clean": clean, "cost": str(cost)}
        print(one, flush=True)
        found.append(one)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=2, help="of a batch")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS))
    options = parser.parse_args()
    data: dict[str, Any] = {"device": options.device}
    rows, plans = [], []
    for name in options.plans:
        plan = PLANS[name]
        layers = measured(plan, options)
        data[name] = layers
        for one in layers:
            passes = one["seconds"] / one["clean"]
            rows.append(f"| {name} | {one['layer']} | {one['channels']} | {one['seconds']:.3g} | {passes:.1f} |")
        seconds = sum(one["seconds"] for one in layers)
        units = sum(one["channels"] for one in layers)
        size = plan.images * units * plan.outcomes * 4 / 2**30
        days = [f"{plan.images * seconds / devices / 86_400:.3g}" for devices in DEVICES]
        data[f"{name}, plan"] = {"seconds": seconds, "units": units, "gib": size, "days": days}
        sizes = f"{plan.images:,} | {units:,} | {seconds:.3g} | {size:.1f}"
        plans.append(f"| {name} | {sizes} | " + " | ".join(days) + " |")
    device = "one thread of this CPU (processor time)" if options.device == "cpu" else torch.cuda.get_device_name()
    text = [
        "### What a whole data set takes",
        "",
        f"All channels of five layers, each set to zero, on each image's own class, clean, 224 x 224, on {device};",
        "networks with untrained weights. Seconds an image, and in plain passes through the network, which were",
        "timed beside them.",
        "",
        "| data set, network | layer | channels | s an image | plain passes |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "The whole data set, one evidence: the table's size (float32, two outcomes, explained class), and days on",
        "so many such devices, where each works at this rate.",
        "",
        "| data set, network | images | units | s an image | table, GiB | "
        + " | ".join(f"days on {devices}" for devices in DEVICES)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(DEVICES),
        *plans,
    ]
    write("expected_scale", "\n".join(text), data)


if __name__ == "__main__":
    main()
