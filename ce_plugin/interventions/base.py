"""What every intervention is: a rule that supplies the counterfactual value x' which ``do`` sets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from captum.robust import Perturbation
from torch import Tensor

from ce_plugin.randomness import generator

__all__ = ["Context", "Inputs", "Intervention"]

Inputs = TypeVar("Inputs", bound="Tensor | tuple[Tensor, ...]")


@dataclass(frozen=True)
class Context:
    """What an intervention may know about the examples whose counterfactual values it supplies.

    Args:
        ids: one id per example, (N,); equal ids get equal random numbers.
        seed: seed of the run.
        target: class index of each example, (N,), where one is known: the explained class, or the predicted one.
        position: which tensor of a tuple of inputs this is.
        variant: which of the intervention's alternative values is wanted, in ``range(n_variants)``.
        mask: for interventions with ``per_trial``: what this trial sets, broadcastable to the clean value.
        rows: place of each example in the batch that the user passed, (N,); None where all of it is asked for.
        donors: the values at the site of the inputs that the intervention named in :meth:`Intervention.donors`, one
            tensor for each tensor of the site; None where it named none.
    """

    ids: tuple[int, ...]
    seed: int = 0
    target: Tensor | None = None
    position: int = 0
    variant: int = 0
    mask: Tensor | None = None
    rows: tuple[int, ...] | None = None
    donors: tuple[Tensor, ...] | None = None

    def generator(self, example: int, stream: str) -> torch.Generator:
        """A fresh CPU generator for one example: the same numbers whatever was drawn before."""
        return generator(self.seed, self.ids[example], stream, self.position, self.variant)

    def select(self, examples: slice | Sequence[int]) -> Context:
        """The context of some of the examples."""
        index = range(len(self.ids))[examples] if isinstance(examples, slice) else examples
        target = None if self.target is None else self.target[list(index)]
        rows = index if self.rows is None else [self.rows[i] for i in index]
        return replace(self, ids=tuple(self.ids[i] for i in index), target=target, rows=tuple(rows))

    def own(self, values: Tensor, clean: Tensor) -> Tensor:
        """The rows of these examples, where ``values`` has one for each example of the user's batch."""
        if self.rows is None or values.dim() != clean.dim() or len(values) == 1:
            return values
        return values[[row for row in self.rows if row < len(values)]]


class Intervention(Perturbation):  # type: ignore[misc]
    """An intervention variable F_u with values {idle, do(x'_u)}: it says what x' is, a design says when it is set.

    Subclasses write :meth:`values`. Being a :class:`captum.robust.Perturbation`, an intervention is callable on
    inputs, which sets *all* units, and so works in Captum's ``AttackComparator`` and ``MinParamPerturbation``.

    Attributes:
        n_variants: number of alternative values x'. With several, effects are averages over them.
        per_trial: True where x' depends on what a trial sets (an in-painter that looks at the hole); the
            runner then asks for values batch by batch with ``context.mask`` set.
        forward_equivalents: what x' of one example costs, in forward passes of the network (a backward pass counts
            as two).

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Eq. 3; Pearl 2009, Eq. 3.8.
    """

    n_variants: int = 1
    per_trial: bool = False
    forward_equivalents: int = 0

    def donors(self, inputs: tuple[Tensor, ...], context: Context) -> tuple[Tensor, ...] | None:
        """The network's inputs whose values at the site are wanted in ``context.donors``; None where none are.

        Args:
            inputs: the examples' own inputs, (N, ...) each, under their evidence.
            context: ids and seed.

        Returns:
            A counterpart of every example, (N, ...) each, or a reference set of any length, (R, ...) each.
        """
        return None

    def collect(self, values: Iterable[Tensor]) -> Tensor:
        """What is kept of the donors' values at the site, which come batch by batch: all of them."""
        return torch.cat(list(values))

    @abstractmethod
    def values(self, clean: Tensor, context: Context) -> Tensor:
        """The counterfactual value x' of the whole site.

        Args:
            clean: value of the site, (N, ...), in model units.
            context: see :class:`Context`.

        Returns:
            A tensor of the shape, device and dtype of ``clean``. ``clean`` is not changed.
        """

    def perturb(
        self,
        inputs: Inputs,
        *,
        target: Tensor | None = None,
        ids: Sequence[int] | None = None,
        seed: int = 0,
        variant: int = 0,
    ) -> Inputs:
        """The inputs with every unit set to its counterfactual value.

        Args:
            inputs: (N, ...), or a tuple of such.
            target: class index per example, (N,), for interventions that need one.
            ids: one id per example; None gives every example the same random numbers.
            seed: seed of what is random.
            variant: which alternative, for interventions with several.

        Returns:
            The perturbed inputs, in the form in which they came.
        """
        tensors: tuple[Tensor, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
        names = tuple(ids) if ids is not None else (0,) * len(tensors[0])
        base = Context(ids=names, seed=seed, target=target, variant=variant)
        donors = self.donors(tensors, base)
        if donors is not None:
            base = replace(base, donors=tuple(self.collect([donor]) for donor in donors))
        out = tuple(self.values(x, replace(base, position=i)) for i, x in enumerate(tensors))
        return cast(Inputs, out if isinstance(inputs, tuple) else out[0])
