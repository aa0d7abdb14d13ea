"""Plots of effects: maps drawn over photographs, outlines of significant units, bar charts, detector curves.

Every function returns a :class:`matplotlib.figure.Figure` or plain values. None of them uses pyplot's state or its
backend, so they work on a server, in a notebook and in a thread.
"""

from ce_plugin._lazy import deprecated_names
from ce_plugin.visualization.charts import plot_intervals, plot_nodes, plot_ranked, plot_roc, plot_scores
from ce_plugin.visualization.pictures import (
    NEGATIVE,
    POSITIVE,
    contribution_colors,
    data_uri,
    magnify,
    outlines,
    overlay,
    sheet,
    signal,
    spotlight,
)

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "contribution_colors",
    "data_uri",
    "magnify",
    "outlines",
    "overlay",
    "plot_intervals",
    "plot_nodes",
    "plot_ranked",
    "plot_roc",
    "plot_scores",
    "sheet",
    "signal",
    "spotlight",
]

__getattr__ = deprecated_names(
    __name__,
    {
        "plot_carriers": "ce_plugin.effects.plot_carriers",
        "plot_estimate": "ce_plugin.effects.plot_estimate",
    },
)
