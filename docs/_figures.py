"""Which pictures of a gallery script are shown: the figure that a block of code ends with, as a notebook shows it."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst


def last_figure(block: Any, variables: dict[str, Any], gallery: dict[str, Any]) -> str:
    """Save the figure that is the block's last expression; figures of pyplot are found by sphinx-gallery itself."""
    last = variables["example_globals"].pop("___", None)
    # The key is read again afterwards, for what is printed.
    variables["example_globals"]["___"] = None if isinstance(last, Figure) else last
    if not isinstance(last, Figure):
        return ""
    path = next(variables["image_path_iterator"])
    last.savefig(path, dpi=110)
    return figure_rst([path], gallery["src_dir"])
