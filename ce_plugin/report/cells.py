"""What a page shows of one photograph: words, numbers and pictures, ready for the template."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from ce_plugin.report.findings import OUTCOMES, Answer, Case, ClassMaps, Plan, Study
from ce_plugin.report.layer_cells import layer_section
from ce_plugin.report.words import cell, probability, signed
from ce_plugin.visualization import magnify, overlay

__all__ = ["photograph"]


def photograph(study: Study, plan: Plan) -> dict[str, Any]:
    """One photograph under all evidences."""
    return {
        "name": study.name,
        "explained": study.cases[0].explained.name,
        "cases": [_case(case, plan) for case in study.cases],
        "layer": layer_section(study, plan),
    }


def _case(case: Case, plan: Plan) -> dict[str, Any]:
    best = case.top[0]
    tags = {None: ("", ""), True: ("answer changed", "bad"), False: ("answer unchanged", "good")}
    return {
        "name": case.name,
        "answer": best.name,
        "p_answer": probability(best.probability),
        "p_explained": probability(case.explained.probability),
        "log_odds": signed(case.explained.log_odds),
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
    seen = cell(title, f"{case.name} picture", case.picture, top=[_top(answer) for answer in case.top])
    rows = [[seen, *_map_cells(case, case.maps[0], plan, scale)]]
    if case.perturbation is not None:
        shown, caption = _visible(case.perturbation)
        rows.append([cell("What the attack changed", f"perturbation of {case.name}", shown, caption=caption)])
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
    cells = [cell(f"Causal effect on “{name}”", f"causal effects on {name}, {case.name}", effect, caption=caption)]
    for label, values in (("Grad-CAM", maps.grad_cam), ("Saliency", maps.saliency)):
        if values is None:
            cells.append({"text": f"{label} needs a late convolution; this network has none."})
        else:
            # A few pixels have gradients far above all others, which would leave the rest colourless.
            high = float(values.double().quantile(0.995))
            shown = overlay(values, case.picture, scale=high or None, sign="positive")
            empty = "" if values.any() else "zero everywhere"
            cells.append(cell(f"{label} of “{name}”", f"{label} of {name}, {case.name}", shown, caption=empty))
    return cells


def _top(answer: Answer) -> dict[str, str]:
    return {
        "name": answer.name,
        "probability": probability(answer.probability),
        "percent": f"{100 * answer.probability:.1f}",
        "log_odds": signed(answer.log_odds),
    }


def _cost(case: Case) -> str:
    parts = [f"{case.trials} trials"]
    for purpose, passes in case.passes.items():
        parts.append(f"{purpose}: {passes:,} forward passes, {case.seconds[purpose]:.1f} s")
    settings = ", ".join(f"{key} {value}" for key, value in case.settings.items())
    return " · ".join([*parts, *([f"attack settings: {settings}"] if settings else [])])
