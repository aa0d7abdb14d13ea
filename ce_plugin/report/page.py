"""The report as one HTML file with its pictures inside, and the manifest beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from ce_plugin.errors import FileError, expected
from ce_plugin.report.findings import OUTCOMES, Answer, Case, ClassMaps, Plan, Study, share
from ce_plugin.visualization import NEGATIVE, POSITIVE, data_uri, magnify, overlay

__all__ = ["check_out", "render", "save_report"]

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
        todo = "Choose another name, or allow its report to be replaced with --force (force=True)."
        raise FileError(expected("out", "a folder that does not exist yet", repr(str(folder)), todo))
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
) -> Path:
    """Write ``report.html`` and ``manifest.json``; each appears only when it is complete.

    Args:
        studies: one per photograph.
        out: the folder; see :func:`check_out`.
        model: the network's name.
        plan: what was run.
        experiment: a few words on what a trial is, for the reader.
        manifest: see :func:`ce_plugin.report.build_manifest`.
        force: whether an existing report is replaced.
        incomplete: what is missing, where something is.

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
    page = render(studies, model=model, plan=plan, experiment=experiment, manifest=manifest, incomplete=incomplete)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((MANIFEST, json.dumps(manifest, indent=2) + "\n"), (PAGE, page)):
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)
    return folder / PAGE


def render(
    studies: Sequence[Study],
    *,
    model: str,
    plan: Plan,
    experiment: str,
    manifest: Mapping[str, Any],
    incomplete: str = "",
) -> str:
    """The page as text; see :func:`save_report`.

    Example:
        >>> import torch
        >>> from ce_plugin.report import build_manifest
        >>> manifest = build_manifest(arguments={}, command=[], seed=0, inputs={}, model=torch.nn.Linear(1, 1))
        >>> render([], model="net", plan=Plan(), experiment="", manifest=manifest).split()[:2]
        ['<!DOCTYPE', 'html>']
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ce_plugin"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    exact = all(case.exact for study in studies for case in study.cases)
    return environment.get_template("report.html.j2").render(
        model=model,
        photographs=[_photograph(study, plan) for study in studies],
        manifest=manifest,
        manifest_json=json.dumps(manifest, indent=2),
        experiment=experiment,
        outcome=OUTCOMES[plan.outcome],
        scope_text=_scope_text(plan),
        incomplete=incomplete,
        positive=POSITIVE,
        negative=NEGATIVE,
        **_outline_words(exact, plan),
    )


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


def _photograph(study: Study, plan: Plan) -> dict[str, Any]:
    return {
        "name": study.name,
        "explained": study.cases[0].explained.name,
        "cases": [_case(case, plan) for case in study.cases],
    }


def _case(case: Case, plan: Plan) -> dict[str, Any]:
    best = case.top[0]
    tags = {None: ("", ""), True: ("answer changed", "bad"), False: ("answer unchanged", "good")}
    return {
        "name": case.name,
        "answer": best.name,
        "p_answer": _probability(best.probability),
        "p_explained": _probability(case.explained.probability),
        "log_odds": _signed(case.explained.log_odds),
        "changed": bool(case.success),
        "tag": tags[case.success][0],
        "tag_class": tags[case.success][1],
        "outlined": f"{case.maps[0].n_outlined} of {case.maps[0].n_units}",
        "passes": f"{sum(case.passes.values()):,}",
        "seconds": f"{sum(case.seconds.values()):.1f}",
        "cells": _cells(case, plan),
        "cost": _cost(case),
    }


def _cells(case: Case, plan: Plan) -> list[dict[str, Any]]:
    """The pictures of one evidence, four to a row."""
    # One scale for both classes: which of two answers a patch moves more can then be seen.
    scale = max(float(maps.contribution.abs().max()) for maps in case.maps)
    title = "The photograph" if case.perturbation is None else f"After {case.name}"
    seen = _cell(title, f"{case.name} picture", case.picture, top=[_top(answer) for answer in case.top])
    rows = [[seen, *_map_cells(case, case.maps[0], plan, scale)]]
    if case.perturbation is not None:
        shown, caption = _visible(case.perturbation)
        rows.append([_cell("What the attack changed", f"perturbation of {case.name}", shown, caption=caption)])
        if len(case.maps) > 1:
            rows[1] += _map_cells(case, case.maps[1], plan, scale)
        else:
            words = f"The answer is still “{case.top[0].name}”, so there is no second answer to explain."
            rows[1].append({"text": words})
    return [cell for row in rows for cell in row]


def _visible(perturbation: Tensor) -> tuple[Tensor, str]:
    """A perturbation for the eye, and what was done to make it visible."""
    changed = perturbation.abs() > 1e-5
    if not changed.any():
        return magnify(perturbation)[0], "nothing was changed"
    if float(changed.any(dim=0).float().mean()) > 0.01:
        shown, factor = magnify(perturbation)
        return shown, f"shown {factor:g} times as large, on gray"
    # Single pixels are lost when the page is scaled: each is drawn three times as wide and high.
    up, down = max_pool2d(perturbation, 3, 1, 1), -max_pool2d(-perturbation, 3, 1, 1)
    shown, factor = magnify(torch.where(up > -down, up, down))
    return (
        shown,
        f"{int(changed.sum())} of {changed.numel():,} values changed; times {factor:g}, on gray, pixels drawn 3 × 3",
    )


def _map_cells(case: Case, maps: ClassMaps, plan: Plan, scale: float) -> list[dict[str, Any]]:
    name = maps.answer.name
    what = "not zero" if case.exact else "significant"
    unit = OUTCOMES[plan.outcome]
    effect = overlay(maps.contribution, case.picture, scale=scale or None, significant=maps.outlined)
    caption = f"full colour is ±{scale:.2g} {unit}; {maps.n_outlined} of {maps.n_units} patches {what}"
    cells = [_cell(f"Causal effect on “{name}”", f"causal effects on {name}, {case.name}", effect, caption=caption)]
    for label, values in (("Grad-CAM", maps.grad_cam), ("Saliency", maps.saliency)):
        if values is None:
            cells.append({"text": f"{label} needs a late convolution; this network has none."})
        else:
            # A few pixels have gradients far above all others, which would leave the rest colourless.
            high = float(values.double().quantile(0.995))
            shown = overlay(values, case.picture, scale=high or None, sign="positive")
            empty = "" if values.any() else "zero everywhere"
            cells.append(_cell(f"{label} of “{name}”", f"{label} of {name}, {case.name}", shown, caption=empty))
    return cells


def _cell(title: str, alt: str, shown: Any, *, caption: str = "", top: Any = None) -> dict[str, Any]:
    raw = isinstance(shown, Tensor)
    return {"title": title, "alt": alt, "uri": data_uri(shown), "caption": caption, "top": top, "raw": raw, "text": ""}


def _top(answer: Answer) -> dict[str, str]:
    return {
        "name": answer.name,
        "probability": _probability(answer.probability),
        "percent": f"{100 * answer.probability:.1f}",
        "log_odds": _signed(answer.log_odds),
    }


def _probability(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _cost(case: Case) -> str:
    parts = [f"{case.trials} trials"]
    for purpose, passes in case.passes.items():
        parts.append(f"{purpose}: {passes:,} forward passes, {case.seconds[purpose]:.1f} s")
    settings = ", ".join(f"{key} {value}" for key, value in case.settings.items())
    return " · ".join([*parts, *([f"attack settings: {settings}"] if settings else [])])
