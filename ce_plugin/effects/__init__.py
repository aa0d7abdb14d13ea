"""The answer: from the outcomes of trials to effects, with errors, intervals and p-values."""

from __future__ import annotations

from ce_plugin.effects.carrier_sets import Carriers, carried, carriers, nested_sets, next_sizes, plot_carriers, ranking
from ce_plugin.effects.estimate import Estimate, plot_estimate
from ce_plugin.effects.estimators import (
    RIDGE,
    Effects,
    adjusted,
    difference_in_means,
    exact_difference,
    interactions,
)
from ce_plugin.effects.inference import benjamini_hochberg, half_width, p_values, t_interval
from ce_plugin.effects.mediation import Mediation, MediationEffects, Ratio, Shares, mediation_effects, ratio_of_means
from ce_plugin.effects.outcomes import OUTCOMES, Outcome, check_outcome, resolve_outcome
from ce_plugin.effects.screening import FlipOutcome, Interactions, pairwise, screen

__all__ = [
    "OUTCOMES",
    "RIDGE",
    "Carriers",
    "Effects",
    "Estimate",
    "FlipOutcome",
    "Interactions",
    "Mediation",
    "MediationEffects",
    "Outcome",
    "Ratio",
    "Shares",
    "adjusted",
    "benjamini_hochberg",
    "carried",
    "carriers",
    "check_outcome",
    "difference_in_means",
    "exact_difference",
    "half_width",
    "interactions",
    "mediation_effects",
    "nested_sets",
    "next_sizes",
    "p_values",
    "pairwise",
    "plot_carriers",
    "plot_estimate",
    "ranking",
    "ratio_of_means",
    "resolve_outcome",
    "screen",
    "t_interval",
]
