"""Mediation: how much of an intervention's effect on the outcome passes through a node, a set of nodes or a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ce_plugin.effects.estimate import chosen_examples
from ce_plugin.effects.plots import html_table
from ce_plugin.errors import (
    ArgumentError,
    InferenceError,
    TargetError,
    UnitError,
    check_integer,
    check_number,
    expected,
)
from ce_plugin.networks.forward import double, widest
from ce_plugin.randomness import generator

if TYPE_CHECKING:
    import pandas as pd


# Units whose resamples are in memory at once: 2,000 resamples of 256 units are 4 MB each for a handful of tensors.
_CHUNK = 256


class Ratio(NamedTuple):
    """Ratios of means with their intervals.

    Attributes:
        share: (U,).
        low: (U,).
        high: (U,).
    """

    share: Tensor
    low: Tensor
    high: Tensor


@dataclass(kw_only=True, eq=False, repr=False)
class Shares:
    """The share of the total effect that passes through each unit, over images.

    Intervals are studentised bootstraps over the images (see :func:`~ce_plugin.effects.ratio_of_means`), each by
    itself. Shares of several units need not add up to 1, and can be negative: a unit may work against the effect.

    Attributes:
        indirect: mean NIE / mean TE, (U,): what the unit carries by itself.
        indirect_low, indirect_high: its interval, (U,).
        direct: 1 - mean NDE / mean TE, (U,): what is lost when the unit alone keeps its clean value.
        direct_low, direct_high: its interval, (U,).
        total, total_low, total_high: mean TE and its interval.
        n_images: number of images.
        level: of the intervals.
        unit_labels, site, outcome: what the units are, where, and what was measured.
        cut: everything passes through the site's layer.
        whole: the units that stand for the whole layer; of a cut layer their share is 1 by construction.
    """

    indirect: Tensor
    indirect_low: Tensor
    indirect_high: Tensor
    direct: Tensor
    direct_low: Tensor
    direct_high: Tensor
    total: float
    total_low: float
    total_high: float
    n_images: int
    level: float
    unit_labels: list[str]
    site: str = ""
    outcome: str = ""
    cut: bool = False
    whole: tuple[int, ...] = ()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per unit, the largest indirect share first.

        Columns: unit, label, indirect_share, indirect_low, indirect_high, direct_share, direct_low, direct_high, cut,
        by_construction.
        """
        import pandas as pd

        named = {
            "indirect_share": self.indirect,
            "indirect_low": self.indirect_low,
            "indirect_high": self.indirect_high,
        }
        named |= {"direct_share": self.direct, "direct_low": self.direct_low, "direct_high": self.direct_high}
        units = range(len(self))
        frame = pd.DataFrame(
            {
                "unit": list(units),
                "label": self.unit_labels,
                **{name: values.detach().cpu().numpy() for name, values in named.items()},
                "cut": self.cut,
                "by_construction": [self.cut and u in self.whole for u in units],
            }
        )
        ordered: pd.DataFrame = frame.sort_values("indirect_share", ascending=False, kind="stable", ignore_index=True)
        return ordered

    def __len__(self) -> int:
        return len(self.indirect)

    def __repr__(self) -> str:
        cut = " (a cut: the share of the whole layer is 1 by construction)" * self.cut
        lines = [
            f"Shares of the effect on {self.outcome or 'the outcome'} through {self.site or 'a site'}{cut}",
            f"  {self.n_images} images, mean total effect {self.total:+.4g} "
            f"[{self.total_low:+.4g}, {self.total_high:+.4g}], intervals at {self.level:g}",
        ]
        for u in self.indirect.argsort(descending=True, stable=True)[:5].tolist():
            note = ", by construction" if self.cut and u in self.whole else ""
            lines.append(
                f"  {self.unit_labels[u]}: {float(self.indirect[u]):.3f} "
                f"[{float(self.indirect_low[u]):.3f}, {float(self.indirect_high[u]):.3f}] by itself, "
                f"{float(self.direct[u]):.3f} lost without it{note}"
            )
        return "\n".join(lines + ["  ..."] * (len(self) > 5))


def ratio_of_means(part: Tensor, total: Tensor, level: float = 0.95, n_boot: int = 2000, seed: int = 0) -> Ratio:
    """Ratio of two means over images, with a studentised bootstrap interval.

        share = sum_i part_i / sum_i total_i,   SE = sqrt(sum_i (part_i - share total_i)^2 / (N (N - 1))) / |mean total|

    and the interval [share - q_high SE, share - q_low SE], q being quantiles of (share* - share) / SE* over images
    drawn with replacement. Studentised, because both simpler intervals are too short for ratios: with 20 images whose
    totals are log-normal, intervals at 95 % covered 85 % (BCa), 88 % (percentile) and 91 % (studentised); with
    part = total^1.5 and 50 images 69 % (percentile) and 84 %. No interval mends images of which one carries the mean.

    Args:
        part: (N, U), one column for each unit.
        total: (N,), not 0 on average (see :func:`refuse_without_total`).
        level: in (0, 1).
        n_boot: resamples, at least 100.
        seed: of the resampling; the images' order does not matter.

    Returns:
        Shares (U,) in float64 and their interval, infinite where there are too few images for one.

    Raises:
        UnitError: where the shapes do not go together.
        InferenceError: for fewer than two images.
        ArgumentError: for a level or number of resamples out of range.

    Example:
        >>> import torch
        >>> total = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        >>> ratio = ratio_of_means(torch.stack([total / 2, total - 1], dim=1), total)
        >>> ratio.share.round(decimals=3).tolist(), bool(ratio.low[1] < 0.667 < ratio.high[1])
        ([0.5, 0.667], True)

    Source: Efron and Tibshirani 1993, chapter 12 (bootstrap-t); ratio estimation, Cochran 1977, chapter 6.
    """
    _check(part, total, level, n_boot)
    return _ratio(part, total, total, level, n_boot, seed)


def mean_interval(x: Tensor, level: float, n_boot: int, seed: int) -> tuple[float, float, float]:
    """Mean over images, (N,), and its studentised bootstrap interval."""
    ratio = _ratio(x[:, None], torch.ones_like(x), x, level, n_boot, seed)
    return float(ratio.share), float(ratio.low), float(ratio.high)


def refuse_without_total(total: Tensor, level: float, n_boot: int, seed: int) -> tuple[float, float, float]:
    """Mean total effect and its interval, or an error where the interval contains 0.

    Args:
        total: (N,), each image's total effect.
        level, n_boot, seed: as in :func:`ratio_of_means`.

    Returns:
        (mean, low, high).

    Raises:
        InferenceError: where there is no total effect to have a share of.

    Example:
        >>> import torch
        >>> refuse_without_total(torch.tensor([1.0, -1.0, 0.5, -0.6, 0.2]), 0.95, 1000, 0)
        Traceback (most recent call last):
        ...
        ce_plugin.errors.InferenceError: There is no total effect to have a share of: its mean over 5 images is +0.02,
        with the interval [...] at level 0.95, which contains 0. ...
    """
    _check(total[:, None] if total.dim() == 1 else total, total, level, n_boot)
    mean, low, high = mean_interval(total, level, n_boot, seed)
    if not (low > 0 or high < 0):  # written so that NaN is refused too
        raise InferenceError(
            f"There is no total effect to have a share of: its mean over {len(total)} images is {mean:+.4g}, with the "
            f"interval [{low:+.4g}, {high:+.4g}] at level {level:g}, which contains 0. "
            "Take more images, a stronger intervention or another class; .total and .indirect themselves can be read."
        )
    return mean, low, high


def check_bootstrap(level: float, n_boot: int) -> None:
    """Whether level and number of resamples make an interval.

    Raises:
        ArgumentError: where they do not.

    Example:
        >>> check_bootstrap(0.95, 2000)
    """
    check_number("level", level, "in (0, 1)", above=0, below=1, hint="Write 0.95 for 95 per cent.")
    check_integer("n_boot", n_boot)
    if n_boot < 100:
        raise ArgumentError(expected("n_boot", "at least 100", n_boot, "2000 resamples are a matter of moments."))


def _check(part: Tensor, total: Tensor, level: float, n_boot: int) -> None:
    """Errors before any work."""
    check_bootstrap(level, n_boot)
    if total.dim() != 1 or part.dim() != 2 or len(part) != len(total):
        got = f"shapes {tuple(part.shape)} and {tuple(total.shape)}"
        raise UnitError(expected("part", "of shape (N, U), with totals (N,)", got))
    if len(total) < 2:
        hint = "A share is a ratio of means over images; of one image read .indirect and .total."
        raise InferenceError(expected("total", "the effects on at least 2 images", len(total), hint))


def _ratio(part: Tensor, total: Tensor, key: Tensor, level: float, n_boot: int, seed: int) -> Ratio:
    """Ratios and their intervals; images take part in the resampling by the rank of ``key``, (N,)."""
    y, x = double(part.detach()), double(total.detach())
    n, mean = len(x), x.mean()
    share = y.sum(dim=0) / x.sum() + 0.0  # no -0.0 in tables
    # What the ratios leave over: a share that is 1 but for rounding then has an interval of rounding's size.
    left = y - share * x[:, None]
    error = _ratio_error(left.square().sum(dim=0), n, mean)
    low, high = torch.empty_like(share), torch.empty_like(share)
    counts = _resamples(key, n_boot, seed)
    drawn, squares = (counts @ x)[:, None], (counts @ x.square())[:, None]
    for start in range(0, len(share), _CHUNK):
        own = slice(start, start + _CHUNK)
        off = counts @ left[:, own] / drawn
        # The sum of (left - off total)^2 over each resample, written out as three products of matrices.
        around = counts @ left[:, own].square()
        spread = around - 2 * off * (counts @ (left[:, own] * x[:, None])) + off.square() * squares
        # One image drawn again and again leaves nothing but rounding.
        spread = torch.where(spread <= 1e-12 * around, 0.0, spread)
        lowest, highest = _extremes(off, _ratio_error(spread, n, drawn / n), level)
        low[own] = share[own] - (highest * error[own]).nan_to_num(0.0, torch.inf, -torch.inf)
        high[own] = share[own] - (lowest * error[own]).nan_to_num(0.0, torch.inf, -torch.inf)
    return Ratio(share, low, high)


def _ratio_error(spread: Tensor, n: int, mean: Tensor) -> Tensor:
    """Standard error of a ratio of means, from the sum of squares of what the ratio leaves over."""
    return (spread / (n * (n - 1))).sqrt() / mean.abs()


def _resamples(key: Tensor, n_boot: int, seed: int) -> Tensor:
    """How often each image is drawn, (B, N) in float64: by rank, so that the images' order does not matter."""
    n = len(key)
    drawn = torch.randint(n, (n_boot, n), generator=generator(seed, "bootstrap", n))
    counts = torch.zeros(n_boot, n, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    rank = torch.empty(n, dtype=torch.long)
    rank[key.detach().cpu().argsort(stable=True)] = torch.arange(n)
    return counts[:, rank]


def _extremes(off: Tensor, errors: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """The quantiles of the studentised deviations, (B, U) to (U,)."""
    # A resample without an error of its own: no deviation is no surprise, any other an infinite one.
    surprise = torch.where(off == 0, 0.0, off.sign() * torch.inf)
    ordered = torch.where(errors > 0, off / errors, surprise).sort(dim=0).values
    # No interpolation: between an infinite and a finite value there is nothing.
    tail = math.floor((1 - level) / 2 * len(ordered))
    return ordered[tail], ordered[-1 - tail]


# Of a mediation in a notebook: units in its table, and examples.
_STRONGEST, _SHOWN = 5, 3
# One row per example; the rest belongs to all examples.
_BY_EXAMPLE = ("total", "indirect", "direct", "reference", "target", "predicted")


class MediationEffects(NamedTuple):
    """The four quantities of a mediation analysis, outcome under ``do`` minus outcome when idle, in float64.

    Attributes:
        total: TE = Y(x') - Y(x), (N, C).
        indirect: NIE = Y(x, M(x')) - Y(x), (N, U, C): only the mediator has its value under the intervention.
        direct: NDE = Y(x', M(x)) - Y(x), (N, U, C): only the mediator keeps its clean value.
        interaction: TE - NDE - NIE, (N, U, C): what needs both.
    """

    total: Tensor
    indirect: Tensor
    direct: Tensor
    interaction: Tensor


def mediation_effects(clean: Tensor, intervened: Tensor, mediated: Tensor, blocked: Tensor) -> MediationEffects:
    """Total, natural indirect and natural direct effect and their interaction, from the outcomes of four kinds of run.

        TE = Y(x') - Y(x),   NIE = Y(x, M(x')) - Y(x),   NDE = Y(x', M(x)) - Y(x),   interaction = TE - NDE - NIE

    where x' is the input under the intervention, M(x) the mediator's value on x, and Y(x, M(x')) the outcome on x with
    the mediator set to its value on x'. The network is deterministic, so these hold for each image by itself.

    Args:
        clean: Y(x), (N, C).
        intervened: Y(x'), (N, C).
        mediated: Y(x, M(x')), (N, U, C), one row for each node or set of nodes.
        blocked: Y(x', M(x)), (N, U, C).

    Returns:
        The four quantities. Indirect effects of several nodes need not add up to that of the set.

    Raises:
        UnitError: where the shapes do not go together.

    Example:
        >>> import torch
        >>> y = torch.tensor  # Y = M + 2 X + 3 M X with M = X, from X = 0 to X = 1
        >>> effects = mediation_effects(y([[0.0]]), y([[6.0]]), y([[[1.0]]]), y([[[2.0]]]))
        >>> [value.item() for value in effects]
        [6.0, 1.0, 2.0, 3.0]

    Source: Robins and Greenland 1992; Pearl 2001 (arXiv 1301.2300); for networks Vig et al. 2020 (arXiv 2004.12265).
    """
    shapes = [tuple(t.shape) for t in (clean, intervened, mediated, blocked)]
    n, classes = shapes[0][:1], shapes[0][1:]
    good = clean.dim() == 2 and shapes[0] == shapes[1] and mediated.dim() == 3 and shapes[2] == shapes[3]
    if not good or shapes[2][:1] != n or shapes[2][2:] != classes:
        wanted = "four tensors of shapes (N, C), (N, C), (N, U, C) and (N, U, C)"
        raise UnitError(expected("clean, intervened, mediated, blocked", wanted, ", ".join(map(str, shapes))))
    y, y1, through, around = map(double, (clean, intervened, mediated, blocked))
    total, indirect, direct = y1 - y, through - y[:, None], around - y[:, None]
    found = (total, indirect, direct, total[:, None] - direct - indirect)
    return MediationEffects(*(one.to(widest(clean.device)).to(clean.device) for one in found))


@dataclass(kw_only=True, eq=False, repr=False)
class Mediation:
    """How much of an intervention's effect on N examples passes through each of U nodes (or sets of nodes).

    Signs are those of Eq. 1: outcome under ``do`` minus outcome when idle.

    Attributes:
        total: TE, (N, C).
        indirect: NIE, (N, U, C).
        direct: NDE, (N, U, C).
        unit_labels: U names.
        reference: (N, C), the outcome on the clean input, where it is known.
        target: (N,), where only the target's output was measured; None for all classes.
        predicted: (N,), the class that shares and rankings are about where none is named.
        outcome, intervention: what was measured and done, as text.
        site: where the units are, as text: ``"features.28"``.
        cut: True where everything passes through the site's layer: the share of all its units together is 1 by
            construction; only the shares of proper subsets are informative.
        whole: the rows of ``indirect`` that stand for the whole layer.
        settings: what else reproduces the run, JSON-able.
        class_names: of the classes of the output, where they are known.

    Example:
        >>> import torch
        >>> mediation = Mediation(total=torch.tensor([[-4.0]]), indirect=torch.tensor([[[-1.0], [-2.0]]]),
        ...                       direct=torch.tensor([[[-3.0], [-2.0]]]), unit_labels=["7", "9"], site="features.3")
        >>> mediation.to_dataframe()[["label", "total", "indirect", "direct", "interaction"]]
          label  total  indirect  direct  interaction
        0     7   -4.0      -1.0    -3.0          0.0
        1     9   -4.0      -2.0    -2.0          0.0

    Source: Pearl 2001 (arXiv 1301.2300).
    """

    total: Tensor
    indirect: Tensor
    direct: Tensor
    unit_labels: list[str] = field(default_factory=list)
    reference: Tensor | None = None
    target: Tensor | None = None
    predicted: Tensor | None = None
    outcome: str = ""
    intervention: str = ""
    site: str = ""
    cut: bool = False
    whole: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        n, units, classes = self.indirect.shape if self.indirect.dim() == 3 else (-1, -1, -1)
        if self.direct.shape != (n, units, classes) or self.total.shape != (n, classes):
            got = ", ".join(str(tuple(t.shape)) for t in (self.total, self.indirect, self.direct))
            raise UnitError(expected("total, indirect, direct", "of shapes (N, C), (N, U, C) and (N, U, C)", got))
        self.unit_labels = self.unit_labels or [str(u) for u in range(units)]
        if len(self.unit_labels) != units:
            raise UnitError(expected("unit_labels", f"{units} names", len(self.unit_labels)))
        if any(not 0 <= u < units for u in self.whole):
            raise UnitError(expected("whole", f"rows in range({units})", self.whole))

    @classmethod
    def from_outcomes(
        cls, clean: Tensor, intervened: Tensor, mediated: Tensor, blocked: Tensor, **what: Any
    ) -> Mediation:
        """From the four kinds of run of :func:`mediation_effects`, whose shapes and errors these are.

        Args:
            clean: Y(x), (N, C); kept as ``reference``.
            intervened: Y(x'), (N, C).
            mediated: Y(x, M(x')), (N, U, C).
            blocked: Y(x', M(x)), (N, U, C).
            what: the other attributes by name.
        """
        total, indirect, direct, _ = mediation_effects(clean, intervened, mediated, blocked)
        return cls(total=total, indirect=indirect, direct=direct, reference=clean, **what)

    @property
    def interaction(self) -> Tensor:
        """TE - NDE - NIE, (N, U, C): what needs both the mediator's change and that of the rest."""
        return self.total[:, None] - self.direct - self.indirect

    def share(
        self, class_index: int | Tensor | None = None, level: float = 0.95, n_boot: int = 2000, seed: int = 0
    ) -> Shares:
        """Which share of the total effect passes through each unit: ratios of means over the images.

            indirect share = mean NIE / mean TE,   direct share = 1 - mean NDE / mean TE

        The first is what the unit carries by itself, the second what is lost when it alone keeps its clean
        value; they differ by the interaction's share. Intervals: see :class:`~ce_plugin.effects.Shares`.

        Args:
            class_index: the class whose outcome is meant, one for all images or (N,); None takes the target, the
                only class there is, or each image's ``predicted`` class.
            level: of the intervals, in (0, 1).
            n_boot: resamples of the images, at least 100.
            seed: of the resampling.

        Raises:
            InferenceError: where the interval of the mean total effect contains 0, or there are fewer than two images.
            TargetError: for a class that is not there, or none where it is needed.
            ArgumentError: for a level or number of resamples out of range.
        """
        total, indirect, direct = self.column(class_index)
        mean, low, high = refuse_without_total(total, level, n_boot, seed)
        through = ratio_of_means(indirect, total, level, n_boot, seed)
        without = ratio_of_means(total[:, None] - direct, total, level, n_boot, seed)
        return Shares(
            indirect=through.share, indirect_low=through.low, indirect_high=through.high,
            direct=without.share, direct_low=without.low, direct_high=without.high,
            total=mean, total_low=low, total_high=high, n_images=len(total), level=level,
            unit_labels=self.unit_labels, site=self.site, outcome=self.outcome, cut=self.cut, whole=self.whole,
        )  # fmt: skip

    def column(self, class_index: int | Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Total (N,), indirect (N, U) and direct effect (N, U) on one class per image.

        Args:
            class_index: as for :meth:`share`.

        Raises:
            TargetError: for a class that is not there, or none where it is needed.
        """
        n, classes = self.total.shape
        if class_index is None and classes == 1:
            class_index = 0
        if class_index is None:
            class_index = self.predicted
        wanted = f"one class below {classes}, or one for each of {n} images"
        if class_index is None:
            raise TargetError(expected("class_index", wanted, None, "Say which class the effects are on."))
        index = torch.as_tensor(class_index, device=self.total.device)
        if index.dim() > 1 or index.is_floating_point() or (index.dim() == 1 and len(index) != n):
            raise TargetError(expected("class_index", wanted, f"a tensor of shape {tuple(index.shape)}"))
        if bool(((index < 0) | (index >= classes)).any()):
            raise TargetError(expected("class_index", wanted, index.tolist()))
        where = index.long().expand(n)
        rows = torch.arange(n, device=self.total.device)
        return self.total[rows, where], self.indirect[rows, :, where], self.direct[rows, :, where]

    def to_dataframe(self) -> pd.DataFrame:
        """A tidy frame with one row per example, unit and class.

        Columns: example, unit, label, class, total, indirect, direct, interaction, cut (everything passes through the
        layer), by_construction (the unit is all of such a layer).
        """
        import pandas as pd

        n, units, classes = self.indirect.shape
        example, unit, column = np.indices((n, units, classes)).reshape(3, -1)
        target = None if self.target is None else self.target.cpu().numpy()
        frame: pd.DataFrame = pd.DataFrame(
            {
                "example": example,
                "unit": unit,
                "label": np.asarray(self.unit_labels, dtype=object)[unit],
                "class": column if target is None else target[example],
                "total": self.total.detach().cpu().numpy()[example, column],
                **{
                    name: getattr(self, name).detach().cpu().numpy().reshape(-1)
                    for name in ("indirect", "direct", "interaction")
                },
                "cut": self.cut,
                "by_construction": self.cut & np.isin(unit, self.whole),
            }
        )
        return frame

    def __len__(self) -> int:
        return len(self.total)

    def __getitem__(self, examples: int | slice | Sequence[int]) -> Mediation:
        """Some of the examples; N stays a dimension."""
        chosen = chosen_examples(examples, len(self), "a mediation")
        some: dict[str, Any] = {k: v[chosen] for k, v in vars(self).items() if k in _BY_EXAMPLE and torch.is_tensor(v)}
        return replace(self, **some)

    def _repr_html_(self) -> str:
        """What a notebook shows: of the first examples what is changed, and the units that carry the most of it."""
        if self.target is None and self.predicted is None and self.total.shape[1] > 1:
            return f"<pre>{escape(repr(self))}</pre>"  # no single class to speak of
        totals, indirect, _ = self.column()
        parts = []
        for i in range(min(len(self), _SHOWN)):
            total, own = float(totals[i]), indirect[i].detach().cpu()
            best = (own if total >= 0 else -own).argsort(descending=True, stable=True)[:_STRONGEST].tolist()
            rows = [
                [self.unit_labels[u], f"{float(own[u]):+.3g}", f"{float(own[u]) / total:.1%}" if total else ""]
                for u in best
            ]
            table = html_table(["carries most", "indirect effect", "share of the total"], rows)
            parts.append(f"<p>{escape(self._changed(i, total))}</p>{table}")
        rest = len(self) - len(parts)
        parts += [f"<p>... and {rest} more example{'s' * (rest > 1)}.</p>"] * (rest > 0)
        note = f"Through {self.site or 'a site'}, each unit by itself, on one image."
        if self.cut:
            note += " Everything passes through this layer: all of it together carries everything by construction."
        return f"<div>{''.join(parts)}<p><small>{escape(note)}</small></p></div>"

    def _changed(self, example: int, total: float) -> str:
        """What the intervention does to the outcome of one example's class."""
        column = 0 if self.total.shape[1] == 1 else int(cast(Tensor, self.predicted)[example])
        target = column if self.target is None else self.target[example].tolist()
        names = self.class_names or ()
        known = isinstance(target, int) and target < len(names)
        name = f"“{names[cast(int, target)]}”" if known else f"class {target}"
        of = f"the {(self.outcome or 'outcome').replace('_', '-')} of {name}"
        subject = self.intervention or "The intervention"
        if self.reference is None:
            return f"{subject} changes {of} by {total:+.3g}."
        clean = float(self.reference[example, column])
        return f"{subject} takes {of} from {clean:.3g} to {clean + total:.3g} ({total:+.3g})."

    def __repr__(self) -> str:
        n, units, classes = self.indirect.shape
        what = "the target's output" if self.target is not None else f"{classes} class{'es' * (classes > 1)}"
        cut = " (a cut: everything passes through it, the share of the whole layer is 1 by construction)" * self.cut
        lines = [
            f"Mediation of {self.outcome or 'outcome'} through {self.site or 'a site'}{cut}",
            f"  {n} example{'s' * (n != 1)}, {units} unit{'s' * (units != 1)}, {what}"
            + f"; {self.intervention}" * bool(self.intervention),
        ]
        for i in range(min(n, 3) if units and classes else 0):
            unit, column = divmod(int(self.indirect[i].nan_to_num(0.0).abs().argmax()), classes)
            name = column if self.target is None else int(self.target[i])
            lines.append(
                f"  {i}: class {name}: total {float(self.total[i, column]):+.4g}, largest indirect "
                f"{float(self.indirect[i, unit, column]):+.4g} through {self.unit_labels[unit]}"
            )
        return "\n".join(lines + ["  ..."] * (n > 3))
