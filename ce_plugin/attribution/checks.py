"""What is looked at before trials are run."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from ce_plugin.attribution.measured import Measured
from ce_plugin.errors import ArgumentError, NoChangeWarning, expected
from ce_plugin.trials import Setting
from ce_plugin.trials.batching import free_memory
from ce_plugin.trials.values import checked_values

__all__ = ["check_memory", "warn_unchanged"]


def warn_unchanged(setting: Setting) -> None:
    """Say so where an intervention changes nothing in an example.

    Warns:
        NoChangeWarning: it does not.
    """
    intervention = setting.intervention
    if intervention.per_trial or intervention.forward_equivalents:
        return  # unknown before the trials, or too dear to ask for twice (attacks warn by themselves)
    unchanged = torch.ones(setting.n, dtype=torch.bool)
    for variant in range(intervention.n_variants):
        for position, x in enumerate(setting.inputs):
            at = replace(setting.context, position=position, variant=variant)
            unchanged &= (checked_values(intervention, x, at) == x).reshape(setting.n, -1).all(1).cpu()
    if bool(unchanged.any()):
        warnings.warn(
            f"{intervention!r} changes nothing in example(s) {unchanged.nonzero()[:5, 0].tolist()}, so that their "
            "effects are zero by construction. Check its fill or region, and `normalization=`.",
            NoChangeWarning,
            stacklevel=6,
        )


def check_memory(setting: Setting, measured: Measured, trials: int) -> None:
    """Whether the outcomes of all trials fit into memory.

    Raises:
        ArgumentError: they do not.
    """
    size = sum(r.shape[1] * r.element_size() for r in measured.reference.values()) * setting.n * trials
    free = free_memory(setting.device)
    if size > free:
        got = f"{size / 2**30:.1f} GiB ({setting.n} examples x {trials} trials x all classes)"
        todo = "Pass `target=`, fewer examples, or coarser units."
        raise ArgumentError(expected("inputs", f"few enough for {free / 2**30:.1f} GiB of outcomes", got, todo))
