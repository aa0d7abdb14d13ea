"""Smoothing: the counterfactual input is the image as a filter leaves it, x' = s(x)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.interventions import filters
from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.interventions.jpeg import jpeg
from ce_plugin.interventions.normalization import Normalization, NormalizationLike
from ce_plugin.interventions.smooth_steps import POINTWISE, Step, checked_step

__all__ = ["Smooth"]

Range = tuple[float, float]


class Smooth(Intervention):
    """Smoothing: x' is the image as a filter leaves it, x' = s(x), pixel by pixel and channel by channel.

    What a person sees stays; what an attack put there, and a classifier relies on, may not. Made by the class methods,
    each of which is one filter, and :meth:`chain`, which applies several in turn. Parameters are in *image units*.

    x' has a gradient with respect to x. Roundings (:meth:`bits`, :meth:`jpeg`) pass it straight through, so that an
    attacker is not kept out by a step function.

    Args:
        steps: filters in the order in which they are applied, each a tuple (name of the class method, its parameters);
            lists, as they come out of a JSON file, will do.
        normalization: pair ``(mean, std)`` saying what was done to the image before the model:
            ``model = (image - mean) / std``. None: model and image units are the same.
        value_range: least and greatest value of an image, in image units; ``(0, 255)`` for images in bytes.

    Attributes:
        steps: as given.

    Raises:
        UnknownNameError: a filter of unknown name.
        ArgumentError: a parameter that is missing or out of range, no step at all, or an empty range of values.

    Example:
        >>> x = torch.tensor([[[[0.0, 0.1, 0.2], [0.3, 0.9, 0.5], [0.6, 0.7, 0.8]]]])
        >>> Smooth.bits(1)(x).flatten().tolist()
        [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]
        >>> Smooth.median(3)(x)[0, 0, 1, 1].item()
        0.5
        >>> smooth = Smooth.chain(Smooth.gauss(1.0), Smooth.bits(1))
        >>> smooth
        Smooth.chain(Smooth.gauss(1.0), Smooth.bits(1))
        >>> bool((Smooth(smooth.steps)(x) == Smooth.bits(1)(Smooth.gauss(1.0)(x))).all())
        True

    Source: Xu, Evans, Qi, NDSS 2018 (arXiv 1704.01155): feature squeezing by bit depth, median and smoothing. The
    gradient through roundings: Athalye, Carlini, Wagner, ICML 2018 (arXiv 1802.00420), section 4.1.
    """

    def __init__(
        self,
        steps: Sequence[Sequence[str | float]],
        *,
        normalization: NormalizationLike = None,
        value_range: Range = (0.0, 1.0),
    ) -> None:
        if isinstance(steps, str) or not len(steps):
            wanted = "a sequence of steps such as [('gauss', 1.0), ('bits', 1)]"
            raise ArgumentError(expected("steps", wanted, repr(steps), "One filter is `Smooth.gauss(1.0)`."))
        self.steps = tuple(checked_step(step) for step in steps)
        low, high = value_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ArgumentError(expected("value_range", "a pair (least, greatest) with least < greatest", value_range))
        self.value_range = (float(low), float(high))
        self.normalization = Normalization.of(normalization)

    @classmethod
    def bits(cls, depth: int, *, normalization: NormalizationLike = None, value_range: Range = (0.0, 1.0)) -> Smooth:
        """The nearest of ``2 ** depth`` equally spaced values; the gradient goes straight through."""
        return cls([("bits", depth)], normalization=normalization, value_range=value_range)

    @classmethod
    def median(cls, size: int, *, normalization: NormalizationLike = None, value_range: Range = (0.0, 1.0)) -> Smooth:
        """Median over windows of ``size`` x ``size`` pixels, mirrored at the edge.

        An even window reaches one pixel farther up and left, and takes the upper of its two middle values.
        """
        return cls([("median", size)], normalization=normalization, value_range=value_range)

    @classmethod
    def mean(cls, size: int, *, normalization: NormalizationLike = None, value_range: Range = (0.0, 1.0)) -> Smooth:
        """Mean over windows of ``size`` x ``size`` pixels, mirrored at the edge."""
        return cls([("mean", size)], normalization=normalization, value_range=value_range)

    @classmethod
    def gauss(cls, sigma: float, *, normalization: NormalizationLike = None, value_range: Range = (0.0, 1.0)) -> Smooth:
        """Gaussian blur of ``sigma`` pixels, cut off at four sigma, mirrored at the edge."""
        return cls([("gauss", sigma)], normalization=normalization, value_range=value_range)

    @classmethod
    def jpeg(cls, quality: int, *, normalization: NormalizationLike = None, value_range: Range = (0.0, 1.0)) -> Smooth:
        """Stored as baseline JPEG (standard tables, no subsampling) and read again; the gradient goes straight through.

        Three channels are coded as a colour picture, any other number as so many grey ones. What lies outside the range
        of values is clipped.
        """
        return cls([("jpeg", quality)], normalization=normalization, value_range=value_range)

    @classmethod
    def soft_threshold(
        cls, threshold: float, *, normalization: NormalizationLike = None, value_range: Range = (0.0, 1.0)
    ) -> Smooth:
        """Every value ``threshold`` nearer to the least value of the range; what is as near as that becomes it."""
        return cls([("soft_threshold", threshold)], normalization=normalization, value_range=value_range)

    @classmethod
    def clip(
        cls, low: float, high: float, *, normalization: NormalizationLike = None, value_range: Range = (0.0, 1.0)
    ) -> Smooth:
        """Values below ``low`` become ``low``, values above ``high`` become ``high``."""
        return cls([("clip", low, high)], normalization=normalization, value_range=value_range)

    @classmethod
    def stretch(
        cls, low: float, high: float, *, normalization: NormalizationLike = None, value_range: Range = (0.0, 1.0)
    ) -> Smooth:
        """Contrast: ``low`` and ``high`` move to the ends of the range; what lies beyond them is cut off."""
        return cls([("stretch", low, high)], normalization=normalization, value_range=value_range)

    @classmethod
    def scale(
        cls, factor: float, *, normalization: NormalizationLike = None, value_range: Range = (0.0, 1.0)
    ) -> Smooth:
        """Contrast: every value's distance from the least of the range times ``factor``."""
        return cls([("scale", factor)], normalization=normalization, value_range=value_range)

    @classmethod
    def shift(
        cls, dx: int, dy: int, *, normalization: NormalizationLike = None, value_range: Range = (0.0, 1.0)
    ) -> Smooth:
        """Moved ``dx`` pixels to the right and ``dy`` down; the pixels at the edge fill what is left behind."""
        return cls([("shift", dx, dy)], normalization=normalization, value_range=value_range)

    @classmethod
    def tv(
        cls,
        weight: float,
        n_iter: int = 30,
        *,
        normalization: NormalizationLike = None,
        value_range: Range = (0.0, 1.0),
    ) -> Smooth:
        r"""Total-variation denoising: ``n_iter`` steps down 1/2 \|u - x\|^2 + weight * TV(u), none of which raises it.

        TV(u) is the sum of sqrt(\|grad u\|^2 + (range / 100)^2) over the pixels of a channel. Source: Rudin, Osher,
        Fatemi 1992; the steps are those of Chan, Osher, Shen 2001.
        """
        return cls([("tv", weight, n_iter)], normalization=normalization, value_range=value_range)

    @classmethod
    def noise(cls, sigma: float, *, normalization: NormalizationLike = None, value_range: Range = (0.0, 1.0)) -> Smooth:
        """Gaussian noise of standard deviation ``sigma`` added, from (seed, id); not clipped to the range of values."""
        return cls([("noise", sigma)], normalization=normalization, value_range=value_range)

    @classmethod
    def chain(cls, *parts: Smooth) -> Smooth:
        """Several smoothings in turn, the first one first; all of one normalisation and range of values."""
        if not parts:
            raise ArgumentError(expected("parts", "at least one smoothing", "none"))
        first = parts[0]
        for part in parts[1:]:
            if (part.normalization, part.value_range) != (first.normalization, first.value_range):
                got = f"{first!r} and {part!r}"
                raise ArgumentError(expected("parts", "of one normalization and value_range", got))
        steps = [step for part in parts for step in part.steps]
        return cls(steps, normalization=first.normalization, value_range=first.value_range)

    def values(self, clean: Tensor, context: Context) -> Tensor:
        """x' for the whole input.

        Args:
            clean: (N, C, H, W), model units; (N, ...) where each step looks at one value at a time. Half precision is
                worked on in single.
            context: ids and seed, for :meth:`noise`.

        Returns:
            A tensor like ``clean``.

        Raises:
            InputError: integers, or no images where a step needs them.
        """
        if not clean.is_floating_point():
            raise InputError(expected("inputs", "of a floating type", clean.dtype, "Write `x.float()`."))
        if clean.dim() != 4 and any(step[0] not in POINTWISE for step in self.steps):
            raise InputError(expected("inputs", f"images (N, C, H, W) for {self!r}", f"shape {tuple(clean.shape)}"))
        if not clean.numel():
            return clean
        exact = clean if clean.dtype in (torch.float32, torch.float64) else clean.float()
        image = self.normalization.to_image(exact)
        for place, step in enumerate(self.steps):
            image = self._filtered(image, step, context, place)
        return self.normalization.to_model(image).to(clean.dtype)

    def _filtered(self, image: Tensor, step: Step, context: Context, place: int) -> Tensor:
        kind = step[0]
        a, b = (*(float(value) for value in step[1:]), 0.0)[:2]
        low, high = self.value_range
        filtered: dict[str, Callable[[], Tensor]] = {
            "bits": lambda: filters.quantised(image, int(a), low, high),
            "median": lambda: filters.median(image, int(a)),
            "mean": lambda: filters.box_mean(image, int(a)),
            "gauss": lambda: filters.gaussian(image, a),
            "jpeg": lambda: jpeg(image, int(a), low, high),
            "soft_threshold": lambda: filters.soft_threshold(image, a, low),
            "clip": lambda: image.clamp(a, b),
            "stretch": lambda: ((image - a) * ((high - low) / (b - a)) + low).clamp(low, high),
            "scale": lambda: (image - low) * a + low,
            "shift": lambda: filters.translated(image, int(a), int(b)),
            "tv": lambda: filters.total_variation(image, a, int(b), high - low),
            "noise": lambda: image + a * _noise(image, context, place),
        }
        return filtered[str(kind)]()

    def __repr__(self) -> str:
        parts = [f"Smooth.{step[0]}({', '.join(map(repr, step[1:]))})" for step in self.steps]
        units = []
        if not self.normalization.is_identity:
            units.append(f"normalization=({self.normalization.mean}, {self.normalization.std})")
        if self.value_range != (0.0, 1.0):
            units.append(f"value_range={self.value_range}")
        parts = [", ".join([part[:-1], *units]) + ")" for part in parts]
        return parts[0] if len(parts) == 1 else f"Smooth.chain({', '.join(parts)})"


def _noise(image: Tensor, context: Context, place: int) -> Tensor:
    """Standard normal numbers of each example's own generator; a second noise in a chain has others."""
    stream = f"smooth{place}"
    draws = [torch.randn(image.shape[1:], generator=context.generator(i, stream)) for i in range(len(image))]
    return torch.stack(draws).to(image)
