"""Designs: which units are set in each trial, as boolean assignments."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ce_plugin.errors import DesignError, expected
from ce_plugin.randomness import generator

__all__ = ["Design", "EveryUnit", "Joint", "LeaveOneIn", "OneAtATime", "RandomMask"]

Grid = tuple[int, int]


class Design(ABC):
    """The assignments that are run: boolean rows over units, True where the unit is *do*, False where it is idle.

    Subclasses write :meth:`n_trials_for` and :meth:`assignments`.

    Attributes:
        exact: True where the trials answer the question without sampling error.
        estimator: name of the estimator that fits the design (:mod:`ce_plugin.effects.estimators`).
        reference: what an exact design's trials are compared with: all units ``"idle"`` or ``"all"`` do.
        seed: seed of what is random.
    """

    exact: bool = False
    estimator: str = "adjusted"
    reference: ClassVar[str] = "idle"
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


class OneAtATime(Design):
    """Each unit flips alone: its exact effect with all other units idle. With zero fill this is FeatureAblation.

    Example:
        >>> OneAtATime().assignments(3).int().tolist()
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]]

    Source: Eq. 1 of Yang et al., ICIP 2019 (arXiv 1902.03380).
    """

    exact = True
    estimator = "exact"

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
        self.groups = tuple(tuple(int(u) for u in group) for group in groups)
        if not self.groups or any(not group for group in self.groups):
            raise DesignError(expected("groups", "one or more non-empty groups of unit indices", groups))
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


class RandomMask(Design):
    """Each unit flips with probability p in each trial, independently: effects are averaged over the others' flips.

    Args:
        p: probability of a flip, in (0, 1); the paper masks 10 % of the area.
        n_trials: number of trials, 2 or more.
        balanced: each unit flips in exactly ``round(p * n_trials)`` trials.
        antithetic: trials come in pairs that draw a flip from u and from 1 - u: smaller errors where effects are
            close to additive. Errors are then taken from pair means.
        estimator: ``"adjusted"`` or ``"difference_in_means"``.
        seed: any integer.

    Raises:
        DesignError: p outside (0, 1), fewer than 2 trials, an odd number of antithetic trials, a balanced design in
            which a unit would never (or always) flip.

    Example:
        >>> RandomMask(0.5, n_trials=4, balanced=True).assignments(3).sum(0).tolist()
        [2, 2, 2]

    Source: F_i of Yang et al., ICIP 2019 (p = 0.1); the expected effect is the p-weighted Banzhaf value.
    """

    def __init__(
        self,
        p: float = 0.1,
        n_trials: int = 400,
        *,
        balanced: bool = False,
        antithetic: bool = False,
        estimator: str = "adjusted",
        seed: int = 0,
    ) -> None:
        if not 0 < p < 1:
            raise DesignError(expected("p", "a probability in (0, 1)", p, "Write 0.1 for ten per cent."))
        _check_n_trials(n_trials)
        if antithetic and n_trials % 2:
            raise DesignError(expected("n_trials", "even for antithetic pairs", n_trials))
        if balanced and not 0 < round(p * n_trials) < n_trials:
            todo = f"Use at least {round(1 / min(p, 1 - p)) + 1} trials, or balanced=False."
            raise DesignError(expected("n_trials", f"so large that units flip and idle at p={p}", n_trials, todo))
        if estimator not in ("adjusted", "difference_in_means"):
            raise DesignError(expected("estimator", "'adjusted' or 'difference_in_means'", repr(estimator)))
        self.p, self.n_trials, self.seed = float(p), int(n_trials), int(seed)
        self.balanced, self.antithetic, self.estimator = balanced, antithetic, estimator

    def n_trials_for(self, n_units: int) -> int:
        return self.n_trials

    def flip_probability(self) -> float | None:
        """p, or for a balanced design the share that is exactly held."""
        return round(self.p * self.n_trials) / self.n_trials if self.balanced else self.p

    def blocks(self, n_trials: int) -> Tensor | None:
        """Antithetic pairs; None otherwise."""
        return torch.arange(n_trials) // 2 if self.antithetic else None

    def assignments(self, n_units: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        draw = generator(self.seed, example, "assignments")
        if self.balanced and self.antithetic:
            return self._balanced_pairs(n_units, draw)
        if self.balanced:
            # The k smallest of T uniform numbers: exactly k flips, independently for each unit.
            rank = torch.rand(self.n_trials, n_units, generator=draw).argsort(0).argsort(0)
            return rank < round(self.p * self.n_trials)
        if self.antithetic:
            uniform = torch.rand(self.n_trials // 2, n_units, generator=draw)
            return torch.stack([uniform < self.p, 1 - uniform < self.p], dim=1).flatten(0, 1)
        return torch.rand(self.n_trials, n_units, generator=draw) < self.p

    def _balanced_pairs(self, n_units: int, draw: torch.Generator) -> Tensor:
        """In k (of T/2) pairs one member of the pair flips; for p > 1/2 the same with do and idle exchanged."""
        k = round(self.p * self.n_trials)
        few = min(k, self.n_trials - k)
        chosen = torch.rand(self.n_trials // 2, n_units, generator=draw).argsort(0).argsort(0) < few
        first = torch.rand(self.n_trials // 2, n_units, generator=draw) < 0.5
        pairs = torch.stack([chosen & first, chosen & ~first], dim=1).flatten(0, 1)
        return pairs if few == k else ~pairs

    def __repr__(self) -> str:
        flags = "".join(f", {name}=True" for name in ("balanced", "antithetic") if getattr(self, name))
        return f"RandomMask({self.p}, n_trials={self.n_trials}{flags}, estimator={self.estimator!r}, seed={self.seed})"


def _check_n_trials(n_trials: int) -> None:
    if n_trials < 2:
        raise DesignError(expected("n_trials", "2 or more", n_trials))
