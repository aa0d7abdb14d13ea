"""What the filters of :class:`~ce_plugin.interventions.Smooth` are called, and what their parameters may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Union

from ce_plugin.errors import ArgumentError, expected, unknown_name

__all__ = ["POINTWISE", "Step", "checked_step"]

Step = tuple[Union[str, int, float], ...]


class _Parameter(NamedTuple):
    """What a filter's parameter may be."""

    name: str
    wanted: str
    fits: Callable[[Any], bool]
    whole: bool = False


_WINDOW = _Parameter("size", "a whole number of pixels, 1 or more", lambda size: size >= 1, whole=True)
_SIGMA = _Parameter("sigma", "a positive number", lambda sigma: sigma > 0)
_KINDS: dict[str, tuple[_Parameter, ...]] = {
    "bits": (_Parameter("depth", "a whole number of bits from 1 to 16", lambda depth: 1 <= depth <= 16, whole=True),),
    "median": (_WINDOW,),
    "mean": (_WINDOW,),
    "gauss": (_SIGMA,),
    "jpeg": (_Parameter("quality", "a whole number from 1 to 100", lambda quality: 1 <= quality <= 100, whole=True),),
    "soft_threshold": (_Parameter("threshold", "a number, 0 or more", lambda threshold: threshold >= 0),),
    "clip": (
        _Parameter("low", "a number", lambda low: True),
        _Parameter("high", "a number", lambda high: True),
    ),
    "stretch": (
        _Parameter("low", "a number", lambda low: True),
        _Parameter("high", "a number", lambda high: True),
    ),
    "scale": (_Parameter("factor", "a number, 0 or more", lambda factor: factor >= 0),),
    "shift": (
        _Parameter("dx", "a whole number of pixels", lambda dx: True, whole=True),
        _Parameter("dy", "a whole number of pixels", lambda dy: True, whole=True),
    ),
    "tv": (
        _Parameter("weight", "a positive number", lambda weight: weight > 0),
        _Parameter("n_iter", "a whole number of steps, 1 or more", lambda n_iter: n_iter >= 1, whole=True),
    ),
    "noise": (_SIGMA,),
}
# These look at one value at a time, so that inputs need not be images.
POINTWISE = ("bits", "soft_threshold", "clip", "stretch", "scale", "noise")


def checked_step(step: Sequence[str | float]) -> Step:
    """A step as a user or a JSON file gave it, with numbers of the right type.

    Raises:
        UnknownNameError: a filter of unknown name.
        ArgumentError: a parameter that is missing or out of range.

    Example:
        >>> checked_step(["median", 3.0])
        ('median', 3)
    """
    if isinstance(step, str) or not len(step) or not isinstance(step[0], str):
        raise ArgumentError(expected("steps", "tuples (name, parameters) such as ('gauss', 1.0)", repr(step)))
    kind, given = step[0], step[1:]
    if kind not in _KINDS:
        raise unknown_name("steps", kind, _KINDS)
    parameters = _KINDS[kind]
    if len(given) != len(parameters):
        names = ", ".join(f"`{parameter.name}`" for parameter in parameters)
        raise ArgumentError(expected("steps", f"{names} after {kind!r}", f"{len(given)} parameters"))
    checked = [_checked_value(parameter, value) for parameter, value in zip(parameters, given, strict=True)]
    if kind in ("clip", "stretch") and not checked[0] < checked[1]:
        raise ArgumentError(expected("high", f"greater than low = {checked[0]}", checked[1]))
    return (kind, *checked)


def _checked_value(parameter: _Parameter, given: str | float) -> int | float:
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    fits = math.isfinite(value) and not isinstance(given, (str, bool)) and parameter.fits(value)
    if not fits or (parameter.whole and not value.is_integer()):
        raise ArgumentError(expected(parameter.name, parameter.wanted, repr(given)))
    return int(value) if parameter.whole else value
