"""The files and tables of a command: each file appears only when it is complete."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ce_plugin.files import write_files

__all__ = ["csv_text", "json_text", "table", "write_files"]


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as a table that spreadsheets and pandas read."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def json_text(content: Mapping[str, Any]) -> str:
    """JSON as a person would write it."""
    return json.dumps(content, indent=2) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first column left, the others right.

    Example:
        >>> print(table(["channel", "share"], [["7", "12 %"], ["128", "9 %"]]))
        channel  share
        7         12 %
        128        9 %
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
