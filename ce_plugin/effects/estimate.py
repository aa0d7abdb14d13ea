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
import numpy.typing as npt
import torch
from torch import Tensor

from ce_plugin.effects import inference
from ce_plugin.effects.estimators import interactions, joint_interaction
from ce_plugin.effects.plots import Outline, column_of, estimate_html, plot_estimate
from ce_plugin.effects.region import RegionTest
from ce_plugin.errors import (
    ArgumentError,
    DesignError,
    InferenceError,
    ModelError,
    SaturationWarning,
    UnitError,
    check_integer,
    check_number,
    expected,
)
from ce_plugin.files import damaged, load, save

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


# One row per example; the rest belongs to all examples.
_BY_EXAMPLE = (
    *("effect", "std_error", "dof", "reference"),
    *("n_units", "target", "predicted", "assignments", "outcomes", "insertion_effect", "smoothed", "pictures"),
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
        class_names: one for each class, where they are known.
        pictures: what the network saw, uint8 (N, C, H, W), of up to 16 images cut into the default grid; else None.
        answer: one region covered, and as much covered elsewhere, where ``answer=True`` asked for it.

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
    class_names: tuple[str, ...] | None = None
    pictures: Tensor | None = None
    answer: RegionTest | None = None

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
        dropped: dict[str, Any] = dict.fromkeys(
            ("assignments", "outcomes", "blocks", "groups", "smoothed", "pictures", "answer")
        )
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

        Columns: example, unit, label, class, class_name (where names are known), effect, std_error, ci_low, ci_high (at
        ``level``), p_value, significant (at ``fdr``), smoothed (where there is such a map), reference. What exact
        designs do not have is missing there (NaN, NA).
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
        }
        if self.class_names is not None:
            data["class_name"] = [self.class_name(one) for one in data["class"]]
        data["effect"] = _flat(self.effect)
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

    def to_xarray(self) -> xr.Dataset:
        """The same as labelled arrays: a dataset with the dimensions example, unit and class.

        Variables: effect, std_error, dof and smoothed (where there are such), reference. Coordinates: class (index),
        class_name (where names are known), label (where all examples have the same units).

        Raises:
            ModelError: xarray is not installed.

        Example:
            >>> import torch
            >>> effect, reference = torch.tensor([[[-0.4], [0.1]]]), torch.ones(1, 1)
            >>> estimate = Estimate(effect=effect, reference=reference, class_shape=(1,))
            >>> estimate.to_xarray().effect.sel(unit=1).item()
            0.1...
        """
        try:
            import xarray as xr
        except ImportError as error:
            hint = 'Install it: pip install "ce-plugin[data]"'
            raise ModelError(expected("xarray", "installed, for `to_xarray`", "an error at import", hint)) from error
        axes = ("example", "unit", "class")
        values: dict[str, Any] = {"reference": (("example", "class"), self.reference.detach().cpu().numpy())}
        for name in ("effect", "std_error", "dof", "smoothed"):
            column = getattr(self, name)
            if column is not None:
                values[name] = (axes, column.detach().cpu().numpy())
        n, units, classes = self.effect.shape
        coords: dict[str, Any] = {"example": np.arange(n), "unit": np.arange(units)}
        if self.target is None:
            coords["class"] = self._class_names(0)
            if self.class_names is not None and len(self.class_names) == classes:
                coords["class_name"] = ("class", list(self.class_names))
        elif self.target.dim() == 1:
            coords["target"] = ("example", self.target.detach().cpu().numpy())
        if not isinstance(self.unit_labels[0], list):
            coords["label"] = ("unit", list(map(str, self.unit_labels)))
        about = {name: getattr(self, name) for name in ("outcome", "design", "intervention", "site", "evidence")}
        return xr.Dataset(values, coords, {**about, "n_trials": self.n_trials})

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """The effects as numpy takes them, (N, U, C): ``np.asarray(estimate)``."""
        effect = self.effect.detach().cpu().numpy()
        return np.array(effect, dtype=dtype, copy=True if copy is None else copy)

    def plot(
        self,
        image: Tensor | None = None,
        *,
        example: int = 0,
        target: int | str | Sequence[int | str] | None = None,
        ax: Axes | None = None,
        class_names: Sequence[str] | None = None,
        cmap: str | Colormap | None = None,
        colorbar: bool = True,
        outline: Outline | None = None,
        **options: Any,
    ) -> Figure:
        """A picture of one example; all arguments are those of :func:`ce_plugin.effects.plot_estimate`.

        Example:
            >>> import torch
            >>> estimate = Estimate(effect=-torch.eye(4)[None], reference=torch.ones(1, 4), class_shape=(4,))
            >>> names = ["ant", "bee", "cat", "dog"]
            >>> figure = estimate.plot(torch.rand(3, 2, 2), target=["ant", "bee"], class_names=names)
            >>> [axes.get_title() for axes in figure.axes[:2]]
            ['What supports “ant”', 'What supports “bee”']
        """
        return plot_estimate(
            self, image, example=example, target=target, ax=ax, class_names=class_names, cmap=cmap, colorbar=colorbar,
            outline=outline, **options,
        )  # fmt: skip

    def class_name(self, index: int | str) -> str:
        """The name of a class, or ``"class 7"`` where names are not known."""
        if isinstance(index, int) and self.class_names is not None and 0 <= index < len(self.class_names):
            return self.class_names[index]
        return f"class {index}"

    def summary(self, example: int | None = None, fdr: float = 0.05) -> str:
        """What was found, in a sentence for each example: it reads what was run, and runs nothing.

        Args:
            example: index of one example; None joins the sentences of all, line by line.
            fdr: false discovery rate at which single units are called significant.

        Example:
            >>> import torch
            >>> effect, reference = torch.tensor([[[-0.4], [0.1]]]), torch.ones(1, 1)
            >>> estimate = Estimate(effect=effect, reference=reference, class_shape=(1,))
            >>> estimate.summary()
            'Of 2 units the one at “0” supports class 0 most: without it the outcome is lower by 0.4.'
        """
        if example is None:
            return "\n".join(self.summary(i, fdr) for i in range(len(self)))
        about = None if self.answer is None or self.target is not None else int(self.answer.target[example])
        column, name = column_of(self, example, about)
        if self.answer is None:
            found = self._strongest_unit(example, column, name)
        else:
            found = self.answer.sentence(example, self.class_name, self._verb)
        other = about is not None and self.predicted is not None and about != int(self.predicted[example])
        return found + self._tested_alone(example, column, fdr, f" for “{name}”" if other else "")

    @property
    def _verb(self) -> str:
        """What was done, as :meth:`RegionTest.sentence` takes it."""
        if self.intervention.startswith("ZeroOut"):
            return "Setting {} to zero"
        return "Covering" if self.intervention.startswith(("PixelMask", "baselines")) else "Intervening on"

    def _strongest_unit(self, example: int, column: int, name: str) -> str:
        """Which unit supports the class most."""
        own = self.contribution[example, : int(self.n_units[example]), column]
        if not len(own):
            return "There is nothing that could be set."
        drawn = self.smoothed_contribution[example, : len(own), column].nan_to_num(-math.inf)
        unit = int(drawn.argmax())
        said = name if name.startswith("class ") else f"“{name}”"
        if float(drawn[unit]) <= 0:
            return f"None of {len(own)} {self._units_word} supports {said}."
        which = f"Of {len(own)} {self._units_word} the one at {self.place_of(example, unit)}"
        if self.smoothed is not None:  # what a patch does alone is not what the map says of it
            return f"{which} supports {said} most on the map."
        value = float(own[unit])
        points = self.outcome in ("probability", "sigmoid")
        size = f"{100 * value:.3g} per cent points" if points else f"{value:.3g}"
        what = (self.outcome or "outcome").replace("_", "-")
        return f"{which} supports {said} most: without it the {what} is lower by {size}."

    def _tested_alone(self, example: int, column: int, fdr: float, of: str) -> str:
        """How many units are significant by themselves, and why a map may look strong where none is."""
        if self.std_error is None:
            return ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SaturationWarning)
            found = int(self.significant(fdr)[example, :, column].sum())
        units, what = int(self.n_units[example]), self._units_word
        if found:
            return f" {found} of {units} {what} matter{'s' * (found == 1)}{of} by themselves."
        none = f" None of {units} {what} is significant{of} by itself (false discovery rate {100 * fdr:.3g} %)"
        if self.answer is not None and self.answer.is_shown(example):
            return f"{none}: it takes several together."
        error = float(self.std_error[example, :units, column].median())
        return (
            f"{none}: the trials vary so much that each effect is known to about ±{2 * error:.2g} only, and the "
            f"largest of {units} such numbers look strong on a map."
        )

    @property
    def _units_word(self) -> str:
        """What units are called: patches of a picture, or units."""
        grid = self.settings.get("grid")
        return "patches" if grid is not None and len(grid) == 2 and self.site.startswith("InputSite") else "units"

    def place_of(self, example: int, unit: int) -> str:
        """Where a unit is, for a reader: row and column of a patch (from 1), or the unit's label.

        Example:
            >>> import torch
            >>> estimate = Estimate(effect=torch.zeros(1, 4, 1), reference=torch.ones(1, 1), class_shape=(1,),
            ...                     settings={"grid": [2, 2]})
            >>> estimate.place_of(0, 1)
            'row 1, column 2'
        """
        if self._units_word == "patches":
            row, column = divmod(unit, int(self.settings["grid"][1]))
            return f"row {row + 1}, column {column + 1}"
        return f"“{self.labels_of(example)[unit]}”"

    def strongest(self, example: int = 0, target: int | str | None = None, top: int = 5) -> pd.DataFrame:
        """The units that support a class most, the strongest first: on the smoothed map, where there is one.

        Args:
            example: index of the example.
            target: class, its index or name; None means the target or the predicted class.
            top: number of rows, at most.

        Returns:
            A frame with the columns unit, label, contribution and, of random designs, ci_low and ci_high (the 95 %
            interval of the contribution).

        Example:
            >>> import torch
            >>> effect, reference = torch.tensor([[[-0.4], [0.1]]]), torch.ones(1, 1)
            >>> estimate = Estimate(effect=effect, reference=reference, class_shape=(1,))
            >>> estimate.strongest(top=1)
               unit label  contribution
            0     0     0           0.4
        """
        import pandas as pd

        check_integer("top", top, "at least 1", least=1)
        column, _ = column_of(self, example, target)
        own = self.contribution[example, : int(self.n_units[example]), column].detach().cpu()
        drawn = self.smoothed_contribution[example, : len(own), column].detach().cpu()
        order = drawn.argsort(descending=True, stable=True)[:top]
        labels = self.labels_of(example)
        data: dict[str, Any] = {"unit": order.tolist(), "label": [labels[u] for u in order.tolist()]}
        data["contribution"] = own[order].numpy()
        if self.std_error is not None:
            half = self.half_width(0.95)[example, order.to(self.effect.device), column].cpu().numpy()
            data |= {"ci_low": data["contribution"] - half, "ci_high": data["contribution"] + half}
        frame: pd.DataFrame = pd.DataFrame(data)
        return frame

    def _repr_html_(self) -> str:
        return estimate_html(self)

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
        if self.answer is not None:
            some["answer"] = self.answer[chosen]
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
        answer = None if self.answer is None else vars(self.answer)
        return save(path, type(self).__name__, 1, {**vars(self), "answer": answer}, force=force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Estimate:
        """Read what :meth:`save` wrote; runs no code from the file.

        Raises:
            FileError: where the file is missing or damaged, or holds something else.
        """
        content = load(path, cls.__name__, 1)
        values: dict[str, Any] = {
            f.name: content.get(f.name) if f.name in _LATER else content[f.name] for f in fields(cls)
        }
        try:
            if values["class_names"] is not None:
                values["class_names"] = tuple(map(str, values["class_names"]))
            if values["answer"] is not None:
                values["answer"] = RegionTest(**{**values["answer"], "grid": tuple(values["answer"]["grid"])})
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


# What files of 0.3 do not hold.
_LATER = ("smoothed", "class_names", "pictures", "answer")
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
    "pictures": ("NKHW", "int?"),
}
_TENSORS_OF_ANSWER = {
    "region": ("NU", "bool"),
    "target": ("N", "int"),
    "clean": ("N", "float"),
    "covered": ("N", "float"),
    "placed": ("NP", "float"),
    "answers": ("NA", "int?"),
    "answered": ("NA", "float?"),
}


def _misfit(values: Mapping[str, Any]) -> str:
    """What does not fit together in the values of an estimate; nothing where all of it does."""
    sizes: dict[str, int] = {}
    shapes = {name: (values[name], *wanted) for name, wanted in _TENSORS.items()}
    if values["answer"] is not None:
        shapes |= {k: (getattr(values["answer"], k), *wanted) for k, wanted in _TENSORS_OF_ANSWER.items()}
    for name, (value, letters, kind) in shapes.items():
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
    if isinstance(mine, RegionTest) and isinstance(theirs, RegionTest):
        return all(_same(value, vars(theirs)[name]) for name, value in vars(mine).items())
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
