"""Planted networks: networks whose causal effects are known, so that estimates can be compared with the truth."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ce_plugin.effects import MediationEffects, Outcome, resolve_outcome
from ce_plugin.errors import ArgumentError, UnitError, expected, unknown_name
from ce_plugin.networks.forward import double
from ce_plugin.randomness import generator

__all__ = [
    "PlantedInteraction",
    "PlantedMediation",
    "PlantedNetwork",
    "expected_effects",
    "mediation_truth",
]


# 2^16 evaluations take milliseconds; each further unit doubles them.
_MOST_UNITS = 16


class PlantedNetwork(nn.Module):
    """A network with planted main effects, interactions and hidden units.

        z(x) = bias + (x - centre) main + sum_{(u, v)} (x_u - centre) (x_v - centre) strength_uv + relu((x - 1/2) W) V

    If x_u is 1 when idle and 0 under ``do``, which has probability p, a ``centre`` of 1 - p makes interactions without
    main effects: a network with ``main`` zero is then a null case with interactions only.

    Args:
        main: (U, C).
        pairs: unit indices of the interactions.
        strength: (P, C), one row for each pair.
        centre: subtracted from the inputs.
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

    All assignments of the active units are enumerated in float64. p = 0 is the effect with all others idle
    (OneAtATime), p = 1 that with all others set (LeaveOneIn).

    Args:
        network: with at most 16 active units.
        p: in [0, 1].
        outcome: what is measured; None is the logit.

    Returns:
        (U, C).

    Raises:
        ArgumentError: too many active units, or p outside [0, 1].

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
    """A copy in float64; the network itself is not changed."""
    copy = PlantedNetwork(
        network.main, network.pairs, network.strength, centre=network.centre,
        hidden=(network.inner, network.outer), bias=network.bias,
    )  # fmt: skip
    return copy.cpu().double()


class PlantedMediation(nn.Module):
    """A network with a hidden layer ``mediator`` of K channels, a bypass around it, and interactions of known size.

        Y(x) = bias + m main + sum_{(k, l)} m_k m_l strength_kl + d(x) + b(x) (m gate)

    with M = relu(conv(x)) the mediator's value, (N, K, S, S), m_k = sum_s readout_k(s) M_k(s), and d and b linear in x:
    total, indirect and direct effect and their interaction all differ, for channels and for sets of channels. Weights
    are drawn from ``seed``, never from the global random state.

    Args:
        channels: K, at least 2.
        classes: C.
        in_channels: of the input, (N, in_channels, size, size).
        size: S.
        bypass: False makes the layer a cut: d = b = 0, and everything passes through it.
        seed: of the weights.

    Raises:
        ArgumentError: a number below 1, or fewer than two channels.

    Example:
        >>> import torch
        >>> network = PlantedMediation(channels=4, classes=3)
        >>> x = torch.rand(2, 2, 4, 4)
        >>> network.mediator(x).shape, network(x).shape
        (torch.Size([2, 4, 4, 4]), torch.Size([2, 3]))
    """

    readout: Tensor
    main: Tensor
    strength: Tensor
    around: Tensor
    lever: Tensor
    gate: Tensor
    bias: Tensor

    def __init__(
        self,
        channels: int = 6,
        classes: int = 3,
        *,
        in_channels: int = 2,
        size: int = 4,
        bypass: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(channels - 1, classes, in_channels, size) < 1:
            got = (channels, classes, in_channels, size)
            raise ArgumentError(expected("channels, classes, in_channels, size", "at least 2, 1, 1 and 1", got))
        stream = generator(seed, "planted mediation")
        pixels, on = in_channels * size**2, float(bypass)
        self.bypass = bypass
        self.pairs = tuple((k, k + 1) for k in range(0, channels - 1, 2))
        weight = torch.randn(channels, in_channels, generator=stream)
        # Positive biases, so that few channels are dead.
        bias = torch.randn(channels, generator=stream).abs() + 0.5
        self.mediator = nn.Sequential(_convolution(weight, bias), nn.ReLU())
        for name, shape, scale in (
            ("readout", (channels, size, size), 1 / size),
            ("main", (channels, classes), 1.0),
            ("strength", (len(self.pairs), classes), 0.5),
            ("around", (pixels, classes), on / size),
            ("lever", (pixels, 1), on / size),
            ("gate", (channels, classes), 0.5),
            ("bias", (classes,), 1.0),
        ):
            self.register_buffer(name, scale * torch.randn(*shape, generator=stream))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C) of images (N, in_channels, size, size)."""
        m, flat = (self.mediator(x) * self.readout).flatten(2).sum(dim=2), x.flatten(1)
        first, second = (list(side) for side in zip(*self.pairs, strict=True))
        within = m @ self.main + (m[:, first] * m[:, second]) @ self.strength
        out: Tensor = self.bias + within + flat @ self.around + (flat @ self.lever) * (m @ self.gate)
        return out


def mediation_truth(
    network: PlantedMediation, clean: Tensor, intervened: Tensor, sets: Sequence[Sequence[int]] | None = None
) -> MediationEffects:
    """The mediation through sets of the layer's channels, in closed form and float64.

    With D m_k and D b, D d the changes from x to x', and S the set:

        NIE = sum_S D m_k (main_k + b gate_k) + the pairs' change by the channels in S
        interaction = D b sum_S D m_k gate_k + sum over pairs with one channel in S of strength D m_k D m_l
        NDE = TE - NIE - interaction

    Args:
        network: in any precision; it is not changed.
        clean: x, (N, in_channels, size, size).
        intervened: x', of the same shape.
        sets: channel indices of each set; None means each channel by itself.

    Returns:
        Total (N, C), indirect, direct and interaction (N, U, C).

    Raises:
        UnitError: a channel that does not exist, or is twice in a set.

    Example:
        >>> import torch
        >>> network = PlantedMediation(bypass=False)
        >>> x = torch.rand(1, 2, 4, 4)
        >>> truth = mediation_truth(network, x, 1 - x, [range(6)])
        >>> torch.allclose(truth.indirect[:, 0], truth.total)
        True

    Source: Pearl 2001 (arXiv 1301.2300).
    """
    units = len(network.main)
    chosen = [[k] for k in range(units)] if sets is None else [list(one) for one in sets]
    if any(not one or len(set(one)) != len(one) or not set(one) <= set(range(units)) for one in chosen):
        raise UnitError(expected("sets", f"sets of different channels in range({units})", chosen[:8]))
    net = copy.deepcopy(network).cpu().double()
    with torch.no_grad():
        flat, flat1 = (double(x).flatten(1) for x in (clean, intervened))
        m, m1 = ((net.mediator(double(x)) * net.readout).sum(dim=(2, 3)) for x in (clean, intervened))
        step, lever, lever_step = m1 - m, flat @ net.lever, (flat1 - flat) @ net.lever
        inside = torch.zeros(len(chosen), units, dtype=torch.float64)
        for row, one in zip(inside, chosen, strict=True):
            row[one] = 1.0
        moved = step[:, None] * inside  # (N, U, K): the change that passes through each set
        indirect = _within(net, m, moved) + lever[:, None] * (moved @ net.gate)
        every = _within(net, m, step[:, None])[:, 0]
        total = every + (flat1 - flat) @ net.around
        total = total + (lever + lever_step) * (m1 @ net.gate) - lever * (m @ net.gate)
        first, second = (list(side) for side in zip(*net.pairs, strict=True))
        split = inside[:, first] != inside[:, second]  # pairs with exactly one channel in the set
        both = (step[:, first] * step[:, second])[:, None] * split
        interaction = lever_step[:, None] * (moved @ net.gate) + both @ net.strength
    return MediationEffects(total, indirect, total[:, None] - indirect - interaction, interaction)


class PlantedInteraction(nn.Module):
    """A network whose layer ``layer`` has two channels that do nothing alone and ``strength`` together.

        Y_0(x) = h(z) + strength g(1 - z_u, 1 - z_v),   z_k = mean over space of channel k

    On every input z_u = z_v = 1, and zeroing one of the channels (``ZeroOut``) makes its z 0: g is 0 if at least one
    of them is intact and 1 if both are zeroed. The other channels have effects h: linear ones and those of ``hidden``
    units, whose interactions are much smaller and serve as distractors. Class 1 does not depend on the pair.

    Args:
        n_units: channels of the layer, at least 3.
        pair: (u, v), the planted pair.
        strength: its interaction.
        gate: "product" (1 - z_u) (1 - z_v), or "relu" relu(1 - z_u - z_v), whose slope at either single flip is 0.
        hidden: number of hidden units that interact a little; with 0 the planted interaction is the only one.
        size: height and width of the input, (N, 1, size, size).
        seed: of the weights.

    Raises:
        UnitError: a pair of channels that do not exist.
        UnknownNameError: an unknown gate.

    Example:
        >>> import torch
        >>> network = PlantedInteraction(n_units=5, pair=(1, 3), hidden=0)
        >>> h = network.layer(torch.rand(1, 1, 4, 4))
        >>> keep = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 0, 1], [1, 0, 1, 0, 1]])
        >>> y = network.head(h * keep[:, :, None, None])[:, 0]
        >>> (y - y[0]).round().abs().tolist()
        [0.0, 0.0, 0.0, 2.0]
    """

    main: Tensor
    inner: Tensor
    outer: Tensor

    def __init__(
        self,
        n_units: int = 200,
        pair: tuple[int, int] = (17, 143),
        strength: float = -2.0,
        *,
        gate: str = "product",
        hidden: int = 16,
        size: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if n_units < 3 or len(set(pair)) != 2 or not set(pair) <= set(range(n_units)):
            raise UnitError(expected("pair", f"two different channels in range({n_units}), of three or more", pair))
        if gate not in ("product", "relu"):
            raise unknown_name("gate", gate, ("product", "relu"))
        stream = generator(seed, "planted interaction")
        self.pair, self.strength, self.gate = tuple(pair), strength, gate
        others = torch.ones(n_units)
        others[list(pair)] = 0.0
        weight = torch.randn(n_units, 1, generator=stream) * others[:, None]
        bias = torch.randn(n_units, generator=stream).abs() * others + (1 - others)
        self.layer = nn.Sequential(_convolution(weight, bias), nn.ReLU())
        self.register_buffer("main", torch.randn(n_units, 2, generator=stream) * others[:, None])
        inner = torch.randn(n_units, hidden, generator=stream) * (4 / n_units) ** 0.5
        self.register_buffer("inner", inner * others[:, None])
        self.register_buffer("outer", 0.2 * torch.randn(hidden, 2, generator=stream))

    def head(self, h: Tensor) -> Tensor:
        """Logits (N, 2) of the layer's value, (N, n_units, size, size)."""
        z = h.mean(dim=(2, 3))
        u, v = (1 - z[:, k] for k in self.pair)
        planted = u * v if self.gate == "product" else (u + v - 1).relu()
        known = torch.stack([self.strength * planted, torch.zeros_like(planted)], dim=1)
        return known + z @ self.main + (z @ self.inner).relu() @ self.outer

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 2) of images (N, 1, size, size)."""
        return self.head(self.layer(x))


def _convolution(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A 1 x 1 convolution with these weights, (outputs, inputs); made on "meta", so that it draws no random numbers."""
    layer = nn.Conv2d(weight.shape[1], len(weight), 1, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight[:, :, None, None]), nn.Parameter(bias)
    return layer


def _within(net: PlantedMediation, m: Tensor, moved: Tensor) -> Tensor:
    """Change of the mediator's own term, (N, U, C), when the channels' readouts (N, K) change by (N, U, K)."""
    first, second = (list(side) for side in zip(*net.pairs, strict=True))
    near, far = m[:, None, first], m[:, None, second]
    change = moved[..., first] * far + near * moved[..., second] + moved[..., first] * moved[..., second]
    return moved @ net.main + change @ net.strength
