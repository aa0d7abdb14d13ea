"""What a picture becomes when it is stored as JPEG and read again, in torch and without entropy coding."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ce_plugin.interventions.filters import in_chunks, straight_through

__all__ = ["jpeg", "quantisation_table"]

# Annex K of the standard, tables K.1 (luminance) and K.2 (chrominance): steps at quality 50, rows of frequencies.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)


def quantisation_table(quality: int, chrominance: bool = False) -> tuple[tuple[int, ...], ...]:
    """Quantisation steps of the 8 x 8 frequencies at a quality, scaled as the Independent JPEG Group's library does."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = _CHROMINANCE if chrominance else _LUMINANCE
    return tuple(tuple(min(max((step * scale + 50) // 100, 1), 255) for step in row) for row in base)


def jpeg(images: Tensor, quality: int, low: float, high: float) -> Tensor:
    """Baseline JPEG without subsampling (4:4:4) of images (N, C, H, W): the gradient passes straight through.

    Three channels are red, green and blue, and coded as luminance and two chrominances; channels of any other number
    are coded as so many grey pictures.
    """
    with torch.no_grad():
        stored = ((images - low) / (high - low) * 255).round().clamp(0, 255)
        read = in_chunks(lambda part: _stored(part, quality), stored) / 255 * (high - low) + low
    # Without its roundings the whole is the identity, and so is its gradient.
    return straight_through(read, images)


def _stored(pixels: Tensor, quality: int) -> Tensor:
    """Pixels in 0 ... 255 as they are read again."""
    colour = pixels.shape[1] == 3
    height, width = pixels.shape[-2:]
    planes = (_luminance_and_chrominance(pixels) if colour else pixels) - 128
    for dim, size in ((-2, height), (-1, width)):
        if size % 8:
            last = planes.narrow(dim, size - 1, 1)
            planes = torch.cat([planes, *[last] * (8 - size % 8)], dim)
    tables = [quantisation_table(quality, chrominance=colour and channel > 0) for channel in range(pixels.shape[1])]
    steps = torch.tensor(tables, dtype=pixels.dtype, device=pixels.device).permute(1, 2, 0)[:, :, None, :, None, None]
    # (8, 8, N, C, blocks down, blocks across): so that sums over a block run over whole tensors.
    down, across = planes.shape[-2] // 8, planes.shape[-1] // 8
    blocks = planes.reshape(*planes.shape[:2], down, 8, across, 8).permute(3, 5, 0, 1, 2, 4).contiguous()
    coded = _transformed(_transformed(blocks).transpose(0, 1)).transpose(0, 1)
    # Libraries compute frequencies to eighths, so that many of them come to lie half-way between two steps.
    coded = _rounded((coded * 8).round() / 8 / steps) * steps
    blocks = _restored(_restored(coded).transpose(0, 1)).transpose(0, 1)
    planes = blocks.permute(2, 3, 4, 0, 5, 1).flatten(-2).flatten(-3, -2)[..., :height, :width]
    planes = (planes + 128).round().clamp(0, 255)
    return _red_green_blue(planes) if colour else planes


def _rounded(numbers: Tensor) -> Tensor:
    """To the nearest whole number, halves away from 0."""
    return torch.trunc(numbers + torch.copysign(torch.full_like(numbers, 0.5), numbers))


def _luminance_and_chrominance(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.unbind(1)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([luminance, (blue - luminance) / 1.772 + 128, (red - luminance) / 1.402 + 128], 1).round()


def _red_green_blue(planes: Tensor) -> Tensor:
    luminance, blueness, redness = planes.unbind(1)
    blueness, redness = blueness - 128, redness - 128
    red = luminance + 1.402 * redness
    green = luminance - (0.114 * 1.772 * blueness + 0.299 * 1.402 * redness) / 0.587
    return torch.stack([red, green, luminance + 1.772 * blueness], 1).round().clamp(0, 255)


@functools.cache
def _cosines(parity: int) -> tuple[tuple[float, ...], ...]:
    """Element [k][j]: share of sample j < 4 (or of its mirror image) in frequency 2 k + parity; orthonormal."""
    return tuple(
        tuple(
            (math.sqrt(0.125) if frequency == 0 else 0.5) * math.cos((2 * j + 1) * frequency * math.pi / 16)
            for j in range(4)
        )
        for frequency in range(parity, 8, 2)
    )


def _combined(parts: Tensor, shares: tuple[tuple[float, ...], ...]) -> Tensor:
    """Sums of four parts (4, ...), one sum for each row of shares; element by element, in one order always."""
    column = torch.tensor(shares, dtype=parts.dtype, device=parts.device).reshape(4, 4, *[1] * (parts.dim() - 1))
    total = column[:, 0] * parts[0]
    for j in range(1, 4):
        total = total + column[:, j] * parts[j]
    return total


def _transformed(samples: Tensor) -> Tensor:
    """Discrete cosine transform along the first dimension (of 8): even and odd frequencies from half as many sums."""
    first, last = samples[:4], samples[4:].flip(0)
    even, odd = _combined(first + last, _cosines(0)), _combined(first - last, _cosines(1))
    return torch.stack([even, odd], 1).flatten(0, 1)


def _restored(frequencies: Tensor) -> Tensor:
    """The inverse of the transform."""
    even = _combined(frequencies[0::2], tuple(zip(*_cosines(0), strict=True)))
    odd = _combined(frequencies[1::2], tuple(zip(*_cosines(1), strict=True)))
    return torch.cat([even + odd, (even - odd).flip(0)])
