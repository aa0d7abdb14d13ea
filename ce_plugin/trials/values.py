"""The values that trials set: asked of the intervention once for each example, or once for each trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, expected
from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.trials.setting import Rows, Setting, Wanted

__all__ = ["Counterfactuals", "Values", "checked_values", "chunks", "values_of_trials"]

# For each example and each alternative value the counterfactual inputs, (1, ...) each.
Values: TypeAlias = "dict[int, list[tuple[Tensor, ...]]]"

_BYTES = 256 << 20


def _chunk_length(setting: Setting) -> int:
    each = sum(x[0].numel() * x.element_size() for x in setting.inputs) * setting.intervention.n_variants
    return max(1, _BYTES // max(each, 1))


def chunks(setting: Setting, wanted: list[Wanted]) -> Iterator[list[Wanted]]:
    """Examples in groups whose counterfactual values fit into a fixed amount of memory."""
    step = _chunk_length(setting)
    for first in range(0, len(wanted), step):
        yield wanted[first : first + step]


class Counterfactuals:
    """Supplies the counterfactual values of examples, and keeps them while the same experiment asks again.

    Args:
        laid_out: puts a tensor into the memory format in which the network takes it.
    """

    def __init__(self, laid_out: Callable[[Tensor], Tensor]) -> None:
        self._laid_out = laid_out
        self._kept: Values = {}
        self._kept_of: tuple[object, ...] = ()

    def of(self, setting: Setting, examples: list[int]) -> Values | None:
        """The values of some examples; None where they depend on the trial."""
        if setting.intervention.per_trial:
            return None
        of = (setting.inputs, setting.intervention, setting.context)
        if len(self._kept_of) != len(of) or any(a is not b for a, b in zip(self._kept_of, of, strict=True)):
            self._kept_of, self._kept = of, {}
        missing = [example for example in examples if example not in self._kept]
        values = self._kept | (self._made(setting, missing) if missing else {})
        # An attack is dear: where the examples fit into one chunk, later rounds of trials find its values here.
        if setting.n <= _chunk_length(setting):
            self._kept = values
        return values

    def _made(self, setting: Setting, examples: list[int]) -> Values:
        context = setting.context.select(examples)
        every = []
        for variant in range(setting.intervention.n_variants):
            clean = [x[examples] for x in setting.inputs]
            at = [replace(context, variant=variant, position=k) for k in range(len(clean))]
            every.append([checked_values(setting.intervention, x, c) for x, c in zip(clean, at, strict=True)])
        return {
            example: [tuple(self._laid_out(x[k : k + 1]) for x in variant) for variant in every]
            for k, example in enumerate(examples)
        }


def values_of_trials(setting: Setting, rows: Rows, clean: Tensor, mask: Tensor, position: int) -> Tensor:
    """Values that depend on the hole, (B, ...), for each alternative value in one call.

    Args:
        setting: the experiment.
        rows: the batch.
        clean: each row's own value, (B, ...).
        mask: what each row sets, broadcastable to ``clean``.
        position: which of the inputs this is.
    """
    context = replace(setting.context.select(rows.examples.tolist()), position=position)
    do = clean.clone()
    for variant in sorted(set(rows.variants.tolist())):
        here = (rows.variants == variant).nonzero()[:, 0]
        part = replace(context.select(here.tolist()), variant=variant, mask=mask[here.to(mask.device)])
        do[here.to(do.device)] = checked_values(setting.intervention, clean[here.to(do.device)], part)
    return do


def checked_values(intervention: Intervention, clean: Tensor, context: Context) -> Tensor:
    """An intervention's x', which anyone may have written, in the type and on the device of the clean value.

    Raises:
        ArgumentError: the values have another shape than ``clean``, or are not finite.
    """
    values = intervention.values(clean, context).detach()
    if values.shape != clean.shape:
        wanted = f"one whose values have the input's shape {tuple(clean.shape)}"
        raise ArgumentError(expected("intervention", wanted, f"{intervention!r} with {tuple(values.shape)}"))
    if not bool(torch.isfinite(values).all()):
        raise ArgumentError(expected("intervention", "one whose values are finite", f"NaN from {intervention!r}"))
    return values.to(clean)
