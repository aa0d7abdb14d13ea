"""From the outcomes of a design's trials to effects, example by example, by the design's own estimator."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ce_plugin.attribution.measured import Measured
from ce_plugin.designs import Design
from ce_plugin.effects.estimators import Effects, adjusted, difference_in_means, exact_difference
from ce_plugin.effects.smooth import smooth
from ce_plugin.errors import DesignError, expected
from ce_plugin.trials import Setting

__all__ = ["Answer", "answers", "average", "check_design"]

# Of random designs; exact ones need none.
_ESTIMATORS = ("adjusted", "difference_in_means", "smooth")
_FEW = 20


@dataclass(frozen=True)
class Answer:
    """What one head's trials say; the tensors of an :class:`~ce_plugin.effects.Estimate`."""

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
    insertion: Tensor | None = None


def check_design(setting: Setting) -> None:
    """Whether a design fits the units of every example and an estimator fits the design.

    Raises:
        DesignError: it does not.
    """
    design = setting.design
    if not design.exact and design.estimator not in _ESTIMATORS:
        raise DesignError(expected("design.estimator", f"one of {_ESTIMATORS}", f"{design.estimator!r} for {design!r}"))
    if not design.exact and design.estimator == "adjusted":
        _flip_probability(design)
    counts = setting.units.n_units.tolist()
    # A design that does not fit the units says so when it is asked for a trial.
    for example in {count: i for i, count in reversed(list(enumerate(counts)))}.values():
        setting.assignments(example, 0, 1)
        trials = setting.n_trials(example)
        if not design.exact and trials < _FEW:
            # Whether these are too few is for the estimator to say, but before they are run.
            _effects(setting, setting.assignments(example, 0, trials), torch.zeros(trials, 1), torch.zeros(1), example)


def answers(
    setting: Setting,
    outcomes: dict[str, Tensor],
    compared: dict[str, Tensor],
    measured: Measured,
    used: list[int],
    keep: bool,
) -> dict[str, Answer]:
    """Effects of all examples.

    Args:
        setting: the experiment.
        outcomes: (N, T, C) for each head.
        compared: what exact trials are compared with, (N, C) for each head.
        measured: the reference.
        used: number of trials of each example.
        keep: keep assignments and outcomes in the answer.

    Returns:
        For each head its answer, (N, U, C) tensors in the outcome's type, NaN where an example has no such unit.
    """
    out = {}
    for name, outcome in outcomes.items():
        n = len(outcome)
        drawn = [None if setting.design.exact else setting.assignments(i, 0, used[i]) for i in range(n)]
        parts = [_effects(setting, drawn[i], outcome[i, : used[i]], compared[name][i], i) for i in range(n)]
        width = max(len(part.effect) for part in parts)
        stacked = [
            torch.stack([pad(t, (0, 0, 0, width - len(t)), value=torch.nan) for t in column]).to(outcome)
            for column in (
                [part.effect for part in parts],
                [part.std_error for part in parts if part.std_error is not None],
                [part.dof for part in parts if part.dof is not None],
            )
            if column
        ]
        out[name] = Answer(
            effect=stacked[0],
            std_error=stacked[1] if len(stacked) > 1 else None,
            dof=stacked[2] if len(stacked) > 2 else None,
            reference=measured.reference[name],
            target=measured.targets[name],
            predicted=measured.predicted[name],
            class_shape=measured.class_shapes[name],
            n_trials=torch.tensor(used),
            assignments=_stack_trials([a for a in drawn if a is not None]) if keep and drawn[0] is not None else None,
            outcomes=outcome if keep else None,
        )
    return out


def _stack_trials(drawn: list[Tensor]) -> Tensor:
    longest = max(len(a) for a in drawn)
    return torch.stack([pad(a, (0, 0, 0, longest - len(a))) for a in drawn])


def _effects(setting: Setting, drawn: Tensor | None, outcomes: Tensor, compared: Tensor, example: int) -> Effects:
    """One example's effects, (U, C); units that only other examples have are NaN or left out."""
    design = setting.design
    if drawn is None:
        effects = exact_difference(outcomes, compared)
        return Effects(-effects.effect) if design.reference == "all" else effects
    own = drawn[:, : int(setting.units.n_units[example])].to(outcomes.device)
    blocks = design.blocks(len(own))
    if design.estimator == "difference_in_means":
        return difference_in_means(own, outcomes, blocks)
    if design.estimator == "adjusted":
        return adjusted(own, outcomes, _flip_probability(design), blocks)
    if setting.units.grid is None:
        todo = "Leave out `feature_mask` and windows for images, or give the design another `estimator`."
        raise DesignError(expected("design", "one for units that are not a grid", repr(design), todo))
    return smooth(own, outcomes, setting.units.grid, setting.variants(0, len(own)))


def _flip_probability(design: Design) -> float:
    p = design.flip_probability()
    if p is None:
        wanted = "a design that knows its flip probability for the adjusted estimator"
        raise DesignError(expected("design", wanted, repr(design), "Write `flip_probability`."))
    return p


def average(draws: list[Answer]) -> Answer:
    """The mean over draws of random evidence, with errors from the spread between draws."""
    if len(draws) == 1:
        return draws[0]
    effects = torch.stack([draw.effect for draw in draws])
    k = len(draws)
    return replace(
        draws[0],
        effect=effects.mean(0),
        std_error=effects.std(0) / k**0.5,
        dof=torch.full_like(draws[0].effect, k - 1),
        reference=torch.stack([draw.reference for draw in draws]).mean(0),
        insertion=None if draws[0].insertion is None else _mean([draw.insertion for draw in draws]),
        assignments=None,
        outcomes=None,
    )


def _mean(tensors: list[Tensor | None]) -> Tensor:
    return torch.stack([tensor for tensor in tensors if tensor is not None]).mean(0)
