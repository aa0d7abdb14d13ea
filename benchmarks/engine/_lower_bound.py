"""Lower bound of the time: the floating-point operations that an exact method needs, and the machine's rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def matrix_rate(size: int = 2048, repeats: int = 9) -> float:
    """Operations per second of a product of two square matrices in float32."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def operations(function: Callable[[], Any]) -> float:
    """Operations of all convolutions and matrix products of a call; a multiply-add counts as two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def operations_needed(network: str, layer: str, timed: Any, window: int, stride: int) -> float:
    """Operations of a case of the speed benchmark.

    A clean pass. For a layer, the first linear mixing once for all channels together, since the channels' changes add
    up to one activation, and what follows it for every channel that is not dead. For windows, the parts that they
    change.
    """
    model, x = timed.model, timed.x
    clean = operations(lambda: model(x))
    if not layer:
        return clean + _windows(model, x.shape[-1], window, stride)
    live = int((timed.planes[0].flatten(1) != 0).any(1).sum())
    behind = operations(lambda: timed.tail(timed.planes))
    mixing = _first_mixing(network, layer, timed)
    return clean + mixing + live * (behind - mixing)


def _first_mixing(network: str, layer: str, timed: Any) -> float:
    """Operations of the first linear layers after the layer, at batch 1; of all that follows if it is linear."""
    model, planes = timed.model, timed.planes
    if (network, layer) == ("VGG-16", "features.29"):
        return operations(lambda: model.classifier[0](torch.zeros(1, 512 * 7 * 7)))
    if (network, layer) == ("VGG-16", "features.16"):
        return operations(lambda: model.features[17](planes))
    if (network, layer) == ("ResNet-50", "layer3"):
        block = model.layer4[0]
        return operations(lambda: (block.conv1(planes), block.downsample[0](planes)))
    return operations(lambda: timed.tail(planes))  # pooling and a linear layer: superposition up to the output


def _windows(model: Any, size: int, window: int, stride: int) -> float:
    """Operations in a VGG for every window, which grows by a kernel's radius and shrinks at a stride."""
    spans = [(a, min(a + window, size)) for a in range(0, size - window + stride, stride)]
    total = 0.0
    for module in model.features:
        if isinstance(module, nn.Conv2d):
            spans = [(max(a - 1, 0), min(b + 1, size)) for a, b in spans]
            taps = 2 * module.in_channels * module.out_channels * 9
            total += taps * sum(b - a for a, b in spans) ** 2
        if isinstance(module, nn.MaxPool2d):
            spans, size = [(a // 2, -(-b // 2)) for a, b in spans], size // 2
    head: Tensor = torch.zeros(1, 512 * 7 * 7)
    return total + len(spans) ** 2 * operations(lambda: model.classifier(head))
