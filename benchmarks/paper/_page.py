"""An experiment's page: its tables as text, HTML and CSV, and its plots, side by side in one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from ce_plugin.files import csv_text
from ce_plugin.visualization import data_uri

Interval = tuple[float, float, float]

_HEAD = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: #1d2129; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-size: .88rem; margin: 1rem 0; }}
th, td {{ border-bottom: 1px solid #dde1e7; padding: 4px 10px; text-align: left; }}
img {{ max-width: 100%; display: block; margin: 1rem 0; }}
</style>
"""


def save_page(
    out: Path | None,
    name: str,
    text: str,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    figures: Mapping[str, Figure],
) -> None:
    """Write NAME.md, NAME.html with its plots inside, each table as CSV and each plot as PNG, if a folder is given.

    Args:
        out: the folder; None writes nothing.
        name: of the page.
        text: the page, in Markdown.
        tables: name of a file -> its rows, each a mapping from columns to values.
        figures: name of a file -> the plot; all stand below the text.
    """
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    for own, rows in tables.items():
        names = list(dict.fromkeys(key for row in rows for key in row))
        (out / f"{own}.csv").write_text(csv_text(names, [[row.get(key) for key in names] for row in rows]))
    html = MarkdownIt().enable("table").render(text)
    for own, figure in figures.items():
        figure.savefig(out / f"{own}.png", dpi=110)
        text += f"\n\n![{own}]({own}.png)"
        html += f'<img alt="{own}" src="{data_uri(figure)}">\n'
    (out / f"{name}.md").write_text(text + "\n")
    (out / f"{name}.html").write_text(_HEAD.format(name=name) + html)


def ends(mean: Mapping[str, Any]) -> Interval:
    """A mean and its interval, for a plot."""
    return mean["mean"], mean["low"], mean["high"]


def flat(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for CSV: of a mean with its interval each part has a column."""
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append({})
        for name, value in row.items():
            parts = {f"{name}_{part}": one for part, one in value.items()} if isinstance(value, dict) else {name: value}
            found[-1] |= parts
    return found
