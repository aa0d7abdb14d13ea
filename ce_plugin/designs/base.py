"""What every design is: boolean assignments over units."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from numbers import Integral, Real
from typing import ClassVar, TypeAlias

from torch import Tensor

from ce_plugin.errors import DesignError, expected

__all__ = ["Design", "Grid", "check_n_trials", "is_share"]

# Rows and columns of a grid of units.
Grid: TypeAlias = tuple[int, int]


class Design(ABC):
    """The assignments that are run: boolean rows over units, True where the unit is *do*, False where it is idle.

    Subclasses write :meth:`n_trials_for` and :meth:`assignments`.

    Attributes:
        exact: True where the trials answer the question without sampling error.
        estimator: name of the estimator that fits the design (:mod:`ce_plugin.effects.estimators`).
        reference: what an exact design's trials are compared with: all units ``"idle"`` or ``"all"`` do.
        flips_one: True where every trial sets a single unit, so that what it changes can be followed by itself.
        seed: seed of what is random.
    """

    exact: bool = False
    estimator: str = "adjusted"
    reference: ClassVar[str] = "idle"
    flips_one: ClassVar[bool] = False
    seed: int = 0

    @abstractmethod
    def n_trials_for(self, n_units: int) -> int:
        """Number of trials for one example with ``n_units`` units, the reference not counted."""

    @abstractmethod
    def assignments(self, n_units: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        """All trials of one example.

        Args:
            n_units: number of units U.
            example: the example's id: equal ids get equal assignments.
            grid: (rows, columns) where the units are the cells of a grid, row by row.

        Returns:
            bool (T, U).
        """

    def rows(self, n_units: int, start: int, stop: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        """Some of the trials, (stop - start, U); designs with many units make them without the others."""
        return self.assignments(n_units, example=example, grid=grid)[start:stop]

    def blocks(self, n_trials: int) -> Tensor | None:
        """For each trial the block of dependent trials it belongs to, (T,); None where trials are independent."""
        return None

    def flip_probability(self) -> float | None:
        """Probability that a unit flips, where the design knows it."""
        return None

    def reseeded(self, seed: int) -> Design:
        """The same design with another seed."""
        other = copy.copy(self)
        other.seed = seed
        return other


def check_n_trials(n_trials: object) -> None:
    """Whether a number of trials is a whole number, 2 or more."""
    if not isinstance(n_trials, Integral) or int(n_trials) < 2:
        raise DesignError(expected("n_trials", "a whole number, 2 or more", n_trials))


def is_share(p: object) -> bool:
    """Whether this is a number in (0, 1)."""
    return isinstance(p, Real) and 0 < float(p) < 1
