"""The network from a site on, as a forward function of the site's value: there, a layer is the input."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ce_plugin.errors import ModelError, expected
from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.networks.forward import Forward, select_heads
from ce_plugin.networks.graph import HookPoint, Suffix, SuffixConstants
from ce_plugin.networks.layers import copied, hooked
from ce_plugin.sites import ConceptSite, LayerSite
from ce_plugin.trials.batches import checked_values, rows_of_args

__all__ = [
    "SITE",
    "CapturingForward",
    "EvidenceForward",
    "ForwardFromSite",
    "LayerEvidence",
    "SiteHook",
]


# The name of the site's value among the heads of an observed pass; no user's head has it.
SITE = "\0site"


class _Reached(Exception):  # noqa: N818 - ends a pass, and is no error
    """The layer was reached; the rest of the pass is not wanted."""


@dataclass(frozen=True)
class SiteHook:
    """Where a site lies in a network.

    Args:
        name: the layer's dotted name, for messages.
        point: where the layer's value is read and set.
        encoder, decoder: of a concept autoencoder, whose code then is the site's value.
    """

    name: str
    point: HookPoint
    encoder: nn.Module | None = None
    decoder: nn.Module | None = None


class CapturingForward(Forward):
    """The network as it is, with the site's value as one more head (named ``SITE``).

    Args:
        forward: the network.
        place: the site.
        once: whether passing through the layer several times is an error, as it is where no call was named.
    """

    def __init__(self, forward: Forward, place: SiteHook, once: bool) -> None:
        self.forward, self.place, self.once = forward, place, once
        self.modules, self.learned = forward.modules, {}
        self.element: int | None = None

    def __call__(self, inputs: tuple[Tensor, ...], args: tuple[object, ...] = ()) -> dict[str, Tensor]:
        store: list[Tensor] = []
        with hooked(self.place.point, copied(store), self.place.name) as seen:
            heads = self.forward(inputs, args)
        if self.once and seen.calls > 1:
            hint = f"Say which call: `LayerSite(layer, call=0)` to `call={seen.calls - 1}`."
            got = f"{self.place.name!r}, which is passed through {seen.calls} times"
            raise ModelError(expected("layer", "one that the network passes through once", got, hint))
        self.element = seen.element
        return {**heads, SITE: self._encoded(store[0])}

    def at_site(self, inputs: tuple[Tensor, ...], args: tuple[object, ...]) -> Tensor:
        """The site's value alone; the pass ends at the layer."""
        store: list[Tensor] = []
        keep = copied(store)

        def act(value: Tensor) -> None:
            keep(value)
            raise _Reached

        try:
            with torch.inference_mode(), hooked(self.place.point, act, self.place.name):
                self.forward(inputs, args)
        except _Reached:
            pass
        with torch.inference_mode():
            value = self._encoded(store[0])
        return value.clone()

    def _encoded(self, value: Tensor) -> Tensor:
        return value if self.place.encoder is None else self.place.encoder(value)


class ForwardFromSite(Forward):
    """From values of the site, and each row's example, to the network's outputs.

    Args:
        forward: the network.
        place: the site.
        inputs, args: the examples' own inputs and additional arguments, which everything that by-passes the site
            depends on.
        suffix: runs only what depends on the site; None passes every row through the whole network.
        captured: what the suffix knows about the examples.
    """

    def __init__(
        self,
        forward: Forward,
        place: SiteHook,
        inputs: tuple[Tensor, ...],
        args: tuple[object, ...],
        suffix: Suffix | None = None,
        captured: SuffixConstants | None = None,
    ) -> None:
        self.forward, self.place = forward, place
        self.inputs, self.args = inputs, args
        self.suffix, self.captured = suffix, captured
        self.modules = forward.modules
        key = ("downstream", place.name, place.point.at_input, place.point.call, suffix is None)
        found = forward.learned.setdefault(key, {})
        self.learned = found if isinstance(found, dict) else {}

    def __call__(self, inputs: tuple[Tensor, ...], args: tuple[object, ...] = ()) -> dict[str, Tensor]:
        (values,), (examples,) = inputs, args
        if not isinstance(examples, Tensor):
            raise TypeError("examples are a tensor of indices")
        if self.suffix is not None and self.captured is not None:
            return select_heads(self.suffix.run(self.captured, values, examples), self.forward.output)
        return self.full(values, examples)

    def full(self, values: Tensor, examples: Tensor) -> dict[str, Tensor]:
        """By a pass through the whole network, with a hook that sets the layer's value."""
        layer = values if self.place.decoder is None else self.place.decoder(values)
        if self.place.point.module is None:
            return self.forward((layer,), rows_of_args(self.args, len(self.inputs[0]), examples))
        inputs = tuple(x[examples.to(x.device)] for x in self.inputs)
        with hooked(self.place.point, lambda _: layer, self.place.name):
            return self.forward(inputs, rows_of_args(self.args, len(self.inputs[0]), examples))


@dataclass(frozen=True)
class LayerEvidence:
    """One evidence at a layer.

    Args:
        site, place: where.
        intervention: what is set.
        context: of all N examples.
        chosen: from a number of units to what is set for each example, bool (N, U).
    """

    site: LayerSite | ConceptSite
    place: SiteHook
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


class EvidenceForward(Forward):
    """A network some of whose layers hold evidence; its last additional argument is each row's example.

    Args:
        forward: the network.
        holds: in the order in which they are set.
    """

    def __init__(self, forward: Forward, holds: list[LayerEvidence]) -> None:
        self.forward, self.holds = forward, holds
        self.modules, self.learned = forward.modules, {}

    def __call__(self, inputs: tuple[Tensor, ...], args: tuple[object, ...] = ()) -> dict[str, Tensor]:
        *rest, examples = args
        if not isinstance(examples, Tensor):
            raise TypeError("the last argument holds the examples' indices")
        with ExitStack() as stack:
            for hold in self.holds:
                act = partial(hold, examples=examples)
                stack.enter_context(hooked(hold.place.point, act, hold.place.name))
            return self.forward(inputs, tuple(rest))
