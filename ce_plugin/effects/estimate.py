"""Estimate: the effects of all units on all classes for N examples, with what is known about their errors."""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ce_plugin.effects import inference
from ce_plugin.effects.estimators import interactions, joint_interaction
from ce_plugin.errors import (
    ArgumentError,
    DesignError,
    InferenceError,
    InputError,
    SaturationWarning,
    TargetError,
    UnitError,
    check_integer,
    check_number,
    expected,
)
from ce_plugin.files import damaged, load, save
from ce_plugin.networks.forward import double
from ce_plugin.sites import InputSite
from ce_plugin.visualization.pictures import NEGATIVE, POSITIVE, as_picture, overlay, sheet, signal

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


# Of a volume, in a plot.
_SLICES = 6
# One row per example; the rest belongs to all examples.
_BY_EXAMPLE = (
    *("effect", "std_error", "dof", "reference"),
    *("n_units", "target", "predicted", "assignments", "outcomes", "insertion_effect", "smoothed"),
)


@dataclass(kw_only=True, eq=False, repr=False)
class Estimate:
    """Effects of N examples: the outcome under ``do`` minus the outcome when idle, for every unit and class.

    Signs are those of Eq. 1: removing a unit that supports the class has a *negative* effect. ``contribution`` is minus
    the effect and reads like other maps: positive supports the class.

    What random designs estimate is each unit's mean effect over what else their trials set (A: every other unit
    independently, with the design's probability p) and over the fills v in equal shares,

        effect_u = mean over v of E[ Y(a_u = 1, A, v) - Y(a_u = 0, A, v) ]

    without bias; errors, intervals and p-values belong to it. ``smoothed``, where there is one, is a map for the eye.

    Attributes:
        effect: (N, U, C); NaN beyond an example's own units.
        smoothed: (N, U, C), a smooth map of the effects beside them, shrunk where neighbours disagree, for designs that
            set regions of a grid; None for others. No error is known for it. Where such a design has no independent
            trials, ``effect`` is the same map.
        std_error: (N, U, C) for random designs; None for exact ones and where there is a smooth map alone.
        reference: (N, C), the outcome with all units idle (under the same evidence).
        dof: degrees of freedom of the t quantiles, (N, U, C), or None for normal quantiles.
        n_units: (N,), number of units of each example.
        class_shape: trailing shape of the model's output; C is its size, or 1 where a target was given.
        target: (N, ...) where only the target's output was computed; None for all classes.
        n_trials: trials of each example, the largest number where ``until=`` ended them at different ones.
        unit_labels: U names, or one list of names per example.
        outcome, design, intervention, site, evidence: what was done, as text.
        insertion_effect: (N, C), what inserting the autoencoder does by itself, where units are concepts; a concept's
            total effect on the network is this plus its ``effect``.
        seed: of random fills and attacks; the design's own is in ``design``.
        predicted: (N,), predicted class, where the model returns classes.
        cost: forward passes of one example that were spent.
        settings: what else reproduces the run, JSON-able.
        peeked: True where ``until=`` chose the number of trials; p-values do not cover that.
        p: flip probability of a random design.
        groups: the groups of a :class:`~ce_plugin.designs.Joint` design; unit g of the effects is group g.
        assignments, outcomes, blocks: the trials themselves, (N, T, U), (N, T, C) and (T,), where they were kept.

    Example:
        >>> import torch
        >>> estimate = Estimate(
        ...     effect=torch.tensor([[[-0.4], [0.0]]]), reference=torch.tensor([[0.9]]), class_shape=(1,),
        ...     std_error=torch.tensor([[[0.1], [0.1]]]), unit_labels=["left", "right"], outcome="probability",
        ... )
        >>> estimate.significant(fdr=0.05).flatten().tolist()
        [True, False]
        >>> estimate.to_dataframe()[["label", "effect", "significant"]]
           label  effect  significant
        0   left    -0.4         True
        1  right     0.0        False

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Eqs. 1 and 2.
    """

    effect: Tensor
    reference: Tensor
    class_shape: tuple[int, ...]
    std_error: Tensor | None = None
    dof: Tensor | None = None
    n_units: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    target: Tensor | None = None
    n_trials: int = 0
    unit_labels: list[str] | list[list[str]] = field(default_factory=list)
    outcome: str = ""
    design: str = ""
    intervention: str = ""
    site: str = "InputSite()"
    evidence: str = "none"
    seed: int = 0
    predicted: Tensor | None = None
    cost: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    peeked: bool = False
    p: float | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    assignments: Tensor | None = None
    outcomes: Tensor | None = None
    blocks: Tensor | None = None
    insertion_effect: Tensor | None = None
    smoothed: Tensor | None = None

    def __post_init__(self) -> None:
        n, units, _ = self.effect.shape
        self.n_units = self.n_units if len(self.n_units) else torch.full((n,), units)
        self.unit_labels = self.unit_labels or [str(u) for u in range(units)]

    @property
    def contribution(self) -> Tensor:
        """Minus the effect, (N, U, C): positive where the unit supports the class."""
        return -self.effect

    @property
    def smoothed_contribution(self) -> Tensor:
        """What maps show, (N, U, C): minus :attr:`smoothed`, or minus the effect for designs without it."""
        return -self.effect if self.smoothed is None else -self.smoothed

    @property
    def saturated(self) -> Tensor:
        """Where a probability is above 0.99 or below 0.01 with all units idle, (N, C): few trials carry what varies."""
        if self.outcome not in ("probability", "sigmoid"):
            return torch.zeros_like(self.reference, dtype=torch.bool)
        return (self.reference > 0.99) | (self.reference < 0.01)

    def half_width(self, level: float = 0.95) -> Tensor:
        """Half the width of the confidence interval, (N, U, C)."""
        return inference.half_width(*self._errors(), level)

    def confidence_interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Two-sided t intervals (low, high), each (N, U, C), of each effect by itself.

        Raises:
            InferenceError: for exact designs, and for a smooth map alone.

        Warns:
            SaturationWarning: for probabilities next to 0 or 1 (see :attr:`saturated`), of the target or the predicted
                class, or of any class where neither is known.
        """
        return inference.t_interval(self.effect, *self._errors(), level)

    def p_values(self) -> Tensor:
        """Two-sided p-values of "the effect is zero", (N, U, C), each by itself, not corrected for many units.

        A standard error of 0 gives p = 1 for an effect of 0 (a unit that changes nothing) and p = 0 for any other.
        Where :attr:`peeked` is set they do not cover the choice of the number of trials.

        Raises:
            InferenceError: for exact designs, and for a smooth map alone.

        Warns:
            SaturationWarning: as :meth:`confidence_interval`.
        """
        return inference.p_values(self.effect, *self._errors())

    def significant(self, fdr: float = 0.05) -> Tensor:
        """Which effects are not zero, at this false discovery rate over the units of each example and class.

        Args:
            fdr: expected share of false discoveries, in (0, 1).

        Returns:
            bool (N, U, C); False beyond an example's own units.

        Raises:
            InferenceError: for exact designs, and for a smooth map alone.
            ArgumentError: for a rate outside (0, 1).

        Source: Benjamini and Hochberg 1995.
        """
        check_number("fdr", fdr, "in (0, 1)", above=0, below=1, hint="Write 0.05 for five per cent.")
        return inference.benjamini_hochberg(inference.p_values(self.effect, *self._errors()), axis=1) <= fdr

    @property
    def interaction(self) -> Tensor:
        """Joint effect of each group minus the sum of its units' single effects, (N, G, C); for Joint designs.

        Raises:
            DesignError: where the design is not joint, or does not hold a group's units as groups of their own.
        """
        if self.groups is None:
            raise DesignError(expected("design", "Joint(groups)", self.design, "Write Joint.pairs(units)."))
        return joint_interaction(self.effect, self.groups)

    def pairs(self, pairs: Sequence[tuple[int, int]]) -> Estimate:
        """Average interactions of pairs of units, from the trials of a random design.

        Args:
            pairs: unit indices, for example ``[(0, 1), (0, 2)]``.

        Returns:
            An estimate whose units are the pairs: by how much one's effect is larger when the other is flipped.

        Raises:
            DesignError: where the trials were not kept, or the design is not random with a known flip probability.
            UnitError: for a unit out of range.
        """
        if self.assignments is None or self.outcomes is None or self.p is None:
            hint = "Run a RandomMask design with keep_trials=True, or read .interaction of a Joint design."
            wanted = "a random one whose trials were kept"
            raise DesignError(expected("design", wanted, self.design or "no trials", hint))
        pairs = _checked_pairs(pairs)
        found = []
        for i, (a, y) in enumerate(zip(self.assignments, self.outcomes, strict=True)):
            own = int((~y.isnan().all(dim=1)).sum())  # with `until=` examples may have fewer trials: the rest is NaN
            blocks = None if self.blocks is None else self.blocks[:own]
            found.append(interactions(a[:own, : int(self.n_units[i])], y[:own], pairs, self.p, blocks))
        labels = [[f"{own[u]} x {own[v]}" for u, v in pairs] for own in map(self.labels_of, range(len(self)))]
        dropped: dict[str, Any] = dict.fromkeys(("assignments", "outcomes", "blocks", "groups", "smoothed"))
        return replace(
            self,
            effect=torch.stack([f.effect for f in found]).to(self.effect),
            std_error=torch.stack([f.std_error for f in found if f.std_error is not None]).to(self.effect),
            dof=torch.stack([f.dof for f in found if f.dof is not None]).to(self.effect),
            n_units=torch.full_like(self.n_units, len(pairs)),
            unit_labels=labels,
            **dropped,
        )

    def to_dataframe(self, level: float = 0.95, fdr: float = 0.05) -> pd.DataFrame:
        """A tidy frame with one row per example, unit and class.

        Columns: example, unit, label, class, effect, std_error, ci_low, ci_high (at ``level``), p_value, significant
        (at ``fdr``), smoothed (where there is such a map), reference. What exact designs do not have is missing there
        (NaN, NA).
        """
        import pandas as pd

        n, units, classes = self.effect.shape
        example, unit, column = np.indices((n, units, classes)).reshape(3, -1)
        names = np.empty((n, classes), dtype=object)
        labels = np.full((n, units), "", dtype=object)
        for i in range(n):
            names[i] = self._class_names(i)
            own = self.labels_of(i)
            labels[i, : len(own)] = own
        data: dict[str, Any] = {
            "example": example,
            "unit": unit,
            "label": labels[example, unit],
            "class": names[example, column],
            "effect": _flat(self.effect),
        }
        if self.std_error is None:
            data |= dict.fromkeys(("std_error", "ci_low", "ci_high", "p_value"), np.nan)
            data["significant"] = pd.array([pd.NA] * len(example), dtype="boolean")
        else:
            low, high = self.confidence_interval(level)
            data |= {"std_error": _flat(self.std_error), "ci_low": _flat(low), "ci_high": _flat(high)}
            significant = pd.array(_flat(self.significant(fdr)), dtype="boolean")
            data |= {"p_value": _flat(self.p_values()), "significant": significant}
        if self.smoothed is not None:
            data["smoothed"] = _flat(self.smoothed)
        data["reference"] = self.reference.detach().cpu().numpy()[example, column]
        there = unit < self.n_units.cpu().numpy()[example]
        frame: pd.DataFrame = pd.DataFrame(data).loc[there].reset_index(drop=True).infer_objects()
        return frame

    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """A picture; arguments and result are those of :func:`ce_plugin.visualization.plot_estimate`."""
        return plot_estimate(self, *args, **kwargs)

    def labels_of(self, example: int) -> list[str]:
        """The names of one example's units."""
        own = self.unit_labels[example] if isinstance(self.unit_labels[0], list) else self.unit_labels
        return [str(label) for label in own[: int(self.n_units[example])]]

    def to(self, device: torch.device | str) -> Estimate:
        """The same on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.effect)

    def __getitem__(self, examples: int | slice | Sequence[int]) -> Estimate:
        """Some of the examples; N stays a dimension."""
        chosen = chosen_examples(examples, len(self), "an estimate")
        some: dict[str, Any] = {k: v[chosen] for k, v in vars(self).items() if k in _BY_EXAMPLE and torch.is_tensor(v)}
        if isinstance(self.unit_labels[0], list):
            some["unit_labels"] = [self.unit_labels[i] for i in chosen]
        return replace(self, **some)

    def __repr__(self) -> str:
        """What was estimated and how, and the largest effect of the first examples."""
        n, units, classes = self.effect.shape
        what = "the target's output" if self.target is not None else f"{classes} class{'es' * (classes > 1)}"
        lines = [
            f"Estimate of {self.outcome or 'outcome'}: {n} example{'s' * (n > 1)}, {units} units, {what}",
            f"  {self.intervention}, {self.design}, {self.n_trials} trials, evidence: {self.evidence}",
        ]
        for i in range(min(n, 3)):
            values = self.effect[i].nan_to_num(0.0)
            unit, column = divmod(int(values.abs().argmax()), classes)
            error = "" if self.std_error is None else f" (standard error {float(self.std_error[i, unit, column]):.2g})"
            name = self._class_names(i)[column]
            lines.append(f"  {i}: largest effect {float(values[unit, column]):+.4g}{error}, unit {unit}, class {name}")
        return "\n".join(lines + ["  ..."] * (n > 3))

    def _class_names(self, example: int) -> list[int | str]:
        """What the columns are: the target, the class index, or the index tuple of a larger output."""
        if self.target is not None:
            target = self.target[example].flatten().tolist()
            return [target[0] if len(target) == 1 else str(tuple(target))]
        if len(self.class_shape) > 1:
            return [str(index) for index in np.ndindex(*self.class_shape)]
        return list(range(self.effect.shape[2]))

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write everything into one file, whole or not at all.

        Raises:
            FileError: where the file exists and ``force`` is not set.
        """
        return save(path, type(self).__name__, 1, vars(self), force=force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Estimate:
        """Read what :meth:`save` wrote; runs no code from the file.

        Raises:
            FileError: where the file is missing or damaged, or holds something else.
        """
        content = load(path, cls.__name__, 1)
        values = {f.name: content[f.name] for f in fields(cls) if f.name != "smoothed"}
        values["smoothed"] = content.get("smoothed")  # files of 0.3 have none
        try:
            values["class_shape"] = tuple(values["class_shape"])
            if values["groups"] is not None:
                values["groups"] = tuple(map(tuple, values["groups"]))
            misfit = _misfit(values)
        except (TypeError, ValueError, AttributeError) as error:
            misfit = str(error)
        if misfit:
            raise damaged(path, "a file written by Estimate.save", misfit)
        return cls(**values)

    def equals(self, other: Estimate) -> bool:
        """Whether everything is the same, NaN equal to NaN."""
        mine, theirs = vars(self), vars(other)
        return mine.keys() == theirs.keys() and all(_same(value, theirs[name]) for name, value in mine.items())

    def _errors(self) -> tuple[Tensor, Tensor | None]:
        """Standard errors and degrees of freedom, or an error where there are none; warns where they mislead."""
        if self.std_error is None:
            why = "exact designs have no sampling error" if self.smoothed is None else "a smooth map has no known error"
            raise InferenceError(
                f"This estimate comes from {self.design or 'an exact design'}: {why}. "
                "Random designs with independent trials, and data sets, have one. Read .effect itself, or explain with "
                "RandomMask(...), or with RandomRegions(...) of 30 trials or more."
            )
        asked = self.saturated
        if self.target is None and self.predicted is not None and self.class_shape == asked.shape[1:]:
            asked = asked.gather(1, self.predicted.view(-1, 1).to(asked.device))
        where = asked.any(dim=1).nonzero().flatten().tolist()
        if where:
            warnings.warn(
                f"Probabilities next to 0 or 1 (examples {where[:8]}): few trials carry all of the variation, so "
                'intervals and p-values may promise more than they keep. Write outcome="log_odds".',
                SaturationWarning,
                stacklevel=3,
            )
        return self.std_error, self.dof


# Shape and type of what a file holds; one letter is one size everywhere. "?" may be None.
_TENSORS = {
    "effect": ("NUC", "float"),
    "smoothed": ("NUC", "float?"),
    "reference": ("NC", "float"),
    "std_error": ("NUC", "float?"),
    "dof": ("NUC", "float?"),
    "n_units": ("N", "int"),
    "predicted": ("N", "int?"),
    "insertion_effect": ("NC", "float?"),
    "assignments": ("NTU", "bool?"),
    "outcomes": ("NTC", "float?"),
    "blocks": ("T", "int?"),
}


def _misfit(values: Mapping[str, Any]) -> str:
    """What does not fit together in the values of an estimate; nothing where all of it does."""
    sizes: dict[str, int] = {}
    for name, (letters, kind) in _TENSORS.items():
        value = values[name]
        if value is None and kind.endswith("?"):
            continue
        if not isinstance(value, Tensor) or value.dim() != len(letters):
            return f"`{name}` is not of shape ({', '.join(letters)})"
        found = "float" if value.is_floating_point() else "bool" if value.dtype == torch.bool else "int"
        if found != kind.rstrip("?"):
            return f"`{name}` is of type {value.dtype}"
        for letter, size in zip(letters, value.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                return f"`{name}` is of shape {tuple(value.shape)}, and {letter} is {sizes[letter]} elsewhere"
    target, n_units, labels = values["target"], values["n_units"], values["unit_labels"]
    if target is not None and len(target) != sizes["N"]:
        return "`target` is not one for each example"
    if target is None and math.prod(values["class_shape"]) != sizes["C"]:
        return f"`class_shape` is {values['class_shape']}, and C is {sizes['C']}"
    if bool((n_units < 0).any()) or bool((n_units > sizes["U"]).any()):
        return f"`n_units` is outside of 0 to {sizes['U']}"
    several = bool(labels) and isinstance(labels[0], list)
    if not all(
        len(some) >= int(n) for some, n in zip(labels if several else [labels] * sizes["N"], n_units, strict=True)
    ):
        return "`unit_labels` are too few"
    return ""


def _same(mine: Any, theirs: Any) -> bool:
    """Whether two values are the same, bit by bit, NaN equal to NaN."""
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return type(mine) is type(theirs) and bool(mine == theirs)
    same = mine.dtype == theirs.dtype and mine.shape == theirs.shape
    return same and bool(((mine == theirs) | (mine.isnan() & theirs.isnan())).all())


class _NoSuchExampleError(ArgumentError, IndexError):
    """Also an IndexError, which ends a loop over the examples."""


def chosen_examples(examples: int | slice | Sequence[int], n: int, what: str) -> list[int]:
    """The indices that ``result[examples]`` asks for, of what is about n examples.

    Raises:
        ArgumentError: no index, slice or sequence of indices, or out of range.
    """
    wanted = "an index, a slice or a list of indices"
    try:
        if isinstance(examples, slice):
            return list(range(n)[examples])
        given: object = examples
        many = given.tolist() if isinstance(given, (Tensor, np.ndarray)) else given
        every = list(many) if isinstance(many, (list, tuple, range)) else [many]
        chosen = [check_integer("examples", i, wanted) for i in every]
    except TypeError as error:
        raise ArgumentError(expected("examples", wanted, repr(examples))) from error
    for i in chosen:
        if not -n <= i < n:
            raise _NoSuchExampleError(f"There is no example {i} of {what} of {n} examples.")
    return chosen


def _checked_pairs(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs of unit indices, as they were written."""
    wanted, hint = "pairs of unit indices", "Write [(0, 1), (0, 2)]."
    try:
        found = [(operator.index(u), operator.index(v)) for u, v in pairs]
    except (TypeError, ValueError) as error:
        raise UnitError(expected("pairs", wanted, repr(pairs), hint)) from error
    if not found:
        raise UnitError(expected("pairs", wanted, repr(pairs), hint))
    return found


def _flat(x: Tensor) -> np.ndarray[Any, Any]:
    """All numbers in the order of the rows of a frame."""
    values: np.ndarray[Any, Any] = x.detach().cpu().numpy().reshape(-1)
    return values


def plot_estimate(
    estimate: Estimate,
    image: Tensor | None = None,
    *,
    example: int = 0,
    target: int | None = None,
    feature_mask: Tensor | None = None,
    sliding_window_shapes: tuple[int, ...] | None = None,
    strides: int | tuple[int, ...] | None = None,
    fdr: float = 0.05,
    level: float = 0.95,
    top: int = 20,
    width: int = 480,
    title: str | None = None,
) -> Figure:
    """Draw the contributions of one example to one class.

    Over an image colours are the smoothed contributions, where the design has them; outlined is what is significant by
    the effects themselves. Bars show the effects and their intervals.

    Args:
        estimate: what ``estimate(...)`` returned.
        image: the example, (C, H, W), values in [0, 1] or bytes (uint8): the contributions are laid over it,
            significant units outlined. Of a volume (C, D, H, W) six slices are drawn; a signal, in the shape in which
            the network took it, is drawn as lines. None draws bars.
        example: index of the example.
        target: class; None means the predicted class, where all classes were computed.
        feature_mask: the units, where they are not the default grid: what ``estimate(...)`` was given.
        sliding_window_shapes, strides: likewise.
        fdr: false discovery rate of the outlines, or of the filled bars. Exact designs have neither.
        level: of the bars' confidence intervals.
        top: number of bars, the largest contributions first.
        width: of the figure, in pixels.
        title: written above; None writes outcome and class.

    Returns:
        A figure. In a notebook it shows itself; elsewhere ``figure.savefig("effects.png")``.

    Raises:
        ArgumentError: no such example, or ``top`` below 1.
        TargetError: no such class.
        UnitError: the units are not those of the image; say which with ``feature_mask`` or windows.

    Example:
        >>> effect, reference = torch.tensor([[[-0.4], [0.1]]]), torch.tensor([[0.9]])
        >>> estimate = Estimate(effect=effect, reference=reference, class_shape=(1,), outcome="probability",
        ...                     unit_labels=["left", "right"])
        >>> [label.get_text() for label in plot_estimate(estimate).axes[0].get_yticklabels()]
        ['left', 'right']
    """
    check_integer("example", example)
    if not -len(estimate) <= example < len(estimate):
        raise ArgumentError(expected("example", f"below {len(estimate)}, the number of examples", example))
    check_integer("top", top, "at least 1", least=1)
    check_integer("width", width, "a number of pixels, 1 or more", least=1)
    if target is not None:
        check_integer("target", target, "None or a class index", error=TargetError)
    check_number("fdr", fdr, "in (0, 1)", above=0, below=1)
    check_number("level", level, "in (0, 1)", above=0, below=1)
    column, name = _column(estimate, example, target)
    n_units = int(estimate.n_units[example])
    values = estimate.contribution[example, :n_units, column].detach().cpu()
    found = None
    if estimate.std_error is not None:
        found = estimate.significant(fdr)[example, :n_units, column].cpu()
    heading = title if title is not None else f"{estimate.outcome or 'outcome'} of class {name}"
    if image is None:
        half = None if found is None else estimate.half_width(level)[example, :n_units, column].cpu()
        labels = estimate.labels_of(example)
        return _bars(values, half, found, labels, top=top, width=width, title=heading)
    given: object = image
    if not isinstance(given, Tensor) or image.dim() not in (2, 3, 4):
        as_picture(image)  # says what is wrong with it
    batch = image.detach().cpu()[None]
    dim = estimate.settings.get("channel_dim") if estimate.site.startswith("InputSite") else None
    units = InputSite(feature_mask, sliding_window_shapes, strides, channel_dim=dim).units_of((batch,))
    if int(units.n_units[0]) != n_units:
        hint = "Hand over the `feature_mask` or windows that the estimate was made with."
        raise UnitError(expected("image", f"with the {n_units} units of the estimate", int(units.n_units[0]), hint))
    channels = (1 if dim is None else dim) % batch.dim()
    shown = batch.movedim(channels, 1)[0]
    contribution = estimate.smoothed_contribution[example, :n_units, column].detach()
    (plane,) = units.spread(double(contribution)[None])
    plane, region = plane.movedim(channels, 1)[0], None
    if found is not None:
        (where,) = units.spread(double(found)[None])
        region = where.movedim(channels, 1)[0].amax(0) > 0.5
    if shown.dim() == 2:
        return signal(plane.mean(0), shown, significant=region, width=width, title=heading)
    if shown.dim() == 4:
        return _slices(plane, shown, region, width, heading)
    return overlay(plane, shown, significant=region, width=width, title=heading)


def _slices(plane: Tensor, volume: Tensor, region: Tensor | None, width: int, title: str) -> Figure:
    """Slices of a volume (C, D, H, W), evenly spaced, with one scale for all."""
    depth, scale = volume.shape[1], float(plane.mean(0).abs().max()) or None
    rows: list[list[tuple[str, Figure | Tensor]]] = [[]]
    for k in torch.linspace(0, depth - 1, min(depth, _SLICES)).round().long().tolist():
        outlined = None if region is None else region[k]
        drawn = overlay(plane[:, k], volume[:, k], scale=scale, significant=outlined, width=width)
        rows[0].append((f"slice {k} of {depth}", drawn))
    return sheet(rows, note=title, width=max(width // len(rows[0]), 1))


def _column(estimate: Estimate, example: int, target: int | None) -> tuple[int, str]:
    """Which column of the effects a class is, and its name."""
    classes = estimate.effect.shape[2]
    if estimate.target is not None or classes == 1:
        if target is not None and estimate.target is not None and int(estimate.target[example].flatten()[0]) != target:
            hint = "The estimate holds this class only; leave `target` out of estimate() to get all."
            raise TargetError(expected("target", f"{estimate.target[example].tolist()}", target, hint))
        own = estimate.target[example].tolist() if estimate.target is not None else 0
        return 0, str(own)
    if target is None:
        if estimate.predicted is None:
            raise TargetError(expected("target", f"a class index below {classes}", None))
        target = int(estimate.predicted[example])
    if not 0 <= target < classes:
        raise TargetError(expected("target", f"a class index below {classes}", target))
    return target, str(target)


def _bars(
    values: Tensor, half: Tensor | None, found: Tensor | None, labels: list[str], *, top: int, width: int, title: str
) -> Figure:
    from matplotlib.figure import Figure

    if not len(values):
        raise InputError(expected("estimate", "with at least one unit", "none"))
    order = values.abs().argsort(descending=True, stable=True)[:top].tolist()
    figure = Figure(figsize=(width / 100, 0.9 + 0.24 * len(order)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for place, unit in enumerate(order):
        value = float(values[unit])
        sure = found is None or bool(found[unit])
        color = POSITIVE if value >= 0 else NEGATIVE
        axes.barh(place, value, color=color if sure else "none", edgecolor=color, height=0.72)
        if half is not None:
            axes.errorbar(value, place, xerr=float(half[unit]), color="#555555", capsize=2, linewidth=1)
    axes.set_yticks(range(len(order)), [labels[unit] for unit in order])
    axes.invert_yaxis()
    axes.axvline(0, color="#555555", linewidth=0.8)
    note = "" if found is None else "; filled: significant"
    axes.set_xlabel(f"contribution (positive supports the class){note}")
    axes.set_title(title, fontsize=10)
    return figure
