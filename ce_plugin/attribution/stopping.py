"""Trials in rounds, until every interval is narrow enough."""

from __future__ import annotations

import torch
from torch import Tensor

from ce_plugin.attribution.estimation import Answer, answers
from ce_plugin.attribution.measured import Measured
from ce_plugin.effects import half_width
from ce_plugin.trials import Runner, Setting

__all__ = ["answers_until"]

# Trials before the first look at the intervals of a run that may stop early, and between two looks.
_FIRST, _ROUND = 100, 50


def answers_until(
    setting: Setting, runner: Runner, measured: Measured, most: list[int], until: float, keep: bool
) -> dict[str, Answer]:
    """Rounds of trials; an example leaves when all its intervals are at most ``until`` to either side.

    Args:
        setting, runner, measured: the experiment.
        most: the largest number of trials of each example.
        until: half-width of the 95 % intervals.
        keep: keep the trials in the answers.
    """
    n, last = setting.n, max(most)
    outcomes: dict[str, Tensor] = {}
    active, used, done = list(range(n)), list(most), 0
    found: dict[str, Answer] = {}
    while active and done < last:
        stop = min(last, _FIRST if done == 0 else done + _ROUND)
        new = runner.run(setting, done, stop, measured, active)
        outcomes = {name: torch.cat([outcomes[name], new[name]], 1) if outcomes else new[name] for name in new}
        used = [min(stop, most[i]) if i in active else used[i] for i in range(n)]
        done = stop
        found = answers(setting, outcomes, measured.reference, measured, used, keep)
        active = [i for i in active if used[i] == done and _widest(setting, found, i) > until]
    return found


def _widest(setting: Setting, found: dict[str, Answer], example: int) -> float:
    """Half the width of an example's widest interval; infinite where a unit's error is not known yet."""
    widest = 0.0
    for answer in found.values():
        if answer.std_error is not None:
            own = slice(int(setting.units.n_units[example]))
            dof = None if answer.dof is None else answer.dof[example, own]
            widths = half_width(answer.std_error[example, own], dof, 0.95)
            widest = max(widest, float(widths.nan_to_num(torch.inf).max()))
    return widest
