"""The report as one HTML file with its pictures inside, and the manifest beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ce_plugin.errors import FileError, expected
from ce_plugin.files import write_files
from ce_plugin.report.cells import photograph
from ce_plugin.report.detector_cells import evaluation_section
from ce_plugin.report.detector_findings import DetectorTrial
from ce_plugin.report.findings import OUTCOMES, Plan, Study, share
from ce_plugin.report.record import record, trial_record
from ce_plugin.visualization import NEGATIVE, POSITIVE

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["check_out", "render", "save_report", "template"]

PAGE, MANIFEST = "report.html", "manifest.json"


def check_out(out: str | Path, *, force: bool = False) -> Path:
    """Refuse a folder that must not, or cannot, be written to; meant to be called before any work.

    Args:
        out: the folder of the report.
        force: it may exist; then only the report's own two files in it are replaced.

    Returns:
        The folder, which is not made yet.

    Raises:
        FileError: it exists and ``force`` is False; it is a file; or it cannot be made here.

    Example:
        >>> check_out("a-new-folder").name
        'a-new-folder'
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FileError(expected("out", "a folder", f"the file {str(folder)!r}", "Choose another name."))
    if folder.exists() and not force:
        hint = "Choose another name, or allow its report to be replaced with --force (force=True)."
        raise FileError(expected("out", "a folder that does not exist yet", repr(str(folder)), hint))
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise FileError(expected("out", "a folder that can be written to", f"{str(folder)!r} in {str(nearest)!r}"))
    return folder


def save_report(
    studies: Sequence[Study],
    out: str | Path,
    *,
    model: str,
    plan: Plan,
    experiment: str,
    manifest: Mapping[str, Any],
    force: bool = False,
    incomplete: str = "",
    digits: DetectorTrial | None = None,
) -> Path:
    """Write ``report.html`` and ``manifest.json``; each appears only when it is complete.

    Args:
        studies: one per photograph.
        out: the folder; see :func:`check_out`.
        model: the network's name.
        plan: what was run.
        experiment: a few words on what a trial is, for the reader.
        manifest: see :func:`ce_plugin.report.build_manifest`; the findings are added to it.
        force: whether an existing report is replaced.
        incomplete: what is missing, where something is.
        digits: a detector tried on handwritten digits, shown below the photographs.

    Returns:
        Path of the page.

    Raises:
        FileError: see :func:`check_out`.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from ce_plugin.report import build_manifest
        >>> manifest = build_manifest(arguments={}, command=[], seed=0, inputs={}, model=torch.nn.Linear(1, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = save_report([], Path(folder, "new"), model="net", plan=Plan(), experiment="", manifest=manifest)
        ...     page.name, page.stat().st_size > 0
        ('report.html', True)
    """
    folder = check_out(out, force=force)
    found = record(studies) | ({} if digits is None else {"detector on handwritten digits": trial_record(digits)})
    manifest = {**manifest, "findings": found}
    page = render(
        studies, model=model, plan=plan, experiment=experiment, manifest=manifest, incomplete=incomplete, digits=digits
    )
    write_files(folder, {MANIFEST: json.dumps(manifest, indent=2) + "\n", PAGE: page})
    return folder / PAGE


def render(
    studies: Sequence[Study],
    *,
    model: str,
    plan: Plan,
    experiment: str,
    manifest: Mapping[str, Any],
    incomplete: str = "",
    digits: DetectorTrial | None = None,
) -> str:
    """The page as text; see :func:`save_report`.

    Example:
        >>> import torch
        >>> from ce_plugin.report import build_manifest
        >>> manifest = build_manifest(arguments={}, command=[], seed=0, inputs={}, model=torch.nn.Linear(1, 1))
        >>> render([], model="net", plan=Plan(), experiment="", manifest=manifest).split()[:2]
        ['<!DOCTYPE', 'html>']
    """
    exact = all(case.exact for study in studies for case in study.cases)
    return template("report.html.j2").render(
        model=model,
        photographs=[photograph(study, plan) for study in studies],
        manifest=manifest,
        manifest_json=json.dumps(manifest, indent=2),
        experiment=experiment,
        outcome=OUTCOMES[plan.outcome],
        scope_text=_scope_text(plan),
        incomplete=incomplete,
        trial=None if digits is None else evaluation_section(digits, str),
        positive=POSITIVE,
        negative=NEGATIVE,
        **_outline_words(exact, plan),
    )


def template(name: str) -> Template:
    """A template of the package; names that are not given are errors, and what is inserted is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ce_plugin"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(name)


def _outline_words(exact: bool, plan: Plan) -> dict[str, str]:
    if exact:
        return {
            "others": "",
            "outline_text": "Outlined patches are not zero: their effect exceeds the noise of floating point.",
            "outline_label": "not zero",
            "outline_column": "Patches not zero",
        }
    return {
        "others": ", averaged over what happens to the other patches",
        "outline_text": "Outlined patches are statistically different from zero; of all outlined patches of a map "
        f"about {plan.fdr:.0%} or fewer are expected to be false.",
        "outline_label": f"significant (false discovery rate {plan.fdr:.0%})",
        "outline_column": "Significant patches",
    }


def _scope_text(plan: Plan) -> str:
    if not plan.attacks:
        return ""
    sizes = []
    if set(plan.attacks) - {"jsma"}:
        sizes.append(f"by at most {share(plan.eps)} of the range from black to white in each value")
    if "jsma" in plan.attacks:
        sizes.append(f"JSMA in at most {2 * plan.jsma_pairs} values, each by as much as it likes")
    words = f"Attacks change the photograph {'; '.join(sizes)}."
    if plan.eps >= 0.1 and set(plan.attacks) - {"jsma"}:
        words += " At this size a photograph is damaged for the eye as well, so that another answer is no surprise."
    return words
