"""Planted networks: networks whose causal effects are known, so that an estimate can be held against the truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ce_plugin.effects import Outcome, resolve_outcome
from ce_plugin.errors import ArgumentError, expected

__all__ = ["PlantedNetwork", "expected_effects"]

# 2^16 evaluations are a matter of milliseconds; each further unit doubles them.
_MOST_UNITS = 16


class PlantedNetwork(nn.Module):
    """A network with planted main effects, interactions and hidden units.

        z(x) = bias + (x - centre) main + sum_{(u, v)} (x_u - centre) (x_v - centre) strength_uv + relu((x - 1/2) W) V

    Where x_u is 1 when idle and 0 under ``do`` with probability p, a ``centre`` of 1 - p makes interactions that have
    no main effect: a network without ``main`` then is an interaction-only null.

    Args:
        main: (U, C).
        pairs: unit indices of the interactions.
        strength: (P, C), one row for each pair.
        centre: what inputs are compared with.
        hidden: (U, H) and (H, C), weights into and out of the hidden units.
        bias: (C,).

    Example:
        >>> import torch
        >>> network = PlantedNetwork(torch.tensor([[1.0], [2.0]]), [(0, 1)], torch.tensor([[4.0]]))
        >>> network(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])).flatten().tolist()
        [7.0, 1.0, 0.0]
    """

    main: Tensor
    strength: Tensor
    inner: Tensor
    outer: Tensor
    bias: Tensor

    def __init__(
        self,
        main: Tensor,
        pairs: Sequence[tuple[int, int]] = (),
        strength: Tensor | None = None,
        *,
        centre: float = 0.0,
        hidden: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        units, classes = main.shape
        if strength is not None and strength.shape != (len(pairs), classes):
            raise ArgumentError(expected("strength", f"of shape {(len(pairs), classes)}", tuple(strength.shape)))
        self.pairs = tuple(pairs)
        self.centre = centre
        inner, outer = hidden if hidden is not None else (main.new_zeros(units, 0), main.new_zeros(0, classes))
        self.register_buffer("main", main)
        self.register_buffer("strength", main.new_zeros(0, classes) if strength is None else strength)
        self.register_buffer("inner", inner)
        self.register_buffer("outer", outer)
        self.register_buffer("bias", main.new_zeros(classes) if bias is None else bias)

    @property
    def active(self) -> list[int]:
        """The units that the output depends on."""
        used = (self.main != 0).any(dim=1) | (self.inner != 0).any(dim=1)
        return sorted(set(used.nonzero().flatten().tolist()) | {u for pair in self.pairs for u in pair})

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C) of inputs with U numbers each, (N, ...)."""
        flat = x.flatten(1)
        z = flat - self.centre
        logits = self.bias + z @ self.main
        if self.pairs:
            first, second = (list(side) for side in zip(*self.pairs, strict=True))
            logits = logits + (z[:, first] * z[:, second]) @ self.strength
        return logits + ((flat - 0.5) @ self.inner).relu() @ self.outer


def expected_effects(network: PlantedNetwork, p: float, outcome: str | Outcome | None = None) -> Tensor:
    """The exact effect of setting each unit from 1 to 0, averaged over the others, each set with probability p.

    All assignments of the units that matter are enumerated in float64. p = 0 is the effect with all others idle
    (OneAtATime), p = 1 that with all others set (LeaveOneIn).

    Args:
        network: with at most 16 active units.
        p: in [0, 1].
        outcome: what is measured; None is the logit.

    Returns:
        (U, C).

    Raises:
        ArgumentError: for too many active units, or p outside [0, 1].

    Example:
        >>> import torch
        >>> network = PlantedNetwork(torch.tensor([[1.0], [2.0]]), [(0, 1)], torch.tensor([[4.0]]))
        >>> expected_effects(network, 0.25).flatten().tolist()
        [-4.0, -5.0]

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Eq. 2.
    """
    active = network.active
    if len(active) > _MOST_UNITS:
        raise ArgumentError(expected("network", f"one with at most {_MOST_UNITS} active units", len(active)))
    if not 0 <= p <= 1:
        raise ArgumentError(expected("p", "in [0, 1]", p))
    k, units = len(active), len(network.main)
    assignments = (torch.arange(2**k)[:, None] >> torch.arange(k - 1, -1, -1)) & 1
    x = torch.ones(2**k, units, dtype=torch.float64)
    x[:, active] -= assignments.double()
    with torch.no_grad():
        logits = _doubled(network)(x)
    measured = resolve_outcome(outcome)(logits, logits[:1].expand_as(logits))
    table = measured.reshape(*(2,) * k, measured.shape[1])
    effects = torch.zeros(units, measured.shape[1], dtype=torch.float64)
    for dimension, unit in enumerate(active):
        difference = table.select(dimension, 1) - table.select(dimension, 0)
        for _ in range(k - 1):
            difference = (1 - p) * difference[0] + p * difference[1]
        effects[unit] = difference
    return effects


def _doubled(network: PlantedNetwork) -> PlantedNetwork:
    """A copy in float64; the given network stays as it is."""
    copy = PlantedNetwork(
        network.main, network.pairs, network.strength, centre=network.centre,
        hidden=(network.inner, network.outer), bias=network.bias,
    )  # fmt: skip
    return copy.double()
