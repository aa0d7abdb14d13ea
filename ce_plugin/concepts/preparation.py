"""Before the first step: the scale of each channel, and weights close to the goal."""

from __future__ import annotations

import torch
from torch import Tensor

from ce_plugin.concepts.model import ConceptAutoencoder
from ce_plugin.concepts.recorded import Recorded
from ce_plugin.concepts.settings import Settings
from ce_plugin.concepts.start import start_linear
from ce_plugin.randomness import generator

__all__ = ["Part", "deviation", "prepared"]

_POSITIONS = 20_000
# (recorded images, which of them)
Part = tuple[Recorded, list[int]]


def prepared(fit: Part, settings: Settings) -> ConceptAutoencoder:
    """An untrained autoencoder that knows the mean and scale of each channel."""
    recorded, rows = fit
    autoencoder = ConceptAutoencoder(
        recorded.shape[0], settings.concepts, settings.hidden, settings.kernel_size, seed=settings.seed
    )
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    example = recorded.batch(rows[:1]).activations
    for start in range(0, len(rows), settings.batch_size):
        h = recorded.batch(rows[start : start + settings.batch_size]).activations.double()
        count += h[:, 0].numel()
        total, square = total + h.sum((0, 2, 3)).cpu(), square + h.square().sum((0, 2, 3)).cpu()
    mean = total / count
    spread = (square / count - mean.square()).clamp_min(0).sqrt()
    # A channel that hardly varies is not blown up to the size of the others.
    floor = max(1e-3 * float(spread.square().mean().sqrt()), torch.finfo(example.dtype).tiny)
    autoencoder.to(example.device, example.dtype).standardize(mean.to(example), spread.clamp_min(floor).to(example))
    start_linear(autoencoder, _positions(fit, settings))
    return autoencoder


def _positions(fit: Part, settings: Settings) -> Tensor:
    """Activations at random positions, about ``_POSITIONS`` of them, (n, C)."""
    recorded, rows = fit
    draw = generator(settings.seed, "positions")
    each = -(-_POSITIONS // len(rows))
    found = []
    for start in range(0, len(rows), settings.batch_size):
        h = recorded.batch(rows[start : start + settings.batch_size]).activations.flatten(2).double().cpu()
        picks = torch.rand(len(h), h.shape[2], generator=draw).argsort(1)[:, :each]
        found.append(torch.gather(h, 2, picks[:, None].expand(-1, h.shape[1], -1)).transpose(1, 2).flatten(0, 1))
    return torch.cat(found)


def deviation(fit: Part, autoencoder: ConceptAutoencoder) -> float:
    """The layer's mean absolute deviation from its channels' means."""
    recorded, rows = fit
    mean = autoencoder.get_buffer("encoder.standardize.mean")
    total = 0.0
    for start in range(0, len(rows), 64):
        h = recorded.batch(rows[start : start + 64]).activations
        total += float((h - mean).abs().double().mean()) * len(h)
    return total / len(rows) or 1.0
