"""The values that an intervention's donors have at a site."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.trials.downstream import Observed, Place
from ce_plugin.trials.forward import Forward
from ce_plugin.trials.setting import rows_of_args

__all__ = ["donated"]

_ROWS = 16


def donated(
    intervention: Intervention,
    inputs: tuple[Tensor, ...],
    context: Context,
    forward: Forward | None = None,
    place: Place | None = None,
    args: tuple[object, ...] = (),
) -> tuple[Tensor, ...] | None:
    """What ``context.donors`` is to be: the values at the site of the inputs that the intervention names.

    Args:
        intervention: names them.
        inputs: the examples' own inputs, (N, ...) each.
        context: ids and seed.
        forward, place, args: the network, the site and additional arguments; without a place the site is the input.

    Returns:
        One tensor for each tensor of the site, or None where the intervention needs no donors.
    """
    donors = intervention.donors(inputs, context)
    if donors is None:
        return None
    if place is None or forward is None:
        return tuple(intervention.collect([donor]) for donor in donors)
    return (intervention.collect(_batches(Observed(forward, place, once=False), donors, args, len(inputs[0]))),)


def _batches(observed: Observed, donors: tuple[Tensor, ...], args: tuple[object, ...], n: int) -> Iterator[Tensor]:
    # One row at a time first would say nothing here: a layer's value takes no more memory than a pass to it.
    for start in range(0, len(donors[0]), _ROWS):
        rows = torch.arange(start, min(start + _ROWS, len(donors[0])))
        some = tuple(donor[rows.to(donor.device)] for donor in donors)
        # Arguments of the examples go with their counterparts; a reference set of another length takes them whole.
        own = rows_of_args(args, n, rows) if len(donors[0]) == n else args
        yield observed.at_site(some, own)
