"""Mediation: how much of an intervention's effect on the outcome passes through a node, a set of nodes or a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ce_plugin.effects.shares import Shares, ratio_of_means, refuse_without_total
from ce_plugin.errors import TargetError, UnitError, expected

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Mediation", "MediationEffects", "mediation_effects"]

# One row per example; the rest belongs to all examples.
_BY_EXAMPLE = ("total", "indirect", "direct", "reference", "target", "predicted")


class MediationEffects(NamedTuple):
    """The four quantities of a mediation analysis, outcome under ``do`` minus outcome when idle, in float64.

    Attributes:
        total: TE = Y(x') - Y(x), (N, C).
        indirect: NIE = Y(x, M(x')) - Y(x), (N, U, C): only the mediator learns of the intervention.
        direct: NDE = Y(x', M(x)) - Y(x), (N, U, C): all but the mediator learn of it.
        interaction: TE - NDE - NIE, (N, U, C): what takes both.
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
    y, y1, through, around = map(_double, (clean, intervened, mediated, blocked))
    total, indirect, direct = y1 - y, through - y[:, None], around - y[:, None]
    return MediationEffects(total, indirect, direct, total[:, None] - direct - indirect)


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
            construction and tells nothing; proper subsets do.
        whole: the rows of ``indirect`` that stand for the whole layer.
        settings: what else reproduces the run, JSON-able.

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
        """TE - NDE - NIE, (N, U, C): what takes both the mediator's change and that of the rest."""
        return self.total[:, None] - self.direct - self.indirect

    def share(
        self,
        class_index: int | Tensor | None = None,
        level: float = 0.95,
        n_boot: int = 2000,
        seed: int = 0,
    ) -> Shares:
        """Which share of the total effect passes through each unit: ratios of means over the images.

            indirect share = mean NIE / mean TE,   direct share = 1 - mean NDE / mean TE

        The first is what the unit carries by itself, the second what is lost when it alone does not learn of the
        intervention; they differ by the interaction's share. Intervals: see :class:`~ce_plugin.effects.Shares`.

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
        if isinstance(examples, int) and not -len(self) <= examples < len(self):
            raise IndexError(f"example {examples} of a mediation of {len(self)}")
        index = range(len(self))[examples] if isinstance(examples, slice) else examples
        chosen = [index] if isinstance(index, int) else [int(i) for i in index]
        some: dict[str, Any] = {k: v[chosen] for k, v in vars(self).items() if k in _BY_EXAMPLE and torch.is_tensor(v)}
        return replace(self, **some)

    def __repr__(self) -> str:
        n, units, classes = self.indirect.shape
        what = "the target's output" if self.target is not None else f"{classes} class{'es' * (classes > 1)}"
        cut = " (a cut: everything passes through it, the share of the whole layer is 1 by construction)" * self.cut
        lines = [
            f"Mediation of {self.outcome or 'outcome'} through {self.site or 'a site'}{cut}",
            f"  {n} example{'s' * (n != 1)}, {units} unit{'s' * (units != 1)}, {what}; {self.intervention}".rstrip(
                "; "
            ),
        ]
        for i in range(min(n, 3) if units and classes else 0):
            unit, column = divmod(int(self.indirect[i].nan_to_num(0.0).abs().argmax()), classes)
            name = column if self.target is None else int(self.target[i])
            lines.append(
                f"  {i}: class {name}: total {float(self.total[i, column]):+.4g}, largest indirect "
                f"{float(self.indirect[i, unit, column]):+.4g} through {self.unit_labels[unit]}"
            )
        return "\n".join(lines + ["  ..."] * (n > 3))


def _double(x: Tensor) -> Tensor:
    """Float64 on the tensor's device, or on the CPU where the device has no such numbers."""
    return (x.cpu() if x.device.type == "mps" else x).double()
