"""Small images of patterns, and a network that tells the patterns apart without having been trained step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ce_plugin.detection import CounterAttack, Signature, Smoothing
from ce_plugin.interventions import Smooth

SIDE = 8
Images = npt.NDArray[np.float32]


def patterns(
    n: int, n_classes: int = 3, channels: int = 1, *, seed: int = 0, noise: float = 0.08
) -> tuple[Images, npt.NDArray[np.int64]]:
    """Images (N, C, 8, 8) in [0, 1], each its class's pattern at a random strength with noise; and the classes."""
    planted = np.random.default_rng(99).choice([-1.0, 1.0], (n_classes, channels, SIDE // 2, SIDE // 2))
    random = np.random.default_rng(seed)
    classes = np.arange(n) % n_classes
    large = planted.repeat(2, 2).repeat(2, 3)[classes] * random.uniform(0.1, 0.3, (n, 1, 1, 1))
    x = 0.5 + large + noise * random.standard_normal(large.shape)
    return np.clip(x, 0, 1).astype(np.float32), classes


def classifier(n_classes: int = 3, channels: int = 1, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A convolution, a smooth activation, and a linear layer set by least squares; in eval mode."""
    random = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(144, n_classes)).double().eval()
    x, classes = patterns(900, n_classes, channels, seed=7)
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(net[0].weight.shape, generator=random))
        net[0].bias.copy_(torch.randn(4, generator=random))
        features = net[:3](torch.as_tensor(x).double())
        features = torch.cat([features, torch.ones(len(features), 1)], 1)
        wanted = 8 * torch.nn.functional.one_hot(torch.as_tensor(classes), n_classes).double()
        gram = features.T @ features + 0.1 * torch.eye(145)
        solved = torch.linalg.solve(gram, features.T @ wanted)
        net[3].weight.copy_(solved[:-1].T)
        net[3].bias.copy_(solved[-1])
    return net.to(dtype)


def quick_signature(**options: Any) -> Signature:
    """Two groups that train nothing."""
    filters = Smoothing("filters", [Smooth.gauss(1.0), Smooth.median(2)])
    return Signature([filters, CounterAttack(steps=(0.05,), **options)])


def snapshot(net: nn.Module) -> tuple[list[bool], list[Tensor | None], list[bool], list[Tensor], Tensor, Any]:
    """All of a network and of the random state that must stay as it is."""
    return (
        [module.training for module in net.modules()],
        [parameter.grad for parameter in net.parameters()],
        [parameter.requires_grad for parameter in net.parameters()],
        [value.clone() for value in net.state_dict().values()],
        torch.get_rng_state(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]  # noqa: NPY002
    )


def same(one: Any, other: Any) -> bool:
    """Whether two snapshots are equal; gradients are to be the very same objects."""
    flags = one[0] == other[0] and one[2] == other[2] and one[5] == other[5]
    gradients = all(a is b for a, b in zip(one[1], other[1], strict=True))
    values = all(torch.equal(a, b) for a, b in zip(one[3], other[3], strict=True))
    return flags and gradients and values and torch.equal(one[4], other[4])
