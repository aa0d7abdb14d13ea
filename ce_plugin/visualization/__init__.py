"""Pictures of effects: maps laid over photographs, outlines of significant units, bars with their intervals.

Every function returns a :class:`matplotlib.figure.Figure` or plain values. Neither pyplot's state nor its backend is
touched, so the functions work on a server, in a notebook and in a thread alike.
"""

from ce_plugin.visualization.detection import plot_roc, plot_scores
from ce_plugin.visualization.estimates import plot_estimate
from ce_plugin.visualization.mediation import plot_carriers
from ce_plugin.visualization.nodes import plot_nodes
from ce_plugin.visualization.pictures import (
    NEGATIVE,
    POSITIVE,
    contribution_colors,
    data_uri,
    magnify,
    outlines,
    overlay,
)
from ce_plugin.visualization.sheets import sheet, spotlight

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "contribution_colors",
    "data_uri",
    "magnify",
    "outlines",
    "overlay",
    "plot_carriers",
    "plot_estimate",
    "plot_nodes",
    "plot_roc",
    "plot_scores",
    "sheet",
    "spotlight",
]
