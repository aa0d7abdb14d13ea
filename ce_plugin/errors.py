"""Errors and warnings of the plugin, with one grammar for all messages.

A message names the argument, says what was expected and what it got, and ends with a hint what to do. Each class has
a page in the documentation (``docs/errors/``).
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping
from contextlib import suppress
from numbers import Real
from typing import Any, SupportsIndex, cast

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
    "check_integer",
    "check_number",
    "check_range",
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


def check_integer(
    argument: str,
    value: object,
    wanted: str = "",
    *,
    least: int | None = None,
    error: type[CEPluginError] = ArgumentError,
) -> int:
    """The value as an int; nothing that would have to be rounded, and no bool.

    Args:
        argument: its name, as the user wrote it.
        value: any object; numpy's integers count too.
        wanted: what was expected; None writes it from ``least``.
        least: the smallest value that is allowed.
        error: class of the error.

    Example:
        >>> check_integer("seed", 7)
        7
        >>> check_integer("n_trials", 1.5, least=2)
        Traceback (most recent call last):
        ce_plugin.errors.ArgumentError: Expected argument `n_trials` to be a whole number, 2 or more, but got 1.5.
    """
    number = None
    with suppress(TypeError):
        number = None if isinstance(value, bool) else operator.index(cast(SupportsIndex, value))
    if number is None or (least is not None and number < least):
        default = "a whole number" + ("" if least is None else f", {least} or more")
        raise error(expected(argument, wanted or default, repr(value)))
    return number


def check_number(
    argument: str,
    value: object,
    wanted: str = "a number",
    *,
    above: float = -math.inf,
    below: float = math.inf,
    hint: str = "",
    error: type[CEPluginError] = ArgumentError,
) -> float:
    """The value as a float strictly between two numbers; no bool, no text, no NaN.

    Example:
        >>> check_number("p", 0.5, "a share in (0, 1)", above=0, below=1)
        0.5
    """
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not above < number < below:
        raise error(expected(argument, wanted, repr(value), hint))
    return number


def check_range(argument: str, value: object) -> tuple[float, float]:
    """The value as a pair of floats (low, high), finite, with low < high.

    Example:
        >>> check_range("clip_values", (0, 255))
        (0.0, 255.0)
    """
    pair: list[Any] = list(value) if isinstance(value, (tuple, list)) else []
    numbers = [float(one) for one in pair if isinstance(one, Real) and str(one) not in ("True", "False")]
    if len(pair) != 2 or len(numbers) != 2 or not -math.inf < numbers[0] < numbers[1] < math.inf:
        raise ArgumentError(expected(argument, "a pair (low, high) of numbers with low < high", repr(value)))
    return numbers[0], numbers[1]


def unknown_name(
    argument: str, name: object, known: Iterable[str], synonyms: Mapping[str, str] | None = None
) -> UnknownNameError:
    """An error for an unknown name, which lists the known ones and suggests the closest.

    Args:
        argument: its name, as the user wrote it.
        name: the unknown one.
        known: names that there are.
        synonyms: what others call the same -> a known name.

    Example:
        >>> print(unknown_name("outcome", "logits", ["margin", "logit"]))
        Expected argument `outcome` to be one of 'logit', 'margin', but got 'logits'. Did you mean 'logit'?
    """
    names = sorted(known)
    meant = (synonyms or {}).get(str(name).lower())
    close = [meant] if meant in names else difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    shown = names if len(names) <= 20 else [*difflib.get_close_matches(str(name), names, n=8, cutoff=0.0), "..."]
    hint = f"Did you mean {close[0]!r}?" if close else ""
    return UnknownNameError(expected(argument, "one of " + ", ".join(map(repr, shown)), repr(name), hint))
