"""From values of units to maps in the shape of the inputs."""

from __future__ import annotations

from torch import Tensor

from ce_plugin.designs import Design, Joint
from ce_plugin.sites import Units

__all__ = ["spread"]


def spread(units: Units, design: Design, values: Tensor) -> tuple[Tensor, ...]:
    """Maps of unit values, (N, U); the groups of a joint design give each unit the mean over the groups it is in."""
    if isinstance(design, Joint):
        member = design.assignments(units.width).to(values)
        values = values @ member / member.sum(0).clamp(min=1)
    return units.spread(values)
