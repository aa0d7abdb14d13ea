"""The answer: from the outcomes of trials to effects, with errors, intervals and p-values."""

from __future__ import annotations

from ce_plugin.effects.estimate import Estimate
from ce_plugin.effects.estimators import (
    RIDGE,
    Effects,
    adjusted,
    difference_in_means,
    exact_difference,
    interactions,
)
from ce_plugin.effects.inference import benjamini_hochberg, half_width, p_values, t_interval
from ce_plugin.effects.outcomes import OUTCOMES, Outcome, check_outcome, resolve_outcome

__all__ = [
    "OUTCOMES",
    "RIDGE",
    "Effects",
    "Estimate",
    "Outcome",
    "adjusted",
    "benjamini_hochberg",
    "check_outcome",
    "difference_in_means",
    "exact_difference",
    "half_width",
    "interactions",
    "p_values",
    "resolve_outcome",
    "t_interval",
]
