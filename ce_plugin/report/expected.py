"""The page of expected effects over a data set: tables and plots of what a table of effects answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ce_plugin.effects import Estimate
from ce_plugin.expected.answer import ExpectedEstimate
from ce_plugin.files import table_files
from ce_plugin.report.sections import Section, build_manifest, cell, digits, save_page

# Columns of classes that are shown.
_CLASSES = 12


@dataclass(frozen=True)
class ExpectedStudy:
    """Answers about one run.

    Attributes:
        answers: outcome -> expected effects.
        configuration: of the run.
        reading: of the paper's columns, "A" or "B".
        level: of the intervals.
        fdr: false discovery rate.
        top: units in tables and plots.
    """

    answers: Mapping[str, ExpectedEstimate]
    configuration: Mapping[str, Any]
    reading: str = "A"
    level: float = 0.95
    fdr: float = 0.05
    top: int = 20


class ExpectedSection(Section[ExpectedStudy]):
    """Expected effects: for each outcome a table of the largest, with intervals, and a plot for each evidence."""

    name, template = "expected", "expected.html.j2"

    def record(self, found: ExpectedStudy) -> dict[str, Any]:
        """The largest effects of each outcome."""
        kept = {}
        for name, answer in found.answers.items():
            frame = answer.to_dataframe(found.level, found.fdr)
            order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index[: found.top]
            columns = ["evidence", "label", "class", "effect", "ci_low", "ci_high", "p_value", "n_images"]
            kept[name] = frame.loc[order, columns].to_dict("records")
        return {"reading": found.reading, "configuration": dict(found.configuration), "largest": kept}

    def render(self, found: ExpectedStudy) -> dict[str, Any]:
        """Tables and plots."""
        return {
            "study": found,
            "configuration": found.configuration,
            "outcomes": [self._outcome(name, answer, found) for name, answer in found.answers.items()],
        }

    def _outcome(self, name: str, answer: ExpectedEstimate, found: ExpectedStudy) -> dict[str, Any]:
        low, high = answer.confidence_interval(found.level)
        marked = answer.significant(found.fdr)
        order = answer.effect[0].abs().amax(1).argsort(descending=True, stable=True)[: found.top].tolist()
        rows = []
        for unit in order:
            for c in range(min(len(answer.classes), _CLASSES)):
                cells = [
                    {
                        "effect": digits(float(answer.effect[e, unit, c])),
                        "interval": f"{digits(float(low[e, unit, c]))} to {digits(float(high[e, unit, c]))}",
                        "significant": bool(marked[e, unit, c]),
                    }
                    for e in range(len(answer.evidences))
                ]
                rows.append({"unit": answer.labels_of(0)[unit], "class": answer.classes[c], "cells": cells})
        plots = [
            cell(evidence, f"{name} under {evidence}", answer.plot(evidence, top=found.top, fdr=found.fdr))
            for evidence in answer.evidences
        ]
        counts = marked.any(2).sum(1).tolist()
        return {
            "name": name,
            "answer": answer,
            "rows": rows,
            "plots": plots,
            "counts": list(zip(answer.evidences, counts, strict=True)),
            "differences": self._differences(answer, found),
        }

    def _differences(self, answer: ExpectedEstimate, found: ExpectedStudy) -> list[dict[str, Any]]:
        """How many units have another effect under an evidence than under the first, paired on the same images."""
        rows = []
        for evidence in answer.evidences[1:]:
            apart = answer.difference(evidence, answer.evidences[0])
            count = int(Estimate.significant(apart, found.fdr).any(2).sum())
            rows.append({"name": f"{evidence} minus {answer.evidences[0]}", "count": count})
        return rows


def save_expected(study: ExpectedStudy, out: str | Path, *, command: Sequence[str], tables: str = "csv") -> Path:
    """Write ``expected.html``, ``expected.csv`` and ``manifest.json``; each appears only when it is complete.

    Args:
        study: what was answered.
        out: the folder, which :func:`~ce_plugin.report.check_out` has allowed.
        command: the words that do it again.
        tables: suffix of the table, see :func:`ce_plugin.files.table_files`.

    Returns:
        Path of the page.

    Example:
        >>> import tempfile, torch
        >>> from ce_plugin.expected.answer import answered
        >>> from ce_plugin.expected.moments import moments_of
        >>> answer = answered(moments_of(torch.rand(9, 1, 3, 1)), ["clean"], ["explained"], outcome="log_odds")
        >>> study = ExpectedStudy({"log_odds": answer}, {
        ...     "site": "LayerSite('1')", "intervention": "ZeroOut()", "data": "9 images", "given": {}, "seed": 0,
        ... })
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_expected(study, folder, command=["ce-plugin"]).name
        'expected.html'
    """
    import pandas as pd

    frames = []
    for name, answer in study.answers.items():
        frame = answer.to_dataframe(study.level, study.fdr)
        frame.insert(0, "outcome", name)
        frames.append(frame)
    arguments = {"reading": study.reading, "level": study.level, "fdr": study.fdr, "top": study.top}
    seed = study.configuration["seed"]
    # The network is not here any more; its fingerprint is in the configuration.
    manifest = build_manifest(arguments=arguments, command=command, seed=seed, inputs={}, model=nn.Identity())
    del manifest["model"]
    files = table_files({"expected": pd.concat(frames)}, tables)
    return save_page(ExpectedSection(), study, out, manifest, files)
