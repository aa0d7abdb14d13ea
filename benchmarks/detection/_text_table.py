"""A section with a title, text and a table, as Markdown or HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ce_plugin.evaluation import Interval


@dataclass
class Table:
    """A section: text, and a table if there are rows.

    Args:
        title: title of the section.
        words: paragraphs before the table; may contain `**bold**` and `code`.
        header: column titles.
        rows: cells.
        level: heading level, 2 or 3.
    """

    title: str
    words: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    level: int = 2

    def markdown(self) -> str:
        """As Markdown."""
        lines = ["#" * self.level + f" {self.title}", ""]
        for paragraph in self.words:
            lines += [paragraph, ""]
        if self.rows:
            lines += [_line(self.header), _line("---" for _ in self.header), *map(_line, self.rows)]
        return "\n".join(lines).rstrip()


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def marked(text: str) -> str:
    """HTML of the subset of Markdown that tables use."""
    text = html.escape(text, quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
    return re.sub(r"^- ", "• ", text)


def number(value: float | None) -> str:
    """A number between 0 and 1, without the leading zero: .987."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.9995 else f"{value:.3f}".removeprefix("0")


def interval(figure: Interval | None) -> str:
    """A number and its interval: .987 [.981, .992]."""
    return "-" if figure is None else f"{number(figure.value)} [{number(figure.low)}, {number(figure.high)}]"


def percent(value: float) -> str:
    """A share in per cent, with one decimal."""
    return f"{100 * value:.1f} %"


def met(yes: bool) -> str:
    """Text that says whether a target was reached."""
    return "met" if yes else "**not met**"
