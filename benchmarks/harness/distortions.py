"""Harmless distortions, which a detector of attacks should not flag."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ce_plugin.errors import ArgumentError, InputError, expected, unknown_name
from ce_plugin.randomness import numpy_generator

__all__ = ["DISTORTIONS", "distorted"]

Array = npt.NDArray[Any]


def distorted(images: Array, kind: str, seed: int = 0, *, size: float = 0.1) -> npt.NDArray[np.float32]:
    """Images with a harmless distortion, as from a poor camera or careless processing, rounded to eight bits.

    Random numbers of each image depend on (seed, kind, index).

    Args:
        images: (N, C, H, W), float32 in [0, 1].
        kind: ``"gauss"``, normal noise of standard deviation ``size``; ``"sign"``, each value up or down by ``size``
            with equal probability, which has the norm of FGSM with that eps; ``"shift"``, moved by 1 or 2 pixels along
            both axes, the border repeated; ``"contrast"``, 0.8 of the distance to the image's mean; ``"jpeg"``, of
            quality 75.
        seed: seed of the random numbers.
        size: size of the noise, in image units: 0.1 on pictures of 28 x 28, 8 / 255 on photographs.

    Returns:
        Images of the same shape, float32, multiples of 1/255 in [0, 1].

    Raises:
        UnknownNameError: an unknown kind.
        ArgumentError: ``size`` outside (0, 1].
        InputError: the images have another shape or range; JPEG needs 1 or 3 channels.

    Example:
        >>> x = np.full((1, 1, 4, 4), 0.6, np.float32)
        >>> round(float(abs(distorted(x, "sign") - x).max()), 3)
        0.102
    """
    if kind not in DISTORTIONS:
        raise unknown_name("kind", kind, DISTORTIONS)
    if not 0 < size <= 1:
        raise ArgumentError(expected("size", "a float in (0, 1]", size))
    if images.ndim != 4 or not np.issubdtype(images.dtype, np.floating):
        wanted = "floats of shape (N, C, H, W)"
        raise InputError(expected("images", wanted, f"{images.dtype} of shape {images.shape}"))
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        raise InputError(expected("images", "values in [0, 1]", f"[{images.min():g}, {images.max():g}]"))
    made = np.empty(images.shape, dtype=np.float32)
    for row, image in enumerate(images):
        made[row] = DISTORTIONS[kind](image.astype(np.float64), numpy_generator(seed, kind, row), size)
    rounded: npt.NDArray[np.float32] = np.rint(made.clip(0, 1) * np.float32(255)) / np.float32(255)
    return rounded


def _gauss(image: Array, draw: np.random.Generator, size: float) -> Array:
    return np.asarray(image + size * draw.standard_normal(image.shape))


def _sign(image: Array, draw: np.random.Generator, size: float) -> Array:
    return np.asarray(image + size * draw.choice((-1.0, 1.0), image.shape))


def _shift(image: Array, draw: np.random.Generator, size: float) -> Array:
    down, right = draw.choice((-2, -1, 1, 2), 2)
    height, width = image.shape[1:]
    rows = (np.arange(height) - down).clip(0, height - 1)
    columns = (np.arange(width) - right).clip(0, width - 1)
    return image[:, rows][:, :, columns]


def _contrast(image: Array, draw: np.random.Generator, size: float) -> Array:
    return np.asarray(image.mean() + 0.8 * (image - image.mean()))


def _jpeg(image: Array, draw: np.random.Generator, size: float) -> Array:
    from PIL import Image

    if len(image) not in (1, 3):
        raise InputError(expected("images", "of 1 or 3 channels for JPEG", f"{len(image)} channels"))
    pixels = np.rint(image * 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels[0] if len(image) == 1 else pixels.transpose(1, 2, 0)).save(stream, "JPEG", quality=75)
    with Image.open(stream) as picture:
        read = np.asarray(picture, dtype=np.float64) / 255
    return read[None] if len(image) == 1 else read.transpose(2, 0, 1)


DISTORTIONS: dict[str, Callable[[Array, np.random.Generator, float], Array]] = {
    "gauss": _gauss,
    "sign": _sign,
    "shift": _shift,
    "contrast": _contrast,
    "jpeg": _jpeg,
}
"""The kinds of distortion, in the order of the tables."""
