"""The page of an autoencoder's concepts, a table of them, and the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ce_plugin.files import write_files
from ce_plugin.report.concepts import Concept, ConceptStudy
from ce_plugin.report.findings import OUTCOMES
from ce_plugin.report.page import template
from ce_plugin.report.words import cell, digits, percent, signed
from ce_plugin.visualization import NEGATIVE, POSITIVE, spotlight

__all__ = ["render_concepts", "save_concepts"]

PAGE, TABLE, MANIFEST = "concepts.html", "concepts.csv", "manifest.json"


def save_concepts(
    study: ConceptStudy, out: str | Path, *, model: str, outcome: str, manifest: Mapping[str, Any]
) -> Path:
    """Write ``concepts.html``, ``concepts.csv`` and ``manifest.json``; each appears only when it is complete.

    Args:
        study: what was found.
        out: the folder, which :func:`~ce_plugin.report.check_out` has allowed.
        model: the network's name.
        outcome: what was measured.
        manifest: see :func:`~ce_plugin.report.build_manifest`; the findings are added to it.

    Returns:
        Path of the page.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from ce_plugin.concepts import ConceptReport, Fidelity
        >>> from ce_plugin.report import build_manifest
        >>> none, numbers = torch.zeros(0), torch.zeros(0, 1, dtype=torch.long)
        >>> report = ConceptReport(none, none, none, none, (), numbers, none, none, none, n_images=4)
        >>> study = ConceptStudy("features.9", (), report, Fidelity(1.0, 0.0, 0.0, 4), None, 0.0, none)
        >>> manifest = build_manifest(arguments={}, command=[], seed=0, inputs={}, model=torch.nn.Linear(1, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_concepts(study, folder, model="net", outcome="logit", manifest=manifest).name
        'concepts.html'
    """
    folder = Path(out)
    full = {**manifest, "findings": _record(study)}
    page = render_concepts(study, model=model, outcome=outcome, manifest=full)
    texts = {
        TABLE: study.report.to_dataframe().to_csv(index=False),
        MANIFEST: json.dumps(full, indent=2) + "\n",
        PAGE: page,
    }
    write_files(folder, texts)
    return folder / PAGE


def render_concepts(study: ConceptStudy, *, model: str, outcome: str, manifest: Mapping[str, Any]) -> str:
    """The page as text; see :func:`save_concepts`."""
    shown = [_concept(concept, OUTCOMES[outcome]) for concept in study.concepts if not concept.dead]
    return template("concepts.html.j2").render(
        model=model,
        layer=study.layer,
        outcome=OUTCOMES[outcome],
        n_images=study.report.n_images,
        n_concepts=len(study.concepts),
        concepts=shown,
        dead=[concept.number for concept in study.concepts if concept.dead],
        duplicates=[
            {"first": a, "second": b, "correlation": signed(r), "cosine": signed(c)}
            for a, b, r, c in study.report.duplicates
        ],
        fidelity=str(study.fidelity),
        trained_fidelity=str(study.trained_fidelity or ""),
        insertion=f"{study.insertion:.3g}",
        manifest=manifest,
        manifest_json=json.dumps(manifest, indent=2),
        positive=POSITIVE,
        negative=NEGATIVE,
    )


def _concept(concept: Concept, outcome: str) -> dict[str, Any]:
    greatest = max((abs(value) for _, value in concept.classes), default=0.0)
    return {
        "number": concept.number,
        "duplicates": ", ".join(map(str, concept.duplicates)),
        "mean_activation": f"{concept.mean_activation:.3g}",
        "share_active": percent(concept.share_active),
        "classes": [
            {
                "name": name,
                "value": digits(value),
                "width": f"{100 * abs(value) / greatest:.1f}" if greatest else "0",
                "supports": value > 0,
            }
            for name, value in concept.classes
        ],
        "examples": [
            cell(
                example.name,
                f"{example.name}, where concept {concept.number} is most active",
                spotlight(example.picture, example.box),
                caption=f"activity {example.peak:.2g}; the network says “{example.answer}”: the concept adds "
                f"{digits(example.contribution)} {outcome}, the autoencoder itself {digits(example.insertion)}",
            )
            for example in concept.examples
        ],
    }


def _record(study: ConceptStudy) -> dict[str, Any]:
    return {
        "layer": study.layer,
        "fidelity_on_these_pictures": study.fidelity.to_dict(),
        "fidelity_in_training": None if study.trained_fidelity is None else study.trained_fidelity.to_dict(),
        "mean_absolute_insertion_effect": study.insertion,
        "dead": [concept.number for concept in study.concepts if concept.dead],
        "duplicates": [list(pair) for pair in study.report.duplicates],
        "concepts": [
            {
                "concept": concept.number,
                "share_active": concept.share_active,
                "mean_contributions": dict(concept.classes),
                "examples": [example.name for example in concept.examples],
            }
            for concept in study.concepts
        ],
    }
