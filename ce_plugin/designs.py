"""Designs: which units are set in each trial."""

from __future__ import annotations

import copy
import itertools
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from ce_plugin.errors import DesignError, check_integer, check_number, expected
from ce_plugin.randomness import generator

__all__ = [
    "Design",
    "FirstOrder",
    "Joint",
    "LeaveOneIn",
    "OneAtATime",
    "RandomMask",
    "RandomRegions",
    "RandomWindows",
]


# The number of cells of a grid along each dimension: (rows, columns) for images.
Grid: TypeAlias = tuple[int, ...]

_NO_GRID = "Leave out `feature_mask` and windows for images (N, C, H, W), or use RandomMask or OneAtATime."


class Design(ABC):
    """The assignments to run: boolean rows over units, True where the unit is *do*, False where it is idle.

    Subclasses write :meth:`n_trials_for` and :meth:`assignments`.

    Attributes:
        exact: True if the design has no sampling error.
        estimator: name of the estimator that fits the design (:mod:`ce_plugin.effects.estimators`).
        reference: what an exact design's trials are compared with: all units idle (``"idle"``) or all do (``"all"``).
        flips_one: True if every trial sets a single unit, so that only what this unit changes need be computed.
        seed: seed of the random assignments.
    """

    exact: bool = False
    estimator: str = "adjusted"
    reference: ClassVar[str] = "idle"
    flips_one: ClassVar[bool] = False
    seed: int = 0

    @abstractmethod
    def n_trials_for(self, n_units: int) -> int:
        """Number of trials for one example with ``n_units`` units, without the reference."""

    @abstractmethod
    def assignments(self, n_units: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        """All trials of one example.

        Args:
            n_units: number of units U.
            example: the example's id: equal ids get equal assignments.
            grid: its number of cells along each dimension if the units are the cells of a grid; the last runs
                fastest, so that images (rows, columns) are read row by row.

        Returns:
            bool (T, U).
        """

    def rows(self, n_units: int, start: int, stop: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        """Some of the trials, (stop - start, U); designs with many units avoid making all of them at once."""
        return self.assignments(n_units, example=example, grid=grid)[start:stop]

    def blocks(self, n_trials: int) -> Tensor | None:
        """For each trial the index of its block of dependent trials, (T,); None if trials are independent."""
        return None

    def flip_probability(self) -> float | None:
        """Probability that a unit flips, if the design defines it."""
        return None

    @property
    def has_errors(self) -> bool:
        """Whether its effects have standard errors: exact effects need none."""
        return not self.exact

    def independent(self, n_trials: int) -> tuple[Tensor, float] | None:
        """Which of the first trials set each unit by itself, bool (T,), and with which probability; None if none do."""
        return None

    def turns(self, n_trials: int) -> Tensor:
        """Each trial's turn, (T,): alternative values are set in turn, by the trials of a block the same one."""
        blocks = self.blocks(n_trials)
        return torch.arange(n_trials) if blocks is None else blocks

    def sized(self, n_trials: int) -> Design:
        """The same design with another number of trials, or with as many as it can have below.

        Raises:
            DesignError: it has no such choice.
        """
        hint = "Leave out `passes`, or use RandomRegions or RandomMask; a random design of your own may write `sized`."
        raise DesignError(expected("design", "one whose number of trials can be chosen", repr(self), hint))

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
    flips_one = True

    def n_trials_for(self, n_units: int) -> int:
        return n_units

    def assignments(self, n_units: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        return self.rows(n_units, 0, n_units)

    def rows(self, n_units: int, start: int, stop: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        """Trials ``start`` to ``stop``: all U x U assignments of a pixel grid would not fit into memory."""
        return torch.arange(start, min(stop, n_units))[:, None] == torch.arange(n_units)[None, :]

    def __repr__(self) -> str:
        return "OneAtATime()"


class LeaveOneIn(OneAtATime):
    """All units flip but one: effect = P(all do) - P(all do except u), the effect of u with all others set.

    Example:
        >>> LeaveOneIn().assignments(3).int().tolist()
        [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    """

    reference = "all"
    flips_one = False

    def rows(self, n_units: int, start: int, stop: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        """Trials ``start`` to ``stop``."""
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
        """Each unit alone and all pairs of them, as :meth:`Estimate.interaction` needs.

        Args:
            units: indices of two or more units.
        """
        given: object = units
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise DesignError(expected("units", "two or more unit indices", repr(units), "Write [0, 2]."))
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


class FirstOrder(Design):
    """No trial at all: effects to first order, by one gradient, for images and volumes whose units are a grid's cells.

        effect_u = - sum over channels and positions in u of  d outcome / d h . h

    h is the last value of the network that has positions (:class:`~ce_plugin.CausalEffect` says more, at ``guide``):
    the first-order effect of setting it to zero there, which on a network that pools h and weighs it linearly is
    Grad-CAM without its ReLU. It takes three passes, a backward pass counted as two; of an example without a target
    the predicted class is explained. An approximation: it has no sampling error, and is not without bias.

    Example:
        >>> FirstOrder().n_trials_for(196)
        0

    Source: Selvaraju et al. 2017 (Grad-CAM); Nanda 2023 (attribution patching).
    """

    exact = True
    estimator = "exact"

    def n_trials_for(self, n_units: int) -> int:
        return 0

    def assignments(self, n_units: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        if grid is None or math.prod(grid) != n_units:
            raise DesignError(expected("design", "one for units that are not a grid", repr(self), _NO_GRID))
        return torch.zeros(0, n_units, dtype=torch.bool)

    def __repr__(self) -> str:
        return "FirstOrder()"


class _Random(Design):
    """Designs that set a share p of the units, drawn independently for each trial."""

    _p = ("a probability in (0, 1)", "Write 0.1 for ten per cent.")

    def __init__(self, p: Any, n_trials: Any, seed: int) -> None:
        wanted, hint = self._p
        self.p = check_number("p", p, wanted, above=0, below=1, hint=hint, error=DesignError)
        self.n_trials = check_integer("n_trials", n_trials, least=2, error=DesignError)
        self.seed = check_integer("seed", seed, error=DesignError)

    def n_trials_for(self, n_units: int) -> int:
        return self.n_trials


class RandomMask(_Random):
    """Each unit flips with probability p in each trial, independently: effects are averages over the other units.

        effect_u = E[ Y(a_u = 1, A) - Y(a_u = 0, A) ],   A: each of the other units set with probability p

    Args:
        p: probability of a flip, in (0, 1); the paper masks 10 % of the area.
        n_trials: number of trials, 2 or more.
        balanced: each unit flips in exactly ``round(p * n_trials)`` trials.
        antithetic: trials come in pairs that draw flips from u and from 1 - u, which reduces the error if effects are
            close to additive. Standard errors are then computed from pair means.
        estimator: ``"adjusted"`` or ``"difference_in_means"``.
        seed: any integer.

    Raises:
        DesignError: p outside (0, 1), fewer than 2 trials, an odd number of antithetic trials, or a balanced
            design in which a unit would never (or always) flip.

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
        super().__init__(p, n_trials, seed)
        if antithetic and n_trials % 2:
            raise DesignError(expected("n_trials", "even for antithetic pairs", n_trials))
        if balanced and not 0 < round(p * n_trials) < n_trials:
            hint = f"Use at least {round(1 / min(p, 1 - p)) + 1} trials, or balanced=False."
            raise DesignError(
                expected("n_trials", f"enough for every unit to flip and to idle at p={p}", n_trials, hint)
            )
        if not isinstance(estimator, str) or estimator not in ("adjusted", "difference_in_means"):
            raise DesignError(expected("estimator", "'adjusted' or 'difference_in_means'", repr(estimator)))
        for name, flag in (("balanced", balanced), ("antithetic", antithetic)):
            if not isinstance(flag, bool):
                raise DesignError(expected(name, "True or False", repr(flag)))
        self.balanced, self.antithetic, self.estimator = balanced, antithetic, estimator

    def sized(self, n_trials: int) -> RandomMask:
        n_trials -= n_trials % 2 if self.antithetic else 0  # pairs
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("balanced", "antithetic", "estimator", "seed")
        }
        return RandomMask(self.p, n_trials, **options)

    def flip_probability(self) -> float | None:
        """p; for a balanced design the share of trials in which each unit flips."""
        return round(self.p * self.n_trials) / self.n_trials if self.balanced else self.p

    def blocks(self, n_trials: int) -> Tensor | None:
        """Antithetic pairs; None otherwise."""
        return torch.arange(n_trials) // 2 if self.antithetic else None

    def assignments(self, n_units: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        draw = generator(self.seed, example, "assignments")
        if self.balanced and self.antithetic:
            return self._balanced_pairs(n_units, draw)
        if self.balanced:
            # Flip where the number is among the k smallest of T: exactly k flips, independently for each unit.
            rank = torch.rand(self.n_trials, n_units, generator=draw).argsort(0).argsort(0)
            return rank < round(self.p * self.n_trials)
        if self.antithetic:
            uniform = torch.rand(self.n_trials // 2, n_units, generator=draw)
            return torch.stack([uniform < self.p, 1 - uniform < self.p], dim=1).flatten(0, 1)
        return torch.rand(self.n_trials, n_units, generator=draw) < self.p

    def _balanced_pairs(self, n_units: int, draw: torch.Generator) -> Tensor:
        """In k of T/2 pairs one member flips; for p > 1/2 the same with do and idle exchanged."""
        k = round(self.p * self.n_trials)
        few = min(k, self.n_trials - k)
        chosen = torch.rand(self.n_trials // 2, n_units, generator=draw).argsort(0).argsort(0) < few
        first = torch.rand(self.n_trials // 2, n_units, generator=draw) < 0.5
        pairs = torch.stack([chosen & first, chosen & ~first], dim=1).flatten(0, 1)
        return pairs if few == k else ~pairs

    def __repr__(self) -> str:
        flags = "".join(f", {name}=True" for name in ("balanced", "antithetic") if getattr(self, name))
        return f"RandomMask({self.p}, n_trials={self.n_trials}{flags}, estimator={self.estimator!r}, seed={self.seed})"


class _OverGrid(_Random):
    """Random designs that set coherent parts of a grid, and in a share of the trials each unit by itself.

    Coherent trials show where an effect lies with few trials, but neighbours flip together, so that they cannot say
    which unit it belongs to. Independent ones can, for any network (:func:`ce_plugin.effects.smooth.smooth`). They are
    interleaved evenly, so that the first trials are a small design of the same kind.
    """

    estimator = "smooth"
    # Up to so many trials the share is this: independent trials cost the map coherent ones.
    _shares: ClassVar[tuple[tuple[float, float], ...]] = ((29, 0.0), (299, 0.2), (math.inf, 0.4))
    _p = ("a share of the area in (0, 1)", "Write 0.5 for a half.")

    def __init__(self, p: Any, n_trials: Any, independent: Any, seed: int) -> None:
        super().__init__(p, n_trials, seed)
        self.asked: float | None = independent
        if independent is None:
            independent = next(share for most, share in self._shares if self.n_trials <= most)
        wanted, hint = "None or a share of the trials in [0, 1]", "Write 0.4 for 40 per cent."
        self.share = check_number("independent", independent, wanted, hint=hint, error=DesignError)
        if not 0 <= self.share <= 1:
            raise DesignError(expected("independent", wanted, independent, hint))
        if 0 < self.share * self.n_trials < 2 - 1e-9:
            wanted = f"0, or a share that makes two independent trials or more of {self.n_trials}"
            raise DesignError(expected("independent", wanted, independent, "Take more trials, or a larger share."))

    @property
    def has_errors(self) -> bool:
        return self.share > 0

    def independent(self, n_trials: int) -> tuple[Tensor, float] | None:
        """Trials at which the whole part of (t + 1) * share rises: evenly spread, and a part of every beginning."""
        if self.share == 0:
            return None
        count = (torch.arange(n_trials + 1, dtype=torch.float64) * self.share + 1e-9).floor()
        return count.diff() > 0, self.p

    def turns(self, n_trials: int) -> Tensor:
        """Each kind of trial by itself: both then set every alternative value equally often."""
        found = self.independent(n_trials)
        if found is None:
            return super().turns(n_trials)
        alone, _ = found
        return torch.where(alone, alone.cumsum(0), (~alone).cumsum(0)) - 1

    def assignments(self, n_units: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        coherent = self._coherent(self._grid(n_units, grid), example)
        found = self.independent(self.n_trials)
        if found is None:
            return coherent
        alone, p = found
        draw = generator(self.seed, example, "independent")
        return torch.where(alone[:, None], torch.rand(coherent.shape, generator=draw) < p, coherent)

    @abstractmethod
    def _coherent(self, cells: Grid, example: int) -> Tensor:
        """As many coherent trials as there are trials, bool (T, U)."""

    def _grid(self, n_units: int, grid: Grid | None) -> Grid:
        if grid is None or math.prod(grid) != n_units:
            raise DesignError(expected("design", "one for units that are not a grid", repr(self), _NO_GRID))
        return grid

    def __repr__(self) -> str:
        share = f"independent={self.share:g}"
        return f"{type(self).__name__}({self.p}, n_trials={self.n_trials}, {share}, seed={self.seed})"


class RandomWindows(_OverGrid):
    """Square windows (cubes in volumes) of several sizes at random places, until they cover a share of the input.

    What is estimated, and what ``independent`` trials are for, is said of :class:`RandomRegions`:

        effect_u = E[ Y(a_u = 1, A) - Y(a_u = 0, A) ],   A: each of the other units set with probability p

    Args:
        p: share of the area that each coherent trial sets, in (0, 1), as closely as whole windows allow; the
            probability that a unit flips in an independent one.
        n_trials: number of trials, 2 or more.
        independent: share of the trials that set each unit by itself, in [0, 1]; None takes 0.4, but 0.2 of
            fewer than 300 trials, and 0 of fewer than 30.
        sizes: sides of the windows as shares of the grid's longer side, in (0, 1].
        seed: any integer.

    Raises:
        DesignError: p outside (0, 1), fewer than 2 trials, sizes outside (0, 1], units that are not a grid.

    Example:
        >>> a = RandomWindows(0.5, n_trials=300).assignments(196, grid=(14, 14))
        >>> a.shape, bool((a.float().mean() - 0.5).abs() < 0.02)
        (torch.Size([300, 196]), True)
    """

    def __init__(
        self,
        p: float = 0.5,
        n_trials: int = 399,
        *,
        sizes: Sequence[float] = (0.1, 0.15, 0.2, 0.3, 0.4),
        independent: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(p, n_trials, independent, seed)
        given: object = sizes
        shares: list[object] = list(given) if isinstance(given, (list, tuple)) else []
        if not shares or not all(isinstance(share, Real) and 0 < float(share) <= 1 for share in shares):
            raise DesignError(expected("sizes", "shares of the grid's side in (0, 1]", repr(sizes)))
        self.sizes = tuple(float(size) for size in sizes)

    def sized(self, n_trials: int) -> RandomWindows:
        return RandomWindows(self.p, n_trials, sizes=self.sizes, independent=self.asked, seed=self.seed)

    def _coherent(self, cells: Grid, example: int) -> Tensor:
        draw = generator(self.seed, example, "windows")
        sides = torch.tensor([max(1, round(size * max(cells))) for size in self.sizes])
        # Enough windows for any share, although late ones add little to what is covered already.
        count = 4 + int(6 * math.prod(cells) / float((sides.double() ** len(cells)).mean()))
        return torch.stack([self._trial(sides, count, cells, draw) for _ in range(self.n_trials)])

    def _trial(self, sides: Tensor, count: int, cells: Grid, draw: torch.Generator) -> Tensor:
        """The union of windows whose covered share is closest to p."""
        side = sides[torch.randint(len(sides), (count,), generator=draw)]
        inside = torch.ones(count, 1, dtype=torch.bool)
        for size in cells:
            # Windows may extend beyond the border, so that units at the border flip as often as the others.
            start, place = _start(side, size, draw), torch.arange(size)
            along = (place >= start[:, None]) & (place < (start + side)[:, None])
            inside = (inside[:, :, None] & along[:, None, :]).flatten(1)
        union = inside.cummax(0).values
        best = (union.double().mean(1) - self.p).abs().argmin()
        return union[best]


class RandomRegions(_OverGrid):
    """Coherent regions of random shape: units where low-frequency noise over the grid is high.

    White noise is averaged with a Gaussian of standard deviation ``length`` cells, scaled to unit variance, and a unit
    is set where it exceeds the normal quantile of 1 - p. Every unit, including those at the border, flips with
    probability exactly p; neighbours tend to flip together; no direction or position is preferred. The number of units
    that flip varies between trials: if it were fixed, the mean effect could not be separated from the intercept.

    Such trials show with few passes where an effect lies, but not which unit it belongs to. Four in ten trials, or two
    in ten of fewer than 300 (``independent``), therefore set each unit by itself. What is estimated is the effect that
    :class:`RandomMask` has, averaged over the fills in equal shares,

        effect_u = E[ Y(a_u = 1, A) - Y(a_u = 0, A) ],   A: each of the other units set with probability p

    unbiased for every network, with intervals that hold for every unit. The coherent trials make the smooth map beside
    it, ``Estimate.smoothed``. With ``independent=0`` this map, shrunk where a unit differs from its neighbours, is all
    there is: ``Estimate.effect`` is the same, and has no standard error.

    Args:
        p: probability that a unit flips, in (0, 1).
        n_trials: number of trials, 2 or more.
        length: standard deviation of the smoothing, in cells of the grid.
        independent: share of the trials that set each unit by itself, in [0, 1]; None takes 0.4, but 0.2 of
            fewer than 300 trials, and 0 of fewer than 30.
        seed: any integer.

    Raises:
        DesignError: p outside (0, 1), fewer than 2 trials, length not positive, units that are not a grid.

    Example:
        >>> a = RandomRegions(0.5, n_trials=300).assignments(196, grid=(14, 14))
        >>> a.shape, bool((a.float().mean() - 0.5).abs() < 0.03)
        (torch.Size([300, 196]), True)
    """

    def __init__(
        self,
        p: float = 0.5,
        n_trials: int = 399,
        *,
        length: float = 1.2,
        independent: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(p, n_trials, independent, seed)
        wanted = "a positive number of cells"
        self.length = check_number("length", length, wanted, above=0, error=DesignError)

    def sized(self, n_trials: int) -> RandomRegions:
        return RandomRegions(self.p, n_trials, length=self.length, independent=self.asked, seed=self.seed)

    def _coherent(self, cells: Grid, example: int) -> Tensor:
        draw = generator(self.seed, example, "regions")
        pad = math.ceil(3 * self.length)
        padded = [size + 2 * pad for size in cells]
        field = torch.randn(self.n_trials, *padded, generator=draw, dtype=torch.float64)
        for dim, size in enumerate(cells, 1):
            field = (field.movedim(dim, -1) @ _gaussian(size, pad, self.length).T).movedim(-1, dim)
        above: Tensor = torch.special.ndtri(torch.tensor(1 - self.p, dtype=torch.float64))
        return field.flatten(1) > above


def _gaussian(n: int, pad: int, length: float) -> Tensor:
    """Weights (n, n + 2 pad) that average padded noise around each of n cells; rows of norm 1."""
    centre = torch.arange(n, dtype=torch.float64)[:, None] + pad
    weights = torch.exp(-0.5 * ((centre - torch.arange(n + 2 * pad, dtype=torch.float64)) / length) ** 2)
    return weights / weights.square().sum(dim=1, keepdim=True).sqrt()


def _start(side: Tensor, size: int, draw: torch.Generator) -> Tensor:
    """First cell of a window that overlaps a line of ``size`` cells, all positions equally likely."""
    places = size + side - 1
    return (torch.rand(len(side), generator=draw) * places).long() - side + 1
