"""From the outcomes of a design's trials to effects, example by example, by the design's own estimator."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ce_plugin.designs import Design
from ce_plugin.effects import Outcome
from ce_plugin.effects.estimators import Effects, adjusted, difference_in_means, exact_difference
from ce_plugin.effects.outcomes import OUTCOMES, check_outcome
from ce_plugin.effects.smooth import SmoothEffects, smooth
from ce_plugin.errors import DesignError, ModelError, OutcomeError, TargetError, expected
from ce_plugin.trials.batches import TrialSpec

Numbers: TypeAlias = "Tensor | npt.NDArray[np.integer[Any]]"
Target: TypeAlias = "int | tuple[int, ...] | Numbers | list[int] | list[tuple[int, ...]] | None"

# Of random designs; exact ones need none.
_ESTIMATORS = ("adjusted", "difference_in_means", "smooth")
_FEW = 20


@dataclass(frozen=True)
class Answer:
    """The effects on one head's outcomes, under the names they have in :class:`~ce_plugin.effects.Estimate`."""

    effect: Tensor
    std_error: Tensor | None
    dof: Tensor | None
    reference: Tensor
    target: Tensor | None
    predicted: Tensor | None
    class_shape: tuple[int, ...]
    n_trials: Tensor
    assignments: Tensor | None = None
    outcomes: Tensor | None = None
    insertion_effect: Tensor | None = None
    smoothed: Tensor | None = None


def answers(
    spec: TrialSpec,
    outcomes: dict[str, Tensor],
    compared: dict[str, Tensor],
    measure: OutcomeMeasure,
    used: list[int],
    keep: bool,
    guide: Tensor | None = None,
) -> dict[str, Answer]:
    """Effects of all examples.

    Args:
        spec: the trials.
        outcomes: (N, T, C) for each head.
        compared: what exact trials are compared with, (N, C) for each head.
        measure: the reference.
        used: number of trials of each example.
        keep: keep assignments and outcomes in the answer.
        guide: (N, U, C), what is known of the effects before the trials, for smooth maps.

    Returns:
        For each head its answer, (N, U, C) tensors in the outcome's type, NaN where an example has no such unit.

    Raises:
        ModelError, OutcomeError: outcomes that are NaN or infinite.
    """
    for name, outcome in outcomes.items():
        ran = torch.arange(outcome.shape[1]) < torch.tensor(used)[:, None]
        check_finite(spec, measure, outcome, ran)
        check_finite(spec, measure, compared[name][:, None], ran.any(1, keepdim=True))
    drawn = [None if spec.design.exact else spec.assignments(i, 0, trials) for i, trials in enumerate(used)]
    random = [rows for rows in drawn if rows is not None]
    found = {}
    for name, outcome in outcomes.items():
        parts = []
        for i, trials in enumerate(used):
            known = None if guide is None else guide[i]
            effects = _effects(spec, i, drawn[i], outcome[i, :trials], compared[name][i], known)
            parts.append([None if column is None else column.to(outcome) for column in effects])
        # Exact designs have effects only; examples with fewer units than others are filled up.
        columns = dict(zip(effects._fields, zip(*parts, strict=True), strict=True))
        there = {key: pad_sequence(list(c), True, torch.nan) for key, c in columns.items() if c[0] is not None}
        found[name] = Answer(
            effect=there["effect"],
            std_error=there.get("std_error"),
            dof=there.get("dof"),
            smoothed=there.get("smoothed"),
            reference=measure.reference[name],
            target=measure.targets[name],
            predicted=measure.predicted[name],
            class_shape=measure.class_shapes[name],
            n_trials=torch.tensor(used),
            assignments=pad_sequence(random, True) if keep and random else None,
            outcomes=outcome if keep else None,
        )
    return found


def check_finite(spec: TrialSpec, measure: OutcomeMeasure, outcomes: Tensor, ran: Tensor) -> None:
    """Whether the outcomes of trials are numbers from which effects can be computed.

    Args:
        spec: the trials.
        measure: by which outcomes were measured.
        outcomes: (N, T, C).
        ran: which of the trials were run, bool (N, T).

    Raises:
        ModelError: some are NaN or infinite, because outputs of the network are.
        OutcomeError: they are, and the outputs are not.
    """
    bad = ~torch.isfinite(outcomes).all(-1) & ran.to(outcomes.device)
    counts = bad.sum(1).tolist()  # the one look at values
    if not any(counts):
        return
    examples = [i for i, count in enumerate(counts) if count]
    first = examples[0]
    where = f"{counts[first]} of {int(ran[first].sum())} trials of example {first}"
    others = f" (and in {len(examples) - 1} other example(s))" if len(examples) > 1 else ""
    if measure.outputs_finite is not None and bool(measure.outputs_finite):
        hint = "Bound it where outputs are extreme: logarithms and quotients from below."
        got = f"{measure.outcome.name!r}, which is NaN or infinite in {where}{others}"
        raise OutcomeError(expected("outcome", f"finite under {spec.intervention!r}", got, hint))
    wanted = f"a model with finite outputs under {spec.intervention!r}"
    hint = (
        "The network divides by, or takes a logarithm of, what this intervention sets. Set another value: another fill "
        "(PixelMask('blur')), other baselines, or at a layer MeanOut(...)."
    )
    raise ModelError(expected("forward_func", wanted, f"NaN or infinity in {where}{others}", hint))


def _effects(
    spec: TrialSpec,
    example: int,
    drawn: Tensor | None,
    outcomes: Tensor,
    compared: Tensor,
    guide: Tensor | None,
) -> Effects | SmoothEffects:
    """One example's effects, (U, C); units that only other examples have are NaN or left out."""
    design = spec.design
    if drawn is None:
        effects = exact_difference(outcomes, compared)
        return Effects(-effects.effect) if design.reference == "all" else effects
    own = drawn[:, : int(spec.units.n_units[example])]
    blocks = design.blocks(len(own))
    if design.estimator == "difference_in_means":
        return difference_in_means(own, outcomes, blocks)
    if design.estimator == "adjusted":
        return adjusted(own, outcomes, _flip_probability(design), blocks)
    if spec.units.grid is None:
        hint = "Leave out `feature_mask` and windows for images, or give the design another `estimator`."
        raise DesignError(expected("design", "one for units that are not a grid", repr(design), hint))
    fills = spec.variants(0, len(own))
    alone = design.independent(len(own))
    if alone is None or int(alone[0].sum()) < 2:  # the first of many trials may hold fewer
        return smooth(own, outcomes, spec.units.grid, fills, guide=guide)
    independent, p = alone
    return smooth(own, outcomes, spec.units.grid, fills, independent=independent, p=p, guide=guide)


def average(draws: list[Answer]) -> Answer:
    """The mean over two or more draws of random evidence, with errors from the spread between draws."""
    first, k = draws[0], len(draws)
    effects = torch.stack([draw.effect for draw in draws])
    insertions = [draw.insertion_effect for draw in draws if draw.insertion_effect is not None]
    smoothed = [draw.smoothed for draw in draws if draw.smoothed is not None]
    return replace(
        first,
        effect=effects.mean(0),
        std_error=effects.std(0) / k**0.5,
        dof=torch.full_like(first.effect, k - 1),
        reference=torch.stack([draw.reference for draw in draws]).mean(0),
        insertion_effect=torch.stack(insertions).mean(0) if insertions else None,
        smoothed=torch.stack(smoothed).mean(0) if smoothed else None,
        assignments=None,
        outcomes=None,
    )


def check_design(spec: TrialSpec) -> None:
    """Whether a design fits the units of every example and an estimator fits the design.

    Raises:
        DesignError: it does not.
    """
    design = spec.design
    if not design.exact and design.estimator not in _ESTIMATORS:
        raise DesignError(expected("design.estimator", f"one of {_ESTIMATORS}", f"{design.estimator!r} for {design!r}"))
    if not design.exact and design.estimator == "adjusted":
        _flip_probability(design)
    counts = spec.units.n_units.tolist()
    for count in set(counts):
        # A design that does not fit this number of units says so when it is asked for a trial.
        example = counts.index(count)
        spec.assignments(example, 0, 1)
        trials = spec.n_trials(example)
        if not design.exact and trials < _FEW:
            # Whether these are too few is for the estimator to say, but before they are run.
            _effects(spec, example, spec.assignments(example, 0, trials), torch.zeros(trials, 1), torch.zeros(1), None)


def _flip_probability(design: Design) -> float:
    p = design.flip_probability()
    if p is None:
        wanted = "a design that knows its flip probability for the adjusted estimator"
        raise DesignError(expected("design", wanted, repr(design), "Write `flip_probability`."))
    return p


class OutcomeMeasure:
    """The reference's outputs, and how trials are measured against them.

    Args:
        heads: the reference's outputs, (N, *K) for each head.
        outcome: what is measured.
        target: in any of Captum's forms; only its outcome is kept then.
        predicted_only: without a target keep each example's predicted class only.
        decided: the outputs that say which class is predicted, where these are others than the reference's: those of
            the network without an autoencoder.
        warn: whether warnings come; not where the same outputs were, or will be, looked at once more.

    Attributes:
        reference: the reference's outcomes, (N, C) for each head.
        targets: index into the flattened output for each example, (N,), or None where all are kept, by head.
        predicted: predicted class, (N,), or None where the output is not (N, C >= 2), by head.
        class_shapes: trailing shape of the outcomes, by head.
        outputs_finite: whether all outputs were so far, bool (); None for outcomes that are finite where outputs are.

    Raises:
        ModelError: the reference's outputs are not finite, or there are several heads and one class is asked for.
        OutcomeError: the outcome does not fit the output, or is not finite for the reference's.
        TargetError: the target does not fit the output, or is missing where it is needed.
    """

    def __init__(
        self,
        heads: dict[str, Tensor],
        outcome: Outcome,
        target: Target,
        predicted_only: bool,
        decided: dict[str, Tensor] | None = None,
        warn: bool = True,
    ) -> None:
        if predicted_only and len(heads) > 1:
            hint = "Name one with `output=`, or call `estimate`, which returns them all."
            raise ModelError(expected("forward_func", "a model with one output head", sorted(heads), hint))
        self.outcome = outcome
        own_function = OUTCOMES.get(outcome.name) is not outcome
        self.outputs_finite = torch.tensor(True) if own_function else None
        self._outputs = heads
        self.targets: dict[str, Tensor | None] = {}
        self.predicted: dict[str, Tensor | None] = {}
        self.class_shapes: dict[str, tuple[int, ...]] = {}
        self.reference: dict[str, Tensor] = {}
        for name, head in heads.items():
            if not bool(torch.isfinite(head).all()):
                hint = "Check the inputs' range and the model's weights."
                wanted = "a model with finite outputs on the clean inputs"
                raise ModelError(expected("forward_func", wanted, "NaN or infinity", hint))
            check_outcome(outcome, head, warn=warn)
            deciding = head if decided is None else decided[name]
            self.predicted[name] = deciding.argmax(1) if head.dim() == 2 and head.shape[1] > 1 else None
            # Copies, because a user's outcome may write to what it is given.
            own = outcome(head.clone(), head.clone())
            self.targets[name] = self._target(name, head, own, target, predicted_only)
            self.class_shapes[name] = () if self.targets[name] is not None else tuple(own.shape[1:])
            self.reference[name] = self._kept(name, own, torch.arange(len(head), device=head.device))
            if own_function and not bool(torch.isfinite(self.reference[name]).all()):
                hint = "Bound it where outputs are extreme: logarithms and quotients from below."
                got = f"{outcome.name!r}, which is NaN or infinite"
                raise OutcomeError(expected("outcome", "finite on the clean outputs", got, hint))

    def _target(self, name: str, head: Tensor, own: Tensor, target: Target, predicted_only: bool) -> Tensor | None:
        if not self.outcome.per_class:
            if target is not None:
                hint = f"{self.outcome.name!r} is one number for all classes: leave the target out."
                raise TargetError(expected("target", "None", target, hint))
            return None
        flat = flat_target(target, tuple(own.shape))
        if flat is None and predicted_only:
            if own.shape[1:].numel() == 1:
                return None
            flat = self.predicted[name]
            if flat is None or own.shape != head.shape:
                wanted = f"an index into outputs {tuple(own.shape)}"
                hint = "Only for outputs (N, C) the predicted class is the default."
                raise TargetError(expected("target", wanted, "None", hint))
        return None if flat is None else flat.to(head.device)

    def _kept(self, name: str, outcome: Tensor, examples: Tensor) -> Tensor:
        flat = outcome.reshape(len(outcome), -1)
        target = self.targets[name]
        return flat if target is None else flat.gather(1, target[examples][:, None])

    def __call__(self, heads: dict[str, Tensor], examples: Tensor) -> dict[str, Tensor]:
        """Outcomes (B, C) of a batch of rows, each against its own example's reference."""
        measured = {}
        for name, head in heads.items():
            if self.outputs_finite is not None:  # no look at values, which would make every batch wait
                # Any NaN makes both NaN; several times faster than isfinite of every value.
                low, high = head.aminmax()
                self.outputs_finite = low.isfinite() & high.isfinite() & self.outputs_finite.to(head.device)
            measured[name] = self._kept(name, self.outcome(head, self._outputs[name][examples]), examples)
        return measured


def flat_target(target: Target, shape: tuple[int, ...]) -> Tensor | None:
    """Each example's target as an index into its flattened output.

    Args:
        target: any of Captum's forms: an int or a tuple for all examples, a tensor (or numpy array) with one entry or
            one per example, a list of ints or of tuples.
        shape: of the output, (N, *K).

    Returns:
        int64 (N,), or None where the output is one number per example and no target was given.

    Raises:
        TargetError: of the wrong form or number, or out of range.

    Example:
        >>> flat_target([(0, 1), (1, 2)], (2, 2, 3)).tolist()
        [1, 5]
        >>> flat_target(4, (2, 10)).tolist()
        [4, 4]
    """
    n, dims = shape[0], shape[1:]
    if target is None:
        return None
    flat = []
    for index in _index_rows(target, n):
        if len(index) != len(dims) and not (index == () and dims == (1,)):
            wanted = f"{len(dims)} ind{'ex' if len(dims) == 1 else 'ices'} per example for outputs {shape}"
            hint = "" if dims else "The model returns one number per example: leave the target out."
            got = target.tolist() if isinstance(target, Tensor) else repr(target)
            raise TargetError(expected("target", wanted, got, hint))
        position = 0
        for value, size in zip(index, dims, strict=False):
            if not -size <= value < size:
                raise TargetError(expected("target", f"indices in 0 ... {size - 1} for outputs {shape}", value))
            position = position * size + value % size
        flat.append(position)
    return torch.tensor(flat)


def check_target(target: Target, n: int) -> None:
    """Whether the target has one of Captum's forms, for n examples; whether it is in range the outputs will show.

    Raises:
        TargetError: it has not.
    """
    if target is not None:
        _index_rows(target, n)


def _index_rows(target: Target, n: int) -> list[tuple[int, ...]]:
    rows: list[tuple[int, ...]]
    if isinstance(target, np.ndarray):
        if target.ndim > 1 or not np.issubdtype(target.dtype, np.integer):
            got = f"{target.dtype} of shape {target.shape}"
            raise TargetError(expected("target", "an integer array of one dimension", got))
        rows = [(int(v),) for v in target.reshape(-1)]
    elif isinstance(target, Tensor):
        if target.dim() > 1 or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            got = f"{target.dtype} of shape {tuple(target.shape)}"
            raise TargetError(expected("target", "an integer tensor of one dimension", got))
        rows = [(int(v),) for v in target.reshape(-1)]
    elif isinstance(target, bool):
        raise TargetError(expected("target", "an index", target))
    elif isinstance(target, list):
        rows = [_indices(row, target) for row in target]
        if len(rows) != n:
            raise TargetError(expected("target", f"a list with one entry for each of {n} examples", f"{len(rows)}"))
    else:
        rows = [_indices(target, target)]
    if len(rows) not in (1, n):
        raise TargetError(expected("target", f"one target, or one for each of {n} examples", f"{len(rows)}"))
    return rows * n if len(rows) == 1 else rows


def _indices(row: object, target: object) -> tuple[int, ...]:
    """The indices of one example: integers of any kind (also numpy's), but nothing that would have to be rounded."""
    try:
        if isinstance(row, (bool, np.bool_)):
            raise TypeError
        return tuple(map(operator.index, row if isinstance(row, (tuple, list)) else (row,)))
    except TypeError as error:
        wanted = "an int, a tuple of ints, an integer tensor, or a list of ints or tuples"
        raise TargetError(expected("target", wanted, repr(target))) from error
