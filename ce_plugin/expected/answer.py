"""Expected effects: the answer about a data set, in which the images are the sample."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ce_plugin.effects import Estimate, plot_estimate
from ce_plugin.effects.plots import beside, html_table
from ce_plugin.errors import InferenceError, InputError, NoChangeWarning, TargetError, expected, unknown_name
from ce_plugin.expected.moments import Moments

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Of an estimate in a notebook: evidences, and effects in the table of each.
_SHOWN, _LARGEST = 3, 5
EXPLAINED = "explained"
"""The class that is explained in each image, where it differs between them."""


@dataclass(kw_only=True, eq=False, repr=False)
class ExpectedEstimate(Estimate):
    """Effects of all units on all classes, averaged over images: one "example" for each evidence.

        effect = mean over images i of Effect_i,  std_error = sd over images / sqrt(n),  t quantiles with n - 1

    Everything that an :class:`~ce_plugin.effects.Estimate` answers it answers about the images that were drawn: they
    are the sample, and intervals and p-values hold for more images of their kind.

    Attributes:
        effect, std_error, dof: (E, U, C), of each evidence, unit and class.
        reference: (E, C), mean outcome with all units idle, under each evidence.
        evidences: their names.
        classes: what the columns are: class indices, or "explained" where each image has its own.
        n_images: number of images, or the sum of their weights.
        acting: (E, U, C), share of the images on which the effect is not zero, of tables; None of metrics. Below one
            in a hundred, a few images carry all of the mean, and intervals promise more than they keep.
        covariance: (E, E, S, C), of the means of evidences; series are the units, the reference's outcome and, where
            there is one, the insertion effect.

    Example:
        >>> import torch
        >>> from ce_plugin.expected.moments import moments_of
        >>> effects = torch.tensor([[-0.3, -0.1, -0.2], [-0.3, 0.1, -0.1]]).T.reshape(3, 2, 1, 1)  # 3 images
        >>> answer = answered(moments_of(effects, extras=0), ["clean", "masked"], [0], unit_labels=["7"])
        >>> answer["clean"].effect.item(), answer["clean"].std_error.item()
        (-0.2..., 0.057...)
        >>> round(answer.difference("masked", "clean").effect.item(), 3)
        0.1

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Eq. 2.
    """

    evidences: tuple[str, ...] = ()
    classes: tuple[int | str, ...] = ()
    n_images: float = 0.0
    covariance: Tensor | None = None
    acting: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.evidences, self.classes = tuple(self.evidences), tuple(self.classes)

    @property
    def saturated(self) -> Tensor:
        """False, (E, C): what fails next to 0 and 1 are intervals of few trials, not those over images."""
        return torch.zeros_like(self.reference, dtype=torch.bool)

    @property
    def reference_error(self) -> Tensor | None:
        """Standard error of :attr:`reference` over the images, (E, C); None for a single image."""
        return self._error_of(self.effect.shape[1])

    @property
    def insertion_error(self) -> Tensor | None:
        """Standard error of the insertion effect over the images, (E, C); None where there is none."""
        return None if self.insertion_effect is None else self._error_of(self.effect.shape[1] + 1)

    def _error_of(self, series: int) -> Tensor | None:
        if self.covariance is None or self.n_images < 2 or series >= self.covariance.shape[2]:
            return None
        diagonal = self.covariance.diagonal(dim1=0, dim2=1)  # (S, C, E)
        return diagonal[series].T.clamp(min=0).sqrt()

    def difference(self, a: str, b: str) -> ExpectedEstimate:
        """Effect under one evidence minus that under another, paired on the same images.

        Args:
            a, b: names of evidences.

        Returns:
            The differences as an estimate of one "evidence", ``"a - b"``: its p-values are those of "the effect is the
            same under both".

        Raises:
            UnknownNameError: there is no such evidence.
        """
        i, j = self._index(a), self._index(b)
        if self.covariance is None:
            raise InferenceError(expected("answer", "one that knows how evidences vary together", "none"))
        c, name = self.covariance, f"{a} - {b}"
        spread = (c[i, i] + c[j, j] - c[i, j] - c[j, i]).clamp(min=0)
        units = self.effect.shape[1]
        both = None if self.insertion_effect is None else self.insertion_effect[[i]] - self.insertion_effect[[j]]
        return replace(
            self,
            effect=self.effect[[i]] - self.effect[[j]],
            std_error=None if self.std_error is None else spread[None, :units].sqrt(),
            dof=None if self.dof is None else self.dof[[i]],
            reference=self.reference[[i]] - self.reference[[j]],
            insertion_effect=both,
            n_units=self.n_units[[i]],
            evidences=(name,),
            evidence=name,
            covariance=spread[None, None],
            acting=None if self.acting is None else self.acting[[i, j]].amax(0, keepdim=True),
        )

    def to_dataframe(self, level: float = 0.95, fdr: float = 0.05) -> pd.DataFrame:
        """A tidy frame with one row per evidence, unit and class; columns as those of an Estimate, acting, n_images."""
        frame = super().to_dataframe(level, fdr)
        names = [self.evidences[i] for i in frame.pop("example")]
        frame.insert(0, "evidence", names)
        if self.acting is not None:
            there = torch.arange(self.effect.shape[1])[None, :, None] < self.n_units.cpu()[:, None, None]
            frame["acting"] = self.acting.cpu()[there.expand(self.acting.shape)].numpy()
        frame["n_images"] = self.n_images
        return frame

    def plot(  # type: ignore[override]  # what an example is to an Estimate, an evidence is here
        self, evidence: str | None = None, target: int | str | None = None, **kwargs: Any
    ) -> Figure:
        """Bars of the largest contributions with their intervals.

        Args:
            evidence: its name; None takes the first.
            target: class; None takes the first column.
            kwargs: of :func:`ce_plugin.effects.plot_estimate`.
        """
        row = 0 if evidence is None else self._index(evidence)
        column = 0 if target is None else self._column(target)
        part = slice(column, column + 1)
        one = replace(
            self[row],
            effect=self.effect[[row], :, part],
            std_error=None if self.std_error is None else self.std_error[[row], :, part],
            dof=None if self.dof is None else self.dof[[row], :, part],
            reference=self.reference[[row], part],
            classes=self.classes[part],
            acting=None,
        )
        over = f"{self.n_images:,.0f} image{'s' * (self.n_images != 1)}"
        kwargs.setdefault("title", f"{self.outcome}, {_class_text(self.classes[column])}: mean of {over}")
        return plot_estimate(one, **kwargs)

    def _repr_html_(self) -> str:
        """What a notebook shows: under each of the first evidences the largest mean effects, as bars and in a table."""
        over = f"Mean of {self.n_images:,.0f} image{'s' * (self.n_images != 1)}"
        measured, parts = (self.outcome or "outcome").replace("_", "-"), []
        interval = [] if self.std_error is None else ["95 % interval"]
        for i, name in enumerate(self.evidences[:_SHOWN]):
            table = html_table(["unit", "class", f"mean effect on the {measured}", *interval], self._largest(i))
            shown = beside(self.plot(name, width=360, top=10), table)
            parts.append(f"<p>{over}, evidence: {escape(name)}</p>{shown}")
        rest = len(self.evidences) - len(parts)
        parts += [f"<p>... and {rest} more evidence{'s' * (rest > 1)}.</p>"] * (rest > 0)
        said = f"{self.intervention}, {self.design}, {self.site}"
        return f"<div>{''.join(parts)}<p><small>{escape(said)}</small></p></div>"

    def _largest(self, row: int) -> list[list[str]]:
        """Unit, class, mean effect and its interval, of the largest effects under one evidence."""
        order = self.effect[row].abs().nan_to_num(-1.0).flatten().argsort(descending=True, stable=True)
        ends = None if self.std_error is None else self.confidence_interval()
        rows = []
        for unit, column in (divmod(place, self.effect.shape[2]) for place in order[:_LARGEST].tolist()):
            named = self.classes[column]
            cells = [self.labels_of(row)[unit], self.class_name(named) if isinstance(named, int) else named]
            cells.append(f"{float(self.effect[row, unit, column]):+.3g}")
            if ends is not None:
                low, high = (float(end[row, unit, column]) for end in ends)
                cells.append(f"{low:+.3g} to {high:+.3g}")
            rows.append(cells)
        return rows

    def __getitem__(self, examples: int | str | slice | Sequence[int]) -> ExpectedEstimate:
        """Some of the evidences, by name or number; E stays a dimension."""
        chosen: Any = self._index(examples) if isinstance(examples, str) else examples
        names = torch.arange(len(self.evidences))[chosen].reshape(-1).tolist()
        covariance = None if self.covariance is None else self.covariance[names][:, names]
        some = cast(ExpectedEstimate, super().__getitem__(chosen))
        acting = None if self.acting is None else self.acting[names]
        own = tuple(self.evidences[i] for i in names)
        return replace(some, evidences=own, covariance=covariance, acting=acting)

    def __repr__(self) -> str:
        """What was averaged, and the largest mean effect under each evidence."""
        _, units, classes = self.effect.shape
        lines = [
            f"ExpectedEstimate of {self.outcome or 'outcome'}: mean of {self.n_images:,.0f} images, {units} units, "
            f"{classes} class{'es' * (classes > 1)}",
            f"  {self.intervention}, {self.design}, {self.site}",
        ]
        for i, name in enumerate(self.evidences):
            values = self.effect[i].nan_to_num(0.0)
            unit, column = divmod(int(values.abs().argmax()), classes)
            error = "" if self.std_error is None else f" (standard error {float(self.std_error[i, unit, column]):.2g})"
            where = f"unit {unit}, {_class_text(self.classes[column])}"
            lines.append(f"  {name}: largest mean effect {float(values[unit, column]):+.4g}{error}, {where}")
        return "\n".join(lines)

    def _index(self, evidence: str) -> int:
        if evidence not in self.evidences:
            raise unknown_name("evidence", evidence, self.evidences)
        return self.evidences.index(evidence)

    def _column(self, target: int | str) -> int:
        if target not in self.classes:
            raise TargetError(expected("target", f"one of {shown_classes(self.classes)}", repr(target)))
        return self.classes.index(target)

    def _class_names(self, example: int) -> list[int | str]:
        return list(self.classes)

    def _errors(self) -> tuple[Tensor, Tensor | None]:
        if self.std_error is None:
            hint = "Add images: what one of them does says nothing about others."
            raise InferenceError(expected("data", "two images or more", f"{self.n_images:g}", hint))
        return super()._errors()


def answered(
    moments: Moments | None, evidences: Sequence[str], classes: Sequence[int | str], **about: Any
) -> ExpectedEstimate:
    """The expected effects that the moments of images say.

    Args:
        moments: of the images.
        evidences: their names, E.
        classes: what the columns are, C.
        about: other fields of the estimate: outcome, design, intervention, site, unit_labels ...

    Raises:
        InputError: there are no images.

    Warns:
        NoChangeWarning: every effect under an evidence is zero.
    """
    if moments is None:
        hint = "Update with images first, or ask about a subset that has some."
        raise InputError(expected("data", "one image or more", "none", hint))
    units = moments.mean.shape[1] - moments.extras
    effect = moments.mean[:, :units]
    nothing = [name for name, one in zip(evidences, effect, strict=True) if not bool(one.any())]
    if nothing:
        warnings.warn(
            f"{about.get('intervention') or 'The intervention'} changes nothing in any image under {nothing}, so that "
            "every effect is zero by construction. Check its fill or region, and `normalization=`.",
            NoChangeWarning,
            stacklevel=3,
        )
    covariance, error = moments.covariance, None
    if moments.n > 1:
        error = covariance.diagonal(dim1=0, dim2=1).movedim(-1, 0)[:, :units].clamp(min=0).sqrt()
    return ExpectedEstimate(
        effect=effect,
        std_error=error,
        dof=None if error is None else torch.full_like(effect, moments.n - 1),
        reference=moments.mean[:, units] if moments.extras else torch.full_like(effect[:, 0], torch.nan),
        insertion_effect=moments.mean[:, units + 1] if moments.extras > 1 else None,
        class_shape=(len(classes),),
        evidences=tuple(evidences),
        evidence=", ".join(evidences),
        classes=tuple(classes),
        n_images=moments.n,
        covariance=covariance,
        **about,
    )


def shown_classes(classes: Sequence[int | str]) -> str:
    """Classes for a message, at most a dozen of them."""
    shown = ", ".join(map(repr, classes[:12]))
    return shown if len(classes) <= 12 else f"{shown} ... ({len(classes)})"


def _class_text(name: int | str) -> str:
    return f"class {name}" if isinstance(name, int) else f"{name} class" if name == EXPLAINED else name
