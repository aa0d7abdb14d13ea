"""Small networks and data whose expected effects are known, for the tests of runs over data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ce_plugin import LayerCausalEffect
from ce_plugin.expected import Sample


def network(seed: int = 0, units: int = 5, classes: int = 3) -> nn.Sequential:
    """Behind layer "1" it is linear: setting unit u to zero changes logit c by -h_u w_cu."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, units), nn.ReLU(), nn.Linear(units, classes)).eval().requires_grad_(False)


def logit_effects(net: nn.Sequential, x: Tensor) -> Tensor:
    """By hand, (N, U, C), float64."""
    head: nn.Linear = net[2]  # type: ignore[assignment]
    return -net[:2](x).double()[:, :, None] * head.weight.double().T


def inputs(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def explainer(outcome: str = "logit", **options: object) -> LayerCausalEffect:
    return LayerCausalEffect(network(), "1", outcome=outcome, **options)  # type: ignore[arg-type]


def small_cnn() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    return net.eval().requires_grad_(False)


def pictures(n: int, seed: int = 1) -> list[Sample]:
    values = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [Sample((one * 255).round() / 255, i % 4, f"{i}.png") for i, one in enumerate(values)]
