"""Interventions on nodes: zero (Z0), the mean of a reference set, another example's value, a counterpart's value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, check_integer, expected
from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.networks.forward import double


class ZeroOut(Intervention):
    """Z0 of the paper: the node is set to zero.

    Example:
        >>> ZeroOut().perturb(torch.ones(1, 3))
        tensor([[0., 0., 0.]])

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), section 3.3.
    """

    def values(self, clean: Tensor, context: Context) -> Tensor:
        return torch.zeros_like(clean)

    def __repr__(self) -> str:
        return "ZeroOut()"


class _FromReference(Intervention):
    """An intervention that takes its values from a reference set given to the constructor.

    Args:
        reference: inputs of the network, (R, ...), or a tuple of such.

    Raises:
        InputError: it is empty, or is not made of tensors of equal length.
    """

    def __init__(self, reference: Tensor | tuple[Tensor, ...]) -> None:
        self.reference = _inputs("reference", reference)

    def donors(self, inputs: tuple[Tensor, ...], context: Context) -> tuple[Tensor, ...]:
        for own, x in zip(self.reference, inputs, strict=False):
            if own.shape[1:] != x.shape[1:] or len(self.reference) != len(inputs):
                wanted = f"inputs of the shapes (R, {', '.join(map(str, x.shape[1:]))}) of what is explained"
                raise InputError(expected("reference", wanted, [tuple(t.shape) for t in self.reference]))
        return tuple(own.to(x) for own, x in zip(self.reference, inputs, strict=True))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.reference[0])} examples)"


class MeanOut(_FromReference):
    """The node is set to its mean over a reference set, which contains no information about x.

    Args:
        reference: inputs of the network, (R, ...), or a tuple of such.
        positions: average over positions too (all dimensions but the first two), so that no spatial pattern of the
            average example remains.

    Example:
        >>> MeanOut(torch.tensor([[1.0, 2.0], [3.0, 6.0]])).perturb(torch.zeros(1, 2))
        tensor([[2., 4.]])
    """

    def __init__(self, reference: Tensor | tuple[Tensor, ...], *, positions: bool = False) -> None:
        super().__init__(reference)
        if not isinstance(positions, bool):
            raise ArgumentError(expected("positions", "True or False", repr(positions)))
        self.positions = positions

    def collect(self, values: Iterable[Tensor]) -> Tensor:
        """The mean over the reference set, (1, ...); summed in float64, batch by batch."""
        total, count, like = None, 0, None
        for some in values:
            part = double(some).sum(0, keepdim=True)
            total, count, like = part if total is None else total + part, count + len(some), some
        if total is None or like is None:
            raise InputError(expected("reference", "one example or more", "none"))
        mean = total / count
        if self.positions and mean.dim() > 2:
            mean = mean.mean(tuple(range(2, mean.dim())), keepdim=True)
        return mean.to(like)

    def values(self, clean: Tensor, context: Context) -> Tensor:
        return _donors(self, context).to(clean).expand_as(clean)


class Resample(_FromReference):
    """The node is set to the value that it has in another example, drawn from a reference set.

    Args:
        reference: inputs of the network, (R, ...), or a tuple of such.
        n_donors: effects are averages over this number of different donors.

    Raises:
        ArgumentError: fewer than one donor, or more than the reference set has.

    Donors depend only on (seed, id): without ``ids=`` all examples get the same ones.

    Example:
        >>> set_ = torch.tensor([[1.0], [2.0], [3.0]])
        >>> found = {Resample(set_).perturb(torch.zeros(1, 1), ids=[i]).item() for i in range(20)}
        >>> sorted(found)
        [1.0, 2.0, 3.0]
    """

    def __init__(self, reference: Tensor | tuple[Tensor, ...], n_donors: int = 1) -> None:
        super().__init__(reference)
        most = len(self.reference[0])
        if check_integer("n_donors", n_donors, f"from 1 to the reference set's {most} examples", least=1) > most:
            raise ArgumentError(expected("n_donors", f"from 1 to the reference set's {most} examples", n_donors))
        self.n_variants = n_donors

    def values(self, clean: Tensor, context: Context) -> Tensor:
        donors = _donors(self, context)
        # One order of the donors: variants get different donors, and all tensors of a site the same one.
        base = replace(context, variant=0, position=0)
        every = range(len(context.ids))
        orders = [torch.randperm(len(donors), generator=base.generator(i, "resample")) for i in every]
        chosen = torch.stack([order[context.variant] for order in orders])
        return donors[chosen.to(donors.device)].to(clean)

    def __repr__(self) -> str:
        return f"Resample({len(self.reference[0])} examples, n_donors={self.n_variants})"


class Patch(Intervention):
    """Activation patching: the node is set to the value that it has for a counterpart of the input.

    Args:
        counterpart: inputs of the same shapes, one for each example (such as the attacked images); or an
            intervention that makes them (``Patch(Adversarial.pgd(model))``).

    Raises:
        ArgumentError: neither tensors nor an intervention.
        InputError: at the run, a counterpart whose shape is not that of the inputs.

    Example:
        >>> Patch(torch.tensor([[5.0, 6.0]])).perturb(torch.zeros(1, 2))
        tensor([[5., 6.]])
    """

    def __init__(self, counterpart: Tensor | tuple[Tensor, ...] | Intervention) -> None:
        self.counterpart = counterpart if isinstance(counterpart, Intervention) else _inputs("counterpart", counterpart)

    @property
    def forward_equivalents(self) -> int:  # type: ignore[override]
        """One pass to the site, plus the cost of making the counterpart."""
        return 1 + (self.counterpart.forward_equivalents if isinstance(self.counterpart, Intervention) else 0)

    def donors(self, inputs: tuple[Tensor, ...], context: Context) -> tuple[Tensor, ...]:
        if isinstance(self.counterpart, Intervention):
            return tuple(
                self.counterpart.values(x, replace(context, position=position)) for position, x in enumerate(inputs)
            )
        shapes, wanted = [tuple(t.shape) for t in self.counterpart], [tuple(x.shape) for x in inputs]
        if context.rows is None and shapes != wanted:
            raise InputError(expected("counterpart", f"of the inputs' shapes {wanted}", shapes))
        return tuple(context.own(own, x).to(x) for own, x in zip(self.counterpart, inputs, strict=True))

    def values(self, clean: Tensor, context: Context) -> Tensor:
        return context.own(_donors(self, context), clean).to(clean).expand_as(clean)

    def __repr__(self) -> str:
        made = isinstance(self.counterpart, Intervention)
        return f"Patch({self.counterpart!r})" if made else "Patch(counterpart)"


def _donors(intervention: Intervention, context: Context) -> Tensor:
    if context.donors is None:
        hint = "Call `perturb`, or explain with it; `values` needs the network's activations in `context.donors`."
        raise ArgumentError(expected("context", f"one with donors for {intervention!r}", "none", hint))
    return context.donors[context.position]


def _inputs(name: str, given: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    tensors = given if isinstance(given, tuple) else (given,)
    if not tensors or not all(isinstance(t, Tensor) and t.dim() and len(t) == len(tensors[0]) for t in tensors):
        kinds = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in tensors]
        raise ArgumentError(expected(name, "a tensor (R, ...), or a tuple of such of equal length", kinds))
    if not len(tensors[0]) or not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise InputError(expected(name, "finite, of one example or more", "an empty set, NaN or infinity"))
    return tuple(t.detach() for t in tensors)
