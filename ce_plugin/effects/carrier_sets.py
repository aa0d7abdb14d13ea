"""How many units carry an effect: nested sets of the best units, chosen on some images and tested on others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ce_plugin.effects.mediation import Mediation, check_bootstrap, ratio_of_means, refuse_without_total
from ce_plugin.errors import ArgumentError, InferenceError, UnitError, check_integer, expected
from ce_plugin.networks.forward import double
from ce_plugin.visualization.pictures import NEGATIVE, POSITIVE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(kw_only=True, eq=False, repr=False)
class Carriers:
    """How many units carry given parts of the total effect, on images other than those that chose the units.

    Attributes:
        order: all units, the best first, as the choosing images ranked them.
        sizes: sizes k of the sets that were run, ascending; the set of size k is ``order[:k]``.
        share: joint NIE of each set / TE, ratios of means over the test images, (K,).
        share_low, share_high: their intervals, (K,).
        needed: for each level the smallest k that was run and whose share reaches it; None where none does.
        interval: for each level (low, high): k below ``low`` are too few and ``high`` is enough, each at half of
            1 - ``level``; None where no set that was run is surely enough.
        total, total_low, total_high: mean TE of the test images and its interval.
        n_images: number of test images.
        level: of the intervals.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    share: Tensor
    share_low: Tensor
    share_high: Tensor
    needed: dict[float, int | None]
    interval: dict[float, tuple[int | None, int | None]]
    total: float
    total_low: float
    total_high: float
    n_images: int
    level: float

    def to_dataframe(self) -> pd.DataFrame:
        """The curve, one row per set. Columns: n_units, share, share_low, share_high."""
        import pandas as pd

        columns = {"share": self.share, "share_low": self.share_low, "share_high": self.share_high}
        numbers = {name: values.cpu().numpy() for name, values in columns.items()}
        frame: pd.DataFrame = pd.DataFrame({"n_units": list(self.sizes), **numbers})
        return frame

    def __repr__(self) -> str:
        lines = [f"Carriers: {len(self.order)} units, {len(self.sizes)} nested sets on {self.n_images} test images"]
        for part, k in self.needed.items():
            low, high = ("more than were run" if end is None else end for end in self.interval[part])
            found = "not reached" if k is None else f"{k} unit{'s' * (k != 1)}"
            lines.append(f"  {part:.0%} of the total effect: {found} [{low}, {high}]")
        return "\n".join(lines)


def ranking(mediation: Mediation, class_index: int | Tensor | None = None) -> tuple[int, ...]:
    """The units by mean indirect effect in the direction of the total effect, the strongest carrier first.

    Args:
        mediation: of the choosing images.
        class_index: as for :meth:`Mediation.share`.

    Returns:
        All unit indices; equal units in their own order, units that work against the effect last.

    Raises:
        InferenceError: where the mean total effect has no direction (0 or not a number).
        TargetError: for a class that is not there, or none where it is needed.

    Example:
        >>> import torch
        >>> indirect = torch.tensor([[[0.5], [-2.0], [-1.0]]])
        >>> ranking(Mediation(total=torch.tensor([[-3.0]]), indirect=indirect, direct=torch.zeros(1, 3, 1)))
        (1, 2, 0)
    """
    given: object = mediation
    if not isinstance(given, Mediation):
        raise ArgumentError(expected("mediation", "a Mediation", type(given).__name__))
    total, indirect, _ = mediation.column(class_index)
    direction = double(total).mean().sign()
    if not bool(direction.abs() == 1):
        got = f"{float(double(total).mean()):+.4g} over {len(total)} images"
        hint = "Take other images, a stronger intervention or another class."
        raise InferenceError(expected("mediation", "one with a mean total effect other than 0", got, hint))
    score = double(indirect).mean(dim=0) * direction
    return tuple(score.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist())


def nested_sets(order: Sequence[int], sizes: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """The sets of the best units whose joint indirect effects are to be run.

    Args:
        order: from :func:`ranking`.
        sizes: how many units each set has; None means 1, 2, 4, ... and all.

    Returns:
        One set for each size.

    Raises:
        UnitError: for a size that is not there, or a unit that stands twice.

    Example:
        >>> nested_sets((4, 2, 0, 1, 3))
        [(4,), (4, 2), (4, 2, 0, 1), (4, 2, 0, 1, 3)]
    """
    units = len(order)
    if not units or len(set(order)) != units:
        raise UnitError(expected("order", "one or more different units", list(order)[:8], "Write ranking(mediation)."))
    if sizes is None:
        sizes = [*(2**i for i in range(units.bit_length()) if 2**i < units), units]
    for k in sizes:
        check_integer("sizes", k, f"whole numbers from 1 to {units}, the number of units", least=1, error=UnitError)
        if k > units:
            raise UnitError(expected("sizes", f"from 1 to {units}, the number of units", list(sizes)))
    return [tuple(order[:k]) for k in sizes]


def next_sizes(sizes: Sequence[int], share: Tensor, levels: Sequence[float] = (0.5, 0.9)) -> list[int]:
    """Which sizes to run next, to know for each level the smallest size that reaches it: bisection.

    It takes the share to grow with the set where it has not been run; to see where it falls, run all sizes.

    Args:
        sizes: those that were run, ascending.
        share: their shares, (K,).
        levels: parts of the total effect.

    Returns:
        Ascending sizes; none once every level that is reached is reached at a size whose predecessor was run.

    Raises:
        UnitError: where the shapes do not go together.

    Example:
        >>> import torch
        >>> next_sizes([1, 2, 4, 8, 16], torch.tensor([0.1, 0.2, 0.4, 0.7, 1.0]))
        [6, 12]
        >>> next_sizes([1, 2, 3], torch.tensor([0.1, 0.6, 0.7]))
        []
    """
    ks = _checked_sizes(sizes, len(share))
    found = set()
    for part in levels:
        place = _first(share >= part)
        if place is not None:
            before = ks[place - 1] if place else 0
            if ks[place] - before > 1:
                found.add((before + ks[place]) // 2)
    return sorted(found)


def carried(
    order: Sequence[int],
    indirect: Tensor,
    total: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> Carriers:
    """The smallest number of the best units whose joint indirect effect on test images reaches each level.

        k(level) = min { k : mean_i NIE_i(order[:k]) / mean_i TE_i >= level }

    The interval of k comes from that of the share: k is too small where the upper end of its share's interval stays
    below the level, and large enough where the lower end reaches it.

    Args:
        order: from :func:`ranking` on *other* images: on the same ones the best are best by luck too.
        indirect: joint NIE of ``order[:k]`` on the test images, (N, K), one column for each of ``sizes``.
        total: TE on the test images, (N,).
        sizes: ascending; None means 1, 2, ..., K.
        levels: parts of the total effect, each above 0.
        level: of the intervals, in (0, 1).
        n_boot: resamples of the images, at least 100.
        seed: of the resampling.

    Returns:
        The curve, and k for each level.

    Raises:
        InferenceError: where the interval of the mean total effect contains 0, or there are fewer than two images.
        UnitError: where the shapes do not go together.
        ArgumentError: for a level or number of resamples out of range.

    Example:
        >>> import torch
        >>> total = torch.linspace(1, 2, 20)
        >>> found = carried((5, 3, 4), total[:, None] * torch.tensor([0.4, 0.7, 1.0]), total)
        >>> found.needed
        {0.5: 2, 0.9: 3}
    """
    ks = _checked_sizes(range(1, indirect.shape[-1] + 1) if sizes is None else sizes, indirect.shape[-1])
    nested_sets(order, ks)
    check_levels(levels)
    mean, low, high = refuse_without_total(total, level, n_boot, seed)
    curve = ratio_of_means(indirect, total, level, n_boot, seed)
    needed: dict[float, int | None] = {}
    interval: dict[float, tuple[int | None, int | None]] = {}
    for part in levels:
        first, early, late = (_first(values >= part) for values in (curve.share, curve.high, curve.low))
        needed[part] = None if first is None else ks[first]
        # All sizes above the last one that surely is too small may do, whether they were run or not.
        lowest = None if early is None else (ks[early - 1] if early else 0) + 1
        interval[part] = (lowest, None if late is None else ks[late])
    return Carriers(
        order=tuple(order), sizes=tuple(ks), share=curve.share, share_low=curve.low, share_high=curve.high,
        needed=needed, interval=interval, total=mean, total_low=low, total_high=high, n_images=len(total), level=level,
    )  # fmt: skip


def carriers(
    choose: Mediation,
    run: Callable[[list[tuple[int, ...]]], Tensor],
    total: Tensor,
    *,
    class_index: int | Tensor | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> Carriers:
    """How many units carry 50 % and 90 % of the effect: ranked on some images, tested on others.

    Sets of the 1, 2, 4, ... best units are run, then bisection between two sizes finds the smallest that does, about
    log2(U) sets more for each level.

    Args:
        choose: mediation of the choosing images.
        run: ``run(sets)`` returns the joint NIE of each set on the test images, (N, len(sets)).
        total: TE on the test images, (N,).
        class_index: of the choosing images, as for :meth:`Mediation.share`.
        levels, level, n_boot, seed: as in :func:`carried`.

    Returns:
        The curve over the sets that were run, and the number of units for each level.

    Raises:
        InferenceError, ArgumentError, TargetError: as in :func:`carried` and :func:`ranking`, before any run.
        UnitError: where ``run`` returns another shape.

    Example:
        >>> import torch
        >>> weight, total = torch.tensor([0.1, 0.3, 0.2, 0.4]), torch.linspace(1, 2, 20)
        >>> effect = total[:, None] * weight
        >>> choose = Mediation(total=total[:, None], indirect=effect[..., None], direct=effect[..., None])
        >>> found = carriers(choose, lambda sets: torch.stack([effect[:, list(s)].sum(1) for s in sets], dim=1), total)
        >>> found.order, found.needed
        ((3, 1, 2, 0), {0.5: 2, 0.9: 3})
    """
    if not callable(run):
        raise ArgumentError(expected("run", "a callable on sets of units", type(run).__name__))
    order = ranking(choose, class_index)
    check_bootstrap(level, n_boot)
    check_levels(levels)
    refuse_without_total(total, level, n_boot, seed)
    columns: dict[int, Tensor] = {}
    hint = [len(chosen) for chosen in nested_sets(order)]
    while hint:
        found = run(nested_sets(order, hint))
        if found.shape != (len(total), len(hint)):
            raise UnitError(expected("run", f"a callable that returns {(len(total), len(hint))}", tuple(found.shape)))
        columns.update(zip(hint, found.unbind(dim=1), strict=True))
        sizes = sorted(columns)
        share = torch.stack([double(columns[k]).mean() for k in sizes]) / double(total).mean()
        hint = next_sizes(sizes, share, levels)
    joint = torch.stack([columns[k] for k in sizes], dim=1)
    return carried(order, joint, total, sizes=sizes, levels=levels, level=level, n_boot=n_boot, seed=seed)


def _checked_sizes(sizes: Sequence[int], n: int) -> list[int]:
    """Ascending sizes, one for each of n columns."""
    ks = [check_integer("sizes", k, "whole numbers of units", error=UnitError) for k in sizes]
    if len(ks) != n or not ks or ks[0] < 1 or any(b <= a for a, b in itertools.pairwise(ks)):
        raise UnitError(expected("sizes", f"{n} ascending numbers of units, one for each column", ks[:8]))
    return ks


def check_levels(levels: Sequence[float]) -> None:
    """Levels are parts of the total effect.

    Raises:
        ArgumentError: they are not.
    """
    given: object = levels
    every: list[object] = list(given) if isinstance(given, (list, tuple)) else []
    numbers = all(not isinstance(part, bool) and isinstance(part, Real) and float(part) > 0 for part in every)
    if not every or not numbers:
        hint = "Write (0.5, 0.9) for 50 and 90 per cent."
        raise ArgumentError(expected("levels", "one or more numbers above 0", repr(levels), hint))


def _first(found: Tensor) -> int | None:
    """Index of the first True."""
    places = found.nonzero().flatten()
    return int(places[0]) if len(places) else None


def plot_carriers(carriers: Carriers, *, width: int = 480, title: str | None = None) -> Figure:
    """Draw the share of the total effect that the best units carry, against their number.

    Args:
        carriers: what :func:`ce_plugin.effects.carriers` returned.
        width: of the figure, in pixels.
        title: written above; None says on how many images.

    Returns:
        A figure: the curve with its interval, a line for each level and its number of units where that is reached.

    Example:
        >>> import torch
        >>> from ce_plugin.effects import carried
        >>> total = torch.linspace(1, 2, 20)
        >>> figure = plot_carriers(carried((5, 3, 4), total[:, None] * torch.tensor([0.4, 0.7, 1.0]), total))
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['50 %: 2 units', '90 %: 3 units']
    """
    from ce_plugin.visualization.figure import NotebookFigure

    figure = NotebookFigure(figsize=(width / 100, 0.65 * width / 100), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    low, high, share = (v.cpu().numpy() for v in (carriers.share_low, carriers.share_high, carriers.share))
    axes.fill_between(carriers.sizes, low, high, color=POSITIVE, alpha=0.25, linewidth=0)
    axes.plot(carriers.sizes, share, color=POSITIVE, marker="o", markersize=3)
    for part, k in carriers.needed.items():
        axes.axhline(part, color="#555555", linewidth=0.8, linestyle=":")
        if k is not None:
            axes.plot([k], [share[carriers.sizes.index(k)]], color=NEGATIVE, marker="o", markersize=6)
        found = "not reached" if k is None else f"{k} unit{'s' * (k != 1)}"
        axes.annotate(
            f"{part * 100:g} %: {found}", (0.01, part), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"number of units, best first, of {len(carriers.order)}")
    axes.set_ylabel("share of the total effect")
    axes.set_title(f"{carriers.n_images} test images" if title is None else title, fontsize=10)
    return figure
