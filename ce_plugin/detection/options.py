"""The detector's options: what they can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ce_plugin.detection.aggregation import AGGREGATES
from ce_plugin.detection.benign import Benign
from ce_plugin.detection.signature import Signature
from ce_plugin.errors import ArgumentError, expected, unknown_name

__all__ = ["check_options", "check_ranges", "same_option"]


def check_options(options: Mapping[str, Any]) -> None:
    """Whether the options of :class:`CausalEffectDetector` can be.

    Args:
        options: by name.

    Raises:
        ArgumentError, UnknownNameError: the first that cannot.
    """
    for name in ("fpr", "holdout"):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ArgumentError(expected(name, "a float in (0, 1)", repr(value)))
    if options["aggregate"] not in AGGREGATES:
        raise unknown_name("aggregate", options["aggregate"], AGGREGATES)
    signature, benign, seed, attacks = (options[name] for name in ("signature", "benign", "seed", "attacks"))
    if signature is not None and not isinstance(signature, Signature):
        raise ArgumentError(expected("signature", "a Signature or None", type(signature).__name__))
    if benign not in (None, "default") and not isinstance(benign, Benign):
        raise ArgumentError(expected("benign", 'a Benign, "default" or None', repr(benign)))
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ArgumentError(expected("seed", "a whole number", repr(seed)))
    if attacks is not None and (not isinstance(attacks, (list, tuple)) or not attacks):
        raise ArgumentError(expected("attacks", "a list of attacks, or None", repr(attacks)))


def check_ranges(signature: Signature, benign: Benign | None, clip_values: tuple[float, float]) -> None:
    """Whether what alters images was made for images in this range of values.

    Raises:
        ArgumentError: a group's interventions, or the harmless alterations, were made for another one.
    """
    made_for = [("signature", values) for group in signature.groups for values in group.ranges()]
    if benign is not None:
        made_for.append(("benign", benign.value_range))
    for name, values in made_for:
        if tuple(values) != clip_values:
            todo = "Pass its `value_range=`, and sizes in the same units; or leave it out for the default."
            raise ArgumentError(expected(name, f"made for the clip values, {clip_values}", tuple(values), todo))


def same_option(mine: object, theirs: object) -> bool:
    """Whether an option keeps its value."""
    return mine is theirs or bool(mine == theirs)
