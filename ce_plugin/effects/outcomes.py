"""What is measured at the end of a trial: probability, logit, log-odds, margin, prediction-weighted, or your own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ce_plugin.errors import OutcomeError, ProbabilityWarning, expected, unknown_name

OutcomeFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """A named function of a trial's output and of the reference's output.

    Args:
        name: what results and reports call it.
        function: ``function(output, reference_output)``, both (B, *K), to (B, *K'); examples must not mix.
        per_class: True where entry c of the result belongs to entry c of the output; False for one number per example.

    Example:
        >>> import torch
        >>> outcome = resolve_outcome("probability")
        >>> outcome(torch.zeros(1, 4), torch.zeros(1, 4))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    name: str
    function: OutcomeFunction
    per_class: bool = True

    def __call__(self, output: Tensor, reference_output: Tensor) -> Tensor:
        """The outcome, (B, *K'), in float32 at least: half precision and integers are widened first."""
        return self.function(_widen(output), _widen(reference_output))


def _widen(output: Tensor) -> Tensor:
    """Float32 where the output is coarser (half precision, integers): a difference of halves is mostly rounding."""
    return output if output.dtype in (torch.float32, torch.float64) else output.float()


def _raw(output: Tensor, reference_output: Tensor) -> Tensor:
    """The output as it is."""
    return output


def _probability(output: Tensor, reference_output: Tensor) -> Tensor:
    """Softmax over dimension 1."""
    return output.softmax(dim=1)


def _sigmoid(output: Tensor, reference_output: Tensor) -> Tensor:
    """Logistic function of each output by itself."""
    return output.sigmoid()


def _log_odds(output: Tensor, reference_output: Tensor) -> Tensor:
    """log p_c - log(1 - p_c) of the softmax, which is z_c - logsumexp of the other logits."""
    # 1 - p_c cancels only where p_c > 1/2, so at the largest logit alone: there the others are summed directly.
    top = output.argmax(dim=1, keepdim=True)
    others = output.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
    log_p = output.log_softmax(dim=1)
    odds = log_p - torch.log1p(-log_p.exp())
    return odds.scatter(1, top, output.gather(1, top) - others)


def _margin(output: Tensor, reference_output: Tensor) -> Tensor:
    """z_c minus the largest other logit."""
    best, where = output.topk(2, dim=1)
    rival = best[:, :1].expand_as(output).scatter(1, where[:, :1], best[:, 1:])
    return output - rival


def _prediction_weighted(output: Tensor, reference_output: Tensor) -> Tensor:
    """sum_c p_c (q_c - p_c)."""
    p, q = reference_output.softmax(dim=1), output.softmax(dim=1)
    return (p * (q - p)).sum(dim=1, keepdim=True)


_RAW = Outcome("raw", _raw)
OUTCOMES: dict[str, Outcome] = {
    outcome.name: outcome
    for outcome in (
        _RAW,
        Outcome("logit", _raw),
        Outcome("probability", _probability),
        Outcome("sigmoid", _sigmoid),
        Outcome("log_odds", _log_odds),
        Outcome("margin", _margin),
        Outcome("prediction_weighted", _prediction_weighted, per_class=False),
    )
}
# What each named outcome puts on top of the model's outputs.
_SOFTMAX = ("probability", "log_odds", "prediction_weighted")
_NEED_CLASSES = (*_SOFTMAX, "margin")


def _wrapped(function: OutcomeFunction, name: str) -> OutcomeFunction:
    """The user's function, with its result checked."""

    def outcome(output: Tensor, reference_output: Tensor) -> Tensor:
        result: object = function(output, reference_output)
        if not isinstance(result, Tensor):
            got = type(result).__name__
        elif result.dim() == 0 or len(result) != len(output):
            got = f"a tensor of shape {tuple(result.shape)}"
        else:
            return _widen(result)
        wanted = f"a callable whose result is a tensor with one row per example ({len(output)} here)"
        raise OutcomeError(expected("outcome", wanted, got, f"Check what {name!r} returns."))

    return outcome


def resolve_outcome(outcome: object) -> Outcome:
    """The outcome with this name, or one made of a callable.

    ====================== ==================================================================================
    name                   outcome of class c, for outputs z
    ====================== ==================================================================================
    "probability"          softmax over dimension 1
    "sigmoid"              1 / (1 + exp(-z_c)), for multi-label networks
    "logit", "raw", None   z_c
    "log_odds"             log p_c - log(1 - p_c) = z_c - logsumexp_{j != c} z_j; does not saturate
    "margin"               z_c - max_{j != c} z_j
    "prediction_weighted"  sum_c p_c (q_c - p_c): one number per example
    ====================== ==================================================================================

    "prediction_weighted" is what the public code of Yang et al. reports, with p the softmax of the reference (same
    evidence, all units idle) and q that of the trial. It equals <p, q> - |p|^2. Two consequences: where p is uniform it
    is 0 for *every* intervention, and it becomes smaller whenever the network's confidence does, without any change
    of mechanism. Put "log_odds" beside it.

    Args:
        outcome: a name of the table, an :class:`Outcome`, None, or a callable ``outcome(output, reference_output)`` on
            tensors (B, *K) that returns (B, *K').

    Returns:
        The outcome. A callable is taken to be per class; wrap it in ``Outcome(..., per_class=False)`` where it is not.

    Raises:
        UnknownNameError: for a name that is not in the table.
        OutcomeError: for anything else.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
        >>> resolve_outcome("margin")(logits, logits)
        tensor([[ 1., -1., -2.]])
        >>> resolve_outcome(lambda output, reference: output - reference)(logits, logits)
        tensor([[0., 0., 0.]])

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Eq. 1, and the authors' public code for the last row.
    """
    if outcome is None:
        return _RAW
    if isinstance(outcome, Outcome):
        return outcome
    if isinstance(outcome, str):
        if outcome not in OUTCOMES:
            raise unknown_name("outcome", outcome, OUTCOMES)
        return OUTCOMES[outcome]
    if not callable(outcome):
        wanted = "a name, an Outcome, None, or a callable outcome(output, reference_output)"
        raise OutcomeError(expected("outcome", wanted, type(outcome).__name__))
    name = str(getattr(outcome, "__name__", type(outcome).__name__))
    return Outcome(name, _wrapped(outcome, name))


def check_outcome(outcome: Outcome, output: Tensor, *, warn: bool = True) -> None:
    """Whether an outcome fits what the model returns, before any work is done.

    Args:
        outcome: the resolved outcome.
        output: the model's output on the clean inputs, (N, *K).
        warn: whether to warn.

    Raises:
        OutcomeError: for a comparison of classes where there is one class only.

    Warns:
        ProbabilityWarning: where a softmax or sigmoid would be put on what already is a probability.

    Example:
        >>> import torch
        >>> check_outcome(resolve_outcome("probability"), torch.zeros(2, 1))
        Traceback (most recent call last):
        ...
        ce_plugin.errors.OutcomeError: Expected argument `outcome` to be one for a single output ('sigmoid' or None),
        but got 'probability', which compares classes, for an output of shape (2, 1). Write outcome="sigmoid" if the
        output is the logit of a yes-or-no answer, outcome=None to take it as it is.
    """
    shape = tuple(output.shape)
    if outcome.name in _NEED_CLASSES and OUTCOMES[outcome.name] is outcome and (len(shape) < 2 or shape[1] < 2):
        got = f"{outcome.name!r}, which compares classes, for an output of shape {shape}"
        hint = (
            'Write outcome="sigmoid" if the output is the logit of a yes-or-no answer, '
            "outcome=None to take it as it is."
        )
        raise OutcomeError(expected("outcome", "one for a single output ('sigmoid' or None)", got, hint))
    if not warn or OUTCOMES.get(outcome.name) is not outcome or output.numel() == 0:
        return
    values, layer = _widen(output.detach()), ""
    if outcome.name in _SOFTMAX:
        coarse = output.dtype in (torch.float16, torch.bfloat16)
        sums_to_one = (values.sum(dim=1) - 1).abs().max() < (3e-2 if coarse else 1e-3)
        layer = "softmax" if bool((values >= 0).all() & sums_to_one) else ""
    elif outcome.name == "sigmoid" and bool(((values >= 0) & (values <= 1)).all()):
        layer = "sigmoid"
    if layer:
        warnings.warn(
            f"The model's outputs already seem to be probabilities, and outcome={outcome.name!r} puts a {layer} on "
            "top of them, which flattens every effect. Write outcome=None to take the outputs as they are, or hand "
            "over a model that returns logits.",
            ProbabilityWarning,
            stacklevel=3,
        )
