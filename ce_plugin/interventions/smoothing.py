"""Smoothing: the counterfactual input is the filtered image, x' = s(x)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from ce_plugin.errors import ArgumentError, InputError, check_integer, check_number, expected, unknown_name
from ce_plugin.interventions import _filters as filters
from ce_plugin.interventions.base import Context, Intervention, Normalization, NormalizationLike

Step = tuple[Any, ...]
Range = tuple[float, float]


class Units(TypedDict, total=False):
    """The options of every filter; see :class:`Smooth`."""

    normalization: NormalizationLike
    value_range: Range


class _Parameter(NamedTuple):
    """Type and range of a filter's parameter."""

    name: str
    wanted: str
    least: float = -math.inf
    greatest: float = math.inf
    whole: bool = False


class _Filter(NamedTuple):
    """One filter.

    Args:
        apply: the images, least and greatest value of an image, and the filter's parameters to the filtered images.
        parameters: what they may be.
        pointwise: whether it looks at one value at a time, so that inputs need not be images.
    """

    apply: Callable[..., Tensor]
    parameters: tuple[_Parameter, ...]
    pointwise: bool = False


_POSITIVE = math.nextafter(0.0, 1.0)
_SIZE = _Parameter("size", "a whole number of pixels, 1 or more", least=1, whole=True)
_DEPTH = _Parameter("depth", "a whole number of bits from 1 to 16", least=1, greatest=16, whole=True)
_QUALITY = _Parameter("quality", "a whole number from 1 to 100", least=1, greatest=100, whole=True)
_SIGMA = _Parameter("sigma", "a positive number", least=_POSITIVE)
_ENDS = (_Parameter("low", "a number"), _Parameter("high", "a number"))
_OFFSETS = tuple(_Parameter(name, "a whole number of pixels", whole=True) for name in ("dx", "dy"))
_THRESHOLD = _Parameter("threshold", "a number, 0 or more", least=0)
_FACTOR = _Parameter("factor", "a number, 0 or more", least=0)
_WEIGHT = _Parameter("weight", "a positive number", least=_POSITIVE)
_N_ITER = _Parameter("n_iter", "a whole number of steps, 1 or more", least=1, whole=True)


def _stretched(x: Tensor, low: float, high: float, start: float, end: float) -> Tensor:
    return ((x - start) * ((high - low) / (end - start)) + low).clamp(low, high)


_FILTERS = {
    "bits": _Filter(lambda x, low, high, depth: filters.quantised(x, depth, low, high), (_DEPTH,), pointwise=True),
    "median": _Filter(lambda x, low, high, size: filters.median(x, size), (_SIZE,)),
    "mean": _Filter(lambda x, low, high, size: filters.box_mean(x, size), (_SIZE,)),
    "gauss": _Filter(lambda x, low, high, sigma: filters.gaussian(x, sigma), (_SIGMA,)),
    "jpeg": _Filter(lambda x, low, high, quality: filters.jpeg(x, quality, low, high), (_QUALITY,)),
    "soft_threshold": _Filter(lambda x, low, high, t: filters.soft_threshold(x, t, low), (_THRESHOLD,), pointwise=True),
    "clip": _Filter(lambda x, low, high, least, greatest: x.clamp(least, greatest), _ENDS, pointwise=True),
    "stretch": _Filter(_stretched, _ENDS, pointwise=True),
    "scale": _Filter(lambda x, low, high, factor: (x - low) * factor + low, (_FACTOR,), pointwise=True),
    "shift": _Filter(lambda x, low, high, dx, dy: filters.translated(x, dx, dy), _OFFSETS),
    "tv": _Filter(
        lambda x, low, high, weight, n: filters.total_variation(x, weight, n, high - low), (_WEIGHT, _N_ITER)
    ),
    # Its numbers depend on the examples as well: see `Smooth.values`.
    "noise": _Filter(lambda x, low, high, sigma, drawn: x + sigma * drawn, (_SIGMA,), pointwise=True),
}


def _checked_step(step: Sequence[str | float]) -> Step:
    """Check a step from a user or a JSON file, and give its numbers the right type.

    Raises:
        UnknownNameError: a filter of unknown name.
        ArgumentError: a parameter that is missing or out of range.
    """
    given: object = step
    if not isinstance(given, (list, tuple)) or not step or not isinstance(step[0], str):
        raise ArgumentError(expected("steps", "tuples (name, parameters) such as ('gauss', 1.0)", repr(step)))
    kind, numbers = step[0], step[1:]
    if kind not in _FILTERS:
        raise unknown_name("steps", kind, _FILTERS)
    parameters = _FILTERS[kind].parameters
    if len(numbers) != len(parameters):
        names = ", ".join(f"`{parameter.name}`" for parameter in parameters)
        raise ArgumentError(expected("steps", f"{names} after {kind!r}", f"{len(numbers)} parameters"))
    checked = list(map(_checked_value, parameters, numbers))
    if kind in ("clip", "stretch") and not checked[0] < checked[1]:
        raise ArgumentError(expected("high", f"greater than low = {checked[0]}", checked[1]))
    return (kind, *checked)


def _checked_value(parameter: _Parameter, given: str | float) -> int | float:
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    fits = math.isfinite(value) and parameter.least <= value <= parameter.greatest
    if not fits or isinstance(given, (str, bool)) or (parameter.whole and not value.is_integer()):
        raise ArgumentError(expected(parameter.name, parameter.wanted, repr(given)))
    return int(value) if parameter.whole else value


class Smooth(Intervention):
    """Smoothing: x' is the filtered image, x' = s(x).

    It preserves what a person sees, but may remove an adversarial perturbation. Use the class methods, each of which
    makes one filter, and :meth:`chain`, which applies several in turn. Parameters are in *image units*.

    x' has a gradient with respect to x. Rounding (:meth:`bits`, :meth:`jpeg`) passes it straight through, so that
    robustness is not due to a missing gradient.

    Args:
        steps: filters in the order in which they are applied, each a tuple (name of the class method, its parameters);
            lists, as read from JSON, are accepted.
        normalization: pair ``(mean, std)`` saying what was done to the image before the model:
            ``model = (image - mean) / std``. None: model and image units are the same.
        value_range: lowest and highest value of an image, in image units; ``(0, 255)`` for images in bytes.

    Attributes:
        steps: as given.

    Raises:
        UnknownNameError: a filter of unknown name.
        ArgumentError: a parameter is missing or out of range, there are no steps, or the range of values is empty.

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
        given: object = steps
        if not isinstance(given, (list, tuple)) or not steps:
            wanted = "a sequence of steps such as [('gauss', 1.0), ('bits', 1)]"
            raise ArgumentError(expected("steps", wanted, repr(steps), "One filter is `Smooth.gauss(1.0)`."))
        self.steps = tuple(map(_checked_step, steps))
        wanted = "a pair (least, greatest) with least < greatest"
        pair: object = value_range
        if not isinstance(pair, (list, tuple)) or len(value_range) != 2:
            raise ArgumentError(expected("value_range", wanted, repr(value_range)))
        low, high = (check_number("value_range", end, wanted) for end in value_range)
        if not low < high:
            raise ArgumentError(expected("value_range", wanted, value_range))
        self.value_range = (float(low), float(high))
        self.normalization = Normalization.of(normalization)

    @classmethod
    def bits(cls, depth: int, **units: Unpack[Units]) -> Smooth:
        """The nearest of ``2 ** depth`` equally spaced values; the gradient passes straight through."""
        return cls([("bits", depth)], **units)

    @classmethod
    def median(cls, size: int, **units: Unpack[Units]) -> Smooth:
        """Median over windows of ``size`` x ``size`` pixels, with reflected edges.

        An even window extends one pixel further up and left, and takes the upper of its two middle values.
        """
        return cls([("median", size)], **units)

    @classmethod
    def mean(cls, size: int, **units: Unpack[Units]) -> Smooth:
        """Mean over windows of ``size`` x ``size`` pixels, with reflected edges."""
        return cls([("mean", size)], **units)

    @classmethod
    def gauss(cls, sigma: float, **units: Unpack[Units]) -> Smooth:
        """Gaussian blur of ``sigma`` pixels, truncated at four sigma, with reflected edges."""
        return cls([("gauss", sigma)], **units)

    @classmethod
    def jpeg(cls, quality: int, **units: Unpack[Units]) -> Smooth:
        """Encode as baseline JPEG (no subsampling) and decode, by Pillow; the gradient passes straight through.

        Three channels are coded as a colour image; with any other number each channel is coded as a grey one. Values
        outside the range are clipped.
        """
        return cls([("jpeg", quality)], **units)

    @classmethod
    def soft_threshold(cls, threshold: float, **units: Unpack[Units]) -> Smooth:
        """Every value moved by ``threshold`` towards the lowest value of the range, but not beyond it."""
        return cls([("soft_threshold", threshold)], **units)

    @classmethod
    def clip(cls, low: float, high: float, **units: Unpack[Units]) -> Smooth:
        """Values below ``low`` become ``low``, values above ``high`` become ``high``."""
        return cls([("clip", low, high)], **units)

    @classmethod
    def stretch(cls, low: float, high: float, **units: Unpack[Units]) -> Smooth:
        """Contrast: ``low`` and ``high`` move to the ends of the range; values beyond are clipped."""
        return cls([("stretch", low, high)], **units)

    @classmethod
    def scale(cls, factor: float, **units: Unpack[Units]) -> Smooth:
        """Contrast: the distance of every value from the lowest of the range times ``factor``."""
        return cls([("scale", factor)], **units)

    @classmethod
    def shift(cls, dx: int, dy: int, **units: Unpack[Units]) -> Smooth:
        """The image moved ``dx`` pixels to the right and ``dy`` down; edge pixels are repeated."""
        return cls([("shift", dx, dy)], **units)

    @classmethod
    def tv(cls, weight: float, n_iter: int = 30, **units: Unpack[Units]) -> Smooth:
        r"""Total-variation denoising: ``n_iter`` steps down 1/2 \|u - x\|^2 + weight * TV(u), each a descent.

        TV(u) is the sum of sqrt(\|grad u\|^2 + (range / 100)^2) over the pixels of a channel. Source: Rudin, Osher,
        Fatemi 1992; the steps are those of Chan, Osher, Shen 2001.
        """
        return cls([("tv", weight, n_iter)], **units)

    @classmethod
    def noise(cls, sigma: float, **units: Unpack[Units]) -> Smooth:
        """Add Gaussian noise of standard deviation ``sigma``, drawn from (seed, id), without clipping."""
        return cls([("noise", sigma)], **units)

    @classmethod
    def chain(cls, *parts: Smooth) -> Smooth:
        """Several smoothings in turn, the first one first; all must have the same normalisation and range of values."""
        if not parts:
            raise ArgumentError(expected("parts", "at least one smoothing", "none"))
        for part in parts:
            given: object = part
            if not isinstance(given, Smooth):
                raise ArgumentError(expected("parts", "smoothings", type(given).__name__, "Write Smooth.gauss(1.0)."))
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
            clean: (N, C, H, W), model units; (N, ...) if all steps work on single values. Half precision is
                converted to single for the computation.
            context: ids and seed, for :meth:`noise`.

        Returns:
            A tensor like ``clean``.

        Raises:
            InputError: integers, or inputs that are not images if a step needs images.
        """
        if not clean.is_floating_point():
            raise InputError(expected("inputs", "of a floating type", clean.dtype, "Write `x.float()`."))
        if clean.dim() != 4 and not all(_FILTERS[step[0]].pointwise for step in self.steps):
            raise InputError(expected("inputs", f"images (N, C, H, W) for {self!r}", f"shape {tuple(clean.shape)}"))
        if not clean.numel():
            return clean
        exact = clean if clean.dtype in (torch.float32, torch.float64) else clean.float()
        image = self.normalization.to_image(exact)
        for place, (kind, *parameters) in enumerate(self.steps):
            if kind == "noise":
                parameters.append(_noise(image, context, place))
            image = _FILTERS[kind].apply(image, *self.value_range, *parameters)
        return self.normalization.to_model(image).to(clean.dtype)

    def __repr__(self) -> str:
        units = []
        if not self.normalization.is_identity:
            units.append(f"normalization=({self.normalization.mean}, {self.normalization.std})")
        if self.value_range != (0.0, 1.0):
            units.append(f"value_range={self.value_range}")
        parts = []
        for kind, *parameters in self.steps:
            parts.append(f"Smooth.{kind}({', '.join([*map(repr, parameters), *units])})")
        return parts[0] if len(parts) == 1 else f"Smooth.chain({', '.join(parts)})"


def _noise(image: Tensor, context: Context, place: int) -> Tensor:
    """Standard normal numbers from each example's own generator; each noise step of a chain gets its own."""
    stream = f"smooth{place}"
    draws = [torch.randn(image.shape[1:], generator=context.generator(i, stream)) for i in range(len(image))]
    return torch.stack(draws).to(image)


class Denoise(Intervention):
    """x' = D(x): the output of a denoiser trained on clean images.

    Args:
        denoiser: images in image units to images of the same shape: an ``nn.Module`` in eval mode or any function.
            It is called with gradients enabled if the caller has them enabled.
        normalization: pair ``(mean, std)`` saying what was done to the image before the model:
            ``model = (image - mean) / std``. None: model and image units are the same.
        forward_equivalents: cost of the denoiser for one image, in forward passes of the network.

    Raises:
        ArgumentError: the denoiser is not callable, or the cost is negative.
        InputError: at the run, the denoiser returns another shape.

    Example:
        >>> import torch
        >>> halved = Denoise(lambda images: images / 2)
        >>> halved(torch.ones(1, 1, 2, 2)).flatten().tolist()
        [0.5, 0.5, 0.5, 0.5]

    Source: denoisers in front of a classifier: Liao et al., CVPR 2018 (arXiv 1712.02976). Here the denoiser is an
    intervention, whose effects are measured.
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor], Tensor],
        *,
        normalization: NormalizationLike = None,
        forward_equivalents: int = 1,
    ) -> None:
        if not callable(denoiser):
            raise ArgumentError(expected("denoiser", "a network or function of images", type(denoiser).__name__))
        check_integer("forward_equivalents", forward_equivalents, "a number of passes, 0 or more", least=0)
        self.denoiser = denoiser
        self.normalization = Normalization.of(normalization)
        self.forward_equivalents = forward_equivalents

    def values(self, clean: Tensor, context: Context) -> Tensor:
        """x' = D(x), (N, C, H, W), in model units."""
        denoised = self.denoiser(self.normalization.to_image(clean))
        if denoised.shape != clean.shape:
            got = f"shape {tuple(denoised.shape)}"
            raise InputError(expected("denoiser", f"one that returns images of shape {tuple(clean.shape)}", got))
        return self.normalization.to_model(denoised).to(clean)

    def __repr__(self) -> str:
        return f"Denoise({type(self.denoiser).__name__})"
