"""What an experiment will cost, and by which route it will be run."""

from __future__ import annotations

from ce_plugin.attribution.experiment import Experiment
from ce_plugin.trials import Cost
from ce_plugin.trials.downstream import Downstream

__all__ = ["cost_of"]


def cost_of(experiment: Experiment) -> Cost:
    """Trials and passes of a run; one example passes once, to see how many outcomes it has."""
    heads = experiment.look()
    outcome, design, n = experiment.outcome, experiment.design, experiment.n
    one = experiment.target is not None or experiment.predicted_only or not outcome.per_class
    outcomes = sum(1 if one else head.numel() for head in heads.values())
    interventions = (experiment.intervention, *(evidence.intervention for evidence in experiment.evidences))
    extra = sum(intervention.forward_equivalents for intervention in interventions)
    # The outcome with all units set, which some designs compare with, is one more trial.
    every = experiment.setting.repeats if design.reference == "all" else 0
    route, each, once = _route(experiment)
    passes = experiment.trials * each + experiment.n_draws * n * (once + every + extra) + experiment.checks_first
    if route == "full":
        passes += experiment.runner.layout_passes(experiment.inputs, experiment.args, experiment.trials)
    return Cost(experiment.trials, passes, route, 4 * outcomes * n * max(experiment.used))


def _route(experiment: Experiment) -> tuple[str, float, float]:
    """How trials will be run, what a trial costs, and what is run once for each example, in forward passes."""
    setting, located = experiment.first_located()
    cut = located.forward
    if not isinstance(cut, Downstream) or cut.suffix is None or cut.captured is None:
        return "full", 1, 1
    share = cut.suffix.share(cut.captured)
    # A clean pass, another for what by-passes the site, and the reference.
    once = 1 + (not cut.suffix.is_cut) + share
    if located.flips is None:
        return located.route, share, once
    each = located.flips.cost(setting)
    return located.flips.route, each, once
