"""Evidence: interventions that hold in all trials and in the reference."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Union

import torch
from torch import Tensor

from ce_plugin.designs import RandomMask
from ce_plugin.errors import ArgumentError, UnitError, expected
from ce_plugin.interventions.base import Intervention
from ce_plugin.randomness import derived_seed
from ce_plugin.sites.concept import ConceptSite
from ce_plugin.sites.input import InputSite
from ce_plugin.sites.layer import LayerSite

__all__ = ["Evidence"]


@dataclass(frozen=True)
class Evidence:
    """An intervention that holds in all trials and in the reference.

    Args:
        intervention: what is set.
        site: where; the input by default, or a layer or a layer's concepts.
        units: which units are set: ``"all"``, indices, or a :class:`RandomMask` whose ``n_trials`` draws the result
            is averaged over.

    Raises:
        ArgumentError: ``intervention`` is none.
        UnitError: ``units`` is none of these.

    Example:
        >>> from ce_plugin.interventions import PixelMask
        >>> Evidence(PixelMask("mean"), units=[0, 1]).units
        (0, 1)
    """

    intervention: Intervention
    site: InputSite | LayerSite | ConceptSite = field(default_factory=InputSite)
    units: Union[Literal["all"], tuple[int, ...], Sequence[int], RandomMask] = "all"

    def __post_init__(self) -> None:
        given: object = self.intervention
        if not isinstance(given, Intervention):
            raise ArgumentError(expected("intervention", "an Intervention", type(given).__name__))
        if isinstance(self.units, str) and self.units != "all":
            raise UnitError(expected("units", "'all', unit indices or a RandomMask", repr(self.units)))
        if not isinstance(self.units, (str, RandomMask)):
            try:
                chosen = tuple(operator.index(u) for u in self.units)
            except TypeError as error:
                wanted = "'all', unit indices or a RandomMask"
                raise UnitError(expected("units", wanted, repr(self.units))) from error
            object.__setattr__(self, "units", chosen)

    def __repr__(self) -> str:
        units = "" if self.units == "all" else f", units={self.units!r}"
        site = "" if repr(self.site) == "InputSite()" else f", site={self.site!r}"
        return f"Evidence({self.intervention!r}{site}{units})"

    @property
    def is_random(self) -> bool:
        """Whether the units are drawn."""
        return isinstance(self.units, RandomMask)

    @property
    def n_draws(self) -> int:
        """How many random evidences the result is averaged over; 1 where nothing is random."""
        return self.units.n_trials if isinstance(self.units, RandomMask) else 1

    def assignment(self, n_units: int, example: int, draw: int, order: int = 0) -> Tensor:
        """Which units hold the evidence, bool (U,), in one draw for the example of this id.

        Several random evidences, told apart by their ``order``, and the trials of a design are drawn independently of
        each other, also where their seeds are equal.
        """
        if isinstance(self.units, RandomMask):
            own = self.units.reseeded(derived_seed(self.units.seed, "evidence", order))
            return own.assignments(n_units, example=example)[draw]
        chosen = torch.zeros(n_units, dtype=torch.bool)
        if isinstance(self.units, str):
            return ~chosen
        if self.units and not 0 <= min(self.units) <= max(self.units) < n_units:
            raise UnitError(expected("units", f"indices of the site's {n_units} units", self.units))
        chosen[list(self.units)] = True
        return chosen
