"""An estimate as a tidy data frame, one row per example, unit and class, and as a few lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

    from ce_plugin.effects.estimate import Estimate

__all__ = ["class_names", "describe", "to_dataframe"]


def class_names(estimate: Estimate, example: int) -> list[int | str]:
    """What the columns of one example are: the target, the class index, or the index tuple of a larger output."""
    if estimate.target is not None:
        target = estimate.target[example].flatten().tolist()
        return [target[0] if len(target) == 1 else str(tuple(target))]
    if len(estimate.class_shape) > 1:
        return [str(index) for index in np.ndindex(*estimate.class_shape)]
    return list(range(estimate.effect.shape[2]))


def to_dataframe(estimate: Estimate, level: float, fdr: float) -> pd.DataFrame:
    """See :meth:`ce_plugin.effects.estimate.Estimate.to_dataframe`."""
    import pandas as pd

    n, units, classes = estimate.effect.shape
    example, unit, column = np.indices((n, units, classes)).reshape(3, -1)
    names = np.empty((n, classes), dtype=object)
    labels = np.full((n, units), "", dtype=object)
    for i in range(n):
        names[i] = class_names(estimate, i)
        own = estimate.labels_of(i)
        labels[i, : len(own)] = own
    data: dict[str, Any] = {
        "example": example,
        "unit": unit,
        "label": labels[example, unit],
        "class": names[example, column],
        "effect": _flat(estimate.effect),
    }
    blank = np.full(len(example), np.nan)
    data.update(std_error=blank, ci_low=blank, ci_high=blank, p_value=blank)
    significant = pd.array([pd.NA] * len(example), dtype="boolean")
    if estimate.std_error is not None:
        low, high = estimate.confidence_interval(level)
        found = _flat(estimate.significant(fdr))
        data.update(std_error=_flat(estimate.std_error), ci_low=_flat(low), ci_high=_flat(high))
        data.update(p_value=_flat(estimate.p_values()))
        significant = pd.array(found, dtype="boolean")
    data["significant"] = significant
    data["reference"] = estimate.reference.detach().cpu().numpy()[example, column]
    there = unit < estimate.n_units.cpu().numpy()[example]
    frame: pd.DataFrame = pd.DataFrame(data).loc[there].reset_index(drop=True).infer_objects()
    return frame


def describe(estimate: Estimate) -> str:
    """What was estimated and how, and the largest effect of the first examples."""
    n, units, classes = estimate.effect.shape
    what = "the target's output" if estimate.target is not None else f"{classes} class{'es' * (classes > 1)}"
    lines = [
        f"Estimate of {estimate.outcome or 'outcome'}: {n} example{'s' * (n > 1)}, {units} units, {what}",
        f"  {estimate.intervention}, {estimate.design}, {estimate.n_trials} trials, evidence: {estimate.evidence}",
    ]
    for i in range(min(n, 3)):
        values = estimate.effect[i].nan_to_num(0.0)
        unit, column = divmod(int(values.abs().argmax()), classes)
        errors = estimate.std_error
        error = "" if errors is None else f" (standard error {float(errors[i, unit, column]):.2g})"
        name = class_names(estimate, i)[column]
        lines.append(f"  {i}: largest effect {float(values[unit, column]):+.4g}{error}, unit {unit}, class {name}")
    return "\n".join(lines + ["  ..."] * (n > 3))


def _flat(x: Tensor) -> np.ndarray[Any, Any]:
    """All numbers in the order of the rows."""
    values: np.ndarray[Any, Any] = x.detach().cpu().numpy().reshape(-1)
    return values
