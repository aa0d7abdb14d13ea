"""The pages of a detector: pictures that it judged, and attacks that it was tried against."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ce_plugin.files import write_files
from ce_plugin.models import VisionModel
from ce_plugin.report.detector_cells import alarm, evaluation_section
from ce_plugin.report.detector_findings import DetectorTrial, Screening
from ce_plugin.report.page import template
from ce_plugin.report.record import trial_record
from ce_plugin.report.words import percent, probability
from ce_plugin.visualization import NEGATIVE, POSITIVE, data_uri, plot_scores

__all__ = ["save_evaluation", "save_screening"]

# A page of thousands of rows is not read; the table beside it has them all.
_ROWS = 100


def save_screening(
    found: Screening, out: str | Path, *, net: VisionModel, detector: str, manifest: Mapping[str, Any]
) -> Path:
    """Write ``alarms.html``, ``scores.csv`` and ``manifest.json``; each appears only when it is complete.

    Args:
        found: what :func:`~ce_plugin.report.screen` returned.
        out: the folder, which :func:`~ce_plugin.report.check_out` has allowed.
        net: the network, for its name and its classes.
        detector: what the detector is called, such as its file's name.
        manifest: see :func:`~ce_plugin.report.build_manifest`; the findings are added to it.

    Returns:
        Path of the page.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from ce_plugin.detection import Calibration
        >>> from ce_plugin.report import Screened, build_manifest
        >>> net = VisionModel(torch.nn.Linear(1, 1))
        >>> rows = (Screened("a.png", 0.5, 0.4, False, 1, {"filters": -0.2}),)
        >>> found = Screening(rows, (), Calibration([0.1, 0.7, 0.2]), 0.6, 0.3)
        >>> manifest = build_manifest(arguments={}, command=[], seed=0, inputs={}, model=net.model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = save_screening(found, folder, net=net, detector="net.ce", manifest=manifest)
        ...     page.with_name("scores.csv").read_text().splitlines()[1]
        'a.png,0.5,0.4,0,1,class 1,-0.2'
    """
    full = {**manifest, "findings": _screening_record(found)}
    page = template("alarms.html.j2").render(
        model=net.name, detector=detector, **_screening(found, net), **_common(full)
    )
    return _written(out, {"scores.csv": _scores_csv(found, net)}, full, "alarms.html", page)


def save_evaluation(
    trial: DetectorTrial, out: str | Path, *, net: VisionModel, detector: str, manifest: Mapping[str, Any]
) -> Path:
    """Write ``evaluation.html``, ``evaluation.csv`` and ``manifest.json``; each appears only when it is complete.

    Args:
        trial: what :func:`~ce_plugin.report.try_detector` returned.
        out, net, detector, manifest: as for :func:`save_screening`.

    Returns:
        Path of the page.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from ce_plugin.detection import Calibration, rate
        >>> from ce_plugin.report import build_manifest
        >>> net, right = VisionModel(torch.nn.Linear(1, 1)), rate([True])
        >>> trial = DetectorTrial(None, [True], False, right, (0.0, 1.0), (), Calibration([0.1]), 0.6, 0.3, 7, 0.01)
        >>> manifest = build_manifest(arguments={}, command=[], seed=0, inputs={}, model=net.model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = save_evaluation(trial, folder, net=net, detector="net.ce", manifest=manifest)
        ...     page.with_name("evaluation.csv").read_text().split(",")[:3]
        ['attack', 'settings', 'n_tried']
    """
    full = {**manifest, "findings": trial_record(trial)}
    page = template("evaluation.html.j2").render(
        model=net.name, detector=detector, trial=evaluation_section(trial, net.class_name), **_common(full)
    )
    return _written(out, {"evaluation.csv": _evaluation_csv(trial)}, full, "evaluation.html", page)


def _screening(found: Screening, net: VisionModel) -> dict[str, Any]:
    """What the page of judged pictures shows."""
    flagged = sorted((row for row in found.rows if row.flagged), key=lambda row: -row.score)
    n = len(found.rows)
    histogram = plot_scores(
        found.calibration.scores,
        found.threshold,
        {"these pictures": [row.score for row in found.rows]},
        title="Scores of clean pictures, and of these",
    )
    return {
        "n_pictures": n,
        "n_flagged": len(flagged),
        "n_expected": f"{found.fpr * n:.3g}",
        "fpr": percent(found.fpr),
        "threshold": f"{found.threshold:.3g}",
        "n_calibration": found.calibration.n,
        "smallest_p": probability(found.calibration.smallest_fpr),
        "histogram": data_uri(histogram),
        "alarms": [alarm(one, net.class_name) for one in found.shown],
        "rows": [
            {
                "name": row.name,
                "answer": net.class_name(row.predicted),
                "score": f"{row.score:.3g}",
                "p": probability(row.p_value),
            }
            for row in flagged[:_ROWS]
        ],
        "n_rows": min(len(flagged), _ROWS),
    }


def _screening_record(found: Screening) -> dict[str, Any]:
    return {
        "fpr": found.fpr,
        "threshold": found.threshold,
        "calibration_images": found.calibration.n,
        "pictures": len(found.rows),
        "flagged": [row.name for row in found.rows if row.flagged],
        "explained": {one.name: str(one.alarm) for one in found.shown},
    }


def _scores_csv(found: Screening, net: VisionModel) -> str:
    verdicts = list(found.rows[0].verdicts) if found.rows else []
    header = ["file", "score", "p_value", "flagged", "predicted", "class_name", *verdicts]
    return _csv(
        header,
        [
            [row.name, row.score, row.p_value, int(row.flagged), row.predicted, net.class_name(row.predicted)]
            + [row.verdicts[name] for name in verdicts]
            for row in found.rows
        ],
    )


def _evaluation_csv(trial: DetectorTrial) -> str:
    """A row for each attack, and one for the clean pictures."""
    header = ["attack", "settings", "n_tried", "n_successful"]
    names = [f"{figure}{end}" for figure in ("auroc", "tpr_1", "tpr_5") for end in ("", "_low", "_high")]
    header += [*names, "flagged", "flagged_low", "flagged_high"]
    alarms = trial.false_alarms
    rows = [["clean", "", alarms.n, "", *[""] * len(names), alarms.share, alarms.low, alarms.high]]
    for one in trial.tried:
        known = one.figures.to_dict()
        shares = ["", "", ""] if one.flagged is None else [one.flagged.share, one.flagged.low, one.flagged.high]
        figures = ["" if known[name] is None else known[name] for name in names]
        rows.append([one.attack, one.words, one.n_tried, len(one.scores), *figures, *shares])
    return _csv(header, rows)


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([header, *rows])
    return buffer.getvalue()


def _common(manifest: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(manifest, indent=2)
    return {"manifest": manifest, "manifest_json": text, "positive": POSITIVE, "negative": NEGATIVE}


def _written(out: str | Path, tables: Mapping[str, str], manifest: Mapping[str, Any], name: str, page: str) -> Path:
    write_files(out, {**tables, "manifest.json": json.dumps(manifest, indent=2) + "\n", name: page})
    return Path(out, name)
