"""Exact designs: their trials answer the question without sampling error."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ce_plugin.designs.base import Design, Grid
from ce_plugin.errors import DesignError, expected

__all__ = ["EveryUnit", "Joint", "LeaveOneIn", "OneAtATime"]


class OneAtATime(Design):
    """Each unit flips alone: its exact effect with all other units idle. With zero fill this is FeatureAblation.

    Example:
        >>> OneAtATime().assignments(3).int().tolist()
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]]

    Source: Eq. 1 of Yang et al., ICIP 2019 (arXiv 1902.03380).
    """

    exact = True
    estimator = "exact"
    flips_one = True

    def n_trials_for(self, n_units: int) -> int:
        return n_units

    def assignments(self, n_units: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        return self.rows(n_units, 0, n_units)

    def rows(self, n_units: int, start: int, stop: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        """Trials ``start`` to ``stop`` only: U x U assignments of a pixel grid would not fit into memory."""
        return torch.arange(start, min(stop, n_units))[:, None] == torch.arange(n_units)[None, :]

    def __repr__(self) -> str:
        return "OneAtATime()"


class LeaveOneIn(OneAtATime):
    """All units flip but one: effect = P(all do) - P(all do except u), the effect of u when nothing else is left.

    Example:
        >>> LeaveOneIn().assignments(3).int().tolist()
        [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    """

    reference = "all"
    flips_one = False

    def rows(self, n_units: int, start: int, stop: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        """Trials ``start`` to ``stop`` only."""
        return ~super().rows(n_units, start, stop)

    def __repr__(self) -> str:
        return "LeaveOneIn()"


class EveryUnit(Design):
    """One trial in which all units flip: what :class:`LeaveOneIn` is compared with.

    Example:
        >>> EveryUnit().assignments(3).int().tolist()
        [[1, 1, 1]]
    """

    exact = True
    estimator = "exact"

    def n_trials_for(self, n_units: int) -> int:
        return 1

    def assignments(self, n_units: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        return torch.ones(1, n_units, dtype=torch.bool)

    def __repr__(self) -> str:
        return "EveryUnit()"


class Joint(Design):
    """Groups of units flip together: the exact joint effect of each group.

    Args:
        groups: for each group the indices of its units, at least one, without repetition.

    Raises:
        DesignError: no groups, an empty group, a repeated or negative index.

    Example:
        >>> Joint([(0,), (1,), (0, 1)]).assignments(3).int().tolist()
        [[1, 0, 0], [0, 1, 0], [1, 1, 0]]
        >>> Joint.pairs([0, 2]).groups
        ((0,), (2,), (0, 2))
    """

    exact = True
    estimator = "exact"

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        wanted = "one or more non-empty groups of unit indices"
        try:
            self.groups = tuple(tuple(operator.index(u) for u in group) for group in groups)
        except TypeError as error:
            raise DesignError(expected("groups", wanted, groups, "Write [(0,), (0, 1)].")) from error
        if not self.groups or any(not group for group in self.groups):
            raise DesignError(expected("groups", wanted, groups))
        for group in self.groups:
            if len(set(group)) != len(group) or min(group) < 0:
                raise DesignError(expected("groups", "groups of different indices, 0 or larger", group))

    @classmethod
    def pairs(cls, units: Sequence[int]) -> Joint:
        """All units alone and all pairs of them: what :meth:`Estimate.interaction` needs.

        Args:
            units: indices of two or more units.
        """
        return cls([(u,) for u in units] + list(itertools.combinations(units, 2)))

    def n_trials_for(self, n_units: int) -> int:
        return len(self.groups)

    def assignments(self, n_units: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        largest = max(max(group) for group in self.groups)
        if largest >= n_units:
            raise DesignError(expected("groups", f"indices below the number of units, {n_units}", largest))
        rows = torch.zeros(len(self.groups), n_units, dtype=torch.bool)
        for row, group in zip(rows, self.groups, strict=True):
            row[list(group)] = True
        return rows

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.groups[:3])) + (", ..." if len(self.groups) > 3 else "")
        return f"Joint([{shown}])"
