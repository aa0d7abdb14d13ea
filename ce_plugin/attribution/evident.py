"""Evidence set on the inputs, and evidence that must be held at layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ce_plugin.errors import NoChangeWarning
from ce_plugin.interventions import Context, Intervention
from ce_plugin.sites import ConceptSite, Evidence, InputSite, LayerSite, Units
from ce_plugin.trials import Forward
from ce_plugin.trials.donors import donated
from ce_plugin.trials.held import Held, Hold
from ce_plugin.trials.located import place_of
from ce_plugin.trials.values import checked_values

__all__ = ["evident", "held"]


def evident(
    inputs: tuple[Tensor, ...], evidences: Sequence[Evidence], context: Context, draw: int
) -> tuple[Tensor, ...]:
    """The inputs with their evidence set, one evidence after the other; what is set at layers is passed over.

    Args:
        inputs: (N, ...) each.
        evidences: in the order in which they are set.
        context: ids and seed of this draw.
        draw: which of the draws of random evidence.

    Warns:
        NoChangeWarning: an evidence changes nothing.
    """
    for order, evidence in enumerate(evidences):
        if not isinstance(evidence.site, InputSite):
            continue
        units = evidence.site.units_of(inputs)
        rows = _rows(evidence, units, context.ids, draw, order)
        masks = [mask.to(inputs[0].device) for mask in units.masks(rows, torch.arange(len(rows)))]
        donors = donated(evidence.intervention, inputs, context)
        values = [
            checked_values(evidence.intervention, x, replace(context, position=k, mask=mask, donors=donors))
            for k, (x, mask) in enumerate(zip(inputs, masks, strict=True))
        ]
        if not bool(torch.cat([(x != v).flatten() for x, v in zip(inputs, values, strict=True)]).any()):
            _warn_no_change(evidence.intervention)
        inputs = tuple(torch.where(m, v, x) for m, v, x in zip(masks, values, inputs, strict=True))
    return inputs


def held(
    forward: Forward,
    inputs: tuple[Tensor, ...],
    args: tuple[object, ...],
    evidences: Sequence[Evidence],
    context: Context,
    draw: int,
) -> tuple[Forward, tuple[object, ...]]:
    """The network whose layers hold their evidence, and its additional arguments; itself where there is none."""
    holds = []
    for order, evidence in enumerate(evidences):
        site = evidence.site
        if isinstance(site, (LayerSite, ConceptSite)):
            place = place_of(site, forward.modules)
            donors = donated(evidence.intervention, inputs, context, forward, place, args)

            def chosen(n_units: int, evidence: Evidence = evidence, order: int = order) -> Tensor:
                return torch.stack([evidence.assignment(n_units, i, draw, order) for i in context.ids])

            holds.append(Hold(site, place, evidence.intervention, replace(context, donors=donors), chosen))
    if not holds:
        return forward, args
    return Held(forward, holds), (*args, torch.arange(len(context.ids)))


def _rows(evidence: Evidence, units: Units, ids: tuple[int, ...], draw: int, order: int) -> Tensor:
    chosen = [evidence.assignment(int(units.n_units[i]), one, draw, order) for i, one in enumerate(ids)]
    return torch.stack([pad(row, (0, units.width - len(row))) for row in chosen])


def _warn_no_change(intervention: Intervention) -> None:
    warnings.warn(
        f"The evidence {intervention!r} changes nothing in any example. Check its fill or region, and "
        "`normalization=`.",
        NoChangeWarning,
        stacklevel=7,
    )
