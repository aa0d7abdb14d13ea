"""Insertion and deletion curves: how the output changes when pixels are inserted or deleted in the order of a map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, ModelError, TargetError, expected, unknown_name
from ce_plugin.interventions import Context, Normalization, PixelMask
from ce_plugin.interventions.base import NormalizationLike
from ce_plugin.randomness import generator

__all__ = ["FaithfulnessCurves", "area_under_curve", "insertion_deletion", "pixel_order", "reference_images"]

_REFERENCES = ("blur", "mean", "zero")

Target = Union[int, Sequence[int], Tensor]


@dataclass(frozen=True)
class FaithfulnessCurves:
    """Probabilities while the reference turns into the image (insertion) and the image into the reference (deletion).

    Args:
        references: names of the references, R of them.
        insertion: (N, R, steps + 1): the probability when the most important 0, 1/steps, ..., all pixels are those of
            the image and the others those of the reference.
        deletion: (N, R, steps + 1): the same with image and reference exchanged.

    Example:
        >>> straight = torch.linspace(0, 1, 5)[None, None]
        >>> FaithfulnessCurves(("zero",), straight, straight.flip(-1)).score.item()
        0.0
    """

    references: tuple[str, ...]
    insertion: Tensor
    deletion: Tensor

    @property
    def insertion_auc(self) -> Tensor:
        """Area under the insertion curve, (N, R); large for a faithful map."""
        return area_under_curve(self.insertion)

    @property
    def deletion_auc(self) -> Tensor:
        """Area under the deletion curve, (N, R); small for a faithful map."""
        return area_under_curve(self.deletion)

    @property
    def score(self) -> Tensor:
        """Insertion minus deletion, (N, R). The expected score of a random order is 0 for mirrored curves."""
        return self.insertion_auc - self.deletion_auc


def area_under_curve(curve: Tensor) -> Tensor:
    """Area under curves whose points are spread evenly over [0, 1], by the trapezoidal rule.

    Args:
        curve: (..., steps + 1), two points or more.

    Returns:
        (...).

    Raises:
        InputError: fewer than two points.

    Example:
        >>> area_under_curve(torch.tensor([0.0, 1.0, 1.0])).item()
        0.75
    """
    if curve.dim() == 0 or curve.shape[-1] < 2:
        raise InputError(expected("curve", "of two points or more", f"shape {tuple(curve.shape)}"))
    return torch.trapezoid(curve, dx=1 / (curve.shape[-1] - 1))


def pixel_order(maps: Tensor, *, seed: int = 0) -> Tensor:
    """Pixels from the most to the least important; ties are broken by one random permutation, the same for all maps.

    Otherwise ties, as in a map of patches or one that is mostly zero, would be ordered from the top left to the bottom
    right, and that order is not neutral.

    Args:
        maps: (N, H, W), or (N, C, H, W), whose channels are added, since a pixel is set in all its channels.
        seed: seed of the permutation.

    Returns:
        (N, H * W), indices of the flattened pixels.

    Raises:
        InputError: the wrong number of dimensions, or values that are not finite.

    Example:
        >>> pixel_order(torch.tensor([[[0.1, 0.9], [0.5, 0.3]]])).tolist()
        [[1, 2, 3, 0]]
    """
    if maps.dim() not in (3, 4):
        raise InputError(expected("maps", "of shape (N, H, W) or (N, C, H, W)", f"shape {tuple(maps.shape)}"))
    if not bool(torch.isfinite(maps).all()):
        raise InputError(expected("maps", "finite", "NaN or infinity", "Set undefined values to 0."))
    flat = (maps.sum(1) if maps.dim() == 4 else maps).flatten(1)
    shuffled = torch.randperm(flat.shape[1], generator=generator(seed, "ties")).to(flat.device)
    return shuffled[flat[:, shuffled].argsort(dim=1, descending=True, stable=True)]


def reference_images(
    x: Tensor,
    names: Sequence[str] = _REFERENCES,
    *,
    normalization: NormalizationLike = None,
    sigma: float = 10.0,
) -> dict[str, Tensor]:
    """The images that pixels are taken from: fills of :class:`~ce_plugin.interventions.PixelMask`, in image units.

    Args:
        x: (N, C, H, W), model units.
        names: ``"blur"``, ``"mean"`` (of each image's channels), ``"zero"`` (black).
        normalization: pair ``(mean, std)`` saying what was done to the images before the model.
        sigma: of the blur, in pixels.

    Returns:
        A tensor like ``x`` for each name.

    Raises:
        UnknownNameError: an unknown name.
        ArgumentError: ``sigma`` is not positive.

    Example:
        >>> reference_images(torch.rand(1, 3, 8, 8), ["zero"], normalization=(127.0, 128.0))["zero"][0, 0, 0, 0].item()
        -0.9921875
    """
    for name in names:
        if name not in _REFERENCES:
            raise unknown_name("names", name, _REFERENCES)
    units = Normalization.of(normalization)
    context = Context(ids=tuple(range(len(x))))
    return {name: PixelMask(name, normalization=units, sigma=sigma).values(x, context) for name in names}


def insertion_deletion(
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    maps: Tensor,
    target: Target,
    references: Mapping[str, Tensor],
    steps: int = 28,
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> FaithfulnessCurves:
    """Insertion and deletion curves of N images with one map each, for every reference.

    Each example costs 1 + R (2 steps - 1) forward passes.

    Args:
        predict: from (B, C, H, W) to probabilities (B, K); called without gradients.
        x: (N, C, H, W), model units.
        maps: (N, H, W) or (N, C, H, W): larger is more important; only the order of the values matters.
        target: class index, one for all examples or one for each.
        references: name to a tensor like ``x``; see :func:`reference_images`.
        steps: number of equal parts in which the pixels are set, at most the number of pixels.
        batch_size: rows per call of ``predict``.
        seed: seed of the order of ties.

    Returns:
        The curves, on the device of ``x``.

    Raises:
        InputError: shapes that do not fit, values that are not finite, no reference.
        ArgumentError: ``steps`` or ``batch_size`` out of range.
        TargetError: a target that does not fit.
        ModelError: ``predict`` does not return (B, K).

    Example:
        >>> x = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
        >>> brightness = lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> curves = insertion_deletion(brightness, x, x, 0, {"zero": torch.zeros_like(x)}, steps=4)
        >>> curves.insertion.tolist(), curves.score.item()
        ([[[0.0, 1.0, 1.0, 1.0, 1.0]]], 0.75)

    Source: Petsiuk et al. 2018 (arXiv 1806.07421), section 4.
    """
    _check(x, maps, references, steps, batch_size)
    classes = _targets(target, len(x))
    n, pixels = len(x), x.shape[2] * x.shape[3]
    order = pixel_order(maps, seed=seed).to(x.device)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(pixels, device=x.device).expand(n, -1))
    rank = rank.reshape(n, 1, *x.shape[2:])
    jobs = list(_jobs(n, len(references), steps))
    values = torch.empty(len(jobs), device=x.device)
    given = list(references.values())
    with torch.no_grad():
        for start in range(0, len(jobs), batch_size):
            some = jobs[start : start + batch_size]
            rows = torch.stack([_mixed(job, x, rank, given, pixels, steps) for job in some])
            out = predict(rows)
            if out.dim() != 2 or len(out) != len(rows):
                raise ModelError(expected("predict", f"one that returns ({len(rows)}, K)", f"shape {tuple(out.shape)}"))
            wanted = [classes[job[0]] for job in some]
            if not 0 <= min(wanted) <= max(wanted) < out.shape[1]:
                raise TargetError(expected("target", f"class indices of {out.shape[1]} classes", sorted(set(wanted))))
            values[start : start + len(some)] = out[range(len(some)), wanted].to(values)
    return _curves(values, tuple(references), n, steps)


# (example, reference, direction, step): with direction 0 the first `step` parts are the image, with 1 the reference.
_Job = tuple[int, int, int, int]


def _jobs(n: int, references: int, steps: int) -> Iterator[_Job]:
    """Each image once, each reference once, and the mixtures: the two curves share their ends."""
    for example in range(n):
        yield example, 0, 0, steps
        for reference in range(references):
            yield example, reference, 0, 0
            for direction in (0, 1):
                for step in range(1, steps):
                    yield example, reference, direction, step


def _mixed(job: _Job, x: Tensor, rank: Tensor, references: list[Tensor], pixels: int, steps: int) -> Tensor:
    example, reference, direction, step = job
    first = rank[example] < round(pixels * step / steps)
    image, other = x[example], references[reference][example]
    return torch.where(first, image, other) if direction == 0 else torch.where(first, other, image)


def _curves(values: Tensor, names: tuple[str, ...], n: int, steps: int) -> FaithfulnessCurves:
    table = values.reshape(n, -1)
    clean = table[:, :1, None].expand(-1, len(names), 1)
    inner = table[:, 1:].reshape(n, len(names), 2 * steps - 1)
    empty, first, second = inner[..., :1], inner[..., 1:steps], inner[..., steps:]
    return FaithfulnessCurves(names, torch.cat([empty, first, clean], 2), torch.cat([clean, second, empty], 2))


def _check(x: Tensor, maps: Tensor, references: Mapping[str, Tensor], steps: int, batch_size: int) -> None:
    if x.dim() != 4 or not len(x) or not bool(torch.isfinite(x).all()):
        raise InputError(expected("x", "finite images (N, C, H, W), N at least 1", f"shape {tuple(x.shape)}"))
    if maps.dim() not in (3, 4) or (len(maps), *maps.shape[-2:]) != (len(x), *x.shape[-2:]):
        wanted = f"one map (H, W) or (C, H, W) for each image of {tuple(x.shape)}"
        raise InputError(expected("maps", wanted, f"shape {tuple(maps.shape)}", "Enlarge maps to the images' size."))
    if not references or any(reference.shape != x.shape for reference in references.values()):
        shapes = {name: tuple(reference.shape) for name, reference in references.items()}
        raise InputError(expected("references", f"tensors of the images' shape {tuple(x.shape)}", shapes))
    if not 1 <= steps <= x.shape[2] * x.shape[3]:
        raise ArgumentError(expected("steps", f"from 1 to the {x.shape[2] * x.shape[3]} pixels", steps))
    if batch_size < 1:
        raise ArgumentError(expected("batch_size", "1 or more rows", batch_size))


def _targets(target: Target, n: int) -> list[int]:
    classes = [target] * n if isinstance(target, int) else [int(one) for one in torch.as_tensor(target).flatten()]
    if len(classes) == 1:
        classes = classes * n
    if len(classes) != n:
        raise TargetError(expected("target", f"one class index, or one for each of {n} images", f"{len(classes)}"))
    return classes
