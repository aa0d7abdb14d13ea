"""Evidence at layers: values that hold in every pass of the network."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.sites import ConceptSite, LayerSite
from ce_plugin.trials.downstream import Place
from ce_plugin.trials.forward import Forward
from ce_plugin.trials.hooks import intercepted
from ce_plugin.trials.values import checked_values

__all__ = ["Held", "Hold"]


@dataclass(frozen=True)
class Hold:
    """One evidence at a layer.

    Args:
        site, place: where.
        intervention: what is set.
        context: of all N examples.
        chosen: from a number of units to what is set for each example, bool (N, U).
    """

    site: LayerSite | ConceptSite
    place: Place
    intervention: Intervention
    context: Context
    chosen: Callable[[int], Tensor]

    def __call__(self, value: Tensor, examples: Tensor) -> Tensor:
        """The layer's value with the evidence set, for rows of these examples."""
        own = value if self.place.encoder is None else self.place.encoder(value)
        units = self.site.units_of((own,))
        rows = self.chosen(units.width)[examples.cpu()]
        (mask,) = units.masks(rows, torch.zeros(len(rows), dtype=torch.int64))
        mask = mask.to(own.device)
        context = self.context.select(examples.tolist())
        do = checked_values(self.intervention, own, replace(context, mask=mask))
        new = torch.where(mask, do, own)
        return new if self.place.decoder is None else self.place.decoder(new)


class Held(Forward):
    """A network some of whose layers hold evidence; its last additional argument is each row's example.

    Args:
        forward: the network.
        holds: in the order in which they are set.
    """

    def __init__(self, forward: Forward, holds: list[Hold]) -> None:
        self.forward, self.holds = forward, holds
        self.modules, self.learned = forward.modules, {}

    def __call__(self, inputs: tuple[Tensor, ...], args: tuple[object, ...] = ()) -> dict[str, Tensor]:
        *rest, examples = args
        if not isinstance(examples, Tensor):
            raise TypeError("the last argument holds the examples' indices")
        with ExitStack() as stack:
            for hold in self.holds:
                act = partial(hold, examples=examples)
                stack.enter_context(intercepted(hold.place.point, act, hold.place.name))
            return self.forward(inputs, tuple(rest))
