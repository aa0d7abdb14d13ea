"""F_i, pixel-wise masking: the counterfactual value of a masked pixel."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Union, cast

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, UnitError, check_integer, check_number, expected, unknown_name
from ce_plugin.interventions.base import (
    Context,
    Inputs,
    Intervention,
    Normalization,
    NormalizationLike,
    checked_examples,
)

Infill = Callable[..., Tensor]
Fill = Union[str, float, Tensor, Infill]
Region = Union[Tensor, "tuple[int, int, int, int]"]

_SHORT = 9
_NAMES = ("zero", "mean", "blur", "noise")


class PixelMask(Intervention):
    """Pixel masking: x' is an uninformative fill.

    Args:
        fill: the counterfactual value, in *image units*:

            - ``"zero"``: 0 (black), ``"mean"``: each example's mean per channel, ``"blur"``: the image blurred by
              a Gaussian of ``sigma`` pixels, ``"noise"``: per pixel N(mean, std) of the example's channel, from
              ``(seed, id)``;
            - a number, or a tensor that broadcasts to the input;
            - a callable ``infill(images) -> images``, or an in-painter ``infill(images, masks) -> images`` that
              gets the mask of each trial (bool, True where the pixel is to be painted);
            - a tuple of these: the effect is averaged over them (trials of random designs use them in turn).
        normalization: pair ``(mean, std)`` saying what was done to the image before the model:
            ``model = (image - mean) / std``. None: model and image units are the same.
        region: a bool mask that broadcasts to the input, or a box ``(left, top, right, bottom)`` in pixels (right
            and bottom exclusive): nothing is changed outside it (condition II of the paper: mask the known
            evidence of a class).
        sigma: standard deviation of the blur in pixels; None means a ninth of the shortest side that has nine pixels
            or more (25 pixels of 224), and half a pixel at least. Signals (N, C, L) and volumes (N, C, D, H, W) are
            blurred along all their dimensions.
        channel_dim: dimension of the channels, for ``"mean"``, ``"blur"``, ``"noise"``, boxes and ``normalization``: 1,
            or -1 for (N, L, C) and (N, H, W, C). None means 1, or, in :class:`~ce_plugin.CausalEffect`, what the
            network's first module shows.

    Raises:
        UnknownNameError: a fill of an unknown name.
        ArgumentError: an empty tuple of fills, sigma not positive, another ``channel_dim``.
        UnitError: a box that is empty or a mask that is not boolean.

    Example:
        >>> x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
        >>> PixelMask("mean")(x).flatten().tolist()
        [3.0, 3.0, 3.0, 3.0]
        >>> PixelMask(0.0, normalization=(127.0, 128.0))(x)[0, 0, 0, 0].item()
        -0.9921875
        >>> PixelMask("zero", region=(0, 0, 1, 2))(x).flatten().tolist()
        [0.0, 2.0, 0.0, 6.0]

    Source: F_i of Yang et al., ICIP 2019 (arXiv 1902.03380), section 3.3.
    """

    def __init__(
        self,
        fill: Fill | tuple[Fill, ...] = "zero",
        *,
        normalization: NormalizationLike = None,
        region: Region | None = None,
        sigma: float | None = None,
        channel_dim: int | None = None,
    ) -> None:
        given = fill if isinstance(fill, tuple) else (fill,)
        if not given:
            raise ArgumentError(expected("fill", "at least one fill", "an empty tuple"))
        fills: list[Fill] = []
        self.n_variants, self.per_trial = len(given), False
        for value in given:
            one = float(value) if isinstance(value, Real) else value  # numpy's numbers count too
            if isinstance(one, str) and one not in _NAMES:
                raise unknown_name("fill", one, _NAMES)
            if not isinstance(one, (str, float, Tensor)) and not callable(one):
                raise ArgumentError(expected("fill", "a name, number, tensor or callable", type(one).__name__))
            if isinstance(one, (float, Tensor)) and not bool(torch.isfinite(torch.as_tensor(one)).all()):
                raise ArgumentError(expected("fill", "finite", "NaN or infinity"))
            self.per_trial |= callable(one) and _wants_mask(one)
            fills.append(one)
        self.fills = tuple(fills)
        if sigma is not None:
            check_number("sigma", sigma, "a positive number of pixels", above=0)
        self.normalization = Normalization.of(normalization)
        self.region = None if region is None else _checked_region(region)
        self.sigma = sigma
        if channel_dim is not None and check_integer("channel_dim", channel_dim, "None, 1 or -1") not in (1, -1):
            raise ArgumentError(expected("channel_dim", "None, 1 or -1", channel_dim))
        self.channel_dim = channel_dim

    def with_channels(self, dim: int) -> PixelMask:
        """The same mask for inputs whose channels are in this dimension, unless it says itself where they are."""
        if self.channel_dim is not None:
            return self
        other = copy.copy(self)
        other.channel_dim = dim
        return other

    def _first(self, x: Tensor) -> Tensor:
        """The tensor with its channels in dimension 1."""
        return x if self.channel_dim is None or x.dim() < 2 else x.movedim(self.channel_dim, 1)

    def _back(self, x: Tensor) -> Tensor:
        """The tensor with its channels back in their place."""
        return x if self.channel_dim is None or x.dim() < 2 else x.movedim(1, self.channel_dim)

    def values(self, clean: Tensor, context: Context) -> Tensor:
        """x' for the whole input: the fill inside the region, the input itself outside.

        Args:
            clean: (N, ...), model units.
            context: ids and seed for ``"noise"``; ``variant`` picks the fill.

        Returns:
            A tensor like ``clean``.
        """
        fill = self.fills[context.variant]
        inside = None if self.region is None else self._inside(self.region, clean, context)
        if inside is not None:
            # Pixels outside the region are never filled, so that an in-painter sees them.
            context = replace(context, mask=inside if context.mask is None else context.mask & inside)
        with torch.no_grad():
            image = self._back(self.normalization.to_image(self._first(clean)))
            filled = self._fill(fill, image, context)
            # Fills of fewer dimensions broadcast from the last one.
            whole = filled.dim() == clean.dim()
            filled = self.normalization.to_model(self._first(filled) if whole else filled)
            filled = self._back(filled) if whole else filled
        try:
            filled = filled.to(clean).expand_as(clean)
        except RuntimeError as error:
            wanted = f"a fill that broadcasts to the input's shape {tuple(clean.shape)}"
            raise ArgumentError(expected("fill", wanted, f"shape {tuple(filled.shape)}")) from error
        return filled if inside is None else torch.where(inside, filled, clean)

    def _fill(self, fill: Fill, image: Tensor, context: Context) -> Tensor:
        if isinstance(fill, Tensor):
            return context.own(fill.detach(), image).to(image)
        if isinstance(fill, (int, float)):
            return torch.full_like(image, fill)
        if callable(fill):
            if not _wants_mask(fill):
                return fill(image)
            mask = torch.ones_like(image, dtype=torch.bool) if context.mask is None else context.mask
            return fill(image, mask.expand_as(image))
        if fill == "zero":
            return torch.zeros_like(image)
        return self._back(self._named(fill, self._first(image), context))

    def _named(self, fill: str, image: Tensor, context: Context) -> Tensor:
        """Fills that treat each channel by itself, (N, C, ...)."""
        if fill == "blur":
            return _blur(image, self.sigma)
        mean = _channel_mean(image)
        if fill == "mean":
            return mean.expand_as(image)
        std = _channel_mean((image - mean) ** 2).sqrt()
        noise = [torch.randn(image.shape[1:], generator=context.generator(i, "fill")) for i in range(len(image))]
        return mean + std * torch.stack(noise).to(image)

    def _inside(self, region: Region, clean: Tensor, context: Context) -> Tensor:
        """The region as a boolean mask of the input's shape."""
        if isinstance(region, Tensor):
            return _as_mask(region, clean, context)
        return self._back(_as_mask(region, self._first(clean), context))

    def perturb(
        self,
        inputs: Inputs,
        *,
        target: Tensor | None = None,
        ids: Sequence[int] | None = None,
        seed: int = 0,
        variant: int = 0,
        p: float | None = None,
    ) -> Inputs:
        """The inputs with every pixel set to its fill, or, with ``p``, each pixel with probability p (the paper's
        PWM masks 10 % of the area: ``p=0.1``), shared across channels.

        Args:
            inputs: (N, ...), or a tuple of such tensors.
            p: share of the pixels that are masked, in [0, 1]; None masks all.
            target: ignored; part of the interface of all interventions.
            ids: one id per example; with None the same pixels are masked in all examples.
            seed: seed of the pixels and of ``"noise"``.
            variant: which fill, if there are several.

        Returns:
            The masked inputs, a tensor or a tuple as passed.
        """
        if p is not None and not 0 <= check_number("p", p, "a share in [0, 1]") <= 1:
            raise ArgumentError(expected("p", "a share in [0, 1]", p))
        if p is None:
            return super().perturb(inputs, target=target, ids=ids, seed=seed, variant=variant)
        out = []
        tensors: tuple[Tensor, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
        for position, x in enumerate(tensors):
            # The same pixels whichever fill is asked for.
            pixels = Context(ids=checked_examples(tensors, ids, seed), seed=seed, position=position)
            shape = (1, *x.shape[2:]) if x.dim() > 2 else tuple(x.shape[1:])
            draws = torch.stack([torch.rand(shape, generator=pixels.generator(i, "pwm")) for i in range(len(x))])
            mask = (draws < p).to(x.device)
            out.append(torch.where(mask, self.values(x, replace(pixels, variant=variant, mask=mask)), x))
        return cast(Inputs, tuple(out) if isinstance(inputs, tuple) else out[0])

    def __repr__(self) -> str:
        shown = []
        for fill in self.fills:
            if isinstance(fill, Tensor):
                shown.append(f"tensor{tuple(fill.shape)}")
            else:
                shown.append(getattr(fill, "__name__", type(fill).__name__) if callable(fill) else repr(fill))
        parts = [shown[0] if len(shown) == 1 else f"({', '.join(shown)})"]
        if not self.normalization.is_identity:
            parts.append(f"normalization=({self.normalization.mean}, {self.normalization.std})")
        if self.region is not None:
            parts.append(f"region={self.region if isinstance(self.region, tuple) else 'mask'}")
        if self.sigma is not None:
            parts.append(f"sigma={self.sigma}")
        if self.channel_dim is not None:
            parts.append(f"channel_dim={self.channel_dim}")
        return f"PixelMask({', '.join(parts)})"


def _wants_mask(infill: Infill) -> bool:
    """True for an in-painter: a callable with two positional parameters that have no default."""
    try:
        parameters: Sequence[inspect.Parameter] = list(inspect.signature(infill).parameters.values())
    except (TypeError, ValueError):  # some built-ins have no signature
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters) >= 2


def _channel_mean(image: Tensor) -> Tensor:
    dims = list(range(2, image.dim())) if image.dim() > 2 else list(range(1, image.dim()))
    return image.mean(dim=dims, keepdim=True) if dims else image


def _blur(image: Tensor, sigma: float | None) -> Tensor:
    """A Gaussian blur along all dimensions but the first two; one of size 1 has nothing to be blurred."""
    # Imported here because importing torchvision takes as long as importing torch.
    from torchvision.transforms.functional import gaussian_blur

    if image.dtype == torch.float16 and image.device.type == "cpu":  # which has no padding for it before PyTorch 2.6
        return _blur(image.float(), sigma).half()
    sizes = image.shape[2:]
    if len(sizes) not in (1, 2, 3):
        wanted = "'zero', 'mean' or a number for inputs that are not signals, images or volumes (N, C, ...)"
        raise ArgumentError(expected("fill", wanted, "'blur'"))
    spread = _spread(sizes) if sigma is None else sigma
    # The kernel extends to 3 sigma, but reflection padding must be smaller than the image.
    kernel = [2 * min(max(1, round(3 * spread)), size - 1) + 1 for size in sizes]
    blurred: Tensor = image
    # One dimension after the other, as lines of one picture: the same filter, for a k-th of the operations.
    for dim, taps in enumerate(kernel, start=2):
        lines = blurred.movedim(dim, -1)
        smooth = gaussian_blur(lines.flatten(1, -2)[:, None], [taps, 1], [spread, spread])
        blurred = smooth.reshape(lines.shape).movedim(-1, dim)
    return blurred.contiguous()


def _spread(sizes: Sequence[int]) -> float:
    """A ninth of the shortest side; sides below nine pixels do not count where there are others.

    Along them the spread would be less than a pixel, which changes next to nothing.
    """
    long = [size for size in sizes if size >= _SHORT]
    short = [size for size in sizes if size > 1]
    return max(min(long or short or [1]) / _SHORT, 0.5)


def _checked_region(region: Region) -> Region:
    if isinstance(region, Tensor):
        if region.dtype != torch.bool:
            raise UnitError(expected("region", "a boolean mask", f"dtype {region.dtype}", "Write `mask > 0`."))
        return region
    wanted = "a boolean mask, or a box (left, top, right, bottom) with left < right, top < bottom"
    given: object = region
    if not isinstance(given, (tuple, list)) or len(region) != 4:
        raise UnitError(expected("region", wanted, repr(region)))
    left, top, right, bottom = (check_integer("region", edge, wanted, error=UnitError) for edge in region)
    if not (left < right and top < bottom):
        raise UnitError(expected("region", wanted, region))
    return (left, top, right, bottom)


def _as_mask(region: Region, clean: Tensor, context: Context) -> Tensor:
    """The region as a boolean mask of the input's shape."""
    if isinstance(region, Tensor):
        region = context.own(region, clean)
        try:
            return region.to(clean.device).expand_as(clean)
        except RuntimeError as error:
            wanted = f"a mask that broadcasts to the input's shape {tuple(clean.shape)}"
            raise UnitError(expected("region", wanted, f"shape {tuple(region.shape)}")) from error
    left, top, right, bottom = region
    if clean.dim() < 3 or left < 0 or top < 0 or right > clean.shape[-1] or bottom > clean.shape[-2]:
        raise UnitError(expected("region", f"a box inside the input's shape {tuple(clean.shape)}", region))
    mask = torch.zeros(clean.shape[-2:], dtype=torch.bool, device=clean.device)
    mask[top:bottom, left:right] = True
    return mask.expand_as(clean)
