"""do(domain = M): the picture as it would be in another domain, blended with a piece of a photograph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.interventions.base import Context, Intervention, Normalization, NormalizationLike


class Blend(Intervention):
    """do(domain = M): x' is the absolute difference of the picture and a patch of a photograph, as in MNIST-M.

        x' = |p - x|,   p a patch of x's size, at a random place of a random photograph

    What was black becomes the photograph, what was white its negative. The patch is drawn from (seed, id): the same
    digit can be set into the other domain by itself, and a whole data set is made by one call, with an id for each
    picture. Digits in grey are repeated over three channels first: ``digits.expand(-1, 3, -1, -1)``.

    Args:
        photographs: (C, H, W) each, or one tensor (P, C, H, W), at least as large as the pictures; bytes, or floats in
            [0, 1]. C is that of the pictures, or 1.
        normalization: (mean, std) of ``model units = (image - mean) / std`` for images in [0, 1]; None where the
            two are the same.

    Raises:
        ArgumentError: no photograph, or one of another form.
        InputError: at the run, inputs that are not images (N, C, H, W), or larger than a photograph.

    Example:
        >>> do_domain = Blend(torch.full((1, 3, 40, 40), 204, dtype=torch.uint8))
        >>> digit = torch.zeros(1, 3, 28, 28)
        >>> digit[..., 14] = 1
        >>> [round(v, 2) for v in do_domain(digit, ids=[7])[0, 0, 0, 13:16].tolist()]
        [0.8, 0.2, 0.8]

    Source: Ganin et al. 2016 (arXiv 1505.07818), section 5.2.4 (MNIST-M, whose photographs are those of BSDS500).
    """

    def __init__(self, photographs: Tensor | Iterable[Tensor], *, normalization: NormalizationLike = None) -> None:
        self.photographs = tuple(_checked(photograph) for photograph in photographs)
        if not self.photographs:
            raise ArgumentError(expected("photographs", "one or more", "none"))
        self.normalization = Normalization.of(normalization)

    def values(self, clean: Tensor, context: Context) -> Tensor:
        """The pictures in the other domain, (N, C, H, W), in model units."""
        if clean.dim() != 4 or not clean.is_floating_point():
            raise InputError(expected("inputs", "float images (N, C, H, W)", f"{clean.dtype}, {tuple(clean.shape)}"))
        patches = [self._patch(context.generator(i, "blend"), clean) for i in range(len(clean))]
        image = self.normalization.to_image(clean)
        return self.normalization.to_model((torch.stack(patches) - image).abs()) if patches else clean.clone()

    def _patch(self, draw: torch.Generator, clean: Tensor) -> Tensor:
        """A patch of the pictures' shape, from any photograph and place with equal probability."""
        channels, height, width = clean.shape[1:]
        where = torch.rand(3, generator=draw, dtype=torch.float64)
        photograph = self.photographs[int(where[0] * len(self.photographs))]
        rows, columns = photograph.shape[1] - height + 1, photograph.shape[2] - width + 1
        if rows < 1 or columns < 1 or photograph.shape[0] not in (1, channels):
            hint = "Repeat grey pictures: x.expand(-1, 3, -1, -1)." if channels == 1 else ""
            wanted = f"images that a photograph {tuple(photograph.shape)} can cover"
            raise InputError(expected("inputs", wanted, f"shape {tuple(clean.shape)}", hint))
        top, left = int(where[1] * rows), int(where[2] * columns)
        patch = photograph[:, top : top + height, left : left + width].expand(channels, -1, -1).to(clean)
        return patch if photograph.is_floating_point() else patch / 255.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.photographs)} photographs)"


def _checked(photograph: Tensor) -> Tensor:
    wanted, given = "bytes (C, H, W) with one or three channels, or floats in [0, 1]", photograph
    if not isinstance(given, Tensor) or given.dim() != 3 or given.shape[0] not in (1, 3) or not given.numel():
        got = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ArgumentError(expected("photographs", wanted, got))
    low, high = (float(end) for end in given.aminmax())
    if given.dtype != torch.uint8 and not (given.is_floating_point() and low >= 0 and high <= 1):
        raise ArgumentError(expected("photographs", wanted, f"{given.dtype}, {low:g} to {high:g}"))
    return given
