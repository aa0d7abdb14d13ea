"""What a page shows of a layer: the effect map beside Grad-CAM, and the channels that carry each attack."""

from __future__ import annotations

import math
from typing import Any

from ce_plugin.report.findings import OUTCOMES, Carried, Case, LayerCase, LayerStudy, Plan, Study
from ce_plugin.report.words import cell, percent, probability, signed
from ce_plugin.visualization import overlay

__all__ = ["layer_section"]

_SHOWN = 8


def layer_section(study: Study, plan: Plan) -> dict[str, Any] | None:
    """The layer's part of one photograph, for the template; None where there is nothing to say."""
    layer = study.layer
    if layer is None:
        return None
    pairs = list(zip(study.cases, layer.cases, strict=False))
    attacked = [pair for pair in pairs if pair[1].carried is not None]
    return {
        "name": layer.name,
        "note": layer.note,
        "rows": [_row(case, found) for case, found in pairs],
        "attacks": _attacks(attacked, plan),
        "cut": any(case.carried is not None and case.carried.cut for _, case in attacked),
        "channels": len(attacked[0][1].carried.labels) if attacked and attacked[0][1].carried else 0,
        "cost": _cost(layer),
    }


def _row(case: Case, found: LayerCase) -> dict[str, Any]:
    """A row of Figure 3 of the paper."""
    name, grad_cam = case.explained.name, case.maps[0].grad_cam
    scale = float(found.effect_map.abs().max())
    effect = overlay(found.effect_map, case.picture, scale=scale or None)
    cells = [
        cell("The photograph" if case.success is None else f"After {case.name}", f"{case.name} seen", case.picture),
        cell(
            f"Causal effect map of “{name}”",
            f"causal effect map of {name}, {case.name}",
            effect,
            caption=f"full colour is ±{scale:.2g} of the logit",
        ),
    ]
    if grad_cam is None:
        cells.append({"text": "Grad-CAM needs a late convolution; this network has none."})
    else:
        shown = overlay(grad_cam, case.picture, scale=float(grad_cam.max()) or None, sign="positive")
        caption = "" if grad_cam.any() else "zero everywhere"
        alt = f"Grad-CAM of {name}, {case.name}, at the layer"
        cells.append(cell(f"Grad-CAM of “{name}”", alt, shown, caption=caption))
    return {
        "name": case.name,
        "answer": case.top[0].name,
        "p_explained": probability(case.explained.probability),
        "value": signed(case.explained.log_odds),
        "correlations": [
            {"method": method, "value": "undefined" if math.isnan(value) else signed(value)}
            for method, value in found.correlation.items()
        ],
        "cells": cells,
    }


def _attacks(attacked: list[tuple[Case, LayerCase]], plan: Plan) -> list[dict[str, Any]]:
    """The channels that carry each attack, best first."""
    shown = []
    for case, found in attacked:
        if found.carried is None or found.carried_map is None:
            continue
        picture = overlay(found.carried_map, case.picture)
        carried = found.carried
        alt = f"where the channels that carry {case.name} are"
        caption = f"{OUTCOMES[plan.outcome]} of “{case.explained.name}”: {signed(carried.total)}"
        shown.append(
            {
                "cell": cell(case.name, alt, picture, caption=caption),
                "channels": _channels(carried),
                "needed": [
                    {"level": percent(level), "channels": "not reached" if k is None else f"{k:,}"}
                    for level, k in carried.needed.items()
                ],
                "none": not carried.order,
            }
        )
    return shown


def _channels(carried: Carried) -> list[dict[str, str]]:
    best = carried.order[:_SHOWN]
    longest = max((abs(carried.share(unit)) for unit in best), default=0.0)
    return [
        {
            "name": f"channel {carried.labels[unit]}",
            "share": percent(carried.share(unit)),
            "width": f"{100 * max(carried.share(unit), 0.0) / longest:.1f}" if longest else "0",
        }
        for unit in best
    ]


def _cost(layer: LayerStudy) -> str:
    parts = [
        f"{purpose}: {layer.passes.get(purpose, 0):,} passes through the whole network, {seconds:.1f} s"
        for purpose, seconds in layer.seconds.items()
    ]
    return " · ".join(parts)
