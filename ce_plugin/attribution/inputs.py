"""What a user passes to ``attribute`` and ``estimate``, checked before any work is done."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, TargetError, expected
from ce_plugin.interventions import Context, Intervention
from ce_plugin.sites import Evidence

__all__ = ["Baseline", "Target", "as_args", "as_evidences", "as_ids", "as_inputs", "flat_target"]

Target: TypeAlias = "int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None"
Baselines: TypeAlias = "Tensor | float | tuple[Tensor | float, ...] | None"
Given: TypeAlias = "Intervention | Evidence | Sequence[Intervention | Evidence] | None"


class Baseline(Intervention):
    """Captum's ``baselines`` as an intervention: values in *model* units that replace the fill.

    Args:
        baselines: a number or tensor for each input.
    """

    def __init__(self, baselines: tuple[Tensor | float, ...]) -> None:
        self.baselines = baselines

    def values(self, clean: Tensor, context: Context) -> Tensor:
        value = self.baselines[context.position]
        if not isinstance(value, Tensor):
            return torch.full_like(clean, float(value))
        return context.own(value.detach(), clean).to(clean).expand_as(clean)

    def __repr__(self) -> str:
        shown = (f"tensor{tuple(b.shape)}" if isinstance(b, Tensor) else repr(b) for b in self.baselines)
        return f"baselines({', '.join(shown)})"


def as_inputs(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs as a tuple.

    Raises:
        InputError: they are no tensors, empty, of unequal length, of integer type, or not finite.
    """
    tensors: tuple[Any, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
    for position, x in enumerate(tensors):
        name = "inputs" if len(tensors) == 1 else f"inputs[{position}]"
        if not isinstance(x, Tensor):
            got, todo = type(x).__name__, "Write `torch.as_tensor(x)`."
            raise InputError(expected(name, "a tensor, or a tuple of tensors", got, todo))
        if x.dim() == 0 or x.numel() == 0:
            raise InputError(expected(name, "one or more examples (N, ...), not empty", f"shape {tuple(x.shape)}"))
        if not x.is_floating_point():
            todo = "Write `images.float() / 255` if the model takes images in [0, 1]."
            raise InputError(expected(name, "of a floating-point type", str(x.dtype), todo))
        if len(x) != len(tensors[0]):
            raise InputError(expected(name, f"as many examples as the first input, {len(tensors[0])}", len(x)))
        if not bool(torch.isfinite(x).all()):
            bad = [i for i in range(len(x)) if not bool(torch.isfinite(x[i]).all())]
            raise InputError(expected(name, "finite everywhere", f"NaN or infinity in example(s) {bad[:5]}"))
    if not tensors:
        raise InputError(expected("inputs", "one tensor or more", "an empty tuple"))
    # What is computed here is no function of the user's graph.
    return tuple(x.detach() for x in tensors)


def as_args(args: Any) -> tuple[object, ...]:
    """Additional forward arguments as a tuple; None means none."""
    return () if args is None else args if isinstance(args, tuple) else (args,)


def as_ids(ids: Sequence[int] | Tensor | None, n: int) -> tuple[int, ...]:
    """One id per example; None gives all the same one.

    Raises:
        InputError: another number of ids than examples, or something else than integers.
    """
    if ids is None:
        return (0,) * n
    try:
        names = tuple(operator.index(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids))
    except TypeError as error:
        todo = "Take the examples' places in the data set."
        raise InputError(expected("ids", "one integer per example", repr(ids), todo)) from error
    if len(names) != n:
        raise InputError(expected("ids", f"{n} ids, one per example", len(names)))
    return names


def as_evidences(given: Given) -> list[Evidence]:
    """Evidence in the order in which it is set.

    Raises:
        ArgumentError: something that is neither an intervention nor evidence; random evidences that are drawn
            different numbers of times.
    """
    if given is None:
        return []
    every: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    for one in every:
        if not isinstance(one, (Intervention, Evidence)):
            wanted = "an intervention, an Evidence, or a list of them"
            raise ArgumentError(
                expected("given", wanted, type(one).__name__, "Write Evidence(intervention, units=...).")
            )
    evidences = [one if isinstance(one, Evidence) else Evidence(one) for one in every]
    draws = sorted({one.n_draws for one in evidences if one.is_random})
    if len(draws) > 1:
        wanted = "evidences that are drawn equally often (n_trials of their RandomMask)"
        raise ArgumentError(expected("given", wanted, f"{draws} draws"))
    return evidences


def as_baseline(baselines: Baselines, inputs: tuple[Tensor, ...] | None = None) -> Baseline:
    """Captum's baselines as an intervention.

    Args:
        baselines: a number or a tensor for each input.
        inputs: what they belong to; None for a layer, whose value is one tensor that is not known yet.

    Raises:
        InputError: another number of baselines than inputs, or one that does not broadcast or is not finite.
    """
    every = baselines if isinstance(baselines, tuple) else (baselines,)
    of: tuple[Tensor | None, ...] = (None,) if inputs is None else inputs
    if len(every) != len(of):
        raise InputError(expected("baselines", f"{len(of)} baseline(s), one per input", len(every)))
    for value, x in zip(every, of, strict=True):
        if not isinstance(value, (Real, Tensor, type(None))):
            raise InputError(expected("baselines", "a number or a tensor for each input", type(value).__name__))
        if value is not None and not bool(torch.isfinite(torch.as_tensor(value)).all()):
            raise InputError(expected("baselines", "finite", "NaN or infinity"))
        if isinstance(value, Tensor) and x is not None:
            try:
                value.expand_as(x)
            except RuntimeError as error:
                wanted = f"of a shape that broadcasts to the input's {tuple(x.shape)}"
                raise InputError(expected("baselines", wanted, tuple(value.shape))) from error
    return Baseline(tuple(0.0 if value is None else value for value in every))


def flat_target(target: Target, shape: tuple[int, ...]) -> Tensor | None:
    """Each example's target as an index into its flattened output.

    Args:
        target: any of Captum's forms: an int or a tuple for all examples, a tensor with one entry or one per
            example, a list of ints or of tuples.
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
    every = _index_rows(target, n)
    if any(len(index) != len(dims) for index in every) and not (dims == (1,) and all(i in ((), (0,)) for i in every)):
        wanted = f"{len(dims)} ind{'ex' if len(dims) == 1 else 'ices'} per example for outputs {shape}"
        todo = "" if dims else "The model returns one number per example: leave the target out."
        raise TargetError(
            expected("target", wanted, repr(target) if not isinstance(target, Tensor) else target.tolist(), todo)
        )
    flat = []
    for index in every:
        position = 0
        for value, size in zip(index, dims, strict=False):
            if not -size <= value < size:
                raise TargetError(expected("target", f"indices in 0 ... {size - 1} for outputs {shape}", value))
            position = position * size + value % size
        flat.append(position)
    return torch.tensor(flat)


def _index_rows(target: Target, n: int) -> list[tuple[int, ...]]:
    if isinstance(target, Tensor):
        if target.dim() > 1 or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            got = f"{target.dtype} of shape {tuple(target.shape)}"
            raise TargetError(expected("target", "an integer tensor of one dimension", got))
        rows: list[tuple[int, ...]] = [(int(v),) for v in target.reshape(-1)]
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
        return tuple(operator.index(value) for value in (row if isinstance(row, (tuple, list)) else (row,)))
    except TypeError as error:
        wanted = "an int, a tuple of ints, an integer tensor, or a list of ints or tuples"
        raise TargetError(expected("target", wanted, repr(target))) from error
