"""Ranked nodes as bars: what each contributes, clean and under attack, and what it carries of the attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ce_plugin.errors import ArgumentError, expected
from ce_plugin.visualization.pictures import NEGATIVE, POSITIVE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_nodes"]

_GRAY = "#555555"


def plot_nodes(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    shares: tuple[Sequence[str], Sequence[float]] | None = None,
    xlabel: str = "contribution",
    title: str = "",
) -> Figure:
    """Bars of nodes in the order given: the first series filled, a second as an outline over it.

    Args:
        labels: names of the nodes, best first.
        series: one or two lists of contributions by name, each as long as ``labels``.
        shares: names of the nodes that carry an attack and their shares of its effect, drawn beside.
        xlabel: what the bars measure.
        title: written above.

    Returns:
        A figure.

    Raises:
        ArgumentError: no nodes, lists of other lengths, or other than one or two series.

    Example:
        >>> figure = plot_nodes(["7", "3"], {"clean": [0.5, -0.2], "pgd": [0.1, -0.3]})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['7', '3']
    """
    from matplotlib.figure import Figure

    _check(labels, series, shares)
    longest = max(len(labels), len(shares[0]) if shares else 0)
    figure = Figure(figsize=(9.0 if shares else 5.0, 1.1 + 0.24 * longest), dpi=100, layout="constrained")
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
