"""An estimate as a picture: a map over the image, or the strongest units as bars with their intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ce_plugin.effects import Estimate
from ce_plugin.errors import ArgumentError, InputError, TargetError, UnitError, expected
from ce_plugin.sites import InputSite
from ce_plugin.visualization.pictures import NEGATIVE, POSITIVE, overlay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_estimate"]


def plot_estimate(
    estimate: Estimate,
    image: Tensor | None = None,
    *,
    example: int = 0,
    target: int | None = None,
    feature_mask: Tensor | None = None,
    sliding_window_shapes: tuple[int, ...] | None = None,
    strides: int | tuple[int, ...] | None = None,
    fdr: float = 0.05,
    level: float = 0.95,
    top: int = 20,
    width: int = 480,
    title: str | None = None,
) -> Figure:
    """Draw the contributions of one example to one class.

    Args:
        estimate: what ``estimate(...)`` returned.
        image: the example, (C, H, W), values in [0, 1]: the contributions are laid over it, significant units
            outlined. None draws bars.
        example: index of the example.
        target: class; None means the predicted class, where all classes were computed.
        feature_mask: the units, where they are not the default grid: what ``estimate(...)`` was given.
        sliding_window_shapes, strides: likewise.
        fdr: false discovery rate of the outlines, or of the filled bars. Exact designs have neither.
        level: of the bars' confidence intervals.
        top: number of bars, the largest contributions first.
        width: of the figure, in pixels.
        title: written above; None writes outcome and class.

    Returns:
        A figure. In a notebook it shows itself; elsewhere ``figure.savefig("effects.png")``.

    Raises:
        ArgumentError: no such example, or ``top`` below 1.
        TargetError: no such class.
        UnitError: the units are not those of the image; say which with ``feature_mask`` or windows.

    Example:
        >>> effect, reference = torch.tensor([[[-0.4], [0.1]]]), torch.tensor([[0.9]])
        >>> estimate = Estimate(effect=effect, reference=reference, class_shape=(1,), outcome="probability",
        ...                     unit_labels=["left", "right"])
        >>> [label.get_text() for label in plot_estimate(estimate).axes[0].get_yticklabels()]
        ['left', 'right']
    """
    if not -len(estimate) <= example < len(estimate):
        raise ArgumentError(expected("example", f"below {len(estimate)}, the number of examples", example))
    if top < 1:
        raise ArgumentError(expected("top", "at least 1", top))
    column, name = _column(estimate, example, target)
    n_units = int(estimate.n_units[example])
    values = estimate.contribution[example, :n_units, column].detach().cpu()
    found = None
    if estimate.std_error is not None:
        found = estimate.significant(fdr)[example, :n_units, column].cpu()
    heading = title if title is not None else f"{estimate.outcome or 'outcome'} of class {name}"
    if image is None:
        half = None if found is None else estimate.half_width(level)[example, :n_units, column].cpu()
        labels = estimate.labels_of(example)
        return _bars(values, half, found, labels, top=top, width=width, title=heading)
    batch = image.detach().cpu()[None]
    units = InputSite(feature_mask, sliding_window_shapes, strides).units_of((batch,))
    if int(units.n_units[0]) != n_units:
        todo = "Hand over the `feature_mask` or windows that the estimate was made with."
        raise UnitError(expected("image", f"with the {n_units} units of the estimate", int(units.n_units[0]), todo))
    (plane,) = units.spread(values[None].to(torch.float64))
    region = None if found is None else units.spread(found[None].to(torch.float64))[0][0].amax(0) > 0.5
    return overlay(plane[0], image, significant=region, width=width, title=heading)


def _column(estimate: Estimate, example: int, target: int | None) -> tuple[int, str]:
    """Which column of the effects a class is, and its name."""
    classes = estimate.effect.shape[2]
    if estimate.target is not None or classes == 1:
        if target is not None and estimate.target is not None and int(estimate.target[example].flatten()[0]) != target:
            todo = "The estimate holds this class only; leave `target` out of estimate() to get all."
            raise TargetError(expected("target", f"{estimate.target[example].tolist()}", target, todo))
        own = estimate.target[example].tolist() if estimate.target is not None else 0
        return 0, str(own)
    if target is None:
        if estimate.predicted is None:
            raise TargetError(expected("target", f"a class index below {classes}", None))
        target = int(estimate.predicted[example])
    if not 0 <= target < classes:
        raise TargetError(expected("target", f"a class index below {classes}", target))
    return target, str(target)


def _bars(
    values: Tensor,
    half: Tensor | None,
    found: Tensor | None,
    labels: list[str],
    *,
    top: int,
    width: int,
    title: str,
) -> Figure:
    from matplotlib.figure import Figure

    if not len(values):
        raise InputError(expected("estimate", "with at least one unit", "none"))
    order = values.abs().argsort(descending=True, stable=True)[:top].tolist()
    figure = Figure(figsize=(width / 100, 0.9 + 0.24 * len(order)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for place, unit in enumerate(order):
        value = float(values[unit])
        sure = found is None or bool(found[unit])
        color = POSITIVE if value >= 0 else NEGATIVE
        axes.barh(place, value, color=color if sure else "none", edgecolor=color, height=0.72)
        if half is not None:
            axes.errorbar(value, place, xerr=float(half[unit]), color="#555555", capsize=2, linewidth=1)
    axes.set_yticks(range(len(order)), [labels[unit] for unit in order])
    axes.invert_yaxis()
    axes.axvline(0, color="#555555", linewidth=0.8)
    axes.set_xlabel(
        "contribution (positive supports the class)" + ("; filled: significant" if found is not None else "")
    )
    axes.set_title(title, fontsize=10)
    return figure
