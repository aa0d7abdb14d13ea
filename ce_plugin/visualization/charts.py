"""Charts: ranked nodes, numbers with their intervals, histograms of a detector's scores, and its ROC curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.visualization.pictures import NEGATIVE, POSITIVE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_GRAY = "#555555"


def plot_nodes(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    shares: tuple[Sequence[str], Sequence[float]] | None = None,
    xlabel: str = "contribution",
    title: str = "",
) -> Figure:
    """Bar chart of nodes in the order given; the first series is filled, a second drawn as an outline.

    Args:
        labels: names of the nodes, best first.
        series: one or two lists of contributions by name, each as long as ``labels``.
        shares: names of the nodes that carry an attack and their shares of its effect, for a second chart on the right.
        xlabel: label of the bars' axis.
        title: title of the figure.

    Returns:
        A figure.

    Raises:
        ArgumentError: no nodes, lists of different lengths, or not one or two series.

    Example:
        >>> figure = plot_nodes(["7", "3"], {"clean": [0.5, -0.2], "pgd": [0.1, -0.3]})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['7', '3']
    """
    from ce_plugin.visualization.figure import NotebookFigure

    _check(labels, series, shares)
    longest = max(len(labels), len(shares[0]) if shares else 0)
    figure = NotebookFigure(figsize=(9.0 if shares else 5.0, 1.1 + 0.24 * longest), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2 if shares else 1, squeeze=False)[0]
    _contributions(axes[0], labels, series)
    axes[0].set_xlabel(xlabel)
    if shares:
        _shares(axes[1], *shares)
    figure.suptitle(title, fontsize=10)
    return figure


def _check(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    shares: tuple[Sequence[str], Sequence[float]] | None,
) -> None:
    if not labels:
        raise ArgumentError(expected("labels", "the name of one node or more", "none"))
    lengths = {name: len(values) for name, values in series.items()}
    if len(lengths) not in (1, 2) or set(lengths.values()) != {len(labels)}:
        raise ArgumentError(expected("series", f"one or two lists of {len(labels)} numbers", lengths))
    if shares is not None and (not shares[0] or len(shares[0]) != len(shares[1])):
        raise ArgumentError(expected("shares", "as many numbers as names", [len(part) for part in shares]))


def _contributions(axes: Any, labels: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    (first, values), *rest = series.items()
    places = range(len(labels))
    colors = [POSITIVE if value >= 0 else NEGATIVE for value in values]
    axes.barh(places, values, color=colors, height=0.72, label=first)
    for name, others in rest:
        axes.barh(places, others, color="none", edgecolor="#111111", height=0.5, linewidth=1.1, label=name)
        axes.legend(loc="best", fontsize=8)
    _finish(axes, labels, "channels by their contribution")


def _shares(axes: Any, labels: Sequence[str], values: Sequence[float]) -> None:
    axes.barh(range(len(labels)), [100 * value for value in values], color=_GRAY, height=0.72)
    axes.set_xlabel("share of the attack's effect, % (this image)")
    _finish(axes, labels, "channels that carry the attack")


def _finish(axes: Any, labels: Sequence[str], title: str) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=_GRAY, linewidth=0.8)
    axes.set_title(title, fontsize=9)


Interval = tuple[float, float, float]
"""A number, and the ends of its interval."""


def plot_ranked(
    labels: Sequence[str],
    panels: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]],
    *,
    ylabel: str = "effect",
    title: str = "",
) -> Figure:
    """All nodes of a layer with their intervals, in the order of the first panel; one panel below the other.

    Args:
        labels: names of the U nodes.
        panels: name -> effects, the ends of their intervals, and whether they are significant, (U,) each. What is
            significant is filled.
        ylabel: label of the effects' axis.
        title: title of the figure.

    Returns:
        A figure. Up to 48 nodes have their names on the axis.

    Raises:
        ArgumentError: no nodes, no panels, or lists of different lengths.

    Example:
        >>> figure = plot_ranked(["a", "b"], {"clean": ([1, -2], [0, -3], [2, -1], [False, True])})
        >>> [label.get_text() for label in figure.axes[-1].get_xticklabels()]
        ['b', 'a']
    """
    from ce_plugin.visualization.figure import NotebookFigure

    read = {name: [np.asarray(one, dtype=np.float64) for one in parts] for name, parts in panels.items()}
    lengths = {len(one) for parts in read.values() for one in parts}
    if not labels or lengths != {len(labels)}:
        raise ArgumentError(expected("panels", f"one or more, with {len(labels)} numbers each", sorted(lengths)))
    named, few = len(labels) <= _NAMED, len(labels) <= 4 * _NAMED
    figure = NotebookFigure(figsize=(9.0, 0.9 + 1.5 * len(read)), dpi=100, layout="constrained")
    axes = figure.subplots(len(read), 1, sharex=True, squeeze=False)[:, 0]
    order = np.argsort(next(iter(read.values()))[0], kind="stable")
    places, size = np.arange(len(labels)), 5.0 if named else 2.0
    for axis, (name, parts) in zip(axes, read.items(), strict=True):
        effect, low, high, found = (one[order] for one in parts)
        axis.vlines(places, low, high, color=_LIGHT_GRAY, alpha=1 if few else 0.4, linewidth=1.2 if few else 0.6)
        colors = np.where(effect <= 0, POSITIVE, NEGATIVE)  # a negative effect supports the class
        for filled in (True, False):
            own = (found > 0) == filled
            face = colors[own] if filled else "white"
            axis.scatter(places[own], effect[own], size**2, facecolors=face, edgecolors=colors[own], lw=0.9, zorder=3)
        axis.axhline(0, color=_GRAY, linewidth=0.8)
        axis.set_title(f"{name}: {int((found > 0).sum())} of {len(labels)} differ from 0", fontsize=9, loc="left")
        _open(axis)
    if named:
        axes[-1].set_xticks(places, [labels[k] for k in order], fontsize=8, rotation=0 if len(labels) <= 32 else 90)
    axes[-1].set_xlabel(f"nodes, in the order of {next(iter(read))}", fontsize=9)
    axes[len(axes) // 2].set_ylabel(ylabel, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def plot_intervals(
    panels: Mapping[str, Mapping[str, Mapping[str, Interval]]],
    *,
    at: float = 0.0,
    xlabel: str = "effect",
    title: str = "",
) -> Figure:
    """Numbers with their intervals: panels side by side, a row for each thing, a colour for each condition.

    Args:
        panels: name of the panel -> name of the row -> name of the condition -> the number and its interval.
        at: where a line says "none".
        xlabel: label of the numbers' axes.
        title: title of the figure.

    Returns:
        A figure; each panel has its own scale.

    Raises:
        ArgumentError: nothing to draw.

    Example:
        >>> figure = plot_intervals({"log-odds": {"node 3": {"clean": (-1, -1.2, -0.8), "FGSM": (0.5, 0.4, 0.6)}}})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['node 3']
    """
    from ce_plugin.visualization.figure import NotebookFigure

    rows = list(dict.fromkeys(row for some in panels.values() for row in some))
    every = dict.fromkeys(name for some in panels.values() for own in some.values() for name in own)
    if not rows or not every:
        raise ArgumentError(expected("panels", "numbers to draw", "none"))
    deep = 0.22 * len(every) + 0.16  # of a row, in inches
    figure = NotebookFigure(figsize=(9.0, 1.3 + deep * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, some) in zip(axes, panels.items(), strict=True):
        axis.axvline(at, color=_GRAY, linewidth=0.8)
        for number, condition in enumerate(every):
            # Conditions of one row lie close together, in their order.
            shift = (number - (len(every) - 1) / 2) * 0.7 / len(every)
            found = [(k + shift, *some[row][condition]) for k, row in enumerate(rows) if condition in some.get(row, {})]
            place, value, low, high = np.array(found, dtype=np.float64).reshape(-1, 4).T
            ends = np.stack([value - low, high - value])
            look = {"fmt": _MARKERS[number // 6 % 3], "color": _COLORS[number % 6]}
            axis.errorbar(value, place, xerr=ends, ms=4, lw=1.6, label=condition, **look)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlabel(xlabel, fontsize=9)
        _open(axis)
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    if len(every) > 1:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=min(len(names), 4), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


# Colours that colour-blind readers can tell apart, then the same with other dashes, or markers.
_COLORS = ("#e8590c", "#1c6fd1", "#2b8a3e", "#9c36b5", "#b08900", "#0b7285")
_MARKERS = ("o", "s", "^")
_DASHES = ("-", "--", ":", "-.")
_LIGHT_GRAY = "#9aa1ab"
_BINS = 40
# So many nodes have room for their names.
_NAMED = 48


def plot_scores(
    calibration: npt.ArrayLike,
    threshold: float,
    others: Mapping[str, npt.ArrayLike] | None = None,
    *,
    title: str = "",
) -> Figure:
    """Histogram of the calibration scores, with the threshold, and outlines of the histograms of other scores.

    Args:
        calibration: scores of clean images, (n,), finite.
        threshold: scores above it are flagged.
        others: name -> scores (m,); empty sets are left out.
        title: title of the figure.

    Returns:
        A figure; the heights are shares of each set of images.

    Raises:
        InputError: no calibration scores, or scores that are not finite.

    Example:
        >>> figure = plot_scores([0.1, 0.2, 0.4], 0.35, {"pgd": [0.5, 0.9]})
        >>> figure.axes[0].get_xlabel()
        'score: greater is more adversarial'
    """
    from ce_plugin.visualization.figure import NotebookFigure

    clean = _finite("calibration", calibration)
    if not clean.size:
        raise InputError(expected("calibration", "at least one score", "none"))
    sets = {name: _finite(name, scores) for name, scores in (others or {}).items()}
    everything = np.concatenate([clean, *sets.values(), [threshold]])
    # A few extreme scores would compress all others into one bar on a linear axis.
    ratio = everything.max() / max(float(np.median(clean)), 1e-300) if everything.min() > 0 else 0.0
    spaced = np.geomspace if ratio > 20 else np.linspace
    edges: list[float] = spaced(everything.min(), everything.max() + 1e-9, _BINS + 1).tolist()
    figure = NotebookFigure(figsize=(5.6, 3.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.hist(
        clean,
        edges,
        weights=np.full(len(clean), 1 / len(clean)),
        color=_LIGHT_GRAY,
        label=f"clean, calibration ({len(clean)})",
    )
    for number, (name, scores) in enumerate(sets.items()):
        if scores.size:
            options = {"histtype": "step", "linewidth": 1.6, "label": f"{name} ({len(scores)})", **_line(number)}
            axes.hist(scores, edges, weights=np.full(len(scores), 1 / len(scores)), **options)
    axes.axvline(threshold, color="#111111", linewidth=1.2, linestyle="--", label="threshold")
    if ratio > 20:
        axes.set_xscale("log")
    axes.set_xlabel("score: greater is more adversarial")
    axes.set_ylabel("share of the images")
    _finish_curves(axes, title, "best")
    return figure


def plot_roc(clean: npt.ArrayLike, attacked: Mapping[str, npt.ArrayLike], *, fpr: float, title: str = "") -> Figure:
    """ROC curves: share of attacked images detected against share of clean images flagged.

    Args:
        clean: scores of clean images, (n,); infinity is allowed, NaN is not.
        attacked: name of the attack -> scores, (m,); empty sets are left out.
        fpr: false-alarm rate at which a line is drawn.
        title: title of the figure.

    Returns:
        A figure; the axis of the false-alarm rate is a square root, which enlarges the low rates.

    Raises:
        InputError: no clean scores, or NaN.
        ArgumentError: a rate outside (0, 1).

    Example:
        >>> figure = plot_roc([0.0, 1.0, 2.0], {"pgd": [1.5, 3.0]}, fpr=0.05)
        >>> figure.axes[0].get_lines()[0].get_ydata()[-1].item()
        1.0
    """
    from ce_plugin.visualization.figure import NotebookFigure

    below = np.sort(np.asarray(clean, dtype=np.float64))
    if not below.size or np.isnan(below).any():
        raise InputError(expected("clean", "scores of at least one image", "none" if not below.size else "NaN"))
    if not 0 < fpr < 1:
        raise ArgumentError(expected("fpr", "a rate in (0, 1)", fpr))
    figure = NotebookFigure(figsize=(5.6, 3.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    for number, (name, given) in enumerate(attacked.items()):
        scores = np.sort(np.asarray(given, dtype=np.float64))
        if np.isnan(scores).any():
            raise InputError(expected("attacked", "numbers", f"NaN among those of {name!r}"))
        if scores.size:
            # From a threshold above all scores to one below them.
            thresholds = np.r_[np.inf, np.unique(np.r_[below, scores])[::-1]]
            false = 1 - np.searchsorted(below, thresholds, "left") / len(below)
            true = 1 - np.searchsorted(scores, thresholds, "left") / len(scores)
            axes.plot(false, true, linewidth=1.6, label=name, **_line(number))
    axes.axvline(fpr, color="#111111", linewidth=0.9, linestyle=":", label=f"{100 * fpr:g} % false alarms")
    axes.set_xscale("function", functions=(np.sqrt, np.square))
    axes.set_xticks([0.0, 0.01, 0.05, 0.2, 0.5, 1.0], ["0", "1 %", "5 %", "20 %", "50 %", "100 %"])
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("clean images flagged")
    axes.set_ylabel("attacked images flagged")
    _finish_curves(axes, title, "lower right")
    return figure


def _line(number: int) -> dict[str, Any]:
    dashes = _DASHES[number // len(_COLORS) % len(_DASHES)]
    return {"color": _COLORS[number % len(_COLORS)], "linestyle": dashes}


def _finish_curves(axes: Any, title: str, legend: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.legend(loc=legend, fontsize=8, frameon=False)
    _open(axes)


def _open(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _finite(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(array).all():
        raise InputError(expected(name, "finite scores", "NaN or infinity"))
    return array
