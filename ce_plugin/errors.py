"""Errors and warnings of the plugin, with one grammar for all messages.

A message names the argument, says what was expected and what it got, and ends with a hint what to do. Each class has
a page in the documentation (``docs/errors/``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "AttackError",
    "CEPluginError",
    "CEPluginWarning",
    "DesignError",
    "FileError",
    "InferenceError",
    "InputError",
    "ModelError",
    "NoChangeWarning",
    "NormalizationWarning",
    "OutcomeError",
    "ProbabilityWarning",
    "SaturationWarning",
    "TargetError",
    "UnitError",
    "UnknownNameError",
    "expected",
    "unknown_name",
]


class CEPluginError(Exception):
    """Base class of every error that the plugin raises on purpose."""


class ArgumentError(CEPluginError, ValueError):
    """An argument has a value that it cannot take."""


class InputError(CEPluginError, ValueError):
    """The images (or other inputs) cannot be used: empty, not finite, of integer type, of unequal length ..."""


class UnitError(CEPluginError, ValueError):
    """The units cannot be used: a wrong number or shape of masks, fractional ids, windows that do not fit ..."""


class TargetError(CEPluginError, ValueError):
    """The target is missing where it is needed, of the wrong form, or out of range."""


class OutcomeError(CEPluginError, ValueError):
    """The outcome does not fit what the model returns."""


class ModelError(CEPluginError, TypeError):
    """The model (``forward_func``) returns something that cannot be explained, or cannot be run here."""


class AttackError(CEPluginError, ValueError):
    """An attack cannot be built or run with these settings."""


class DesignError(CEPluginError, ValueError):
    """A design cannot produce the requested trials."""


class InferenceError(CEPluginError, ValueError):
    """P-values, intervals or significance were requested from a result without sampling error."""


class UnknownNameError(CEPluginError, ValueError):
    """The name of a layer, attack, outcome, fill, design ... is unknown."""


class FileError(CEPluginError, OSError):
    """A file cannot be read or must not be overwritten."""


class CEPluginWarning(UserWarning):
    """Base class of every warning of the plugin."""


class NoChangeWarning(CEPluginWarning):
    """An intervention changed nothing, so that every effect is zero by construction."""


class NormalizationWarning(CEPluginWarning):
    """Inputs seem to be normalised twice."""


class ProbabilityWarning(CEPluginWarning):
    """The model's outputs already are probabilities, and the outcome applies a softmax or sigmoid to them."""


class SaturationWarning(CEPluginWarning):
    """Intervals on saturated probabilities are unreliable."""


def expected(argument: str, wanted: str, got: object, hint: str = "") -> str:
    """An error message, in the grammar that all of them share.

    Args:
        argument: name of the argument as the user wrote it.
        wanted: what was expected ("a float in (0, 1)").
        got: what the argument was instead; printed as it is.
        hint: a sentence that says what to do, unless that is obvious.

    Example:
        >>> expected("p", "a float in (0, 1)", 1.5, "Write 0.1 for ten per cent.")
        'Expected argument `p` to be a float in (0, 1), but got 1.5. Write 0.1 for ten per cent.'
    """
    return f"Expected argument `{argument}` to be {wanted}, but got {got}.{' ' + hint if hint else ''}"


def unknown_name(argument: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """An error for an unknown name, which lists the known ones and suggests the closest.

    Example:
        >>> print(unknown_name("outcome", "logits", ["margin", "logit"]))
        Expected argument `outcome` to be one of 'logit', 'margin', but got 'logits'. Did you mean 'logit'?
    """
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    shown = names if len(names) <= 20 else [*difflib.get_close_matches(str(name), names, n=8, cutoff=0.0), "..."]
    hint = f"Did you mean {close[0]!r}?" if close else ""
    return UnknownNameError(expected(argument, "one of " + ", ".join(map(repr, shown)), repr(name), hint))
