"""Before the first step: the scale of each channel, the unit of the shallow term, and weights close to the goal."""

from __future__ import annotations

import torch
from torch import Tensor

from ce_plugin.concepts.model import ConceptAutoencoder
from ce_plugin.concepts.recorded import Recorded
from ce_plugin.concepts.settings import Settings
from ce_plugin.concepts.start import start_linear
from ce_plugin.randomness import generator

__all__ = ["Part", "prepared"]

# Activations at about so many positions are enough for the components, and fit into memory.
_POSITIONS = 20_000
# (recorded images, which of them)
Part = tuple[Recorded, list[int]]


def prepared(fit: Part, settings: Settings) -> tuple[ConceptAutoencoder, float]:
    """An autoencoder before its first step, and the layer's mean absolute deviation from its channels' means."""
    recorded, rows = fit
    mean, spread, positions = _moments(fit, settings)
    example = recorded.batch(rows[:1]).activations
    size = float(spread.square().mean().sqrt())
    # A channel that hardly varies is not blown up to the size of the others, nor is rounding noise.
    floor = 1e-3 * size if size > 1e-6 * float(mean.abs().max()) else 1.0
    autoencoder = ConceptAutoencoder(
        len(mean), settings.concepts, settings.hidden, settings.kernel_size, seed=settings.seed
    )
    autoencoder.to(example.device, example.dtype).standardize(mean.to(example), spread.clamp_min(floor).to(example))
    start_linear(autoencoder, positions)
    return autoencoder, float((positions - mean).abs().mean()) or 1.0


def _moments(fit: Part, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """In one pass: mean and standard deviation of each channel, (C,), and activations at random positions, (n, C)."""
    recorded, rows = fit
    draw = generator(settings.seed, "positions")
    each = -(-_POSITIONS // len(rows))
    count, found = 0, []
    total = square = torch.zeros(recorded.shape[0], dtype=torch.float64)
    for start in range(0, len(rows), settings.batch_size):
        h = recorded.batch(rows[start : start + settings.batch_size]).activations.flatten(2).cpu().double()
        count += h[:, 0].numel()
        total, square = total + h.sum((0, 2)), square + h.square().sum((0, 2))
        if len(rows) > _POSITIONS:
            h = h[torch.rand(len(h), generator=draw) < _POSITIONS / len(rows)]
        picks = torch.rand(len(h), h.shape[2], generator=draw).argsort(1)[:, :each]
        found.append(torch.gather(h, 2, picks[:, None].expand(-1, h.shape[1], -1)).transpose(1, 2).flatten(0, 1))
    mean = total / count
    return mean, (square / count - mean.square()).clamp_min(0).sqrt(), torch.cat(found)
