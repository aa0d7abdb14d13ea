"""The section of a layer: effect maps, and the channels that carry an attack on one image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ce_plugin.attribution import CausalEffectMap, CausalMediation
from ce_plugin.effects import nested_sets, next_sizes, ranking
from ce_plugin.errors import CEPluginError
from ce_plugin.evaluation import rank_correlation
from ce_plugin.interventions import Patch
from ce_plugin.networks.forward import double
from ce_plugin.report.answer import told_channels
from ce_plugin.report.photograph import OUTCOMES, Carried, Case, LayerCase, LayerStudy, Meter, Plan, Study
from ce_plugin.report.sections import Section, cell, percent, rendered, signed
from ce_plugin.visualization import overlay

# Channels on the page, and in the manifest.
_SHOWN, _RECORDED = 8, 20


@dataclass(frozen=True)
class LayerSection(Section[LayerStudy]):
    """The channels of one layer: effect maps beside Grad-CAM, and what carries each attack."""

    plan: Plan
    layer: str
    name, template = "layer", "layer.html.j2"

    def run(self, study: Study) -> LayerStudy:
        """Maps and carriers; or the reason why there are none.

        The report is about the photograph, and a layer that cannot be looked at does not take the rest of it away.
        """
        layer, model, clean = self.layer, study.net.model, study.inputs
        meter, cases, head = Meter(model), list[LayerCase](), None
        options: dict[str, Any] = {"outcome": self.plan.outcome, "seed": self.plan.seed}

        def enlarged(small: Tensor) -> Tensor:
            """A map (1, 1, h, w) at the size of the photograph, (H, W), on the CPU."""
            large: Tensor = CausalEffectMap.interpolate(small, tuple(clean.shape[2:]), "bilinear")
            return double(large[0, 0].detach())

        try:
            # Of the logit, as Grad-CAM is: the odds against the answer under attack would drown what speaks for the
            # class.
            explainer = CausalEffectMap(model, layer, outcome="logit", seed=self.plan.seed)
            for case in study.cases:
                study.progress(f"{study.name}: {case.name}, channels")
                with meter("effects of the channels"):
                    found = enlarged(explainer.attribute(case.inputs, study.target))
                if not cases:
                    cases.append(LayerCase(case, found))
                    with meter("the strongest together, and random ones"):
                        head = told_channels(
                            study.net, layer, clean, study.target, [one.index for one in case.top], **options
                        )
                    continue
                with meter("what carries the attack"):
                    patched = CausalEffectMap(model, layer, Patch(case.inputs), **options)
                    carried_map = enlarged(patched.attribute(clean, study.target))
                    mediation = CausalMediation(model, layer, case.inputs, **options)
                    carried = carried_by(mediation, clean, study.target)
                cases.append(LayerCase(case, found, _correlation(cases[0], case, found), carried, carried_map))
        except CEPluginError as error:
            return LayerStudy(layer, note=str(error), passes=meter.passes, seconds=meter.seconds)
        return LayerStudy(layer, tuple(cases), told=head, passes=meter.passes, seconds=meter.seconds)

    def record(self, found: LayerStudy) -> dict[str, Any]:
        """Rank correlations, and what the channels carry."""
        evidence: dict[str, Any] = {one.case.name: {} for one in found.cases}
        for one in found.cases:
            if one.correlation:
                # JSON knows no NaN, which a constant map has.
                evidence[one.case.name]["rank_correlation_with_clean"] = {
                    method: None if math.isnan(value) else value for method, value in one.correlation.items()
                }
            if one.carried is not None:
                evidence[one.case.name]["carried"] = carried_record(one.carried, top=_RECORDED)
        answer = {} if found.told is None else {"answer": found.told.record()}
        return {"name": found.name, **({"note": found.note} if found.note else {}), **answer, "evidence": evidence}

    def render(self, found: LayerStudy) -> dict[str, Any]:
        """A row of Figure 3 of the paper for each evidence, and the best carriers of each attack."""
        outcome = OUTCOMES[self.plan.outcome]
        attacks = [
            _attack(one.case, one.carried, one.carried_map, outcome)
            for one in found.cases
            if one.carried is not None and one.carried_map is not None
        ]
        return {
            "layer": found,
            "channels_told": "" if found.told is None else rendered("channels.html.j2", found.told.render(outcome)),
            "outcome": outcome,
            "explained": found.cases[0].case.explained.name if found.cases else "",
            "rows": [{"found": one, "case": one.case, "cells": _cells(one)} for one in found.cases],
            "attacks": attacks,
            "cut": any(attack["carried"].cut for attack in attacks),
            "channels": len(attacks[0]["carried"].labels) if attacks else 0,
        }


def _correlation(clean: LayerCase, case: Case, effect_map: Tensor) -> dict[str, float]:
    """How far each method's map keeps its order under attack."""
    found = {"Causal effect map": float(rank_correlation(clean.effect_map[None], effect_map[None]))}
    before, after = clean.case.maps[0].grad_cam, case.maps[0].grad_cam
    if before is not None and after is not None:
        found["Grad-CAM"] = float(rank_correlation(before[None], after[None]))
    return found


def _cells(found: LayerCase) -> list[dict[str, Any]]:
    """The photograph, its causal effect map, and Grad-CAM at the same layer."""
    case = found.case
    name, grad_cam = case.explained.name, case.maps[0].grad_cam
    scale = float(found.effect_map.abs().max())
    title = "The photograph" if case.success is None else f"After {case.name}"
    effect = overlay(found.effect_map, case.picture, scale=scale or None)
    caption = f"full colour is ±{scale:.2g} of the logit"
    cells = [
        cell(title, f"{case.name} seen", case.picture),
        cell(f"Causal effect map of “{name}”", f"causal effect map of {name}, {case.name}", effect, caption=caption),
    ]
    if grad_cam is None:
        return [*cells, {"text": "Grad-CAM needs a late convolution; this network has none."}]
    shown = overlay(grad_cam, case.picture, scale=float(grad_cam.max()) or None, sign="positive")
    alt, caption = f"Grad-CAM of {name}, {case.name}, at the layer", "" if grad_cam.any() else "zero everywhere"
    return [*cells, cell(f"Grad-CAM of “{name}”", alt, shown, caption=caption)]


def _attack(case: Case, carried: Carried, carried_map: Tensor, outcome: str) -> dict[str, Any]:
    """The channels that carry an attack, best first, and where they do."""
    best = carried.order[:_SHOWN]
    longest = max((abs(carried.share(unit)) for unit in best), default=0.0)
    alt = f"where the channels that carry {case.name} are"
    caption = f"{outcome} of “{case.explained.name}”: {signed(carried.total)}"
    return {
        "cell": cell(case.name, alt, overlay(carried_map, case.picture), caption=caption),
        "channels": [
            {
                "name": f"channel {carried.labels[unit]}",
                "share": percent(carried.share(unit)),
                "width": f"{100 * max(carried.share(unit), 0.0) / longest:.1f}" if longest else "0",
            }
            for unit in best
        ],
        "carried": carried,
    }


# A smaller change of the outcome, relative to the outcome, is rounding.
_NOTHING = 1e-5
# Sets in one round of the search.
_ROUND = 8


def carried_by(
    mediation: CausalMediation, clean: Tensor, target: int, *, levels: Sequence[float] = (0.5, 0.9)
) -> Carried:
    """What the channels of a layer carry of an attack's effect on one image.

    The sets that answer "how many?" are chosen and run on the same image, so that their sizes are optimistic;
    :meth:`ce_plugin.CausalMediation.carriers` chooses on some images and tests on others.

    Args:
        mediation: of the layer, with the attacked image as its counterpart.
        clean: the image, (1, ...).
        target: class whose outcome is meant.
        levels: shares of the total effect.

    Returns:
        Natural indirect effects of all channels, and the sizes of the sets.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> clean = torch.rand(1, 1, 4, 4)
        >>> found = carried_by(CausalMediation(net, "1", clean + 0.3), clean, target=0)
        >>> found.indirect.shape, sorted(found.needed)
        (torch.Size([4]), [0.5, 0.9])
    """
    found = mediation.estimate(clean, target)
    total, indirect = float(found.total[0, 0]), double(found.indirect[0, :, 0])
    reference = 0.0 if found.reference is None else float(found.reference[0, 0])
    if abs(total) <= _NOTHING * max(1.0, abs(reference)):
        return Carried(total, indirect, tuple(found.unit_labels), (), dict.fromkeys(levels), found.cut)
    order = ranking(found)
    curve: dict[int, float] = {}
    hint = [len(chosen) for chosen in nested_sets(order)]
    while hint:
        joint = mediation.estimate(clean, target, sets=nested_sets(order, hint)).indirect[0, :, 0]
        curve.update(zip(hint, (double(joint) / total).tolist(), strict=True))
        sizes = sorted(curve)
        hint = _between(sizes, next_sizes(sizes, torch.tensor([curve[k] for k in sizes]), levels))
    needed = {level: next((k for k in sizes if curve[k] >= level), None) for level in levels}
    return Carried(total, indirect, tuple(found.unit_labels), order, needed, found.cut)


def _between(sizes: Sequence[int], middles: Sequence[int]) -> list[int]:
    """Several sizes round each middle, up to the sizes that are known: fewer rounds, each of which has a price."""
    chosen = set(middles)
    for middle in middles:
        low, high = max(k for k in sizes if k < middle), min(k for k in sizes if k > middle)
        step = max(1, round((high - low) / _ROUND))
        chosen.update(range(low + step, high, step))
    return sorted(chosen)


def carried_record(carried: Carried, *, top: int) -> dict[str, Any]:
    """What the channels carry of an attack: the strongest ones, and how many are needed.

    Args:
        carried: on one image.
        top: number of channels.

    Example:
        >>> import torch
        >>> found = Carried(-2.0, torch.tensor([-0.5, -1.5]), ("0", "1"), (1, 0), {0.5: 1}, False)
        >>> carried_record(found, top=1)["channels"]
        [{'channel': '1', 'indirect_effect': -1.5, 'share': 0.75}]
    """
    return {
        "total_effect": carried.total,
        "channels": [
            {
                "channel": carried.labels[unit],
                "indirect_effect": float(carried.indirect[unit]),
                "share": carried.share(unit),
            }
            for unit in carried.order[:top]
        ],
        "channels_needed": {f"{level:g}": k for level, k in carried.needed.items()},
        "chosen_and_tested_on": "the same image",
        "layer_is_a_cut": carried.cut,
    }
