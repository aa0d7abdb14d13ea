"""The page of a comparison of attribution methods: for each measure the methods with their intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path
from typing import Any

from ce_plugin.evaluation.comparison import MEASURES, Comparison
from ce_plugin.files import table_files
from ce_plugin.report.sections import Section, digits, save_page


@dataclass(frozen=True)
class ComparisonStudy:
    """A comparison with what it was made of.

    Args:
        found: the records.
        model: the network's name.
        data: the pictures, in words.
        passes: that a map might take.
        measures: names of :data:`~ce_plugin.evaluation.MEASURES`.
    """

    found: Comparison
    model: str
    data: str
    passes: int
    measures: tuple[str, ...] = ()


class ComparisonSection(Section[ComparisonStudy]):
    """A table for each measure: mean, interval, and difference to the first method."""

    name, template = "compare", "compare.html.j2"

    def record(self, found: ComparisonStudy) -> dict[str, Any]:
        """Methods and images."""
        return {"methods": found.found.methods, "records": len(found.found.records), "passes": found.passes}

    def render(self, found: ComparisonStudy) -> dict[str, Any]:
        """The tables, with a bar for each method."""
        texts = {value: _said(name) for name in found.measures for value in MEASURES[name].larger}
        tables = []
        for name, rows in found.found.table().groupby("measure", sort=False):
            top = max(rows["mean"].abs().max(), 1e-12)
            lines = [
                {
                    "method": row.method,
                    "images": row.images,
                    "mean": digits(row.mean),
                    "interval": _span(row.mean_low, row.mean_high),
                    "bar": round(100 * abs(row.mean) / top, 1),
                    "difference": digits(row.difference) if row.difference == row.difference else "",
                    "span": _span(row.difference_low, row.difference_high),
                    "apart": row.difference_low > 0 or row.difference_high < 0,
                }
                for row in rows.itertuples()
            ]
            better = str(rows["better"].iloc[0])
            tables.append({"name": name, "better": better, "text": texts.get(str(name), ""), "rows": lines})
        return {"study": found, "tables": tables, "first": next(iter(found.found.methods), "")}


def save_comparison(
    study: ComparisonStudy, out: str | Path, *, manifest: Mapping[str, Any], tables: str = "csv"
) -> Path:
    """Write ``compare.html``, ``compare.csv``, ``compare.json``, ``images.csv`` and ``manifest.json``.

    Args:
        study: what was found.
        out: the folder, which :func:`~ce_plugin.report.check_out` has allowed.
        manifest: see :func:`~ce_plugin.report.build_manifest`.
        tables: suffix of the tables, see :func:`ce_plugin.files.table_files`.

    Returns:
        Path of the page.

    Example:
        >>> import tempfile, torch
        >>> from ce_plugin.report import build_manifest
        >>> record = {"image": "a", "method": "random", "passes": 0, "seconds": 0.1, "values": {"score": 1.0}}
        >>> study = ComparisonStudy(Comparison([record]), "net", "1 picture", 400)
        >>> manifest = build_manifest(arguments={}, command=[], seed=0, inputs={}, model=torch.nn.Linear(1, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_comparison(study, folder, manifest=manifest).name
        'compare.html'
    """
    table = study.found.table()
    rows = json.loads(table.to_json(orient="records"))
    files = {
        **table_files({"compare": table, "images": study.found.images()}, tables),
        "compare.json": json.dumps({"model": study.model, "passes": study.passes, "table": rows}, indent=1),
    }
    return save_page(ComparisonSection(), study, out, manifest, files)


def _said(measure: str) -> str:
    return " ".join((getdoc(MEASURES[measure].run) or "").split())


def _span(low: float, high: float) -> str:
    return "" if low != low else f"{digits(low)} to {digits(high)}"
