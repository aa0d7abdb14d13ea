"""The answer: from the outcomes of trials to effects, with errors, intervals and p-values."""

from __future__ import annotations

from ce_plugin._lazy import deprecated_names
from ce_plugin.effects.carrier_sets import Carriers, carried, carriers, nested_sets, next_sizes, plot_carriers, ranking
from ce_plugin.effects.estimate import Estimate
from ce_plugin.effects.estimators import Effects, adjusted, difference_in_means, exact_difference, interactions
from ce_plugin.effects.inference import benjamini_hochberg, half_width, p_values, t_interval
from ce_plugin.effects.mediation import Mediation, MediationEffects, Shares, mediation_effects, ratio_of_means
from ce_plugin.effects.outcomes import Outcome, resolve_outcome
from ce_plugin.effects.plots import plot_estimate
from ce_plugin.effects.region import RegionTest
from ce_plugin.effects.screening import Interactions, pairwise, screen

__all__ = [
    "Carriers",
    "Effects",
    "Estimate",
    "Interactions",
    "Mediation",
    "MediationEffects",
    "Outcome",
    "RegionTest",
    "Shares",
    "adjusted",
    "benjamini_hochberg",
    "carried",
    "carriers",
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

__getattr__ = deprecated_names(
    __name__,
    {
        "OUTCOMES": "ce_plugin.effects.outcomes.OUTCOMES",
        "RIDGE": "ce_plugin.effects.estimators.RIDGE",
        "FlipOutcome": "ce_plugin.effects.screening.FlipOutcome",
        "Ratio": "ce_plugin.effects.mediation.Ratio",
        "check_outcome": "ce_plugin.effects.outcomes.check_outcome",
    },
)
