"""The outcome as a differentiable function of how far each unit is flipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ce_plugin.attribution.measured import Measured
from ce_plugin.errors import ModelError, UnitError, expected
from ce_plugin.sites import MaskUnits
from ce_plugin.trials import Setting
from ce_plugin.trials.located import Located
from ce_plugin.trials.values import checked_values

__all__ = ["flip_outcome"]


def flip_outcome(setting: Setting, located: Located, measured: Measured, example: int) -> Callable[[Tensor], Tensor]:
    """From states (B, U) in [0, 1] to outcomes (B, C) of one example, the site's value being h + a (do - h).

    Args:
        setting: the experiment; its units are those of a mask.
        located: runs the network from the site.
        measured: from outputs to outcomes.
        example: which one.

    Raises:
        UnitError: units that overlap.
        ModelError: several output heads.
    """
    units = setting.units
    if not isinstance(units, MaskUnits):
        todo = "Pass `feature_mask=` instead of windows."
        raise UnitError(expected("units", "units that do not overlap", "windows", todo))
    if setting.intervention.n_variants > 1 or setting.intervention.per_trial:
        raise UnitError(expected("intervention", "one with a single value for each unit", setting.intervention))
    if len(measured.reference) > 1:
        wanted, got = "a model with one output head", sorted(measured.reference)
        raise ModelError(expected("forward_func", wanted, got, "Name one with `output=`."))
    context = setting.context.select([example])
    clean = [x[example : example + 1].detach() for x in setting.inputs]
    do = [
        checked_values(setting.intervention, x, replace(context, position=position)) for position, x in enumerate(clean)
    ]

    def outcome(states: Tensor) -> Tensor:
        examples = torch.full((len(states),), example)
        padded = torch.nn.functional.pad(states, (0, units.width - states.shape[1]))
        weights = units.masks(padded, examples)
        values = tuple(x + weight.to(x.device) * (x1 - x) for x, x1, weight in zip(clean, do, weights, strict=True))
        heads = located.forward(values, setting.args_of(examples))
        (found,) = measured(heads, examples.to(states.device)).values()
        return found

    return outcome
