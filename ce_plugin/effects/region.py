"""The answer in a sentence: one region is covered, and then as much of the picture at random places.

The region is chosen from the trials by one rule (:func:`grown_region`), and then run: a choice from noise would do no
more than the random places do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ce_plugin.effects import inference

PLACEMENTS = 24
"""Random places at which as much is covered: the smallest p-value is 1 / 25."""

# The region holds one unit in so many.
_ONE_IN = 8
_LEVEL = 0.95
_UNSURE = 0.5
# A probability below this, or as near to one, is saturated.
_LOW = 0.01
_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")


@dataclass(kw_only=True, eq=False)
class RegionTest:
    """What the network says of N examples when one region is covered, and when as much is covered elsewhere.

    Each outcome is the mean over the intervention's alternative values (the fills of a mask), all of which are run.

    Attributes:
        region: the units that are covered, bool (N, U).
        target: the class, (N,).
        measured: ``"probability"``, or the outcome where the network returns no classes.
        clean: outcome of the class with nothing covered, (N,).
        covered: with the region covered, (N,).
        placed: with as much covered at each of K random places, (N, K).
        answers: the three most probable classes, best first, (N, 3), and their probabilities ``answered``; None where
            the network returns no classes.
        grid: the cells of the grid whose cells the units are, or none.
        passes: of each example, that this took.

    Example:
        >>> test = RegionTest(
        ...     region=torch.tensor([[True, False]]), target=torch.tensor([0]), measured="probability",
        ...     clean=torch.tensor([0.32]), covered=torch.tensor([0.04]), placed=torch.tensor([[0.3, 0.28, 0.32]]),
        ... )
        >>> test.p_values().tolist(), [round(end, 2) for end in test.interval()[0].tolist()]
        ([0.25], [0.25, 0.35])

    Source: the rank of one among random ones is Monte Carlo's p-value (Phipson and Smyth 2010, arXiv 1603.05766).
    """

    region: Tensor
    target: Tensor
    measured: str
    clean: Tensor
    covered: Tensor
    placed: Tensor
    answers: Tensor | None = None
    answered: Tensor | None = None
    grid: tuple[int, ...] = ()
    passes: int = 0

    def p_values(self) -> Tensor:
        """p = (1 + #{places that take as much or more}) / (K + 1) of each example, (N,)."""
        as_large = (self.placed <= self.covered[:, None]).sum(1)
        return (1 + as_large.double()) / (self.placed.shape[1] + 1)

    def interval(self, level: float = _LEVEL) -> Tensor:
        """Two-sided t interval of the mean over all places, from the K that were drawn, (N, 2).

        It does not hold for saturated probabilities, see :meth:`is_saturated`.
        """
        k = self.placed.shape[1]
        placed = self.placed.double()
        error = placed.std(1) / math.sqrt(k) if k > 1 else torch.full_like(placed[:, 0], torch.nan)
        half = inference.half_width(error, torch.full_like(error, k - 1), level)
        return torch.stack([placed.mean(1) - half, placed.mean(1) + half], 1)

    def sentence(self, example: int, name: Callable[[int], str], verb: str = "Covering", units: str = "units") -> str:
        """What was found on one example, for a reader who knows nothing of the method.

        Args:
            example: which one.
            name: from a class to its name.
            verb: what is done to the region: a word before it, or words round it, ``"Setting {} to zero"``.
            units: what the units are, where they are no cells of a picture's grid.

        Example:
            >>> test = RegionTest(
            ...     region=torch.tensor([[True, False]]), target=torch.tensor([0]), measured="probability",
            ...     clean=torch.tensor([0.32]), covered=torch.tensor([0.04]), placed=torch.tensor([[0.3, 0.28, 0.32]]),
            ... )
            >>> print(test.sentence(0, ["cat", "dog"].__getitem__, "Setting {} to zero", "channels"))
            Setting the strongest of 2 channels to zero takes “cat” from 32 % to 4 %. Setting as many to zero at
            random, 3 times, leaves 30 % on average (25 to 35): that it is this part which matters is not shown
            (p = 0.25).
        """
        i = example
        said, show = f"“{name(int(self.target[i]))}”", _percent if self.measured == "probability" else _plain
        clean, covered = float(self.clean[i]), float(self.covered[i])
        mean, (low, high) = float(self.placed[i].double().mean()), self.interval()[i].tolist()
        k = self.placed.shape[1]
        form = verb if "{}" in verb else f"{verb} {{}}"
        done = form.format(self.place(i, units))
        moved = f"{done} takes {said} from {show(clean)} to {show(covered)}"
        if show(clean) == show(covered):
            moved = f"{done} leaves {said} at {show(covered)}"
        elif covered > clean:
            moved = f"{done} raises {said} from {show(clean)} to {show(covered)}"
        # Of units without places as many are drawn.
        again = form.format("as much at {} other places" if len(self.grid) == 2 else "as many")
        again = again.format(k) if len(self.grid) == 2 else f"{again} at random, {k} times,"
        then, others = f"{again[0].lower()}{again[1:]}", f"leaves {show(mean)} on average"
        if self.is_saturated(i):
            least, most = self.placed[i].aminmax()
            others += f" (single places {_range(float(least), float(most), show)})"
        elif not math.isnan(low):
            others += f" ({_range(low, high, show)})"
        if self.is_shown(i):
            return f"{self._before(i, name)}{moved}; {then} {others}."
        if covered > clean:
            return f"{self._before(i, name)}{moved}; {then} {others}: this part does not support {said}."
        p = float(self.p_values()[i])
        doubt = f"{again} {others}: that it is this part which matters is not shown (p = {p:.2g})."
        return f"{self._before(i, name)}{moved}. {doubt}"

    def is_shown(self, example: int) -> bool:
        """Whether the region takes from the class what random places do not: p is 5 % or less."""
        return float(self.p_values()[example]) <= 1 - _LEVEL + 1e-9 and bool(
            self.covered[example] < self.clean[example]
        )

    def is_saturated(self, example: int) -> bool:
        """Whether the probability is next to 0 or 1 with nothing covered.

        Few places then carry all of what varies, 24 of them may miss these, and :meth:`interval` promises more than it
        keeps (``benchmarks/results/answer_cifar.md``): the sentence gives the range of the places instead.
        """
        clean = float(self.clean[example])
        return self.measured in ("probability", "sigmoid") and not _LOW <= clean <= 1 - _LOW

    def place(self, example: int, units: str = "units") -> str:
        """Where the region is, in words; ``units`` are what is no cell of a picture's grid."""
        chosen = self.region[example].nonzero()[:, 0]
        if len(self.grid) != 2:
            some = f"{len(chosen)} " if len(chosen) > 1 else ""
            return f"the {some}strongest of {self.region.shape[1]} {units}"
        rows, columns = chosen // self.grid[1], chosen % self.grid[1]
        middle = (float(rows.float().mean()) + 0.5) / self.grid[0], (float(columns.float().mean()) + 0.5) / self.grid[1]
        words = [part[min(int(3 * at), 2)] for part, at in zip((_ROWS, _COLUMNS), middle, strict=True)]
        where = " ".join(filter(None, words))
        return f"the outlined part at the {where}" if where else "the outlined centre"

    def _before(self, example: int, name: Callable[[int], str]) -> str:
        """That the network says something else, or is not sure."""
        if self.answers is None or self.answered is None:
            return ""
        best, target = self.answers[example].tolist(), int(self.target[example])
        shares = self.answered[example].tolist()
        if best[0] != target:
            own = _percent(float(self.clean[example]))
            return f"The network answers “{name(best[0])}” ({_percent(shares[0])}), not “{name(target)}” ({own}). "
        if shares[0] < _UNSURE and len(best) > 1:
            two = [f"“{name(one)}” {_percent(share)}" for one, share in zip(best[:2], shares[:2], strict=True)]
            return f"The network is unsure: {', '.join(two)}. "
        return ""

    def __getitem__(self, examples: Sequence[int]) -> RegionTest:
        """Some of the examples; N stays a dimension."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        some: dict[str, Any] = {k: v[list(examples)] if isinstance(v, Tensor) else v for k, v in values.items()}
        return RegionTest(**some)


def grown_region(contribution: Tensor, grid: tuple[int, ...] | None) -> Tensor:
    """The region that is tested: grown from the strongest unit by its strongest neighbour, to an eighth of the units.

    On a grid neighbours share a side; of other units the strongest are taken. It stops earlier where no neighbour
    supports the class.

    Args:
        contribution: (U,), smoothed where there is such a map.
        grid: its number of cells along each dimension, where the units are its cells.

    Returns:
        bool (U,), with at least one unit.

    Example:
        >>> row = torch.tensor([0.0, 9.0, 3.0, 7.0, 0.0, 1.0, 0.0, 0.0])
        >>> grown_region(row.repeat(2), (16,)).nonzero()[:, 0].tolist()  # 7 is stronger than 3, but no neighbour
        [1, 2]
        >>> grown_region(torch.tensor([0.1, 0.4, -0.2]), None).tolist()
        [False, True, False]
    """
    values = contribution.detach().double().cpu().numpy()
    values = np.where(np.isnan(values), -np.inf, values)
    most = max(round(len(values) / _ONE_IN), 1)
    if grid is None:
        chosen = np.zeros(len(values), dtype=bool)
        order = np.argsort(-values, kind="stable")[:most]
        chosen[order[0]] = True
        chosen[order[values[order] > 0]] = True
        return torch.from_numpy(chosen)
    there = values.reshape(grid)
    inside = np.zeros(grid, dtype=bool)
    inside[np.unravel_index(int(there.argmax()), grid)] = True
    while int(inside.sum()) < most:
        best = np.where(_neighbours(inside), there, -np.inf)
        place = np.unravel_index(int(best.argmax()), grid)
        if not best[place] > 0:
            break
        inside[place] = True
    return torch.from_numpy(inside.reshape(-1))


def _neighbours(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The cells that share a side with the region and are not in it."""
    found = np.zeros_like(inside)
    for axis in range(inside.ndim):
        for step in (-1, 1):
            moved = np.roll(inside, step, axis)
            # What leaves the grid on one side does not come back on the other.
            edge = [slice(None)] * inside.ndim
            edge[axis] = slice(0, 1) if step == 1 else slice(-1, None)
            moved[tuple(edge)] = False
            found |= moved
    return found & ~inside


def other_places(region: Tensor, grid: tuple[int, ...], least: int = PLACEMENTS) -> Tensor:
    """All other places of a region's shape on its grid: shifted, mirrored and turned, wholly inside.

    Places that have a cell in common with the region are left out, unless fewer than ``least`` would remain.

    Args:
        region: bool (U,).
        grid: its number of cells along each dimension.
        least: see above.

    Returns:
        bool (M, U), without the region itself.

    Example:
        >>> other_places(torch.tensor([True, True, False, False]), (2, 2), least=1).int().tolist()
        [[0, 0, 1, 1]]
        >>> other_places(torch.tensor([True, True, False, False]), (2, 2)).int().tolist()
        [[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """
    inside = region.cpu().numpy().reshape(grid)
    shape = inside[tuple(slice(int(at.min()), int(at.max()) + 1) for at in inside.nonzero())]
    found: dict[bytes, npt.NDArray[np.bool_]] = {}
    for axes in itertools.permutations(range(len(grid))):
        for mirrored in itertools.product((False, True), repeat=len(grid)):
            turned = np.flip(shape.transpose(axes), tuple(k for k, one in enumerate(mirrored) if one))
            steps = [range(size - own + 1) for size, own in zip(grid, turned.shape, strict=True)]
            for corner in itertools.product(*steps):
                place = np.zeros(grid, dtype=bool)
                place[tuple(slice(a, a + own) for a, own in zip(corner, turned.shape, strict=True))] = turned
                found.setdefault(place.tobytes(), place)
    found.pop(inside.tobytes())
    apart = [place for place in found.values() if not (place & inside).any()]
    kept = apart if len(apart) >= least else list(found.values())
    return torch.from_numpy(np.array(kept, dtype=bool).reshape(len(kept), len(region)))


def placements(region: Tensor, grid: tuple[int, ...] | None, count: int, generator: torch.Generator) -> Tensor:
    """Random places at which as much is covered, bool (K, U).

    On a grid they have the region's shape (:func:`other_places`), each place once where there are enough; of other
    units as many are drawn. A region that has no other place is its own.

    Args:
        region: bool (U,).
        grid: see :func:`grown_region`.
        count: K.
        generator: of the draws.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> placements(torch.tensor([True, False, True, False]), None, 3, g).sum(1).tolist()
        [2, 2, 2]
    """
    if grid is None:
        size = int(region.sum())
        rows = torch.zeros(count, len(region), dtype=torch.bool)
        for row in rows:
            row[torch.randperm(len(region), generator=generator)[:size]] = True
        return rows
    every = other_places(region, grid, count)
    if not len(every):
        return region.expand(count, -1).clone()
    if len(every) >= count:
        return every[torch.randperm(len(every), generator=generator)[:count]]
    return every[torch.randint(len(every), (count,), generator=generator)]


def _percent(value: float) -> str:
    """A probability as per cent, with a digit where it is small or next to one."""
    share = 100 * value
    if 0 < share < 0.1:
        return "below 0.1 %"
    return f"{share:.1f} %" if share < 1 or 99 < share < 100 else f"{share:.0f} %"


def _plain(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _range(low: float, high: float, show: Callable[[float], str]) -> str:
    """Two ends, the unit once."""
    if show is _percent:
        low, high = max(low, 0.0), min(high, 1.0)
        return f"{show(low).removesuffix(' %')} to {show(high).removesuffix(' %')}"
    return f"{show(low)} to {show(high)}"
