"""How many units carry an effect, as a curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ce_plugin.effects import Carriers
from ce_plugin.visualization.pictures import NEGATIVE, POSITIVE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_carriers"]


def plot_carriers(carriers: Carriers, *, width: int = 480, title: str | None = None) -> Figure:
    """Draw the share of the total effect that the best units carry, against their number.

    Args:
        carriers: what :func:`ce_plugin.effects.carriers` returned.
        width: of the figure, in pixels.
        title: written above; None says on how many images.

    Returns:
        A figure: the curve with its interval, a line for each level and its number of units where that is reached.

    Example:
        >>> import torch
        >>> from ce_plugin.effects import carried
        >>> total = torch.linspace(1, 2, 20)
        >>> figure = plot_carriers(carried((5, 3, 4), total[:, None] * torch.tensor([0.4, 0.7, 1.0]), total))
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['50 %: 2 units', '90 %: 3 units']
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, 0.65 * width / 100), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    low, high, share = (v.cpu().numpy() for v in (carriers.share_low, carriers.share_high, carriers.share))
    axes.fill_between(carriers.sizes, low, high, color=POSITIVE, alpha=0.25, linewidth=0)
    axes.plot(carriers.sizes, share, color=POSITIVE, marker="o", markersize=3)
    for part, k in carriers.needed.items():
        axes.axhline(part, color="#555555", linewidth=0.8, linestyle=":")
        if k is not None:
            axes.plot([k], [share[carriers.sizes.index(k)]], color=NEGATIVE, marker="o", markersize=6)
        found = "not reached" if k is None else f"{k} unit{'s' * (k != 1)}"
        axes.annotate(
            f"{part * 100:g} %: {found}", (0.01, part), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"number of units, best first, of {len(carriers.order)}")
    axes.set_ylabel("share of the total effect")
    axes.set_title(f"{carriers.n_images} test images" if title is None else title, fontsize=10)
    return figure
