"""The channels of one layer, clean and under attack: effect maps, and what carries the attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ce_plugin.attribution import CausalEffectMap, CausalMediation
from ce_plugin.errors import CEPluginError
from ce_plugin.evaluation import rank_correlation
from ce_plugin.interventions import Patch
from ce_plugin.models import VisionModel
from ce_plugin.report.carriers import carried_by
from ce_plugin.report.findings import LayerCase, LayerStudy, Plan
from ce_plugin.report.meter import Meter

__all__ = ["enlarged_map", "layer_study"]


def enlarged_map(small: Tensor, size: Sequence[int]) -> Tensor:
    """A map (1, 1, h, w) at the size of the picture, (H, W), on the CPU."""
    large: Tensor = CausalEffectMap.interpolate(small, tuple(size), "bilinear")
    return large[0, 0].detach().double().cpu()


def layer_study(
    net: VisionModel,
    layer: str,
    plan: Plan,
    seen: Mapping[str, Tensor],
    grad_cams: Sequence[Tensor | None],
    target: int,
    *,
    tell: Callable[[str], None] = lambda words: None,
) -> LayerStudy:
    """Look at one layer.

    Args:
        net: the network.
        layer: dotted name.
        plan: its outcome and seed.
        seen: name of each evidence, the clean one first, and what the network saw, (1, C, H, W).
        grad_cams: of the same class, (H, W), one for each evidence.
        target: class that is explained.
        tell: called with the name of the evidence before each.

    Returns:
        Maps and carriers; or the reason why there are none: the report is about the photograph, and a layer that
        cannot be looked at does not take the rest of it away.
    """
    meter = Meter(net.model)
    clean = next(iter(seen.values()))
    options: dict[str, Any] = {"outcome": plan.outcome, "seed": plan.seed}
    cases: list[LayerCase] = []
    try:
        # Of the logit, as Grad-CAM is: the odds against the answer under attack would drown what speaks for the class.
        explainer = CausalEffectMap(net.model, layer, outcome="logit", seed=plan.seed)
        for number, (name, inputs) in enumerate(seen.items()):
            tell(name)
            with meter("effects of the channels"):
                found = enlarged_map(explainer.attribute(inputs, target), inputs.shape[2:])
            if number == 0:
                cases.append(LayerCase(found))
                continue
            with meter("what carries the attack"):
                patched = CausalEffectMap(net.model, layer, Patch(inputs), **options).attribute(clean, target)
                carried = carried_by(CausalMediation(net.model, layer, inputs, **options), clean, target)
            cases.append(
                LayerCase(
                    found,
                    _correlation(cases[0].effect_map, found, grad_cams[0], grad_cams[number]),
                    carried,
                    enlarged_map(patched, inputs.shape[2:]),
                )
            )
    except CEPluginError as error:
        return LayerStudy(layer, note=str(error), passes=meter.passes, seconds=meter.seconds)
    return LayerStudy(layer, tuple(cases), passes=meter.passes, seconds=meter.seconds)


def _correlation(
    before: Tensor, after: Tensor, cam_before: Tensor | None, cam_after: Tensor | None
) -> dict[str, float]:
    """How far each method's map keeps its order under attack."""
    found = {"Causal effect map": float(rank_correlation(before[None], after[None]))}
    if cam_before is not None and cam_after is not None:
        found["Grad-CAM"] = float(rank_correlation(cam_before[None], cam_after[None]))
    return found
